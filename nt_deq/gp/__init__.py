"""Gaussian processes whose covariance is the kernel of an infinitely wide network.

    y = f(x) + ε,     f ~ GP(0, K),     ε ~ N(0, noise),

with any stax kernel for `K`: the NNGP kernel, of which this is the network with random weights, or
the NTK. Everything is exact, by one Cholesky factor of `K + noise`, after Rasmussen & Williams
2006, "Gaussian Processes for Machine Learning" (GPML), and differentiable: through the equilibrium
of an infinitely deep network implicitly.

All is computed in float64 where JAX's x64 mode is on, and for up to 2000 inputs also where it is
not, outside of JAX's transformations; otherwise in float32. Nothing but `noise` is added to the
diagonal: where `K + noise` is not positive definite to rounding you get an error that says so, or
NaN inside `jax.jit`. What is enough is about `ε n` times the mean of the diagonal, with `ε` of 1e-7
in float32 and 2e-16 in float64.
"""

from __future__ import annotations

from nt_deq.gp.classifier import Functions, LaplaceClassifier
from nt_deq.gp.ensemble import TrainedEnsemble
from nt_deq.gp.fitting import fit, fit_classifier, largest_W_std
from nt_deq.gp.matrices import variances
from nt_deq.gp.process import GaussianProcess, JointPrediction, Prediction
from nt_deq.gp.search import Fit

__all__ = [
    "Fit",
    "Functions",
    "GaussianProcess",
    "JointPrediction",
    "LaplaceClassifier",
    "Prediction",
    "TrainedEnsemble",
    "fit",
    "fit_classifier",
    "largest_W_std",
    "variances",
]
