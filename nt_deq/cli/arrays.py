"""Inputs and targets from .npy, .csv and .tsv files, read with their mistakes named."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Real, Shaped

from nt_deq._files import whole
from nt_deq.cli import csv_files
from nt_deq.errors import InputError

Task = Literal["auto", "regress", "classify"]
_MANY = 20  # values: more of them are hardly labels, and fewer whole numbers hardly measurements


def read_inputs(path: str) -> Real[np.ndarray, "n d"]:
    """Reads inputs `(n, d)`."""
    x = csv_files.read_numbers(path) if csv_files.is_csv(path) else _read_npy(path, "fiu")
    if x.ndim != 2 or 0 in x.shape:
        raise InputError(f"{path} has shape {x.shape}: inputs are (n, d); reshape them to vectors.")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise InputError(
            f"{path} has NaN or infinite values in {bad.size} of {len(x)} rows (first: row "
            f"{bad[0]}); drop or impute them."
        )
    return x


def read_input_pair(
    path: str, other: str
) -> tuple[Real[np.ndarray, "n d"], Real[np.ndarray, "m d"]]:
    """Reads inputs `(n, d)` and others `(m, d)`, which have the same columns."""
    x, others = read_inputs(path), read_inputs(other)
    if x.shape[1] != others.shape[1]:
        raise InputError(
            f"{other} has {others.shape[1]} features, and {path} has {x.shape[1]}; they must agree."
        )
    if csv_files.is_csv(path) and csv_files.is_csv(other):
        check_columns(other, path, csv_files.read_names(path))
    return x, others


def check_columns(path: str, other: str, other_names: list[str] | None) -> None:
    """Raises where a table's header is not that of another, if both have one."""
    names = csv_files.read_names(path)
    if not names or not other_names:
        return
    for i, (name, other_name) in enumerate(zip(names, other_names, strict=False), start=1):
        if name != other_name:
            raise InputError(
                f"{path} has {name!r} in column {i}, and {other} has {other_name!r}: order "
                "the columns alike."
            )


def add_task_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says what targets are."""
    parser.add_argument(
        "--task", choices=typing.get_args(Task), default="auto",
        help="what y is: numbers to regress, or labels to classify; auto: labels if integers or "
        "words (default %(default)s)",
    )  # fmt: skip


def read_targets(path: str, n: int, task: Task = "auto") -> Shaped[np.ndarray, "n ..."]:
    """Reads the targets of `n` inputs.

    Args:
      path: of the file.
      n: number of inputs.
      task: what they are: numbers to regress, labels to classify, or (`'auto'`) labels where they
        are integers or words.

    Returns:
      Real numbers, `(n,)` or `(n, C)`; or labels `(n,)`, which are integers, words or Booleans.
    """
    y = _parse(path, n) if csv_files.is_csv(path) else _read_npy(path, "fiubU")
    labels = y.dtype.kind != "f"
    if task == "classify" and not labels:
        strange = y[y % 1 != 0]
        if strange.size:
            raise InputError(
                f"{path} has {strange.flat[0]}, and --task=classify needs labels: whole numbers or "
                "words."
            )
        y, labels = y.astype(np.int64), True
    elif task == "regress" and labels:
        if y.dtype.kind == "U":
            raise InputError(f"{path} has {str(y.flat[0])!r}, and --task=regress needs numbers.")
        y, labels = y.astype(np.float64), False
    if y.ndim not in ((1,) if labels else (1, 2)) or len(y) != n or y.size == 0:
        wanted = f"labels ({n},)" if labels else f"targets ({n},) or ({n}, C)"
        raise InputError(f"{path} has {y.dtype} of shape {y.shape}: {n} inputs need {wanted}.")
    if not labels and not np.isfinite(y).all():
        raise InputError(f"{path} has NaN or infinite values; drop or impute them.")
    if task == "auto":
        _tell_doubts(path, y)
    return y


def _parse(path: str, n: int) -> np.ndarray:
    """Targets of a table: integers, other numbers, or words; a single column becomes a vector."""
    cells = csv_files.read_cells(path, n)
    if all(re.fullmatch(r"[+-]?\d{1,18}", cell) for cell in cells.flat):
        y = cells.astype(np.int64)
    else:
        try:
            y = cells.astype(np.float64)
        except ValueError:
            y = cells
            empty = np.flatnonzero((cells == "").any(axis=1))
            if empty.size:
                raise InputError(
                    f"{path} has no value in row {empty[0]}; drop or impute it."
                ) from None
    return y[:, 0] if y.shape[1] == 1 else y


def _tell_doubts(path: str, y: np.ndarray) -> None:
    """Says what the targets were taken for where they may be meant otherwise."""
    count = len(np.unique(y))
    if y.dtype.kind == "f":
        if y.ndim == 1 and not (y % 1).any() and 2 <= count <= min(_MANY, len(y) // 2):
            _note(
                f"{path} has {count} whole numbers, saved as {y.dtype}, which are regressed; if "
                "they are labels: --task=classify."
            )
    elif y.dtype.kind in "iu" and count > max(_MANY, len(y) // 4):
        _note(
            f"{path} has {count} integers in {len(y)} rows, which are taken for labels; if they "
            "are numbers to predict: --task=regress."
        )


def _note(message: str) -> None:
    print(f"nt-deq: note: {message}", file=sys.stderr, flush=True)


def _read_npy(path: str, kinds: str) -> np.ndarray:
    """Reads an array whose dtype is of one of these kinds."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as a .npy file of numbers: {error} (tables are .csv or .tsv)"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
        found = array.dtype if isinstance(array, np.ndarray) else "several arrays (.npz)"
        raise InputError(f"{path} has {found}: it must be a .npy file of real numbers.")
    return array


@contextlib.contextmanager
def new(path: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array on disk to fill, which is at `path` when it is complete."""
    with whole(path) as temporary:
        size = int(np.prod(shape)) * dtype.itemsize
        free = shutil.disk_usage(temporary.parent).free
        if size > free:
            raise InputError(
                f"{path} would be {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free."
            )
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()


def write(path: str, array: Shaped[np.ndarray, "n ..."], names: list[str]) -> None:
    """Writes an array `(n,)` or `(n, C)`; as a table with these names if `path` is one's."""
    with whole(path) as temporary:
        if csv_files.is_csv(path):
            csv_files.write(temporary, array, names, "\t" if Path(path).suffix == ".tsv" else ",")
        else:
            with open(temporary, "wb") as stream:
                np.save(stream, array)
