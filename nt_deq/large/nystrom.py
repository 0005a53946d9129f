"""A preconditioner from a few columns of the kernel matrix.

`K ≈ Fᵀ F` with `F (rank, n)` by randomly pivoted Cholesky (Chen, Epperly, Tropp & Webber 2022,
arXiv:2207.06503), a block of pivots at a time (Epperly, Tropp & Webber 2024, arXiv:2410.03969): the
next landmarks are drawn where the approximation is worst. `(Fᵀ F + δ)⁻¹` is then cheap by the
identity of Woodbury, with `δ` the ridge and the mean of what `F` leaves of the diagonal.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax

from nt_deq.large.layout import before_transpose, in_float64, pad_columns
from nt_deq.large.matrix import KernelTiles

_BLOCK = 500  # landmarks at a time
_HIGHEST = lax.Precision.HIGHEST


class Nystrom:
    """`v ↦ (Fᵀ F + δ)⁻¹ v`.

    Args:
      compute: the kernel.
      diagonal: of the kernel matrix, `(n,)`.
      rank: number of landmarks.
      ridge: what is added to the kernel's diagonal.
      seed: of the choice of landmarks.
    """

    def __init__(
        self, compute: KernelTiles, diagonal: np.ndarray, rank: int, ridge: float, seed: int = 0
    ):
        self.layout = compute.layout
        self._blocks: list[Array] = []
        left = diagonal.astype(np.float64)
        rng = np.random.default_rng(seed)
        enough = 1e-6 * diagonal.max()  # float32 knows no more of what is left
        size = min(_BLOCK, rank)
        for _ in range(-(-rank // size)):
            if (left > enough).sum() < size:
                break
            pivots = rng.choice(len(left), size, replace=False, p=left / left.sum())
            block = self._block(compute, pivots, enough)
            self._blocks.append(block)
            squares = self.layout.gather(_column_squares(block))[: len(left)]
            left = np.maximum(left - squares, 0)
        self.rank = size * len(self._blocks)
        self.delta = float(left.mean()) + ridge
        self._factor = self._factorise() if self._blocks else None

    def _block(self, compute: KernelTiles, pivots: np.ndarray, rounding: float) -> Array:
        """The next rows of `F`, `(devices, landmarks, share)`: sharded by columns."""
        layout = self.layout
        of_device, of_share = pivots // layout.share, pivots % layout.share

        def at_pivots(block):
            return layout.gather(block[of_device, :, of_share]).T

        parts = [kernel for _, kernel in compute.against(compute.x[pivots])]
        kernel = _join(parts, layout.n)
        for block in self._blocks:
            kernel = _deflate(kernel, block, at_pivots(block))
        among = at_pivots(kernel).astype(np.float64)
        among = (among + among.T) / 2
        among[np.diag_indices_from(among)] += rounding
        lower = scipy.linalg.cholesky(among, lower=True)
        inverse = scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True)
        return _combine(inverse.astype(np.float32), kernel)

    def _factorise(self) -> Any:
        """The Cholesky factor of `F Fᵀ + δ`, in float64, on every process."""
        size = self.rank // len(self._blocks)
        gram = np.zeros((self.rank, self.rank))  # its lower triangle
        for i, block in enumerate(self._blocks):
            for j, other in enumerate(self._blocks[: i + 1]):
                part = self.layout.gather(_gram(block, other))
                gram[i * size : (i + 1) * size, j * size : (j + 1) * size] = part
        gram[np.diag_indices_from(gram)] += self.delta
        return scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True)

    def __call__(self, v: Array) -> Array:
        """Applies it to `(rows, C)`, float64, sharded by rows."""
        if not self._blocks:
            return _divide(v, self.delta)
        projected = [self.layout.gather(_project(block, v)) for block in self._blocks]
        solved = scipy.linalg.cho_solve(self._factor, np.concatenate(projected))
        for block, part in zip(self._blocks, np.split(solved, len(self._blocks)), strict=True):
            v = _subtract(v, block, part)
        return _divide(v, self.delta)


@partial(jax.jit, static_argnums=1)
def _join(parts, n):
    """One block of all parts, with zeros for the padding."""
    kernel = jnp.concatenate(parts, axis=2)
    devices, _, share = kernel.shape
    row = jnp.arange(devices)[:, None] * share + jnp.arange(share)
    return jnp.where((row < n)[:, None], kernel, 0).astype(jnp.float32)


@partial(jax.jit, donate_argnums=0)
def _deflate(kernel, block, at_pivots):
    return kernel - jnp.einsum("fp,dfr->dpr", at_pivots, block, precision=_HIGHEST)


@jax.jit
def _combine(inverse, kernel):
    return jnp.einsum("pq,dqr->dpr", inverse, kernel, precision=_HIGHEST)


@jax.jit
def _column_squares(block):
    return jnp.sum(block * block, axis=1).reshape(-1)


@in_float64
@jax.jit
def _gram(a, b):
    products = jnp.einsum("dpr,dqr->dpq", a, b, precision=_HIGHEST)
    return products.astype(jnp.float64).sum(0)


def _by_device(v, block):
    return v.reshape(block.shape[0], block.shape[2], -1)


@in_float64
@jax.jit
def _project(block, v):
    """`F v`."""
    padded = _by_device(pad_columns(v.astype(jnp.float32)), block)
    products = jnp.einsum("dpr,drc->dpc", block, padded, precision=_HIGHEST)
    return products[..., : v.shape[1]].sum(0)


@in_float64
@jax.jit
def _subtract(v, block, solved):
    """`v - Fᵀ solved`."""
    product = jnp.einsum("pc,dpr->cdr", solved.astype(jnp.float32), block, precision=_HIGHEST)
    return v - before_transpose(product).transpose(1, 2, 0).reshape(v.shape)


@in_float64
@jax.jit
def _divide(v, delta):
    return v / delta
