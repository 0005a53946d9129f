"""Newton's method, safeguarded, for equations of one number each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nt_deq.fixed_point.solver import Bounds, Evaluation, SteppingSolver

_REACH = 10.0  # scales that a step up may go; where F rises faster than y:
_RISING_REACH = 3.0


class Bracket(NamedTuple):
    """Where the first root is, and what is known at its lower end.

    Attributes:
      lower: up to here `F(y) > y`.
      gap: `F(y) - y` there.
      rise: its slope there.
      upper: `F(y) <= y` here, or the bound.
    """

    lower: Float[Array, "*samples"]
    gap: Float[Array, "*samples"]
    rise: Float[Array, "*samples"]
    upper: Float[Array, "*samples"]


@dataclass(frozen=True)
class Newton(SteppingSolver):
    """Newton's method `y ← y + (F(y) - y) / (1 - F'(y))`: 3 to 5 steps, whatever the rate.

    So many from a start as near as that of a pair. For kernels whose entries are independent
    equations. The derivative costs nothing for a covariance, where it is `J = W_std² V̇` and the
    network's NTK needs it anyway. Of several roots it finds the first above the start, as the plain
    iteration of a variance does: a step up goes no further than `F(y)` or a few times `y`, and back
    by half where the cubic with the values and slopes of both ends may have crossed 0 between them.
    Not for cells that couple entries (convolutions, pooling) nor for networks, where the derivative
    is a matrix.
    """

    max_steps: int = 100

    elementwise: ClassVar[bool] = True
    needs_slope: ClassVar[bool] = True

    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> Bracket:
        """The bracket of every root."""
        assert bounds is not None  # of entries
        lower, upper = (jnp.broadcast_to(bound, y.shape) for bound in bounds)
        return Bracket(lower, jnp.full_like(y, jnp.inf), jnp.zeros_like(y), upper)

    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: Bracket,
    ) -> tuple[Float[Array, "*samples"], Bracket]:
        """A Newton step where it stays inside the bracket, a safe one where it does not."""
        del norm
        assert found.slope is not None
        gap, rise, way = found.value - y, found.slope - 1, y - memory.lower
        above = gap > 0
        # The inner coefficients of the cubic in Bernstein's basis: where none of the four is
        # negative it is not either, and where their sign changes once its does.
        inner1, inner2 = memory.gap + way * memory.rise / 3, gap - way * rise / 3
        back = (inner1 < 0) & (inner2 > 0) | above & ((inner1 < 0) | (inner2 < 0))
        here = Bracket(y, gap, rise, memory.upper)
        bracket = jax.tree.map(lambda a, b: jnp.where(above & ~back, a, b), here, memory)
        bracket = bracket._replace(upper=jnp.where(above, memory.upper, y))

        step = jnp.where(rise < 0, y - gap / jnp.where(rise < 0, rise, -1), jnp.inf)
        size = jnp.abs(y) if found.scale is None else found.scale
        reach = jnp.where(rise < 0, _REACH, _RISING_REACH).astype(y.dtype)
        step = jnp.minimum(step, jnp.maximum(found.value, y + reach * size))
        inside = (step >= bracket.lower) & (step <= bracket.upper)
        step = jnp.where(inside, step, (bracket.lower + bracket.upper) / 2)
        return jnp.where(back, memory.lower + way / 2, step), bracket
