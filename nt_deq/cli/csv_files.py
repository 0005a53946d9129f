"""Tables in .csv and .tsv files: numbers, or a column of labels, under one line of names or none.

Columns are separated by tabs if the first line has one, else by semicolons if it has one, else by
commas. That line is a header if none of its cells is a number.
"""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from jaxtyping import Float, Shaped

from nt_deq.errors import InputError


def is_csv(path: str) -> bool:
    """Whether the file's name says that it is such a table."""
    return Path(path).suffix.lower() in (".csv", ".tsv")


def read_names(path: str) -> list[str] | None:
    """Reads the header; `None` where there is none."""
    with _open(path) as stream:
        return _begin(path, stream)[1]


def read_numbers(path: str) -> Float[np.ndarray, "rows columns"]:
    """Reads numbers `(n, d)`, float64.

    Raises:
      InputError: there is no such file, or a cell is not a number; the message says which.
    """
    with _open(path) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no rows, which the array's shape tells
        delimiter, _ = _begin(path, stream)
        try:
            return np.loadtxt(stream, delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            message = _find_mistake(path) or f"{path} cannot be read: {error}"
            raise InputError(message) from None


def read_cells(path: str, n: int) -> Shaped[np.ndarray, "n columns"]:
    """Reads cells `(n, d)` as text.

    Where they are labels in words, only their number says whether the first line is a header.

    Raises:
      InputError: there is no such file, or it has not `n` lines of one length.
    """
    with _open(path) as stream:
        delimiter, names = _begin(path, stream)
        stream.seek(0)
        rows = [[cell.strip() for cell in row] for row in csv.reader(stream, delimiter=delimiter)]
    rows = [row for row in rows if row]
    if len(rows) == n + 1 and names is not None and rows[0] not in rows[1:]:
        del rows[0]
    if len(rows) != n:
        raise InputError(
            f"{path} has {len(rows)} lines, and there are {n} inputs; a header above them has no "
            "number, and no label."
        )
    if len({len(row) for row in rows}) > 1:
        raise InputError(_find_mistake(path) or f"{path} has lines of different lengths.")
    return np.array(rows)


def write(
    path: Path, array: Shaped[np.ndarray, "n ..."], names: Sequence[str], delimiter: str = ","
) -> None:
    """Writes `(n, d)` or `(n,)` under `d` names, or one."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(array.reshape(len(array), -1))


@contextmanager
def _open(path: str) -> Iterator[TextIO]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            yield stream
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: it is not text in UTF-8 ({error}).") from error
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table: {error}.") from error


def _begin(path: str, stream: TextIO) -> tuple[str, list[str] | None]:
    """The delimiter and the header; leaves `stream` where the numbers begin."""
    start, line = 0, stream.readline()
    while line and not line.strip():
        start, line = stream.tell(), stream.readline()
    delimiter = next((mark for mark in "\t;" if mark in line), ",")
    (cells,) = list(csv.reader([line], delimiter=delimiter)) or [[]]
    if any(map(_is_number, cells)) or not line:
        stream.seek(start)
        if len(cells) > 2 and cells == [str(i) for i in range(len(cells))]:
            raise InputError(
                f"{path}: line 1 counts the columns from 0, as pandas names them: give them names, "
                "or save the table with header=False."
            )
        return delimiter, None
    if len(cells) > 1 and not cells[0].strip():
        raise InputError(
            f"{path}: column 1 has no name, like the numbers of rows that pandas writes: save the "
            "table with index=False."
        )
    return delimiter, [cell.strip() for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _find_mistake(path: str) -> str | None:
    """What is wrong with the first cell that is not a number, or line that is not as long."""
    with _open(path) as stream:
        delimiter, names = _begin(path, stream)
        stream.seek(0)
        reader = csv.reader(stream, delimiter=delimiter)
        first = next(row for row in reader if row)
        rows = reader if names is not None else itertools.chain([first], reader)
        for row in filter(None, rows):
            line = f"{path}, line {reader.line_num}"
            if len(row) != len(first):
                return f"{line} has {len(row)} columns, and the first line {len(first)}."
            for i, cell in enumerate(row):
                if not _is_number(cell):
                    name = f" ({names[i]!r})" if names else ""
                    what = f"{cell!r} is not a number" if cell.strip() else "it is empty"
                    return (
                        f"{line}, column {i + 1}{name}: {what}; drop or impute what is missing, "
                        "code categories as numbers, write decimals with a point."
                    )
    return None
