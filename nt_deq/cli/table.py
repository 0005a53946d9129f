"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns of text, to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
