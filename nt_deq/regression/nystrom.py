"""A preconditioner from a few columns of the kernel matrix.

`K ≈ Fᵀ F` with `F (rank, n)` by randomly pivoted Cholesky (Chen, Epperly, Tropp & Webber 2022,
arXiv:2207.06503), a block of pivots at a time (Epperly, Tropp & Webber 2024, arXiv:2410.03969): the
next landmarks are drawn where the approximation is worst. `(Fᵀ F + δ)⁻¹` is then cheap by the
identity of Woodbury, with `δ` the ridge and the mean of what `F` leaves of the diagonal.

Products with `F` are in float32, off by `ε ‖F‖²/δ`, which for many inputs is more than 1: kernels
have a few eigenvalues of the order of `n`. Their eigenvectors are kept apart, in float64.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jax import Array, lax

from nt_deq.regression.layout import before_transpose, in_float64, pad_columns
from nt_deq.regression.matrix import KernelTiles

_BLOCK = 500  # landmarks at a time
_LEADING = 64  # eigenvectors in float64
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
        if self._blocks:
            gram = self._gram()
            self._eigenvalues, self._eigenvectors = self._leading(gram)
            gram[np.diag_indices_from(gram)] += self.delta
            self._factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True)

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

    def _gram(self) -> np.ndarray:
        """`F Fᵀ`, in float64, on every process."""
        size = self.rank // len(self._blocks)
        gram = np.zeros((self.rank, self.rank))
        for i, block in enumerate(self._blocks):
            for j, other in enumerate(self._blocks[: i + 1]):
                part = self.layout.gather(_gram(block, other))
                rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                gram[rows, columns], gram[columns, rows] = part, part.T
        return gram

    def _leading(self, gram: np.ndarray) -> tuple[np.ndarray, Array]:
        """The largest eigenvalues of `Fᵀ F`, and their eigenvectors `(rows, count)`, float64."""
        count = leading_count(self.rank)
        values, combinations = np.zeros(0), np.zeros((self.rank, 0))
        if count:
            values, combinations = scipy.sparse.linalg.eigsh(gram, count, v0=np.ones(self.rank))
        vectors = self.layout.vector(np.zeros((self.layout.n, count)))
        for block, part in zip(self._blocks, self._split(combinations), strict=True):
            vectors = _add_combination(vectors, block, part)
        lower = scipy.linalg.cholesky(self._inner(vectors, vectors), lower=True)
        to_orthonormal = scipy.linalg.solve_triangular(lower, np.eye(count), lower=True).T
        return values, _multiply(vectors, to_orthonormal)

    def __call__(self, v: Array) -> Array:
        """Applies it to `(rows, C)`, float64, sharded by rows."""
        if not self._blocks:
            return _divide(v, self.delta)
        leading = self._inner(self._eigenvectors, v)
        v = _add(v, self._eigenvectors, -leading)
        projected = [self.layout.gather(_project(block, v)) for block in self._blocks]
        solved = scipy.linalg.cho_solve(self._factor, np.concatenate(projected))
        for block, part in zip(self._blocks, self._split(solved), strict=True):
            v = _subtract(v, block, part)
        v = _divide(v, self.delta)
        rounding = self._inner(self._eigenvectors, v)
        of_leading = leading / (self._eigenvalues + self.delta)[:, None]
        return _add(v, self._eigenvectors, of_leading - rounding)

    def _split(self, of_landmarks: np.ndarray) -> list[np.ndarray]:
        """`(rank, C)` by blocks."""
        return np.split(of_landmarks, len(self._blocks))

    def _inner(self, a: Array, b: Array) -> np.ndarray:
        return self.layout.gather(_inner(a, b))


def leading_count(rank: int) -> int:
    """How many eigenvectors are kept in float64, of the approximation of a rank."""
    return min(_LEADING, rank // 2)


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
def _add_combination(v, block, combination):
    """`v + Fᵀ combination`, in float64."""
    product = jnp.einsum("dpr,pc->drc", block.astype(v.dtype), combination, precision=_HIGHEST)
    return v + product.reshape(v.shape)


@in_float64
@jax.jit
def _inner(a, b):
    return jnp.matmul(a.T, b, precision=_HIGHEST)


@in_float64
@jax.jit
def _multiply(v, matrix):
    return jnp.matmul(v, matrix, precision=_HIGHEST)


@in_float64
@jax.jit
def _add(v, vectors, coefficients):
    """`v + vectors · coefficients`."""
    return v + jnp.matmul(vectors, coefficients, precision=_HIGHEST)


@in_float64
@jax.jit
def _divide(v, delta):
    return v / delta
