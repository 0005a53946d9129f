"""The problem of `compare` and `dynamics`: its infinitely wide limit and networks trained on it.

What is finished is a part of the working directory, so that another run goes on after it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from nt_deq import NoEquilibriumError, enable_x64
from experiments.lib import infinite, launch, training
from experiments.lib.data import N_TEST, N_TRAIN, Dataset, DataSettings, load
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays, Workdir
from nt_deq._progress import progress_bar
from nt_deq.activations import ACTIVATIONS
from nt_deq.errors import InputError


@dataclass(frozen=True)
class Settings(DataSettings):
    """The flags that the launchers with trained networks share."""

    n_train: int | None = flag(
        None, f"training inputs, drawn at random; by default all, but {N_TRAIN} at most", at_least=2
    )
    n_test: int | None = flag(
        None, f"test inputs, drawn at random; by default all, but {N_TEST} at most", at_least=1
    )
    widths: tuple[int, ...] = flag((64, 256, 1024), "widths of the finite networks", at_least=1)
    seeds: int = flag(8, "networks of each width", at_least=2)
    W_std: float = flag(
        0.6,
        "standard deviation of the recurrent weights; there is an equilibrium where "
        "W_std² E[φ'²] < 1 (relu: W_std < 1.41), and networks are near their limit where W_std is "
        "well below",
        at_least=0,
    )
    U_std: float = flag(1.0, "standard deviation of the input weights", above=0)
    b_std: float = flag(0.0, "standard deviation of the biases, 0 for none", at_least=0)
    activation: str = flag("relu", f"one of {', '.join(ACTIVATIONS)}")
    learning_rate: float | None = flag(
        None,
        "step size of gradient descent; by default an eighth of the largest with which the "
        "infinitely wide network converges (nt.predict.max_learning_rate)",
        above=0,
    )
    steps: int = flag(
        64,
        "steps of gradient descent; the training time is learning_rate · steps",
        at_least=1,
    )
    float64: bool = flag(False, "compute in float64 instead of float32")
    seed: int = flag(0, "of the choice of inputs and of the initialisations", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"--activation={self.activation} is unknown: use one of {', '.join(ACTIVATIONS)}."
            )
        if len(set(self.widths)) < max(2, len(self.widths)):
            raise InputError(
                f"--widths={launch.format_value(self.widths)} has to be at least two different "
                "widths, none twice: distances are compared across widths."
            )

    @property
    def architecture(self) -> Architecture:
        """What the networks are."""
        return Architecture(self.W_std, self.U_std, self.b_std, self.activation)

    @property
    def recorded_steps(self) -> list[int]:
        """The steps at which predictions are compared: 0, the powers of 2, the last."""
        powers = [2**i for i in range(self.steps.bit_length()) if 2**i < self.steps]
        return [0, *powers, self.steps]


def train(
    settings: Settings, workdir: Workdir, ntk_inputs: int = 0
) -> tuple[Dataset, Arrays, dict[int, Arrays]]:
    """Computes the limit and trains networks of every width.

    Args:
      settings: the flags.
      workdir: where parts are kept.
      ntk_inputs: as of `training.train`.

    Returns:
      The data; what `infinite.predict` returned; what `training.train` returned, by width.

    Raises:
      InputError, NoEquilibriumError, NotConvergedError, TrainingError: the message says why.
    """
    data = load(
        settings.data, settings.data_dir, settings.n_train, settings.n_test, settings.seed,
        regression=True,
    )  # fmt: skip
    with enable_x64(settings.float64):
        limit = _infinite(settings, data, workdir)
        learning_rate, bound = float(limit["learning_rate"]), float(limit["max_learning_rate"])
        if learning_rate >= bound:
            raise InputError(
                f"--learning_rate={learning_rate} is too large: gradient descent on the "
                f"infinitely wide network diverges from {bound:.4g} on; leave it out for "
                f"{bound * infinite.LEARNING_RATE_FRACTION:.4g}."
            )
        networks = {
            width: _finite(settings, data, width, learning_rate, ntk_inputs, workdir)
            for width in sorted(settings.widths)
        }
    return data, limit, networks


def _problem(settings: Settings, data: Dataset) -> dict[str, np.ndarray]:
    dtype = np.float64 if settings.float64 else np.float32
    return {
        "x_train": data.x_train.astype(dtype),
        "y_train": data.targets_train.astype(dtype),
        "x_test": data.x_test.astype(dtype),
    }


def _infinite(settings: Settings, data: Dataset, workdir: Workdir) -> Arrays:
    def compute():
        _tell("infinite width: kernels, posterior, gradient descent")
        return infinite.predict(settings.architecture, **problem, **options)

    problem = _problem(settings, data)
    options = {"learning_rate": settings.learning_rate, "steps": settings.recorded_steps}
    inputs = {**vars(settings.architecture), **problem, **options}
    try:
        arrays, found = workdir.part("infinite", inputs, compute)
    except NoEquilibriumError as error:
        raise InputError(f"--{error}") from error
    if found:
        _tell("infinite width: kept from an earlier run")
    return arrays


def _finite(
    settings: Settings,
    data: Dataset,
    width: int,
    learning_rate: float,
    ntk_inputs: int,
    workdir: Workdir,
) -> Arrays:
    def compute():
        with progress_bar(total=settings.steps, desc=name, unit="step") as bar:
            return training.train(settings.architecture, **problem, **options, progress=bar.update)

    name = f"width {width}"
    problem = _problem(settings, data)
    options = {
        "width": width,
        "learning_rate": learning_rate,
        "steps": settings.recorded_steps,
        "seeds": settings.seeds,
        "seed": settings.seed,
        "ntk_inputs": ntk_inputs,
    }
    inputs = {**vars(settings.architecture), **problem, **options}
    arrays, found = workdir.part(name.replace(" ", "-"), inputs, compute)
    if found:
        _tell(f"{name}: kept from an earlier run")
    return arrays


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
