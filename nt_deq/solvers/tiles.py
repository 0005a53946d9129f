"""Functions of pairs of inputs, evaluated tile by tile.

A solver reads and writes a dozen arrays of the size of the kernel. Tile by tile they stay in the
processor's cache, memory holds one tile of them, and a symmetric kernel costs half of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A core's cache holds what a step needs of a tile; an accelerator wants as many entries as it has.
_SIDE_ON_CPU, _SIDE = 256, 4096


def by_tiles(
    fn: Callable[[Any, Any, Any], Any], rows: Any, columns: Any, pairs: Any, symmetric: bool
) -> Any:
    """`fn(rows, columns, pairs)` for an `fn` whose entries are independent of each other.

    Args:
      fn: gives a pytree of arrays `(n1, n2)`, and of scalars of which the largest counts.
      rows: a pytree of arrays `(n1, ...)`.
      columns: a pytree of arrays `(n2, ...)`.
      pairs: a pytree of arrays `(n1, n2)`.
      symmetric: whether the result for `(j, i)` is that for `(i, j)`.

    Returns:
      What `fn(rows, columns, pairs)` would.
    """
    args = (rows, columns, pairs)
    shape = len(jax.tree.leaves(rows)[0]), len(jax.tree.leaves(columns)[0])
    if max(shape) <= _SIDE_ON_CPU:
        return fn(*args)
    whole, tiles = (partial(_loop, fn, shape, symmetric, side) for side in (_SIDE, _SIDE_ON_CPU))
    return lax.platform_dependent(*args, cpu=tiles, default=whole)


def _loop(fn, shape, symmetric, side, *args):
    size = tuple(min(n, side) for n in shape)
    if not symmetric:  # flat kernels in flat tiles of the same size
        height = min(shape[0], side**2 // size[1])
        size = height, min(shape[1], side**2 // height)
    starts = np.array(
        [
            (row, column)
            for row in _starts(shape[0], size[0])
            for column in _starts(shape[1], size[1])
            if row <= column or not symmetric
        ],
        np.int32,
    )

    def tile(start):
        rows, columns, pairs = args
        return fn(
            jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start[0], size[0]), rows),
            jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start[1], size[1]), columns),
            jax.tree.map(lambda a: lax.dynamic_slice(a, start, size), pairs),
        )

    def step(i, whole):
        start = jnp.asarray(starts)[i]

        def join(whole, part):
            if part.ndim == 0:
                return jnp.maximum(whole, part)
            whole = lax.dynamic_update_slice(whole, part, start)
            return lax.dynamic_update_slice(whole, part.T, start[::-1]) if symmetric else whole

        return jax.tree.map(join, whole, tile(start))

    whole = jax.tree.map(
        lambda part: jnp.zeros(shape if part.ndim else (), part.dtype),
        jax.eval_shape(tile, starts[0]),
    )
    return lax.fori_loop(0, len(starts), step, whole)


def _starts(size: int, tile: int) -> list[int]:
    """Where tiles begin; the last one overlaps the one before, so that all have one size."""
    return [min(i, size - tile) for i in range(0, size, tile)]
