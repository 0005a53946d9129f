"""The kernel matrix of a training set: its tiles are kept in memory, on disk, or nowhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from nt_deq._bridges import shard_map
from nt_deq._progress import progress_bar
from nt_deq.errors import NoEquilibriumError
from nt_deq.regression.layout import AXIS, Layout, Round
from nt_deq.regression.store import Store


class KernelTiles:
    """Computes tiles of the kernel of `x` with itself, and of `x` with other inputs.

    Args:
      kernel_fn: any stax `kernel_fn(x1, x2, get)`.
      get: 'nngp' or 'ntk'.
      layout: how the tiles are dealt.
      x: training inputs, `(n, ...)`.
    """

    def __init__(self, kernel_fn: Callable[..., Any], get: str, layout: Layout, x: np.ndarray):
        self.kernel_fn, self.get, self.layout, self.x = kernel_fn, get, layout, x
        mapped = partial(shard_map, mesh=layout.mesh)
        tile, each = P(AXIS), (P(AXIS), P(AXIS))

        def finite(kernel):
            return kernel[None], jnp.isfinite(kernel).all()[None]

        def diagonal(x1, x2):
            del x2  # so that the kernel function knows that they are the same
            return finite(kernel_fn(x1[0], None, get))

        def off_diagonal(x1, x2):
            return finite(kernel_fn(x1[0], x2[0], get))

        def cross(x1, x2):
            return finite(kernel_fn(x1, x2[0], get))

        self._diagonal = jax.jit(mapped(diagonal, in_specs=each, out_specs=(tile, tile)))
        self._off_diagonal = jax.jit(mapped(off_diagonal, in_specs=each, out_specs=(tile, tile)))
        self._cross = jax.jit(mapped(cross, in_specs=(P(), tile), out_specs=(tile, tile)))
        self._variances = jax.jit(lambda x: jnp.diagonal(kernel_fn(x, None, get)))

    def inputs(self, tiles: np.ndarray) -> Array:
        """The inputs of one tile a device, `(devices, side, ...)`, the first input as padding."""
        side = self.layout.side

        def rows(device):
            x = self.x[self.layout.slice(int(tiles[device]))]
            padding = np.broadcast_to(self.x[:1], (side - len(x), *self.x.shape[1:]))
            return np.concatenate([x, padding]) if len(padding) else x

        return self.layout.put(rows, (side, *self.x.shape[1:]), self.x.dtype)

    def __call__(self, round_: Round) -> Array:
        """The tiles of a round, `(devices, side, side)`.

        Raises:
          NoEquilibriumError, NotConvergedError: what `kernel_fn` says of these inputs.
        """
        fn = self._diagonal if round_.diagonal else self._off_diagonal
        tiles, finite = fn(self.inputs(round_.rows), self.inputs(round_.columns))
        for device, is_finite in self.layout.local(finite).items():
            if not is_finite:
                row, column = (self.layout.slice(int(i[device])) for i in round_[:2])
                self._fail(self.x[row], self.x[column], f"inputs {row} and {column}")
        return tiles

    def variances(self, x: np.ndarray) -> np.ndarray:
        """The kernel of every one of a few inputs `(m, ...)` with itself, `(m,)`, float64."""
        variances = np.asarray(self._variances(x), np.float64)
        if not np.isfinite(variances).all():
            self._fail(x, None, "inputs with themselves")
        return variances

    def _fail(self, x1, x2, where):
        self.kernel_fn(x1, None, self.get)  # outside of jit it says what is wrong
        self.kernel_fn(x1, x2, self.get)
        raise NoEquilibriumError(
            f"kernel_fn(x1, x2, get={self.get!r}) is NaN or infinite for some of the {where}: look "
            "at it there."
        )

    def against(self, others: np.ndarray) -> Iterator[tuple[slice, Array]]:
        """The kernel of other inputs `(m, ...)` with the training inputs, part by part.

        Yields:
          Which of each device's training inputs, and `(devices, m, part)`: sharded by them.
        """
        layout = self.layout
        parts = math.ceil(layout.share / layout.side)
        size = math.ceil(layout.share / parts)
        others = jax.device_put(others, layout.replicated)
        for start in range(0, layout.share, size):
            part = slice(start, min(start + size, layout.share))

            def rows(device, part=part):
                of_device = device * layout.share + np.arange(part.start, part.start + size)
                return self.x[np.where(of_device < layout.n, of_device, 0)]

            inputs = layout.put(rows, (size, *self.x.shape[1:]), self.x.dtype)
            kernel, finite = self._cross(others, inputs)
            if not all(map(np.all, layout.local(finite).values())):
                self._fail(np.asarray(others), None, "inputs with the training inputs")
            yield part, kernel[:, :, : part.stop - part.start]


class Recomputed:
    """The kernel matrix, kept nowhere: every product computes all of its tiles."""

    def __init__(self, compute: KernelTiles):
        self.compute, self.layout = compute, compute.layout

    def build(self, progress: bool) -> None:
        """Nothing to do."""

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """All tiles of the lower triangle, a round at a time."""
        for round_ in self.layout.rounds():
            yield round_, self.compute(round_)

    def multiply(self, p: Array) -> Array:
        """`K p` for `p (rows, C)`, sharded by rows, with products in the dtype of `p`."""
        layout = self.layout
        y = layout.zeros(p.shape[1])
        p = layout.replicate(p)
        for round_, tile in self.tiles():
            y = layout.add_product(y, tile, round_.rows, round_.columns, round_.weights, p)
            y.block_until_ready()  # else tiles pile up in memory, faster than they are multiplied
        return layout.sum(y)


class InMemory(Recomputed):
    """The tiles of the lower triangle, on the devices."""

    def build(self, progress: bool) -> None:
        """Computes all tiles."""
        rounds = watched(super().tiles(), self.layout, progress)
        self._tiles = [(round_, tile.astype(jnp.float32)) for round_, tile in rounds]

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """As they were built."""
        return iter(self._tiles)


class Stored(Recomputed):
    """The tiles in a `Store`: every product reads them, the next ones while it computes."""

    def __init__(self, compute: KernelTiles, store: Store):
        super().__init__(compute)
        self.store = store

    def build(self, progress: bool) -> None:
        """Computes the tiles that the store lacks."""
        layout = self.layout
        finished = np.zeros((layout.tiles, layout.tiles), bool)
        if jax.process_index() == 0:
            for tile in self.store.finished():
                finished[tile] = True
        if jax.process_count() > 1:  # all have to agree on what they compute together
            finished = multihost_utils.broadcast_one_to_all(finished)

        def built():
            for round_ in layout.rounds():
                if not finished[round_.rows, round_.columns].all():
                    tiles = layout.local(self.compute(round_))
                    for device, i, j in _mine(layout, round_):
                        if not finished[i, j]:
                            tile = tiles[device][: layout.n - i * layout.side]
                            self.store.write(i, j, tile[:, : layout.n - j * layout.side])
                yield round_, None

        for _ in watched(built(), layout, progress):
            pass
        self.store.flush()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("stored")

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """Read from the store, two rounds ahead."""
        layout, side = self.layout, self.layout.side
        queue: list[tuple[Round, dict[int, Any]]] = []

        def tile(reads, device):
            read = reads[device]()
            return np.pad(read, [(0, side - length) for length in read.shape])

        def take():
            round_, reads = queue.pop(0)
            return round_, layout.put(partial(tile, reads), (side, side), np.float32)

        for round_ in layout.rounds():
            reads = {d: self.store.read(i, j) for d, i, j in _mine(layout, round_, filling=True)}
            queue.append((round_, reads))
            if len(queue) > 2:
                yield take()
        while queue:
            yield take()


def _mine(layout: Layout, round_: Round, filling: bool = False) -> list[tuple[int, int, int]]:
    """`(device, row, column)` of this process' tiles in a round."""
    return [
        (d, int(round_.rows[d]), int(round_.columns[d]))
        for d, device in enumerate(layout.mesh.devices.flat)
        if device.process_index == jax.process_index() and (filling or round_.weights[d])
    ]


def watched(rounds, layout: Layout, progress: bool):
    """`rounds` with a progress bar of tiles, by the first process."""
    total = layout.tiles * (layout.tiles + 1) // 2
    quiet = not progress or jax.process_index() != 0
    with progress_bar(total=total, desc="kernel", unit="tile", disable=quiet) as bar:
        for round_, tile in rounds:
            yield round_, tile
            bar.update(int(round_.weights.sum()))


def time_tile(compute: KernelTiles, columns: int) -> tuple[float, float]:
    """Seconds of one round of tiles, and of their product with `columns` vectors, compiled."""
    layout = compute.layout
    round_ = list(layout.rounds())[-1]
    p = np.zeros((layout.rows, columns), np.float32)
    p = jax.device_put(p, layout.replicated)

    def product(tile):
        y = layout.zeros(p.shape[1])
        jax.block_until_ready(y)
        start = time.perf_counter()
        layout.add_product(
            y, tile, round_.rows, round_.columns, round_.weights, p
        ).block_until_ready()
        return time.perf_counter() - start

    def tile():
        start = time.perf_counter()
        tile = compute(round_).block_until_ready()
        return time.perf_counter() - start, tile

    tile()
    seconds, found = tile()
    product(found)
    return seconds, product(found)
