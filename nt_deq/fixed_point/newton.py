"""Newton's method, safeguarded, for equations of one number each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PyTree

from nt_deq.fixed_point.solver import Bounds, Evaluation, Function, SteppingSolver

# By the bits of the dtype: each doubles the number of digits.
_FIRST_STEPS = {32: 3, 64: 4}


@dataclass(frozen=True)
class Newton(SteppingSolver):
    """Newton's method `y ← y + (F(y) - y) / (1 - F'(y))`: 4 or 5 steps, whatever the rate.

    So many from a start as near as that of a pair. For kernels whose entries are independent
    equations. The derivative costs nothing for a covariance, where it is `J = W_std² V̇` and the
    network's NTK needs it anyway. The sign of `F(y) - y` tells on which side of `y` the root is. A
    step that would leave the bracket so found is replaced by a plain one, and by a doubling of `y`
    where `F` rises faster than `y`. Not for cells that couple entries (convolutions, pooling) nor
    for networks, where the derivative is a matrix.
    """

    max_steps: int = 100

    elementwise: ClassVar[bool] = True
    needs_slope: ClassVar[bool] = True

    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> Bounds:
        """The bracket of every root."""
        assert bounds is not None  # of entries
        return Bounds(*(jnp.broadcast_to(bound, y.shape) for bound in bounds))

    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: Bounds,
    ) -> tuple[Float[Array, "*samples"], Bounds]:
        """A Newton step where it stays inside the bracket, a safe one where it does not."""
        del norm
        assert found.slope is not None
        above = found.value > y
        lower = jnp.where(above, y, memory.lower)
        upper = jnp.where(above, memory.upper, y)
        step = y + (found.value - y) / (1 - found.slope)
        inside = (step >= lower) & (step <= upper)
        double = jnp.maximum(2 * y, found.value)
        rising = above & (found.slope >= 1)
        otherwise = jnp.where(rising, jnp.minimum(double, (y + upper) / 2), found.value)
        return jnp.where(inside, step, otherwise), Bounds(lower, upper)

    def approach(
        self, fn: Function, y: Float[Array, "*shape"], args: PyTree, bounds: Bounds
    ) -> tuple[Float[Array, "*shape"], int]:
        """The first steps, of an `F` whose slope is below 1 between the bounds, without a bracket.

        XLA fuses each of them into one pass over memory, where a step of the loop takes a dozen.

        Returns:
          A `y` from which the loop seldom has more to do than to find that it has converged, and
          how many steps that took.
        """
        steps = min(_FIRST_STEPS[jnp.finfo(y.dtype).bits], self.max_steps - 1)

        def advance(_, y):
            found = fn(y, args)
            assert found.slope is not None
            return jnp.clip(y + (found.value - y) / (1 - found.slope), *bounds)

        return lax.fori_loop(0, steps, advance, y), steps
