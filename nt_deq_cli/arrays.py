"""Arrays in .npy files, read with their mistakes named and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nt_deq_cli.errors import InputError


def read(path: str) -> np.ndarray:
    """Reads an array of numbers.

    Raises:
      InputError: there is no such file, it is not a .npy file, or has something else.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        found = array.dtype if isinstance(array, np.ndarray) else "several arrays (.npz)"
        raise InputError(f"{path} has {found}: it has to be a .npy file of real numbers.")
    return array


def read_inputs(path: str, features: int | None = None) -> np.ndarray:
    """Reads inputs `(n, d)`; `features` is the `d` that they have to have."""
    x = read(path)
    if x.ndim != 2 or 0 in x.shape:
        raise InputError(f"{path} has shape {x.shape}: inputs are (n, d); reshape them to vectors.")
    if features not in (None, x.shape[1]):
        raise InputError(f"{path} has {x.shape[1]} features, and the other inputs {features}.")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise InputError(
            f"{path} has NaN or infinite values in {bad.size} of {len(x)} rows (first: row "
            f"{bad[0]}); drop or impute them."
        )
    return x


def read_targets(path: str, n: int) -> np.ndarray:
    """Reads targets `(n,)` or `(n, C)`, or integers `(n,)`, which are labels."""
    y = read(path)
    labels = y.dtype.kind in "iu"
    if y.ndim not in ((1,) if labels else (1, 2)) or len(y) != n:
        wanted = f"labels ({n},)" if labels else f"targets ({n},) or ({n}, C)"
        raise InputError(f"{path} has {y.dtype} of shape {y.shape}: {n} inputs need {wanted}.")
    if not np.isfinite(y).all():
        raise InputError(f"{path} has NaN or infinite values; drop or impute them.")
    return y


def check_writable(path: str) -> None:
    """Raises before the work where the file could not be written after it."""
    directory = Path(path).parent
    if not directory.is_dir():
        raise InputError(f"{path} cannot be written: there is no directory {directory}.")
    if not os.access(directory, os.W_OK) or Path(path).is_dir():
        raise InputError(f"{path} cannot be written: name another file.")


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write to that takes the place of `path` when it is complete."""
    handle, name = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new(path: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array on disk to fill, which is at `path` when it is complete."""
    size, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(Path(path).parent).free
    if size > free:
        raise InputError(
            f"{path} would be {size / 1e9:.3g} GB and there are {free / 1e9:.3g} GB on its disk."
        )
    with whole(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()


def write(path: str, array: np.ndarray) -> None:
    """Writes an array."""
    with whole(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)
