"""A launcher's directory: results written whole or not at all, and finished parts kept."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from nt_deq._files import whole
from nt_deq.errors import InputError

Arrays = dict[str, np.ndarray]


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    names = ("nt-deq", "jax", "jaxlib", "neural-tangents", "flax", "optax", "optimistix", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else vars(value)


class Workdir:
    """Where a launcher writes.

    Attributes:
      path: the directory, made if it was not there.
      kept: names of the parts that are finished, this run's and those it found.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.kept: list[str] = []
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise PermissionError(0, "no permission", str(path))

    def lock(self) -> None:
        """Keeps other processes that ask for the lock out, until this one ends.

        Raises:
          InputError: another process has it; the message names that one.
        """
        self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115  # for as long as this object
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            other = self._lock.read() or "another process"
            raise InputError(
                f"--workdir={self.path} is in use by {other}: wait until it ends, or name another "
                "directory."
            ) from None
        except OSError:  # a file system without locks
            return
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()}")
        self._lock.flush()

    def part(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Returns a part's arrays, from an earlier run with the same inputs or computed now.

        Args:
          name: of the part, in file names and messages.
          inputs: all that the part depends on besides versions of libraries: numbers, strings,
            lists of them, arrays.
          compute: gives the arrays; called where there are none from an earlier run.
        """
        file = f"parts/{name}.{joblib.hash((inputs, versions()))}.npz"
        if not (self.path / file).exists():
            self.write_arrays(file, compute())
        self.kept.append(name)
        with np.load(self.path / file, allow_pickle=False) as stored:
            return dict(stored)

    def write_arrays(self, name: str, arrays: Arrays) -> None:
        """Writes arrays as one .npz file."""
        with self._whole(self.path / name) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as JSON: dataclasses as objects, arrays as lists; NaN is refused."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        with self._whole(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_figure(self, name: str, figure: Any, dpi: int = 120) -> None:
        """Writes a matplotlib figure as PNG."""
        with self._whole(self.path / name) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi)

    @contextlib.contextmanager
    def _whole(self, file: Path) -> Iterator[Path]:
        """A file to write to that takes its place when it is complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as temporary:
            yield temporary
