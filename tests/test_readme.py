"""Every block of Python in the README runs, in order, in one namespace; commands exist."""

import re

import numpy as np
import pytest
from documents import ROOT, blocks, run_python


@pytest.mark.slow  # make docs runs it
def test_python_blocks_run():
    namespace = run_python("README.md")
    assert namespace["covariance"].shape == (20, 20)
    assert np.isfinite(namespace["gradient"])
    assert namespace["mean"].shape == (20, 1)
    assert (namespace["std"] > 0).all()
    assert np.isfinite(namespace["image_kernels"].ntk).all()
    assert namespace["empirical"].shape == (20, 20)
    assert np.isfinite(namespace["loss"])
    assert namespace["solution"].converged.all()
    assert (namespace["deviation"] > 0).all()


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        line
        for language, code in blocks("README.md")
        if language == "bash"
        for line in code.split("\n")
    ]
    targets = [line.split()[1] for line in commands if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_linked_files_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert "docs/compare.png" in links
    for link in links:
        assert (ROOT / link).exists(), link
