"""Files written whole or not at all, however the program that writes them ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nt_deq.errors import InputError

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
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            _unfinished.discard(temporary)


def _flush(path: Path) -> None:
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


def end_when_interrupted(message: Callable[[], str]) -> None:
    """Makes Ctrl-C, SIGTERM and SIGHUP end this process: 128 + signal, its files as they were.

    It ends in the handler, by no exception: JAX's callbacks can swallow one, and the interpreter
    can crash when it is taken down while XLA compiles.

    Args:
      message: what to tell on stderr.
    """

    def end(number: int, frame: object) -> None:
        del frame
        for file in _unfinished:
            file.unlink(missing_ok=True)
        start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{start}{message()}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, end)


def check_outputs(
    outputs: Mapping[str, str | None], inputs: Mapping[str, str | None], force: bool
) -> None:
    """Raises before the work where a file could not, or must not, be written after it.

    Args:
      outputs: files to write, by the flag that names them; `None` is none.
      inputs: files that are read, likewise: these are never written to.
      force: whether other files may be overwritten.

    Raises:
      InputError: an output is an input, another output, there already, or not writable.
    """
    named = {flag: path for flag, path in inputs.items() if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        directory = Path(path).parent
        if not directory.is_dir():
            raise InputError(f"{flag}={path} cannot be written: there is no directory {directory}.")
        if not os.access(directory, os.W_OK) or Path(path).is_dir():
            raise InputError(f"{flag}={path} cannot be written: name another file.")
        for other, other_path in named.items():
            if _same(path, other_path):
                raise InputError(f"{flag}={path} is the file of {other} too: name another.")
        if os.path.lexists(path) and not force:
            raise InputError(f"{flag}={path} is there already: --force overwrites it.")
        named[flag] = path


def _same(path1: str, path2: str) -> bool:
    if os.path.exists(path1) and os.path.exists(path2):
        return os.path.samefile(path1, path2)
    return os.path.realpath(path1) == os.path.realpath(path2)
