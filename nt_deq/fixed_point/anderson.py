"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import Bounds, Evaluation, dot, norm

GROWTH = 10  # of the residual in one step, at which accelerations forget what they know


class History(NamedTuple):
    """Of the last iterates, with the newest difference in slot `step - 1` modulo the window.

    Attributes:
      values, residuals: `(window, ..., size)`, differences of successive steps and residuals, both
        over the length of the latter.
      gram: `(window, window, ...)`, products of the residuals, newest first; 0 where forgotten.
      value, residual, norm: the last ones.
      step: how many there were.
    """

    values: Float[Array, "window *batch size"]
    residuals: Float[Array, "window *batch size"]
    gram: Float[Array, "window window *batch"]
    value: Float[Array, "*batch size"]
    residual: Float[Array, "*batch size"]
    norm: Float[Array, "*batch"]
    step: Int[Array, ""]


@dataclass(frozen=True)
class Anderson(Picard):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011).

    The next iterate is the combination of the last steps whose residual would be smallest if `F`
    were affine. In the least-squares problem a difference of successive residuals that lies within
    `angle` of the span of newer ones is left out (Pollock & Rebholz 2023, "Filtering for Anderson
    acceleration"), which bounds the coefficients; with none left the step is that of `Picard`. So
    it is where the residual has grown tenfold, after which all differences are forgotten.

    For kernels whose cells couple entries, and for networks where a few eigenvalues of `∂F/∂y` are
    larger than the others, as after training. A wide network with random weights has its
    eigenvalues all over a disc, where no combination of steps is much better than the last one:
    there `Picard` is faster. Keeps `2 · window` copies of the samples.

    Attributes:
      window: how many differences are kept, 1 to 20.
      angle: sine of the angle below which a difference is left out, in (0, 1).
    """

    window: int = 5
    angle: float = 0.1

    elementwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.window, int) and 1 <= self.window <= 20):
            raise ArgumentError(
                f"Anderson(window={self.window!r}): window must be an integer from 1 to 20."
            )
        if not 0 < self.angle < 1:
            raise ArgumentError(
                f"Anderson(angle={self.angle}): angle is a sine and must lie in (0, 1)."
            )

    def start(self, y: Float[Array, "*samples"], bounds: Bounds | None) -> History:
        """No differences; any residual has grown from the norm -1."""
        del bounds
        empty = jnp.zeros((self.window, *y.shape), y.dtype)
        gram = jnp.zeros((self.window, self.window, *y.shape[:-1]), y.dtype)
        grown = jnp.full(y.shape[:-1], -1, y.dtype)
        return History(empty, empty, gram, y, y, grown, jnp.zeros((), jnp.int32))

    def propose(
        self,
        y: Float[Array, "*samples"],
        found: Evaluation,
        norm: Float[Array, "*batch"],
        memory: History,
    ) -> tuple[Float[Array, "*samples"], History]:
        """The damped step, less what the differences explain of the residual."""
        history = self._remember(y, found.value - y, norm, memory)
        unit = history.residual / jnp.where(norm > 0, norm, 1)[..., None]
        along = self._newest_first(_products(history.residuals, unit), history.step)
        weights = _least_squares(history.gram, along, self.angle)
        weights = self._by_slot(weights, history.step) * norm[None]
        explained = sum(
            w[..., None] * value for w, value in zip(weights, history.values, strict=True)
        )
        return history.value - explained, history

    def _remember(self, y, residual, size, memory) -> History:
        """The history with one more difference."""
        value = y + (1 - self.damping) * residual
        difference = residual - memory.residual
        length = norm(difference)
        kept = (size <= GROWTH * memory.norm) & (length > 0) & jnp.isfinite(length)
        inverse = jnp.where(kept, 1 / jnp.where(kept, length, 1), 0)[..., None]
        difference = jnp.where(kept[..., None], difference * inverse, 0)
        step = jnp.where(kept[..., None], (value - memory.value) * inverse, 0)
        slot = memory.step % self.window
        residuals = lax.dynamic_update_index_in_dim(memory.residuals, difference, slot, 0)
        values = lax.dynamic_update_index_in_dim(memory.values, step, slot, 0)

        # Shifted by one, with the products of the newest in front, and nothing where forgotten.
        count = memory.step + 1
        row = self._newest_first(_products(residuals, difference), count)
        gram = jnp.where((size <= GROWTH * memory.norm)[None, None], memory.gram[:-1, :-1], 0)
        known = jnp.stack([kept, *(gram[i, i] > 0 for i in range(self.window - 1))])
        row = jnp.where(known, row, 0)
        gram = jnp.concatenate([row[1:, None], gram], axis=1)
        gram = jnp.concatenate([row[None], gram], axis=0)
        return History(values, residuals, gram, value, residual, size, count)

    def _newest_first(self, by_slot: Array, count: Array) -> Array:
        """Reorders `(window, ...)`."""
        backwards = by_slot[::-1]  # slot window - 1 first
        return _roll(backwards, (self.window - count) % self.window)

    def _by_slot(self, newest_first: Array, count: Array) -> Array:
        """The inverse of `_newest_first`."""
        return _roll(newest_first, count % self.window)[::-1]


def _products(vectors: Array, vector: Array) -> Array:
    """`(window, ..., size) -> (window, ...)`, one by one: XLA:CPU is slow at all at once."""
    return jnp.stack([dot(a, vector) for a in vectors])


def _roll(a: Array, first: Array) -> Array:
    """`a` from its row `first` on, then those before."""
    return lax.dynamic_slice_in_dim(jnp.concatenate([a, a]), first, len(a))


def _least_squares(gram: Array, along: Array, angle: float) -> Array:
    """Weights of unit vectors, given newest first, that explain the most of another vector.

    By Cholesky's factorisation of their products, without those within `angle` of the span of the
    ones before. Written out: elementwise operations run on every platform and fuse, where a batched
    factorisation of many small matrices does not.

    Args:
      gram: `(window, window, ...)`, the products of the vectors, 0 for vectors to leave out.
      along: `(window, ...)`, their products with the other vector.
      angle: the sine of an angle.
    """
    window = len(along)
    rows, pivots, kept, solved = [], [], [], []
    for i in range(window):
        row = []
        for j in range(i):
            entry = gram[i, j] - sum(row[k] * rows[j][k] for k in range(j))
            row.append(jnp.where(kept[j], entry / pivots[j], 0))
        rest = gram[i, i] - sum(entry * entry for entry in row)
        independent = rest > angle**2
        pivot = jnp.sqrt(jnp.where(independent, rest, 1))
        value = along[i] - sum(row[k] * solved[k] for k in range(i))
        rows.append(row)
        pivots.append(pivot)
        kept.append(independent)
        solved.append(jnp.where(independent, value / pivot, 0))
    weights = [jnp.zeros(())] * window
    for i in reversed(range(window)):
        value = solved[i] - sum(rows[j][i] * weights[j] for j in range(i + 1, window))
        weights[i] = jnp.where(kept[i], value / pivots[i], 0)
    return jnp.stack(weights)
