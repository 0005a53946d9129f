"""`compare` on a table of the user's own, in units of its own, run as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine

ROOT = Path(__file__).parents[2]
TINY = ("--widths=32,64", "--seeds=2", "--steps=2", "--W_std=0.3")
pytestmark = pytest.mark.slow


def save(path, dataset, n):
    x, y = dataset
    rows = np.random.default_rng(0).permutation(len(x))
    x, y = x[rows], y[rows]
    np.savez(path, x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])


def compare(folder, *flags):
    """Runs it from another folder; returns what it printed, its page and its numbers."""
    command = [sys.executable, "-m", "experiments.claims.compare", "--workdir=out", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    numbers = json.loads((folder / "out" / "results.json").read_text())
    return found.stdout, (folder / "out" / "report.md").read_text(), numbers


def test_a_regression_table_nobody_scaled(tmp_path):
    save(tmp_path / "own.npz", load_diabetes(return_X_y=True, scaled=False), 120)
    out, page, numbers = compare(tmp_path, "--data=own.npz", *TINY)
    assert "120 training and 322 held-out rows of `own.npz`" in page
    assert "with 10 features and real targets" in page
    assert "Every feature was made to have mean 0 and variance 1" in page
    assert "image" not in page
    assert "R²: of one" in out
    assert numbers["score"] == "R²"
    ntk = numbers["infinite"]["ntk_inf"]
    assert 0.1 < ntk["one_test_score"] < ntk["test_score"] < 0.6


def test_a_table_with_labels(tmp_path):
    save(tmp_path / "own.npz", load_wine(return_X_y=True), 118)
    out, page, numbers = compare(tmp_path, "--data=own.npz", *TINY)
    assert "118 training and 60 held-out rows of `own.npz`" in page
    assert "13 features and 3 classes" in page
    assert "image" not in page
    assert "accuracy: of one  of the mean" in out
    assert numbers["infinite"]["ntk_inf"]["test_score"] > 0.9
    for limit in numbers["infinite"].values():
        if isinstance(limit, dict):
            assert 0 < limit["one_test_score"] <= limit["test_score"] + 0.05
    for e in numbers["finite"]:
        assert len(e["test_scores"]) == 2
