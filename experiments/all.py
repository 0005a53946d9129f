"""Runs every launcher, one after the other, and puts what they found on one page.

Each is a process of its own, with a directory of its own in --workdir, and computes no part again
that is finished there; a launcher that fails leaves the others running. report.html, which needs no
other file, has all claims, figures and tables.

    python -m experiments.all --workdir=out/all
    python -m experiments.all --workdir=out/full --config=full --data_dir=MNIST
    python -m experiments.all --workdir=out/all --only=phase,spectrum
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from experiments.lib import html_report, launch
from experiments.lib.launch import flag
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

LAUNCHERS = (
    "covariance", "gaussianity", "limits", "spectrum", "phase", "generalization", "dynamics",
    "compare", "neural_ode",
)  # fmt: skip
ON_IMAGES = ("generalization", "dynamics", "compare", "neural_ode")


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags."""

    only: str = flag(",".join(LAUNCHERS), "launchers to run, separated by commas")
    config: str | None = flag(None, "full: the published sizes, hours on a CPU", one_of=("full",))
    data_dir: str | None = flag(
        None,
        f"directory of MNIST's four IDX files: {', '.join(ON_IMAGES)} then run on MNIST instead of "
        "scikit-learn's digits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only.split(","):
            if name not in LAUNCHERS:
                raise InputError(
                    f"--only={self.only}: {name!r} is not a launcher; they are "
                    f"{', '.join(LAUNCHERS)}."
                )
        if self.config and self.data_dir is None and "generalization" in self.names:
            raise InputError(
                "--config=full runs generalization on MNIST: name its directory by --data_dir, or "
                "leave generalization out of --only."
            )

    @property
    def names(self) -> list[str]:
        """The launchers to run, in the order of `LAUNCHERS`."""
        return [name for name in LAUNCHERS if name in self.only.split(",")]


def run(settings: Settings, workdir: Workdir, name: str) -> str | None:
    """Runs a launcher.

    Returns:
      `None`, or why it has no results.
    """
    module = f"experiments.claims.{name}"
    command = [sys.executable, "-m", module, f"--workdir={workdir.path / name}"]
    if settings.config:
        command.append(f"--config={settings.config}")
    if settings.data_dir is not None and name in ON_IMAGES:
        command += ["--data=mnist", f"--data_dir={settings.data_dir}"]
    status = subprocess.run(command, check=False).returncode
    if status > 128:  # a signal ended it, and ends this one in the same way
        signal.raise_signal(status - 128)
    if status == 0:
        return None
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
    return f"It {how}: `python {' '.join(command[1:])}` shows why."


def main(settings: Settings, workdir: Workdir) -> None:
    """Runs the launchers and writes the page; exits with 1 if one of them failed."""
    outcomes: dict[str, str | None] = {}
    for i, name in enumerate(settings.names, start=1):
        counted = f"[{i}/{len(settings.names)}] {name}"
        print(f"{counted}: running", file=sys.stderr, flush=True)
        start = time.perf_counter()
        outcomes[name] = run(settings, workdir, name)
        ended = "failed" if outcomes[name] else "finished"
        seconds = time.perf_counter() - start
        print(f"{counted}: {ended} after {seconds:.0f} s\n", file=sys.stderr, flush=True)
        if outcomes[name] is None:
            workdir.kept.append(name)
        workdir.write_text("report.html", html_report.page(workdir.path, outcomes))
    print(f"See {workdir.path / 'report.html'}.")
    failed = [name for name, outcome in outcomes.items() if outcome is not None]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(outcomes)} launchers failed: {', '.join(failed)}.")


if __name__ == "__main__":
    launch.main(Settings, main)
