"""The Gaussian expectations of activations in closed form.

For `(u, u') ~ N(0, [[k1, c], [c, k2]])`, a `..._dual(k1, k2, c)` is `(V, V̇)`, that is
`(E[φ(u) φ(u')], E[φ'(u) φ'(u')])`, and a `..._dual_diagonal(k)` is it at `k1 = k2 = c = k`.

They go through `arctan2` of a shared square root instead of `arccos` or `arcsin`: near `u = u'` the
rounding errors of their terms then cancel instead of adding up, and their derivatives are finite
there.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import erf

from nt_deq.activations.correlation import clip, sine_of, square_root
from nt_deq.activations.elementary import Batch, arc_cosine, arctan, arctan2
from nt_deq.activations.quotient import over

Moments = tuple[Batch, Batch]


def covariance_determinant(k1: Batch, k2: Batch, c: Batch) -> Batch:
    """`k1 k2 - c²`, at least 0."""
    return clip(k1 * k2 - c * c, 0, None)


def piecewise_linear(negative: float, positive: float, z: Batch) -> Batch:
    """`φ(z) = positive · max(z, 0) + negative · min(z, 0)`."""
    return positive * jnp.maximum(z, 0) + negative * jnp.minimum(z, 0)


def piecewise_linear_dual(
    negative: float, positive: float, k1: Batch, k2: Batch, c: Batch
) -> Moments:
    """With `ρ = c/√(k1 k2)`, `bend = (positive - negative)²/2`, `product = positive · negative`.

    `V = √(k1 k2) (bend κ1(ρ) + product ρ)` and `V̇ = bend κ0(ρ) + product`.
    """
    bend, product = (positive - negative) ** 2 / 2, positive * negative
    scale = square_root(k1) * square_root(k2)
    rho = clip(over(c, scale), -1, 1)
    kappa0, kappa1 = arc_cosine(rho)
    return scale * (bend * kappa1 + product * rho), bend * kappa0 + product


def piecewise_linear_dual_diagonal(negative: float, positive: float, k: Batch) -> Moments:
    """`V = k V̇`, and `V̇` is the mean of the squared slopes."""
    mean_square = (positive**2 + negative**2) / 2
    return mean_square * k, jnp.full_like(k, mean_square)


def piecewise_square(negative: float, positive: float, z: Batch) -> Batch:
    """`φ(z) = positive · max(z, 0)² + negative · min(z, 0)²`."""
    return positive * jnp.maximum(z, 0) ** 2 + negative * jnp.minimum(z, 0) ** 2


def piecewise_square_dual(
    negative: float, positive: float, k1: Batch, k2: Batch, c: Batch
) -> Moments:
    """By the arc-cosine kernel of degree 2, `κ2`, and that of degree 1 for `V̇`.

    `V = k1 k2 (square κ2(ρ) + product (1 + 2ρ²))/2` and `V̇ = 4√(k1 k2) (square κ1(ρ)/2 + product
    ρ)`, with `square = (positive - negative)²`, `product = positive · negative`.
    """
    square, product = (positive - negative) ** 2, positive * negative
    scale = square_root(k1) * square_root(k2)
    rho = clip(over(c, scale), -1, 1)
    kappa1, kappa2 = _arc_cosine_of_degree_2(rho)
    value = square * kappa2 + 2 * product * (1 + 2 * rho * rho)
    return scale * (scale * value) / 2, 4 * scale * (square / 2 * kappa1 + product * rho)


@jax.custom_jvp
def _arc_cosine_of_degree_2(rho: Batch) -> Moments:
    """`κ1`, and `κ2` with `κ2' = 4κ1` (Cho & Saul 2009); `κ2(1) = 3`."""
    sine = sine_of(rho)
    kappa0, kappa1 = arc_cosine(rho)
    return kappa1, 3 * sine / jnp.pi * rho + kappa0 * (1 + 2 * rho * rho)


@_arc_cosine_of_degree_2.defjvp
def _arc_cosine_of_degree_2_jvp(primals, tangents):
    (rho,), (d_rho,) = primals, tangents
    kappa0, _ = arc_cosine(rho)
    kappa1, kappa2 = _arc_cosine_of_degree_2(rho)
    return (kappa1, kappa2), (kappa0 * d_rho, 4 * kappa1 * d_rho)


def piecewise_square_dual_diagonal(negative: float, positive: float, k: Batch) -> Moments:
    """`V = 3k²` and `V̇ = 4k` times the mean of the squares of both factors."""
    mean_square = (positive**2 + negative**2) / 2
    return 3 * mean_square * k * k, 4 * mean_square * k


def erf_dual(k1: Batch, k2: Batch, c: Batch) -> Moments:
    """As `erf_moments` has it."""
    return erf_moments(k1, k2, c, covariance_determinant(k1, k2, c))


def erf_dual_diagonal(k: Batch) -> Moments:
    """`erf_dual(k, k, k)`."""
    return erf_moments(k, k, k, jnp.zeros_like(k))


def erf_moments(k1: Batch, k2: Batch, c: Batch, determinant: Batch) -> Moments:
    """`V = 2/π arctan(2c/√q)` and `V̇ = 4/(π√q)` (Williams 1997).

    With `q = 1 + 2(k1 + k2) + 4(k1 k2 - c²) = p - 4c²` and `p = (1 + 2k1)(1 + 2k2)`; so the tangent
    of half of the angle is `2c/(√q + √p)`, which is at most 1.
    """
    root = jnp.sqrt(1 + 2 * (k1 + k2) + 4 * determinant)
    tangent = 2 * c / (root + jnp.sqrt(1 + 2 * k1) * jnp.sqrt(1 + 2 * k2))
    return 4 / jnp.pi * arctan(tangent), 4 / jnp.pi / root


def normal_moments(k1: Batch, k2: Batch, c: Batch, determinant: Batch) -> Moments:
    """Those of `Φ`, the distribution function of the standard normal."""
    root = jnp.sqrt(1 + (k1 + k2) + determinant)
    return arctan2(root, -c) / (2 * jnp.pi), 1 / (2 * jnp.pi) / root


def smooth_relu_moments(k1: Batch, k2: Batch, c: Batch, determinant: Batch) -> Moments:
    """Those of the integral of `Φ`: of ReLU, as noise of variance 1 makes it smooth."""
    root = jnp.sqrt(1 + (k1 + k2) + determinant)
    angle = arctan2(root, -c)
    return (root + c * angle) / (2 * jnp.pi), angle / (2 * jnp.pi)


def gelu(z: Batch) -> Batch:
    """`z Φ(z)`, with the distribution function of the standard normal."""
    return z * (1 + erf(z / jnp.sqrt(2).astype(z.dtype))) / 2


def gelu_dual(k1: Batch, k2: Batch, c: Batch) -> Moments:
    """As `gelu_moments` has it."""
    return gelu_moments(k1, k2, c, covariance_determinant(k1, k2, c))


def gelu_dual_diagonal(k: Batch) -> Moments:
    """`gelu_dual(k, k, k)`."""
    return gelu_moments(k, k, k, jnp.zeros_like(k))


def gelu_moments(k1: Batch, k2: Batch, c: Batch, determinant: Batch) -> Moments:
    """By Stein's lemma from `E[Φ(u)Φ(u')] = 1/4 + arcsin(c/√p)/2π`, with `p = (1 + k1)(1 + k2)`.

    `V̇` is `∂V/∂c`, and `root² = p - c²` (Tsuchida et al. 2021, "Avoiding kernel fixed points").
    Written without `p`, whose square in their derivatives would overflow; `c/(root + √p)` is the
    tangent of half of the arcsine.
    """
    inverse1, inverse2 = 1 / (1 + k1), 1 / (1 + k2)
    root = 2 * jnp.sqrt(0.25 + (k1 / 4 + k2 / 4) + determinant / 4)
    root = jnp.where(jnp.isfinite(root), root, jnp.nan)
    tangent = c / root
    angle = 2 * arctan(c / (root + jnp.sqrt(1 + k1) * jnp.sqrt(1 + k2)))
    saturation = (k1 * inverse1) * (k2 * inverse2)
    correlation = (c * inverse1) * (c * inverse2)
    v = c / 4 + (c * angle + saturation * root + correlation / root) / (2 * jnp.pi)
    both = inverse1 * inverse2
    rest = inverse1 + inverse2 + both + (tangent * inverse1) * (tangent * inverse2)
    return v, 0.25 + (angle + tangent * rest) / (2 * jnp.pi)


def sin_dual(k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`exp(-(k1 + k2)/2) · (sinh c, cosh c)` without overflow, and exact for small `c`."""

    def half_exp(c):
        # Not k1 + k2 - 2c: a difference of near numbers is exact. Negative only by rounding.
        distance = (k1 - c) + (k2 - c)
        return jnp.exp(-clip(distance, 0, None) / 2) / 2

    up, down = half_exp(c), half_exp(-c)
    small = jnp.exp(-(k1 + k2) / 2) * jnp.sinh(jnp.clip(c, -1, 1))
    return jnp.where(jnp.abs(c) < 1, small, up - down), up + down


def sin_dual_diagonal(k: Batch) -> Moments:
    """`sin_dual(k, k, k)`."""
    return -jnp.expm1(-2 * k) / 2, (1 + jnp.exp(-2 * k)) / 2


def cos_dual(k1: Batch, k2: Batch, c: Batch) -> Moments:
    """That of its derivative, `-sin`, exchanged."""
    sinh, cosh = sin_dual(k1, k2, c)
    return cosh, sinh


def cos_dual_diagonal(k: Batch) -> Moments:
    """`cos_dual(k, k, k)`."""
    moment, slope_moment = sin_dual_diagonal(k)
    return slope_moment, moment


def affine_erf(a: float, b: float, c: float, z: Batch) -> Batch:
    """`a erf(b z) + c`."""
    return a * erf(b * z) + c


def affine_erf_dual(a: float, b: float, c: float, k1: Batch, k2: Batch, cov: Batch) -> Moments:
    """Those of erf at variances that are `b²` times as large; its mean is 0."""
    v, slope = erf_dual(b**2 * k1, b**2 * k2, b**2 * cov)
    return a**2 * v + c**2, (a * b) ** 2 * slope


def affine_erf_dual_diagonal(a: float, b: float, c: float, k: Batch) -> Moments:
    """`affine_erf_dual(a, b, c, k, k, k)`."""
    v, slope = erf_dual_diagonal(b**2 * k)
    return a**2 * v + c**2, (a * b) ** 2 * slope


def sinusoid(a: float, b: float, c: float, z: Batch) -> Batch:
    """`a sin(b z + c)`."""
    return a * jnp.sin(b * z + c)


def sinusoid_dual(a: float, b: float, c: float, k1: Batch, k2: Batch, cov: Batch) -> Moments:
    """`sin(z + c) = cos c · sin z + sin c · cos z`, and `E[sin u cos u']` is 0."""
    return _phased(a, b, c, *sin_dual(b**2 * k1, b**2 * k2, b**2 * cov))


def sinusoid_dual_diagonal(a: float, b: float, c: float, k: Batch) -> Moments:
    """`sinusoid_dual(a, b, c, k, k, k)`."""
    return _phased(a, b, c, *sin_dual_diagonal(b**2 * k))


def _phased(a, b, c, of_sin, of_cos) -> Moments:
    """The moments of a sinusoid, of those of sin and cos."""
    sine, cosine = math.sin(c) ** 2, math.cos(c) ** 2
    v, slope = cosine * of_sin + sine * of_cos, cosine * of_cos + sine * of_sin
    return a**2 * v, (a * b) ** 2 * slope
