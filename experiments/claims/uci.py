"""The table of Arora et al. on 90 small data sets of UCI, with infinitely deep kernels beside it.

Support vector machines with the NTK of explicit networks, the NTK and the NNGP kernel of a deep
equilibrium network and an RBF kernel, and random forests, by the protocol of Arora et al.,
Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks (ICLR 2020, arXiv:1910.01663):
hyper-parameters are chosen by one half of the rows, and then tested by four splits of all. And once
more with nothing chosen by test rows. Needs `pip install ".[tabular]"`. Killed, the same command
goes on. Writes results.json, results.csv, uci.png and report.md to --workdir.

    python -m experiments.claims.uci --data_file=uci90.npz --workdir=out/uci
    python -m experiments.claims.uci --data_file=uci90.npz --workdir=out/uci --config=full
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.claims import uci_methods
from experiments.claims.uci_methods import METHODS, Method
from experiments.lib import kernels, launch
from experiments.lib.launch import flag
from experiments.lib.workdir import Arrays, Workdir
from nt_deq._progress import progress_bar
from nt_deq.errors import InputError

SPLITS = 4
LAYOUT = {
    "X": "finite numbers (n, d)",
    "y": "integers (n,)",
    "validation": "bool (n,)",
    "test": f"bool ({SPLITS}, n)",
}
REPORT_EVERY = 300.0  # seconds
FULL = {"max_n": 5000}


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags."""

    data_file: str | None = flag(
        None,
        "the data sets of Fernández-Delgado et al. (JMLR 15, 2014) as one .npz file: of each NAME "
        "NAME/X (n, d), standardised; NAME/y (n,), integer labels; NAME/validation (n,), True in "
        "the half that hyper-parameters are chosen by; NAME/test (4, n), True where a split tests",
    )
    datasets: str | None = flag(None, "names of data sets, separated by commas; all if not given")
    max_n: int = flag(250, "data sets of at most so many rows are used", at_least=1)
    methods: str = flag(",".join(METHODS), "methods, separated by commas")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.methods.split(",")
        if len(set(names)) < max(2, len(names)):
            raise InputError(
                f"--methods={self.methods} must be at least 2 different ones: they are ranked."
            )
        for name in names:
            if name not in METHODS:
                raise InputError(
                    f"--methods={self.methods}: {name!r} is unknown: use some of "
                    f"{','.join(METHODS)}."
                )


@dataclass(frozen=True)
class Table:
    """A data set.

    Attributes:
      name: in the file.
      x: features, standardised, `(n, d)`.
      y: labels, `(n,)`.
      validation: the half that hyper-parameters are chosen by, bool, `(n,)`.
      test: the test rows of each split, bool, `(SPLITS, n)`.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def size(self) -> dict[str, int]:
        """Rows, features and classes."""
        n, d = self.x.shape
        return {"rows": n, "features": d, "classes": len(np.unique(self.y))}


def load(path: str, max_n: int, datasets: str | None) -> list[Table]:
    """Reads the data sets, those with few rows first.

    Raises:
      InputError: the file cannot be read or has not these arrays, or none is left.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--data_file={path} cannot be read ({error}): it must be an .npz file (--help says of "
            "what)."
        ) from error
    names = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
    wanted = datasets.split(",") if datasets else list(names)
    for name in wanted:
        if name not in names:
            raise InputError(
                f"--datasets: {name!r} is not in {path}, which has {', '.join(names)}."
            )
    tables = []
    for name in wanted:
        table = _table(path, name, arrays)
        if len(table.y) <= max_n:
            tables.append(table)
        elif datasets:
            raise InputError(
                f"--max_n={max_n} is too small for --datasets: {name!r} has {len(table.y)} rows."
            )
    if len(tables) < 2:
        raise InputError(
            f"--max_n={max_n}: {len(tables)} data sets have so few rows, and ranks need 2."
        )
    return sorted(tables, key=lambda table: len(table.y))


def _table(path: str, name: str, arrays: Mapping[str, np.ndarray]) -> Table:
    if missing := [kind for kind in LAYOUT if f"{name}/{kind}" not in arrays]:
        raise InputError(
            f"--data_file={path} has no array {name}/{missing[0]}, which it must have."
        )
    x, y, validation, test = (arrays[f"{name}/{kind}"] for kind in LAYOUT)
    right = {
        "X": x.ndim == 2 and np.isfinite(x).all(),
        "y": y.shape == x.shape[:1] and y.dtype.kind in "iu",
        "validation": validation.shape == y.shape and validation.dtype == bool,
        "test": test.shape == (SPLITS, *y.shape) and test.dtype == bool,
    }
    for kind, is_right in right.items():
        if not is_right:
            given = arrays[f"{name}/{kind}"]
            raise InputError(
                f"--data_file={path}: {name}/{kind} has shape {given.shape} and dtype "
                f"{given.dtype}; it must be {LAYOUT[kind]}."
            )
    if not all(
        (~test & half).any(1).all() and test.any(1).all() for half in (validation, ~validation)
    ):
        raise InputError(
            f"--data_file={path}: {name} has a split without test rows, or one outside of whose "
            "test rows a half has none; it needs more rows."
        )
    return Table(name, x.astype(np.float64), y.astype(int), validation, test)


def measure(method: Method, table: Table) -> Arrays:
    """Chooses hyper-parameters and tests them, twice.

    As published: what is fitted to the one half is chosen by its accuracy on the validation half,
    and tested by fitting it to all but the test rows of each split. So test rows have a part in the
    choice. Inside: the same halves less the test rows of the split, a choice for each split.

    Returns:
      Over the two ways and the splits: `accuracy` and `chosen`, the index of the hyper-parameters.
    """
    accuracies = method.prepare(table.x, table.y)
    published = np.ones((1, len(table.y)), bool)
    used, half = np.concatenate([published, ~table.test]), table.validation
    validation = [
        [accuracies(shape, method.costs, rows & ~half, rows & half) for rows in used]
        for shape in range(len(method.shapes))
    ]
    # Over shapes, then costs: of equally good ones the first.
    best = np.swapaxes(validation, 1, 2).reshape(-1, len(used)).argmax(0)
    chosen = np.stack([np.repeat(best[:1], SPLITS), best[1:]])
    accuracy = np.empty(chosen.shape)
    for candidate in np.unique(chosen):
        shape, cost = divmod(int(candidate), len(method.costs))
        for split in np.flatnonzero((chosen == candidate).any(0)):
            test = table.test[split]
            (found,) = accuracies(shape, method.costs[cost : cost + 1], ~test, test)
            accuracy[chosen[:, split] == candidate, split] = found
    return {"accuracy": accuracy, "chosen": chosen}


def part_inputs(table: Table, name: str) -> dict[str, Any]:
    """All that the part of a data set and a method depends on."""
    method = METHODS[name]
    return {
        "table": vars(table), "method": name, "shapes": method.shapes, "costs": method.costs,
        "steps": kernels.SVM_STEPS, "trees": uci_methods.TREES,
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }  # fmt: skip


def kept(table: Table, name: str, workdir: Workdir) -> Arrays:
    """What `measure` returns of the method, and its `seconds`, from an earlier run or now."""

    def compute():
        start = time.perf_counter()
        found = measure(METHODS[name], table)
        return {**found, "seconds": np.asarray(time.perf_counter() - start)}

    part = f"{table.name}-{name.replace(' ', '-')}"
    return workdir.part(part, part_inputs(table, name), compute)


def main(settings: Settings, workdir: Workdir) -> None:
    """Tests the methods on the data sets; writes the report of what is finished, now and then."""
    if settings.data_file is None:
        raise InputError("--data_file is missing: name a file with the data sets (--help).")
    tables = load(settings.data_file, settings.max_n, settings.datasets)
    try:
        from experiments.claims import uci_report
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed: `pip install ".[tabular]"`.') from error
    names = settings.methods.split(",")
    sizes = {table.name: table.size for table in tables}
    found: dict[str, dict[str, Arrays]] = {table.name: {} for table in tables}
    reported = time.monotonic()
    pairs = list(itertools.product(tables, names))
    with progress_bar(pairs, unit="method") as bar:
        for table, name in bar:
            bar.set_description(f"{table.name}, {name}")
            found[table.name][name] = kept(table, name, workdir)
            if time.monotonic() > reported + REPORT_EVERY:
                uci_report.write(settings, sizes, found, workdir)
                reported = time.monotonic()
    uci_report.write(settings, sizes, found, workdir)


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
