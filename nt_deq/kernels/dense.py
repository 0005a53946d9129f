"""The kernels of the infinitely wide deep equilibrium model.

    z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b

With `S = U_std² x·x'/d + b_std²`, and `V`, `V̇` the Gaussian expectations of `φφ'` and of their
derivatives (`nt_deq.activations`),

    K* = W_std² V(K*) + S        NNGP kernel of z* (Gao et al. 2023, arXiv:2310.10767, eq. 13)
    Θ* = K* / (1 - W_std² V̇(K*)) NTK of z* (Feng & Kolter 2023, arXiv:2310.14062, thm. 3)

How the equations are solved is in `nt_deq.kernels.equations`.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Num

from nt_deq import _checks
from nt_deq._jax import enable_x64
from nt_deq.activations import Phi, get_activation
from nt_deq.fixed_point.implicit import keep
from nt_deq.fixed_point.solver import Solver, SteppingSolver
from nt_deq.kernels.diagnosis import raise_unless_solved
from nt_deq.kernels.equations import Injection, dense_solver, multiply, solve_equilibrium
from nt_deq.kernels.error_bounds import ENOUGH, ErrorBounds, Errors, Known
from nt_deq.kernels.series import Chebyshev
from nt_deq.typing import Number


class KernelSolution(NamedTuple):
    """The kernels of `z*` for inputs `x1: (n1, d)`, `x2: (n2, d)`, and how far they can be trusted.

    Attributes:
      nngp: `(n1, n2)`, `K*`: covariance of `z*`.
      ntk: `(n1, n2)`, `Θ*`: neural tangent kernel of `z*`.
      steps: evaluations of the equation that the solver took over the pairs; 0 by the series.
      residual: `(n1, n2)`, `|W_std² V(K*) + S - K*|` as evaluated at the end.
      rate: the largest `J = W_std² E[φ'(z*)²]` of all inputs, at which plain iteration contracts;
        an equilibrium exists where it is below 1.
      converged: `(n1, n2)`, whether the entry of `nngp` and `ntk` is a number (where not, NaN).
      errors: what `nngp_error` and `ntk_error` are computed of, where they are asked for.
    """

    nngp: Float[Array, "n1 n2"]
    ntk: Float[Array, "n1 n2"]
    steps: Int[Array, ""]
    residual: Float[Array, "n1 n2"]
    rate: Float[Array, ""]
    converged: Bool[Array, "n1 n2"]
    errors: ErrorBounds | Errors

    @property
    def nngp_error(self) -> Float[Array, "*batch n1 n2"]:
        """`(n1, n2)`, bound on the error of `nngp`: see `nt_deq.kernels.error_bounds`."""
        return self._bounds().nngp

    @property
    def ntk_error(self) -> Float[Array, "*batch n1 n2"]:
        """`(n1, n2)`, bound on the error of `ntk`, likewise."""
        return self._bounds().ntk

    def _bounds(self) -> Errors:
        if isinstance(self.errors, Errors):
            return Errors(*map(jnp.asarray, self.errors))
        evaluate = ErrorBounds.evaluate
        for _ in range(self.nngp.ndim - 2):  # a mapped solution
            evaluate = jax.vmap(evaluate)
        known = lax.stop_gradient((self.nngp, self.residual, self.converged))
        # Also where the mode that a float64 solution was computed in has been left.
        double = self.nngp.dtype == np.float64
        with enable_x64(True) if double else contextlib.nullcontext():
            return evaluate(self.errors, *known)

    def __repr__(self):
        """Four lines instead of as many numbers as there are pairs."""
        first = f"KernelSolution: nngp and ntk of shape {self.nngp.shape}, {self.nngp.dtype}"
        if _checks.is_traced(self):
            return f"{first}, traced"
        converged = np.asarray(self.converged)
        bounds = (
            f"{name}: at most {np.max(np.asarray(bound)[converged], initial=0):.2g}"
            for name, bound in zip(("nngp_error", "ntk_error"), self._bounds(), strict=True)
        )
        every = "all" if converged.all() else f"{converged.sum()} of"
        return "\n  ".join(
            [
                first,
                f"steps: {np.max(self.steps)}, rate: {np.max(self.rate):.6g}",
                ", ".join(bounds),
                f"converged: {every} {converged.size} pairs",
            ]
        )


def deq_kernel(
    x1: Num[ArrayLike, "n1 d"],
    x2: Num[ArrayLike, "n2 d"] | None = None,
    *,
    W_std: Number,
    U_std: Number = 1.0,
    b_std: Number = 0.0,
    activation: Phi = "relu",
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
      neural-tangents has it. Where float32 does not give `Θ*` to a percent (near-duplicates close
      to criticality, sin of large features) it is computed in float64 and rounded; a traced call
      cannot, and says so in `ntk_error`.

    Raises:
      OverflowError: a variance or a product of two is beyond the dtype (traced: as below).
      NoEquilibriumError: some input has no stable equilibrium (a traced call instead gives NaN in
        its row or column, and `converged` is False there).
      NotConvergedError: `solver.max_steps` was too few (traced: likewise).
      ValueError, TypeError: an argument cannot be right; the message says why.
    """
    phi = get_activation(activation)
    solver = dense_solver(solver, phi)
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=b_std)
    x1, x2 = _checks.input_pair(x1, x2)

    def solve(x1, x2):
        stds = (jnp.asarray(std, x1.dtype) for std in (W_std, U_std, b_std))
        solution, marginals = _solve(phi, solver, *stds, x1, x2)
        raise_unless_solved(phi, solver, W_std, solution.converged, *marginals)
        return solution

    solution = solve(x1, x2)
    asked_for_less = isinstance(solver, SteppingSolver) and solver.rtol is not None
    if _checks.is_traced(solution) or solution.ntk.dtype == np.float64 or asked_for_less:
        return solution
    assert isinstance(solution.errors, ErrorBounds)
    if solution.errors.are_small() or np.all(
        (solution.ntk_error <= ENOUGH * solution.errors.scale()) | ~solution.converged
    ):
        return solution
    with enable_x64(True):
        others = None if x2 is None else x2.astype(np.float64)
        return _rounded(solve(x1.astype(np.float64), others))


def _rounded(solution: KernelSolution) -> KernelSolution:
    """A solution in float64 as one in float32."""
    eps = float(jnp.finfo(jnp.float32).eps)
    nngp, ntk = solution._bounds()
    errors = nngp + eps * jnp.abs(solution.nngp), ntk + eps * jnp.abs(solution.ntk)
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a,
        solution._replace(errors=Errors(*errors)),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _solve(activation, solver, W_std, U_std, b_std, x1, x2):
    """The `KernelSolution` and the `Marginals` of both sides."""
    W_var, b_var = W_std**2, b_std**2
    U_var = U_std**2 / x1.shape[1]

    def variance(x):
        return U_var * jnp.sum(x * x, axis=1) + b_var

    def finite(x, s):  # what overflows or is NaN must not meet the derivatives of the others
        return jnp.where(jnp.isfinite(s)[:, None], x, 0)

    s1, s2 = variance(x1), None if x2 is None else variance(x2)
    x1 = finite(x1, s1)
    x2 = x1 if s2 is None else finite(x2, s2)
    injection = Injection(s1, s2, U_var * multiply(x1, x2) + b_var, (x1, x2, U_var, b_var))
    equilibrium = solve_equilibrium(activation, solver, W_var, injection)
    first, second, covariance, dual, slope, solved, residual, steps = equilibrium
    dual = None if isinstance(solver, Chebyshev) else dual
    known = lax.stop_gradient(Known(W_var, s1, s2, first, second, dual, slope))
    solution = KernelSolution(
        nngp=keep(solved, covariance),
        ntk=keep(solved, covariance / (1 - W_var * slope)),
        steps=steps,
        residual=residual,
        rate=jnp.maximum(jnp.max(first.rate), jnp.max(second.rate)),
        converged=solved,
        errors=ErrorBounds(activation, solver, x1.shape[1], known),
    )
    return solution, (first, second)
