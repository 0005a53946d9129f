"""The Gaussian expectations of elu and its kin: a line right of 0 and an exponential left of it.

In units of the length of the exponential, with `z_ = min(z, 0)`, and left of 0 `e(z) = exp(z)` and
`ψ(z) = e(z) - 1 - z`, which are 0 right of it,

    φ(z) = positive · max(z, 0) + scale (z_ + ψ(z))         φ'(z) = positive [z > 0] + scale e(z)

So `V` and `V̇` are sums of expectations of products of powers and of `e`. Those are tails of the
bivariate normal distribution beyond a corner, in units of its density there (Owen 1956, "Tables for
computing bivariate normal probabilities"), which `corner` has:

    E[e(u); u' < 0]  = erfcx(√(k1/2))/4 + corner(ρ√k1, r√k1)                   r = √(1-ρ²)
    E[e(u) e(u')]    = corner(√k1 + ρ√k2, r√k2) + corner(√k2 + ρ√k1, r√k1)

What is of a smaller order than its terms where a variance is small is a power series there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nt_deq.activations.closed_forms import Batch, Moments
from nt_deq.activations.correlation import Geometry, geometry, square_root
from nt_deq.activations.elementary import arc_cosine, arctan2, erfcx, erfcx_beyond_one, erfcx_slope
from nt_deq.activations.expansion import sample
from nt_deq.activations.gauss import half_rule
from nt_deq.activations.quotient import over

_PEAK = (2 * math.pi) ** -0.5  # of the density of N(0, 1)
_SMALL = 0.5  # standard deviations below it are expanded


class Exponential(NamedTuple):
    """`φ(z) = positive · max(z, 0) + scale · length · (exp(min(z, 0)/length) - 1)`.

    Attributes:
      positive: the slope right of 0.
      scale: the slope left of 0, at 0.
      length: over which it falls; elu has 1 of all three, and celu(α) the length α.
    """

    positive: float
    scale: float
    length: float


def evaluate(of: Exponential, z: Batch) -> Batch:
    """The function itself."""
    below = of.scale * of.length * jnp.expm1(jnp.minimum(z, 0) / of.length)
    return jnp.where(z > 0, of.positive * z, below)


def recognise(fn: Callable[[Batch], Batch]) -> Exponential | None:
    """The parameters of an elementwise function, by its values and slopes; `None` if it has none.

    Nor where the line is so flat that the expectations cancel.
    """
    near = np.logspace(-30, 0, 301)
    z = np.concatenate([-near, near, np.sinh(np.linspace(-14.5, 14.5, 2000))])
    values, slopes = sample(fn, z)
    scale, positive, limit = slopes[0].item(), slopes[-1].item(), values[np.argmin(z)].item()
    if not (abs(scale) <= 16 * abs(positive) < np.inf and 1e-3 < -limit / (scale or np.inf) < 1e3):
        return None
    found = Exponential(positive, scale, -limit / scale)
    ours = sample(partial(evaluate, found), z)
    bound = 1e-12 * abs(positive) * np.stack([np.abs(z) + np.minimum(found.length, 1), 1 + 0 * z])
    return found if (np.abs(ours - [values, slopes]) <= bound).all() else None


def dual(of: Exponential, k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`(E[φ(u) φ(u')], E[φ'(u) φ'(u')])`, elementwise on arrays that broadcast.

    Args:
      of: `φ`.
      k1: variance of `u`.
      k2: variance of `u'`.
      c: their covariance, clipped to `|c| <= √(k1 k2)`.
    """
    unit = of.length**2
    v, slope = _dual(of._replace(length=1.0), *jnp.broadcast_arrays(k1 / unit, k2 / unit, c / unit))
    return unit * v, slope


def dual_diagonal(of: Exponential, k: Batch) -> Moments:
    """`dual(φ, k, k, k)`."""
    unit = of.length**2
    v, slope = _dual_diagonal(of._replace(length=1.0), k / unit)
    return unit * v, slope


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dual(of: Exponential, k1: Batch, k2: Batch, c: Batch) -> Moments:
    pair = geometry(k1, k2, c)
    return _value(of, pair), _slope(of, pair)


@_dual.defjvp
def _dual_jvp(of, primals, tangents):
    """The derivative in a variance is by that at constant ρ: `2 k1 ∂V/∂k1 = √k1 ∂V/∂√k1 - c V̇`."""
    (k1, k2, c), (dk1, dk2, dc) = primals, tangents
    value, slope = _dual(of, k1, k2, c)
    pair = geometry(k1, k2, c)
    bend = _bend(of, pair)

    def moments(root1, root2):
        moved = pair._replace(root1=root1, root2=root2)
        return _value(of, moved), _slope(of, moved)

    roots = pair.root1, pair.root2
    none = jnp.zeros_like(k1)
    by_root1 = jax.jvp(moments, roots, (pair.root1, none))[1]
    by_root2 = jax.jvp(moments, roots, (none, pair.root2))[1]
    by_k1, by_k2 = (
        [over(by - c * by_c, 2 * k) for by, by_c in zip(of_root, (slope, bend), strict=True)]
        for of_root, k in ((by_root1, k1), (by_root2, k2))
    )
    return (value, slope), (
        slope * dc + by_k1[0] * dk1 + by_k2[0] * dk2,
        bend * dc + by_k1[1] * dk1 + by_k2[1] * dk2,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dual_diagonal(of: Exponential, k: Batch) -> Moments:
    root = square_root(k)
    near, series = jnp.minimum(root, _SMALL), jnp.zeros_like(k)
    for n in range(2 * _terms(k.dtype), 1, -1):  # E[(e(u) - 1)²; u < 0]: exp(2z) - 2 exp(z) + 1
        series = series * near + (-1) ** n * (2**n - 2) * _half_moment(n) / float(math.factorial(n))
    once, twice = erfcx(root * 0.5**0.5), erfcx(root * 2**0.5)
    below = jnp.where(root < _SMALL, near * near * series, twice / 2 - once + 0.5)
    return (
        of.positive**2 / 2 * k + of.scale**2 * below,
        of.positive**2 / 2 + of.scale**2 / 2 * twice,
    )


@_dual_diagonal.defjvp
def _dual_diagonal_jvp(of, primals, tangents):
    """`E[φ²]' = E[φ'² + φφ'']` and `E[φ'²]'`."""
    (k,), (dk,) = primals, tangents
    value, slope = _dual_diagonal(of, k)
    root = square_root(k)
    bent = of.scale**2 / 2 * (erfcx(root * 2**0.5) - erfcx(root * 0.5**0.5))
    by_slope = of.scale**2 / 2 * over(erfcx_slope(root * 2**0.5), 2**0.5 * root)
    return (value, slope), ((slope + bent) * dk, by_slope * dk)


def _slope(of: Exponential, pair: Geometry) -> Batch:
    """`V̇`."""
    both, one, other = _exponentials(pair)
    angle, _ = arc_cosine(pair.rho)
    mixed = sum(
        erfcx(root * 0.5**0.5) / 2 - e for root, e in ((pair.root1, one), (pair.root2, other))
    )
    return of.positive**2 / 2 * angle + of.positive * of.scale * mixed + of.scale**2 * both


def _bend(of: Exponential, pair: Geometry) -> Batch:
    """`∂V̇/∂c`; what is infinite at ρ = ±1 if there is a kink is 0 there."""
    root1, root2, rho, sine = pair
    jump = of.positive - of.scale
    both, _, _ = _exponentials(pair)
    at_kink = over(jnp.full_like(rho, jump**2 / (2 * math.pi)), root1 * root2 * sine)
    given = sum(
        over(erfcx(sine * mine * 0.5**0.5), other) for mine, other in (pair[:2], pair[1::-1])
    )
    return of.scale**2 * both + of.scale * jump * _PEAK / 2 * given + at_kink


def _value(of: Exponential, pair: Geometry) -> Batch:
    """`V`, from what is known of its piecewise linear part, and the rest."""
    root1, root2, rho, _ = pair
    angle, moment = arc_cosine(rho)
    scale, jump = root1 * root2, of.positive - of.scale
    value = scale * (jump**2 / 2 * moment + of.positive * of.scale * rho)
    mean_slopes = sum(erfcx_beyond_one(root * 0.5**0.5) / 2 for root in (root1, root2))
    value += of.positive * of.scale * scale * rho * mean_slopes
    both, one, other = _exponentials(pair)
    swapped = pair._replace(root1=root2, root2=root1)
    beside = [  # E[u_ ψ(u')] and the other way round, directly
        scale * rho * e
        - _PEAK / 2 * mine.root1 * erfcx_beyond_one(mine.sine * mine.root2 * 0.5**0.5)
        - scale * moment / 2
        for mine, e in ((pair, other), (swapped, one))
    ]
    rest = both - one - other + angle / 2 - beside[0] - beside[1] - scale * moment / 2
    by_series = [_series(mine, e, angle, moment) for mine, e in ((pair, one), (swapped, other))]
    beside = [
        jnp.where(root < _SMALL, series, direct)
        for root, (series, _), direct in zip((root2, root1), by_series, beside, strict=True)
    ]
    small = jnp.where(root2 < root1, by_series[0][1], by_series[1][1])
    rest = jnp.where(scale < _SMALL**2, small, rest)
    return value + of.scale * (of.scale * rest - jump * (beside[0] + beside[1]))


def _series(pair: Geometry, one: Batch, angle: Batch, moment: Batch) -> Moments:
    """`E[u_ ψ(u')]` and `E[ψ(u) ψ(u')]` by powers of `u'_`, where `√k2` is small.

    For `f` of 1, `e(u)` and `u_/√k1`, `E[f(u) u'_ⁿ]` is `(n - 1) k2 E[f(u) u'_ⁿ⁻²]` and
    `c E[f'(u) u'_ⁿ⁻¹]` (Stein's lemma).
    """
    root1, root2, rho, sine = pair
    root1 = jnp.where(root1 * root2 < _SMALL, root1, _SMALL)  # the second is not asked for beyond
    root2 = jnp.minimum(root2, _SMALL)
    by_line, by_exp = rho * root2, rho * root2 * root1
    start = -_PEAK / 2 * (1 + rho)
    of_line = [start, root2 * moment / 2]
    of_one = [angle / 2, root2 * start]
    tilted = root1 * rho * one - _PEAK / 2 * (rho + erfcx(sine * root1 * 0.5**0.5))
    of_exp = [one, root2 * tilted]
    beside, rest = jnp.zeros_like(rho), jnp.zeros_like(rho)
    at_zero = _PEAK * by_line
    for n in range(2, _terms(rho.dtype)):
        at_zero = -at_zero * sine * root2
        boundary, again = _half_moment(n - 1) * at_zero, (n - 1) * root2 * root2
        of_line = [of_line[1], again * of_line[0] + by_line * of_one[1]]
        of_one = [of_one[1], again * of_one[0] - boundary]
        of_exp = [of_exp[1], again * of_exp[0] + by_exp * of_exp[1] - boundary]
        beside += of_line[1] / float(math.factorial(n))
        rest += (of_exp[1] - of_one[1] - root1 * of_line[1]) / float(math.factorial(n))
    return pair.root1 * beside, rest


def _terms(dtype) -> int:
    """Of a series in a standard deviation of at most `_SMALL`."""
    return 12 if jnp.finfo(dtype).nmant < 24 else 22


def _half_moment(n: int) -> float:
    """`E[max(g, 0)ⁿ]` for `g ~ N(0, 1)`."""
    return 2 ** (n / 2) * math.gamma((n + 1) / 2) / math.sqrt(math.pi) / 2


def _exponentials(pair: Geometry) -> tuple[Batch, Batch, Batch]:
    """`E[e(u) e(u')]`, `E[e(u); u' < 0]` and `E[e(u'); u < 0]`."""
    root1, root2, rho, sine = pair
    h = jnp.stack([root1 + rho * root2, root2 + rho * root1, rho * root1, rho * root2])
    r = jnp.stack([sine * root2, sine * root1, sine * root1, sine * root2])
    first, second, one, other = corner(h, r)
    one, other = (
        erfcx(root * 0.5**0.5) / 4 + part for root, part in ((root1, one), (root2, other))
    )
    return first + second, one, other


@jax.custom_jvp
def corner(h: Batch, r: Batch) -> Batch:
    """`∫_r^∞ exp(-(q² - r²)/2) h/(h² + q²) dq/2π` for `r >= 0`, by Gauss' rule.

    It is the mass of N(0, 1)² beyond the point `(h, r)`, between the ray away from the origin and
    the parallel to the second axis, over `exp(-(h² + r²)/2)`. Near the origin the poles are near,
    and are taken out.
    """
    square, end = h * h + r * r, _end(r)
    pole = jnp.where(square < 1, jnp.exp(jnp.minimum(square, 1) / 2), 0)

    def integrand(p):
        q = r + p
        return (jnp.exp(-p * (p / 2 + r)) - pole) / (h * h + q * q)

    inside = pole * (arctan2(h, r) - arctan2(h, r + end))
    return (inside + h * _integrate(integrand, end)) / (2 * math.pi)


@corner.defjvp
def _corner_jvp(primals, tangents):
    (h, r), (dh, dr) = primals, tangents
    by_h, by_r = _corner_slopes(h, r)
    return corner(h, r), by_h * dh + by_r * dr


@jax.custom_jvp
def _corner_slopes(h: Batch, r: Batch) -> Moments:
    """The derivatives of `corner`, under the integral where their closed forms cancel."""
    square, end = h * h + r * r, _end(r)

    def by_h(p):
        q = r + p
        square = h * h + q * q
        return jnp.exp(-p * (p / 2 + r)) * ((q - h) * (q + h) / square) / square

    def by_r(p):
        q = r + p
        square = h * h + q * q
        return -jnp.exp(-p * (p / 2 + r)) * h * (p + 2 * q / square) / square

    near_h, near_r = _closed_slopes(h, r)
    far_h, far_r = (_integrate(slope, end) / (2 * math.pi) for slope in (by_h, by_r))
    return jnp.where(square < 1, near_h, far_h), jnp.where(square < 1, near_r, far_r)


@_corner_slopes.defjvp
def _corner_slopes_jvp(primals, tangents):
    by_h, by_r = _corner_slopes(*primals)
    return (by_h, by_r), jax.jvp(_closed_slopes, primals, tangents)[1]


def _closed_slopes(h: Batch, r: Batch) -> Moments:
    """`∂/∂h` and `∂/∂r` of `corner`, from its own value."""
    value, square = corner(h, r), h * h + r * r
    by_h = over(r, square) / (2 * math.pi) - erfcx(r * 0.5**0.5) * _PEAK / 2
    return h * value + by_h, r * value - over(h, square) / (2 * math.pi)


def _end(r: Batch) -> Batch:
    """Where `exp(-p(p/2 + r))` is rounding."""
    tail = 36.0 if jnp.finfo(r.dtype).nmant < 24 else 72.0
    return tail / (r + jnp.sqrt(r * r + tail))


def _integrate(integrand: Callable[[Batch], Batch], end: Batch) -> Batch:
    """The integral from 0 to `end`, by Gauss' rule."""
    rule = jnp.asarray(half_rule(14 if jnp.finfo(end.dtype).nmant < 24 else 36), end.dtype)

    def add(total, node):
        return total + node[1] * integrand(end * node[0]), None

    return end * lax.scan(add, jnp.zeros_like(end), rule)[0]
