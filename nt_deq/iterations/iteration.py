"""Plain iteration, what all iterations share, and the call that runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jax import Array

from nt_deq.errors import ArgumentError

FixedPointSolver = optimistix.AbstractFixedPointSolver | optimistix.AbstractRootFinder
"""One of these, or any fixed-point solver or root finder of optimistix."""

Memory = Any
GROWTH = 10  # of the residual in one step, at which accelerations forget what they know


class SampleSolution(NamedTuple):
    """Where an iteration ended after `steps` evaluations of the layer.

    Attributes:
      value: `z`, the iterate with the smallest residual of every sample.
      steps: evaluations of the layer (of another optimistix solver: its steps).
      residual: `(batch,)`, `|f(z) - z|` in the 2-norm.
      converged: `(batch,)`, whether the residual is within the solver's tolerance; of `Unrolled`,
        which looks for no equilibrium, whether the value is finite.
    """

    value: Any
    steps: Array
    residual: Array
    converged: Array


def run(
    f: Callable[[Array, Any], Array], z0: Array, args: Any, solver: FixedPointSolver, max_steps: int
) -> SampleSolution:
    """Runs a solver on `z = f(z, args)` from `z0`, `(batch, ...)`; not differentiable."""
    solution = optimistix.fixed_point(f, solver, z0, args, max_steps=max_steps, throw=False)
    if isinstance(solver, Iteration):
        residual, converged = solution.stats["residual"], solution.stats["converged"]
    else:  # one of optimistix's own, for all samples together
        residual = sample_norm(f(solution.value, args) - solution.value)
        success = solution.result == optimistix.RESULTS.successful
        converged = success & jnp.isfinite(residual)
    return SampleSolution(solution.value, solution.stats["num_steps"], residual, converged)


def sample_norm(z: Array) -> Array:
    """The 2-norm of every sample, `(batch, ...) -> (batch,)`."""
    return jax.vmap(jnp.linalg.norm)(z)


def spread(scalars: Array, z: Array) -> Array:
    """Gives one number a sample the axes to broadcast with the samples."""
    return scalars.reshape(-1, *[1] * (z.ndim - 1))


def dot(a: Array, b: Array) -> Array:
    """The product of every sample with its own, shaped to broadcast with the samples."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def push(newest: Array, history: Array) -> Array:
    """The history with the newest in front and without the oldest."""
    return jnp.concatenate([newest[None], history[:-1]])


def default_rtol(dtype) -> float:
    """The tolerance that a layer computed in this dtype can reach."""
    # In 16 bits a unit of the last place is so much that 32 of them would be no tolerance.
    return (2 if jnp.finfo(dtype).bits < 32 else 32) * float(jnp.finfo(dtype).eps)


class _State(eqx.Module):
    best: Array
    residual: Array  # of the best
    converged: Array
    moving: Array
    memory: Memory


class Iteration(optimistix.AbstractFixedPointSolver):
    """Plain iteration `z ← f(z)`, or damped, `z ← damping · z + (1 - damping) · f(z)`.

    Converges like the spectral radius of `∂f/∂z` to the power of the number of steps. Damping helps
    where that has eigenvalues below -1, and costs steps elsewhere.

    Attributes:
      rtol: a sample has converged where `|f(z) - z| <= atol + rtol |f(z)|`; `None` is 32 units of
        the last place of float32 or float64, and 2 of a layer computed in bfloat16 or float16.
      atol: likewise.
      damping: how much of `z` is kept, in [0, 1).
      norm: the norm of each sample, `(batch, ...) -> (batch,)`; by default the 2-norm.
    """

    rtol: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: float = 0.0
    damping: float = 0.0
    norm: Callable[[Array], Array] = sample_norm

    def __check_init__(self):
        name = type(self).__name__
        for field in ("rtol", "atol"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ArgumentError(f"{name}({field}={value}): {field} must be finite and >= 0.")
        if not 0 <= self.damping < 1:
            raise ArgumentError(
                f"{name}(damping={self.damping}): damping is the part of z that is kept and must "
                "lie in [0, 1)."
            )

    def within(self, residual: Array, size: Array) -> Array:
        """Whether a residual of this norm is small for a sample of norm `size`."""
        rtol = default_rtol(size.dtype) if self.rtol is None else self.rtol
        # A norm that has overflowed allows nothing.
        return jnp.isfinite(size) & (residual <= self.atol + rtol * size)

    def start(self, y: Array) -> Memory:
        """Returns what the method remembers before the first step."""
        del y

    def propose(
        self, y: Array, residual: Array, norm: Array, memory: Memory
    ) -> tuple[Array, Memory]:
        """Returns the next iterate, given `residual = f(y) - y` and its norm, `(batch,)`."""
        del norm
        return y + (1 - self.damping) * residual, memory

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        """All samples move."""
        del fn, args, options, f_struct, aux_struct, tags
        no = jnp.zeros(y.shape[:1], bool)
        unknown = jnp.full(no.shape, jnp.inf, y.dtype)
        return _State(y, unknown, no, ~no, self.start(y))

    def step(self, fn, y, args, options, state, tags):
        """One evaluation of the layer, and one step of the samples that still move."""
        del options, tags
        value, aux = fn(y, args)
        residual = value - y
        norm, size = self.norm(residual), self.norm(value)
        finite = jnp.isfinite(norm) & jnp.isfinite(size)
        converged = state.moving & self.within(norm, size)
        better = converged | (state.moving & finite & (norm < state.residual))
        best = jnp.where(spread(better, y), y, state.best)
        proposal, memory = self.propose(y, residual, norm, state.memory)
        moving = state.moving & finite & ~converged
        state = _State(
            best,
            jnp.where(better, norm, state.residual),
            state.converged | converged,
            moving,
            memory,
        )
        return jnp.where(spread(moving, y), proposal, best), state, aux

    def terminate(self, fn, y, args, options, state, tags):
        """When no sample moves any more."""
        del fn, y, args, options, tags
        result = optimistix.RESULTS.where(
            jnp.all(state.moving | state.converged),
            optimistix.RESULTS.successful,
            optimistix.RESULTS.nonlinear_divergence,
        )
        done = ~jnp.any(state.moving)
        # optimistix stops at once where the result is not success: the others may go on.
        result = optimistix.RESULTS.where(done, result, optimistix.RESULTS.successful)
        return done, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        """The best iterate; in the statistics `residual` and `converged` of every sample."""
        del fn, y, args, options, tags, result
        return state.best, aux, {"residual": state.residual, "converged": state.converged}
