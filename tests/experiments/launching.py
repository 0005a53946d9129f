"""What tests of launchers share."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.lib.workdir import Workdir

ROOT = Path(__file__).parents[2]


def launch(launcher, settings, path):
    """Runs a launcher here; returns the numbers that it wrote, and checks what is around them."""
    launcher.main(settings, Workdir(path))
    name = launcher.__name__.rsplit(".", 1)[1]
    numbers, page = (
        json.loads((path / "results.json").read_text()),
        (path / "report.md").read_text(),
    )
    assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"![figure]({name}.png)" in page
    assert "nan" not in page
    for claim in numbers["claims"]:
        assert claim["claim"] in page
        assert claim["measured"] in page
    verdicts = [claim["holds"] for claim in numbers["claims"]]
    assert page.count("**It holds.**") == verdicts.count(True)
    assert page.count("**It cannot be told.**") == verdicts.count(None)
    return numbers


def start(module, *flags, **options):
    """Starts `python -m experiments.MODULE FLAGS`, or a program that begins with -c."""
    program = [module] if module.startswith("-c") else ["-m", f"experiments.{module}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *program, *flags], **{"cwd": ROOT, "text": True} | pipes | options
    )


def part(path, name):
    """The arrays of a part that a launcher has kept in a directory."""
    (file,) = path.glob(f"parts/{name}.*.npz")
    with np.load(file) as arrays:
        return dict(arrays)
