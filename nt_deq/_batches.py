"""Inputs in batches of few sizes, so that a program is not compiled for every number of inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree, Shaped

_LEAST = 32  # rows: fewer take as long


def padded_size(n: int) -> int:
    """The least of 32, 64, 128, 256 and, beyond, of the multiples of 128 that holds `n` rows."""
    return max(_LEAST, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 128) * 128


def pad_rows(x: Shaped[np.ndarray, "n ..."], size: int) -> Shaped[np.ndarray, "{size} ..."]:
    """Repeats the last of the rows `(n, ...)` until there are `size`."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def by_batches(
    fn: Callable[[np.ndarray], PyTree], x: Shaped[np.ndarray, "n ..."], most: int
) -> PyTree[Shaped[np.ndarray, "n ..."]]:
    """`fn(x)` for an `fn` whose rows depend on one row of `x` each.

    Args:
      fn: gives a pytree of arrays `(size, ...)` for a batch `(size, ...)`.
      x: rows, `(n, ...)`, `n >= 1`.
      most: rows of a batch. Fewer rows are padded to `padded_size`, and the last batch to `most`.
    """
    size = min(most, padded_size(len(x)))
    parts = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        found = fn(pad_rows(part, size))
        parts.append(jax.tree.map(partial(_first, len(part)), found))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _first(count: int, array: ArrayLike) -> np.ndarray:
    return np.asarray(array)[:count]
