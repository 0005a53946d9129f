"""Conjugate gradients on all right-hand sides at once, refined until the true residual is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_deq._progress import progress_bar
from nt_deq.errors import NotConvergedError, NotPositiveDefiniteError
from nt_deq.regression.layout import in_float64

_PATIENCE = 30  # steps without a new least residual
_ACCURACY = 1e-3  # to which the recurrence of the residual can be trusted, in float32
_MAX_STEPS = 1000


class Solution(NamedTuple):
    """Where conjugate gradients ended.

    Attributes:
      value: `(rows, C)`, sharded by rows.
      steps: products with the kernel in float32.
      residual: `‖b - K value‖/‖b‖` of the worst column, as recomputed in float64 at the end.
      residuals: the same after every step, by the recurrence.
    """

    value: Array
    steps: int
    residual: float
    residuals: list[float]


def solve(
    multiply: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    b: Array,
    *,
    ridge: float,
    tol: float,
    gather: Callable[[Array], np.ndarray],
    multiply_exactly: Callable[[Array], Array] | None = None,
    progress: bool = False,
) -> Solution:
    """Solves `(K + ridge) a = b` by flexible conjugate gradients (Golub & Ye 1999).

    Products within the iteration are in float32, and everything else is in float64. The residual
    that decides is recomputed in float64; where it is not small enough, the iteration goes on from
    it (iterative refinement), so that the accuracy is that of float64.

    Args:
      multiply: `K p`, in the precision of `p`.
      precondition: an approximation of `(K + ridge)⁻¹ r`.
      b: right-hand sides, `(rows, C)`, float64, sharded by rows.
      ridge: what is added to the diagonal.
      tol: the relative residual to reach, of every column.
      gather: makes a small replicated array one of NumPy.
      multiply_exactly: `K p` for the residual that decides; `multiply` without.
      progress: whether to show steps and residual.

    Raises:
      NotPositiveDefiniteError: a direction of negative curvature turned up.
      NotConvergedError: the residual does not fall any more.
    """
    multiply_exactly = multiply_exactly or multiply
    norms = gather(_norms(b))
    size = np.maximum(norms, np.finfo(np.float64).tiny)
    value, r = _zeros_like(b), b
    residuals: list[float] = []
    worst = float((norms / size).max())
    with progress_bar(desc="conjugate gradients", unit="step", disable=not progress) as bar:
        while worst > tol:
            target = max(tol / 2, worst * _ACCURACY)
            p = rz = previous = None
            best, since = np.inf, 0
            while True:
                z = precondition(r)
                p, rz = _direction(z, r, previous, p, rz)
                previous = r
                value, r, norms, curvature = _advance(
                    value, r, p, multiply(p), ridge, target / 2 * size
                )
                _check_curvature(gather(curvature), ridge)
                residual = float((gather(norms) / size).max())
                residuals.append(residual)
                bar.set_postfix_str(f"residual {residual:.1e}", refresh=False)
                bar.update()
                since = 0 if residual < 0.9 * best else since + 1
                best = min(best, residual)
                if residual <= target or since > _PATIENCE or len(residuals) >= _MAX_STEPS:
                    break
            r = _residual(b, multiply_exactly(value), value, ridge)
            before, worst = worst, float((gather(_norms(r)) / size).max())
            if worst > tol and (worst > before / 2 or len(residuals) >= _MAX_STEPS):
                raise NotConvergedError(
                    f"conjugate gradients are at a relative residual of {worst:.2g}, above "
                    f"tol={tol:g}, after {len(residuals)} steps and come no further; take a larger "
                    "rank, a larger diag_reg, or a larger tol."
                )
    return Solution(value, len(residuals), worst, residuals)


def _check_curvature(curvature, ridge):
    if not (curvature >= 0).all():
        raise NotPositiveDefiniteError(
            "the kernel matrix is not positive definite to rounding: pᵀ(K + ridge)p = "
            f"{curvature.min():.3g} with ridge = {ridge:.3g}; take a larger diag_reg, or drop "
            "inputs that are there twice."
        )


@in_float64
@jax.jit
def _norms(r):
    return jnp.linalg.norm(r, axis=0)


@in_float64
@jax.jit
def _zeros_like(b):
    return jnp.zeros_like(b)


@in_float64
@jax.jit
def _direction(z, r, previous, p, rz):
    """The next direction, in float32, so that its product is one of float32 too; and `zᵀr`."""
    new = jnp.sum(z * r, axis=0)
    if p is None:
        return z.astype(jnp.float32), new
    beta = jnp.sum(z * (r - previous), axis=0) / jnp.where(rz == 0, 1, rz)
    return (z + beta * p).astype(jnp.float32), new


@in_float64
@jax.jit
def _advance(value, r, p, product, ridge, enough):
    """The step along `p` to where the error is smallest, of the columns above `enough`."""
    p = p.astype(r.dtype)
    product = product + ridge * p
    active = jnp.linalg.norm(r, axis=0) > enough
    curvature = jnp.where(active, jnp.sum(p * product, axis=0), 0)
    length = jnp.where(active, jnp.sum(p * r, axis=0) / jnp.where(active, curvature, 1), 0)
    r = r - length * product
    return value + length * p, r, jnp.linalg.norm(r, axis=0), curvature


@in_float64
@jax.jit
def _residual(b, product, value, ridge):
    return b - product - ridge * value
