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

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.claims import generalization_report
from experiments.lib import launch, training
from experiments.lib.data import Dataset, DataSettings, load
from experiments.lib.kernels import NONE, REGULARISATION, Kernel, deq, explicit, fit, rbf, regress
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Workdir
from nt_deq._progress import progress_bar
from nt_deq.errors import InputError

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

    counts: tuple[int, ...] = flag((50, 100, 300, 1000), "numbers of training images", at_least=10)
    n_test: int = flag(700, "test images, drawn at random", at_least=2)
    label_noise: float = flag(
        0.2,
        "fraction of training labels that are wrong; every measurement is also without",
        above=0,
    )
    network_counts: tuple[int, ...] = flag(
        (100,), "numbers of training images of finite networks, out of --counts", at_least=10
    )
    widths: tuple[int, ...] = flag((32, 128, 512), "widths of finite networks", at_least=1)
    seeds: int = flag(2, "finite networks of each width", at_least=1)
    max_steps: int = flag(2000, "steps of a finite network's training at most", at_least=10)
    W_std: float = flag(
        0.6, "standard deviation of the recurrent weights of finite networks", at_least=0
    )
    seed: int = flag(0, "of the choice of images, wrong labels and initialisations", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("counts", 2), ("widths", 2), ("network_counts", 1)):
            values = getattr(self, name)
            if len(set(values)) < max(least, len(values)):
                raise InputError(
                    f"--{name}={launch.format_value(values)} has to be at least {least} different "
                    "numbers, none twice."
                )
        if missing := set(self.network_counts) - set(self.counts):
            raise InputError(
                f"--network_counts={launch.format_value(self.network_counts)}: {min(missing)} is "
                f"not among --counts={launch.format_value(self.counts)}, and networks are compared "
                "with kernels."
            )
        if self.label_noise > 0.5:
            raise InputError(
                f"--label_noise={self.label_noise} is too large: it has to be at most 0.5."
            )
        if self.W_std >= 2**0.5:
            raise InputError(
                f"--W_std={self.W_std} is too large: there is an equilibrium below √2 = 1.414."
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


@dataclass(frozen=True)
class Problem:
    """The first training images, with and without wrong labels.

    Attributes:
      x: inputs, `(n, d)`.
      labels: as they are trained on, `(noises, n)`.
      targets: the same, centred one-hot, `(noises, n, C)`.
    """

    x: np.ndarray
    labels: np.ndarray
    targets: np.ndarray


def make_problem(settings: Settings, data: Dataset, count: int) -> Problem:
    """Takes the first `count` training images, and makes labels wrong."""
    classes = len(data.classes)
    labels = np.stack(
        [
            noisy_labels(data.y_train[:count], classes, noise, settings.seed)
            for noise in settings.noises
        ]
    )
    return Problem(data.x_train[:count], labels, np.eye(classes)[labels] - 1 / classes)


def _enough(problem: Problem) -> float:
    return ENOUGH * float(np.mean(problem.targets**2))


def measure_kernels(
    data: Dataset, problem: Problem, workdir: Workdir
) -> dict[str, dict[str, np.ndarray]]:
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
        found[name], _ = workdir.part(f"{part}-{count}", inputs, compute)
    return found


def measure_networks(
    settings: Settings, data: Dataset, problem: Problem, workdir: Workdir
) -> dict[int, dict[str, np.ndarray]]:
    """Trains finite networks; what `training.interpolate` returns, by width.

    With them is `limit`, `(noises, m, C)`: what they would learn if they were infinitely wide and
    fitted exactly, `Θ(x, X) Θ(X, X)⁻¹ y`.
    """
    count, found = len(problem.x), {}
    architecture = Architecture(settings.W_std, 1.0, 0.0, "relu")
    to = deq("ntk", settings.W_std)
    ntk = to(problem.x, problem.x)
    to_train = to(data.x_test, problem.x)
    limit = np.stack([fit(ntk, y, NONE).predict(to_train) for y in problem.targets])
    options = {
        # A quarter of the largest with which the infinitely wide network converges.
        "learning_rate": problem.targets[0].size / (2 * float(np.linalg.eigvalsh(ntk)[-1])),
        "max_steps": settings.max_steps,
        "enough": _enough(problem),
        "seeds": settings.seeds,
        "seed": settings.seed,
    }
    for width in sorted(settings.widths):

        def compute(width=width):
            with progress_bar(
                desc=f"width {width}, n = {count}: at most {settings.max_steps} steps", unit="step"
            ) as bar:
                return training.interpolate(
                    architecture, width, problem.x, problem.targets, data.x_test, **options,
                    progress=bar.update,
                )  # fmt: skip

        inputs = {
            **vars(architecture), **options, "x": problem.x, "y": problem.targets,
            "x_test": data.x_test,
        }  # fmt: skip
        trained, _ = workdir.part(f"width-{width}-{count}", inputs, compute)
        found[width] = {**trained, "limit": limit}
    return found


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures kernels and networks and writes the report."""
    counts = sorted(settings.counts)
    data = load(settings.data, settings.data_dir, counts[-1], settings.n_test, settings.seed)
    found = {}
    for count in counts:
        problem = make_problem(settings, data, count)
        kernels = measure_kernels(data, problem, workdir)
        networks = (
            measure_networks(settings, data, problem, workdir)
            if count in settings.network_counts
            else {}
        )
        enough = _enough(problem)
        found[count] = generalization_report.summarise(
            data, problem.labels, kernels, networks, enough
        )
    generalization_report.write(dataclasses.asdict(settings), settings.noises, found, workdir)


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
