"""Files written whole or not at all, however the program that writes them ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _SUFFIX = ".nt-deq-", ".part"
_unfinished: set[Path] = set()  # of this process


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write to that takes the place of `path` when it is complete.

    Until then it is a hidden one beside it. It is on the disk before it has its name, and so is its
    name before this returns: a loss of power leaves the old file or the new one. What writers that
    were killed have left in the directory is removed.
    """
    path = Path(path)
    remove_orphans(path.parent)
    with _locked(path) as temporary:
        _unfinished.add(temporary)
        try:
            yield temporary
            temporary.chmod(0o644)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            _unfinished.discard(temporary)


def flush(path: Path) -> None:
    """Waits until the contents of a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """A new hidden file beside `path`, locked for as long as this process writes it."""
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{_PREFIX}{path.name}.", suffix=_SUFFIX
        )
        with contextlib.suppress(OSError):  # a file system without locks: none can be had there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            break
        os.close(handle)  # another process took it for an orphan, before the lock
    try:
        yield Path(name)
    finally:
        os.close(handle)


def remove_orphans(directory: Path) -> None:
    """Removes the unfinished files of `whole` whose writers are dead: nobody holds their locks."""
    for file in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), open(file, "rb") as stream:  # it is in use, or gone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def remove_unfinished() -> None:
    """Removes the unfinished files of this process, before it ends by no exception."""
    for file in _unfinished:
        file.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether a file is one that `whole` has not completed, by its name."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)
