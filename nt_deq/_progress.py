"""How far a long computation is, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import cast

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


def progress_bar(
    iterable: Iterable | None = None,
    desc: str | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    disable: bool = False,
) -> tqdm:
    """tqdm's: a bar on a terminal; in a log, a line every ten seconds.

    Of what is done before that nothing is shown.
    """
    given = {"total": total, "initial": initial, "unit": unit, "disable": disable}
    make = cast(Callable[..., tqdm], tqdm)  # typed for an iterable or for none, not for either
    if sys.stderr.isatty():
        return make(iterable, desc, file=sys.stderr, delay=QUIET, **given)
    return make(
        iterable,
        desc,
        **given,
        file=_Lines(),
        mininterval=_SECONDS,
        delay=_SECONDS,
        ascii=True,
        ncols=80,
    )
