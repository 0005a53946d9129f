"""The equilibrium `z* = f(z*)` of a finite network, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, PyTree, PyTreeDef

from nt_deq import _checks
from nt_deq.errors import ArgumentError, NotConvergedError
from nt_deq.fixed_point.adjoints import (
    Adjoint,
    ImplicitAdjoint,
    OnFailure,
    check_on_failure,
)
from nt_deq.fixed_point.implicit import keep, solve_linear
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import (
    Evaluation,
    Solution,
    Solver,
    SteppingSolver,
    at_least_single,
    check_solver,
    network_rounding,
)

State: TypeAlias = PyTree[Float[ArrayLike, "batch ..."]]


def equilibrium(
    f: Callable[[State, PyTree], State],
    z0: State,
    args: PyTree = None,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = None,
) -> State:
    """Finds `z* = f(z*, args)` for every sample of a batch.

    Works under `jax.jit`, `vmap` and `grad`, in forward and in reverse mode.

    Args:
      f: one layer, `f(z, args) -> z`, each sample on its own. For speed outside `jax.jit` pass the
        same function object every time, and what changes in `args`.
      z0: where to start: an array `(batch, ...)` or a pytree of them, all of one dtype.
      args: a pytree; `z*` is differentiable in its arrays, and in what `f` closes over.
      solver: how it is found: `nt_deq.Picard`, `Anderson` or `Broyden`, which have the tolerance
        and the number of steps, or `nt_deq.fixed_point.Optimistix`, which works on all samples
        together. `None` is `nt_deq.Picard()`: plain iteration of each sample to the last digits.
      adjoint: how it is differentiated: `nt_deq.ImplicitAdjoint(...)`, which is what `None` means,
        `PhantomAdjoint(...)` or `UnrolledAdjoint(...)`.
      on_failure: what becomes of a sample without an equilibrium. `'raise'`: an error, also where
        the call is traced, by `equinox.error_if`. `'nan'`: it is NaN. `'best'`: its iterate with
        the smallest residual, unless nothing finite was seen. `None`: an error, and where the call
        is traced NaN. A derivative that goes through a sample that is NaN is NaN, and the same
        becomes of it where the backward solve fails. XLA may drop a NaN on the way to the loss
        (`jax.nn.relu` does): do not rely on it to tell.

    Returns:
      `z*`, like `z0`.

    Raises:
      NotConvergedError: some sample has not converged.
      equinox.EquinoxRuntimeError: likewise, in a traced call with `on_failure='raise'`.
      ValueError: an argument cannot be right; the message says why.
    """
    solution = find_equilibrium(f, z0, args, solver=solver, adjoint=adjoint, on_failure=on_failure)
    return outcome(solution, on_failure, {"args": args})


def find_equilibrium(
    f: Callable[[State, PyTree], State],
    z0: State,
    args: PyTree = None,
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = None,
) -> Solution:
    """As `equilibrium`, and says how it went, instead of raising an error.

    `on_failure` is of the backward solve alone.

    Returns:
      A `Solution(value, steps, residual, converged)`, with one `residual` and `converged` for
      each sample. Where one has not converged its value is the best iterate, differentiated as if
      it were an equilibrium.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """
    check_solver(solver)
    check_on_failure(on_failure)
    solver = Picard() if solver is None else solver
    adjoint = ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, Adjoint):
        raise ArgumentError(
            f"adjoint={adjoint!r} must be an nt_deq.ImplicitAdjoint, PhantomAdjoint or "
            "UnrolledAdjoint, or None."
        )
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
        return _solve(solver, problem[0], start, lax.stop_gradient(problem[1]))

    solution = adjoint.solve(layer, start, (args, closed_over), find, solver, on_failure)
    return solution._replace(value=samples.unravel(solution.value))


def adjoint_solution(
    f: Callable[[State, PyTree], State],
    z: State,
    args: PyTree,
    cotangent: State,
    adjoint: ImplicitAdjoint | None = None,
) -> Solution:
    """The linear solve of the backward pass at `z`, `t = Jᵀ t + cotangent`, and how it went.

    What reverse mode does with `ImplicitAdjoint`, where a sample that has not converged is NaN.

    Args:
      f: the layer, as of `equilibrium`.
      z: the equilibrium.
      args: as of `equilibrium`.
      cotangent: derivative of the loss in `z`, like `z`.
      adjoint: with the solver to use; `None` is `ImplicitAdjoint(Picard())`.

    Returns:
      A `Solution` of `t`; its `residual` is `|Jᵀ t + cotangent - t|`.
    """
    samples = _Samples.of(f, z, args)
    _, transpose = jax.vjp(lambda z: samples(z, args), samples.ravel(z))
    solver = (adjoint.solver if adjoint is not None else None) or Picard()
    b = samples.ravel(cotangent)
    rounding = network_rounding(b.dtype)
    solution = solve_linear(solver, lambda t: t - transpose(t)[0], b, rounding, keep_best=True)
    return solution._replace(value=samples.unravel(solution.value))


def at_precision(solver: Solver, dtype: DTypeLike) -> Solver:
    """The solver with a tolerance that a layer computed in this dtype can reach, if it has none."""
    if isinstance(solver, SteppingSolver) and solver.rtol is None:
        return replace(solver, rtol=network_rounding(dtype))
    return solver


@partial(jax.jit, static_argnums=(0, 1))
def _solve(
    solver: Solver, layer: Callable[[Array, PyTree], Array], z0: Array, args: PyTree
) -> Solution:
    """Runs a solver; layers that are equal are compiled once."""
    rounding = network_rounding(z0.dtype)
    return solver.solve_vectors(lambda z, args: Evaluation(layer(z, args)), z0, args, rounding)


def outcome(solution: Solution, on_failure: OnFailure, given: dict[str, PyTree]) -> State:
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
        raise NotConvergedError(_message(solution, not_finite(given)))
    if on_failure == "raise" and traced:
        broken = [~jnp.isfinite(leaf).all() for _, leaf in _numbers(given)]
        import equinox

        value = equinox.branched_error_if(
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
    return jax.tree.map(partial(keep, kept), value)


_REMEDY = (
    "its weights may be too large to have one; take a smaller W_std (or learning rate), "
    "lipschitz=0.9 (which keeps one while it trains), another solver, or more max_steps."
)


def _message(solution: Solution, broken: Sequence[str]) -> str:
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


def _numbers(given: dict[str, PyTree]) -> list[tuple[str, ArrayLike]]:
    """The floating arrays of a tree, with names such as `parameters.cell.linear.W`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(given)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in paths
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]


def not_finite(given: dict[str, PyTree]) -> list[str]:
    """The names of what is NaN or infinite in a tree, such as `parameters.cell.linear.W`."""
    return [name for name, leaf in _numbers(given) if not np.isfinite(np.asarray(leaf)).all()]


@dataclass(frozen=True)
class _Samples:
    """The layer on an array `(batch, size)`; equal layers are equal, and compiled once.

    The array is of at least single precision, also where the states are bfloat16 or float16: what
    a solver adds up and compares must be more exact than what the layer computes with.
    """

    f: Callable[[State, PyTree], State]
    tree: PyTreeDef  # pyright: ignore[reportInvalidTypeForm]
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

    def __call__(self, z: Array, args: PyTree) -> Array:
        return self.ravel(self.f(self.unravel(z), args))

    def ravel(self, z: State) -> Array:
        flat = [jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in jax.tree.leaves(z)]
        z = jnp.concatenate(flat, axis=1)
        return z.astype(at_least_single(z.dtype))

    def unravel(self, z: Array) -> State:
        sizes = np.cumsum([np.prod(leaf.shape[1:], dtype=int) for leaf in self.leaves])
        parts = jnp.split(z, sizes[:-1], axis=1)
        shaped = [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        return self.tree.unflatten(shaped)
