"""The Gaussian expectations of the logistic functions, as mixtures of those of the normal ones.

The logistic distribution is that of `2K g`, with `g ~ N(0, 1)` and `K` of Kolmogorov's distribution
(Andrews & Mallows 1974, "Scale mixtures of normal distributions"). So with `s = 2K`, and `Φ` and
`n` the distribution function and the density of `N(0, 1)`,

    sigmoid(z)  = E[Φ(z/s)]                     softplus(z) = E[s smooth_relu(z/s)]
    silu(z)     = E[s gelu(z/s)]                tanh(z)     = E[erf(√2 z/s)]

where `smooth_relu(z) = z Φ(z) + n(z) = E[max(z + g, 0)]`. The moments of a mixture over `s` are the
mixture over pairs `(s, s')` of those of its components. These are closed forms, which hold at every
variance, large ones too, where Hermite series need too many terms.

The mixture is integrated by the Gaussian rule of the distribution of `log K`. The moments are
analytic in it, in a strip of half-width π/2 around the real line whatever the variances: the
integrands have √(s² + k) in them. So 7 nodes give float32, and 14 give float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nt_deq.activations import closed_forms, hermite
from nt_deq.activations.closed_forms import Batch, Moments
from nt_deq.activations.expansion import Function


class Components(NamedTuple):
    """What a function is a mixture of: `φ(z) = E[s^power · ψ(z/s)]` with `s = scale · K`.

    Attributes:
      moments: those of `ψ`, `(k1, k2, c, k1 k2 - c²) -> (V, V̇)`.
      scale: 2 where `φ` is of the logistic distribution, and √2 for tanh.
      power: 0 or 1.
      reach: the variance up to which the Hermite series of `φ` is taken. It is good there in both
        dtypes, up to the sixth derivative of the moments, and takes less time.
    """

    moments: Callable[[Batch, Batch, Batch, Batch], Moments]
    scale: float
    power: int
    reach: float


TANH = Components(closed_forms.erf_moments, 2**0.5, 0, 4.0)
SIGMOID = Components(closed_forms.normal_moments, 2.0, 0, 16.0)
SOFTPLUS = Components(closed_forms.smooth_relu_moments, 2.0, 1, 16.0)
SILU = Components(closed_forms.gelu_moments, 2.0, 1, 16.0)


def dual(components: Components, fn: Function, k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`(E[φ(u) φ(u')], E[φ'(u) φ'(u')])`, elementwise on arrays that broadcast.

    Args:
      components: of `φ`.
      fn: `φ` itself, expanded where all variances are small.
      k1: variance of `u`.
      k2: variance of `u'`.
      c: their covariance, clipped to `|c| <= √(k1 k2)`.
    """
    return hermite.dual_up_to(components.reach, fn, partial(_mixed, components), k1, k2, c)


def between(
    components: Components, fn: Function, k1: Batch, k2: Batch
) -> Callable[[Batch], Moments]:
    """`dual` as a function of `c`, as `hermite.between`."""
    return hermite.between_up_to(components.reach, fn, partial(_mixed, components), k1, k2)


def _mixed(components: Components, k1: Batch, k2: Batch, c: Batch) -> Moments:
    return _mix(components, k1, k2, c, closed_forms.covariance_determinant(k1, k2, c))


def dual_diagonal(components: Components, k: Batch) -> Moments:
    """`dual(φ, φ, k, k, k)`."""
    return _mix(components, k, k, k, jnp.zeros_like(k))


def _mix(components: Components, k1: Batch, k2: Batch, c: Batch, determinant: Batch) -> Moments:
    """The moments of a mixture, a sum over the pairs of its components."""
    k, weights = kolmogorov_rule(7 if jnp.finfo(c.dtype).nmant < 24 else 14)
    scales = components.scale * k
    pairs = np.indices((k.size, k.size)).reshape(2, -1)
    weight, scale = (a[pairs].astype(c.dtype) for a in (weights, scales))

    @jax.checkpoint  # a term is recomputed in reverse mode: kept, all of them are 49 or 196 kernels
    def add(total, pair):
        (w1, w2), (s1, s2) = pair
        v, slope = components.moments(
            k1 / (s1 * s1), k2 / (s2 * s2), c / (s1 * s2), determinant / (s1 * s2) ** 2
        )
        size = w1 * w2 * (s1 * s2) ** components.power
        return (total[0] + size * v, total[1] + size / (s1 * s2) * slope), None

    zero = jnp.zeros(jnp.broadcast_shapes(k1.shape, k2.shape, c.shape), c.dtype)
    return lax.scan(add, (zero, zero), (weight.T, scale.T))[0]


def _kolmogorov_density(x: np.ndarray) -> np.ndarray:
    """The density of Kolmogorov's distribution, by the series that converges fast at each `x`."""
    i = np.arange(1, 10)[:, None]
    with np.errstate(under="ignore"):
        upper = 8 * x * (-1.0) ** (i - 1) * i**2 * np.exp(-2 * (i * x) ** 2)
        odd = ((2 * i - 1) * np.pi) ** 2 / 4
        lower = np.sqrt(2 * np.pi) * np.exp(-odd / (2 * x**2)) * (odd / x**4 - 1 / x**2)
    return np.where(x > 0.8, np.sum(upper, axis=0), np.sum(lower, axis=0))


@lru_cache
def kolmogorov_rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `K` and weights of the Gaussian rule of `log K`, by Lanczos' algorithm."""
    log_k = np.linspace(np.log(0.1), np.log(6.0), 2001)  # beyond it is less than rounding
    k = np.exp(log_k)
    weight = _kolmogorov_density(k) * k
    root = np.sqrt(weight / np.sum(weight))
    basis = [np.zeros_like(root), root]
    diagonal, beside = [], [0.0]
    for _ in range(nodes):
        last = basis[-1]
        diagonal.append(np.sum(log_k * last**2))
        following = (log_k - diagonal[-1]) * last - beside[-1] * basis[-2]
        beside.append(np.sqrt(np.sum(following**2)))
        basis.append(following / beside[-1])
    jacobi = np.diag(diagonal) + np.diag(beside[1:-1], 1) + np.diag(beside[1:-1], -1)
    log_nodes, vectors = np.linalg.eigh(jacobi)
    return np.exp(log_nodes), vectors[0] ** 2
