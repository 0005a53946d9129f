"""Plain iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jaxtyping import Float

from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.solver import Bounds, Evaluation, Memory, SteppingSolver


@dataclass(frozen=True)
class Picard(SteppingSolver):
    """Plain iteration `y ← F(y)`, or damped, `y ← damping · y + (1 - damping) · F(y)`.

    One layer of the network per step, and the reference for the other solvers. It converges like
    the spectral radius of `∂F/∂y` to the power of the number of steps: of a kernel's entry, the
    rate `J = W_std² E[φ'²]`, 20 steps at `J = .2` and 3000 at `J = .99`. Damping helps where there
    are eigenvalues below -1, and costs steps elsewhere. For kernels and for networks.

    Attributes:
      damping: how much of `y` is kept, in [0, 1).
    """

    damping: float = 0.0

    elementwise: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damping < 1:
            raise ArgumentError(
                f"{type(self).__name__}(damping={self.damping}): damping is the part of y that is "
                "kept and must lie in [0, 1)."
            )

    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> Memory:
        """Nothing."""
        del y, bounds

    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: Memory,
    ) -> tuple[Float[Array, "*samples"], Memory]:
        """The damped step."""
        del norm
        return y + (1 - self.damping) * (found.value - y), memory
