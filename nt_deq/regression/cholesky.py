"""The Cholesky factor of a kernel matrix, in the place of its only copy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import get_lapack_funcs, solve_triangular

from nt_deq.errors import NotPositiveDefiniteError
from nt_deq.regression.matrix import KernelTiles, Recomputed, watched

_COLUMNS = 512  # of the inverse factor, at a time


class Cholesky:
    """`(K + noise)⁻¹`, in float64: `8 n²` bytes.

    Args:
      kernel: whose matrix it is.
      noise: what is added to the diagonal.
      progress: whether to show how far the kernel is.

    Raises:
      NotPositiveDefiniteError: it has no factor.
    """

    def __init__(self, kernel: KernelTiles, noise: float, progress: bool):
        layout = kernel.layout
        matrix = np.empty((layout.n, layout.n), order="F")  # as LAPACK takes it without a copy
        for round_, tiles in watched(Recomputed(kernel).tiles(), layout, progress):
            for device, tile in layout.local(tiles).items():
                rows, columns = (
                    layout.slice(int(i[device])) for i in (round_.rows, round_.columns)
                )
                matrix[rows, columns] = tile[
                    : rows.stop - rows.start, : columns.stop - columns.start
                ]
        matrix[np.diag_indices(layout.n)] += noise
        factorise, self._substitute = get_lapack_funcs(("potrf", "potrs"), (matrix,))
        self._factor, info = factorise(matrix, lower=1, clean=0, overwrite_a=1)
        if info:
            raise NotPositiveDefiniteError(
                f"the kernel matrix is not positive definite to rounding (at input {info - 1}) "
                f"with a noise of {noise:.3g}; take a larger relative_noise, or drop inputs that "
                "are there twice."
            )

    def solve(self, b: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
        """Solves for right-hand sides `(n, C)`."""
        return self._substitute(self._factor, b, lower=1)[0]

    def inverse_diagonal(self) -> Float[np.ndarray, " n"]:
        """The diagonal of `(K + noise)⁻¹ = L⁻ᵀ L⁻¹`, `(n,)`, in the time of three fits.

        It is the sums of squares of the columns of `L⁻¹`: a few at a time, so that no other matrix
        is made.
        """
        n = len(self._factor)
        diagonal = np.empty(n)
        for start in range(0, n, _COLUMNS):
            units = np.zeros((n, min(_COLUMNS, n - start)), order="F")
            units[start + np.arange(units.shape[1]), np.arange(units.shape[1])] = 1
            columns = solve_triangular(
                self._factor, units, lower=True, overwrite_b=True, check_finite=False
            )
            diagonal[start : start + _COLUMNS] = np.sum(columns**2, axis=0)
        return diagonal
