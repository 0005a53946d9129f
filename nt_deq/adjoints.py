"""How the equilibrium of a finite network is differentiated, in forward and in reverse mode.

With `J = ∂f/∂z` at `z* = f(z*, θ)`, the implicit function theorem gives
`dz* = (I - J)⁻¹ ∂f/∂θ dθ` (Bai et al. 2019, "Deep Equilibrium Models", thm. 1).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_deq import _checks
from nt_deq.iterations import FixedPointSolver, Iteration, SampleSolution, run
from nt_deq.iterations.iteration import sample_norm, spread

MAX_STEPS = 1000

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
    ) -> SampleSolution:
        """Solves `z = layer(z, args)`, `(batch, size)`, with a derivative in `args`.

        `find` runs the solver from `z0`, not differentiated.
        """


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The implicit function theorem: the exact derivative, of every order.

    The layer is linearised once, at the equilibrium, and `(I - J) t = b` or its transpose is solved
    by an iteration that costs as much a step as the layer, and without acceleration takes about as
    many steps. Memory does not grow with the number of steps. Where the linear solve fails, as at
    an unstable equilibrium, the derivative is NaN; `adjoint_solution` says why.

    Attributes:
      solver: of the linear equation, `nt_deq.iterations` or optimistix's (whose Newton's method
        forms the matrix).
      max_steps: after so many steps it has failed.
    """

    solver: FixedPointSolver = field(default_factory=Iteration)
    max_steps: int = MAX_STEPS

    def __post_init__(self):
        _checks.count("max_steps", self.max_steps)

    def solve(self, layer, z0, args, find, solver):
        """What the solver finds, with the derivative of an equilibrium."""
        del z0, solver
        solution = find()
        return solution._replace(value=_implicit(layer, self, solution.value, args))

    def solve_linear(self, matvec: Callable[[Array], Array], b: Array) -> SampleSolution:
        """Solves `matvec(t) = t - J t = b` for `t`: the iteration is the layer's, linearised."""
        return run(lambda t, b: b + t - matvec(t), b, b, self.solver, self.max_steps)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _implicit(layer, adjoint, z, args):
    """`z`, with the derivative that `z = layer(z, args)` gives it."""
    del layer, adjoint, args
    return z


@_implicit.defjvp
def _implicit_jvp(layer, adjoint, primals, tangents):
    z, args = primals
    z = _implicit(layer, adjoint, z, args)  # so that higher derivatives are right too
    _, d_layer = jax.jvp(lambda args: layer(z, args), (args,), (tangents[1],))
    _, jacobian = jax.linearize(lambda z: layer(z, args), z)

    def solve(matvec, b):
        solution = adjoint.solve_linear(matvec, b)
        return jnp.where(spread(solution.converged, b), solution.value, jnp.nan)

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

    def solve(self, layer, z0, args, find, solver):
        """What the solver finds, with the derivative of the steps from there."""
        del z0, solver
        solution = find()
        moved = _repeat(layer, self.damping, self.steps, solution.value, args)
        value = solution.value + (moved - lax.stop_gradient(moved))
        return solution._replace(value=value)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through `steps` steps of plain iteration, from the first to the last.

    For comparison, and for networks of finite depth. The value is the last iterate; with a solver
    `Iteration(rtol, atol, damping)` its tolerance says whether that has converged. Reverse mode
    keeps `2 √steps` states and recomputes the steps between them once.

    Attributes:
      steps: how many layers.
    """

    steps: int

    def __post_init__(self):
        _checks.count("steps", self.steps)

    def solve(self, layer, z0, args, find, solver):
        """The last iterate."""
        del find
        if type(solver) is not Iteration:
            raise ValueError(
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
        value = layer(*lax.stop_gradient((z, args)))
        residual = sample_norm(value - lax.stop_gradient(z))
        converged = solver.within(residual, sample_norm(value))
        return SampleSolution(z, jnp.asarray(self.steps), residual, converged)


def _repeat(layer: Layer, damping: float, steps: int, z: Array, args: Any) -> Array:
    def step(z, _):
        return z + (1 - damping) * (layer(z, args) - z), None

    return lax.scan(step, z, length=steps)[0] if steps else z
