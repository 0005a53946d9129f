"""What a training run leaves on disk, so that a killed one goes on as if nothing had happened.

`checkpoint.npz` holds the state of training and `metrics.jsonl` as it was then; lines after that
are written again, and identically, by the run that goes on. `run.json` says what the run depends
on, and how many epochs it was to have, from which step on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

RUN, METRICS, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.npz"

Tree = TypeVar("Tree")


class Run:
    """A run in a working directory: `run.json`, `metrics.jsonl` and `checkpoint.npz`.

    Args:
      workdir: where.
      identity: all that the run depends on, as JSON: named groups of named values.

    Raises:
      InputError: the directory holds a run of another identity.
    """

    def __init__(self, workdir: Workdir, identity: dict[str, dict[str, Any]]):
        path = workdir.path
        self._workdir, self._metrics = workdir, path / METRICS
        if not (path / RUN).exists():
            if self._metrics.exists() or (path / CHECKPOINT).exists():
                raise InputError(
                    f"--workdir={path} has {METRICS} or {CHECKPOINT} of a run, and no {RUN} that "
                    "says which: name another directory."
                )
            workdir.write_json(RUN, {**identity, "epochs": []})
        held = read_run(path)
        for group, values in json.loads(json.dumps(identity)).items():
            for name, value in values.items():
                before = held[group].get(name)
                if before != value:
                    raise InputError(
                        f"--workdir={path} holds a run with other {group}: {name} was {before}, "
                        f"now {value}. Go on with {before}, or name another directory."
                    )

    def restore(self, state: Tree) -> tuple[Tree, int, float]:
        """Goes back to the last checkpoint, and the metrics to what they were then.

        Args:
          state: of a run at its beginning.

        Returns:
          The state to go on from, its step, and the seconds that the run has taken so far.
        """
        step, seconds, metrics = 0, 0.0, ""
        if (self._workdir.path / CHECKPOINT).exists():
            state, held = read_checkpoint(self._workdir.path, state)
            step, seconds, metrics = int(held["step"]), float(held["seconds"]), str(held["metrics"])
            self._keep(step)
        self._workdir.write_text(METRICS, metrics)
        return state, step, seconds

    def plan(self, step: int, epochs: int) -> int:
        """Writes down that the run has so many epochs, from `step` on.

        Returns:
          How many it was to have before.
        """
        held = read_run(self._workdir.path)
        before = held["epochs"]
        if not before or before[-1]["epochs"] != epochs:
            planned = [*before, {"from_step": step, "epochs": epochs}]
            self._workdir.write_json(RUN, {**held, "epochs": planned})
        return before[-1]["epochs"] if before else epochs

    def save(self, step: int, state: Any, seconds: float) -> None:
        """Writes a checkpoint, whole or not at all, in place of the one before."""
        metrics = self._metrics.read_text(encoding="utf-8")
        progress = {"step": step, "seconds": seconds, "metrics": metrics}
        self._workdir.write_arrays(CHECKPOINT, _named(state) | progress)
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


def read_checkpoint(path: Path, state: Tree) -> tuple[Tree, dict[str, np.ndarray]]:
    """Returns the state of the last checkpoint in the directory `path`, and the rest that it holds.

    Args:
      path: the working directory of a run.
      state: of the run at its beginning.

    Raises:
      InputError: there is no checkpoint.
    """
    try:
        with np.load(path / CHECKPOINT, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise InputError(f"{path} has no checkpoint of experiments.train.classifier yet.") from None
    leaves = [jnp.asarray(arrays.pop(name)) for name in _named(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), arrays


def _named(state: Any) -> dict[str, Any]:
    """The arrays of a state by their places in it."""
    return {jax.tree_util.keystr(at): leaf for at, leaf in jax.tree.leaves_with_path(state)}
