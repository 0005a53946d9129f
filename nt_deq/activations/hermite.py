"""The Gaussian expectations of an activation without closed forms, by Hermite expansion.

For `(u, u') ~ N(0, [[k1, c], [c, k2]])`, `ρ = c/√(k1 k2)`, and `he_n` the Hermite polynomials that
are orthonormal under N(0, 1) (Daniely et al. 2016, section 4),

    f'(√k g) = Σ b_n(f', k) he_n(g)
    E[f'(u) g'(u')] = Σ b_n(f', k1) b_n(g', k2) ρⁿ
    E[f(u) g(u')]   = E[f(u)] E[g(u')] + √(k1 k2) Σ b_n(f', k1) b_n(g', k2) ρⁿ⁺¹/(n+1)

The second is the integral of the first in `c` (Price's theorem); nothing is divided by a variance,
so that small ones lose no digits. The coefficients cost one quadrature an input, and a pair costs a
polynomial in ρ with rank-one coefficients.

How many terms are needed grows with the variance (for tanh 20 k in float32, 80 k in float64): the
function becomes a step. The sum of `b_n²` that is left out bounds the error of `E[f'²]` at ρ = 1,
where it is largest; it is measured once for a function and a dtype, on a grid of variances. That
gives the number of terms at run time, and the variance beyond which the expectations are NaN.

Derivatives are of the same kind, `∂E[fg]/∂k1 = E[f''g]/2` and `∂E[fg]/∂c = E[f'g']`, to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from nt_deq.activations.closed_forms import Moments
from nt_deq.activations.elementary import Batch
from nt_deq.activations.expansion import (
    CHUNK,
    VARIANCES,
    Derivative,
    Expansion,
    Function,
    Square,
    expand,
    rule_of,
    tolerance,
)
from nt_deq.errors import ArgumentError


@lru_cache
def _seeds(dtype: np.dtype, start: int, stride: int, count: int) -> np.ndarray:
    """The first two rows of the basis in every chunk, `(count, 2, q)`.

    The whole basis would be megabytes of constants in every program.
    """
    basis = rule_of(dtype).basis
    # The last chunk may end beyond the basis, and one beyond that is never asked for.
    first = np.minimum(start + np.arange(count) * stride * CHUNK, len(basis) - 2)
    return np.stack([basis[first], basis[first + 1]], axis=1).astype(dtype)


def _chunk(seed: Array, first: Array, stride: int) -> Array:
    """The rows of degrees `n = first + i stride`, each over √(n + 1), `(CHUNK, q)`."""
    x = rule_of(np.dtype(seed.dtype)).nodes.astype(seed.dtype)

    def next_degree(rows, n):
        a, b = rows
        return (b, (x * b - jnp.sqrt(n + 1) * a) / jnp.sqrt(n + 2)), a / jnp.sqrt(n + 1)

    degrees = (first + jnp.arange(CHUNK * stride)).astype(seed.dtype)
    return lax.scan(next_degree, (seed[0], seed[1]), degrees)[1][::stride]


def _values(fn: Function, k: Array) -> Array:
    """`fn(√k x)` at the nodes `x`, `(k.size, q)`: variances of any shape as one axis.

    So the two sides of a kernel of inputs with themselves are one computation to the compiler.
    """
    return fn(jnp.sqrt(k).reshape(-1, 1) * rule_of(k.dtype).nodes[None].astype(k.dtype))


def _apply(rows: Array, values: Array) -> Array:
    """`(m, q)` rows and `(size, q)` values to `(m, size)`."""
    return jnp.matmul(rows, values.T, precision=lax.Precision.HIGHEST)


def _integrate(values: Array) -> Array:
    """`(size, q)` values to their expectations, `(size,)`."""
    return _apply(jnp.asarray(rule_of(values.dtype).weights, values.dtype)[None], values)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean(fn: Function, k: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`E[fn(√k g)]` for `g ~ N(0, 1)`, elementwise."""
    return _integrate(_values(fn, k)).reshape(k.shape)


@mean.defjvp
def _mean_jvp(fn, primals, tangents):
    (k,), (dk,) = primals, tangents
    return mean(fn, k), mean(Derivative(Derivative(fn)), k) / 2 * dk


def dual_diagonal(fn: Function, k: Batch) -> Moments:
    """`(E[fn(u)²], E[fn'(u)²])` for `u ~ N(0, k)`, elementwise, by quadrature alone.

    NaN where `dual(fn, fn, k, k, k)` is.
    """
    k = jnp.asarray(k)
    k = _within(expand(Derivative(fn), k.dtype).limits, k)
    return mean(Square(fn), k), mean(Square(Derivative(fn)), k)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def dual(f: Function, g: Function, k1: Batch, k2: Batch, c: Batch) -> Moments:
    """`(E[f(u) g(u')], E[f'(u) g'(u')])`, elementwise on arrays that broadcast.

    Args:
      f: an elementwise function of `u`.
      g: an elementwise function of `u'`.
      k1: variance of `u`; the coefficients are computed for `k1` and `k2` as they are given, so
        give them before broadcasting. Variances beyond the range of the series give NaN.
      k2: variance of `u'`.
      c: their covariance, clipped to `|c| <= √(k1 k2)`.
    """
    return _dual(f, g, k1, k2, c)


@dual.defjvp
def _dual_jvp(f, g, primals, tangents):
    (k1, k2, c), (dk1, dk2, dc) = primals, tangents
    value, slope = dual(f, g, k1, k2, c)
    by_k1 = dual(Derivative(Derivative(f)), g, k1, k2, c)
    by_k2 = dual(f, Derivative(Derivative(g)), k1, k2, c)
    _, curvature = dual(Derivative(f), Derivative(g), k1, k2, c)
    return (value, slope), (
        slope * dc + (by_k1[0] * dk1 + by_k2[0] * dk2) / 2,
        curvature * dc + (by_k1[1] * dk1 + by_k2[1] * dk2) / 2,
    )


def dual_up_to(
    limit: float,
    fn: Function,
    beyond: Callable[[Array, Array, Array], Moments],
    k1: Batch,
    k2: Batch,
    c: Batch,
) -> Moments:
    """`dual(fn, fn, k1, k2, c)` where no variance exceeds `limit`, else `beyond(k1, k2, c)`."""

    def by_series(k1, k2):
        return partial(dual, fn, fn, k1, k2)

    return _up_to(limit, by_series, beyond, k1, k2)(c)


def between_up_to(
    limit: float,
    fn: Function,
    beyond: Callable[[Array, Array, Array], Moments],
    k1: Batch,
    k2: Batch,
) -> Callable[[Array], Moments]:
    """`dual_up_to` as a function of `c`, as `between` is of `dual`."""
    return _up_to(limit, partial(between, fn, fn), beyond, k1, k2)


def _up_to(limit, by_series, beyond, k1, k2) -> Callable[[Array], Moments]:
    # Clipped, so that neither value nor derivative is NaN where vmap computes both branches.
    series = by_series(jnp.minimum(k1, limit), jnp.minimum(k2, limit))
    exceeded = jnp.any(k1 > limit) | jnp.any(k2 > limit)
    return lambda c: lax.cond(exceeded, partial(beyond, k1, k2), series, c)


class _Terms(NamedTuple):
    """Which terms of two series a call sums.

    Attributes:
      start: the first degree after 0.
      stride: from one degree to the next.
      chunks: how many chunks of `CHUNK` terms the largest variance needs, known at run time.
      most: how many there can be.
    """

    start: int
    stride: int
    chunks: Array
    most: int


@partial(jax.jit, static_argnums=(0, 1))
def _dual(f, g, k1, k2, c):
    return between(f, g, k1, k2)(c)


def between(f: Function, g: Function, k1: Batch, k2: Batch) -> Callable[[Array], Moments]:
    """`dual(f, g, k1, k2, c)` as a function of `c`, whose coefficients are computed once.

    For many `c` at the same variances. It has derivatives in `c` alone, and in forward mode.
    """
    k1, k2 = jnp.asarray(k1), jnp.asarray(k2)
    series = [expand(Derivative(fn), k1.dtype) for fn in (f, g)]
    k1, k2 = (_within(e.limits, k) for e, k in zip(series, (k1, k2), strict=True))
    terms = _terms(series, k1, k2)
    values1, values2 = _values(Derivative(f), k1), _values(Derivative(g), k2)
    coefficients = [
        _coefficients(terms, v).reshape(-1, *k.shape) for v, k in ((values1, k1), (values2, k2))
    ]
    first = _integrate(values1).reshape(k1.shape) * _integrate(values2).reshape(k2.shape)
    means = mean(f, k1) * mean(g, k2)

    def moments(c):
        """Sums the two series of the module's docstring, with `p` a polynomial in `x = ρ^stride`.

        Σ b_n b_n ρⁿ⁺¹/(n+1) = b_0 b_0 ρ + ρ^(start+1) p(x), and V̇ is its derivative in ρ.
        """
        scale, rho = _correlation(k1, k2, c)
        x = lax.integer_pow(rho, terms.stride)
        p, dp = _polynomial(terms.chunks, x, *coefficients)
        power = lax.integer_pow(rho, terms.start)
        integral = rho * (first + power * p)
        slope = first + power * ((terms.start + 1) * p + terms.stride * x * dp)
        return means + scale * integral, slope

    return moments


def _within(limits: np.ndarray, k: Array) -> Array:
    """Variances, and NaN beyond those for which the series is known."""
    return jnp.where(k <= jnp.asarray(limits[-1], k.dtype), k, jnp.nan)


def _terms(series: list[Expansion], k1: Array, k2: Array) -> _Terms:
    """As many as the largest variance needs; NaN compares as false and needs none.

    Two functions whose degrees differ, as an even and an odd one, have all degrees in common.
    """

    def chunks_of(e, k):
        limits = jnp.expand_dims(jnp.asarray(e.limits[:-1], k.dtype), range(k.ndim))
        return jnp.max(jnp.sum(k[..., None] > limits, axis=-1), initial=0)

    needed = map(chunks_of, series, (k1, k2))
    chunks, most = 1 + jnp.maximum(*needed), max(len(e.limits) for e in series)
    (start, stride), other = ((e.start, e.stride) for e in series)
    if (start, stride) == other:
        return _Terms(start, stride, chunks, most)
    return _Terms(1, 1, 2 * chunks, 2 * most)


def _correlation(k1: Array, k2: Array, c: Array) -> tuple[Array, Array]:
    """`√(k1 k2)`, and `ρ = c/√(k1 k2)` clipped to [-1, 1]; 0 where a variance is."""
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    zero = scale == 0
    return scale, jnp.where(zero, 0, jnp.clip(c / jnp.where(zero, 1, scale), -1, 1))


def _coefficients(terms: _Terms, values: Array) -> Array:
    """`b_n/√(n+1)` of values at the nodes, `(terms, variances)`; beyond `terms.chunks` nothing."""
    seeds = jnp.asarray(_seeds(np.dtype(values.dtype), terms.start, terms.stride, terms.most))

    def add_chunk(i, coefficients):
        seed = lax.dynamic_index_in_dim(seeds, i, keepdims=False)
        rows = _chunk(seed, terms.start + i * terms.stride * CHUNK, terms.stride)
        return lax.dynamic_update_index_in_dim(coefficients, _apply(rows, values), i, 0)

    nothing = jnp.zeros((terms.most, CHUNK, len(values)), values.dtype)
    return lax.fori_loop(0, terms.chunks, add_chunk, nothing).reshape(-1, len(values))


def _polynomial(chunks: Array, x: Array, b1: Array, b2: Array) -> tuple[Array, Array]:
    """`p(x) = Σ b_n b_n x^i/(n+1)`, of chunks of `b_n/√(n+1)`, and `p'(x)`, by Horner's rule."""

    def coefficients(i):
        start = jnp.maximum(i, 0) * CHUNK
        return [lax.dynamic_slice_in_dim(b, start, CHUNK) for b in (b1, b2)]

    def add_chunk(i, carry):
        # The coefficients are carried: XLA:CPU else looks up the chunk anew for every number.
        (part1, part2), p, dp = carry
        for n in reversed(range(CHUNK)):
            dp = dp * x + p
            p = p * x + part1[n] * part2[n]
        return coefficients(chunks - 2 - i), p, dp

    start = coefficients(chunks - 1), jnp.zeros_like(x), jnp.zeros_like(x)
    return lax.fori_loop(0, chunks, add_chunk, start)[1:]


@partial(jax.jit, static_argnums=0)
def _mismatch(fn: Function, k: Array) -> Array:
    """How far `E[fn²]` by its values is from that by its derivative, whatever rounding explains."""
    by_values, by_slopes = dual_diagonal(fn, k)[0], dual(fn, fn, k, k, k)[0]
    tiny = jnp.finfo(k.dtype).tiny
    return jnp.max(jnp.abs(by_values - by_slopes) / (1 + k) / jnp.maximum(by_values, tiny))


def check_elementwise(name: str, fn: Function) -> None:
    """Raises a ValueError unless a function is an elementwise and real function of an array."""
    z = jnp.linspace(-2.0, 3.0, 6)
    try:
        out = jax.eval_shape(lambda z: fn(z), z)
    except Exception as cause:
        raise ArgumentError(f"activation={name}: it is not a function of a JAX array.") from cause
    if getattr(out, "shape", None) != z.shape or getattr(out, "dtype", None) != z.dtype:
        raise ArgumentError(
            f"activation={name}: it maps {z.dtype}{z.shape} to {out}; it must be elementwise "
            "and real: to return one array of the shape and dtype of its argument."
        )
    whole, parts = fn(z), jnp.concatenate([fn(part) for part in jnp.split(z, 3)])
    if not jnp.allclose(whole, parts, equal_nan=True):
        raise ArgumentError(
            f"activation={name}: its value at one element depends on the others (at z={z[0]}: "
            f"{whole[0]} or {parts[0]}); it must be elementwise."
        )


def check(name: str, fn: Function) -> float:
    """Checks that an elementwise function can be expanded, and returns its Lipschitz constant.

    Raises:
      ValueError: it is not finite and smooth; the message says what was measured.
    """
    dtype = jnp.zeros(()).dtype
    expansion = expand(Derivative(fn), dtype)
    limit = expansion.limits[-1]
    if limit < 0.1:
        raise ArgumentError(
            f"activation={name}: its Hermite series does not converge: {expansion.failure}. "
            "It or its derivative has a kink, a jump or a pole, or is too steep. What is "
            "continuous and linear between up to 8 kinks is known, as jax.nn.relu6 and hard_tanh, "
            "and so are jax.nn.elu, celu and selu; or take one of nt_deq.activations. Or give its "
            "expectations in an nt_deq.Activation of your own."
        )
    # Smaller variances may underflow: those of z³ are 15 k³.
    k = jnp.asarray(VARIANCES[(VARIANCES >= 1e-3) & (limit >= VARIANCES)], dtype)
    error, bound = float(_mismatch(fn, k)), 64 * tolerance(dtype)
    if not error <= bound:
        raise ArgumentError(
            f"activation={name}: E[φ²] by quadrature of φ and by that of its jax.jvp differ by "
            f"{error:.2g} of their size: it jumps, or its derivative is not the one that JAX has."
        )
    return largest_slope(fn)


def largest_slope(fn: Function) -> float:
    """The Lipschitz constant, by the largest slope on a grid over [-1490, 1490], dense near 0."""
    z = jnp.sinh(jnp.linspace(-8.0, 8.0, 20_001))
    return float(jnp.max(jnp.abs(Derivative(fn)(z))))
