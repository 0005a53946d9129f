"""What infinitely deep kernels and networks make of noisy labels: benign overfitting.

Test error against the number of training images, with and without wrong labels, of the kernels of
a deep equilibrium network, of explicit networks and of a Gaussian process with an RBF kernel, each
interpolating and regularised; and of finite networks that are trained until they interpolate.
Writes results.json, generalization.png and report.md to --workdir.

    python -m experiments.claims.generalization --workdir=out/generalization
    python -m experiments.claims.generalization --workdir=out/generalization-full --config=full \
      --data_dir=MNIST
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from experiments.claims import generalization_report
from experiments.lib import launch, training
from experiments.lib.data import Dataset, DataSettings, load
from experiments.lib.kernels import (
    MODES,
    NONE,
    REGULARISATION,
    Kernel,
    deq,
    explicit,
    fit,
    rbf,
    regress,
)
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays, Workdir
from nt_deq._progress import progress_bar
from nt_deq.errors import InputError

Summary = dict[str, Any]

W_STDS = (0.6, 1.0, 1.2)  # of the infinitely wide DEQs
DEPTHS = (1, 3, 10)  # hidden layers of explicit networks
LENGTHS = (0.25, 0.35, 0.5, 0.7)  # of the RBF kernel, relative to the norm of an input
ENOUGH = 0.01  # of the mean squared target: the loss of a network that fits
FULL = {
    "data": "mnist",
    "counts": (100, 300, 1000, 3000, 10_000),
    "n_test": 10_000,
    "network_counts": (100, 1000),
    "seeds": 3,
}


@dataclass(frozen=True)
class Settings(DataSettings):
    """The flags."""

    counts: tuple[int, ...] = flag(
        (50, 100, 300, 1000), "numbers of training images", at_least=10, different=2
    )
    n_test: int = flag(700, "test images, drawn at random", at_least=2)
    label_noise: float = flag(
        0.2,
        "fraction of training labels that are wrong; every measurement is also without",
        above=0,
        at_most=0.5,
    )
    network_counts: tuple[int, ...] = flag(
        (100,), "numbers of training images of finite networks, out of --counts", at_least=10
    )
    widths: tuple[int, ...] = flag(
        (32, 128, 512), "widths of finite networks", at_least=1, different=2
    )
    seeds: int = flag(2, "finite networks of each width", at_least=1)
    max_steps: int = flag(2000, "steps of a finite network's training at most", at_least=10)
    W_std: float = flag(
        0.6,
        "standard deviation of the recurrent weights of finite networks",
        at_least=0,
        below=2**0.5,
    )
    seed: int = flag(0, "of the choice of images, wrong labels and initialisations", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := set(self.network_counts) - set(self.counts):
            raise InputError(
                f"--network_counts={launch.format_value(self.network_counts)}: {min(missing)} is "
                f"not among --counts={launch.format_value(self.counts)}, and networks are compared "
                "with kernels."
            )

    @property
    def noises(self) -> tuple[float, float]:
        """The fractions of wrong labels."""
        return 0.0, self.label_noise


def noisy_labels(labels: np.ndarray, classes: int, noise: float, seed: int) -> np.ndarray:
    """Gives `round(noise · n)` of the labels `(n,)`, drawn at random, another class each."""
    rng = np.random.default_rng((seed, len(labels)))
    wrong = rng.permutation(len(labels))[: round(noise * len(labels))]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return labels


FAMILIES: dict[str, tuple[Callable[[float], Kernel], tuple[float, ...]]] = {
    "DEQ, NNGP": (partial(deq, "nngp"), W_STDS),
    "DEQ, NTK": (partial(deq, "ntk"), W_STDS),
    **{
        f"ReLU, depth {depth}, {get.upper()}": (partial(explicit, get), (depth,))
        for get in ("nngp", "ntk")
        for depth in DEPTHS
    },
    "RBF": (lambda length: rbf(1 / (2 * length**2)), LENGTHS),
}


class Problem:
    """The first training images, with and without wrong labels.

    Attributes:
      x: inputs, `(n, d)`.
      labels: as they are trained on, `(noises, n)`.
      targets: the same, centred one-hot, `(noises, n, C)`.
      enough: the mean squared error of a network that fits.
    """

    def __init__(self, settings: Settings, data: Dataset, count: int):
        y, classes = data.y_train[:count], len(data.classes)
        self.x = data.x_train[:count]
        self.labels = np.stack(
            [noisy_labels(y, classes, noise, settings.seed) for noise in settings.noises]
        )
        self.targets = np.eye(classes)[self.labels] - 1 / classes
        self.enough = ENOUGH * float(np.mean(self.targets**2))


def measure_kernels(data: Dataset, problem: Problem, workdir: Workdir) -> dict[str, Arrays]:
    """Regresses with every kernel; what `regress` returns, by name of the kernel."""
    count, found = len(problem.x), {}
    for name, (family, shapes) in FAMILIES.items():

        def compute(name=name, family=family, shapes=shapes):
            total = len(shapes) * len(REGULARISATION)
            with progress_bar(total=total, desc=f"{name}, n = {count}") as bar:
                return regress(family, shapes, problem.x, problem.targets, data.x_test, bar.update)

        inputs = {
            "x": problem.x, "y": problem.targets, "x_test": data.x_test, "shapes": list(shapes),
            "regularisation": list(REGULARISATION),
        }  # fmt: skip
        part = name.replace(", ", "-").replace(" ", "-")
        found[name] = workdir.part(f"{part}-{count}", inputs, compute)
    return found


def measure_networks(
    settings: Settings, data: Dataset, problem: Problem, workdir: Workdir
) -> dict[int, Arrays]:
    """Trains finite networks; what `training.interpolate` returns, by width.

    With them is `limit`, `(noises, m, C)`: what they would learn if they were infinitely wide and
    fitted exactly, `Θ(x, X) Θ(X, X)⁻¹ y`.
    """
    count, found = len(problem.x), {}
    kernel = deq("ntk", settings.W_std)
    ntk, to_train = kernel(problem.x, problem.x), kernel(data.x_test, problem.x)
    limit = np.stack([fit(ntk, y, NONE).predict(to_train) for y in problem.targets])
    options: dict[str, Any] = {
        "architecture": Architecture(settings.W_std, 1.0, 0.0, "relu"),
        "x_train": problem.x, "y_train": problem.targets, "x_test": data.x_test,
        # A quarter of the largest with which the infinitely wide network converges.
        "learning_rate": problem.targets[0].size / (2 * float(np.linalg.eigvalsh(ntk)[-1])),
        "max_steps": settings.max_steps, "enough": problem.enough, "seeds": settings.seeds,
        "seed": settings.seed,
    }  # fmt: skip
    for width in sorted(settings.widths):
        name = f"width {width}, n = {count}: at most {settings.max_steps} steps"

        def compute(width=width, name=name):
            with progress_bar(desc=name, unit="step") as bar:
                return training.interpolate(width=width, **options, progress=bar.update)

        trained = workdir.part(f"width-{width}-{count}", options, compute)
        found[width] = {**trained, "limit": limit}
    return found


def summarise(
    data: Dataset, problem: Problem, kernels: Mapping[str, Arrays], networks: Mapping[int, Arrays]
) -> Summary:
    """Reduces what the functions above return to errors; the numbers are those of results.json."""
    noises, n = problem.labels.shape
    summary: Summary = {"kernels": {}, "networks": {}, "comparison": []}
    wrong: dict[str, np.ndarray] = {}
    for name, found in kernels.items():
        train = found["train"].argmax(-1) != problem.labels
        test = found["test"].argmax(-1) != data.y_test
        wrong[name] = test[MODES.index("tuned")].astype(float)
        numbers = {
            "shape": found["shape"],
            "regularisation": found["regularisation"],
            "train_error": train.mean(-1),
            "test_error": test.mean(-1),
        }
        summary["kernels"][name] = {
            mode: {key: of[i] for key, of in numbers.items()} for i, mode in enumerate(MODES)
        }
    for i in range(noises):
        by_error = sorted(wrong, key=lambda name: wrong[name][i].mean())
        ours = next(name for name in by_error if name.startswith("DEQ"))
        other = next(name for name in by_error if not name.startswith("DEQ"))
        difference = wrong[ours][i] - wrong[other][i]  # image by image
        summary["comparison"].append(
            {
                "deq": ours,
                "other": other,
                "difference": difference.mean(),
                "standard_error": stats.sem(difference),
            }
        )
    for width, found in networks.items():
        learned, limit = found["learned"], found["limit"]
        distance = np.sqrt(np.square(learned[:, :, n:] - limit[:, None]).mean((2, 3)))
        summary["networks"][width] = {
            "steps": int(found["steps"]),
            "learning_rate": float(found["learning_rate"]),
            "train_mse": found["train_mse"],
            "fits": found["train_mse"] <= problem.enough,
            "train_error": (learned[:, :, :n].argmax(-1) != problem.labels[:, None]).mean(-1),
            "test_error": (learned[:, :, n:].argmax(-1) != data.y_test).mean(-1),
            "limit_test_error": (limit.argmax(-1) != data.y_test).mean(-1),
            "distance": distance,
        }
    return summary


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures kernels and networks and writes the report."""
    counts = sorted(settings.counts)
    data = load(settings.data, settings.data_dir, counts[-1], settings.n_test, settings.seed)
    found = {}
    for count in counts:
        problem = Problem(settings, data, count)
        networks = {}
        if count in settings.network_counts:
            networks = measure_networks(settings, data, problem, workdir)
        kernels = measure_kernels(data, problem, workdir)
        found[count] = summarise(data, problem, kernels, networks)
    generalization_report.write(settings, found, workdir)


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
