"""The problem of `compare` and `dynamics`: its infinitely wide limit and networks trained on it.

What is finished is a part of the working directory, so that another run goes on after it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nt_deq import NoEquilibriumError, enable_x64
from experiments.lib import infinite, training
from experiments.lib.data import N_TEST, N_TRAIN, Dataset, DataSettings, load
from experiments.lib.launch import flag
from experiments.lib.leading_order import LeadingPower, fit_leading_power
from experiments.lib.networks import Architecture
from experiments.lib.report import PowerLaw, fit_by_width
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
    widths: tuple[int, ...] = flag(
        (64, 256, 1024), "widths of the finite networks", at_least=1, different=2
    )
    seeds: int = flag(8, "networks of each width", at_least=2)
    W_std: float = flag(
        0.6,
        "standard deviation of the recurrent weights; there is an equilibrium where W_std² E[φ'²] "
        "< 1 (relu: W_std < 1.41), and networks are near their limit where W_std is well below",
        at_least=0,
    )
    U_std: float = flag(1.0, "standard deviation of the input weights", above=0)
    b_std: float = flag(0.0, "standard deviation of the biases, 0 for none", at_least=0)
    activation: str = flag("relu", f"one of {', '.join(ACTIVATIONS)}", one_of=ACTIVATIONS)
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
    dtype = np.float64 if settings.float64 else np.float32
    arrays = (data.x_train, data.targets_train, data.x_test)
    names = ("x_train", "y_train", "x_test")
    problem: dict[str, Any] = {
        name: array.astype(dtype) for name, array in zip(names, arrays, strict=True)
    }
    problem["steps"] = settings.recorded_steps
    architecture = settings.architecture

    def compute_limit():
        print("infinite width: kernels, posterior, gradient descent", file=sys.stderr, flush=True)
        return infinite.predict(architecture, **problem, learning_rate=settings.learning_rate)

    with enable_x64(settings.float64):
        inputs = vars(architecture) | problem | {"learning_rate": settings.learning_rate}
        try:
            limit = workdir.part("infinite", inputs, compute_limit)
        except NoEquilibriumError as error:
            raise InputError(f"--{error}") from error
        learning_rate, bound = float(limit["learning_rate"]), float(limit["max_learning_rate"])
        if learning_rate >= bound:
            raise InputError(
                f"--learning_rate={learning_rate} is too large: gradient descent on the "
                f"infinitely wide network diverges from {bound:.4g} on; leave it out for "
                f"{bound * infinite.LEARNING_RATE_FRACTION:.4g}."
            )
        networks = {}
        for width in sorted(settings.widths):
            options = problem | {
                "width": width, "learning_rate": learning_rate, "ntk_inputs": ntk_inputs,
                "seeds": settings.seeds, "seed": settings.seed,
            }  # fmt: skip

            def compute(width=width, options=options):
                with progress_bar(total=settings.steps, desc=f"width {width}", unit="step") as bar:
                    return training.train(architecture, **options, progress=bar.update)

            inputs = vars(architecture) | options
            networks[width] = workdir.part(f"width-{width}", inputs, compute)
    return data, limit, networks


def beside_limit(
    data: Dataset, steps: Sequence[int], limit: Arrays, trained: Arrays
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sets networks of one width beside the limit that starts where each of them started.

    Args:
      data: what was learned.
      steps: at which outputs were recorded.
      limit: what `infinite.predict` returned.
      trained: what `training.train` returned.

    Returns:
      Outputs of the networks and what the limit makes of their starts, float64, `(steps, seeds,
      n+m, C)` each; and how far apart these are, `(steps, seeds)`: RMS over test inputs and
      outputs.
    """
    outputs = trained["outputs"].astype(np.float64)
    expected = infinite.from_start(limit, data.targets_train, outputs[0], steps)
    apart = np.square(outputs - expected)[:, :, len(data.y_train) :].mean((2, 3))
    return outputs, expected, np.sqrt(apart)


def fits_at_steps(values: Mapping[int, np.ndarray]) -> list[PowerLaw]:
    """Fits `fit_by_width` to numbers `(steps, seeds)`, by width, at every step but the first."""
    return [fit_by_width(step) for step in _by_step(values)]


def leading_powers_at_steps(values: Mapping[int, np.ndarray]) -> list[LeadingPower]:
    """Fits `fit_leading_power` to numbers `(steps, seeds)`, by width, likewise."""
    return [fit_leading_power(step) for step in _by_step(values)]


def _by_step(values: Mapping[int, np.ndarray]) -> list[dict[int, np.ndarray]]:
    steps = range(1, len(next(iter(values.values()))))
    return [{width: of_width[step] for width, of_width in values.items()} for step in steps]
