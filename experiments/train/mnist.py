"""All of MNIST by the kernel of an infinitely deep network, exactly, on a small machine.

Regression with the NTK or the NNGP kernel of a deep equilibrium network on every training image, by
preconditioned conjugate gradients (`nt_deq.KernelRegression`). The default setting is that of Feng
& Kolter (arXiv:2310.14062): images of norm √d, W_std² = 0.5, U_std² = 0.25, b_std² = 0.5 and a
readout with V_std² = 2, so that K*(x, x) = 1. Writes results.json, mnist.png and report.md to
--workdir. With --store the kernel is on disk, and a run that was killed goes on from there.

    python -m experiments.train.mnist --workdir=out/mnist --data_dir=MNIST
    python -m experiments.train.mnist --workdir=out/mnist --data_dir=MNIST --store=out/mnist/kernel
    python -m experiments.train.mnist --workdir=out/digits --data=digits --n_train=1200 --n_test=500
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nt_deq import KernelClassifier, deq_network
from experiments.lib import launch, report
from experiments.lib.data import Dataset, DataSettings, load
from experiments.lib.launch import flag
from experiments.lib.workdir import Workdir
from nt_deq._progress import progress_bar
from nt_deq.activations import ACTIVATIONS
from nt_deq.errors import InputError, NotPositiveDefiniteError, StoreError

TUNED_W_STD = (0.3, 0.5, 0.7, 0.9)
TUNED_NOISE = (1e-5, 1e-4, 1e-3, 1e-2)
TUNED_TRAIN, TUNED_TEST = 5000, 5000  # training images to fit and to judge by, at most


@dataclass(frozen=True)
class Settings(DataSettings):
    """The flags."""

    data: str = flag("mnist", "mnist (IDX files in --data_dir), digits, or a .npz file")
    n_train: int = flag(60_000, "training images", at_least=2)
    n_test: int = flag(10_000, "test images", at_least=1)
    get: str = flag("ntk", "ntk or nngp")
    activation: str = flag("relu", f"one of {', '.join(ACTIVATIONS)}", one_of=ACTIVATIONS)
    W_std: float = flag(0.5**0.5, "standard deviation of the recurrent weights", at_least=0)
    U_std: float = flag(0.5, "standard deviation of the input weights", above=0)
    b_std: float = flag(0.5**0.5, "standard deviation of the biases, 0 for none", at_least=0)
    V_std: float = flag(2**0.5, "standard deviation of the readout's weights", above=0)
    relative_noise: float = flag(1e-4, "added to the kernel's diagonal, relative to it", at_least=0)
    tune: bool = flag(False, "choose W_std and noise on a held-out part of the training images")
    method: str = flag("auto", "auto, cholesky or cg")
    keep: str = flag("auto", "the kernel in memory, nothing (computed anew), or auto")
    store: str | None = flag(None, "directory or URL to keep the kernel in instead")
    rank: int | None = flag(None, "landmarks of the preconditioner", at_least=1)
    relative_residual: float = flag(1e-5, "relative residual", above=0)
    seed: int = flag(0, "of the choice of images and of landmarks", at_least=0)

    def kernel_fn(self, W_std: float) -> Any:
        """The kernels of the infinitely wide network."""
        return deq_network(W_std, self.U_std, self.b_std, self.activation, self.V_std)[2]

    def classifier(self, W_std: float, relative_noise: float, **options: Any) -> KernelClassifier:
        """One that is not fitted yet."""
        try:
            kernel_fn = self.kernel_fn(W_std)
            get: Any = self.get
            return KernelClassifier(kernel_fn, get, relative_noise, seed=self.seed, **options)
        except ValueError as error:
            raise InputError(f"--{error}") from error


def tune(settings: Settings, data: Dataset) -> list[dict[str, float]]:
    """Accuracy on held-out training images, best first."""
    held_out = min(TUNED_TEST, len(data.x_train) // 3)
    fitted = min(TUNED_TRAIN, len(data.x_train) - held_out)
    x, y = data.x_train, data.y_train
    grid = list(itertools.product(TUNED_W_STD, TUNED_NOISE))
    rows = []
    for W_std, relative_noise in progress_bar(grid, desc="tune", unit="setting"):
        classifier = settings.classifier(W_std, relative_noise, method="cholesky", progress=False)
        try:
            classifier.fit(x[:fitted], y[:fitted])
        except NotPositiveDefiniteError:
            continue
        accuracy = float((classifier.predict(x[-held_out:]) == y[-held_out:]).mean())
        rows.append({"W_std": W_std, "relative_noise": relative_noise, "accuracy": accuracy})
    if not rows:
        raise NotPositiveDefiniteError(
            "--tune: no setting gives a positive definite kernel; give --relative_noise."
        )
    return sorted(rows, key=lambda row: -row["accuracy"])


def _draw(
    data: Dataset, images: np.ndarray, scores: np.ndarray, residuals: list[float], plt: Any
) -> Any:
    """Residuals by step, and the test images that are most surely taken for another class."""
    wrong = np.flatnonzero(scores.argmax(1) != data.y_test)
    margin = scores[wrong].max(1) - scores[wrong, data.y_test[wrong]]
    wrong = wrong[np.argsort(-margin)][:12]
    solve = ["rr"] * 3 if residuals else [""] * 3
    rows = zip(solve, ("abcd", "efgh", "ijkl"), strict=True)
    figure, axes = plt.subplot_mosaic([list(r + images) for r, images in rows], figsize=(11, 5.5))
    if residuals:
        axes["r"].semilogy(np.arange(1, len(residuals) + 1), residuals, color=report.BLUE)
        axes["r"].set(
            title="Conjugate gradients", xlabel="step", ylabel="relative residual, worst output"
        )
    for place, name in enumerate("abcdefghijkl"):
        axes[name].set_axis_off()
        if place < len(wrong):
            i = wrong[place]
            axes[name].imshow(images[i], cmap="gray_r", interpolation="nearest")
            truth, guess = data.classes[data.y_test[i]], data.classes[scores[i].argmax()]
            axes[name].set_title(f"{truth}, taken for {guess}", fontsize=9, loc="center")
    figure.suptitle(
        f"{(scores.argmax(1) != data.y_test).sum()} of {len(scores)} test images are classified "
        f"wrongly; the {len(wrong)} surest of them",
        fontsize=11,
    )
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Fits, predicts and writes the report."""
    data = load(
        settings.data, settings.data_dir, settings.n_train, settings.n_test, settings.seed,
        centre=False, dtype=np.float32,
    )  # fmt: skip
    images = data.images_test
    if images is None:
        raise InputError(
            f"--data={settings.data} is a table, and this launcher is for images, (n, height, "
            "width): nt_deq.sklearn has estimators for tables."
        )
    W_std, relative_noise = settings.W_std, settings.relative_noise
    tuned = tune(settings, data) if settings.tune else []
    if tuned:
        W_std, relative_noise = tuned[0]["W_std"], tuned[0]["relative_noise"]
    classifier = settings.classifier(
        W_std, relative_noise, method=settings.method, keep=settings.keep, store=settings.store,
        rank=settings.rank, relative_residual=settings.relative_residual,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        classifier.fit(data.x_train, data.y_train)
    except StoreError as error:
        raise InputError(f"--{error}") from error
    fit_seconds = time.perf_counter() - start
    scores = classifier.decision_function(data.x_test)
    seconds = time.perf_counter() - start
    accuracy, solution = float((scores.argmax(1) == data.y_test).mean()), classifier.solution_
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "accuracy": accuracy,
        "residual": solution.relative_residual if solution else None,
        "steps": solution.steps if solution else None,
        "residuals": solution.relative_residuals if solution else [],
        "fit_seconds": fit_seconds,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "plan": classifier.plan_,
        "W_std": W_std,
        "relative_noise": relative_noise,
        "tuned": tuned,
    }
    solved = (
        f"Relative residual {solution.relative_residual:.1e} after {solution.steps} steps"
        if solution
        else "Solved directly"
    )
    rows = [
        ["training images", str(len(data.y_train))],
        ["test accuracy", f"{accuracy:.2%}"],
        ["W_std, relative_noise", f"{W_std:.4g}, {relative_noise:.1g}"],
        ["how", str(classifier.plan_)],
        ["seconds to fit; with prediction", f"{fit_seconds:.0f}; {seconds:.0f}"],
        ["most memory (GB)", f"{measured['peak_bytes'] / 1e9:.2f}"],
    ]
    report.write_claims(
        workdir,
        "mnist",
        title="Exact kernel regression on all images",
        introduction=f"Regression with the {settings.get.upper()} of an infinitely wide and deep "
        f"equilibrium network on {len(data.y_train)} training images of `{settings.data}`.",
        caption="How the solve converges, where it is one by iteration (it jumps where the "
        "residual is recomputed in float64), and test images that are classified wrongly.",
        settings=settings,
        claims=[
            report.Claim(
                f"The regression is exact: (K + ridge) α = y to a relative residual of "
                f"{settings.relative_residual:g}, recomputed in float64.",
                f"{solved}; {accuracy:.2%} of {len(data.y_test)} test "
                "images are classified rightly.",
                solution is None or solution.relative_residual <= settings.relative_residual,
            )
        ],
        numbers={"measured": measured},
        sections={"Measured": report.table(("", "measured"), rows)},
        draw=lambda plt: _draw(data, images, scores, measured["residuals"], plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main)
