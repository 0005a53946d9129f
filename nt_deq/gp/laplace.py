"""Laplace's approximation of a softmax classifier: the mode of the posterior, and the evidence.

`f_c ~ GP(0, K)` for every class `c`, `p(y | f) = softmax(f)_y`. The posterior is approximated by
the normal distribution at its mode, with the curvature that it has there (Rasmussen & Williams
2006, GPML, sec. 3.5). At the mode

    f = K a,     a = w (y - π(f))        (y one of C, in 0 and 1; w how often it was observed)

which is solved by Newton's iteration in `a`; it takes no inverse of `K`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from nt_deq.fixed_point.implicit import implicit_vectors, keep
from nt_deq.gp.curvature import (
    Curvature,
    curvature,
    half_log_determinant,
)

MAX_STEPS = 100
_SUFFICIENT = 1e-4  # of the gain that the slope promises, which a step must have (Armijo)
_ACCURACY = 0.375  # of functions at the mode, a power of rounding: 2e-3 in float32, 1e-6 in float64
_SAFE = 0.5  # of f: the curvature changes little over such a step, so that it goes up


class Mode(NamedTuple):
    """The mode of the posterior.

    Attributes:
      coefficients: `a`, `(n, C)`, with `f = K a`; NaN where it was not found.
      curvature: `S` there.
      steps: of Newton's iteration.
      converged: whether its steps came to nothing, but for a little rounding.
    """

    coefficients: Float[Array, "n C"]
    curvature: Curvature
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


@jax.jit
def find_mode(
    kernel: Float[Array, "n n"], y: Float[Array, "n C"], weights: Float[Array, " n"]
) -> Mode:
    """Finds the mode, differentiable in `kernel` and `weights`.

    Args:
      kernel: `K`.
      y: 1 for an input's class and 0 for every other.
      weights: how often each input was observed; 0 is an input that is not there.
    """
    problem = lax.stop_gradient((kernel, y, weights))
    a, steps, converged = _newton(*problem)
    near = lax.stop_gradient(curvature(kernel, _matmul(kernel, a), weights))
    flat = _newton_map(a.reshape(-1), (*problem, near))
    rest = _newton_map(flat, (*problem, near)) - flat  # of rounding
    error = jnp.max(jnp.abs(_matmul(problem[0], rest.reshape(y.shape))))
    converged &= error <= float(jnp.finfo(y.dtype).eps) ** _ACCURACY
    flat = implicit_vectors(_newton_map, _refine, flat, (kernel, y, weights, near))
    a = keep(converged, flat).reshape(y.shape)
    return Mode(a, curvature(kernel, _matmul(kernel, a), weights), steps, converged)


@jax.jit
def log_evidence(
    kernel: Float[Array, "n n"],
    y: Float[Array, "n C"],
    weights: Float[Array, " n"],
    coefficients: Float[Array, "n C"],
    found: Curvature,
) -> Float[Array, ""]:
    """`log q(y | x)` in nats: `-aᵀf/2 + Σ w log π_y - log |1 + K W|/2` (GPML eq. 3.44).

    Args:
      kernel: `K`.
      y: 1 for an input's class and 0 for every other.
      weights: how often each input was observed.
      coefficients: `a`, those of the mode.
      found: the curvature there.
    """
    f = _matmul(kernel, coefficients)
    value = _log_posterior(coefficients, f, y, weights)
    return value - half_log_determinant(kernel, f, weights, found)


def _newton(kernel: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """`a` but for one step, how many were taken, and whether they have converged."""
    tolerance = float(jnp.finfo(y.dtype).eps) ** 0.25  # two steps on, it is rounding

    def step(carry):
        a, _, steps = carry
        f = _matmul(kernel, a)
        d_a = _step(a, f, kernel, y, weights, curvature(kernel, f, weights))
        d_f = _matmul(kernel, d_a)
        length = jnp.max(jnp.abs(d_f))
        return a + _share(a, f, d_a, d_f, y, weights, length) * d_a, length, steps + 1

    def unfinished(carry):
        _, length, steps = carry
        return (length > tolerance) & (steps < MAX_STEPS)  # a length of NaN ends it too

    start = jnp.zeros_like(y), jnp.asarray(jnp.inf, y.dtype), jnp.asarray(0)
    a, length, steps = lax.while_loop(unfinished, step, start)
    return a, steps, length <= tolerance


def _share(a, f, d_a, d_f, y, weights, length) -> Array:
    """The share of a step that is taken: 1, halved until the posterior gains enough."""
    before = _log_posterior(a, f, y, weights)
    slope = jnp.sum(d_f * (_gradient(f, y, weights) - a))

    def too_far(share):
        gain = _log_posterior(a + share * d_a, f + share * d_f, y, weights) - before
        enough = gain >= _SUFFICIENT * share * slope
        return ~(enough | (share * length <= _SAFE)) & jnp.isfinite(length)

    return lax.while_loop(too_far, lambda share: share / 2, jnp.ones((), f.dtype))


def _step(a, f, kernel, y, weights, found: Curvature) -> Array:
    """Newton's: `(1 + W K)⁻¹ g = g - S K g`, with `g` the gradient of the log posterior in `f`.

    Refined once: of variances of 1e8 the difference keeps but a digit.
    """
    p = jax.nn.softmax(f, axis=1)

    def solve(g):
        return g - found.solve(_matmul(kernel, g))

    g = _gradient(f, y, weights) - a
    step = solve(g)
    moved = p * _matmul(kernel, step)
    bent = weights[:, None] * (moved - p * jnp.sum(moved, axis=1, keepdims=True))  # W K step
    return step + solve(g - step - bent)


def _newton_map(flat: Array, args) -> Array:
    """A step of Newton's, with a curvature that is given: its Jacobian at the mode is 0."""
    kernel, y, weights, found = args
    a = flat.reshape(y.shape)
    return (a + _step(a, _matmul(kernel, a), kernel, y, weights, found)).reshape(-1)


def _refine(matvec, b: Array) -> Array:
    """Solves `t - J t = b` for a `J` that is rounding."""
    return b + (b - matvec(b))


def _log_posterior(a: Array, f: Array, y: Array, weights: Array) -> Array:
    """`-aᵀf/2 + Σ w log π_y`, but for a constant."""
    own = jnp.sum(y * f, axis=1)
    others = jax.nn.logsumexp(jnp.where(y > 0, -jnp.inf, f), axis=1)
    log_p = -jax.nn.softplus(others - own)  # exact to rounding near 0 too
    return jnp.sum(weights * log_p) - jnp.sum(a * f) / 2


def _gradient(f: Array, y: Array, weights: Array) -> Array:
    """`w (y - π)`, where `1 - π_y` is the sum of the others: it may be below rounding."""
    others = (1 - y) * jax.nn.softmax(f, axis=1)
    return weights[:, None] * (y * jnp.sum(others, axis=1, keepdims=True) - others)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
