"""Probabilities of classes from the outputs of a Gaussian process.

Least-squares classification (Rasmussen & Williams 2006, GPML, sec. 6.5): of the process that was
fitted to targets which are large for an input's class and small for every other, with mean `μ_c`
and variance `σ²` of the output of a class,

    p_c ∝ Φ((α μ_c + β)/√(1 + α² σ²))

(eq. 6.43, which for two classes and one output is normalised as it is).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import optimize
from scipy.special import log_ndtr, logsumexp


def log_probabilities(
    mean: Float[np.ndarray, "m C"], variance: Float[np.ndarray, " m"], slope: float, shift: float
) -> Float[np.ndarray, "m classes"]:
    """Computes `log p_c`, `(m, C)`.

    Args:
      mean: outputs for the classes, `(m, C)`; `(m, 1)` is that of the second of two.
      variance: of each of them, `(m,)`; zeros are outputs taken as known.
      slope: `α`.
      shift: `β`.
    """
    z = (slope * mean + shift) / np.sqrt(1 + slope**2 * variance)[:, None]
    log_p = log_ndtr(np.concatenate([-z, z], axis=1) if z.shape[1] == 1 else z)
    return log_p - logsumexp(log_p, axis=1, keepdims=True)


def calibrate(
    mean: Float[np.ndarray, "n C"],
    variance: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    weights: Real[np.ndarray, " n"] | None = None,
) -> tuple[float, float]:
    """Finds the `α` and `β` that make the labels the most probable.

    Args:
      mean: what was predicted without knowing the labels, such as leave-one-out: `(n, C)`.
      variance: of each, `(n,)`.
      labels: indices of the classes, `(n,)`.
      weights: how often each was observed, `(n,)`; `None` is once.
    """

    def loss(coordinates):
        log_p = log_probabilities(mean, variance, np.exp(coordinates[0]), coordinates[1])
        return -np.average(log_p[np.arange(len(labels)), labels], weights=weights)

    found = optimize.minimize(loss, [0.0, 0.0], bounds=[(-5, 5), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])
