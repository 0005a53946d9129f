"""A kernel matrix on disk or in a bucket, as a zarr array whose tiles are its chunks.

TensorStore renames a chunk into its place when it is complete, and a checksum (crc32c, in zarr's
own format) is read with it. So a tile that is there is whole, whenever the writer was killed, and
one that was damaged since is found out. What the tiles belong to is in the array's attributes. The
upper triangle is not written: it reads as NaN.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from nt_deq.errors import StoreError
from nt_deq.regression.layout import Layout

_ATTRIBUTE = "nt_deq"
_PENDING = 4  # tiles on their way to the disk


def describe(
    kernel_fn: Callable[..., Any],
    get: str,
    layout: Layout,
    x: np.ndarray,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What a stored kernel depends on: it is used again only where all of this is equal.

    A kernel function cannot be looked into, so its values between a few of the inputs stand for
    it and its hyper-parameters. `settings` are for people: they say what differs if something does.
    """
    few = x[np.linspace(0, len(x) - 1, min(len(x), 8)).astype(int)]
    probe = np.asarray(jax.jit(lambda x: kernel_fn(x, None, get))(few))
    return {
        "get": get,
        "kernel": probe.astype(float).tolist(),
        "data": hashlib.sha256(np.ascontiguousarray(x).data).hexdigest(),
        "data_shape": list(x.shape),
        "data_dtype": str(x.dtype),
        "side": layout.side,
        "platform": layout.mesh.devices.flat[0].platform,
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "neural-tangents")
        },
        "settings": dict(settings),
    }


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What makes two kernels different ones, in words; none if nothing does.

    Another precision makes other inputs, and all of it other values of the kernel: what follows
    from something else is not told.
    """
    if all(found.get(key) == expected[key] for key in expected if key != "settings"):
        return []

    def changes(before, now, names):
        return [
            f"{name}: {_short(before.get(name))} there, {_short(now[name])} here"
            for name in names
            if before.get(name) != now[name]
        ]

    of_inputs = changes(found, expected, ("data_shape", "data_dtype"))
    shown = changes(found.get("settings", {}), expected["settings"], expected["settings"])
    shown += changes(found, expected, ("get", "side", "platform")) + of_inputs
    shown += changes(found.get("versions", {}), expected["versions"], expected["versions"])
    if found.get("data") != expected["data"] and not of_inputs:
        shown.append("the inputs have other values")
    return shown or changes(found, expected, ("kernel",))


class Store:
    """The tiles of one kernel matrix; a store that is there is gone on with.

    Args:
      location: a directory, or the URL of one that TensorStore knows (`gs://`, `s3://`, ...).
      layout: how the matrix is cut.
      description: of `describe`.

    Raises:
      StoreError: the location holds another kernel, or something else, or cannot be used.
    """

    def __init__(
        self, location: str | os.PathLike[str], layout: Layout, description: dict[str, Any]
    ):
        self.location, self.layout = os.fspath(location), layout
        remote = "://" in self.location
        url = self.location if remote else f"file://{os.path.abspath(self.location)}"
        self._pending: list[tuple[tuple[int, int], Any]] = []
        try:
            self._files = ts.KvStore.open(url.rstrip("/") + "/").result()
            description = self._check(description)
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
        """The description in the store, which must be equal but for `settings`; ours without."""
        found = self._files.read("zarr.json").result()
        if found.state != "value":
            strange = [key for key in self._files.list().result() if b".__lock" not in key]
            if strange:
                raise StoreError(
                    f"store={self.location!r} holds files of something else (such as "
                    f"{strange[0].decode()!r}): name an empty directory."
                )
            return description
        found = json.loads(found.value).get("attributes", {}).get(_ATTRIBUTE, {})
        expected = json.loads(json.dumps(description))
        different = _differences(found, expected)
        if different:
            raise StoreError(
                f"store={self.location!r} holds another kernel ({'; '.join(different)}): name "
                "another directory, or delete this one."
            )
        return found

    def _check_space(self):
        done = len(self.finished_names())
        total = self.layout.tiles * (self.layout.tiles + 1) // 2
        needed = max(total - done, 0) * (4 * self.layout.side**2 + 4)
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
        """The tiles that are there and whole; each is read, and a damaged one is not trusted."""
        whole = set()
        for tile in sorted(self.finished_names()):
            try:
                self.read(*tile)()
            except StoreError:
                continue
            whole.add(tile)
        return whole

    def read(self, row: int, column: int) -> Callable[[], np.ndarray]:
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

    def write(self, row: int, column: int, tile: np.ndarray) -> None:
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


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
