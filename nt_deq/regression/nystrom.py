"""A preconditioner from a few columns of the kernel matrix.

`K ≈ Fᵀ F` with `F (rank, n)` by randomly pivoted Cholesky (Chen, Epperly, Tropp & Webber 2022,
arXiv:2207.06503), a block of pivots at a time (Epperly, Tropp & Webber 2024, arXiv:2410.03969): the
next landmarks are drawn where the approximation is worst. `(Fᵀ F + δ)⁻¹` is then cheap by the
identity of Woodbury, with `δ` the noise and the mean of what `F` leaves of the diagonal.

Products with `F` are in float32, off by `ε ‖F‖²/δ`, which for many inputs is more than 1: kernels
have a few eigenvalues of the order of `n`. Their eigenvectors are kept apart, in float64.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jax import Array, lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, PyTree

from nt_deq._jax import enable_x64, shard_map
from nt_deq.errors import NotPositiveDefiniteError
from nt_deq.regression.layout import AXIS, before_transpose, in_float64, pad_columns
from nt_deq.regression.matrix import KernelTiles
from nt_deq.regression.pivoted import inverse_factor

_BLOCK = 500  # landmarks at a time
_LEADING = 64  # eigenvectors in float64
_ROUNDING = 4e-6  # of the largest variance: float32 knows no more of what is left
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class _Approximation(NamedTuple):
    """`Fᵀ F + δ`.

    Attributes:
      blocks: the rows of `F`, `(devices, landmarks, share)` each, float32, sharded by columns.
      factor: the lower Cholesky factor of `F Fᵀ + δ`, `(rank, rank)`, float64.
      eigenvalues: the largest of `Fᵀ F`, `(count,)`.
      eigenvectors: theirs, `(rows, count)`, sharded by rows.
      delta: `δ`.
    """

    blocks: tuple[Float[Array, "devices landmarks share"], ...]
    factor: Float[Array, "rank rank"]
    eigenvalues: Float[Array, " count"]
    eigenvectors: Float[Array, "rows count"]
    delta: Float[Array, ""]


class Nystrom:
    """`v ↦ (Fᵀ F + δ)⁻¹ v`.

    Args:
      kernel: whose matrix is approximated.
      rank: number of landmarks, at most: there are fewer where they determine all others.
      noise: what is added to the kernel's diagonal.
      seed: of the choice of landmarks.

    Attributes:
      rank: of the approximation.
    """

    def __init__(self, kernel: KernelTiles, rank: int, noise: float, seed: int = 0):
        self.layout = kernel.layout
        blocks, left = self._blocks(kernel, rank, np.random.default_rng(seed))
        if not blocks:
            raise NotPositiveDefiniteError("the kernel of every input with itself is 0.")
        gram = self.layout.gather(_gram(blocks)).copy()
        self.rank = len(gram)
        values, combinations = _spectrum(gram)
        delta = float(left.mean()) + noise
        gram[np.diag_indices_from(gram)] += delta
        factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True)
        with enable_x64(True):  # once, and not at every call
            factor, values, delta = jax.device_put((factor, values, delta), self.layout.replicated)
        vectors = _eigenvectors(blocks, combinations)
        self.approximation = _Approximation(blocks, factor, values, vectors, delta)
        rows, everywhere = P(AXIS), P()
        specs: PyTree[P] = (rows, everywhere, everywhere, rows, everywhere)
        specs = _Approximation(*specs)
        self.solve = in_float64(jax.jit(shard_map(_solve, self.layout.mesh, (specs, rows), rows)))

    def __call__(self, v: Float[Array, "rows C"]) -> Float[Array, "rows C"]:
        """Applies it to `(rows, C)`, float64, sharded by rows."""
        return self.solve(self.approximation, v)

    def _blocks(
        self, kernel: KernelTiles, rank: int, rng: np.random.Generator
    ) -> tuple[tuple[Array, ...], np.ndarray]:
        """The blocks of `F`, and what they leave of the kernel's diagonal, `(n,)`."""
        layout, blocks = self.layout, ()
        left = kernel.diagonal.copy()
        rounding = _ROUNDING * left.max()
        while True:
            landmarks = sum(block.shape[1] for block in blocks)
            size = min(_BLOCK, rank - landmarks, int((left > rounding).sum()))
            if size == 0:
                return blocks, left
            pivots = rng.choice(len(left), size, replace=False, p=left / left.sum())
            parts = [part for _, part in kernel.against(kernel.x[pivots])]
            places = pivots // layout.share, pivots % layout.share
            remainder, among = _remainder(parts, blocks, places, layout.n)
            among = layout.gather(among).astype(np.float64)
            kept, inverse = inverse_factor((among + among.T) / 2, rounding)
            block, squares = _combine(remainder, kept, inverse.astype(np.float32))
            blocks = (*blocks, block)
            left = np.maximum(left - layout.gather(squares)[: layout.n], 0)
            if not len(kept):
                return blocks, left


def _spectrum(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of `Fᵀ F`, and `c (rank, count)` with the eigenvectors `Fᵀ c`."""
    rank = len(gram)
    if rank <= _LEADING:
        values, combinations = np.linalg.eigh(gram)
    else:
        values, combinations = scipy.sparse.linalg.eigsh(gram, _LEADING, v0=np.ones(rank))
    known = values > _ROUNDING * np.trace(gram)
    return values[known], combinations[:, known] / np.sqrt(values[known])


def leading_count(rank: int) -> int:
    """How many eigenvectors are kept in float64, of the approximation of a rank."""
    return min(_LEADING, rank)


@partial(jax.jit, static_argnums=3)
def _remainder(parts, blocks, places, n):
    """What the blocks leave of the kernel of new landmarks, with all inputs and among themselves.

    Args:
      parts: of that kernel, `(devices, landmarks, part)`, one after the other.
      blocks: of `F`.
      places: the landmarks' devices, and where in the share of each they are.
      n: number of inputs.

    Returns:
      `(devices, landmarks, share)` and `(landmarks, landmarks)`.
    """
    kernel = jnp.concatenate(parts, axis=2).astype(jnp.float32)
    devices, _, share = kernel.shape
    row = jnp.arange(devices)[:, None] * share + jnp.arange(share)[None, :]
    kernel = jnp.where((row < n)[:, None], kernel, 0)  # nothing in the padding
    of_device, of_share = places
    for block in blocks:
        kernel -= _einsum("pf,dfr->dpr", block[of_device, :, of_share], block)
    return kernel, kernel[of_device, :, of_share]


@jax.jit
def _combine(remainder, kept, inverse):
    """The block of `F` of landmarks that are kept, and the squares of its columns, `(rows,)`."""
    block = _einsum("pq,dqr->dpr", inverse, remainder[:, kept])
    return block, jnp.sum(block * block, axis=1).reshape(-1)


@in_float64
@jax.jit
def _gram(blocks):
    """`F Fᵀ`, in float64."""
    lower = [
        [_einsum("dpr,dqr->pq", *(c.astype(jnp.float64) for c in (a, b))) for b in blocks[: i + 1]]
        for i, a in enumerate(blocks)
    ]
    every = range(len(blocks))
    return jnp.block([[lower[i][j] if i >= j else lower[j][i].T for j in every] for i in every])


def _split(of_landmarks, blocks):
    """`(rank, C)` by blocks."""
    ends = np.cumsum([block.shape[1] for block in blocks])
    return jnp.split(of_landmarks, ends[:-1])


@in_float64
@jax.jit
def _eigenvectors(blocks, combinations):
    """`Fᵀ combinations`, made orthonormal: `(rows, count)`, float64."""
    vectors = jnp.zeros((), combinations.dtype)
    for block, part in zip(blocks, _split(combinations, blocks), strict=True):
        vectors += _einsum("dpr,pc->drc", block.astype(part.dtype), part)
    vectors = vectors.reshape(-1, combinations.shape[1])
    lower = jnp.linalg.cholesky(_matmul(vectors.T, vectors))
    return _matmul(vectors, solve_triangular(lower, jnp.eye(len(lower)), lower=True).T)


def _solve(approximation, v):
    """`(Fᵀ F + δ)⁻¹ v` by Woodbury, of each device's rows `(share, C)`.

    What is along the leading eigenvectors is divided by their eigenvalues. It does not pass through
    `F`, whose products are in float32: it is taken out before, and what rounding brings back after.
    """
    blocks, factor, eigenvalues, eigenvectors, delta = approximation
    columns = v.shape[1]

    def along(v):
        return lax.psum(_matmul(eigenvectors.T, v), AXIS)

    leading = along(v)
    v = v - _matmul(eigenvectors, leading)

    narrow = pad_columns(v.astype(jnp.float32))
    projected = jnp.concatenate([_matmul(block[0], narrow) for block in blocks])
    projected = lax.psum(projected[:, :columns], AXIS)
    solved = cho_solve((factor, True), projected.astype(v.dtype)).astype(jnp.float32)
    for block, part in zip(blocks, _split(solved, blocks), strict=True):
        v = v - before_transpose(_matmul(part.T, block[0])).T.astype(v.dtype)
    v = v / delta

    return v + _matmul(eigenvectors, leading / (eigenvalues + delta)[:, None] - along(v))
