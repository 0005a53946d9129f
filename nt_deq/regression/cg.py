"""Conjugate gradients on all right-hand sides at once, refined until the true residual is small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from nt_deq._progress import progress_bar
from nt_deq.errors import NotConvergedError, NotPositiveDefiniteError
from nt_deq.regression.layout import in_float64
from nt_deq.regression.matrix import Recomputed

_PATIENCE = 30  # steps without a new least residual
_ACCURACY = 1e-3  # to which the recurrence of the residual can be trusted, in float32
_MAX_STEPS = 1000


class Solution(NamedTuple):
    """Where conjugate gradients ended.

    Attributes:
      value: `(K + noise)⁻¹ b`, `(n, C)`, float64.
      steps: products with the kernel in float32.
      relative_residual: `‖b - (K + noise) value‖/‖b‖` of the worst column, as recomputed in
        float64 at the end.
      relative_residuals: the same after every step, by the recurrence.
    """

    value: Float[np.ndarray, "n C"]
    steps: int
    relative_residual: float
    relative_residuals: list[float]

    def __str__(self) -> str:
        """One line for the user."""
        return f"{self.steps} steps, relative residual {self.relative_residual:.1e}"


class ConjugateGradients:
    """`(K + noise)⁻¹` by flexible conjugate gradients (Golub & Ye 1999).

    Products within the iteration are in float32, and everything else is in float64. The residual
    that decides is recomputed in float64; where it is not small enough, the iteration goes on from
    it (iterative refinement), so that the accuracy is that of float64. A product in float32 is off
    by up to `ε ‖K‖`, which of many inputs that are the same is more than the noise: where that
    leads nowhere, the iteration goes on with products in float64.

    Args:
      matrix: `K`; its products are in the precision of the vectors.
      precondition: an approximation of `(K + noise)⁻¹ r`.
      noise: what is added to the diagonal.
      relative_residual: to reach, in every column.
      exact: `K` for the residual that decides; `matrix` without.
    """

    def __init__(
        self,
        matrix: Recomputed,
        precondition: Callable[[Array], Array],
        noise: float,
        relative_residual: float,
        exact: Recomputed | None = None,
    ):
        self.matrix, self.exact = matrix, exact or matrix
        self.precondition, self.noise = precondition, noise
        self.relative_residual = relative_residual

    def solve(self, b: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
        """Solves for right-hand sides `(n, C)`; errors are those of `iterate`."""
        return self.iterate(b).value

    def iterate(self, b: Float[np.ndarray, "n C"], progress: bool = False) -> Solution:
        """Solves for right-hand sides `(n, C)`, and tells how; `progress` shows every step.

        Raises:
          NotPositiveDefiniteError: a direction of negative curvature turned up.
          NotConvergedError: the residual does not fall any more, or is NaN.
        """
        layout, tolerance = self.matrix.layout, self.relative_residual
        right = layout.vector(b)
        size = np.maximum(layout.gather(_norms(right)), np.finfo(np.float64).tiny)

        def largest(norms):
            return float((layout.gather(norms) / size).max())

        value, r = _zeros_like(right), right
        worst, residuals = largest(_norms(r)), []
        products = [(self.exact, np.float64), (self.matrix, np.float32)]
        quiet = not (progress and layout.leads)
        with progress_bar(desc="conjugate gradients", unit="step", disable=quiet) as bar:
            while not worst <= tolerance:
                target = max(tolerance / 2, worst * _ACCURACY)
                steps = self._steps(*products[-1], value, r, target / 2 * size)
                best, since, found = np.inf, 0, value
                try:
                    while True:
                        found, norms, curvature = next(steps)
                        _check_curvature(layout.gather(curvature), self.noise)
                        residual = largest(norms)
                        residuals.append(residual)
                        bar.set_postfix_str(f"residual {residual:.1e}", refresh=False)
                        bar.update()
                        since = 0 if residual < 0.9 * best else since + 1
                        best = min(best, residual)
                        if residual <= target or since > _PATIENCE or len(residuals) >= _MAX_STEPS:
                            break
                    left = _residual(right, self.exact.multiply(found), found, self.noise)
                    reached = largest(_norms(left))
                    if not (reached <= tolerance or reached <= worst / 2):
                        raise NotConvergedError(
                            f"conjugate gradients are at a relative residual of {reached:.2g}, "
                            f"above relative_residual={tolerance:g}, after {len(residuals)} steps "
                            "and come no further; take a larger rank, a larger relative_noise, or "
                            "a larger relative_residual."
                        )
                except (NotConvergedError, NotPositiveDefiniteError):
                    products.pop()
                    if not products or len(residuals) >= _MAX_STEPS:
                        raise
                else:
                    value, r, worst = found, left, reached
        return Solution(layout.gather(value)[: len(b)], len(residuals), worst, residuals)

    def _steps(self, matrix, dtype, value, r, enough):
        """Steps from `value` with the residual `r`, with products of `matrix` in `dtype`.

        Yields:
          The next value, the norms of its residual by the recurrence, and the curvature `pᵀ(K +
          noise)p` met on the way. Columns whose norm is `enough` stay as they are.
        """
        p = rz = previous = None
        while True:
            z = self.precondition(r)
            p, rz = _direction(z, r, previous, p, rz, dtype)
            previous = r
            product = matrix.multiply(p)
            value, r, norms, curvature = _advance(value, r, p, product, self.noise, enough)
            yield value, norms, curvature


def _check_curvature(curvature, noise):
    if np.isnan(curvature).any():
        raise NotConvergedError(
            "conjugate gradients met NaN or infinite numbers: scale the kernel or the targets to "
            "numbers of the order of 1."
        )
    if not (curvature >= 0).all():
        raise NotPositiveDefiniteError(
            "the kernel matrix is not positive definite to rounding: pᵀ(K + noise)p = "
            f"{curvature.min():.3g} with a noise of {noise:.3g}; take a larger relative_noise, or "
            "drop inputs that are there twice, or give inputs of float64 (jax_enable_x64)."
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
@partial(jax.jit, static_argnums=5)
def _direction(z, r, previous, p, rz, dtype):
    """The next direction, in the dtype that its product is to be one of; and `zᵀr`."""
    new = jnp.sum(z * r, axis=0)
    if p is None:
        return z.astype(dtype), new
    beta = jnp.sum(z * (r - previous), axis=0) / jnp.where(rz == 0, 1, rz)
    return (z + beta[None] * p.astype(z.dtype)).astype(dtype), new


@in_float64
@jax.jit
def _advance(value, r, p, product, noise, enough):
    """The step along `p` to where the error is smallest, of the columns above `enough`."""
    p = p.astype(r.dtype)
    product = product + noise * p
    active = jnp.linalg.norm(r, axis=0) > enough
    curvature = jnp.where(active, jnp.sum(p * product, axis=0), 0)
    length = jnp.where(active, jnp.sum(p * r, axis=0) / jnp.where(active, curvature, 1), 0)
    length = length[None]
    r = r - length * product
    return value + length * p, r, jnp.linalg.norm(r, axis=0), curvature


@in_float64
@jax.jit
def _residual(b, product, value, noise):
    return b - product - noise * value
