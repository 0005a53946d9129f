"""Broyden's method."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from nt_deq.errors import ArgumentError
from nt_deq.iterations.iteration import GROWTH, Iteration, dot, push, spread


class _InverseJacobian(eqx.Module):
    left: Array  # of the rank-one terms, newest first
    right: Array
    y: Array  # the last
    residual: Array
    norm: Array


class Broyden(Iteration):
    """Broyden's good method with limited memory (Broyden 1965; Bai et al. 2019, section 3.1.3).

    Newton's method for `f(z) - z`, with an inverse Jacobian `-(1 - damping) I + Σ uₖ vₖᵀ` that
    every step corrects by one term. A correction that is not determined is left out. Where the
    residual has grown tenfold, and when there are `terms` of them, all are forgotten.

    Finds unstable equilibria too. Otherwise see `Anderson`, which does less arithmetic. Keeps
    `2 · terms` copies of the state.

    Attributes:
      terms: how many are kept, 1 to 100.
    """

    terms: int = 10

    def __check_init__(self):
        if not (isinstance(self.terms, int) and 1 <= self.terms <= 100):
            raise ArgumentError(
                f"Broyden(terms={self.terms!r}): terms must be an integer from 1 to 100."
            )

    def start(self, y):
        """No terms; any residual has grown from the norm -1."""
        empty = jnp.zeros((self.terms, *y.shape), y.dtype)
        return _InverseJacobian(empty, empty, y, y, jnp.full(y.shape[:1], -1, y.dtype))

    def propose(self, y, residual, norm, memory):
        """The step of Newton's method with the corrected inverse."""
        full = dot(memory.right[-1], memory.right[-1]) > 0
        kept = spread(norm <= GROWTH * memory.norm, y) & ~full
        left, right = jnp.where(kept, memory.left, 0), jnp.where(kept, memory.right, 0)

        def apply(left, right, x):
            along = jax.vmap(dot, (0, None))(right, x)
            return jnp.sum(along * left, axis=0) - (1 - self.damping) * x

        d_y, d_residual = y - memory.y, residual - memory.residual
        v = apply(right, left, d_y)
        u = d_y - apply(left, right, d_residual)
        along = dot(v, d_residual)
        tiny = 1e-3 * jnp.sqrt(dot(v, v) * dot(d_residual, d_residual))
        determined = kept & (jnp.abs(along) > tiny)
        u = jnp.where(determined, u / jnp.where(determined, along, 1), 0)
        left, right = push(u, left), push(jnp.where(determined, v, 0), right)
        new = _InverseJacobian(left, right, y, residual, norm)
        return y - apply(left, right, residual), new
