"""The notebooks run from top to bottom, as a user runs them, and their outputs are committed."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
EXPECTED = {  # what is printed, and where its numbers lie
    "nt_deq": {r"([\d.]+)% of 797 held-out digits": (97, 100), r"slope −?(-?[\d.]+)": (-0.6, -0.3)},
    "hyperparameters": {
        r"W_std +([\d.]+) ": (1.0, 1.35),  # true: 1.25, and one standard error
        r"noise +([\d.]+) ": (0.0017, 0.0033),  # true: 0.0025
        r"(\d+)% of 40 points": (85, 100),
    },
}
PICTURES = {"nt_deq": 4, "hyperparameters": 5}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def check(cells, name):
    """Outputs have no warnings, and say what is right."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    streams = [output for output in outputs if output["output_type"] == "stream"]
    assert [output["text"] for output in streams if output["name"] == "stderr"] == []
    text = "".join("".join(output["text"]) for output in streams)
    for pattern, bounds in EXPECTED[name].items():
        (found,) = re.findall(pattern, text)
        assert bounds[0] <= float(found) <= bounds[1], (pattern, found)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]


@every_notebook
def test_committed_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    check(cells, path.stem)


@pytest.mark.slow  # `make notebooks` runs it
@every_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path):
    import nbformat  # pyright: ignore[reportMissingImports]
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=1200,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    check(notebook.cells, path.stem)
