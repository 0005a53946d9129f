"""How a kernel matrix is cut into tiles, and the tiles are dealt to the devices of a mesh.

The matrix is symmetric, so that the tiles of its lower triangle are all there is to keep. They are
dealt in rounds, one tile per device. Vectors are padded to whole tiles and sharded by rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from nt_deq._jax import enable_x64, shard_map
from nt_deq.errors import LostProcessError

AXIS = "tiles"
_SIDE = 2048  # 16 MB a tile: large enough for full speed, small enough to be passed over


class Round(NamedTuple):
    """One tile per device.

    Attributes:
      rows, columns: `(devices,)`, where each tile is in the grid; `rows >= columns`.
      weights: `(devices,)`, 0 for a tile that only fills up the round.
      diagonal: whether `rows == columns`, for all of them.
    """

    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    diagonal: bool


class Layout:
    """A grid of `tiles × tiles` square tiles of `side` rows over `n` inputs.

    Args:
      n: number of inputs.
      mesh: devices to compute on, in any arrangement, of one or of several processes; `None` is
        the default device of this process.

    Attributes:
      processes: those that the devices belong to, which compute together; others have no part.
      leads: whether this process is the first of them, which tells what is going on.
      tiles: along each side of the grid.
      side: rows of a tile.
      rows: of all tiles, `n` and padding.
      share: rows of each device, where vectors are sharded by rows.
    """

    def __init__(self, n: int, mesh: Mesh | None = None):
        default = list(jnp.zeros(()).devices())  # as jax.default_device says
        devices = np.array(default) if mesh is None else mesh.devices.reshape(-1)
        self.n = n
        self.mesh = Mesh(devices, (AXIS,))
        self.devices = len(devices)
        self.processes = sorted({device.process_index for device in devices})
        self.leads = jax.process_index() == self.processes[0]
        multiple = math.lcm(16, self.devices)
        self.tiles = math.ceil(n / _SIDE)
        self.side = math.ceil(math.ceil(n / self.tiles) / multiple) * multiple
        self.rows = self.tiles * self.side
        self.share = self.rows // self.devices
        self.sharded = NamedSharding(self.mesh, P(AXIS))
        self.replicated = NamedSharding(self.mesh, P())

    @property
    def local_devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        """Those of this process."""
        mine = jax.process_index()
        return [d for d in self.mesh.devices.flat if d.process_index == mine]

    @property
    def triangle(self) -> int:
        """Tiles of the lower triangle."""
        return self.tiles * (self.tiles + 1) // 2

    def rounds(self) -> Iterator[Round]:
        """All tiles of the lower triangle, the diagonal first."""
        diagonal = [(i, i) for i in range(self.tiles)]
        below = [(i, j) for i in range(self.tiles) for j in range(i)]
        yield from self._deal(diagonal, True)
        yield from self._deal(below, False)

    def _deal(self, tiles, diagonal):
        for start in range(0, len(tiles), self.devices):
            dealt = tiles[start : start + self.devices]
            weights = np.arange(self.devices) < len(dealt)
            dealt = dealt + dealt[-1:] * (self.devices - len(dealt))
            rows, columns = np.array(dealt, np.int32).T
            yield Round(rows, columns, weights.astype(np.float32), diagonal)

    def slice(self, tile: int) -> slice:
        """The inputs of a row or column of tiles, without the padding."""
        return slice(tile * self.side, min((tile + 1) * self.side, self.n))

    def put(
        self, fn: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array:
        """Arrays of one `shape` per device, `(devices, *shape)`: `fn(device)` on this process'."""
        return jax.make_array_from_callback(
            (self.devices, *shape),
            self.sharded,
            lambda index: np.asarray(fn(_first(index)), dtype)[None],
        )

    def local(self, array: Shaped[Array, "devices ..."]) -> dict[int, np.ndarray]:
        """What `put` took, of this process' devices."""
        return {
            _first(s.index): np.asarray(np.asarray(s.data)[0]) for s in array.addressable_shards
        }

    def vector(self, value: Float[np.ndarray, "n C"]) -> Float[Array, "rows C"]:
        """Pads `(n, C)` to whole tiles; float64, sharded by rows."""
        padded = np.pad(np.asarray(value, np.float64), ((0, self.rows - self.n), (0, 0)))
        with enable_x64(True):
            return jax.make_array_from_callback(padded.shape, self.sharded, padded.__getitem__)

    def replicate(self, array: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """The whole of a sharded array on every device."""
        return _replicate(array, self.replicated)

    def gather(self, array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """The whole of a sharded array on every process."""
        return np.asarray(self.replicate(array))

    def agree(self, flags: Bool[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Where any of the processes has a flag; each of them has to arrive here first."""
        mine = self.put(lambda device: flags, flags.shape, bool)
        return np.logical_or.reduce(self.gather(mine))

    @cached_property
    def add_product(self) -> Callable[..., Array]:
        """`(y, tile, rows, columns, weights, p) -> y + tiles · p`, one summand `y` a device.

        A tile below the diagonal stands for its mirror image too. Products are in the dtype of
        `p`, sums in that of `y`.
        """

        def product(y, tile, rows, columns, weights, p):
            side = self.side
            row, column = rows[0] * side, columns[0] * side
            tile = tile[0].astype(p.dtype)
            above, left = (jax.lax.dynamic_slice_in_dim(p, at, side) for at in (row, column))

            def add(y, at, product, weight):
                old = jax.lax.dynamic_slice_in_dim(y, at, side)
                new = old + weight.astype(y.dtype) * product.astype(y.dtype)
                return jax.lax.dynamic_update_slice_in_dim(y, new, at, 0)

            with jax.default_matmul_precision("highest"):
                of_rows = (tile @ pad_columns(left))[:, : p.shape[1]]
                of_columns = before_transpose(above.T @ tile).T
            y = add(y[0], row, of_rows, weights[0])
            return add(y, column, of_columns, jnp.where(row == column, 0, weights[0]))[None]

        mapped = shard_map(
            product, self.mesh, (P(AXIS), P(AXIS), P(AXIS), P(AXIS), P(AXIS), P()), P(AXIS)
        )
        return in_float64(jax.jit(mapped, donate_argnums=0))

    @cached_property
    def zeros(self) -> Callable[[int], Array]:
        """Zeros for `add_product`, `(devices, rows, columns)`."""

        def zeros(columns):
            return jnp.zeros((self.devices, self.rows, columns), jnp.float64)

        return in_float64(jax.jit(zeros, static_argnums=0, out_shardings=self.sharded))

    @cached_property
    def sum(self) -> Callable[[Array], Array]:
        """Adds up what the devices have of a product, sharded by rows; 0 in the padding."""

        def total(y):
            y = jax.lax.psum_scatter(y[0], AXIS, tiled=True)
            first = jax.lax.axis_index(AXIS) * self.share
            rows = first + jnp.arange(self.share, dtype=first.dtype)
            return jnp.where(rows[:, None] < self.n, y, 0)

        return in_float64(jax.jit(shard_map(total, self.mesh, (P(AXIS),), P(AXIS))))


def pad_columns(vectors: Array) -> Array:
    """Makes the columns a multiple of 16: XLA on a CPU multiplies by 16 faster than by 10."""
    return jnp.pad(vectors, ((0, 0), (0, -vectors.shape[1] % 16)))


def before_transpose(product: Array) -> Array:
    """Lets XLA on a CPU not merge a product with the transpose after it, which is slow."""
    return jax.lax.optimization_barrier(product)


def _first(index: tuple[slice, ...] | None) -> int:
    assert index is not None  # of an array that is on this process' devices
    return index[0].start or 0


def in_float64(fn: Callable) -> Callable:
    """Runs a compiled function on arrays of float64, whatever the default dtype is."""

    @wraps(fn)
    def wrapped(*args):
        with enable_x64(True):
            return fn(*args)

    return wrapped


@in_float64
@partial(jax.jit, static_argnums=1)
def _replicate(array, sharding):
    return jax.lax.with_sharding_constraint(array, sharding)


@contextlib.contextmanager
def lost_process(layout: Layout) -> Iterator[None]:
    """Says of a failed collective what to do about it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if len(layout.processes) == 1:
            raise
        raise LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} lost contact to another one "
            f"({str(error).splitlines()[0]}); start all of them again: with store=... they go on "
            "from the tiles that are finished."
        ) from error
