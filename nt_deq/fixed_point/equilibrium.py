"""The equilibrium `z* = f(z*)` of a finite network, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_deq import _checks
from nt_deq.errors import ArgumentError, NotConvergedError
from nt_deq.fixed_point.adjoints import MAX_STEPS, Adjoint, Implicit, OnFailure, check_on_failure
from nt_deq.iterations import FixedPointSolver, Iteration, SampleSolution, run
from nt_deq.iterations.iteration import default_rtol, spread

State = Any  # a pytree of arrays (batch, ...)


def equilibrium(
    f: Callable[[State, Any], State],
    z0: State,
    args: Any = None,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    max_steps: int = MAX_STEPS,
    on_failure: OnFailure = None,
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
      on_failure: what becomes of a sample without an equilibrium. `'raise'`: an error, also where
        the call is traced, by `equinox.error_if`. `'nan'`: it is NaN. `'best'`: its iterate with
        the smallest residual, unless nothing finite was seen. `None`: an error, and where the call
        is traced NaN. The same becomes of its derivative where the backward solve fails. XLA may
        drop a NaN on the way to the loss (`jax.nn.relu` does): do not rely on it to tell.

    Returns:
      `z*`, like `z0`.

    Raises:
      NotConvergedError: some sample has not converged.
      equinox.EquinoxRuntimeError: likewise, in a traced call with `on_failure='raise'`.
      ValueError: an argument cannot be right; the message says why.
    """
    solution = find_equilibrium(
        f, z0, args, solver=solver, adjoint=adjoint, max_steps=max_steps, on_failure=on_failure
    )
    return outcome(solution, on_failure, {"args": args})


def find_equilibrium(
    f: Callable[[State, Any], State],
    z0: State,
    args: Any = None,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Adjoint | None = None,
    max_steps: int = MAX_STEPS,
    on_failure: OnFailure = None,
) -> SampleSolution:
    """As `equilibrium`, and says how it went, instead of raising an error.

    `on_failure` is of the backward solve alone.

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
    check_on_failure(on_failure)
    samples = _Samples.of(f, z0, args)
    solver = at_precision(solver, samples.leaves[0].dtype)
    # Traced values that f closes over become inputs, to be differentiated too. Where there are none
    # the solve gets f itself: an object that it has seen before is not compiled again.
    start = lax.stop_gradient(samples.ravel(z0))
    converted, closed_over = jax.closure_convert(samples, start, args)

    def layer(z, inputs):
        return converted(z, inputs[0], *inputs[1])

    def find():
        problem = (layer, (args, closed_over)) if closed_over else (samples, args)
        return run(problem[0], start, lax.stop_gradient(problem[1]), solver, max_steps)

    solution = adjoint.solve(layer, start, (args, closed_over), find, solver, on_failure)
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
      adjoint: with the solver to use; `None` is `Implicit(Iteration())`.

    Returns:
      A `SampleSolution` of `t`; its `residual` is `|Jᵀ t + cotangent - t|`.
    """
    samples = _Samples.of(f, z, args)
    _, transpose = jax.vjp(lambda z: samples(z, args), samples.ravel(z))
    adjoint = Implicit() if adjoint is None else adjoint
    solution = adjoint.solve_linear(lambda t: t - transpose(t)[0], samples.ravel(cotangent))
    return solution._replace(value=samples.unravel(solution.value))


def at_precision(solver: FixedPointSolver, dtype: Any) -> FixedPointSolver:
    """The solver with a tolerance that a layer computed in this dtype can reach, if it has none."""
    if isinstance(solver, Iteration) and solver.rtol is None:
        return replace(solver, rtol=default_rtol(dtype))
    return solver


def outcome(solution: SampleSolution, on_failure: OnFailure, given: dict[str, Any]) -> State:
    """The value of a solution, and what `on_failure` says where a sample has not converged.

    Args:
      solution: of `find_equilibrium`.
      on_failure: as of `equilibrium`.
      given: what the layer computed with, by name; an error says what of it is not finite.
    """
    check_on_failure(on_failure)
    converged, traced = solution.converged, _checks.is_traced(solution, given)
    if on_failure is None:
        on_failure = "nan" if traced else "raise"
    value = solution.value
    if on_failure == "raise" and not traced and not np.all(converged):
        raise NotConvergedError(_message(solution, _not_finite(given)))
    if on_failure == "raise" and traced:
        broken = [~jnp.isfinite(leaf).all() for _, leaf in _numbers(given)]
        value = eqx.branched_error_if(
            value,
            ~jnp.all(converged),
            jnp.any(jnp.stack(broken)).astype(int) if broken else jnp.zeros((), int),
            [
                "the finite network's equilibrium was not reached: " + _REMEDY,
                f"the finite network has no equilibrium, because {' or '.join(given)} is NaN or "
                "infinite: training diverged before this call, or the inputs are not finite.",
            ],
        )
    kept = jnp.isfinite(solution.residual) if on_failure == "best" else converged
    return jax.tree.map(lambda z: jnp.where(spread(kept, z), z, jnp.nan), value)


_REMEDY = (
    "its weights may be too large to have one; take a smaller W_std (or learning rate), "
    "lipschitz=0.9 (which keeps one while it trains), another solver, or more max_steps."
)


def _message(solution: SampleSolution, broken: Sequence[str]) -> str:
    failed = np.flatnonzero(~np.asarray(solution.converged))
    who = f"{failed.size} of {solution.converged.size} samples (the first is row {failed[0]}"
    if broken:
        return (
            f"the finite network has no equilibrium for {who}), because {', '.join(broken)} "
            f"{'is' if len(broken) == 1 else 'are'} NaN or infinite: if these are parameters, "
            "training diverged before this call; take a smaller learning rate, or start again "
            "from an earlier state."
        )
    residual = float(solution.residual[failed[0]])
    if not np.isfinite(residual):
        return (
            f"the finite network has no equilibrium for {who}), because already the first step of "
            "the layer is NaN or infinite there: look at the inputs, or make them smaller."
        )
    return (
        f"the finite network's equilibrium was not reached in {int(solution.steps)} steps by "
        f"{who}, where |f(z) - z| was {residual:.3g}): {_REMEDY}"
    )


def _numbers(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """The floating arrays of a tree, with names such as `parameters.cell.linear.W`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(given)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in paths
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]


def _not_finite(given: dict[str, Any]) -> list[str]:
    return [name for name, leaf in _numbers(given) if not np.isfinite(np.asarray(leaf)).all()]


def _check(solver, adjoint, max_steps):
    if not isinstance(solver, FixedPointSolver):
        raise ArgumentError(
            f"solver={solver} is not for finite networks; pass one of nt_deq.iterations "
            "(Iteration, Anderson, Broyden), an optimistix fixed-point solver or root finder, or "
            "None."
        )
    if not isinstance(adjoint, Adjoint):
        raise ArgumentError(
            f"adjoint={adjoint!r} must be an nt_deq.Implicit, Phantom or Unrolled, or None."
        )
    _checks.count("max_steps", max_steps)


@dataclass(frozen=True)
class _Samples:
    """The layer on an array `(batch, size)`; equal layers are equal, and compiled once.

    The array is of at least single precision, also where the states are bfloat16 or float16: what
    a solver adds up and compares must be more exact than what the layer computes with.
    """

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
            raise ArgumentError(
                f"z0 is {shown or 'empty'}: pass real arrays of one dtype, each with the samples "
                "along its first axis."
            )
        found = jax.eval_shape(f, z, args)
        if jax.tree.structure(found) != tree or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(found), structs, strict=True)
        ):
            returned = ", ".join(f"{z.dtype}{list(z.shape)}" for z in jax.tree.leaves(found))
            raise ArgumentError(
                f"f must give back what it gets, and makes {returned} of {shown} "
                f"({jax.tree.structure(found)} of {tree})."
            )
        return cls(f, tree, structs)

    def __call__(self, z: Array, args: Any) -> Array:
        return self.ravel(self.f(self.unravel(z), args))

    def ravel(self, z: State) -> Array:
        flat = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(z)]
        z = jnp.concatenate(flat, axis=1)
        return z.astype(jnp.promote_types(z.dtype, jnp.float32))

    def unravel(self, z: Array) -> State:
        sizes = np.cumsum([np.prod(leaf.shape[1:], dtype=int) for leaf in self.leaves])
        parts = jnp.split(z, sizes[:-1], axis=1)
        shaped = [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        return self.tree.unflatten(shaped)
