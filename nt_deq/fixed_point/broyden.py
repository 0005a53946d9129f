"""Broyden's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.anderson import GROWTH
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import Bounds, Evaluation, dot, norm


class InverseJacobian(NamedTuple):
    """`-(1 - damping) I + Σ uₖ vₖᵀ`, of every sample, and the last iterate.

    Attributes:
      left, right: `(terms, ..., size)`, the `uₖ` and `vₖ`, newest first.
      y, residual, norm: the last ones.
    """

    left: Float[Array, "terms *batch size"]
    right: Float[Array, "terms *batch size"]
    y: Float[Array, "*batch size"]
    residual: Float[Array, "*batch size"]
    norm: Float[Array, "*batch"]


@dataclass(frozen=True)
class Broyden(Picard):
    """Broyden's good method with limited memory (Broyden 1965; Bai et al. 2019, section 3.1.3).

    Newton's method for `F(y) - y`, with an inverse Jacobian that every step corrects by one term. A
    correction that is not determined is left out. Where the residual has grown tenfold, and when
    there are `terms` of them, all are forgotten.

    For networks; finds unstable equilibria too. Otherwise see `Anderson`, which does less
    arithmetic. Keeps `2 · terms` copies of the samples.

    Attributes:
      terms: how many are kept, 1 to 100.
    """

    terms: int = 10

    elementwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.terms, int) and 1 <= self.terms <= 100):
            raise ArgumentError(
                f"Broyden(terms={self.terms!r}): terms must be an integer from 1 to 100."
            )

    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> InverseJacobian:
        """No terms; any residual has grown from the norm -1."""
        del bounds
        empty = jnp.zeros((self.terms, *y.shape), y.dtype)
        return InverseJacobian(empty, empty, y, y, jnp.full(y.shape[:-1], -1, y.dtype))

    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: InverseJacobian,
    ) -> tuple[Float[Array, "*samples"], InverseJacobian]:
        """The step of Newton's method with the corrected inverse."""
        inverse = self._correct(y, found.value - y, norm, memory)
        return y - self._apply(inverse.left, inverse.right, inverse.residual), inverse

    def _correct(self, y, residual, size, memory) -> InverseJacobian:
        """The inverse that is right for the last step, with one more term."""
        full = jnp.any(memory.right[-1] != 0, axis=-1)
        kept = ((size <= GROWTH * memory.norm) & ~full)[..., None]
        left, right = jnp.where(kept, memory.left, 0), jnp.where(kept, memory.right, 0)
        # The correction has no scale: nothing leaves the range of the dtype.
        length = norm(residual - memory.residual)
        unit = jnp.where(length > 0, length, 1)[..., None]
        d_y, d_residual = (y - memory.y) / unit, (residual - memory.residual) / unit
        v = self._apply(right, left, d_y)
        u = d_y - self._apply(left, right, d_residual)
        along = dot(v, d_residual)
        determined = (jnp.abs(along) > 1e-3 * norm(v) * norm(d_residual))[..., None] & kept
        u = jnp.where(determined, u / jnp.where(determined, along[..., None], 1), 0)
        v = jnp.where(determined, v, 0)
        left, right = (jnp.concatenate([a[None], b[:-1]]) for a, b in ((u, left), (v, right)))
        return InverseJacobian(left, right, y, residual, size)

    def _apply(self, left, right, x):
        """`(-(1 - damping) I + Σ left rightᵀ) x`."""
        return jnp.sum(dot(right, x[None])[..., None] * left, axis=0) - (1 - self.damping) * x
