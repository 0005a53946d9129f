"""The equilibrium `z* = f(z*)` of a finite network, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_deq import _checks
from nt_deq.adjoints import MAX_STEPS, Adjoint, Implicit
from nt_deq.iterations import FixedPointSolver, Iteration, SampleSolution, run
from nt_deq.iterations.iteration import spread
from nt_deq.kernel import NotConvergedError

State = Any  # a pytree of arrays (batch, ...)


def equilibrium(
    f: Callable[[State, Any], State],
    z0: State,
    args: Any = None,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    max_steps: int = MAX_STEPS,
) -> State:
    """Finds `z* = f(z*, args)` for every sample of a batch.

    Works under `jax.jit`, `vmap` and `grad`, in forward and in reverse mode.

    Args:
      f: one layer, `f(z, args) -> z`, each sample on its own. For speed outside `jax.jit` pass the
        same function object every time, and what changes in `args`.
      z0: where to start: an array `(batch, ...)` or a pytree of them, all of one dtype.
      args: a pytree; `z*` is differentiable in its arrays, and in what `f` closes over.
      solver: how it is found: one of `nt_deq.iterations`, or an optimistix fixed-point solver or
        root finder, which works on all samples together. It has the tolerance. `None` is
        `nt_deq.iterations.Iteration()`: plain iteration of each sample to the last digits.
      adjoint: how it is differentiated: `nt_deq.Implicit(...)`, which is what `None` means,
        `Phantom(...)` or `Unrolled(...)`.
      max_steps: after so many steps a sample has not converged.

    Returns:
      `z*`, like `z0`.

    Raises:
      NotConvergedError: some sample has not converged. A traced call returns NaN for it instead.
      ValueError: an argument cannot be right; the message says why.
    """
    solution = find_equilibrium(f, z0, args, solver=solver, adjoint=adjoint, max_steps=max_steps)
    return value_or_error(solution)


def find_equilibrium(
    f: Callable[[State, Any], State],
    z0: State,
    args: Any = None,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    max_steps: int = MAX_STEPS,
) -> SampleSolution:
    """As `equilibrium`, and says how it went, instead of raising an error.

    Returns:
      A `SampleSolution(value, steps, residual, converged)`, with one `residual` and `converged` for
      each sample. Where one has not converged its value is the best iterate, differentiated as if
      it were an equilibrium.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """
    solver = Iteration() if solver is None else solver
    adjoint = Implicit() if adjoint is None else adjoint
    _check(solver, adjoint, max_steps)
    samples = _Samples.of(f, z0, args)
    # Traced values that f closes over become inputs, to be differentiated too. Where there are none
    # the solve gets f itself: an object that it has seen before is not compiled again.
    start = lax.stop_gradient(samples.ravel(z0))
    converted, closed_over = jax.closure_convert(samples, start, args)

    def layer(z, inputs):
        return converted(z, inputs[0], *inputs[1])

    def find():
        problem = (layer, (args, closed_over)) if closed_over else (samples, args)
        return run(problem[0], start, lax.stop_gradient(problem[1]), solver, max_steps)

    solution = adjoint.solve(layer, start, (args, closed_over), find, solver)
    return solution._replace(value=samples.unravel(solution.value))


def adjoint_solution(
    f: Callable[[State, Any], State],
    z: State,
    args: Any,
    cotangent: State,
    adjoint: Implicit | None = None,
) -> SampleSolution:
    """The linear solve of the backward pass at `z`, `t = Jᵀ t + cotangent`, and how it went.

    What reverse mode does with `Implicit`, where a sample that has not converged is NaN.

    Args:
      f: the layer, as of `equilibrium`.
      z: the equilibrium.
      args: as of `equilibrium`.
      cotangent: derivative of the loss in `z`, like `z`.
      adjoint: `None` is `Implicit()`.

    Returns:
      A `SampleSolution` of `t`; its `residual` is `|Jᵀ t + cotangent - t|`.
    """
    samples = _Samples.of(f, z, args)
    _, transpose = jax.vjp(lambda z: samples(z, args), samples.ravel(z))
    adjoint = Implicit() if adjoint is None else adjoint
    solution = adjoint.solve_linear(lambda t: t - transpose(t)[0], samples.ravel(cotangent))
    return solution._replace(value=samples.unravel(solution.value))


def value_or_error(solution: SampleSolution) -> State:
    """The value, where all samples have converged; an error, or if traced NaN, where not."""
    converged = solution.converged
    if not _checks.is_traced(solution):
        failed = np.flatnonzero(~np.asarray(converged))
        if failed.size:
            raise NotConvergedError(
                f"the finite network's equilibrium was not reached in {int(solution.steps)} steps "
                f"by {failed.size} of {converged.size} samples (first: row {failed[0]}, where "
                f"|f(z) - z| was {float(solution.residual[failed[0]]):.3g}): its weights may be "
                "too large to have one; take a smaller W_std (or learning rate), another solver, "
                "or more max_steps."
            )
    return jax.tree.map(lambda z: jnp.where(spread(converged, z), z, jnp.nan), solution.value)


def _check(solver, adjoint, max_steps):
    if not isinstance(solver, FixedPointSolver):
        raise ValueError(
            f"solver={solver} is not for finite networks; pass one of nt_deq.iterations "
            "(Iteration, Anderson, Broyden), an optimistix fixed-point solver or root finder, or "
            "None."
        )
    if not isinstance(adjoint, Adjoint):
        raise ValueError(
            f"adjoint={adjoint!r} has to be an nt_deq.Implicit, Phantom or Unrolled, or None."
        )
    _checks.count("max_steps", max_steps)


@dataclass(frozen=True)
class _Samples:
    """The layer on an array `(batch, size)`; equal layers are equal, and compiled once."""

    f: Callable[[State, Any], State]
    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, f, z, args) -> _Samples:
        leaves, tree = jax.tree.flatten(z)
        structs = tuple(jax.ShapeDtypeStruct(jnp.shape(z), jnp.result_type(z)) for z in leaves)
        shown = ", ".join(f"{z.dtype}{list(z.shape)}" for z in structs)
        if (
            len({(z.dtype, z.shape[:1]) for z in structs}) != 1
            or not structs[0].shape
            or not jnp.issubdtype(structs[0].dtype, jnp.floating)
        ):
            raise ValueError(
                f"z0 is {shown or 'empty'}: pass real arrays of one dtype, each with the samples "
                "along its first axis."
            )
        found = jax.eval_shape(f, z, args)
        if jax.tree.structure(found) != tree or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(found), structs, strict=True)
        ):
            returned = ", ".join(f"{z.dtype}{list(z.shape)}" for z in jax.tree.leaves(found))
            raise ValueError(
                f"f has to give back what it gets, and makes {returned} of {shown} "
                f"({jax.tree.structure(found)} of {tree})."
            )
        return cls(f, tree, structs)

    def __call__(self, z: Array, args: Any) -> Array:
        return self.ravel(self.f(self.unravel(z), args))

    def ravel(self, z: State) -> Array:
        return jnp.concatenate(
            [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(z)], axis=1
        )

    def unravel(self, z: Array) -> State:
        sizes = np.cumsum([np.prod(leaf.shape[1:], dtype=int) for leaf in self.leaves])
        parts = jnp.split(z, sizes[:-1], axis=1)
        shaped = [p.reshape(leaf.shape) for p, leaf in zip(parts, self.leaves, strict=True)]
        return self.tree.unflatten(shaped)
