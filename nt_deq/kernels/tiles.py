"""Functions of pairs of inputs, evaluated tile by tile.

A solver reads and writes a dozen arrays of the size of the kernel. Tile by tile they stay in the
processor's cache, memory holds one tile of them, and a symmetric kernel costs half of the work.
A pair is one entry, or with spatial axes a block of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import PyTree, Shaped

# A core's cache holds what a step needs of so many entries squared; an accelerator wants more.
_SIDE_ON_CPU, _SIDE = 320, 4096
_LANES = 16  # numbers that a processor takes at once, at the most


def by_tiles(
    fn: Callable[[PyTree, PyTree, PyTree], PyTree],
    rows: PyTree[Shaped[Array, "n1 ..."]],
    columns: PyTree[Shaped[Array, "n2 ..."]],
    pairs: PyTree[Shaped[Array, "n1 n2 ..."]],
    mirror: Callable[[Array], Array] | None,
    block: int = 1,
    least: int = 1,
) -> PyTree[Array]:
    """`fn(rows, columns, pairs)` for an `fn` whose pairs are independent of each other.

    Args:
      fn: gives a pytree of arrays `(n1, n2, ...)`, and of scalars of which the largest counts. Of
        as many rows as columns it gets square tiles, those on the diagonal last.
      rows: a pytree of arrays `(n1, ...)`.
      columns: a pytree of arrays `(n2, ...)`.
      pairs: a pytree of arrays `(n1, n2, ...)`.
      mirror: turns the result for `(i, j)` into that for `(j, i)`; `None` if nothing does.
      block: how many entries a pair has, at the most.
      least: rows and columns that a tile has, however many entries that is.

    Returns:
      What `fn(rows, columns, pairs)` would.
    """
    args = (rows, columns, pairs)
    shape = len(jax.tree.leaves(rows)[0]), len(jax.tree.leaves(columns)[0])
    if fits(shape, block, least):
        return fn(*args)
    on_cpu, elsewhere = (_side(side, block, least) for side in (_SIDE_ON_CPU, _SIDE))
    whole, tiles = (partial(_loop, fn, shape, mirror, side) for side in (elsewhere, on_cpu))
    return lax.platform_dependent(*args, cpu=tiles, default=whole)


def fits(shape: Sequence[int], block: int, least: int = 1) -> bool:
    """Whether the pairs `(n1, n2)` of so many entries are one tile."""
    return max(shape) <= _side(_SIDE_ON_CPU, block, least)


def batch_size(block: int) -> int:
    """How many of a list of pairs of so many entries are as much as one tile."""
    side = _SIDE_ON_CPU if jax.default_backend() == "cpu" else _SIDE
    return max(1, side**2 // block)


def _side(side: int, block: int, least: int) -> int:
    """The side of a tile of blocks that has as many entries as one of single ones."""
    return max(least, math.isqrt(side**2 // block))


def _even(n: int, side: int) -> int:
    """The side of as few tiles of `n` as there can be, so small that they hardly overlap."""
    tiles = math.ceil(n / side)
    return min(n, side, math.ceil(n / (tiles * _LANES)) * _LANES)


def mirrored(diagonal_spatial: bool, a: Array) -> Array:
    """The kernel of `(x', x)` of that of `(x, x')`: every pair of spatial axes in the other order.

    Args:
      diagonal_spatial: whether `a` has one axis where it else has a pair.
      a: `(n1, n2, ...)`.
    """
    axes = list(range(a.ndim))
    for i in range(0, 2 if diagonal_spatial else a.ndim, 2):
        axes[i : i + 2] = i + 1, i
    return jnp.transpose(a, axes)


def _loop(fn, shape, mirror, side, *args):
    size = tuple(_even(n, side) for n in shape)
    if mirror is None:  # flat kernels in flat tiles of the same size
        height = min(shape[0], side**2 // size[1])
        size = height, min(shape[1], side**2 // height)
    found = itertools.product(*map(_starts, shape, size))
    starts = [(row, column) for row, column in found if row <= column or mirror is None]
    starts = np.array(sorted(starts, key=lambda start: start[0] == start[1]), np.int32)

    def tile(start):
        rows, columns, pairs = args
        return fn(
            jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start[0], size[0]), rows),
            jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start[1], size[1]), columns),
            jax.tree.map(
                lambda a: lax.dynamic_slice(a, _corner(start, a), (*size, *a.shape[2:])), pairs
            ),
        )

    def step(i, whole):
        start = jnp.asarray(starts)[i]

        def join(whole, part):
            if part.ndim == 0:
                return jnp.maximum(whole, part)
            whole = lax.dynamic_update_slice(whole, part, _corner(start, part))
            if mirror is None:
                return whole
            return lax.dynamic_update_slice(whole, mirror(part), _corner(start[::-1], part))

        # A branch that is always taken: else XLA:CPU, which drops barriers, computes what is at the
        # end of a tile once for each of its places in the whole.
        part = lax.cond(start[0] >= 0, tile, lambda _: jax.tree.map(jnp.zeros_like, parts), start)
        return jax.tree.map(join, whole, part)

    parts = jax.eval_shape(tile, starts[0])
    whole = jax.tree.map(
        lambda part: jnp.zeros((*shape, *part.shape[2:]) if part.ndim else (), part.dtype), parts
    )
    return lax.fori_loop(0, len(starts), step, whole)


def _corner(start: Array, a: Array) -> tuple[Array, ...]:
    """Where the tile begins in an array like `a`, whose other axes are whole."""
    return (*start, *[jnp.zeros_like(start[0])] * (a.ndim - 2))


def _starts(size: int, tile: int) -> list[int]:
    """Where tiles begin; the last one overlaps the one before, so that all have one size."""
    return [min(i, size - tile) for i in range(0, size, tile)]
