"""The correlation of a pair, with finite derivatives where it is ±1 and where a variance is 0."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from nt_deq.activations.elementary import Batch
from nt_deq.activations.quotient import over


class Geometry(NamedTuple):
    """A pair `(u, u') ~ N(0, [[k1, c], [c, k2]])`.

    Attributes:
      root1: `√k1`.
      root2: `√k2`.
      rho: the correlation `ρ = c/√(k1 k2)`, in [-1, 1].
      sine: `√(1-ρ²)`.
    """

    root1: Batch
    root2: Batch
    rho: Batch
    sine: Batch


def geometry(k1: Batch, k2: Batch, c: Batch) -> Geometry:
    """That of a pair; `ρ` is ±1 where a Gram matrix of this dtype does not tell it from that."""
    root1, root2 = square_root(k1), square_root(k2)
    rho = clip(over(c, root1 * root2), -1, 1)
    sine = sine_of(rho)
    to_the_end = lax.stop_gradient(jnp.where(sine == 0, jnp.sign(rho) - rho, 0))
    return Geometry(root1, root2, rho + to_the_end, sine)


def clip(x: Batch, lower: float | None, upper: float | None) -> Batch:
    """Clips a value that leaves its range by rounding alone; the derivative stays that of `x`."""
    return x + lax.stop_gradient(jnp.clip(x, lower, upper) - x)


def square_root(x: Batch) -> Batch:
    """√x with derivative 0 at 0, where the true one is infinite."""
    zero = x <= 0  # written so that NaN stays NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def sine_of(rho: Batch) -> Batch:
    """√(1-ρ²), and 0 where a Gram matrix of this dtype does not tell ρ from ±1."""
    square = (1 - rho) * (1 + rho)
    return square_root(jnp.where(square <= 16 * jnp.finfo(rho.dtype).eps, 0, square))
