"""Runs every launcher, one after the other, and puts what they found on one page.

Each is a process of its own, with a directory of its own in --workdir. What is finished there, of
the same settings and versions, is not computed again; a launcher that fails leaves the others
running. report.html, which needs no other file, has all claims, figures and tables.

    python -m experiments.all --workdir=out/all
    python -m experiments.all --workdir=out/full --config=full --data_dir=MNIST
    python -m experiments.all --workdir=out/all --only=phase,spectrum
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from experiments.lib import html_report, launch
from experiments.lib.launch import flag
from experiments.lib.workdir import Workdir, versions
from nt_deq.errors import InputError

LAUNCHERS = (
    "covariance", "gaussianity", "limits", "spectrum", "phase", "generalization", "dynamics",
    "compare",
)  # fmt: skip
ON_IMAGES = ("generalization", "dynamics", "compare")


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags."""

    only: str = flag(",".join(LAUNCHERS), "launchers to run, separated by commas")
    config: str | None = flag(None, "full: the published sizes, hours on a CPU")
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
        if self.config not in (None, "full"):
            raise InputError(f"--config={self.config} is unknown: use full, or leave it out.")
        if self.config and self.data_dir is None and "generalization" in self.names:
            raise InputError(
                "--config=full runs generalization on MNIST: name its directory by --data_dir, or "
                "leave generalization out of --only."
            )

    @property
    def names(self) -> list[str]:
        """The launchers to run, in the order of `LAUNCHERS`."""
        return [name for name in LAUNCHERS if name in self.only.split(",")]

    def values(self, name: str) -> dict[str, str]:
        """The settings of a launcher that are not its defaults, but for `--config`."""
        on_mnist = self.data_dir is not None and name in ON_IMAGES
        return {"data": "mnist", "data_dir": str(self.data_dir)} if on_mnist else {}


def finished(settings: Settings, workdir: Workdir, name: str) -> bool:
    """Whether a launcher's results are there, of these settings and the present versions."""
    file = workdir.path / name / "results.json"
    if not file.exists():
        return False
    results = json.loads(file.read_text(encoding="utf-8"))
    launcher = importlib.import_module(f"experiments.claims.{name}")
    config = launcher.FULL if settings.config == "full" else {}
    wanted = dataclasses.asdict(launcher.Settings(**{**config, **settings.values(name)}))
    return (results["settings"], results["versions"]) == (
        json.loads(json.dumps(wanted)),
        versions(),
    )


def run(settings: Settings, workdir: Workdir, name: str) -> str | None:
    """Runs a launcher.

    Returns:
      `None`, or why it has no results.
    """
    command = [
        sys.executable,
        "-m",
        f"experiments.claims.{name}",
        f"--workdir={workdir.path / name}",
    ]
    command += [f"--config={settings.config}"] if settings.config else []
    command += [f"--{flag}={value}" for flag, value in settings.values(name).items()]
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
        if finished(settings, workdir, name):
            outcomes[name] = None
            print(f"{counted}: kept from an earlier run", file=sys.stderr, flush=True)
        else:
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
