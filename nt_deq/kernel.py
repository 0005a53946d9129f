"""The kernels of the infinitely wide deep equilibrium model.

    z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b

With `S = U_std² x·x'/d + b_std²`, and `V`, `V̇` the Gaussian expectations of `φφ'` and of their
derivatives (`nt_deq.activations`),

    K* = W_std² V(K*) + S        NNGP kernel of z* (Gao et al. 2023, arXiv:2310.10767, eq. 13)
    Θ* = K* / (1 - W_std² V̇(K*)) NTK of z* (Feng & Kolter 2023, arXiv:2310.14062, thm. 3)

No pair of inputs enters another's equation. So the diagonal is solved first, one scalar equation an
input; then every pair is one scalar equation in its covariance; and Θ*, which is linear, is written
down. For a positively homogeneous φ the equations of all pairs are one function of the correlation
of the inputs, and a series (`nt_deq.Chebyshev`) takes the place of the iterations.
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
from nt_deq.solvers import Chebyshev, Newton, Root, Solver, rounding, solve
from nt_deq.solvers.chebyshev import arc_moment, sine


class NoEquilibriumError(ValueError):
    """The network has no stable equilibrium: `W_std² E[φ'(z*)²] >= 1` for some input."""


class NotConvergedError(RuntimeError):
    """The equilibrium may exist, but `max_steps` steps of the solver did not reach it."""


class KernelSolution(NamedTuple):
    """The kernels of `z*` for inputs `x1: (n1, d)`, `x2: (n2, d)`, and how far they can be trusted.

    Attributes:
      nngp: `(n1, n2)`, `K*`: covariance of `z*`.
      ntk: `(n1, n2)`, `Θ*`: neural tangent kernel of `z*`.
      steps: steps that the solver took over the pairs.
      residual: `(n1, n2)`, `|W_std² V(K*) + S - K*|` as evaluated at the end.
      rate: the largest `J = W_std² E[φ'(z*)²]` of all inputs, at which plain iteration contracts;
        an equilibrium exists where it is below 1.
      error_bound: `(n1, n2)`, bound on the error of `nngp` given the variances of the two inputs:
        the residual and its rounding, over 1 - √(J J').
      converged: `(n1, n2)`, whether the entry of `nngp` and `ntk` is a number (where not, NaN).
    """

    nngp: Array
    ntk: Array
    steps: Array
    residual: Array
    rate: Array
    error_bound: Array
    converged: Array


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
      A `KernelSolution` in the dtype of `x1` and `x2`.

    Raises:
      NoEquilibriumError: some input has no stable equilibrium (a traced call instead gives NaN in
        its row or column, and `converged` is False there).
      NotConvergedError: `solver.max_steps` was too few (traced: likewise).
      ValueError, TypeError: an argument cannot be right; the message says why.
    """
    activation = get_activation(activation)
    solver = get_solver(solver, activation)
    for name, value in (("W_std", W_std), ("U_std", U_std), ("b_std", b_std)):
        _checks.standard_deviation(name, value)
    x1 = _checks.inputs("x1", x1)
    if x2 is not None:
        x2 = _checks.inputs("x2", x2)
        if x1.shape[1] != x2.shape[1]:
            raise ValueError(
                f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}: both need the same."
            )
        dtype = jnp.promote_types(x1.dtype, x2.dtype)
        x1, x2 = x1.astype(dtype), x2.astype(dtype)
    s1, s2, s12 = _input_covariance(x1, x2, U_std, b_std)
    W_var = jnp.square(jnp.asarray(W_std, s12.dtype))
    equilibrium = solve_equilibrium(activation, solver, W_var, s1, s2, s12)
    raise_unless_converged(activation, solver, W_std, equilibrium)
    return _summary(W_var, equilibrium)


def get_solver(solver: Solver | None, activation: Activation | None = None) -> Solver:
    """Returns the solver of independent entries to use, or raises.

    Args:
      solver: what the user asked for; `None` is `Chebyshev()` for a homogeneous activation and
        `Newton()` without.
      activation: `φ`, where the equation is that of this module.
    """
    homogeneous = activation is not None and activation.homogeneous
    if solver is None:
        return Chebyshev() if homogeneous else Newton()
    if not isinstance(solver, Solver):
        raise TypeError(
            f"solver={solver!r} is not a solver; pass nt_deq.Newton(), nt_deq.Picard() or None."
        )
    if isinstance(solver, Chebyshev) and not homogeneous:
        needed = "a homogeneous activation (relu, leaky_relu, abs, identity) of a fully-connected"
        given = "this layer is another" if activation is None else f"{activation.name!r} is not"
        raise ValueError(
            f"solver={solver!r} needs {needed} DEQ, and {given}; pass None or nt_deq.Newton()."
        )
    return solver


@jax.jit
def _input_covariance(x1, x2, U_std, b_std):
    """`S = U_std² x·x'/d + b_std²` for every input and every pair."""
    U_var = jnp.square(jnp.asarray(U_std, x1.dtype)) / x1.shape[1]
    b_var = jnp.square(jnp.asarray(b_std, x1.dtype))

    def norm(x):
        return U_var * jnp.sum(x * x, axis=1) + b_var

    # A TPU's or a recent GPU's default precision would keep 8 or 11 bits.
    gram = jnp.matmul(x1, (x1 if x2 is None else x2).T, precision=lax.Precision.HIGHEST)
    return norm(x1), None if x2 is None else norm(x2), U_var * gram + b_var


class Marginals(NamedTuple):
    """One input's equilibrium, `(n,)` each: variance `K*(x, x)`, `φ` moments there, `J`."""

    variance: Array
    second_moment: Array
    rate: Array
    root: Root


class Equilibrium(NamedTuple):
    """The equilibrium of all pairs, `(n1, n2)` each: `K*`, `V(K*)`, `V̇(K*)`."""

    marginals1: Marginals
    marginals2: Marginals
    covariance: Array
    dual: Array
    dual_slope: Array
    root: Root


@partial(jax.jit, static_argnums=(0, 1))
def solve_equilibrium(
    activation: Activation,
    solver: Solver,
    W_var: Array,
    s1: Array,
    s2: Array | None,
    s12: Array,
) -> Equilibrium:
    """Solves `K* = W_var V(K*) + S`: the diagonal, then the pairs.

    Args:
      activation: `φ`.
      solver: the method for both.
      W_var: `W_std²`, a scalar.
      s1: `S(x, x)` of the first inputs, `(n1,)`.
      s2: the same of the second inputs, `(n2,)`; `None` means that they are the first.
      s12: `S(x, x')`, `(n1, n2)`.

    Returns:
      An `Equilibrium`: NaN where there is none or where the solver failed.
    """
    first = _solve_marginals(activation, solver, W_var, s1)
    second = first if s2 is None else _solve_marginals(activation, solver, W_var, s2)
    s2_or_1 = s1 if s2 is None else s2
    k1, k2 = first.variance[:, None], second.variance[None, :]
    correlation = jnp.clip(s12 * (_inverse_root(s1)[:, None] * _inverse_root(s2_or_1)), -1, 1)
    args = (W_var, s12, k1, k2)
    if isinstance(solver, Chebyshev):
        covariance, dual, dual_slope, root = _solve_by_angle(activation, solver, args, correlation)
    else:
        scale = jnp.sqrt(k1) * jnp.sqrt(k2)
        pair = partial(_pair_map, activation)
        root = solve(solver, pair, args, scale * correlation, -scale, scale)
        covariance = jnp.where(root.converged, root.value, jnp.nan)
        dual, dual_slope = activation.dual(k1, k2, covariance)
    if s2 is None:  # one number an input: exact, where ρ = 1 would lose half of the digits of V̇
        # Not `.at[].set`: a choice fuses with what comes before and after it.
        diagonal = jnp.arange(s1.shape[0])[:, None] == jnp.arange(s1.shape[0])

        def exact(pairs, singles):
            return jnp.where(diagonal, singles, pairs) if pairs.ndim else pairs

        covariance = exact(covariance, first.variance)
        dual = exact(dual, first.second_moment)
        dual_slope = exact(dual_slope, activation.dual_diagonal(first.variance)[1])
        root = jax.tree.map(exact, root, first.root)
    return Equilibrium(first, second, covariance, dual, dual_slope, root)


def _inverse_root(s: Array) -> Array:
    positive = s > 0
    return jnp.where(positive, lax.rsqrt(jnp.where(positive, s, 1)), 0)


def _solve_by_angle(activation, solver, args, correlation) -> tuple[Array, Array, Array, Root]:
    """`K*`, `V(K*)`, `V̇(K*)` of a homogeneous `φ` from the angles between the states `z*`."""
    W_var, s12, k1, k2, correlation = lax.stop_gradient((*args, correlation))
    # Such a φ is linear on both sides of 0: V̇ = moment - bend · angle/π.
    one = jnp.ones_like(W_var)
    moment = activation.dual_diagonal(one)[1]
    bend = 2 * (moment - activation.dual(one, one, 0 * one)[1])
    square = 2 * (1 - correlation)
    # Where a Gram matrix of this dtype does not tell two inputs apart, they are the same.
    chord = jnp.sqrt(jnp.where(square <= 16 * jnp.finfo(square.dtype).eps, 0, square))
    angle, steps = solver.angles(W_var * bend / (1 - W_var * moment), chord)
    cosine = 1 - 2 * sine(angle / 2) ** 2
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    covariance = scale * cosine
    dual = scale * (moment * cosine + bend * arc_moment(angle))
    dual_slope = moment - bend / jnp.pi * angle
    residual = jnp.abs(W_var * dual + s12 - covariance)
    root = Root(covariance, residual, jnp.isfinite(covariance), steps)
    return *_differentiable(activation, (covariance, dual, dual_slope), args), root


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(activation, value, args):
    """`value = (K*, V, V̇)`, with the derivatives in `args` that the equation gives them."""
    del activation, args
    return value


@_differentiable.defjvp
def _differentiable_jvp(activation, primals, tangents):
    value, args = primals
    # The values in the rule have the rule's own derivatives, so that higher ones are right too.
    covariance, _, dual_slope = value = _differentiable(activation, value, args)
    W_var, _, k1, k2 = args

    def fn(*args):
        return _pair_map(activation, covariance, *args)[0]

    d_covariance = jax.jvp(fn, args, tangents[1])[1] / (1 - W_var * dual_slope)
    d_duals = jax.jvp(activation.dual, (k1, k2, covariance), (*tangents[1][2:], d_covariance))[1]
    return value, (d_covariance, *d_duals)


def _pair_map(activation, c, W_var, s12, k1, k2):
    dual, dual_slope = activation.dual(k1, k2, c)
    return W_var * dual + s12, W_var * dual_slope, jnp.sqrt(k1) * jnp.sqrt(k2)


def _marginal_map(activation, k, W_var, s):
    # Not V̇: the variance moves both arguments of E[φ(u)φ(u')], so the slope is E[φ'² + φφ''].
    moment, slope = jax.jvp(lambda k: activation.dual_diagonal(k)[0], (k,), (jnp.ones_like(k),))
    return W_var * moment + s, W_var * slope, k


def _solve_marginals(activation, solver, W_var, s) -> Marginals:
    # From S upwards: of several fixed points, the one that a network started at 0 finds.
    marginal = partial(_marginal_map, activation)
    root = solve(solver, marginal, (W_var, s), s, s, jnp.full_like(s, jnp.inf))
    rate = W_var * activation.dual_diagonal(root.value)[1]
    exists = root.converged & (rate < 1 - rounding(s.dtype))
    variance = jnp.where(exists, root.value, jnp.nan)
    return Marginals(variance, activation.dual_diagonal(variance)[0], rate, root)


@jax.jit
def _summary(W_var: Array, equilibrium: Equilibrium) -> KernelSolution:
    first, second, covariance, _, dual_slope, root = equilibrium
    rate = jnp.sqrt(first.rate)[:, None] * jnp.sqrt(second.rate)[None, :]
    scale = jnp.sqrt(first.variance)[:, None] * jnp.sqrt(second.variance)[None, :]
    return KernelSolution(
        nngp=covariance,
        ntk=covariance / (1 - W_var * dual_slope),
        steps=root.steps,
        residual=root.residual,
        rate=jnp.maximum(jnp.max(first.rate), jnp.max(second.rate)),
        error_bound=(root.residual + rounding(scale.dtype) * scale) / (1 - rate),
        converged=jnp.isfinite(covariance),
    )


def raise_unless_converged(
    activation: Activation, solver: Solver, W_std, equilibrium: Equilibrium
) -> None:
    """Raises where an eager solve found no equilibrium; traced values pass, as NaN."""
    if _checks.is_traced(equilibrium) or bool(jnp.all(jnp.isfinite(equilibrium.covariance))):
        return
    for side, marginals in (("first", equilibrium.marginals1), ("second", equilibrium.marginals2)):
        missing = np.flatnonzero(~np.isfinite(np.asarray(marginals.variance)))
        if not missing.size:
            continue
        row = missing[0]
        rate, k = float(marginals.rate[row]), float(marginals.root.value[row])
        where = f"{missing.size} of the {side} inputs (first: row {row})"
        if rate < 1 - rounding(marginals.rate.dtype) and np.isfinite(k):
            raise NotConvergedError(
                f"the variance of {where} has not converged after {solver.max_steps} steps of "
                f"{type(solver).__name__} (W_std² E[φ'(z*)²] = {rate:.6g}); allow more max_steps, "
                "a larger tol, or use nt_deq.Newton()."
            )
        if np.isnan(rate) and np.isfinite(k):
            raise NotConvergedError(
                f"activation={activation.name!r}: its expectations are not known in "
                f"{marginals.rate.dtype} at the variance K* = {k:.4g} that {where} reached; make "
                "the inputs or U_std smaller, or take an activation with a closed form, such as "
                "'erf'."
            )
        remedy = (
            f"take W_std < {1 / np.sqrt(float(activation.dual_diagonal(jnp.ones(()))[1])):.6g}"
            if activation.homogeneous
            else f"take a smaller W_std (any W_std < {0.5 / activation.lipschitz:.4g} has one)"
        )
        raise NoEquilibriumError(
            f"W_std={float(W_std):.6g} with activation={activation.name!r}: W_std² E[φ'(z*)²] = "
            f"{rate:.6g} has to be below 1, and is not for {where}, so the network has no stable "
            f"equilibrium there; {remedy}."
        )
    failed = ~np.isfinite(np.asarray(equilibrium.covariance))
    raise NotConvergedError(
        f"{failed.sum()} of {failed.size} pairs have not converged after {solver.max_steps} steps "
        f"of {type(solver).__name__}; allow more max_steps, a larger tol, or use nt_deq.Newton()."
    )
