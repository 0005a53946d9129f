"""The kernel matrix of a training set: its tiles are kept in memory, on disk, or nowhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float

from nt_deq._batches import by_batches, pad_rows
from nt_deq._jax import shard_map
from nt_deq._progress import progress_bar
from nt_deq.errors import NoEquilibriumError
from nt_deq.gp import variances
from nt_deq.regression.layout import AXIS, Layout, Round, in_float64
from nt_deq.regression.store import Store
from nt_deq.typing import Get, KernelFn

_VARIANCES = 4096  # inputs at once


class KernelTiles:
    """Computes tiles of the kernel of `x` with itself, and of `x` with other inputs.

    Args:
      kernel_fn: any stax `kernel_fn(x1, x2, get)`.
      get: 'nngp' or 'ntk'.
      layout: how the tiles are dealt.
      x: training inputs, `(n, ...)`, in the dtype of the kernel.
    """

    def __init__(
        self, kernel_fn: KernelFn, get: Get, layout: Layout, x: Float[np.ndarray, "n ..."]
    ):
        self.kernel_fn, self.layout, self.x = kernel_fn, layout, x
        self.get: Get = get
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
        self._variances = jax.jit(lambda x: variances(kernel_fn, x, get))

    def inputs(self, tiles: np.ndarray) -> Array:
        """The inputs of one tile per device, `(devices, side, ...)`, the last one as padding."""
        side = self.layout.side

        def rows(device):
            return pad_rows(self.x[self.layout.slice(int(tiles[device]))], side)

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

    @cached_property
    def diagonal(self) -> Float[np.ndarray, " n"]:
        """The kernel of every training input with itself, `(n,)`, float64."""
        return self.variances(self.x)

    def variances(self, x: Float[np.ndarray, "m ..."]) -> Float[np.ndarray, " m"]:
        """The kernel of every one of the inputs `(m, ...)` with itself, `(m,)`, float64."""
        device = self.layout.local_devices[0]
        found = by_batches(lambda x: self._variances(jax.device_put(x, device)), x, _VARIANCES)
        if not np.isfinite(found).all():
            self._fail(x, None, "inputs with themselves")
        return found.astype(np.float64)

    def _fail(self, x1, x2, where):
        self.kernel_fn(x1, None, self.get)  # outside of jit it says what is wrong
        self.kernel_fn(x1, x2, self.get)
        raise NoEquilibriumError(
            f"kernel_fn(x1, x2, get={self.get!r}) is NaN or infinite for some of the {where}: look "
            "at it there."
        )

    def against(
        self, others: Float[np.ndarray, "m ..."]
    ) -> Iterator[tuple[slice, Float[Array, "devices m part"]]]:
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

    def rows(self, others: Float[np.ndarray, "m ..."]) -> Float[np.ndarray, "m n"]:
        """The kernel of other inputs with the training inputs, `(m, n)`, float64."""
        parts = [self.layout.gather(kernel) for _, kernel in self.against(others)]
        joined = np.concatenate(parts, axis=2).swapaxes(0, 1)
        return joined.reshape(len(others), -1)[:, : self.layout.n].astype(np.float64)

    def product(
        self, others: Float[np.ndarray, "m ..."], coefficients: Float[Array, "rows C"]
    ) -> Float[np.ndarray, "m C"]:
        """`rows(others) · coefficients`, of `(rows, C)` sharded by rows, in float64."""
        parts = [
            self.layout.gather(_product(kernel, coefficients, part.start))
            for part, kernel in self.against(others)
        ]
        return np.sum(parts, axis=0)


@in_float64
@jax.jit
def _product(kernel, coefficients, start):
    """Adds up what a part of each device's training inputs contributes, in float64."""
    devices, _, size = kernel.shape
    coefficients = coefficients.reshape(devices, -1, coefficients.shape[1])
    part = lax.dynamic_slice_in_dim(coefficients, start, size, axis=1)
    kernel = kernel.astype(part.dtype)
    return jnp.einsum("dmr,drc->mc", kernel, part, precision=lax.Precision.HIGHEST)


class Recomputed:
    """The kernel matrix, kept nowhere: every product computes all of its tiles."""

    def __init__(self, kernel: KernelTiles):
        self.kernel, self.layout = kernel, kernel.layout

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """All tiles of the lower triangle, a round at a time."""
        for round_ in self.layout.rounds():
            yield round_, self.kernel(round_)

    def multiply(self, p: Float[Array, "rows C"]) -> Float[Array, "rows C"]:
        """`K p` for `p (rows, C)`, sharded by rows, with products in the dtype of `p`."""
        layout = self.layout
        y = layout.zeros(p.shape[1])
        p = layout.replicate(p)
        for round_, tile in self.tiles():
            y = layout.add_product(y, tile, round_.rows, round_.columns, round_.weights, p)
            y.block_until_ready()  # else tiles pile up in memory, faster than they are multiplied
        return layout.sum(y)


class InMemory(Recomputed):
    """The tiles of the lower triangle, on the devices, computed here.

    Args:
      kernel: whose matrix it is.
      progress: whether to show how far it is.
      dtype: that the tiles are kept in.
    """

    def __init__(self, kernel: KernelTiles, progress: bool = False, dtype: DTypeLike = np.float32):
        super().__init__(kernel)
        rounds = watched(super().tiles(), self.layout, progress)
        self._tiles = [(round_, tile.astype(dtype)) for round_, tile in rounds]

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """As they were computed."""
        return iter(self._tiles)


class Stored(Recomputed):
    """The tiles in a `Store`: every product reads them, the next ones while it computes.

    Those that the store lacks are computed here. Arguments are those of `InMemory`, and the store.
    """

    def __init__(self, kernel: KernelTiles, store: Store, progress: bool = False):
        super().__init__(kernel)
        self.store = store
        layout = self.layout
        finished = np.zeros((layout.tiles, layout.tiles), bool)
        if layout.leads:
            for tile in store.finished():
                finished[tile] = True
        finished = layout.agree(finished)  # all must know what they compute together

        def built():
            for round_ in layout.rounds():
                if not finished[round_.rows, round_.columns].all():
                    tiles = layout.local(kernel(round_))
                    for device, i, j in _mine(layout, round_):
                        if not finished[i, j]:
                            tile = tiles[device][: layout.n - i * layout.side]
                            store.write(i, j, tile[:, : layout.n - j * layout.side])
                yield round_, None

        for _ in watched(built(), layout, progress):
            pass
        store.flush()
        layout.agree(np.array([True]))  # none reads what another one is still writing

    def tiles(self) -> Iterator[tuple[Round, Array]]:
        """Read from the store, two rounds ahead."""
        layout, side = self.layout, self.layout.side
        queue: list[tuple[Round, dict[int, Callable[[], np.ndarray]]]] = []

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
    mine = set(layout.local_devices)
    return [
        (d, int(round_.rows[d]), int(round_.columns[d]))
        for d, device in enumerate(layout.mesh.devices.flat)
        if device in mine and (filling or round_.weights[d])
    ]


def watched(rounds, layout: Layout, progress: bool):
    """`rounds` with a progress bar of tiles, by the first process."""
    quiet = not (progress and layout.leads)
    with progress_bar(total=layout.triangle, desc="kernel", unit="tile", disable=quiet) as bar:
        for round_, tile in rounds:
            yield round_, tile
            bar.update(int(round_.weights.sum()))


def time_tile(kernel: KernelTiles, columns: int) -> tuple[float, float]:
    """Seconds of one round of tiles, and of their product with `columns` vectors, compiled."""
    layout = kernel.layout
    *_, round_ = layout.rounds()
    p = jax.device_put(np.zeros((layout.rows, columns), np.float32), layout.replicated)

    def compute():
        return kernel(round_).block_until_ready()

    def product():
        y = layout.zeros(columns)
        args = (tile, round_.rows, round_.columns, round_.weights, p)
        return layout.add_product(y, *args).block_until_ready()

    def seconds(fn):
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    tile = compute()
    product()
    return seconds(compute), seconds(product)
