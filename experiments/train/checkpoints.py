"""What a training run leaves on disk, so that a killed one goes on as if nothing had happened.

A checkpoint holds the state of training and how long `metrics.jsonl` was; lines after that are
written again, and identically, by the run that goes on. `run.json` says what the run depends on,
and how many epochs it was to have, from which step on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

RUN, METRICS, CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"

Tree = TypeVar("Tree")


class Run:
    """A run in a working directory: `run.json`, `metrics.jsonl` and `checkpoints/`.

    Args:
      workdir: where.
      identity: all that the run depends on, as JSON: named groups of named values.

    Raises:
      InputError: the directory holds a run of another identity.
    """

    def __init__(self, workdir: Workdir, identity: dict[str, dict[str, Any]]):
        self._workdir = workdir
        self._metrics = workdir.path / METRICS
        self._claim(json.loads(json.dumps(identity)))
        self._checkpoints = ocp.CheckpointManager(
            (workdir.path / CHECKPOINTS).resolve(),
            # Not in the background: the next step overwrites the buffers that are being written.
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        )

    def _claim(self, identity: dict[str, dict[str, Any]]) -> None:
        path = self._workdir.path
        file = path / RUN
        if not file.exists():
            if any((path / name).exists() for name in (METRICS, CHECKPOINTS)):
                raise InputError(
                    f"--workdir={path} has {METRICS} or {CHECKPOINTS} of a run, and no {RUN} "
                    "that says which: name another directory."
                )
            self._workdir.write_json(RUN, {**identity, "epochs": []})
        held = read_run(path)
        for group, values in identity.items():
            for name, value in values.items():
                before = held[group].get(name)
                if before != value:
                    raise InputError(
                        f"--workdir={path} holds a run with other {group}: {name} was {before}, "
                        f"now {value}. Go on with {before}, or name another directory."
                    )

    def restore(self, state: Tree) -> tuple[Tree, float]:
        """Goes back to the last checkpoint, and takes off what was written to the metrics since.

        Args:
          state: of a run at its beginning.

        Returns:
          The state to go on from, and the seconds that the run has taken so far.

        Raises:
          InputError: the metrics are shorter than they were then.
        """
        step = self._checkpoints.latest_step()
        if step is None:
            self._truncate(0)
            return state, 0.0
        restored = self._checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),  # pyright: ignore[reportCallIssue]
                progress=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
            ),
        )
        progress = restored["progress"]
        self._truncate(progress["metrics_bytes"])
        self._keep(step)
        return restored["state"], progress["seconds"]

    def plan(self, step: int, epochs: int) -> int:
        """Writes down that the run has so many epochs, from `step` on.

        Returns:
          How many it was to have before.
        """
        held = read_run(self._workdir.path)
        before = held.get("epochs", [])
        if not before or before[-1]["epochs"] != epochs:
            planned = [*before, {"from_step": step, "epochs": epochs}]
            self._workdir.write_json(RUN, {**held, "epochs": planned})
        return before[-1]["epochs"] if before else epochs

    def _truncate(self, size: int) -> None:
        with open(self._metrics, "ab") as file:
            if file.tell() < size:
                raise InputError(
                    f"{self._metrics} has {file.tell()} bytes, and had {size} at the last "
                    "checkpoint: put it back as it was, or name another --workdir."
                )
            file.truncate(size)

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Writes a checkpoint, whole or not at all, in place of the one before."""
        progress = {"seconds": seconds, "metrics_bytes": self._metrics.stat().st_size}
        self._checkpoints.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                progress=ocp.args.JsonSave(progress),  # pyright: ignore[reportCallIssue]
            ),
        )
        self._keep(step)

    def _keep(self, step: int) -> None:
        self._workdir.kept[:] = [f"the checkpoint of step {step}"]

    def log(self, metrics: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines so far."""
        return [json.loads(line) for line in self._metrics.read_text("utf-8").splitlines()]


def read_run(path: Path) -> dict[str, Any]:
    """What the run in the directory `path` depends on."""
    return json.loads((path / RUN).read_text(encoding="utf-8"))


def last_state(path: Path, state: Tree) -> Tree:
    """Returns the state of the last checkpoint in the directory `path`, and changes nothing there.

    Args:
      path: the working directory of a run.
      state: of the run at its beginning.

    Raises:
      InputError: there is no checkpoint.
    """
    steps = [int(f.name) for f in (path / CHECKPOINTS).glob("*") if f.name.isdigit()]
    if not steps:
        raise InputError(f"{path} has no checkpoint of experiments.train.classifier yet.")
    last = (path / CHECKPOINTS / str(max(steps)) / "state").resolve()
    return ocp.StandardCheckpointer().restore(last, state)
