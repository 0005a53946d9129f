"""The equations of the inputs and of the pairs of a dense DEQ, and their solution.

No pair of inputs enters another's equation. So the diagonal is solved first, one scalar equation
per input; then every pair is one scalar equation in its covariance. For a positively homogeneous φ
the equations of all pairs are one function of the correlation of the inputs, and a series
(`nt_deq.Chebyshev`) takes the place of the iterations.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from nt_deq.activations import Activation
from nt_deq.activations.elementary import arc_moment, versine
from nt_deq.activations.quotient import over
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.implicit import implicit_entries
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.solver import (
    Bounds,
    Evaluation,
    Solution,
    Solver,
    check_solver,
    rounding,
)
from nt_deq.kernels.series import NEAR, Chebyshev, homogeneous
from nt_deq.kernels.tiles import by_tiles


def dense_solver(solver: Solver | None, activation: Activation) -> Solver:
    """Returns the solver of independent entries to use, or raises.

    Args:
      solver: what the user asked for; `None` is `Chebyshev()` for a homogeneous activation and
        `Newton()` without.
      activation: `φ`.
    """
    if solver is None:
        return Chebyshev() if activation.homogeneous else Newton()
    check_solver(solver)
    if isinstance(solver, Chebyshev) and not activation.homogeneous:
        raise ArgumentError(
            f"solver={solver!r} is the series of homogeneous activations (relu, leaky_relu, abs, "
            f"identity), and {activation.name!r} is not; pass None or nt_deq.Newton()."
        )
    return solver


class Injection(NamedTuple):
    """`S`, the covariance of what enters every step of the iteration.

    Attributes:
      variance1: `S(x, x)` of the first inputs, `(n1,)`.
      variance2: the same of the second inputs, `(n2,)`; `None` means that they are the first.
      covariance: `S(x, x')`, `(n1, n2)`.
      factors: `(x1, x2, U_var, b_var)` with `S(x, x') = U_var x·x' + b_var`, where that is how it
        comes about: its entries are then computed where they are needed instead of being kept.
    """

    variance1: Float[Array, " n1"]
    variance2: Float[Array, " n2"] | None
    covariance: Float[Array, "n1 n2"]
    factors: (
        tuple[Float[Array, "n1 d"], Float[Array, "n2 d"], Float[Array, ""], Float[Array, ""]] | None
    ) = None


class Marginals(NamedTuple):
    """The equilibrium of every input with itself, `(n,)` each.

    Attributes:
      variance: `K*(x, x)`; where there is no equilibrium `S(x, x)`, or 1 if that is no number: what
        is none must not meet the derivatives of other inputs.
      dual: `E[φ(z*)²]` at that variance.
      dual_slope: `E[φ'(z*)²]` at that variance.
      exists: whether there is an equilibrium and the solver found it.
      rate: `J = W_std² E[φ'(z*)²]`, of `root` where there is no equilibrium.
      root: what the solver found, be it an equilibrium or not.
    """

    variance: Float[Array, " n"]
    dual: Float[Array, " n"]
    dual_slope: Float[Array, " n"]
    exists: Bool[Array, " n"]
    rate: Float[Array, " n"]
    root: Solution


class Equilibrium(NamedTuple):
    """The equilibrium of all pairs, `(n1, n2)` each.

    Attributes:
      marginals1, marginals2: of the first and of the second inputs.
      covariance: `K*`, and 0 where it is not known.
      dual: `V(K*)`, likewise.
      dual_slope: `V̇(K*)`, likewise.
      solved: whether both inputs have an equilibrium, and the solver found that of the pair.
      residual: `|W_var V(K*) + S - K*|`.
      steps: the solver's, a scalar.
    """

    marginals1: Marginals
    marginals2: Marginals
    covariance: Float[Array, "n1 n2"]
    dual: Float[Array, "n1 n2"]
    dual_slope: Float[Array, "n1 n2"]
    solved: Bool[Array, "n1 n2"]
    residual: Float[Array, "n1 n2"]
    steps: Int[Array, ""]


@partial(jax.jit, static_argnums=(0, 1))
def solve_equilibrium(
    activation: Activation, solver: Solver, W_var: Float[Array, ""], injection: Injection
) -> Equilibrium:
    """Solves `K* = W_var V(K*) + S`: the diagonal, then the pairs.

    Args:
      activation: `φ`.
      solver: the method for both.
      W_var: `W_std²`, a scalar.
      injection: `S`.
    """
    s1, s2, s12, _ = injection
    first = solve_marginals(activation, solver, W_var, s1)
    second = first if s2 is None else solve_marginals(activation, solver, W_var, s2)
    found, residual, steps = _solve_pairs(
        activation, solver, *lax.stop_gradient((W_var, injection, first, second))
    )
    solved = jnp.isfinite(found[0])
    found = tuple(jnp.where(solved, a, 0) for a in found)
    args = (W_var, s12, first.variance[:, None], second.variance[None, :])
    covariance, dual, dual_slope = _differentiable(
        activation, found, args, first[:3] if s2 is None else None
    )
    return Equilibrium(first, second, covariance, dual, dual_slope, solved, residual, steps)


def marginal_map(
    activation: Activation,
    k: Float[Array, "*shape"],
    args: tuple[Float[Array, ""], Float[Array, "*shape"]],
) -> Evaluation:
    """`W_var E[φ(u)²] + s` for `u ~ N(0, k)`, of `args = (W_var, s)`; its scale is `k`."""
    W_var, s = args
    # Not V̇: the variance moves both arguments of E[φ(u)φ(u')], so the slope is E[φ'² + φφ''].
    moment, slope = jax.jvp(lambda k: activation.dual_diagonal(k)[0], (k,), (jnp.ones_like(k),))
    return Evaluation(W_var * moment + s, k, W_var * slope)


def solve_marginals(
    activation: Activation, solver: Solver, W_var: Float[Array, ""], s: Float[Array, " n"]
) -> Marginals:
    """Solves `k = W_var E[φ(u)²] + s`, `u ~ N(0, k)`, for the `s = S(x, x)` of every input."""
    marginal, args = partial(marginal_map, activation), (W_var, s)
    # From S upwards: of several fixed points, the one that a network started at 0 finds.
    start, known = lax.stop_gradient((s, args))
    bounds = Bounds(start, jnp.full_like(s, jnp.inf))
    root, _ = solver.solve_entries(marginal, start, known, bounds)
    rate = W_var * activation.dual_diagonal(root.value)[1]
    stable = root.converged & (rate < 1 - rounding(rate.dtype))
    otherwise = jnp.where(jnp.isfinite(start), start, 1)
    k = implicit_entries(marginal, jnp.where(stable, root.value, otherwise), args)
    dual, dual_slope = activation.dual_diagonal(k)
    rate = jnp.where(stable, W_var * dual_slope, rate)
    return Marginals(k, dual, dual_slope, stable, rate, root)


def _solve_pairs(activation, solver, W_var, injection, first, second):
    """`(K*, V(K*), V̇(K*))`, NaN where they are not known, residual and steps of all pairs."""
    s1, s2, s12, factors = injection
    x1, x2, *scale_and_shift = factors or (None, None)
    series = None
    if isinstance(solver, Chebyshev):
        moment, bend = homogeneous(activation, W_var)
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
            chord = _chord(correlation)
            if factors is not None:
                same = (s2 is None) & (number1[:, None] == number2[None, :])
                sides = (x1, inverse1), (x2, inverse2)
                chord = _exact_chord(chord, same, *sides, *scale_and_shift)
            *found, steps = _solve_by_angle(activation, solver, series, args, chord)
        if s2 is None:  # one number per input, where ρ = 1 would lose half of the digits of V̇
            same = number1[:, None] == number2[None, :]
            found = (jnp.where(same, s[:, None], p) for s, p in zip(singles1, found, strict=True))
        *pairs, residual = found
        return tuple(pairs), residual, steps

    def side(s, marginals, x):
        known = (*marginals[:3], marginals.root.residual)
        singles = tuple(jnp.where(marginals.exists, a, jnp.nan) for a in known)
        return jnp.arange(len(s)), singles, over(jnp.ones_like(s), jnp.sqrt(s)), x

    rows = side(s1, first, x1)
    columns = rows if s2 is None else side(s2, second, x2)
    mirror = jnp.transpose if s2 is None else None
    return by_tiles(tile, rows, columns, s12 if factors is None else None, mirror)


def multiply(x1: Float[Array, "n1 d"], x2: Float[Array, "n2 d"]) -> Float[Array, "n1 n2"]:
    """`x1 x2ᵀ` in full: the default of a TPU or a recent GPU would keep 8 or 11 bits."""
    return jnp.matmul(x1, x2.T, precision=lax.Precision.HIGHEST)


def _pair_map(moments, c, args) -> Evaluation:
    """`W_var V + S` for the covariance `c` of a pair; `aux` is `(V, V̇)`, which are `moments(c)`."""
    W_var, s12, k1, k2 = args
    dual, dual_slope = moments(c)
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    return Evaluation(W_var * dual + s12, scale, W_var * dual_slope, (dual, dual_slope))


def _solve_by_steps(activation, solver, args, correlation):
    """Covariance, `V`, `V̇`, residual and steps of a tile of pairs, by the solver's steps."""
    _, _, k1, k2 = args
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    pair = partial(_pair_map, activation.between(k1, k2))
    c, bounds = scale * correlation, Bounds(-scale, scale)
    steps = 0
    if isinstance(solver, Newton):  # J of a pair is at most the larger one of its inputs
        c, steps = solver.approach(pair, c, args, bounds)
        solver = dataclasses.replace(solver, max_steps=solver.max_steps - steps)
    root, duals = solver.solve_entries(pair, c, args, bounds)
    covariance = jnp.where(root.converged, root.value, jnp.nan)
    return covariance, *duals, root.residual, steps + root.steps


def _chord(correlation: Array) -> Array:
    """`√(2(1 - r))`, and 0 where a Gram matrix of this dtype does not tell two inputs apart."""
    square = 2 * (1 - correlation)
    return jnp.sqrt(jnp.where(square <= 16 * jnp.finfo(square.dtype).eps, 0, square))


def _exact_chord(chord, same, side1, side2, U_var, b_var) -> Array:
    """`|s/|s| - s'/|s'||` of `s = (√U_var x, √b_var)`, from differences where inputs are near.

    A side is `(x, 1/|s|)`. Only a tile with such a pair, that is not one of an input with itself,
    pays for it.
    """
    near = (chord * chord <= NEAR * jnp.finfo(chord.dtype).eps) & ~same
    (x1, inverse1), (_, inverse2) = side1, side2

    def by_differences(chord):
        scaled1, scaled2 = (jnp.sqrt(U_var) * x * inverse[:, None] for x, inverse in (side1, side2))

        def add(i, total):
            column1, column2 = (
                lax.dynamic_index_in_dim(a, i, 1, False) for a in (scaled1, scaled2)
            )
            return total + (column1[:, None] - column2[None, :]) ** 2

        start = b_var * (inverse1[:, None] - inverse2[None, :]) ** 2
        total = lax.fori_loop(0, x1.shape[1], add, start)
        return jnp.where(near, jnp.sqrt(total), chord)

    return lax.cond(jnp.any(near), by_differences, lambda chord: chord, chord)


def _solve_by_angle(activation, solver, series, args, chord):
    """The same of a homogeneous `φ`, from the angles between the states `z*`."""
    W_var, s12, k1, k2 = args
    moment, bend = homogeneous(activation, W_var)
    angle, steps = solver.angles(series, chord)
    cosine = 1 - versine(angle)
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
    pairs = _differentiable(activation, pairs, args, singles)
    covariance, _, dual_slope = pairs
    W_var, _, k1, k2 = args

    def fn(args):
        return _pair_map(partial(activation.dual, *args[2:]), covariance, args).value

    d_covariance = jax.jvp(fn, (args,), (d_args,))[1] / (1 - W_var * dual_slope)
    d_duals = jax.jvp(activation.dual, (k1, k2, covariance), (*d_args[2:], d_covariance))[1]
    d_pairs = (d_covariance, *d_duals)
    if singles is not None:
        same = jnp.eye(len(covariance), dtype=bool)
        d_pairs = (jnp.where(same, s, p) for s, p in zip(d_singles, d_pairs, strict=True))
    return pairs, tuple(d_pairs)
