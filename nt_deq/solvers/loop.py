"""The one loop that every solver runs in, and the derivative of what it finds."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

State = Any


def rounding(dtype) -> float:
    """How far apart, relative to its scale, rounding alone may put `F(y)` and `y`."""
    return 4 * float(jnp.finfo(dtype).eps)


class Root(NamedTuple):
    """Where the loop ended after `steps` steps; `residual = |F(value) - value|`."""

    value: Array
    residual: Array
    converged: Array
    steps: Array


@dataclass(frozen=True)
class Solver(abc.ABC):
    """A method for `y = F(y)`, an independent scalar equation in every entry.

    Attributes:
      tol: the error of `y` to stop at, relative to the scale of its entry (for a covariance
        `√(k k')`); `None` is 8 units of the last place. Where rounding alone leaves a larger
        residual, that is where an entry stops.
      max_steps: after so many steps an entry that has not converged is reported as such.
    """

    tol: float | None = None
    max_steps: int = 10_000

    def __post_init__(self):
        if self.tol is not None and not 0 < self.tol < 1:
            raise ValueError(
                f"{type(self).__name__}(tol={self.tol}): tol is a relative error and has to lie in "
                "(0, 1); leave it out for the best that the dtype allows."
            )
        if not (isinstance(self.max_steps, int) and self.max_steps >= 1):
            raise ValueError(
                f"{type(self).__name__}(max_steps={self.max_steps!r}): max_steps has to be an "
                "integer of at least 1."
            )

    @abc.abstractmethod
    def init(self, y: Array, lower: Array, upper: Array) -> State:
        """Returns the state before the first step; the root lies in `[lower, upper]`."""

    @abc.abstractmethod
    def step(self, y: Array, value: Array, slope: Array, state: State) -> tuple[Array, State]:
        """Returns the next `y`, given `value = F(y)` and `slope = F'(y)`."""


def solve(
    solver: Solver,
    fn: Callable[..., tuple[Array, Array, Array]],
    args: tuple[Array, ...],
    y0: Array,
    lower: Array,
    upper: Array,
) -> Root:
    """Solves `y = F(y, *args)` entry by entry and differentiates the root implicitly in `args`.

    An entry that has converged is left alone, so that no entry's value depends on the others'. An
    entry that is not finite is given up.

    Args:
      solver: the method.
      fn: `fn(y, *args) -> (F, ∂F/∂y, scale)`, elementwise; it may close over no traced value.
      args: arrays that broadcast with `y0`.
      y0: where to start.
      lower: bound of the root; iterates are clipped to it.
      upper: likewise.
    """
    root = _iterate(solver, fn, *lax.stop_gradient((args, y0, lower, upper)))
    return root._replace(value=_implicit(fn, root.value, args))


def _iterate(solver, fn, args, y0, lower, upper):
    dtype = y0.dtype
    floor = rounding(dtype)
    tol = 8 * float(jnp.finfo(dtype).eps) if solver.tol is None else solver.tol

    def evaluate(y):
        value, slope, scale = fn(y, *args)
        value = jnp.clip(value, lower, upper)  # a root at a bound may be outside it by rounding
        residual = jnp.abs(value - y)
        # The error of y is about residual / (1 - slope).
        converged = residual <= jnp.maximum(tol * (1 - jnp.abs(slope)), floor) * scale
        return value, slope, residual, converged

    def unfinished(carry):
        steps, _, (_, _, residual, converged), _ = carry
        return (steps < solver.max_steps) & jnp.any(~converged & jnp.isfinite(residual))

    def advance(carry):
        steps, y, (value, slope, _, converged), state = carry
        proposal, state = solver.step(y, value, slope, state)
        y = jnp.where(converged, y, jnp.clip(proposal, lower, upper))
        return steps + 1, y, evaluate(y), state

    start = (jnp.zeros((), jnp.int32), y0, evaluate(y0), solver.init(y0, lower, upper))
    steps, y, (_, _, residual, converged), _ = lax.while_loop(unfinished, advance, start)
    return Root(y, residual, converged, steps)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _implicit(fn, root, args):
    """`root`, with the derivative in `args` that `root = F(root, *args)` gives it."""
    del fn, args
    return root


@_implicit.defjvp
def _implicit_jvp(fn, primals, tangents):
    root, args = primals
    # The root of the rule has the rule's own derivative, so that higher derivatives are right too.
    root = _implicit(fn, root, args)
    (_, slope, _), (d_value, _, _) = jax.jvp(lambda *a: fn(root, *a), args, tangents[1])
    return root, d_value / (1 - slope)
