"""Probabilities of classes from normal distributions of their functions: `E[softmax(f)]`."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.scipy.special import log_ndtr, logsumexp
from jaxtyping import Float, Key

from nt_deq.activations.mixtures import kolmogorov_rule

_DRAWS = 4096  # with their negatives: measured in the tests, and in the documentation
_ROWS = 32  # of which all draws are held at once


@jax.jit
def log_probabilities(
    mean: Float[Array, "m C"],
    covariance: Float[Array, "m C C"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "m C"]:
    """Computes `log E[softmax(f)]` for `f ~ N(mean, covariance)`.

    Of two classes by the mixture of normal distribution functions that the logistic function is
    (see `nt_deq.activations.mixtures`): `E[Φ(z/s)] = Φ(μ/√(s² + σ²))` at every variance. Of more by
    draws, which are the same for every input.

    Args:
      mean: of the functions.
      covariance: of them, positive definite.
      key: of draws by chance; `None` is quasi-random ones, always the same.
    """
    classes = mean.shape[1]
    if classes == 2:
        return _two_classes(mean, covariance)
    basis = jnp.asarray(_contrasts(classes), mean.dtype)  # the softmax depends on no more
    centred = _matmul(mean, basis)
    spread = jnp.einsum("ij,mik,kl->mjl", basis, covariance, basis, precision="highest")
    factor = jnp.linalg.cholesky(spread)
    shape = _DRAWS // 2, classes - 1
    half = _quasi_normal(*shape) if key is None else random.normal(key, shape, mean.dtype)
    draws = jnp.asarray(half, mean.dtype)
    draws = jnp.concatenate([draws, -draws])

    def average(row):
        centre, factor = row
        f = _matmul(centre[None] + _matmul(draws, factor.T), basis.T)
        return logsumexp(jax.nn.log_softmax(f, axis=1), axis=0) - np.log(_DRAWS)

    log_p = lax.map(average, (centred, factor), batch_size=_ROWS)
    return log_p - logsumexp(log_p, axis=1, keepdims=True)


def _two_classes(mean: Array, covariance: Array) -> Array:
    difference = mean[:, 0] - mean[:, 1]
    own = covariance[:, 0, 0] + covariance[:, 1, 1]
    variance = jnp.maximum(own - covariance[:, 0, 1] - covariance[:, 1, 0], 0)
    k, weights = (jnp.asarray(a, mean.dtype) for a in kolmogorov_rule(14))
    z = difference[:, None] / jnp.sqrt(((2 * k) ** 2)[None, :] + variance[:, None])
    log_p = log_ndtr(jnp.stack([z, -z], axis=1))
    return logsumexp(log_p + jnp.log(weights)[None, None, :], axis=2)


def _contrasts(classes: int) -> Float[np.ndarray, "C contrasts"]:
    """An orthonormal basis of what sums to 0 over classes (Helmert's)."""
    basis = np.tril(np.ones((classes, classes)), -1)[:, :-1]
    basis = basis - basis.sum(0) * np.eye(classes)[:, :-1]
    return basis / np.linalg.norm(basis, axis=0)


@lru_cache
def _quasi_normal(count: int, size: int) -> Float[np.ndarray, "count size"]:
    """Sobol's sequence, scrambled, as normal numbers."""
    from scipy.special import ndtri
    from scipy.stats import qmc

    # SciPy before 1.15 has no `rng`.
    sequence = qmc.Sobol(size, seed=0)  # pyright: ignore[reportCallIssue]
    return ndtri(sequence.random(count))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
