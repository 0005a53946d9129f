"""Infinitely wide deep equilibrium networks beside finite ones, on real images.

Computes what an infinitely wide DEQ predicts (its NNGP posterior; gradient descent with its NTK),
trains ensembles of finite DEQs of several widths by the same full-batch gradient descent, and
measures how far apart they are, which theory says falls as 1/√width. Writes to the directory
--workdir: results.json (every number), compare.png, report.md, and parts/ (what is finished, not
computed again by another run of the same settings).

    python -m experiments.claims.compare --workdir=out/compare
    python -m experiments.claims.compare --workdir=out/mnist --data=mnist --data_dir=MNIST
    python -m experiments.claims.compare --workdir=out/compare-full --config=full
"""

from __future__ import annotations

import dataclasses

from experiments.claims import compare_report
from experiments.claims.compare_analysis import Comparison, analyse
from experiments.lib import ensembles, launch
from experiments.lib.ensembles import Settings
from experiments.lib.workdir import Workdir

FULL = {"n_train": 512, "widths": tuple(2**i for i in range(6, 12))}


def compare(settings: Settings, workdir: Workdir) -> Comparison:
    """Runs the experiment and writes its report into `workdir`.

    Raises:
      InputError, NoEquilibriumError, NotConvergedError, TrainingError: the message says why.
    """
    data, limit, networks = ensembles.train(settings, workdir)
    comparison = analyse(data, settings.recorded_steps, limit, networks)
    compare_report.write(dataclasses.asdict(settings), data, comparison, workdir)
    return comparison


def main(settings: Settings, workdir: Workdir) -> None:
    """Compares, and prints the table."""
    print(compare_report.console(compare(settings, workdir)))


if __name__ == "__main__":
    launch.main(Settings, main, {"full": FULL})
