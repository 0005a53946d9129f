"""The kernels of the infinitely wide deep equilibrium model.

    z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b

With `S = U_std² x·x'/d + b_std²`, and `V`, `V̇` the Gaussian expectations of `φφ'` and of their
derivatives (`nt_deq.activations`),

    K* = W_std² V(K*) + S        NNGP kernel of z* (Gao et al. 2023, arXiv:2310.10767, eq. 13)
    Θ* = K* / (1 - W_std² V̇(K*)) NTK of z* (Feng & Kolter 2023, arXiv:2310.14062, thm. 3)

K* is solved entry by entry (`nt_deq.kernels.pairs`); Θ*, which is linear, is written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.errors import ArgumentError, NoEquilibriumError, NotConvergedError
from nt_deq.kernels.pairs import (
    Injection,
    Marginals,
    inverse_root,
    marginal_map,
    multiply,
    solve_equilibrium,
)
from nt_deq.kernels.series import Chebyshev
from nt_deq.solvers import Newton, Solver, rounding

Get = Literal["nngp", "ntk"]  # which kernel


class KernelSolution(NamedTuple):
    """The kernels of `z*` for inputs `x1: (n1, d)`, `x2: (n2, d)`, and how far they can be trusted.

    Attributes:
      nngp: `(n1, n2)`, `K*`: covariance of `z*`.
      ntk: `(n1, n2)`, `Θ*`: neural tangent kernel of `z*`.
      steps: steps that the solver took over the pairs.
      residual: `(n1, n2)`, `|W_std² V(K*) + S - K*|` as evaluated at the end.
      rate: the largest `J = W_std² E[φ'(z*)²]` of all inputs, at which plain iteration contracts;
        an equilibrium exists where it is below 1.
      error_bound: `(n1, n2)`, bound on the error of `nngp`: the residual, the rounding of it and of
        `x·x'`, and the errors of the two variances, over `1 - √(J J')`.
      converged: `(n1, n2)`, whether the entry of `nngp` and `ntk` is a number (where not, NaN).
    """

    nngp: Array
    ntk: Array
    steps: Array
    residual: Array
    rate: Array
    error_bound: Array
    converged: Array

    def __repr__(self):
        """Four lines instead of as many numbers as there are pairs."""
        first = f"KernelSolution: nngp and ntk of shape {self.nngp.shape}, {self.nngp.dtype}"
        if _checks.is_traced(self):
            return f"{first}, traced"
        converged, bound = np.asarray(self.converged), np.asarray(self.error_bound)
        every = "all" if converged.all() else f"{converged.sum()} of"
        return "\n  ".join(
            [
                first,
                f"steps: {np.max(self.steps)}, rate: {np.max(self.rate):.6g}",
                f"error_bound: at most {np.max(bound[converged], initial=0):.2g}",
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
    solver = get_solver(solver, activation)
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=b_std)
    x1, x2 = _checks.input_pair(x1, x2)
    stds = (jnp.asarray(std, x1.dtype) for std in (W_std, U_std, b_std))
    solution, marginals = _solve(activation, solver, *stds, x1, x2)
    raise_unless_converged(activation, solver, W_std, solution.converged, *marginals)
    return solution


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
        raise ArgumentError(
            f"solver={solver!r} needs {needed} DEQ, and {given}; pass None or nt_deq.Newton()."
        )
    return solver


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
    solution = KernelSolution(
        nngp=covariance,
        ntk=covariance / (1 - W_var * dual_slope),
        steps=steps,
        residual=residual,
        rate=jnp.maximum(jnp.max(first.rate), jnp.max(second.rate)),
        error_bound=_error_bound(activation, x1.shape[1], W_var, injection, equilibrium),
        converged=jnp.isfinite(covariance),
    )
    return solution, (first, second)


def _error_bound(activation, features, W_var, injection, equilibrium) -> Array:
    first, second = equilibrium[:2]
    s1, s2 = injection.variance1, injection.variance2
    unit = rounding(s1.dtype)
    gram_unit = unit / 4 * features**0.5  # Higham & Mary 2019, "A new approach to ... rounding"

    def error_of_variance(marginals, s):
        _, slope, k = marginal_map(activation, marginals.variance, W_var, s)
        return (marginals.root.residual + unit * k + gram_unit * s) / (1 - slope)

    def outer(a, b):
        return a[:, None] * b[None, :]

    error1 = error_of_variance(first, s1)
    error2 = error1 if s2 is None else error_of_variance(second, s2)
    # |∂V/∂k| = |E[φ'(u) u φ(u')]|/2k <= Lip √E[φ(u')²] / 2√k, by Cauchy-Schwarz
    by_variances = (activation.lipschitz / 2) * (
        outer(error1 * inverse_root(first.variance), jnp.sqrt(second.dual))
        + outer(jnp.sqrt(first.dual), error2 * inverse_root(second.variance))
    )
    scale = outer(jnp.sqrt(first.variance), jnp.sqrt(second.variance))
    gram_scale = outer(jnp.sqrt(s1), jnp.sqrt(s1 if s2 is None else s2))
    error = equilibrium.residual + unit * scale + gram_unit * gram_scale + W_var * by_variances
    return error / (1 - outer(jnp.sqrt(first.rate), jnp.sqrt(second.rate)))


def raise_unless_converged(
    activation: Activation,
    solver: Solver,
    W_std: float | Array,
    converged: Array,
    marginals1: Marginals,
    marginals2: Marginals,
) -> None:
    """Raises where an eager solve found no equilibrium; traced values pass, as NaN."""
    if _checks.is_traced((converged, marginals1, marginals2)) or bool(jnp.all(converged)):
        return
    dtype = marginals1.rate.dtype
    largest = float(jnp.finfo(dtype).max)
    wider = "" if dtype == np.float64 else ", or compute in float64"
    for side, marginals in (("x1", marginals1), ("x2", marginals2)):
        missing = np.flatnonzero(~np.isfinite(np.asarray(marginals.variance)))
        if not missing.size:
            continue
        row, where = missing[0], _checks.rows(side, missing)
        rate, k = float(marginals.rate[row]), float(marginals.root.value[row])
        if np.isnan(k):
            raise ArgumentError(
                f"there are NaN or infinite values in {where}; drop or impute them."
            )
        if np.isinf(k) and not _rate_of_large(activation, W_std, rate, dtype) >= 1:
            raise OverflowError(
                f"the variance of {where} overflows {dtype}, whose largest number is "
                f"{largest:.2g}; make the inputs, U_std or b_std smaller{wider}."
            )
        if rate < 1 - rounding(dtype) and np.isfinite(k):
            raise NotConvergedError(
                f"the variance of {where} has not converged after {solver.max_steps} steps of "
                f"{type(solver).__name__} (W_std² E[φ'(z*)²] = {rate:.6g}); allow more max_steps, "
                "a larger tol, or use nt_deq.Newton()."
            )
        if np.isnan(rate) and np.isfinite(k):
            raise NotConvergedError(
                f"activation={activation.name!r}: its expectations are not known in "
                f"{dtype} at the variance K* = {k:.4g} that {where} reached; make the inputs or "
                "U_std smaller, or take an activation with a closed form, such as 'erf'."
            )
        remedy = (
            f"take W_std < {1 / np.sqrt(float(activation.dual_diagonal(jnp.ones(()))[1])):.6g}"
            if activation.homogeneous
            else f"take a smaller W_std (any W_std < {0.5 / activation.lipschitz:.4g} has one)"
        )
        raise NoEquilibriumError(
            f"W_std={float(W_std):.6g} with activation={activation.name!r}: W_std² E[φ'(z*)²] = "
            f"{rate:.6g} must be below 1, and is not for {where}, so the network has no stable "
            f"equilibrium there; {remedy}."
        )
    failed = ~np.asarray(converged)
    variances = (float(jnp.max(marginals.variance)) for marginals in (marginals1, marginals2))
    if math.prod(variances) > largest:
        raise OverflowError(
            f"the product of two variances overflows {dtype}, whose largest number is "
            f"{largest:.2g}, in {failed.sum()} of {failed.size} pairs; make the inputs, U_std or "
            f"b_std smaller{wider}."
        )
    raise NotConvergedError(
        f"{failed.sum()} of {failed.size} pairs have not converged after {solver.max_steps} steps "
        f"of {type(solver).__name__}; allow more max_steps, a larger tol, or use nt_deq.Newton()."
    )


def _rate_of_large(activation, W_std, rate, dtype) -> float:
    """`W_std² E[φ'²]` where the variance is infinite, by that of a large one where it is NaN."""
    if not np.isnan(rate):
        return rate
    large = jnp.sqrt(jnp.finfo(dtype).max).astype(dtype) / 1e6
    return float(W_std) ** 2 * float(activation.dual_diagonal(large)[1])
