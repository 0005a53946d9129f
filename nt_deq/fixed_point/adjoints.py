"""How the equilibrium of a finite network is differentiated, in forward and in reverse mode."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PyTree

from nt_deq import _checks
from nt_deq.convolution import with_fast_transposes
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.implicit import implicit_vectors, select, solve_linear
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import Solution, Solver, check_solver, network_rounding, norm

OnFailure = Literal["raise", "nan", "best"] | None
"""What becomes of a sample without an equilibrium: see `equilibrium`."""

Layer: TypeAlias = Callable[[Array, PyTree], Array]


class Adjoint(abc.ABC):
    """A way to differentiate `z* = f(z*, args)`."""

    @abc.abstractmethod
    def solve(
        self,
        layer: Layer,
        z0: Float[Array, "batch size"],
        args: PyTree,
        find: Callable[[], Solution],
        solver: Solver,
        on_failure: OnFailure,
    ) -> Solution:
        """Solves `z = layer(z, args)`, `(batch, size)`, with a derivative in `args`.

        `find` runs the solver from `z0`, not differentiated. `on_failure` is of what the
        derivative solves by itself.
        """


@dataclass(frozen=True)
class ImplicitAdjoint(Adjoint):
    """The implicit function theorem: the exact derivative, of every order.

    With `J = ∂f/∂z` at `z* = f(z*, θ)`, `dz* = (I - J)⁻¹ ∂f/∂θ dθ` (Bai et al. 2019, "Deep
    Equilibrium Models", thm. 1). The layer is linearised once, at the equilibrium, and
    `(I - J) t = b` or its transpose is solved by an iteration that costs as much per step as the
    layer, and without acceleration takes about as many steps. Memory does not grow with the number
    of steps. Where the linear solve fails, as at an unstable equilibrium, the derivative is NaN, or
    what `on_failure` says; `adjoint_solution` says how the solve went.

    Attributes:
      solver: of the linear equation. `None` is the solver of the equilibrium, with its tolerance.
    """

    solver: Solver | None = None

    def __post_init__(self):
        check_solver(self.solver)

    def solve(
        self,
        layer: Layer,
        z0: Float[Array, "batch size"],
        args: PyTree,
        find: Callable[[], Solution],
        solver: Solver,
        on_failure: OnFailure,
    ) -> Solution:
        """What the solver finds, with the derivative of an equilibrium."""
        del z0
        solution = find()
        linear = partial(_solve_linear, self.solver or solver, on_failure)
        value = implicit_vectors(with_fast_transposes(layer), linear, solution.value, args)
        return solution._replace(value=value)


def _solve_linear(solver, on_failure, matvec, b):
    keep_best = on_failure == "best"
    solution = solve_linear(solver, matvec, b, network_rounding(b.dtype), keep_best)
    if keep_best:
        return solution.value
    value = solution.value
    if on_failure == "raise":
        import equinox

        message = (
            "the equilibrium was reached, and the backward solve, t = J t + b with the layer's "
            f"Jacobian J there, has not converged in {solver.max_steps} steps: it may be unstable "
            "(nt_deq.spectral_radius tells), or adjoint=nt_deq.ImplicitAdjoint(solver) needs "
            "another solver or more max_steps."
        )
        value = equinox.error_if(value, ~jnp.all(solution.converged), message)
    return select(solution.converged, value, jnp.nan)


@dataclass(frozen=True)
class PhantomAdjoint(Adjoint):
    """The phantom gradient: the derivative of a few damped steps from the equilibrium.

    Geng et al. 2021, "On Training Implicit Models", eq. 11 (their λ is `1 - damping`). An
    approximation, `dz* ≈ Σₖ Pᵏ (1 - damping) ∂f/∂θ dθ` with `P = damping I + (1 - damping) J`,
    `k < steps`: cheap, defined at any `z`, and biased. `PhantomAdjoint(1, 0.0)` is the
    Jacobian-free gradient of Fung et al. 2022. The value is the equilibrium, whatever `steps`.

    Attributes:
      steps: how many; memory grows with them.
      damping: how much of `z` a step keeps, in [0, 1).
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        _checks.count("steps", self.steps)
        Picard(damping=self.damping)

    def solve(
        self,
        layer: Layer,
        z0: Float[Array, "batch size"],
        args: PyTree,
        find: Callable[[], Solution],
        solver: Solver,
        on_failure: OnFailure,
    ) -> Solution:
        """What the solver finds, with the derivative of the steps from there."""
        del z0, solver, on_failure  # nothing is solved
        solution = find()
        moved = _repeat(layer, self.damping, self.steps, solution.value, args)
        value = solution.value + (moved - lax.stop_gradient(moved))
        return solution._replace(value=value)


@dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Backpropagation through `steps` steps of plain iteration, from the first to the last.

    A network of finite depth with tied weights, for its own sake or for comparison: the value is
    the last iterate, at an equilibrium or not, and `residual` says how far from one. Damped where
    the solver is `Picard(damping=...)`. Reverse mode keeps `2 √steps` states and recomputes the
    steps between them once.

    Attributes:
      steps: how many layers.
    """

    steps: int

    def __post_init__(self):
        _checks.count("steps", self.steps)

    def solve(
        self,
        layer: Layer,
        z0: Float[Array, "batch size"],
        args: PyTree,
        find: Callable[[], Solution],
        solver: Solver,
        on_failure: OnFailure,
    ) -> Solution:
        """The last iterate."""
        del find, on_failure
        if type(solver) is not Picard:
            raise ArgumentError(
                f"UnrolledAdjoint differentiates plain iteration, and the solver is {solver}: pass "
                "a Picard (or None), or another adjoint."
            )
        inner = math.isqrt(self.steps)

        @jax.checkpoint
        def several(z, args):
            return _repeat(layer, solver.damping, inner, z, args)

        outer, rest = divmod(self.steps, inner)
        z = lax.scan(lambda z, _: (several(z, args), None), z0, length=outer)[0]
        z = _repeat(layer, solver.damping, rest, z, args)
        last, args = lax.stop_gradient((z, args))
        residual = norm(layer(last, args) - last)
        return Solution(z, jnp.asarray(self.steps), residual, jnp.isfinite(norm(last)))


def check_on_failure(on_failure: OnFailure) -> None:
    """Raises unless it is one of the known."""
    known = get_args(get_args(OnFailure)[0])
    if on_failure is not None and on_failure not in known:
        raise ArgumentError(f"on_failure={on_failure!r} must be one of {known}, or None.")


def _repeat(layer: Layer, damping: float, steps: int, z: Array, args: PyTree) -> Array:
    def step(z, _):
        return z + (1 - damping) * (layer(z, args) - z), None

    return lax.scan(step, z, length=steps)[0] if steps else z
