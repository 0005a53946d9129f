"""Newton's method, safeguarded."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from nt_deq.errors import ArgumentError
from nt_deq.solvers.loop import Solver


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method `y ← y + (F(y) - y) / (1 - F'(y))`: 3 to 5 steps, whatever the rate.

    The derivative costs nothing for a covariance, where it is `J = W_std² V̇` and the network's NTK
    needs it anyway. The sign of `F(y) - y` tells on which side of `y` the root is; a step that
    would leave the bracket so found is replaced by a plain one. Not for cells that couple entries
    (convolutions, pooling), where the derivative is not diagonal.
    """

    max_steps: int = 100

    def init(self, y, lower, upper, event_dims):
        """The bracket of every root."""
        if event_dims:
            raise ArgumentError(
                "solver=Newton() needs a cell whose kernel entries are independent; this one "
                "couples them over space: use nt_deq.Anderson() or nt_deq.Picard()."
            )
        return jnp.broadcast_to(lower, y.shape), jnp.broadcast_to(upper, y.shape)

    def step(self, y, value, slope, state, event_dims):
        """A Newton step where it stays inside the bracket, `F(y)` where it does not."""
        del event_dims
        lower, upper = state
        above = value > y
        lower, upper = jnp.where(above, y, lower), jnp.where(above, upper, y)
        newton = y + (value - y) / (1 - slope)
        inside = (newton >= lower) & (newton <= upper)
        return jnp.where(inside, newton, value), (lower, upper)
