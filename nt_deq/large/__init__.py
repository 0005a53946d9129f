"""Kernel regression where the kernel does not fit into memory, or onto one machine.

`KernelRegression` is exact and quadratic in the number of inputs; `FeatureRegression` on features
of the kernel is linear in it.
"""

from nt_deq.kernel import NotPositiveDefiniteError
from nt_deq.large.cg import Solution
from nt_deq.large.feature_regression import FeatureRegression, in_batches
from nt_deq.large.features import (
    Features,
    NystromFeatures,
    SketchFeatures,
    concatenate,
    feature_error,
)
from nt_deq.large.plan import Plan
from nt_deq.large.regression import KernelRegression
from nt_deq.large.series import Series, deq_series
from nt_deq.large.store import StoreError

__all__ = [
    "FeatureRegression",
    "Features",
    "KernelRegression",
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
