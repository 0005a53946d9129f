"""Fitted models as directories, which are whole whenever the program that writes them is killed.

A directory has the arrays in `arrays-….npz`, and all else in `model.json`, which names that file
and its SHA-256 and takes its place last: until then the directory holds the model that was there
before. Nothing in it is a pickle. The numbers of the kernel between a few inputs are kept, so that
another kernel is found out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nt_deq._files import flush, is_unfinished, whole
from nt_deq._probe import probe, same
from nt_deq.errors import ArgumentError, ModelError
from nt_deq.typing import JSON, Get, KernelFn

FORMAT = 1  # of what is written; every one up to it is read
_MARK, _MODEL = "nt_deq model", "model.json"
_ARRAYS = re.compile(r"arrays-[0-9a-f]{16}\.npz")
_PACKAGES = "nt-deq", "jax", "jaxlib", "neural-tangents", "numpy"

StrPath = str | os.PathLike[str]


class Saved(NamedTuple):
    """What a directory holds.

    Attributes:
      kind: name of the model's class.
      settings: what it was made with.
      arrays: what it has learned, by name.
    """

    kind: str
    settings: dict[str, JSON]
    arrays: dict[str, np.ndarray]


def write(
    path: StrPath, kind: str, settings: Mapping[str, JSON], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes a model; one that is there is replaced.

    Args:
      path: the directory, which is made if need be.
      kind: name of the model's class.
      settings: what JSON can say.
      arrays: of numbers, Booleans or words.

    Raises:
      ArgumentError: `settings` cannot be written as JSON, or an array needs pickle.
      ModelError: the directory holds something else, or a model of a later version, or cannot be
        written.
    """
    directory = _local(path)
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ArgumentError(f"{name} is an array of objects, which cannot be saved.")
    try:
        text = json.dumps(dict(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"the settings of the model are not JSON: {error}.") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        flush(directory.parent)
        with _locked(directory, fcntl.LOCK_EX):
            _check_ours(directory)
            file = directory / f"arrays-{secrets.token_hex(8)}.npz"
            with whole(file) as temporary:
                with open(temporary, "wb") as stream:
                    np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
                digest = _sha256(temporary)
            model = {
                "kind": kind,
                "settings": json.loads(text),
                "arrays": file.name,
                "sha256": digest,
                "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            }
            content = {"is": _MARK, "format": FORMAT, "sha256": _checksum(model), "model": model}
            with whole(directory / _MODEL) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for other in directory.iterdir():
                if _ARRAYS.fullmatch(other.name) and other != file:
                    other.unlink()
    except OSError as error:
        raise ModelError(f"path={os.fspath(path)!r} cannot be written: {error}.") from error


def read(path: StrPath, *kinds: str) -> Saved:
    """Reads the model of a directory.

    Args:
      path: the directory.
      kinds: what it may be.

    Raises:
      ModelError: it is another kind of model or none, was written by a later version, or a file is
        damaged.
    """
    directory = _local(path)
    with _locked(directory, fcntl.LOCK_SH):
        model = _read_model(directory)
        if model["kind"] not in kinds:
            raise ModelError(
                f"path={os.fspath(path)!r} holds a {model['kind']}, and not a "
                f"{' or a '.join(kinds)}."
            )
        file = directory / model["arrays"]
        try:
            if _sha256(file) != model["sha256"]:
                raise ModelError(f"{file} is damaged: its checksum is not that of {_MODEL}.")
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ModelError(f"{file} cannot be read: {error}.") from error
    return Saved(model["kind"], model["settings"], arrays)


def words(labels: np.ndarray) -> np.ndarray:
    """Labels as they can be saved: words are no objects, of whatever dtype they were."""
    if all(isinstance(label, str) for label in labels.tolist()):
        return np.array(labels.tolist())
    return labels


def read_settings(path: StrPath) -> tuple[str, dict[str, JSON]] | None:
    """The kind and settings of the model in a directory, or `None` if there is none.

    Raises:
      ModelError: as `read`, but for the arrays.
    """
    directory = _local(path)
    if not (directory / _MODEL).exists():
        return None
    with _locked(directory, fcntl.LOCK_SH):
        model = _read_model(directory)
    return model["kind"], model["settings"]


def check_writable(path: StrPath) -> None:
    """Raises `ModelError` where `write` would, for what the directory holds."""
    directory = _local(path)
    if directory.exists():
        with _locked(directory, fcntl.LOCK_SH):
            _check_ours(directory)


def check_precision(path: StrPath, dtype: np.dtype) -> None:
    """Raises `ModelError` unless JAX computes in the dtype of a model."""
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ModelError(
            f"path={os.fspath(path)!r} holds a model in float64, and JAX is in float32: "
            "jax.config.update('jax_enable_x64', True)."
        )


def check_kernel(
    path: StrPath, found: np.ndarray, kernel_fn: KernelFn, get: Get, x: np.ndarray, of: JSON = None
) -> None:
    """Raises `ModelError` unless a kernel is that of a model, to rounding.

    Args:
      path: the directory.
      found: what `probe` gave of the model's.
      kernel_fn: the kernel now.
      get: which of its kernels.
      x: the model's inputs.
      of: what the model's kernel was made of, as far as that is known.
    """
    now = probe(kernel_fn, get, x)
    if now.shape != found.shape:
        there, here = f"has shape {found.shape}", str(now.shape)
    elif not same(now, found).all():
        entry = np.unravel_index(np.argmax(np.abs(now - found)), now.shape)
        there, here = f"is {found[entry]:.6g}", f"{now[entry]:.6g}"
    else:
        return
    known = f", made of {json.dumps(of)}" if of else ""
    raise ModelError(
        f"path={os.fspath(path)!r} holds a model of another kernel{known}: get={get!r} of its "
        f"inputs {there} in it, and {here} by kernel_fn."
    )


def _local(path: StrPath) -> Path:
    name = os.fspath(path)
    if not name or "://" in name:
        raise ArgumentError(f"path={name!r} must name a directory of this machine.")
    return Path(name)


@contextlib.contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    """Keeps writers out, and as a writer readers, who would miss a file that is removed."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ModelError(f"path={str(directory)!r} holds no model: {error.strerror}.") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def _check_ours(directory: Path) -> None:
    """Raises where a directory has files and no model, or one of a later version."""
    if (directory / _MODEL).exists():
        _marked(directory)
        return
    for file in directory.iterdir():  # a first writer may have been killed
        if not (_ARRAYS.fullmatch(file.name) or is_unfinished(file)):
            raise ModelError(
                f"path={str(directory)!r} holds something else (such as {file.name!r}): name a new "
                "or an empty directory."
            )


def _marked(directory: Path) -> dict:
    """The contents of `model.json`, of a format that is known; nothing else of it is trusted."""
    file = directory / _MODEL
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"path={str(directory)!r} holds no model: it has no {_MODEL}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged, or not of nt_deq: {error}.") from error
    if not isinstance(content, dict) or content.get("is") != _MARK:
        raise ModelError(f"{file} is not of nt_deq: name another directory.")
    version = content.get("format")
    if not isinstance(version, int) or version < 1:
        raise ModelError(f"{file} is damaged: its format is {version!r}.")
    if version > FORMAT:
        raise ModelError(
            f"{file} is of format {version}, written by a later nt_deq: this one, "
            f"{importlib.metadata.version('nt-deq')}, reads up to {FORMAT}; install the later one."
        )
    return content


def _read_model(directory: Path) -> dict:
    content = _marked(directory)
    file = directory / _MODEL
    if content.get("sha256") != _checksum(content.get("model")):
        raise ModelError(f"{file} is damaged: its checksum is not that of what it says.")
    return content["model"]


def _checksum(model: JSON) -> str:
    """SHA-256 of what is in a JSON file, however its lines are broken."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
