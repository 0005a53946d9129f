"""The kernels of the infinitely wide deep equilibrium model.

    z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b

With `S = U_std² x·x'/d + b_std²`, and `V`, `V̇` the Gaussian expectations of `φφ'` and of their
derivatives (`nt_deq.activations`),

    K* = W_std² V(K*) + S        NNGP kernel of z* (Gao et al. 2023, arXiv:2310.10767, eq. 13)
    Θ* = K* / (1 - W_std² V̇(K*)) NTK of z* (Feng & Kolter 2023, arXiv:2310.14062, thm. 3)

No pair of inputs enters another's equation. So the diagonal is solved first, one scalar equation
per input; then every pair is one scalar equation in its covariance, and Θ*, which is linear, is
written down. For a positively homogeneous φ the equations of all pairs are one function of the
correlation of the inputs, and a series (`nt_deq.Chebyshev`) takes the place of the iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.implicit import implicit_entries, keep
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.solver import Bounds, Evaluation, Solution, Solver, check_solver, rounding
from nt_deq.kernels.diagnosis import raise_unless_solved
from nt_deq.kernels.series import Chebyshev, arc_moment, sine
from nt_deq.kernels.tiles import by_tiles


class KernelSolution(NamedTuple):
    """The kernels of `z*` for inputs `x1: (n1, d)`, `x2: (n2, d)`, and how far they can be trusted.

    Attributes:
      nngp: `(n1, n2)`, `K*`: covariance of `z*`.
      ntk: `(n1, n2)`, `Θ*`: neural tangent kernel of `z*`.
      steps: evaluations of the equation that the solver took over the pairs; 0 by the series.
      residual: `(n1, n2)`, `|W_std² V(K*) + S - K*|` as evaluated at the end.
      rate: the largest `J = W_std² E[φ'(z*)²]` of all inputs, at which plain iteration contracts;
        an equilibrium exists where it is below 1.
      nngp_error: `(n1, n2)`, bound on the error of `nngp`: the residual, the rounding of it and of
        `x·x'`, and the errors of the two variances, over `1 - √(J J')`.
      converged: `(n1, n2)`, whether the entry of `nngp` and `ntk` is a number (where not, NaN).
    """

    nngp: Array
    ntk: Array
    steps: Array
    residual: Array
    rate: Array
    nngp_error: Array
    converged: Array

    def __repr__(self):
        """Four lines instead of as many numbers as there are pairs."""
        first = f"KernelSolution: nngp and ntk of shape {self.nngp.shape}, {self.nngp.dtype}"
        if _checks.is_traced(self):
            return f"{first}, traced"
        converged, bound = np.asarray(self.converged), np.asarray(self.nngp_error)
        every = "all" if converged.all() else f"{converged.sum()} of"
        return "\n  ".join(
            [
                first,
                f"steps: {np.max(self.steps)}, rate: {np.max(self.rate):.6g}",
                f"nngp_error: at most {np.max(bound[converged], initial=0):.2g}",
                f"converged: {every} {converged.size} pairs",
            ]
        )


def deq_kernel(
    x1: Array,
    x2: Array | None = None,
    *,
    W_std: float | Array,
    U_std: float | Array = 1.0,
    b_std: float | Array = 0.0,
    activation: str | Activation | Callable[[Array], Array] = "relu",
    solver: Solver | None = None,
) -> KernelSolution:
    """Computes the NNGP kernel and the NTK of the equilibrium `z*` of an infinitely wide DEQ.

    Compiled, differentiable in `x1`, `x2` and the standard deviations (implicitly, not through the
    iterations), and usable under `jax.jit`, `vmap` and `grad`. For the kernels of a whole network,
    with a readout `f = V_std/√n V φ(z*)`, use `stax.serial(stax.DEQ(...), stax.Dense(1, V_std))`.

    Args:
      x1: inputs, `(n1, d)`.
      x2: other inputs, `(n2, d)`; `None` means `x1`, and then the diagonal is exact.
      W_std: standard deviation of the recurrent weights, `>= 0`; may be traced.
      U_std: standard deviation of the input weights, `>= 0`; may be traced.
      b_std: standard deviation of the bias, `>= 0`; may be traced.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function such as
        `jnp.tanh`, or an `nt_deq.Activation`.
      solver: `None` is `nt_deq.Chebyshev()` for a homogeneous activation (relu, leaky_relu, abs,
        identity) and `nt_deq.Newton()` for the others; `nt_deq.Picard()` is the plain iteration.

    Returns:
      A `KernelSolution` in the dtype of `x1` and `x2`; of half precision in float32, as
      neural-tangents has it.

    Raises:
      OverflowError: a variance or a product of two is beyond the dtype (traced: as below).
      NoEquilibriumError: some input has no stable equilibrium (a traced call instead gives NaN in
        its row or column, and `converged` is False there).
      NotConvergedError: `solver.max_steps` was too few (traced: likewise).
      ValueError, TypeError: an argument cannot be right; the message says why.
    """
    activation = get_activation(activation)
    solver = dense_solver(solver, activation)
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=b_std)
    x1, x2 = _checks.input_pair(x1, x2)
    stds = (jnp.asarray(std, x1.dtype) for std in (W_std, U_std, b_std))
    solution, marginals = _solve(activation, solver, *stds, x1, x2)
    raise_unless_solved(activation, solver, W_std, solution.converged, *marginals)
    return solution


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

    variance1: Array
    variance2: Array | None
    covariance: Array
    factors: tuple[Array, Array, Array, Array] | None = None


class Marginals(NamedTuple):
    """The equilibrium of every input with itself, `(n,)` each.

    Attributes:
      variance: `K*(x, x)`, NaN where there is no equilibrium, as `dual` and `dual_slope`.
      dual: `E[φ(z*)²]`.
      dual_slope: `E[φ'(z*)²]`.
      finite: the three, with those at `S(x, x)` where there is no equilibrium: what is not a number
        must not meet the derivatives of other inputs.
      rate: `J = W_std² E[φ'(z*)²]`.
      root: what the solver found, be it an equilibrium or not.
    """

    variance: Array
    dual: Array
    dual_slope: Array
    finite: tuple[Array, Array, Array]
    rate: Array
    root: Solution


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
def _solve(activation, solver, W_std, U_std, b_std, x1, x2):
    """The `KernelSolution` and the `Marginals` of both sides."""
    W_var, b_var = W_std**2, b_std**2
    U_var = U_std**2 / x1.shape[1]
    others = x1 if x2 is None else x2

    def variance(x):
        return U_var * jnp.sum(x * x, axis=1) + b_var

    injection = Injection(
        variance(x1),
        None if x2 is None else variance(x2),
        U_var * multiply(x1, others) + b_var,
        (x1, others, U_var, b_var),
    )
    equilibrium = solve_equilibrium(activation, solver, W_var, injection)
    first, second, covariance, _, dual_slope, residual, steps = equilibrium
    # What is not a number must not meet the derivatives of the others.
    solved = jnp.isfinite(covariance)
    finite, slope = (jnp.where(solved, a, 0) for a in (covariance, dual_slope))
    solution = KernelSolution(
        nngp=covariance,
        ntk=keep(solved, finite / (1 - W_var * slope)),
        steps=steps,
        residual=residual,
        rate=jnp.maximum(jnp.max(first.rate), jnp.max(second.rate)),
        nngp_error=_nngp_error(activation, x1.shape[1], W_var, injection, equilibrium),
        converged=solved,
    )
    return solution, (first, second)


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
    args = (W_var, s12, first.finite[0][:, None], second.finite[0][None, :])
    diagonal = first.finite if s2 is None else None
    pairs = _differentiable(activation, pairs, args, diagonal)
    covariance, dual, dual_slope = pairs
    return Equilibrium(first, second, covariance, dual, dual_slope, residual, steps)


def marginal_map(activation: Activation, k: Array, args: tuple[Array, Array]) -> Evaluation:
    """`W_var E[φ(u)²] + s` for `u ~ N(0, k)`, of `args = (W_var, s)`; its scale is `k`."""
    W_var, s = args
    # Not V̇: the variance moves both arguments of E[φ(u)φ(u')], so the slope is E[φ'² + φφ''].
    moment, slope = jax.jvp(lambda k: activation.dual_diagonal(k)[0], (k,), (jnp.ones_like(k),))
    return Evaluation(W_var * moment + s, k, W_var * slope)


def _solve_marginals(activation, solver, W_var, s) -> Marginals:
    marginal, args = partial(marginal_map, activation), (W_var, s)
    # From S upwards: of several fixed points, the one that a network started at 0 finds.
    start, known = lax.stop_gradient((s, args))
    bounds = Bounds(start, jnp.full_like(s, jnp.inf))
    root, _ = solver.solve_entries(marginal, start, known, bounds)
    rate = W_var * activation.dual_diagonal(root.value)[1]
    stable = root.converged & (rate < 1 - rounding(rate.dtype))
    k = implicit_entries(marginal, jnp.where(stable, root.value, start), args)
    finite = (k, *activation.dual_diagonal(k))
    rate = jnp.where(stable, W_var * finite[2], rate)
    k, dual, dual_slope = (jnp.where(stable, a, jnp.nan) for a in finite)
    return Marginals(k, dual, dual_slope, finite, rate, root)


def _solve_pairs(activation, solver, W_var, injection, first, second):
    """`(K*, V(K*), V̇(K*))`, residual and steps of all pairs, by tiles."""
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
        if s2 is None:  # one number per input, where ρ = 1 would lose half of the digits of V̇
            same = number1[:, None] == number2[None, :]
            found = (jnp.where(same, s[:, None], p) for s, p in zip(singles1, found, strict=True))
        *pairs, residual = found
        return tuple(pairs), residual, steps

    def side(s, marginals, x):
        singles = (*marginals[:3], marginals.root.residual)
        return jnp.arange(len(s)), singles, _inverse_root(s), x

    rows = side(s1, first, x1)
    columns = rows if s2 is None else side(s2, second, x2)
    mirror = jnp.transpose if s2 is None else None
    return by_tiles(tile, rows, columns, s12 if factors is None else None, mirror)


def multiply(x1: Array, x2: Array) -> Array:
    """`x1 x2ᵀ` in full: the default of a TPU or a recent GPU would keep 8 or 11 bits."""
    return jnp.matmul(x1, x2.T, precision=lax.Precision.HIGHEST)


def _inverse_root(s: Array) -> Array:
    """`1/√s`, and 0 for an `s` of 0."""
    positive = s > 0
    return jnp.where(positive, lax.rsqrt(jnp.where(positive, s, 1)), 0)


def _pair_map(activation, c, args) -> Evaluation:
    """`W_var V + S` for the covariance `c` of a pair; `aux` is `(V, V̇)`."""
    W_var, s12, k1, k2 = args
    dual, dual_slope = activation.dual(k1, k2, c)
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    return Evaluation(W_var * dual + s12, scale, W_var * dual_slope, (dual, dual_slope))


def _solve_by_steps(activation, solver, args, correlation):
    """Covariance, `V`, `V̇`, residual and steps of a tile of pairs, by the solver's steps."""
    _, _, k1, k2 = args
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    pair = partial(_pair_map, activation)
    root, duals = solver.solve_entries(pair, scale * correlation, args, Bounds(-scale, scale))
    covariance = jnp.where(root.converged, root.value, jnp.nan)
    return covariance, *duals, root.residual, root.steps


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
    Where a pair is NaN its derivatives are 0.
    """
    del activation, args, singles
    return pairs


@_differentiable.defjvp
def _differentiable_jvp(activation, primals, tangents):
    pairs, args, singles = primals
    _, d_args, d_singles = tangents
    # The values in the rule have the rule's own derivatives, so that higher ones are right too.
    pairs = _differentiable(activation, pairs, args, singles)
    solved = jnp.isfinite(pairs[0])
    covariance, _, dual_slope = (jnp.where(solved, p, 0) for p in pairs)
    W_var, _, k1, k2 = args

    def fn(args):
        return _pair_map(activation, covariance, args).value

    d_covariance = jax.jvp(fn, (args,), (d_args,))[1] / (1 - W_var * dual_slope)
    d_duals = jax.jvp(activation.dual, (k1, k2, covariance), (*d_args[2:], d_covariance))[1]
    d_pairs = (d_covariance, *d_duals)
    if singles is not None:
        same = jnp.eye(len(covariance), dtype=bool)
        d_pairs = (jnp.where(same, s, p) for s, p in zip(d_singles, d_pairs, strict=True))
    return pairs, tuple(jnp.where(solved, d, 0) for d in d_pairs)


def _nngp_error(activation, features, W_var, injection, equilibrium) -> Array:
    """The bound that `KernelSolution.nngp_error` is."""
    first, second = equilibrium[:2]
    s1, s2 = injection.variance1, injection.variance2
    unit = rounding(s1.dtype)
    gram_unit = unit / 4 * features**0.5  # Higham & Mary 2019, "A new approach to ... rounding"

    def error_of_variance(marginals, s):
        found = marginal_map(activation, marginals.variance, (W_var, s))
        assert found.slope is not None
        error = marginals.root.residual + unit * marginals.variance + gram_unit * s
        return error / (1 - found.slope)

    def outer(a, b):
        return a[:, None] * b[None, :]

    error1 = error_of_variance(first, s1)
    error2 = error1 if s2 is None else error_of_variance(second, s2)
    # |∂V/∂k| = |E[φ'(u) u φ(u')]|/2k <= Lip √E[φ(u')²] / 2√k, by Cauchy-Schwarz
    by_variances = (activation.lipschitz / 2) * (
        outer(error1 * _inverse_root(first.variance), jnp.sqrt(second.dual))
        + outer(jnp.sqrt(first.dual), error2 * _inverse_root(second.variance))
    )
    scale = outer(jnp.sqrt(first.variance), jnp.sqrt(second.variance))
    gram_scale = outer(jnp.sqrt(s1), jnp.sqrt(s1 if s2 is None else s2))
    error = equilibrium.residual + unit * scale + gram_unit * gram_scale + W_var * by_variances
    return error / (1 - outer(jnp.sqrt(first.rate), jnp.sqrt(second.rate)))
