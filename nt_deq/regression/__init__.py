"""Kernel regression where the kernel does not fit into memory, or onto one machine.

`KernelRegression` and `KernelClassifier` are exact and quadratic in the number of inputs;
`FeatureRegression` on features of the kernel is linear in it.
"""

from nt_deq.errors import LostProcessError, NotPositiveDefiniteError, StoreError
from nt_deq.regression.cg import Solution
from nt_deq.regression.feature_regression import FeatureRegression, in_batches
from nt_deq.regression.features import (
    Features,
    NystromFeatures,
    SketchFeatures,
    concatenate,
    feature_error,
)
from nt_deq.regression.kernel_classifier import KernelClassifier
from nt_deq.regression.kernel_regression import KernelRegression
from nt_deq.regression.plan import Plan
from nt_deq.regression.power_series import Series, deq_series

__all__ = [
    "FeatureRegression",
    "Features",
    "KernelClassifier",
    "KernelRegression",
    "LostProcessError",
    "NotPositiveDefiniteError",
    "NystromFeatures",
    "Plan",
    "Series",
    "SketchFeatures",
    "Solution",
    "StoreError",
    "concatenate",
    "deq_series",
    "feature_error",
    "in_batches",
]
