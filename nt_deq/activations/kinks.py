"""The Gaussian expectations of a continuous, piecewise linear `φ` with kinks anywhere.

With the jump `J_i` of the slope at the kink `t_i`, `s = t_i/√k1`, `t = t_j/√k2`, `ρ = sin θ` and
`r = cos θ`, Price's theorem gives

    V̇ = E[φ'(u)] E[φ'(u')] + Σ J_i J_j L(s, t)
    V = E[φ(u)] E[φ(u')] + c E[φ'(u)] E[φ'(u')] + √(k1 k2) Σ J_i J_j W(s, t)

where `L = ∫_0^ρ p dρ`, `W = ∫_0^ρ L dρ`, and `p` is the density of the standardised pair at `(s,
t)`. These are probabilities of the bivariate normal distribution (Owen 1956, "Tables for computing
bivariate normal probabilities"), by two integrals over an interval of length at most 1, where
Gauss' rule converges fast. What they are at `s = t = 0` is taken out: of a bounded `φ` with large
variances it cancels, and the sums keep the digits of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import erf, erfc, gammainc, gammaincc
from jaxtyping import Bool

from nt_deq.activations.closed_forms import Batch, Moments
from nt_deq.activations.correlation import geometry, square_root
from nt_deq.activations.elementary import arctan2
from nt_deq.activations.expansion import sample
from nt_deq.activations.quotient import over

Mask = Bool[Array, "*#batch"]

_PEAK = (2 * np.pi) ** -0.5  # of the density n of N(0, 1)


class Kinks(NamedTuple):
    """A continuous, piecewise linear function.

    Attributes:
      at: where it has its kinks, in increasing order.
      slopes: left of the first kink, between them, and right of the last, one more than `at`.
      origin: its value at 0.
    """

    at: tuple[float, ...]
    slopes: tuple[float, ...]
    origin: float

    def jumps(self) -> np.ndarray:
        """Those of the slope at the kinks."""
        return np.diff(self.slopes)

    def start(self) -> int:
        """Which of the lines passes through `(0, origin)`."""
        return int(np.sum(np.array(self.at) < 0))

    def intercepts(self) -> np.ndarray:
        """The values at 0 of the lines, `(len(slopes),)`."""
        steps = np.concatenate([[0.0], np.cumsum(-self.jumps() * np.array(self.at))])
        return self.origin + (steps - steps[self.start()])


def evaluate(kinks: Kinks, z: Batch) -> Batch:
    """The function itself."""
    lines = [b + a * z for a, b in zip(kinks.slopes, kinks.intercepts().tolist(), strict=True)]
    value = lines[0]
    for kink, line in zip(kinks.at, lines[1:], strict=True):
        value = jnp.where(z > kink, line, value)
    return value


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def dual(kinks: Kinks, k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`(E[φ(u) φ(u')], E[φ'(u) φ'(u')])`, elementwise on arrays that broadcast.

    Args:
      kinks: `φ`.
      k1: variance of `u`.
      k2: variance of `u'`.
      c: their covariance, clipped to `|c| <= √(k1 k2)`.
    """
    total = kinks.slopes[-1] - kinks.slopes[0]
    root1, root2, rho, sine = geometry(k1, k2, c)
    angle = arctan2(rho, sine) / (2 * jnp.pi)
    mean1, mean2 = (_mean(kinks, jnp.zeros_like(k), jnp.sqrt(k)) for k in (k1, k2))
    slope1, slope2 = (_mean_slope(kinks, jnp.zeros_like(k), jnp.sqrt(k)) for k in (k1, k2))

    def add(sums, pair):
        (at1, at2), weight = pair
        s, t = _standardised(at1, root1), _standardised(at2, root2)
        w, area = _beyond_the_origin(s, t, rho, sine, angle)
        return (sums[0] + weight * w, sums[1] + weight * area), None

    zero = jnp.zeros_like(rho)
    at = np.array(kinks.at)[np.indices((len(kinks.at),) * 2).reshape(2, -1).T]
    weights = np.outer(kinks.jumps(), kinks.jumps()).ravel()
    pairs = jnp.asarray(at, c.dtype), jnp.asarray(weights, c.dtype)
    (w, area), _ = lax.scan(add, (zero, zero), pairs)
    w = w + total**2 * (rho * angle + (sine - 1) / (2 * jnp.pi))
    slopes = slope1 * slope2
    scale = root1 * root2
    return mean1 * mean2 + scale * (rho * slopes + w), slopes + total**2 * angle + area


@dual.defjvp
def _dual_jvp(kinks, primals, tangents):
    (k1, k2, c), (dk1, dk2, dc) = primals, tangents
    value, slope = dual(kinks, k1, k2, c)
    bend = _curvature(kinks, k1, k2, c)
    value1, slope1 = _by_variance(kinks, k1, k2, c, bend)
    value2, slope2 = _by_variance(kinks, k2, k1, c, bend)
    return (value, slope), (
        slope * dc + value1 * dk1 + value2 * dk2,
        bend * dc + slope1 * dk1 + slope2 * dk2,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def dual_diagonal(kinks: Kinks, k: Batch) -> Moments:
    """`(E[φ(u)²], E[φ'(u)²])` for `u ~ N(0, k)`, by the integrals between 0 and the kinks."""
    root = square_root(k)
    at, lines = np.array(kinks.at), list(zip(kinks.slopes, kinks.intercepts(), strict=True))
    start = kinks.start()
    value, slope = jnp.zeros_like(k), jnp.zeros_like(k)
    for sign, ends, side in (
        (1.0, at[start:], lines[start:]),
        (-1.0, -at[:start][::-1], lines[: start + 1][::-1]),
    ):
        ends = [_tails(jnp.asarray(end, k.dtype), root) for end in (0.0, *ends, np.inf)]
        for lower, upper, (a, b) in zip(ends[:-1], ends[1:], side, strict=True):
            p0, p1, p2 = (
                jnp.where(lower.far, out1 - out2, in2 - in1)
                for in1, out1, in2, out2 in zip(
                    lower.inside, lower.outside, upper.inside, upper.outside, strict=True
                )
            )
            value += float(b) ** 2 * p0 + float(2 * sign * a * b) * root * p1 + a**2 * k * p2
            slope += a**2 * p0
    return value, slope


@dual_diagonal.defjvp
def _dual_diagonal_jvp(kinks, primals, tangents):
    (k,), (dk,) = primals, tangents
    value, slope = dual_diagonal(kinks, k)
    by_value, by_slope = jnp.zeros_like(k), jnp.zeros_like(k)
    a = kinks.slopes
    heights = np.array(a[:-1]) * np.array(kinks.at) + kinks.intercepts()[:-1]
    for i, (kink, height) in enumerate(zip(kinks.at, heights.tolist(), strict=True)):
        density = _density(jnp.full_like(k, kink), square_root(k))
        by_value += (a[i + 1] - a[i]) * height * density
        by_slope += (a[i + 1] ** 2 - a[i] ** 2) * (kink / 2) * over(density, k)
    return (value, slope), ((slope + by_value) * dk, by_slope * dk)


class _Tails(NamedTuple):
    """The parts of the moments of degrees 0, 1 and 2 of the half of N(0, 1) on one side of 0.

    Attributes:
      inside: from 0 to a point.
      outside: beyond it.
      far: whether the parts beyond it are the smaller ones.
    """

    inside: tuple[Batch, Batch, Batch]
    outside: tuple[Batch, Batch, Batch]
    far: Mask


def _tails(end: Batch, root: Batch) -> _Tails:
    """Those of the point `end >= 0` in units of `root`."""
    x = jnp.where(root > 0, end / jnp.where(root > 0, root, 1), jnp.where(end > 0, jnp.inf, 0))
    x = jnp.where(jnp.isnan(root), jnp.nan, jnp.minimum(x, 50))
    half, three_halves = x * x / 2, jnp.full_like(x, 1.5)
    decay = jnp.expm1(-half)
    inside = erf(x * 0.5**0.5) / 2, -_PEAK * decay, gammainc(three_halves, half) / 2
    outside = erfc(x * 0.5**0.5) / 2, _PEAK * jnp.exp(-half), gammaincc(three_halves, half) / 2
    return _Tails(inside, outside, x > 1)


def _standardised(kink: Batch, root: Batch) -> Batch:
    """`t/√k`, no larger than where the tail beyond is rounding."""
    limit = 6.5 if jnp.finfo(root.dtype).nmant < 24 else 9.5
    return jnp.clip(_ratio(kink, root), -limit, limit)


def _ratio(y: Batch, width: Batch, far: float = 200.0) -> Batch:
    """`y/width`, and where the width is 0 a constant: `±far`, or 0 where `y` is 0 too."""
    zero, sign = width == 0, jnp.sign(lax.stop_gradient(y))
    beyond = jnp.where(sign == 0, 0, far * sign)
    return jnp.where(zero, beyond, y / jnp.where(zero, 1, width))


def _density(y: Batch, width: Batch) -> Batch:
    """That of N(0, width²) at `y`, and 0 where the width is 0."""
    return over(_PEAK * jnp.exp(-(_ratio(y, width) ** 2) / 2), width)


def _beyond_the_origin(s: Batch, t: Batch, rho: Batch, sine: Batch, angle: Batch) -> Moments:
    """`W` and `L` of the module's docstring at `(s, t)`, less those at `(0, 0)`.

    Where both are far out, `L` is small and is computed first, and the difference after.
    """
    sign = jnp.where(rho < 0, -1, 1).astype(rho.dtype)
    gap, near = 1 - jnp.abs(rho), s - sign * t
    apart = _ratio(near, sine, jnp.inf)
    across_s, across_t = (  # (t - ρs)/r and (s - ρt)/r
        _ratio(-sign * near + sign * gap * s, sine, jnp.inf),
        _ratio(near + sign * gap * t, sine, jnp.inf),
    )
    far = jnp.minimum(jnp.abs(s), jnp.abs(t)) > 1
    error_s, error_t, error_across_s, error_across_t = map(_Error.of, (s, t, across_s, across_t))
    area = _owen(far, s, across_s, error_s.product(error_across_s, far))
    area = area + _owen(far, t, across_t, error_t.product(error_across_t, far))
    both = error_s.product(error_t, far)
    area = jnp.where(far, both - area, area - both)
    full = jnp.where(far, area, area + angle)
    half_s, half_t = s * s / 2, t * t / 2
    quadratic = apart * apart / 2 + sign * s * t / (2 - gap)
    w = rho * area + s * t * full
    densities = jnp.where(
        far,
        sine * jnp.exp(-quadratic) - jnp.exp(-half_s - half_t),
        sine * jnp.expm1(-quadratic) - jnp.expm1(-half_s - half_t),
    )
    w = w + densities / (2 * jnp.pi)
    w = w - _PEAK / 2 * s * jnp.exp(-half_t) * (error_s.inside - error_across_t.inside)
    w = w - _PEAK / 2 * t * jnp.exp(-half_s) * (error_t.inside - error_across_s.inside)
    at_origin = rho * angle + (sine - 1) / (2 * jnp.pi)
    return jnp.where(far, w - at_origin, w), jnp.where(far, area - angle, area)


class _Error(NamedTuple):
    """`erf(x/√2)`, and how far its size is from 1."""

    inside: Batch
    outside: Batch

    @classmethod
    def of(cls, x: Batch) -> _Error:
        """Those of a number."""
        return cls(erf(x * 0.5**0.5), erfc(jnp.abs(x) * 0.5**0.5))

    def product(self, other: _Error, far: Mask) -> Batch:
        """A quarter of the product, and where `far` of how far it is from 1, with its sign."""
        beyond = self.outside + other.outside - self.outside * other.outside
        sign = jnp.sign(self.inside) * jnp.sign(other.inside)
        return jnp.where(far, sign * beyond, self.inside * other.inside) / 4


def _owen(far: Mask, h: Batch, m: Batch, product: Batch) -> Batch:
    """`∫_0^{m/h} exp(-h²(1+x²)/2)/(1+x²) dx/2π` where `far`, or `arctan(m/h)/2π` less that.

    The first is Owen's function. With `h` and `m` exchanged it is `product` less this one.
    """
    swap = jnp.abs(m) > jnp.abs(h)
    larger, smaller = jnp.where(swap, m, h), jnp.where(swap, h, m)
    end = over(smaller, larger)
    nodes, weights = np.polynomial.legendre.leggauss(7 if jnp.finfo(h.dtype).nmant < 24 else 13)
    total, half = jnp.zeros_like(end), larger * larger / 2
    for x, weight in zip(((1 + nodes) / 2).tolist(), (weights / 2).tolist(), strict=True):
        square = 1 + (end * x) ** 2
        exponent = -half * square
        total += weight * jnp.where(far, jnp.exp(exponent), -jnp.expm1(exponent)) / square
    total = end * total / (2 * jnp.pi)
    return jnp.where(swap, product - total, total)


def _mean_slope(kinks: Kinks, center: Batch, width: Batch) -> Batch:
    """`E[φ'(u)]` for `u ~ N(center, width²)`."""
    total = jnp.zeros_like(center * width) + (kinks.slopes[0] + kinks.slopes[-1]) / 2
    for kink, jump in zip(kinks.at, kinks.jumps().tolist(), strict=True):
        total += jump / 2 * erf(_ratio(center - kink, width) * 0.5**0.5)
    return total


def _mean(kinks: Kinks, center: Batch, width: Batch) -> Batch:
    """`E[φ(u)]` for `u ~ N(center, width²)`."""
    wide = _is_wide(kinks, width)
    return jnp.where(wide, _middle(kinks), kinks.origin) + _mean_beyond(kinks, center, width, wide)


def _is_wide(kinks: Kinks, width: Batch) -> Mask:
    """Whether a distribution reaches beyond the kinks."""
    return lax.stop_gradient(width) > max([abs(kink) for kink in kinks.at])


def _middle(kinks: Kinks) -> float:
    """Half of the sum of the values at 0 of the first and of the last line."""
    first, *_, last = kinks.intercepts().tolist()
    return (first + last) / 2


def _mean_beyond(kinks: Kinks, center: Batch, width: Batch, wide: Mask) -> Batch:
    """`E[φ(u)]` less `_middle`, where `wide`, or less `φ(0)`: what the mean is near to."""
    slope = (kinks.slopes[0] + kinks.slopes[-1]) / 2
    total = jnp.where(wide, slope, kinks.slopes[kinks.start()]) * center
    total += (kinks.slopes[-1] - kinks.slopes[0]) * _PEAK * width
    for kink, jump in zip(kinks.at, kinks.jumps().tolist(), strict=True):
        y = center - kink if kink >= 0 else kink - center
        x = _ratio(y, width)
        part = jnp.where(wide, erf(x * 0.5**0.5), erfc(-x * 0.5**0.5))
        total += jump * (_PEAK * width * jnp.expm1(-x * x / 2) + y * part / 2)
    return total


def _curvature(kinks: Kinks, k1: Batch, k2: Batch, c: Batch) -> Batch:
    """`∂V̇/∂c`, the sum of the densities at the kinks; 0 at ρ = ±1, where it may be infinite."""
    root1, root2, rho, sine = geometry(k1, k2, c)
    total = jnp.zeros_like(rho)
    jumps = kinks.jumps().tolist()
    for kink1, jump1 in zip(kinks.at, jumps, strict=True):
        for kink2, jump2 in zip(kinks.at, jumps, strict=True):
            at = jnp.full_like(root1, kink1)
            beyond = kink2 - rho * root2 * _ratio(at, root1)
            total += jump1 * jump2 * _density(at, root1) * _density(beyond, sine * root2)
    return total


def _by_variance(kinks: Kinks, k1: Batch, k2: Batch, c: Batch, bend: Batch) -> Moments:
    """`∂V/∂k1` and `∂V̇/∂k1`, given `∂V̇/∂c`, by conditioning on `u` at each kink."""
    root1, root2, rho, sine = geometry(k1, k2, c)
    width = sine * root2
    wide = _is_wide(kinks, root1 * jnp.ones_like(width))
    anchor = jnp.where(wide, _middle(kinks), kinks.origin)
    at_origin = _density(jnp.zeros_like(root1), root1)
    value = anchor * (kinks.slopes[-1] - kinks.slopes[0]) * at_origin
    slope = -over(c, k1) * bend
    for kink, jump in zip(kinks.at, kinks.jumps().tolist(), strict=True):
        at = jnp.full_like(root1, kink)
        x, density = _ratio(at, root1), _density(at, root1)
        center = rho * root2 * x
        value += jump * density * _mean_beyond(kinks, center, width, wide)
        value += anchor * jump * jnp.expm1(-x * x / 2) * at_origin
        slope += jump * kink * over(density, k1) * _mean_slope(kinks, center, width)
    return value / 2, slope / 2


def recognise(fn: Callable[[Array], Array]) -> Kinks | None:
    """The kinks of an elementwise function that is continuous and piecewise linear, by its values.

    `None` where it is not, or has more than 8 kinks, or two that are nearer than 3e-3 of their size
    (or of 1). Around each kink it is looked at on every scale, as a round corner is none.
    """
    z = np.sinh(np.linspace(-14.5, 14.5, 2**15))
    values, slopes = sample(fn, z)
    changes = np.flatnonzero(np.abs(np.diff(slopes)) > 1e-13 * np.max(np.abs(slopes)))
    if not 0 < len(changes) <= 8 or np.min(np.diff(changes, prepend=-1, append=len(z) - 1)) < 2:
        return None
    first, last = np.array([0, *(changes + 1)]), np.array([*changes, len(z) - 1])
    inner = np.where(z[first] > 0, first, np.where(z[last] < 0, last, (first + last) // 2))
    lines = slopes[inner]
    heights = values[inner] - lines * z[inner]
    at = np.diff(-heights) / np.diff(lines)
    found = (heights[np.argmax(z[last] > 0)]).item()
    kinks = Kinks(tuple((at + 0.0).tolist()), tuple(lines.tolist()), found)
    beside = np.logspace(-14, 0, 500)
    near = np.concatenate([z, *(kink + way * beside for kink in at for way in (-1, 0, 1))])
    rounding = 1e-13 * (1 + np.abs(near)) * np.max(np.abs(values) / (1 + np.abs(z)))
    ours, theirs = sample(partial(evaluate, kinks), near)[0], sample(fn, near)[0]
    return kinks if (np.abs(ours - theirs) <= rounding).all() else None
