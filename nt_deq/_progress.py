"""How far a long computation is, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

QUIET = 2.0  # seconds: of what takes no longer nothing is shown
_SECONDS = 10  # between lines


class _Lines:
    """A file that makes a line of every state of a progress bar, which begins with a return."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Every line was flushed."""


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """`tqdm(*args, **options)`: a bar on a terminal; in a log, a line every ten seconds.

    Of what is done before that nothing is shown.
    """
    if sys.stderr.isatty():
        return tqdm(*args, file=sys.stderr, delay=QUIET, **options)
    return tqdm(
        *args, file=_Lines(), mininterval=_SECONDS, delay=_SECONDS, ascii=True, ncols=80, **options
    )
