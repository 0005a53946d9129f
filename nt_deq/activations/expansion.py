"""Over which variances a Hermite series converges, how many terms it needs, and by which rule.

The formulas are in `nt_deq.activations.hermite`, which sums the series.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Function = Callable[[Array], Array]

CHUNK = 16  # terms in one pass over the pairs
VARIANCES = 2.0 ** np.arange(-40, 20.25, 0.25)


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
def rule_of(dtype: np.dtype) -> Rule:
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


def sample(fn: Callable[[Array], Array], z: Array | np.ndarray) -> np.ndarray:
    """Values and slopes, `(2, len(z))`, in float64, which is on."""
    at = jnp.asarray(z)
    return np.stack(jax.jvp(fn, (at,), (jnp.ones_like(at),)))


def tolerance(dtype) -> float:
    """What a series and its quadrature may miss, relative to the mean square."""
    return 4 * float(jnp.finfo(dtype).eps)


class _Samples(NamedTuple):
    """A function at the nodes of a rule scaled by every `√k` of `VARIANCES`, in float64.

    Attributes:
      values: `(variances, q)`.
      between: likewise half a step further.
      size: `E[f(√k g)²]` by the rule, `(variances,)`.
      coefficients: `b_n(f, k)`, `(variances, terms)`.
    """

    values: np.ndarray
    between: np.ndarray
    size: np.ndarray
    coefficients: np.ndarray

    def relative(self) -> np.ndarray:
        """What makes a square relative to the mean square of the function."""
        return 1 / np.maximum(self.size, np.finfo(np.float64).tiny)

    def left_out(self) -> np.ndarray:
        """`Σ_{m >= n} b_m²` relative to the mean square: how much a series of n terms misses."""
        tails = np.cumsum(self.coefficients[:, ::-1] ** 2, axis=1)[:, ::-1]
        return tails * self.relative()[:, None]


@lru_cache(maxsize=256)  # of some derivatives and dtypes of each function that is kept
def expand(fn: Derivative, dtype: np.dtype) -> Expansion:
    """Measures over which variances the series of `fn` converges in this dtype, and how fast.

    A variance is good where the rule that the coefficients are computed with misses less of the
    mean square of `fn` than rounding does, and so is every smaller one. There a series may end
    where the coefficients that it leaves out are below rounding too.
    """
    rule, tol = rule_of(dtype), tolerance(dtype)
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        samples = _sample(fn, rule, dtype)
        error = _missed(samples, rule, tol)
        noise = _noise(fn, rule, dtype)
    with np.errstate(divide="ignore"):
        relative = samples.relative()
        bad = error > tol + noise * np.sqrt(relative) + noise**2 * relative
    good = int(np.argmax(bad)) if bad.any() else len(bad)
    failure = ""
    if bad.any():
        failure = (
            f"at variance {VARIANCES[good]:.3g}, {error[good]:.2g} of the mean square of φ' is "
            f"missed by {len(rule.basis)} terms and {len(rule.nodes)} nodes, and {tol:.2g} is the "
            "bound"
        )
    start, stride = _parity(samples, good, tol)
    last = np.sum(samples.left_out()[:good] > tol, axis=1) - 1  # the last degree that is needed
    return Expansion(_limits(last, start, stride), start, stride, failure)


def _sample(fn: Function, rule: Rule, dtype: np.dtype) -> _Samples:
    between = rule.nodes + (rule.nodes[1] - rule.nodes[0]) / 2
    z = np.sqrt(VARIANCES)[:, None] * np.stack([rule.nodes, between])[:, None]
    values, values_between = np.asarray(jax.jit(fn)(z.astype(dtype)), np.float64)
    return _Samples(values, values_between, values**2 @ rule.weights, values @ rule.basis.T)


def _missed(samples: _Samples, rule: Rule, tol: float) -> np.ndarray:
    """The part of the mean square that the rule gets wrong at each variance.

    There are three ways: its functions do not span `fn`, or it samples `fn` too coarsely, so that
    half a step further the mean square is another one, or it ends before `fn` does.
    """
    relative, left_out = samples.relative(), samples.left_out()
    gap = np.abs(left_out[:, 0] - samples.size * relative) - 4 * tol  # Parseval's
    beyond = np.maximum(left_out[:, -len(rule.basis) // 16], gap)
    between = rule.nodes + (rule.nodes[1] - rule.nodes[0]) / 2
    weights = np.exp(-(between**2) / 2) * rule.weights.max()
    aliased = np.abs(samples.between**2 @ weights - samples.size) * relative / 16
    at_the_ends = rule.weights * (np.abs(rule.nodes) > rule.nodes[-1] - 1)
    outside = samples.values**2 @ at_the_ends * relative
    return np.nan_to_num(np.maximum.reduce([beyond, aliased, outside]), nan=np.inf)


def _noise(fn: Derivative, rule: Rule, dtype: np.dtype) -> float:
    """The root mean square of the rounding errors of `fn`, beyond those of its own size.

    A derivative of a derivative is only as exact as the rounding of what it is taken of.
    """
    if not isinstance(fn.of, Derivative):
        return 0.0
    values = np.asarray(jax.jit(fn.of)(rule.nodes.astype(dtype)))
    return tolerance(dtype) * float(np.sqrt(values**2 @ rule.weights))


def _parity(samples: _Samples, good: int, tol: float) -> tuple[int, int]:
    """The first degree after 0 and the stride of an even, of an odd, or of another function."""
    largest = np.max(samples.coefficients[:good] ** 2, axis=0, initial=0.0)
    unseen = (64 * tol) ** 2 * np.max(samples.size[:good], initial=0.0)
    if np.sum(largest[2::2]) <= unseen:
        return 1, 2
    if np.sum(largest[1::2]) <= unseen:
        return 2, 2
    return 1, 1


def _limits(last: np.ndarray, start: int, stride: int) -> np.ndarray:
    """The largest of the good variances for which 1, 2, … chunks reach the last degree needed."""
    chunks = np.maximum.accumulate(np.maximum((last - start) // stride // CHUNK, 0))
    index = np.searchsorted(chunks, np.arange(chunks.max(initial=0) + 1), side="right") - 1
    return np.where(index >= 0, VARIANCES[index], 0.0)
