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
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_deq.errors import ArgumentError

Function = Callable[[Array], Array]

_CHUNK = 16  # terms in one pass over the pairs
_VARIANCES = 2.0 ** np.arange(-40, 20.25, 0.25)


class Rule(NamedTuple):
    """The trapezoidal rule under N(0, 1): it converges geometrically, and its step is uniform.

    Attributes:
      nodes: `(q,)`, symmetric about 0.
      weights: `(q,)`, so that `E[f(g)]` is `weights @ f(nodes)`.
      basis: `(terms, q)`, so that the coefficients of `f` are `basis @ f(nodes)`.
    """

    nodes: np.ndarray
    weights: np.ndarray
    basis: np.ndarray


@lru_cache
def _rule(dtype: np.dtype) -> Rule:
    """The rule at the precision of a dtype, computed in float64."""
    terms, end = 2048, 13.0 if dtype == np.float64 else 9.5  # there √density is rounding
    half = round(end * np.sqrt(terms) / 2.4)  # he_n oscillates at the frequency √n; π is the limit
    x = np.arange(-half, half + 1) * (end / half)
    root = np.exp(-x * x / 4) / (2 * np.pi) ** 0.25
    functions = [root, x * root]  # he_n · √density, which are of order 1 everywhere
    for n in range(2, terms):
        functions.append((x * functions[-1] - np.sqrt(n - 1) * functions[-2]) / np.sqrt(n))
    step = end / half
    return Rule(x, step * root * root, step * root * np.stack(functions))


class Expansion(NamedTuple):
    """What is known beforehand of the coefficients `b_n` of a function, in one dtype.

    Attributes:
      limits: `limits[i]` is the largest variance for which `i + 1` chunks of terms suffice.
      start: 1 or 2, the first degree after 0 that is needed.
      stride: 2 where every second coefficient vanishes, as for an even or odd function, or 1.
      failure: what was measured at the first variance beyond `limits[-1]`.
    """

    limits: np.ndarray
    start: int
    stride: int
    failure: str


@dataclass(frozen=True)
class Derivative:
    """The derivative of an elementwise function."""

    of: Function

    def __call__(self, z: Array) -> Array:
        """Evaluates it."""
        return jax.jvp(self.of, (z,), (jnp.ones_like(z),))[1]


@dataclass(frozen=True)
class Square:
    """The square of an elementwise function."""

    of: Function

    def __call__(self, z: Array) -> Array:
        """Evaluates it."""
        return jnp.square(self.of(z))


def _tolerance(dtype) -> float:
    return 4 * float(jnp.finfo(dtype).eps)


@lru_cache(maxsize=1024)
def expand(fn: Derivative, dtype: np.dtype) -> Expansion:
    """Measures over which variances the series of `fn` converges in this dtype, and how fast."""
    rule, tol = _rule(dtype), _tolerance(dtype)
    between = rule.nodes + (rule.nodes[1] - rule.nodes[0]) / 2
    z = np.sqrt(_VARIANCES)[:, None] * np.stack([rule.nodes, between])[:, None]
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        values, values_between = np.asarray(jax.jit(fn)(z.astype(dtype)), np.float64)
        coefficients = values @ rule.basis.T
        size = values**2 @ rule.weights
        relative = 1 / np.maximum(size, np.finfo(np.float64).tiny)
        left_out = np.cumsum(coefficients[:, ::-1] ** 2, axis=1)[:, ::-1] * relative[:, None]
        # Three ways in which a rule with these nodes can be wrong: its functions do not span `fn`,
        # they sample it too coarsely, or they end before it does.
        gap = np.abs(left_out[:, 0] - size * relative) - 4 * tol
        beyond = np.maximum(left_out[:, -len(rule.basis) // 16], gap)
        weights = np.exp(-(between**2) / 2) * rule.weights.max()
        aliased = np.abs(values_between**2 @ weights - size) * relative / 16
        outside = values**2 @ (rule.weights * (np.abs(rule.nodes) > rule.nodes[-1] - 1)) * relative
        error = np.nan_to_num(np.maximum.reduce([beyond, aliased, outside]), nan=np.inf)
        # A derivative of a derivative is only as exact as the rounding of what it is taken of.
        noise = 0.0
        if isinstance(fn.of, Derivative):
            noise = tol * np.sqrt(
                np.asarray(jax.jit(fn.of)(rule.nodes.astype(dtype))) ** 2 @ rule.weights
            )
    with np.errstate(divide="ignore"):
        bad = error > tol + noise * np.sqrt(relative) + noise**2 * relative
    good = int(np.argmax(bad)) if bad.any() else len(bad)
    failure = ""
    if bad.any():
        failure = (
            f"at variance {_VARIANCES[good]:.3g}, {error[good]:.2g} of the mean square of φ' is "
            f"missed by {len(rule.basis)} terms and {len(rule.nodes)} nodes, and {tol:.2g} is the "
            "bound"
        )
    start, stride = 1, 1
    largest = np.max(coefficients[:good] ** 2, axis=0, initial=0.0)
    unseen = (64 * tol) ** 2 * np.max(size[:good], initial=0.0)
    if np.sum(largest[2::2]) <= unseen:
        stride = 2
    elif np.sum(largest[1::2]) <= unseen:
        start, stride = 2, 2
    degree = np.sum(left_out[:good] > tol, axis=1) - 1  # the last one that is needed
    chunks = np.maximum((degree - start) // stride // _CHUNK, 0)
    chunks = np.maximum.accumulate(chunks)
    last = np.searchsorted(chunks, np.arange(chunks.max(initial=0) + 1), side="right") - 1
    limits = np.where(last >= 0, _VARIANCES[last], 0.0)
    return Expansion(limits, start, stride, failure)


@lru_cache
def _seeds(dtype: np.dtype, start: int, stride: int, count: int) -> np.ndarray:
    """The first two rows of the basis in every chunk, `(count, 2, q)`.

    The whole basis would be megabytes of constants in every program.
    """
    basis = _rule(dtype).basis
    # The last chunk may end beyond the basis, and one beyond that is never asked for.
    first = np.minimum(start + np.arange(count) * stride * _CHUNK, len(basis) - 2)
    return np.stack([basis[first], basis[first + 1]], axis=1).astype(dtype)


def _chunk(seed: Array, first: Array, stride: int) -> Array:
    """The rows of degrees `n = first + i stride`, each over √(n + 1), `(_CHUNK, q)`."""
    x = _rule(np.dtype(seed.dtype)).nodes.astype(seed.dtype)

    def next_degree(rows, n):
        a, b = rows
        return (b, (x * b - jnp.sqrt(n + 1) * a) / jnp.sqrt(n + 2)), a / jnp.sqrt(n + 1)

    degrees = (first + jnp.arange(_CHUNK * stride)).astype(seed.dtype)
    return lax.scan(next_degree, (seed[0], seed[1]), degrees)[1][::stride]


def _values(fn: Function, k: Array) -> Array:
    """`fn(√k x)` at the nodes `x`, `(k.size, q)`: variances of any shape as one axis.

    So the two sides of a kernel of inputs with themselves are one computation to the compiler.
    """
    return fn(jnp.sqrt(k).reshape(-1, 1) * _rule(k.dtype).nodes.astype(k.dtype))


def _apply(rows: Array, values: Array) -> Array:
    """`(m, q)` rows and `(size, q)` values to `(m, size)`."""
    return jnp.matmul(rows, values.T, precision=lax.Precision.HIGHEST)


def _integrate(values: Array) -> Array:
    """`(size, q)` values to their expectations, `(size,)`."""
    return _apply(jnp.asarray(_rule(values.dtype).weights, values.dtype)[None], values)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean(fn: Function, k: Array) -> Array:
    """`E[fn(√k g)]` for `g ~ N(0, 1)`, elementwise."""
    return _integrate(_values(fn, k)).reshape(k.shape)


@mean.defjvp
def _mean_jvp(fn, primals, tangents):
    (k,), (dk,) = primals, tangents
    return mean(fn, k), mean(Derivative(Derivative(fn)), k) / 2 * dk


def dual_diagonal(fn: Function, k: Array) -> tuple[Array, Array]:
    """`(E[fn(u)²], E[fn'(u)²])` for `u ~ N(0, k)`, elementwise, by quadrature alone.

    NaN where `dual(fn, fn, k, k, k)` is.
    """
    k = jnp.asarray(k)
    k = jnp.where(k <= expand(Derivative(fn), k.dtype).limits[-1], k, jnp.nan)
    return mean(Square(fn), k), mean(Square(Derivative(fn)), k)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def dual(f: Function, g: Function, k1: Array, k2: Array, c: Array) -> tuple[Array, Array]:
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


@partial(jax.jit, static_argnums=(0, 1))
def _dual(f, g, k1, k2, c):
    dtype = c.dtype
    expansions = [expand(Derivative(fn), dtype) for fn in (f, g)]
    k1, k2 = (
        jnp.where(k <= e.limits[-1], k, jnp.nan) for k, e in zip((k1, k2), expansions, strict=True)
    )
    # As many terms as the largest variance needs; NaN compares as false and needs none.
    limits = [jnp.asarray(e.limits[:-1], dtype) for e in expansions]
    needed = [
        jnp.max(jnp.sum(k[..., None] > limit, axis=-1), initial=0)
        for k, limit in zip((k1, k2), limits, strict=True)
    ]
    chunks, most = 1 + jnp.maximum(*needed), max(len(e.limits) for e in expansions)
    start, stride = expansions[0].start, expansions[0].stride
    if (start, stride) != (expansions[1].start, expansions[1].stride):
        start, stride, chunks, most = 1, 1, 2 * chunks, 2 * most
    seeds = jnp.asarray(_seeds(dtype, start, stride, most))

    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    zero = scale == 0
    rho = jnp.where(zero, 0, jnp.clip(c / jnp.where(zero, 1, scale), -1, 1))
    x = lax.integer_pow(rho, stride)
    values1, values2 = _values(Derivative(f), k1), _values(Derivative(g), k2)

    def add_chunk(i, carry):
        p, dp = carry
        i = chunks - 1 - i
        seed = lax.dynamic_index_in_dim(seeds, i, keepdims=False)
        rows = _chunk(seed, start + i * stride * _CHUNK, stride)
        b1 = _apply(rows, values1).reshape(-1, *k1.shape)
        b2 = _apply(rows, values2).reshape(-1, *k2.shape)
        for n in reversed(range(_CHUNK)):  # Horner's rule, for the polynomial and its derivative
            dp = dp * x + p
            p = p * x + b1[n] * b2[n]
        return p, dp

    # Σ b_n b_n ρⁿ⁺¹/(n+1) = b_0 b_0 ρ + ρ^(start+1) p(ρ^stride), and its derivative.
    p, dp = lax.fori_loop(0, chunks, add_chunk, (jnp.zeros_like(rho), jnp.zeros_like(rho)))
    first = _integrate(values1).reshape(k1.shape) * _integrate(values2).reshape(k2.shape)
    power = lax.integer_pow(rho, start)
    integral = rho * (first + power * p)
    slope = first + power * ((start + 1) * p + stride * x * dp)
    return mean(f, k1) * mean(g, k2) + scale * integral, slope


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
            f"activation={name}: it maps {z.dtype}{z.shape} to {out}; it has to be elementwise "
            "and real: to return one array of the shape and dtype of its argument."
        )
    whole, parts = fn(z), jnp.concatenate([fn(part) for part in jnp.split(z, 3)])
    if not jnp.allclose(whole, parts, equal_nan=True):
        raise ArgumentError(
            f"activation={name}: its value at one element depends on the others (at z={z[0]}: "
            f"{whole[0]} or {parts[0]}); it has to be elementwise."
        )


def check(name: str, fn: Function) -> float:
    """Checks that an elementwise function can be expanded, and returns its Lipschitz constant.

    The constant is the largest slope on a grid over [-1490, 1490], dense near 0.

    Raises:
      ValueError: it is not finite and smooth; the message says what was measured.
    """
    z = jnp.sinh(jnp.linspace(-8.0, 8.0, 20_001))
    expansion = expand(Derivative(fn), z.dtype)
    limit = expansion.limits[-1]
    if limit < 0.1:
        raise ArgumentError(
            f"activation={name}: its Hermite series does not converge: {expansion.failure}. "
            "It or its derivative has a kink, a jump or a pole, or is too steep. Take one of "
            "nt_deq.activations instead: for elu, celu and selu 'silu', 'softplus' or "
            "'leaky_relu', for relu6 and hard_swish 'relu' or 'silu', for hard_tanh and "
            "soft_sign 'tanh' or 'erf'. Or give its expectations in an nt_deq.Activation of your "
            "own."
        )
    # Smaller variances may underflow: those of z³ are 15 k³.
    k = jnp.asarray(_VARIANCES[(_VARIANCES >= 1e-3) & (limit >= _VARIANCES)], z.dtype)
    error, bound = float(_mismatch(fn, k)), 64 * _tolerance(z.dtype)
    if not error <= bound:
        raise ArgumentError(
            f"activation={name}: E[φ²] by quadrature of φ and by that of its jax.jvp differ by "
            f"{error:.2g} of their size: it jumps, or its derivative is not the one that JAX has."
        )
    return float(jnp.max(jnp.abs(Derivative(fn)(z))))
