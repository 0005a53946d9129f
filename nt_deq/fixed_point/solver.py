"""`y = F(y)` for a batch of samples: the one loop, and when a sample stops.

A sample is one number (an *entry*, of which `F` also gives the slope) or a vector along the last
axis. Each stops by itself and is then left alone, so that its value does not depend on the others;
one that is not finite any more is given up.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

from nt_deq import _checks
from nt_deq.errors import ArgumentError

Memory: TypeAlias = PyTree[Array]
"""What a method remembers of its past."""


class Evaluation(NamedTuple):
    """What the function gives at `y`.

    Attributes:
      value: `F(y)`.
      scale: what a residual is small against, one number per sample, where `|F(y)|` is less.
      slope: of entries, `∂F/∂y`.
      aux: what else is known there; kept of the last evaluation.
    """

    value: Float[Array, "*samples"]
    scale: Float[Array, "*batch"] | None = None
    slope: Float[Array, "*samples"] | None = None
    aux: tuple[Array, ...] = ()


Function: TypeAlias = Callable[[Array, PyTree], Evaluation]


class Solution(NamedTuple):
    """Where a solver ended.

    Attributes:
      value: `y`; of a network the iterate with the smallest residual of every sample.
      steps: evaluations of `F`.
      residual: `|F(y) - y|` of every sample, in the 2-norm.
      converged: whether the residual of a sample is within the solver's tolerance; of
        `UnrolledAdjoint`, which looks for no fixed point, whether its value is finite.
    """

    value: PyTree[Float[Array, "*shape"]]
    steps: Int[Array, ""]
    residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class Bounds(NamedTuple):
    """Between which numbers every entry's root lies; iterates are clipped to them."""

    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]


class Solver(abc.ABC):
    """A method for `y = F(y)`, sample by sample.

    Attributes:
      max_steps: after so many a sample that has not converged is reported as such.
    """

    max_steps: int

    @abc.abstractmethod
    def solve_entries(
        self, fn: Function, y: Float[Array, "*shape"], args: PyTree, bounds: Bounds
    ) -> tuple[Solution, tuple[Array, ...]]:
        """`y = F(y)` for every number of an array; the solution, and `aux` at its value."""

    @abc.abstractmethod
    def solve_vectors(
        self,
        fn: Function,
        y: Float[Array, "*batch size"],
        args: PyTree,
        rounding: float,
        keep_best: bool = True,
    ) -> Solution:
        """`y = F(y)` for vectors along the last axis.

        Args:
          fn: `F`.
          y: where to start.
          args: of `fn`.
          rounding: the relative residual that rounding leaves: the tolerance where none is given.
          keep_best: whether a sample that does not converge has the iterate with the smallest
            residual for its value, instead of the last.
        """


@dataclass(frozen=True)
class SteppingSolver(Solver):
    """A method that makes the next `y` of the last one, of `F` there and of what it remembers.

    Attributes:
      rtol: a sample has converged where `|F(y) - y| <= atol + rtol · scale`, in the 2-norm, with
        `scale = |F(y)|` for the states of a network and `√(k k')` for covariances. `None`, or less
        than 4 units of the last place, is what rounding leaves.
      atol: likewise. A state that tends to 0 from elsewhere needs one.
      max_steps: evaluations of `F`; a sample that has not converged by then is reported as such.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000

    elementwise: ClassVar[bool]  # whether every number makes its step by itself
    needs_slope: ClassVar[bool] = False

    def __post_init__(self):
        name = type(self).__name__
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ArgumentError(
                f"{name}(rtol={self.rtol}): rtol is a relative residual and must lie in [0, 1); "
                "leave it out for the best that the dtype allows."
            )
        if not (math.isfinite(self.atol) and self.atol >= 0):
            raise ArgumentError(f"{name}(atol={self.atol}): atol must be finite and at least 0.")
        _checks.count("max_steps", self.max_steps)

    @abc.abstractmethod
    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> Memory:
        """Returns what the method remembers before the first step."""

    @abc.abstractmethod
    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: Memory,
    ) -> tuple[Float[Array, "*samples"], Memory]:
        """Returns the next `y`, given what `F` is at this one and the norm of the residual."""

    def solve_entries(
        self, fn: Function, y: Float[Array, "*shape"], args: PyTree, bounds: Bounds
    ) -> tuple[Solution, tuple[Array, ...]]:
        """By the loop."""
        if self.elementwise:
            return _iterate(self, fn, y, args, bounds, _Entries)
        # A number is a vector of one.
        bounds = Bounds(*(jnp.broadcast_to(bound, y.shape)[..., None] for bound in bounds))
        of_vectors = partial(_of_vectors, fn)
        solution, aux = _iterate(self, of_vectors, y[..., None], args, bounds, _Vectors)
        return solution._replace(value=solution.value[..., 0]), aux

    def solve_vectors(
        self,
        fn: Function,
        y: Float[Array, "*batch size"],
        args: PyTree,
        rounding: float,
        keep_best: bool = True,
    ) -> Solution:
        """By the loop."""
        if self.needs_slope:
            raise ArgumentError(
                f"solver={self} is for equations of one number each, and here every sample has "
                f"{y.shape[-1]}, which the layer couples: use nt_deq.Anderson(), nt_deq.Broyden() "
                "or nt_deq.Picard()."
            )
        solver = self if self.rtol is not None else dataclasses.replace(self, rtol=rounding)
        return _iterate(solver, fn, y, args, None, _Vectors, keep_best)[0]


def check_solver(solver: object) -> None:
    """Raises a `TypeError` unless it is a solver or `None`."""
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(
            f"solver={solver!r} is not a solver; pass nt_deq.Picard(), Anderson(), Broyden() or "
            "Newton(), one of optimistix's as nt_deq.fixed_point.Optimistix(solver), or None."
        )


def _of_vectors(fn, y, args):
    found = fn(y[..., 0], args)
    return Evaluation(found.value[..., None], found.scale, None, found.aux)


class _Entries:
    """Samples of one number."""

    @staticmethod
    def norms(*arrays):
        return tuple(jnp.abs(a) for a in arrays)

    @staticmethod
    def evaluated(value):
        return value

    @staticmethod
    def spread(scalars):
        return scalars


class _Vectors:
    """Samples along the last axis."""

    @staticmethod
    def norms(*arrays):
        return norms(*arrays)

    @staticmethod
    def evaluated(value):
        # Else XLA fuses the function into everything that its value is used for.
        return lax.optimization_barrier(value)

    @staticmethod
    def spread(scalars):
        return scalars[..., None]


class _State(NamedTuple):
    steps: Array
    y: Array
    best: Array  # the iterate with the smallest residual, where it is kept
    residual: Array  # of the best
    moving: Array
    converged: Array
    aux: tuple[Array, ...]
    memory: Memory


def _iterate(
    solver, fn, y, args, bounds, samples, keep_best=False
) -> tuple[Solution, tuple[Array, ...]]:
    """The loop."""
    floor = rounding(y.dtype)

    def clip(y):
        return y if bounds is None else jnp.clip(y, *bounds)

    def allowed(found, size):
        scale = size if found.scale is None else jnp.maximum(size, found.scale)
        rtol = solver.rtol
        if rtol is None:  # the error of an entry is the residual over 1 - slope
            slope = 1 if found.slope is None else jnp.abs(found.slope)
            return solver.atol + jnp.maximum(2 * floor * (1 - slope), floor) * scale
        return solver.atol + max(rtol, floor) * scale

    def advance(state: _State) -> _State:
        found = fn(state.y, args)
        # A root at a bound may be outside it by rounding.
        found = found._replace(value=clip(samples.evaluated(found.value)))
        norm, size = samples.norms(found.value - state.y, found.value)
        finite = jnp.isfinite(norm) & jnp.isfinite(size)  # a norm that overflows allows nothing
        now = state.moving & finite & (norm <= allowed(found, size))
        moving = state.moving & finite & ~now
        proposal, memory = solver.propose(state.y, found, norm, state.memory)
        y = jnp.where(samples.spread(moving), clip(proposal), state.y)
        if keep_best:
            better = now | (state.moving & finite & (norm < state.residual))
            best = jnp.where(samples.spread(better), state.y, state.best)
            residual = jnp.where(better, norm, state.residual)
        else:
            best, residual = state.best, jnp.where(state.moving, norm, state.residual)
        converged = state.converged | now
        return _State(state.steps + 1, y, best, residual, moving, converged, found.aux, memory)

    shape = y.shape[:-1] if samples is _Vectors else y.shape
    no = jnp.zeros(shape, bool)
    start = _State(
        steps=jnp.zeros((), jnp.int32),
        y=y,
        best=y if keep_best else jnp.zeros((0,), y.dtype),
        residual=jnp.full(shape, jnp.inf, y.dtype),
        moving=~no,
        converged=no,
        aux=(),
        memory=solver.start(y, bounds),
    )
    # The function is evaluated in the loop alone, so that it is compiled once.
    aux = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(advance, start).aux)
    end = lax.while_loop(
        lambda state: (state.steps < solver.max_steps) & jnp.any(state.moving),
        advance,
        start._replace(aux=aux),
    )
    value = end.best if keep_best else end.y
    return Solution(value, end.steps, end.residual, end.converged), end.aux


def rounding(dtype: DTypeLike) -> float:
    """How far apart, relative to its scale, rounding alone may put `F(y)` and a number `y`."""
    return 4 * float(jnp.finfo(dtype).eps)


def norm(y: Float[Array, "*batch size"]) -> Float[Array, "*batch"]:
    """The 2-norm along the last axis, also of numbers whose squares leave the dtype's range."""
    return norms(y)[0]


def norms(*arrays: Float[Array, "*batch _"]) -> tuple[Float[Array, "*batch"], ...]:
    """The 2-norms of several arrays, exact to the rounding of the largest of their numbers."""
    largest = [jnp.max(jnp.abs(y), axis=-1, initial=0) for y in arrays]
    # Its inverse must be a normal number: XLA multiplies by it, and takes others for 0.
    tiny = jnp.finfo(arrays[0].dtype).tiny
    scale = jnp.clip(reduce(jnp.maximum, largest), tiny, 0.25 / tiny)
    inverse = (1 / scale)[..., None]
    return tuple(scale * jnp.sqrt(jnp.sum(jnp.square(y * inverse), axis=-1)) for y in arrays)


def dot(a: Float[Array, "*#batch size"], b: Float[Array, "*#batch size"]) -> Float[Array, "*batch"]:
    """Products along the last axis; XLA:CPU adds up long ones one number at a time if not so."""
    return jnp.einsum("...i,...i->...", a, b, precision=lax.Precision.HIGHEST)


def at_least_single(dtype: DTypeLike) -> np.dtype:
    """The dtype that states of this dtype are solved in.

    What a solver adds up and compares must be more exact than what 16 bits compute with.
    """
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def network_rounding(dtype: DTypeLike) -> float:
    """The relative residual that rounding leaves of a network's layer computed in this dtype."""
    # In 16 bits a unit of the last place is so much that 32 of them would be no tolerance.
    return (2 if jnp.finfo(dtype).bits < 32 else 32) * float(jnp.finfo(dtype).eps)
