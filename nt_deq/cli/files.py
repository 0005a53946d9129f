"""What happens to the files of a command: which it may write, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nt_deq._files import remove_unfinished
from nt_deq.errors import InputError


def end_when_interrupted(message: Callable[[], str]) -> None:
    """Makes Ctrl-C, SIGTERM and SIGHUP end this process: 128 + signal, its files as they were.

    It ends in the handler, by no exception: JAX's callbacks can swallow one, and the interpreter
    can crash when it is taken down while XLA compiles.

    Args:
      message: what to tell on stderr.
    """

    def end(number: int, frame: object) -> None:
        del frame
        remove_unfinished()
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
