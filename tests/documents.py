"""Runs what a document shows, as its reader would."""

import io
import re
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
_FRACTION = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")


def blocks(path: str) -> list[tuple[str, str]]:
    """The language and the content of every block of code of a document."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


def run_python(path: str) -> dict:
    """Runs the blocks of Python in order, in one namespace, which it returns.

    A block of `text` after one of them is what it prints, or the error that it ends with: to
    rounding (1e-3), and however its lines are broken.
    """
    namespace = {}
    for (language, code), (following, expected) in pairwise([*blocks(path), ("", "")]):
        assert following != "text" or language == "python", f"{path}: who says {expected!r}?"
        if language == "python":
            said = _run(compile(code, path, "exec"), namespace, may_fail=following == "text")
            if following == "text":
                assert _agree(said, expected), f"{path} says {expected}\nand it is\n{said}"
    return namespace


def _run(code, namespace: dict, may_fail: bool) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, namespace)
        except Exception as error:
            if not may_fail:
                raise
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


def _agree(said: str, expected: str) -> bool:
    words, fractions = zip(
        *((_FRACTION.sub("#", s).split(), _FRACTION.findall(s)) for s in (said, expected)),
        strict=True,
    )
    return words[0] == words[1] and np.allclose(*np.array(fractions, float), rtol=1e-3, atol=0)
