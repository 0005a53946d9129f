"""A launcher's directory: results written whole or not at all, and finished parts kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nt_deq.cli.files import whole

Arrays = dict[str, np.ndarray]


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    names = ("nt-deq", "jax", "jaxlib", "neural-tangents", "flax", "optax", "optimistix", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A digest of settings and arrays, equal exactly where they are."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        digest.update(f"{name}\0".encode())
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}\0".encode())
            digest.update(np.ascontiguousarray(value).data)
        else:
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()[:12]


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

    def part(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Arrays]
    ) -> tuple[Arrays, bool]:
        """Returns a part's arrays, from an earlier run with the same inputs or computed now.

        Args:
          name: of the part, in file names and messages.
          inputs: all that the part depends on besides versions of libraries: numbers, strings,
            lists of them, arrays.
          compute: gives the arrays; called where there are none from an earlier run.

        Returns:
          The arrays, and whether they are from an earlier run.
        """
        key = fingerprint({**inputs, "versions": versions()})
        file = self.path / "parts" / f"{name}.{key}.npz"
        found = file.exists()
        if not found:
            arrays = compute()
            with self._whole(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
        self.kept.append(name)
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored), found

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as JSON; numbers that JSON has no word for are refused."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

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
