"""The equations of the fully-connected kernel, in which every entry is on its own.

No pair of inputs enters another's equation. So the diagonal is solved first, one scalar equation an
input; then every pair is one scalar equation in its covariance. For a positively homogeneous φ the
equations of all pairs are one function of the correlation of the inputs, and a series
(`nt_deq.Chebyshev`) takes the place of the iterations.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_deq.activations import Activation
from nt_deq.kernels.series import Chebyshev, arc_moment, sine
from nt_deq.kernels.tiles import by_tiles
from nt_deq.solvers import Root, Solver, iterate, rounding, solve


class Injection(NamedTuple):
    """`S`, the covariance of what enters every step of the iteration.

    Attributes:
      variance1: `S(x, x)` of the first inputs, `(n1,)`.
      variance2: the same of the second inputs, `(n2,)`; `None` means that they are the first.
      covariance: `S(x, x')`, `(n1, n2)`.
      factors: `(x1, x2, U_var, b_var)` with `S(x, x') = U_var x·x' + b_var`, where that is how it
        comes about: its entries are then computed where they are needed instead of being kept.
    """

    variance1: Array
    variance2: Array | None
    covariance: Array
    factors: tuple[Array, Array, Array, Array] | None = None


class Marginals(NamedTuple):
    """The equilibrium of every input with itself, `(n,)` each: see `Equilibrium`.

    Attributes:
      variance: `K*(x, x)`, NaN where there is no equilibrium.
      dual: `E[φ(z*)²]`.
      dual_slope: `E[φ'(z*)²]`.
      rate: `J = W_std² E[φ'(z*)²]`.
      root: what the solver found, be it an equilibrium or not.
    """

    variance: Array
    dual: Array
    dual_slope: Array
    rate: Array
    root: Root


class Equilibrium(NamedTuple):
    """The equilibrium of all pairs, `(n1, n2)` each: NaN where there is none or the solver failed.

    Attributes:
      marginals1, marginals2: of the first and of the second inputs.
      covariance: `K*`.
      dual: `V(K*)`.
      dual_slope: `V̇(K*)`.
      residual: `|W_var V(K*) + S - K*|`.
      steps: the solver's, a scalar.
    """

    marginals1: Marginals
    marginals2: Marginals
    covariance: Array
    dual: Array
    dual_slope: Array
    residual: Array
    steps: Array


@partial(jax.jit, static_argnums=(0, 1))
def solve_equilibrium(
    activation: Activation, solver: Solver, W_var: Array, injection: Injection
) -> Equilibrium:
    """Solves `K* = W_var V(K*) + S`: the diagonal, then the pairs.

    Args:
      activation: `φ`.
      solver: the method for both.
      W_var: `W_std²`, a scalar.
      injection: `S`.
    """
    s1, s2, s12, _ = injection
    first = _solve_marginals(activation, solver, W_var, s1)
    second = first if s2 is None else _solve_marginals(activation, solver, W_var, s2)
    pairs, residual, steps = _solve_pairs(
        activation, solver, *lax.stop_gradient((W_var, injection, first, second))
    )
    args = (W_var, s12, first.variance[:, None], second.variance[None, :])
    diagonal = first[:3] if s2 is None else None
    pairs = _differentiable(activation, pairs, args, diagonal)
    covariance, dual, dual_slope = pairs
    return Equilibrium(first, second, covariance, dual, dual_slope, residual, steps)


def marginal_map(activation: Activation, k: Array, W_var: Array, s: Array) -> tuple[Array, ...]:
    """`W_var E[φ(u)²] + S` for `u ~ N(0, k)`, its derivative in `k`, and `k`, its scale."""
    # Not V̇: the variance moves both arguments of E[φ(u)φ(u')], so the slope is E[φ'² + φφ''].
    moment, slope = jax.jvp(lambda k: activation.dual_diagonal(k)[0], (k,), (jnp.ones_like(k),))
    return W_var * moment + s, W_var * slope, k


def _solve_marginals(activation, solver, W_var, s) -> Marginals:
    # From S upwards: of several fixed points, the one that a network started at 0 finds.
    marginal = partial(marginal_map, activation)
    root = solve(solver, marginal, (W_var, s), s, s, jnp.full_like(s, jnp.inf))
    dual, dual_slope = activation.dual_diagonal(root.value)
    rate = W_var * dual_slope
    exists = root.converged & (rate < 1 - rounding(s.dtype))
    k, dual, dual_slope = (jnp.where(exists, a, jnp.nan) for a in (root.value, dual, dual_slope))
    return Marginals(k, dual, dual_slope, rate, root)


def inverse_root(s: Array) -> Array:
    """`1/√s`, and 0 for an `s` of 0."""
    positive = s > 0
    return jnp.where(positive, lax.rsqrt(jnp.where(positive, s, 1)), 0)


def _solve_pairs(activation, solver, W_var, injection, first, second):
    """`(K*, V(K*), V̇(K*))`, residual and steps of all pairs."""
    s1, s2, s12, factors = injection
    x1, x2, *scale_and_shift = factors or (None, None)
    series = None
    if isinstance(solver, Chebyshev):
        moment, bend = _homogeneous(activation, W_var)
        series = solver.series(W_var * bend / (1 - W_var * moment))

    def tile(rows, columns, s12):
        number1, singles1, inverse1, x1 = rows
        number2, singles2, inverse2, x2 = columns
        if factors is not None:
            U_var, b_var = scale_and_shift
            s12 = U_var * multiply(x1, x2) + b_var
        correlation = jnp.clip(s12 * (inverse1[:, None] * inverse2[None, :]), -1, 1)
        args = (W_var, s12, singles1[0][:, None], singles2[0][None, :])
        if series is None:
            *found, steps = _solve_by_steps(activation, solver, args, correlation)
        else:
            *found, steps = _solve_by_angle(activation, solver, series, args, correlation)
        if s2 is None:  # one number an input, where ρ = 1 would lose half of the digits of V̇
            same = number1[:, None] == number2[None, :]
            found = (jnp.where(same, s[:, None], p) for s, p in zip(singles1, found, strict=True))
        *pairs, residual = found
        return tuple(pairs), residual, steps

    def side(s, marginals, x):
        singles = (*marginals[:3], marginals.root.residual)
        return jnp.arange(len(s)), singles, inverse_root(s), x

    rows = side(s1, first, x1)
    columns = rows if s2 is None else side(s2, second, x2)
    mirror = jnp.transpose if s2 is None else None
    return by_tiles(tile, rows, columns, s12 if factors is None else None, mirror)


def multiply(x1: Array, x2: Array) -> Array:
    """`x1 x2ᵀ` in full: the default of a TPU or a recent GPU would keep 8 or 11 bits."""
    return jnp.matmul(x1, x2.T, precision=lax.Precision.HIGHEST)


def _solve_by_steps(activation, solver, args, correlation):
    _, _, k1, k2 = args
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    pair = partial(_pair_map, activation)
    root = iterate(solver, pair, args, scale * correlation, -scale, scale)
    covariance = jnp.where(root.converged, root.value, jnp.nan)
    return covariance, *root.aux, root.residual, root.steps


def _pair_map(activation, c, W_var, s12, k1, k2):
    dual, dual_slope = activation.dual(k1, k2, c)
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    return W_var * dual + s12, W_var * dual_slope, scale, dual, dual_slope


def _homogeneous(activation, W_var) -> tuple[Array, Array]:
    """`E[φ(g)²]` of a homogeneous `φ`, and how much it bends: `V̇ = moment - bend · angle/π`."""
    one = jnp.ones_like(W_var)
    moment = activation.dual_diagonal(one)[1]
    return moment, 2 * (moment - activation.dual(one, one, 0 * one)[1])


def _solve_by_angle(activation, solver, series, args, correlation):
    """The same of a homogeneous `φ`, from the angles between the states `z*`."""
    W_var, s12, k1, k2 = args
    moment, bend = _homogeneous(activation, W_var)
    square = 2 * (1 - correlation)
    # Where a Gram matrix of this dtype does not tell two inputs apart, they are the same.
    chord = jnp.sqrt(jnp.where(square <= 16 * jnp.finfo(square.dtype).eps, 0, square))
    angle, steps = solver.angles(series, chord)
    cosine = 1 - 2 * sine(angle / 2) ** 2
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    covariance = scale * cosine
    dual = scale * (moment * cosine + bend * arc_moment(angle))
    residual = jnp.abs(W_var * dual + s12 - covariance)
    return covariance, dual, moment - bend / jnp.pi * angle, residual, steps


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(activation, pairs, args, singles):
    """`pairs = (K*, V, V̇)`, with the derivatives in `args` that the equation gives them.

    `singles` are their diagonals where `x2` is `x1`, and give those of the derivatives, or `None`.
    """
    del activation, args, singles
    return pairs


@_differentiable.defjvp
def _differentiable_jvp(activation, primals, tangents):
    pairs, args, singles = primals
    _, d_args, d_singles = tangents
    # The values in the rule have the rule's own derivatives, so that higher ones are right too.
    covariance, _, dual_slope = pairs = _differentiable(activation, pairs, args, singles)
    W_var, _, k1, k2 = args

    def fn(*args):
        return _pair_map(activation, covariance, *args)[0]

    d_covariance = jax.jvp(fn, args, d_args)[1] / (1 - W_var * dual_slope)
    d_duals = jax.jvp(activation.dual, (k1, k2, covariance), (*d_args[2:], d_covariance))[1]
    d_pairs = (d_covariance, *d_duals)
    if singles is not None:
        same = jnp.eye(len(covariance), dtype=bool)
        d_pairs = (jnp.where(same, s, p) for s, p in zip(d_singles, d_pairs, strict=True))
    return pairs, tuple(d_pairs)
