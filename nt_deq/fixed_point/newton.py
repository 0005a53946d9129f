"""Newton's method, safeguarded, for equations of one number each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PyTree

from nt_deq.fixed_point.solver import Bounds, Evaluation, Function, SteppingSolver

# By the bits of the dtype: each doubles the number of digits.
_FIRST_STEPS = {32: 3, 64: 4}

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
    """Newton's method `y ← y + (F(y) - y) / (1 - F'(y))`: 4 or 5 steps, whatever the rate.

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
