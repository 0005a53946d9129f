"""How the equilibrium of a finite network is differentiated, in forward and in reverse mode.

With `J = ∂f/∂z` at `z* = f(z*, θ)`, the implicit function theorem gives
`dz* = (I - J)⁻¹ ∂f/∂θ dθ` (Bai et al. 2019, "Deep Equilibrium Models", thm. 1).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_deq import _checks
from nt_deq.convolution import with_fast_transposes
from nt_deq.errors import ArgumentError
from nt_deq.iterations import FixedPointSolver, Iteration, SampleSolution, run
from nt_deq.iterations.iteration import sample_norm, spread

MAX_STEPS = 1000

OnFailure = Literal["raise", "nan", "best"] | None
"""What becomes of a sample without an equilibrium: see `equilibrium`."""

Layer = Callable[[Array, Any], Array]


class Adjoint(abc.ABC):
    """A way to differentiate `z* = f(z*, args)`."""

    @abc.abstractmethod
    def solve(
        self,
        layer: Layer,
        z0: Array,
        args: Any,
        find: Callable[[], SampleSolution],
        solver: FixedPointSolver,
        on_failure: OnFailure,
    ) -> SampleSolution:
        """Solves `z = layer(z, args)`, `(batch, size)`, with a derivative in `args`.

        `find` runs the solver from `z0`, not differentiated. `on_failure` is of what the
        derivative solves by itself.
        """


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The implicit function theorem: the exact derivative, of every order.

    The layer is linearised once, at the equilibrium, and `(I - J) t = b` or its transpose is solved
    by an iteration that costs as much a step as the layer, and without acceleration takes about as
    many steps. Memory does not grow with the number of steps. Where the linear solve fails, as at
    an unstable equilibrium, the derivative is NaN, or what `on_failure` says;
    `adjoint_solution` says how the solve went.

    Attributes:
      solver: of the linear equation, `nt_deq.iterations` or optimistix's (whose Newton's method
        forms the matrix). `None` is the solver of the equilibrium, with its tolerance.
      max_steps: after so many steps it has failed.
    """

    solver: FixedPointSolver | None = None
    max_steps: int = MAX_STEPS

    def __post_init__(self):
        _checks.count("max_steps", self.max_steps)

    def solve(self, layer, z0, args, find, solver, on_failure):
        """What the solver finds, with the derivative of an equilibrium."""
        del z0
        linear = self if self.solver is not None else replace(self, solver=solver)
        solution = find()
        return solution._replace(
            value=_implicit(layer, linear, on_failure, solution.value, args),
        )

    def solve_linear(self, matvec: Callable[[Array], Array], b: Array) -> SampleSolution:
        """Solves `matvec(t) = t - J t = b` for `t`: the iteration is the layer's, linearised."""
        solver = Iteration() if self.solver is None else self.solver
        return run(lambda t, b: b + t - matvec(t), b, b, solver, self.max_steps)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _implicit(layer, adjoint, on_failure, z, args):
    """`z`, with the derivative that `z = layer(z, args)` gives it."""
    del layer, adjoint, on_failure, args
    return z


@_implicit.defjvp
def _implicit_jvp(layer, adjoint, on_failure, primals, tangents):
    z, args = primals
    # So that higher derivatives are right too:
    z = _implicit(layer, adjoint, on_failure, z, args)
    fast = with_fast_transposes(layer)
    _, d_layer = jax.jvp(lambda args: fast(z, args), (args,), (tangents[1],))
    _, jacobian = jax.linearize(lambda z: fast(z, args), z)

    def solve(matvec, b):
        solution = adjoint.solve_linear(matvec, b)
        if on_failure == "best":
            return solution.value
        value, converged = solution.value, solution.converged
        if on_failure == "raise":
            message = (
                "the equilibrium was reached, and the backward solve, t = J t + b with the layer's "
                f"Jacobian J there, has not converged in {adjoint.max_steps} steps: it may be "
                "unstable (nt_deq.spectral_radius tells), or adjoint=nt_deq.Implicit(solver, "
                "max_steps) needs another solver or more steps."
            )
            value = eqx.error_if(value, ~jnp.all(converged), message)
        return jnp.where(spread(converged, b), value, jnp.nan)

    return z, lax.custom_linear_solve(lambda t: t - jacobian(t), d_layer, solve, solve)


@dataclass(frozen=True)
class Phantom(Adjoint):
    """The phantom gradient: the derivative of a few damped steps from the equilibrium.

    Geng et al. 2021, "On Training Implicit Models", eq. 11 (their λ is `1 - damping`). An
    approximation, `dz* ≈ Σₖ Pᵏ (1 - damping) ∂f/∂θ dθ` with `P = damping I + (1 - damping) J`,
    `k < steps`: cheap, defined at any `z`, and biased. `Phantom(1, 0.0)` is the Jacobian-free
    gradient of Fung et al. 2022. The value is the equilibrium, whatever `steps`.

    Attributes:
      steps: how many; memory grows with them.
      damping: how much of `z` a step keeps, in [0, 1).
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        _checks.count("steps", self.steps)
        Iteration(damping=self.damping)

    def solve(self, layer, z0, args, find, solver, on_failure):
        """What the solver finds, with the derivative of the steps from there."""
        del z0, solver, on_failure  # nothing is solved
        solution = find()
        moved = _repeat(layer, self.damping, self.steps, solution.value, args)
        value = solution.value + (moved - lax.stop_gradient(moved))
        return solution._replace(value=value)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through `steps` steps of plain iteration, from the first to the last.

    A network of finite depth with tied weights, for its own sake or for comparison: the value is
    the last iterate, at an equilibrium or not, and `residual` says how far from one. Damped where
    the solver is `Iteration(damping=...)`. Reverse mode keeps `2 √steps` states and recomputes the
    steps between them once.

    Attributes:
      steps: how many layers.
    """

    steps: int

    def __post_init__(self):
        _checks.count("steps", self.steps)

    def solve(self, layer, z0, args, find, solver, on_failure):
        """The last iterate."""
        del find, on_failure
        if type(solver) is not Iteration:
            raise ArgumentError(
                f"Unrolled differentiates plain iteration, and the solver is {solver}: pass an "
                "Iteration (or None), or another adjoint."
            )
        inner = math.isqrt(self.steps)

        @jax.checkpoint
        def several(z, args):
            return _repeat(layer, solver.damping, inner, z, args)

        outer, rest = divmod(self.steps, inner)
        z = lax.scan(lambda z, _: (several(z, args), None), z0, length=outer)[0]
        z = _repeat(layer, solver.damping, rest, z, args)
        last, args = lax.stop_gradient((z, args))
        residual = sample_norm(layer(last, args) - last)
        return SampleSolution(z, jnp.asarray(self.steps), residual, jnp.isfinite(sample_norm(last)))


def check_on_failure(on_failure: OnFailure) -> None:
    """Raises unless it is one of the known."""
    known = get_args(get_args(OnFailure)[0])
    if on_failure is not None and on_failure not in known:
        raise ArgumentError(f"on_failure={on_failure!r} must be one of {known}, or None.")


def _repeat(layer: Layer, damping: float, steps: int, z: Array, args: Any) -> Array:
    def step(z, _):
        return z + (1 - damping) * (layer(z, args) - z), None

    return lax.scan(step, z, length=steps)[0] if steps else z
