"""The one loop that every solver runs in, and the derivative of what it finds."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_deq.errors import ArgumentError

State = Any


def rounding(dtype) -> float:
    """How far apart, relative to its scale, rounding alone may put `F(y)` and `y`."""
    return 4 * float(jnp.finfo(dtype).eps)


def spread(block: Array, event_dims: int) -> Array:
    """Gives an array of one number a block the axes to broadcast with the blocks."""
    return block.reshape(block.shape + (1,) * event_dims)


class Root(NamedTuple):
    """Where the loop ended after `steps` steps; `residual = |F(value) - value|`.

    `residual` and `converged` have one entry a block: the largest of its entries, and whether all
    of them have converged. `aux` is what else `fn` gave there. A block that has not converged is
    one step further than its `residual` and `aux`.
    """

    value: Array
    residual: Array
    converged: Array
    steps: Array
    aux: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Solver(abc.ABC):
    """A method for `y = F(y)`, an independent equation in every block of entries.

    A block is a single entry where `event_dims` is 0, and the last axis where it is 1.

    Attributes:
      tol: the error of `y` to stop at, relative to the scale of its block (for a covariance
        `√(k k')`); `None` is 8 units of the last place. Where rounding alone leaves a larger
        residual, that is where a block stops.
      max_steps: after so many steps a block that has not converged is reported as such.
    """

    tol: float | None = None
    max_steps: int = 10_000

    def __post_init__(self):
        if self.tol is not None and not 0 < self.tol < 1:
            raise ArgumentError(
                f"{type(self).__name__}(tol={self.tol}): tol is a relative error and has to lie in "
                "(0, 1); leave it out for the best that the dtype allows."
            )
        if not (isinstance(self.max_steps, int) and self.max_steps >= 1):
            raise ArgumentError(
                f"{type(self).__name__}(max_steps={self.max_steps!r}): max_steps has to be an "
                "integer of at least 1."
            )

    @abc.abstractmethod
    def init(self, y: Array, lower: Array, upper: Array, event_dims: int) -> State:
        """Returns the state before the first step; the root lies in `[lower, upper]`."""

    @abc.abstractmethod
    def step(
        self, y: Array, value: Array, slope: Array, state: State, event_dims: int
    ) -> tuple[Array, State]:
        """Returns the next `y`, given `value = F(y)` and, of single entries, `slope = F'(y)`."""


def solve(
    solver: Solver,
    fn: Callable[..., tuple[Array, ...]],
    args: Any,
    y0: Array,
    lower: Array,
    upper: Array,
    event_dims: int = 0,
) -> Root:
    """Solves `y = F(y, *args)` block by block and differentiates the root implicitly in `args`.

    A block that has converged is left alone, so that its value does not depend on the others. A
    block that is not finite is given up.

    Args:
      solver: the method.
      fn: `fn(y, *args) -> (F, slope, scale)`; it may close over no traced value. Of single entries
        `slope` is `∂F/∂y`, of larger blocks it is not used; `scale` has one entry a block.
      args: a tuple of pytrees.
      y0: where to start.
      lower: bound of the root; iterates are clipped to it.
      upper: likewise.
      event_dims: how many of the last axes of `y` make a block.
    """
    root = iterate(solver, fn, *lax.stop_gradient((args, y0, lower, upper)), event_dims)
    return root._replace(value=implicit(fn, event_dims, root.value, args))


def iterate(
    solver: Solver,
    fn: Callable[..., tuple[Array, ...]],
    args: Any,
    y0: Array,
    lower: Array,
    upper: Array,
    event_dims: int = 0,
) -> Root:
    """`solve` without derivatives; `fn` may return more than three values, and `aux` keeps them.

    In the loop a block is one axis, however many axes it has for `fn`. Sums and maps over six axes
    of as many layouts are slow on a CPU, and some of XLA:CPU's programs for them end the process
    (docs/project/xla-cpu-segfault.md).
    """
    floor = rounding(y0.dtype)
    tol = 2 * floor if solver.tol is None else solver.tol
    shape = y0.shape
    if event_dims:
        flat = (*shape[: y0.ndim - event_dims], math.prod(shape[y0.ndim - event_dims :]))
        lower, upper = (jnp.broadcast_to(a, shape).reshape(flat) for a in (lower, upper))
        y0, event_dims = y0.reshape(flat), 1

    def unfinished(carry):
        evaluations, _, (residual, converged, _), _ = carry
        return (evaluations <= solver.max_steps) & jnp.any(~converged & jnp.isfinite(residual))

    def advance(carry):
        evaluations, y, _, state = carry
        value, slope, scale, *aux = fn(y.reshape(shape), *args)
        # A root at a bound may be outside it by rounding.
        value = jnp.clip(value.reshape(y.shape), lower, upper)
        residual = jnp.abs(value - y)
        residual = jnp.max(residual, axis=-1) if event_dims else residual
        # The error of y is about residual / (1 - slope).
        allowed = tol if event_dims else jnp.maximum(tol * (1 - jnp.abs(slope)), floor)
        converged = residual <= allowed * scale
        proposal, state = solver.step(y, value, slope, state, event_dims)
        stays = spread(converged | ~jnp.isfinite(residual), event_dims)
        y = jnp.where(stays, y, jnp.clip(proposal, lower, upper))
        return evaluations + 1, y, (residual, converged, tuple(aux)), state

    # The function is evaluated in the loop alone, so that it is compiled once.
    carry = (jnp.zeros((), jnp.int32), y0, (), solver.init(y0, lower, upper, event_dims))
    shapes = jax.eval_shape(advance, carry)[2]
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    evaluations, y, (residual, converged, aux), _ = lax.while_loop(
        unfinished, advance, (*carry[:2], nothing, carry[3])
    )
    return Root(y.reshape(shape), residual, converged, jnp.maximum(evaluations - 1, 0), aux)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def implicit(fn, event_dims, root, args):
    """`root`, with the derivative in `args` that `root = F(root, *args)` gives it: see `solve`."""
    del fn, event_dims, args
    return root


@implicit.defjvp
def _implicit_jvp(fn, event_dims, primals, tangents):
    root, args = primals
    # The root of the rule has the rule's own derivative, so that higher derivatives are right too.
    root = implicit(fn, event_dims, root, args)
    if event_dims == 0:
        (_, slope, _), (d_value, _, _) = jax.jvp(lambda *a: fn(root, *a), args, tangents[1])
        return root, d_value / (1 - slope)
    _, d_value = jax.jvp(lambda *a: fn(root, *a)[0], args, tangents[1])
    _, jacobian = jax.linearize(lambda y: fn(y, *args)[0], root)
    return root, solve_linear(jacobian, d_value)


def solve_linear(jacobian: Callable[[Array], Array], b: Array) -> Array:
    """Solves `t = J t + b`, linear in `b` and so transposable, by iteration; NaN if it fails."""
    tol = 2 * rounding(b.dtype)

    def iterate(matvec, b):  # matvec(t) = t - J t
        def step(carry):
            steps, t, _ = carry
            change = b - matvec(t)
            return steps + 1, t + change, jnp.max(jnp.abs(change))

        def unfinished(carry):
            steps, t, change = carry
            return (steps < 10_000) & (change > tol * jnp.max(jnp.abs(t)))

        start = (jnp.zeros((), jnp.int32), b, jnp.array(jnp.inf, b.dtype))
        _, t, change = lax.while_loop(unfinished, step, start)
        return jnp.where(change <= tol * jnp.max(jnp.abs(t)), t, jnp.nan)

    return lax.custom_linear_solve(lambda t: t - jacobian(t), b, iterate, iterate)
