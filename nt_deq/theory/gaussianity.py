"""Tests of whether a sample is Gaussian."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num
from scipy import special

from nt_deq.errors import ArgumentError
from nt_deq.theory.definiteness import smallest_eigenvalue


class GaussianityTest(NamedTuple):
    """A test of the hypothesis that a sample is Gaussian.

    Attributes:
      statistic: large where the sample is not.
      p_value: the probability of as large a one under the hypothesis.
    """

    statistic: float
    p_value: float


class Lilliefors(NamedTuple):
    """The outcome of `lilliefors`; `statistic` and `p_value` as in `GaussianityTest`.

    Attributes:
      critical: the statistic that 5 % of Gaussian samples exceed.
      null_mean: its mean over Gaussian samples.
    """

    statistic: float
    p_value: float
    critical: float
    null_mean: float


def lilliefors(sample: Num[ArrayLike, " n"], *, draws: int = 2000, seed: int = 0) -> Lilliefors:
    """Tests whether a sample is Gaussian, its mean and variance being unknown (Lilliefors 1967).

    The statistic is the Kolmogorov-Smirnov distance to the Gaussian with the sample's own mean and
    variance. It is smaller than that to the true one, so the p-value of the plain test, which would
    be far too large, is replaced by the share of simulated Gaussian samples that are further away.

    Args:
      sample: `(n,)`, `n >= 4`.
      draws: simulated samples; the p-value is at least `1/(draws + 1)`. They are kept for the next
        call with the same `n`.
      seed: of the simulation.
    """
    sample = _sample("sample", sample, 1)
    distance = float(_distance_to_fit(sample[None])[0])
    null = _null_distances(len(sample), draws, seed)
    return Lilliefors(
        distance,
        float((1 + np.sum(null >= distance)) / (draws + 1)),
        float(np.quantile(null, 0.95)),
        float(null.mean()),
    )


class Mardia(NamedTuple):
    """Mardia's two tests, of the third and of the fourth moments."""

    skewness: GaussianityTest
    kurtosis: GaussianityTest


def mardia(sample: Num[ArrayLike, "n d"]) -> Mardia:
    """Tests whether vectors are jointly Gaussian, of any mean and covariance (Mardia 1970).

    p-values are those of large samples: `n b₁/6 ~ χ²(d(d+1)(d+2)/6)`, and `b₂ - d(d+2)` over
    `√(8d(d+2)/n)` standard normal, two-sided.

    Args:
      sample: `(n, d)`, `n > d`.
    """
    sample = _sample("sample", sample, 2)
    n, d = sample.shape
    centred = sample - sample.mean(axis=0)
    # Rows of the left factor are the sample with covariance 1/n.
    z = np.linalg.svd(centred, full_matrices=False)[0] * np.sqrt(n)
    third = (z[:, :, None] * z[:, None, :]).reshape(n, d * d).T @ z / n
    skewness = n * float(np.sum(third**2)) / 6
    kurtosis = (float(np.mean(np.sum(z * z, axis=1) ** 2)) - d * (d + 2)) / np.sqrt(
        8 * d * (d + 2) / n
    )
    return Mardia(
        GaussianityTest(skewness, float(special.chdtrc(d * (d + 1) * (d + 2) / 6, skewness))),
        GaussianityTest(kurtosis, float(2 * special.ndtr(-abs(kurtosis)))),
    )


def covariance_test(
    sample: Num[ArrayLike, "n d"], covariance: Num[ArrayLike, "d d"]
) -> GaussianityTest:
    """Tests whether Gaussian vectors of mean 0 have a given covariance, by the likelihood ratio.

    `n (tr Σ⁻¹C - ln det Σ⁻¹C - d) ~ χ²(d(d+1)/2)` for large samples, `C` being the sample's second
    moments (Anderson 2003, "An Introduction to Multivariate Statistical Analysis", section 10.8).

    Args:
      sample: `(n, d)`, `n > d`.
      covariance: `Σ`, `(d, d)`, positive definite.
    """
    sample = _sample("sample", sample, 2)
    n, d = sample.shape
    covariance = np.asarray(covariance, np.float64)
    if covariance.shape != (d, d):
        raise ArgumentError(f"covariance has shape {covariance.shape}; it must be ({d}, {d}).")
    if not smallest_eigenvalue(covariance).positive:
        raise ArgumentError("covariance is singular: drop inputs that the others determine.")
    ratio = np.linalg.solve(covariance, sample.T @ sample / n)
    statistic = n * max(float(np.trace(ratio) - np.linalg.slogdet(ratio)[1] - d), 0.0)
    return GaussianityTest(statistic, float(special.chdtrc(d * (d + 1) / 2, statistic)))


def _sample(name: str, sample, ndim: int) -> np.ndarray:
    sample = np.asarray(sample, np.float64)
    least = 4 if ndim == 1 else 1 + sample.shape[-1]
    if sample.ndim != ndim or len(sample) < least:
        shape = "(n,)" if ndim == 1 else "(n, d)"
        raise ArgumentError(f"{name} has shape {sample.shape}; it must be {shape}, n >= {least}.")
    if not np.isfinite(sample).all():
        raise ArgumentError(f"{name} has NaN or infinite values; drop what has no equilibrium.")
    return sample


def _distance_to_fit(samples: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance of every row to the Gaussian fitted to it."""
    n = samples.shape[1]
    scale = samples.std(axis=1, ddof=1, keepdims=True)
    if not scale.all():
        raise ArgumentError("sample has variance 0: it is constant.")
    z = np.sort((samples - samples.mean(axis=1, keepdims=True)) / scale, axis=1)
    cdf, steps = special.ndtr(z), np.arange(n + 1) / n
    return np.maximum((steps[1:] - cdf).max(axis=1), (cdf - steps[:-1]).max(axis=1))


@lru_cache(maxsize=16)
def _null_distances(n: int, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // n)
    parts = [
        _distance_to_fit(rng.standard_normal((min(rows, draws - start), n)))
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts)
