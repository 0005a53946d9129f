"""A kernel matrix on disk or in a bucket, as a zarr array whose tiles are its chunks.

TensorStore renames a chunk into its place when it is complete, and a checksum (crc32c, in zarr's
own format) is read with it. So a tile that is there is whole, whenever the writer was killed, and
one that was damaged since is found out. What the tiles belong to is in the array's attributes. The
upper triangle is not written: it reads as NaN.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from nt_deq import _checks
from nt_deq._probe import probe, same
from nt_deq.errors import StoreError
from nt_deq.typing import JSON

if TYPE_CHECKING:
    from nt_deq.regression.matrix import KernelTiles

_ATTRIBUTE = "nt_deq"
_PENDING = 4  # tiles on their way to the disk


def describe(kernel: KernelTiles, key: Mapping[str, JSON]) -> dict[str, JSON]:
    """What a stored kernel depends on: it is used again only where all of this is the same.

    A kernel function cannot be looked into, so its values between a few of the inputs stand for it,
    and a product of every input with one random vector for the input: they are compared to
    rounding, because another machine rounds otherwise. `key` is compared as it is.
    """
    x, layout = kernel.x, kernel.layout
    vector = np.random.default_rng(0).normal(size=x[0].size)
    parts = [x[layout.slice(tile)] for tile in range(layout.tiles)]
    prints = np.concatenate([part.reshape(len(part), -1) @ vector for part in parts])
    return {
        "key": dict(key),
        "get": kernel.get,
        "shape": list(x.shape),
        "side": layout.side,
        "inputs": base64.b64encode(prints.astype("<f4").tobytes()).decode(),
        "kernel": probe(kernel.kernel_fn, kernel.get, x).astype(float).tolist(),
    }


def _described(metadata: bytes) -> dict[str, JSON] | None:
    """What `describe` said, of the metadata of an array; `None` of those of something else."""
    try:
        found = json.loads(metadata)["attributes"][_ATTRIBUTE]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _differences(found: dict[str, JSON], expected: dict[str, JSON]) -> list[str]:
    """What makes two kernels different ones, in words; none if nothing does.

    Other settings make other values of the kernel: what follows from something else is not told.
    """

    def changes(before, now, names):
        return [
            f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} here"
            for name in names
            if before.get(name) != now.get(name)
        ]

    before, now = found.get("key", {}), expected["key"]
    shown = changes(before, now, [*now, *(name for name in before if name not in now)])
    shown += changes(found, expected, ("get", "shape", "side"))
    if shown:
        return shown
    prints, others = (
        np.frombuffer(base64.b64decode(description["inputs"]), "<f4")
        for description in (found, expected)
    )
    changed = np.flatnonzero(~same(prints, others))
    if changed.size:
        return [f"other values in {_checks.rows('x', changed)}"]
    if not same(np.array(found["kernel"]), np.array(expected["kernel"])).all():
        return changes(found, expected, ("kernel",))
    return []


class Store:
    """The tiles of one kernel matrix; a store that is there is gone on with.

    Args:
      location: a directory, or the URL of one that TensorStore knows (`gs://`, `s3://`, ...).
      kernel: whose matrix it is, and how it is cut.
      key: what the kernel was made of, as JSON has it.

    Raises:
      StoreError: the location holds another kernel, or something else, or cannot be used.
    """

    def __init__(
        self, location: str | os.PathLike[str], kernel: KernelTiles, key: Mapping[str, JSON]
    ):
        self.location, layout = os.fspath(location), kernel.layout
        self.layout = layout
        remote = "://" in self.location
        url = self.location if remote else f"file://{os.path.abspath(self.location)}"
        self._pending: list[tuple[tuple[int, int], ts.WriteFutures]] = []
        try:
            self._files = ts.KvStore.open(url.rstrip("/") + "/").result()
            description = self._check(describe(kernel, key))
            tiles = layout.side, layout.side
            self._array = ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": self._files.spec().to_json(),
                    "metadata": {
                        "shape": [layout.n, layout.n],
                        "chunk_grid": {
                            "name": "regular",
                            "configuration": {"chunk_shape": tiles},
                        },
                        "data_type": "float32",
                        "fill_value": "NaN",
                        "codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "attributes": {_ATTRIBUTE: description},
                    },
                },
                open=True,
                create=True,
            ).result()
        except ValueError as error:
            raise StoreError(
                f"store={self.location!r} cannot be used: {str(error).splitlines()[0]}"
            ) from error
        if not remote:
            self._check_space()

    def _check(self, description):
        """The description in the store, which must be the same; ours where there is nothing."""
        metadata = self._files.read("zarr.json").result()
        if metadata.state != "value":
            strange = [key for key in self._files.list().result() if b".__lock" not in key]
            if strange:
                raise self._holds_something_else(strange[0].decode())
            return description
        found = _described(metadata.value)
        if found is None or found.keys() != description.keys():
            raise self._holds_something_else("zarr.json")
        different = _differences(found, json.loads(json.dumps(description)))
        if different:
            raise StoreError(
                f"store={self.location!r} holds another kernel ({'; '.join(different)}): name "
                "another directory, or delete this one."
            )
        return found

    def _holds_something_else(self, name):
        return StoreError(
            f"store={self.location!r} holds files of something else (such as {name!r}): name an "
            "empty directory."
        )

    def _check_space(self):
        done = len(self.finished_names())
        needed = max(self.layout.triangle - done, 0) * (4 * self.layout.side**2 + 4)
        free = shutil.disk_usage(self.location).free
        if needed > free:
            raise StoreError(
                f"store={self.location!r} needs {needed / 1e9:.1f} GB more and the disk has "
                f"{free / 1e9:.1f} GB: free some, or name a directory on another."
            )

    def finished_names(self) -> set[tuple[int, int]]:
        """The tiles that are there, `(row, column)`, unread."""
        keys = [key.decode() for key in self._files.list().result()]
        places = [key.split("/")[1:] for key in keys if key.startswith("c/") and ".__" not in key]
        return {(int(i), int(j)) for i, j in places}

    def finished(self) -> set[tuple[int, int]]:
        """The tiles that are there and whole; each is read, and a damaged one is removed.

        At the edge a tile is less than its chunk, which would be read before it is written.
        """
        whole = set()
        for i, j in sorted(self.finished_names()):
            try:
                self.read(i, j)()
            except StoreError:
                self._files.write(f"c/{i}/{j}", None).result()
            else:
                whole.add((i, j))
        return whole

    def read(self, row: int, column: int) -> Callable[[], Float[np.ndarray, "rows columns"]]:
        """Begins to read a tile, less its padding; the result is called for.

        The result raises `StoreError` where the tile is missing or damaged.
        """
        future = self._array[self.layout.slice(row), self.layout.slice(column)].read()

        def result():
            try:
                tile = future.result()
            except ValueError as error:
                raise StoreError(self._damaged((row, column), error)) from error
            if np.isnan(tile[0, 0]):
                raise StoreError(self._damaged((row, column), "it is not there"))
            return tile

        return result

    def _damaged(self, tile, reason):
        return (
            f"store={self.location!r}: tile {tile} cannot be read ({str(reason).splitlines()[0]}); "
            "the same fit again computes it anew."
        )

    def write(self, row: int, column: int, tile: Float[np.ndarray, "rows columns"]) -> None:
        """Begins to write a tile, less its padding; waits for earlier ones if they are many.

        Raises:
          StoreError: an earlier tile could not be written.
        """
        target = self._array[self.layout.slice(row), self.layout.slice(column)]
        self._pending.append(((row, column), target.write(tile.astype(np.float32))))
        while len(self._pending) > _PENDING:
            self._wait()

    def flush(self) -> None:
        """Waits until all tiles are written.

        Raises:
          StoreError: one could not be.
        """
        while self._pending:
            self._wait()

    def _wait(self):
        tile, future = self._pending.pop(0)
        try:
            future.result()
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"store={self.location!r}: tile {tile} could not be written "
                f"({str(error).splitlines()[0]}). The tiles before it are kept; make room, and the "
                "same call goes on from there."
            ) from error


def _short(value: JSON) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
