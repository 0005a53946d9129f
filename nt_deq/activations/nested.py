"""The Gaussian expectations of any `φ` at large variances, by quadrature over both arguments.

For `(u, u') ~ N(0, [[k1, c], [c, k2]])` with `k1 >= k2`, `E[f(u) g(u')]` is the expectation of
`f(u)` times that of `g(u')` given `u`, which is normal. A function on the scale 1 looks like a step
at 0 where a standard deviation is large: up to a standard deviation from there, Gauss' rule is one
in `arcsinh` of the argument on either side, which is dense at 0, and beyond it is one in the
argument. So the functions must be smooth on either side of 0 alone.

Derivatives are of the same kind. That in a variance at constant ρ is `E[u f'(u) g(u')]/2k1`, which
needs one derivative less of a function than that at constant `c`. Where one is needed of a function
that jumps at 0, it is NaN.

It takes thousands of evaluations an entry: where variances are small a Hermite series is taken, if
one converges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_deq.activations import hermite
from nt_deq.activations.closed_forms import Moments
from nt_deq.activations.correlation import geometry, square_root
from nt_deq.activations.elementary import Batch
from nt_deq.activations.expansion import Derivative, Function, Square, expand
from nt_deq.activations.gauss import half_rule
from nt_deq.activations.quotient import over

Pairs = tuple[tuple[Function, Function], ...]


class Counts(NamedTuple):
    """How many nodes there are on either side of 0.

    Attributes:
      graded: up to a standard deviation.
      linear: from there on.
      layer: near 0, where the other function has been smoothed.
    """

    graded: int
    linear: int
    layer: int = 0


# By the bits of a dtype, of the outer and of the inner rule, and where the density is rounding.
_COUNTS = {
    32: (Counts(18, 12, 8), Counts(16, 22)),
    64: (Counts(48, 28, 16), Counts(40, 56)),
}
_END = {32: 5.8, 64: 8.7}
ENOUGH = 1e4  # the variance that the rules must reach to be of use
LITTLE = 4.0  # up to which a series must reach to do without them: they take seconds to compile
_BOUNDS = {32: 1e-5, 64: 3e-9}  # what a rule may miss


@dataclass(frozen=True)
class Scaling:
    """`z f'(z)`, the derivative of `f(t z)` in `t` at 1."""

    of: Function

    def __call__(self, z: Array) -> Array:
        """Evaluates it."""
        return jax.jvp(self.of, (z,), (z,))[1]


class Reach(NamedTuple):
    """Up to which variances the rules are good, by `measure`, and 0 where they are not."""

    single: float
    double: float

    def of(self, dtype) -> float:
        """That of a dtype."""
        return self.single if jnp.finfo(dtype).bits < 64 else self.double


def dual(fn: Function, reach: Reach, k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`(E[φ(u) φ(u')], E[φ'(u) φ'(u')])`, elementwise on arrays that broadcast.

    Args:
      fn: `φ`.
      reach: of the rules; variances beyond it give NaN.
      k1: variance of `u`.
      k2: variance of `u'`.
      c: their covariance, clipped to `|c| <= √(k1 k2)`.
    """
    limit = series_reach(fn, np.dtype(c.dtype))

    def by_rule(k1, k2, c):
        k1, k2 = (_within(reach, k) for k in (k1, k2))
        slope = Derivative(fn)
        return expect(((fn, fn), (slope, slope)), k1, k2, c)

    if not limit:
        return by_rule(k1, k2, c)
    return hermite.dual_up_to(limit, fn, by_rule, k1, k2, c)


def dual_diagonal(fn: Function, reach: Reach, k: Batch) -> Moments:
    """`dual(φ, k, k, k)`."""
    return mean((Square(fn), Square(Derivative(fn))), _within(reach, k))


def missed(fn: Function, k: Batch) -> Batch:
    """What the moments may miss beside rounding, relative to the mean squares of `φ` and `φ'`."""
    beyond = k > series_reach(fn, np.dtype(k.dtype))
    return jnp.where(beyond, _BOUNDS[jnp.finfo(k.dtype).bits], 0).astype(k.dtype)


def _within(reach: Reach, k: Batch) -> Batch:
    return jnp.where(k <= reach.of(k.dtype), k, jnp.nan)


@lru_cache(maxsize=256)
def series_reach(fn: Function, dtype: np.dtype) -> float:
    """Up to which variance there is a Hermite series, of the derivatives in variances too."""
    third = Derivative(Derivative(Derivative(fn)))
    limit = min(expand(each, dtype).limits[-1] for each in (Derivative(fn), third))
    return 0.0 if limit < 0.1 else float(limit)


def measure(fn: Function) -> Reach:
    """Up to which variances the rules of both dtypes are good for `φ`, by finer ones; x64 is on.

    For normal variables of many means and standard deviations, as those of `u'` given `u` are; what
    is missed is relative to the root mean square of all `u'`.
    """
    if not _is_integral(fn):
        return Reach(0.0, 0.0)
    roots = np.sqrt(10.0 ** np.arange(-6, 13.0))
    width, mean = (a.ravel() for a in np.meshgrid(roots, [0.0, 0.3, -2.5, 6.0]))
    at = jnp.asarray(mean * width), jnp.asarray(width)
    slope = Derivative(fn)
    functions = [fn, slope, Square(fn), Square(slope)]

    @partial(jax.jit, static_argnums=0)
    def moments(counts):
        return jnp.stack(_expectation(lambda _, u: [f(u) for f in functions], *at, counts))

    exact = np.array(moments(Counts(72, 72))).reshape(4, -1, len(roots))
    size = np.sqrt(exact[[2, 3, 2, 3], 0])
    size[2:] **= 2
    reach = []
    for bits, bound in _BOUNDS.items():
        error = np.abs(np.array(moments(_COUNTS[bits][1])).reshape(exact.shape) - exact)
        good = np.all(error <= bound * size[:, None], axis=(0, 1))
        last = len(roots) if good.all() else good.argmin()
        reach.append(float(roots[last - 1] ** 2) if last else 0.0)
    return Reach(*reach)


def _is_integral(fn: Function) -> bool:
    """Whether it is beside 0 the integral of its derivative, and neither of them jumps at 0."""
    x, weights = half_rule(72).T
    top = np.arcsinh(1e3)
    u, weights = np.sinh(top * x), top * weights
    for way in (-1.0, 1.0):
        slopes = np.asarray(Derivative(fn)(jnp.asarray(way * u))) * np.sqrt(1 + u * u)
        start, end = np.asarray(fn(jnp.asarray([way * 1e-30, way * 1e3])))
        missed = abs(end - start - way * (slopes @ weights))
        if not missed <= 1e-4 * (np.abs(slopes) @ weights):
            return False
    return not (_jumps(fn) or _jumps(Derivative(fn)))


@lru_cache(maxsize=256)
def _jumps(fn: Function) -> bool:
    """Whether a function has two values at 0."""
    with jax.ensure_compile_time_eval():
        z = np.array([-1e-5, 1e-5, *np.linspace(-3, 3, 40)], np.float32)
        below, above, *others = np.asarray(fn(jnp.asarray(z)), float)
    return not abs(above - below) <= 1e-3 * np.max(np.abs(others))


def _derivative(fn: Function) -> Function:
    return _unknown if _jumps(fn) else Derivative(fn)


def _unknown(z: Array) -> Array:
    return jnp.full_like(z, jnp.nan)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean(functions: tuple[Function, ...], k: Batch) -> tuple[Batch, ...]:
    """`E[f(u)]` of every function for `u ~ N(0, k)`, elementwise."""
    outer, _ = _COUNTS[jnp.finfo(k.dtype).bits]
    root = square_root(k)

    def values(_, u):
        return [f(u) for f in functions]

    return tuple(_expectation(values, jnp.zeros_like(root), root, outer._replace(layer=0)))


@mean.defjvp
def _mean_jvp(functions, primals, tangents):
    (k,), (dk,) = primals, tangents
    slopes = mean(tuple(map(Scaling, functions)), k)
    return mean(functions, k), tuple(over(slope, 2 * k) * dk for slope in slopes)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def expect(pairs: Pairs, k1: Batch, k2: Batch, c: Batch) -> tuple[Batch, ...]:
    """`E[f(u) g(u')]` for every pair of elementwise functions `(f, g)`, elementwise."""
    return _expect(pairs, *jnp.broadcast_arrays(k1, k2, c))


@expect.defjvp
def _expect_jvp(pairs, primals, tangents):
    (k1, k2, c), (dk1, dk2, dc) = primals, tangents
    moved = (
        *((_derivative(f), _derivative(g)) for f, g in pairs),
        *((Scaling(f), g) for f, g in pairs),
        *((f, Scaling(g)) for f, g in pairs),
    )
    found, n = expect(moved, k1, k2, c), len(pairs)
    d_values = tuple(
        by_c * dc + over(by_1 - c * by_c, 2 * k1) * dk1 + over(by_2 - c * by_c, 2 * k2) * dk2
        for by_c, by_1, by_2 in zip(found[:n], found[n : 2 * n], found[2 * n :], strict=True)
    )
    return expect(pairs, k1, k2, c), d_values


@partial(jax.jit, static_argnums=0)
def _expect(pairs: Pairs, k1: Batch, k2: Batch, c: Batch) -> tuple[Batch, ...]:
    swap, bits = k1 < k2, jnp.finfo(c.dtype).bits
    root1, root2, rho, sine = geometry(jnp.maximum(k1, k2), jnp.minimum(k1, k2), c)
    outer, inner = _COUNTS[bits]

    def first(z):  # of the argument of the larger variance
        return [f(z) if f is g else jnp.where(swap, g(z), f(z)) for f, g in pairs]

    def second(z):
        return [g(z) if f is g else jnp.where(swap, f(z), g(z)) for f, g in pairs]

    def both(x, u):
        means = _expectation(lambda _, v: second(v), rho * root2 * x, sine * root2, inner)
        return [value * mean for value, mean in zip(first(u), means, strict=True)]

    layer = jnp.minimum(jnp.minimum(_END[bits] * sine, 1) * root1, 1)
    return tuple(_expectation(both, jnp.zeros_like(rho), root1, outer, layer))


def _expectation(
    fn: Callable[[Batch, Batch], list[Batch]],
    mean: Batch,
    width: Batch,
    counts: Counts,
    layer: Batch | float = 0.0,
) -> list[Batch]:
    """Those of the functions of `x ~ N(0, 1)` and of `u = mean + width x`.

    The functions may bend within `layer` of `u = 0`, however small that is.
    """
    end = _END[jnp.finfo(width.dtype).bits]
    none = width == 0
    zero = jnp.where(none, jnp.sign(mean), -mean / jnp.where(none, 1, width))  # where u is 0
    zero = jnp.clip(jnp.where(none, (end + 1) * zero, zero), -end - 1, end + 1)

    def add(total, x, u, share):
        share = share * jnp.exp(-x * x / 2) * (2 * np.pi) ** -0.5
        return [t + share * value for t, value in zip(total, fn(x, u), strict=True)]

    def linear(total, node):
        for low, high in ((-end, zero - 1), (zero + 1, end)):
            low, high = (jnp.clip(side, -end, end) for side in (low, high))
            x = low + (high - low) * node[0]
            total = add(total, x, mean + width * x, (high - low) * node[1])
        return total, None

    def graded(total, node, inside):
        ends = [jnp.clip(side - zero, -1, 1) for side in (-end, end)]
        for way in (-1, 1):
            low, high = (width * jnp.clip(way * side, 0, 1) for side in ends[::way])
            if counts.layer:  # inside of it, or beyond
                low, high = (low, layer) if inside else (jnp.maximum(low, layer), high)
            low, high = jnp.arcsinh(low), jnp.arcsinh(high)
            grade = low + (high - low) * node[0]
            u = way * jnp.sinh(grade)
            step = over((high - low) * jnp.cosh(grade), width)
            total = add(total, zero + over(u, width), u, step * node[1])
        return total, None

    total = [jnp.zeros_like(width) for _ in jax.eval_shape(fn, mean, width)]
    for step, count in (
        (partial(graded, inside=True), counts.layer),
        (partial(graded, inside=False), counts.graded),
        (linear, counts.linear),
    ):
        if count:
            rule = jnp.asarray(half_rule(count), width.dtype)
            total = lax.scan(step, total, rule)[0]
    return total
