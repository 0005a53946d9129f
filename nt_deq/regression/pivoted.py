"""A Cholesky factor of what may be singular to rounding, by pivots."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import linalg

from nt_deq.errors import ArgumentError


def rounding_norm(size: int, largest: float, dtype: np.dtype) -> float:
    """The norm of what rounds the entries of a symmetric matrix, where the largest is `largest`.

    Entries are rounded as if by chance (Higham & Mary 2019), and the errors have the norm `2√size`.
    """
    return 8 * size**0.5 * float(np.finfo(dtype).eps) * largest


def inverse_factor(
    matrix: Float[np.ndarray, "m m"], tolerance: float
) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, "r r"]]:
    """Of a positive semi-definite matrix, which rows to keep, and `R⁻¹` of the `R Rᵀ` of these.

    Rows that the others determine to within `tolerance` are left out (LAPACK's pstrf, in float64).

    Raises:
      ArgumentError: what is left of a row is below `-100 tolerance`.
    """
    variances = np.diagonal(matrix).astype(np.float64)
    pstrf, trtri = linalg.get_lapack_funcs(("pstrf", "trtri"), dtype=np.float64)
    factor, pivots, rank, _ = pstrf(matrix.astype(np.float64), tol=tolerance, lower=1)
    order = pivots - 1
    # Of what no row was kept for, nothing but rounding may be left.
    left = variances[order[rank:]] - np.sum(factor[rank:, :rank] ** 2, axis=1)
    if rank == 0 or variances.min() < -100 * tolerance or np.any(left < -100 * tolerance):
        raise ArgumentError("the kernel of the landmarks is not positive semi-definite.")
    return order[:rank], trtri(np.tril(factor[:rank, :rank]), lower=1)[0]
