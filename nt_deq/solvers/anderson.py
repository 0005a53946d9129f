"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from nt_deq.errors import ArgumentError
from nt_deq.solvers.loop import Solver, spread


class History(NamedTuple):
    """`F(y)`, `F(y) - y` of the last iterates, newest first, and `|F(y) - y|²` of the newest."""

    values: Array
    residuals: Array
    norm: Array


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011), regularised and safeguarded.

    For cells that couple the entries of a block (convolutions, pooling, attention). The next
    iterate is the combination `Σ αᵢ F(yᵢ)`, `Σ αᵢ = 1`, of the last `window` iterates whose
    residual `Σ αᵢ (F(yᵢ) - yᵢ)` is smallest; every block has weights of its own. Where the residual
    of a block has grown, its history is forgotten and the step is a plain one, so it is never worse
    than `Picard` for long. It keeps `2 · window` copies of the tile of pairs at hand. Not where
    entries are independent: there `Newton` takes fewer steps.

    Attributes:
      window: how many iterates are combined.
      regularization: what is added to the diagonal of the least-squares problem, relative to it;
        the rounding of the dtype at least.
    """

    max_steps: int = 1_000
    window: int = 4
    regularization: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.window, int) and 1 <= self.window <= 10):
            raise ArgumentError(
                f"Anderson(window={self.window!r}): window has to be an integer from 1 to 10; each "
                "costs two copies of a tile of the kernel."
            )
        if not 0 < self.regularization < 1:
            raise ArgumentError(
                f"Anderson(regularization={self.regularization}): regularization has to lie in "
                "(0, 1); 1e-6 is the default."
            )

    def init(self, y, lower, upper, event_dims):
        """An empty history."""
        del lower, upper
        empty = jnp.zeros((self.window, *y.shape), y.dtype)
        # Any residual has grown from this one: the first step is plain.
        return History(empty, empty, jnp.full(y.shape[: y.ndim - event_dims], -1, y.dtype))

    def step(self, y, value, slope, state, event_dims):
        """The best combination, or `F(y)` where the residual has grown."""
        del slope
        residual = value - y
        axes = tuple(range(y.ndim - event_dims, y.ndim))

        def dot(a, b):
            return jnp.sum(a * b, axis=axes)

        norm = dot(residual, residual)
        grown = spread(norm > state.norm, event_dims)
        values = [value] + [jnp.where(grown, value, v) for v in state.values[:-1]]
        residuals = [residual] + [jnp.where(grown, residual, r) for r in state.residuals[:-1]]
        # Differences to the newest: min over γ of |r₀ + Σ γᵢ (rᵢ - r₀)|², no constraint left.
        steps = [r - residual for r in residuals[1:]]
        gram = [[dot(a, b) for b in steps] for a in steps]
        regularization = max(self.regularization, float(jnp.finfo(y.dtype).eps))
        ridge = regularization * sum((gram[i][i] for i in range(len(steps))), 0 * norm)
        tiny = jnp.finfo(y.dtype).tiny
        for i in range(len(steps)):
            gram[i][i] = gram[i][i] + ridge + tiny
        gamma = _solve_positive(gram, [-dot(s, residual) for s in steps])
        combined = value + sum(
            (spread(g, event_dims) * (v - value) for g, v in zip(gamma, values[1:], strict=True)),
            0 * value,
        )
        return combined, History(jnp.stack(values), jnp.stack(residuals), norm)


def _solve_positive(matrix: list[list[Array]], vector: list[Array]) -> list[Array]:
    """Solves small positive definite systems, one an array entry, by elimination.

    Written out for a few unknowns: elementwise operations run on every platform and fuse, where a
    batched factorisation of millions of 2 × 2 matrices does not.
    """
    size = len(vector)
    a, b = [row[:] for row in matrix], vector[:]
    for i in range(size):
        for j in range(i + 1, size):
            factor = a[j][i] / a[i][i]
            a[j] = [x - factor * y for x, y in zip(a[j], a[i], strict=True)]
            b[j] = b[j] - factor * b[i]
    x: list[Array] = [jnp.zeros(())] * size
    for i in reversed(range(size)):
        known = sum((a[i][j] * x[j] for j in range(i + 1, size)), jnp.zeros((), b[i].dtype))
        x[i] = (b[i] - known) / a[i][i]
    return x
