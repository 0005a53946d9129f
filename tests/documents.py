"""Runs what a document shows, as its reader would."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FRACTION = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


def blocks(path: str) -> list[tuple[str, str]]:
    """The language and the content of every block of code of a document."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


def python_code(path: str) -> str:
    """All Python of a document."""
    return "".join(code for language, code in blocks(path) if language == "python")


def run_apart(path: str, folder: Path, sizes: dict[str, str]) -> None:
    """`run_python` in a process of its own, in `folder`, compiled with every optimisation."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-P", __file__, path, json.dumps(sizes)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{path} ends with {done.returncode}:\n{done.stderr}"


def run_python(path: str, sizes: dict[str, str]) -> None:
    """Runs the blocks of Python in order, in one namespace, at other sizes than the document's.

    A block of `text` after one of them is what it prints, or the error that it ends with: to
    rounding (1e-3), and however its lines are broken; at other sizes but for all numbers. Every
    array that is left is finite.

    Args:
      path: of the document, in the checkout.
      sizes: code, and what is run in its place.
    """
    namespace = {}
    for size in sizes:
        assert size in python_code(path), f"{path} does not say {size}"
    for (language, code), (following, expected) in pairwise([*blocks(path), ("", "")]):
        assert following != "text" or language == "python", f"{path}: who says {expected!r}?"
        if language == "python":
            for size, other in sizes.items():
                code = code.replace(size, other)
            said = _run(compile(code, path, "exec"), namespace, may_fail=following == "text")
            if following == "text":
                agree = _agree_but_for_numbers if sizes else _agree
                assert agree(said, expected), f"{path} says {expected}\nand it is\n{said}"
    _check_finite(namespace)


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
    import numpy as np

    words, fractions = zip(
        *((_FRACTION.sub("#", s).split(), _FRACTION.findall(s)) for s in (said, expected)),
        strict=True,
    )
    return words[0] == words[1] and np.allclose(*np.array(fractions, float), rtol=1e-3, atol=0)


def _agree_but_for_numbers(said: str, expected: str) -> bool:
    words = [_NUMBER.sub("#", text).split() for text in (said, expected)]
    return words[0] == words[1]


def _check_finite(namespace: dict) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    # Python's own names hold other things: __warningregistry__ is no tree.
    for name, value in namespace.items():
        if name.startswith("__"):
            continue
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, np.inexact):
                assert np.isfinite(leaf).all(), f"{name} is {leaf}"


if __name__ == "__main__":
    run_python(sys.argv[1], json.loads(sys.argv[2]))
