"""What to install where a library that only some modules need is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports: an `ImportError` names the extra that brings what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"nt_deq.{name} needs {error.name}, which is not installed. "
            f'Remedy, in a clone of nt_deq: python -m pip install ".[{name}]"',
            name=error.name,
        ) from error
