"""Whether a kernel matrix is strictly positive definite."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from nt_deq.errors import ArgumentError


class SmallestEigenvalue(NamedTuple):
    """The smallest eigenvalue of a kernel matrix, and how well it is known.

    Attributes:
      value: computed in float64.
      rounding: bound on what the rounding of the entries, in the matrix's dtype, does to it.
    """

    value: float
    rounding: float

    @property
    def positive(self) -> bool:
        """Whether the matrix is strictly positive definite beyond rounding."""
        return self.value > self.rounding


def smallest_eigenvalue(kernel: Num[ArrayLike, "n n"]) -> SmallestEigenvalue:
    """Computes λ_min, positive for distinct inputs and a φ that is no polynomial (Gao et al. 2023).

    Exceptions, for which 0 is exact: odd φ without bias on `{x, -x}`, homogeneous φ without bias on
    `{x, cx}` with `c > 0`, linear φ on more inputs than features (and a bias).

    Args:
      kernel: `(n, n)`, symmetric.

    Raises:
      ValueError: it is not a symmetric matrix of numbers.
    """
    matrix = np.asarray(kernel)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ArgumentError(f"kernel has shape {matrix.shape}; pass a square matrix (n, n).")
    if not np.isfinite(matrix).all():
        raise ArgumentError("kernel has NaN or infinite entries: it is that of no equilibrium.")
    dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.dtype(np.float64)
    unit, matrix = float(np.finfo(dtype).eps), matrix.astype(np.float64)
    largest, skew = np.abs(matrix).max(), np.abs(matrix - matrix.T).max()
    if skew > 64 * unit * largest:
        raise ArgumentError(
            f"kernel is not symmetric: entries differ by {skew:.2g} from their mirror."
        )
    value = float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
    return SmallestEigenvalue(value, 4 * len(matrix) * unit * float(largest))
