"""Anderson acceleration."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from nt_deq.errors import ArgumentError
from nt_deq.iterations.iteration import GROWTH, Iteration, dot, push, spread


class _Differences(eqx.Module):
    values: Array  # differences of successive steps, newest first
    residuals: Array
    value: Array  # the last
    residual: Array
    norm: Array


class Anderson(Iteration):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011).

    The next iterate is the combination of the last steps whose residual would be smallest if `f`
    were affine. The least-squares problem is solved by orthogonalising the differences of
    successive residuals, newest first. One that lies within `angle` of the span of newer ones is
    left out (Pollock & Rebholz 2023, "Filtering for Anderson acceleration"), which bounds the
    coefficients; with none left, as on a singular system, the step is that of `Iteration`. So it is
    where the residual has grown tenfold, after which all differences are forgotten.

    Saves steps where a few eigenvalues of `∂f/∂z` are larger than the others, as after training.
    A wide network with random weights has its eigenvalues all over a disc, where no combination of
    steps is much better than the last one: there `Iteration` is faster. Keeps `2 · window` copies
    of the state.

    Attributes:
      window: how many differences are kept, 1 to 20.
      angle: sine of the angle below which a difference is left out, in (0, 1).
    """

    window: int = 5
    angle: float = 0.1

    def __check_init__(self):
        if not (isinstance(self.window, int) and 1 <= self.window <= 20):
            raise ArgumentError(
                f"Anderson(window={self.window!r}): window must be an integer from 1 to 20."
            )
        if not 0 < self.angle < 1:
            raise ArgumentError(
                f"Anderson(angle={self.angle}): angle is a sine and must lie in (0, 1)."
            )

    def start(self, y):
        """No differences; any residual has grown from the norm -1."""
        empty = jnp.zeros((self.window, *y.shape), y.dtype)
        return _Differences(empty, empty, y, y, jnp.full(y.shape[:1], -1, y.dtype))

    def propose(self, y, residual, norm, memory):
        """The damped step, less what the differences explain of the residual."""
        value = y + (1 - self.damping) * residual
        kept = spread(norm <= GROWTH * memory.norm, y)
        values = push(value - memory.value, memory.values)
        residuals = push(residual - memory.residual, memory.residuals)
        values, residuals = jnp.where(kept, values, 0), jnp.where(kept, residuals, 0)
        new = _Differences(values, residuals, value, residual, norm)
        basis = []
        for d_value, d_residual in zip(values, residuals, strict=True):
            size = dot(d_residual, d_residual)
            for q, p in basis:
                along = dot(q, d_residual)
                d_residual, d_value = d_residual - along * q, d_value - along * p
            rest = dot(d_residual, d_residual)
            independent = rest > self.angle**2 * size
            length = jnp.sqrt(jnp.where(independent, rest, 1))
            q = jnp.where(independent, d_residual / length, 0)
            p = jnp.where(independent, d_value / length, 0)
            basis.append((q, p))
            along = dot(q, residual)
            residual, value = residual - along * q, value - along * p
        return value, new
