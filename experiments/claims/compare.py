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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from experiments.claims import compare_figure
from experiments.lib import ensembles, launch, report
from experiments.lib.data import Dataset
from experiments.lib.ensembles import Settings, fit_by_width, fits_at_steps
from experiments.lib.report import PowerLaw, table
from experiments.lib.workdir import Arrays, Workdir

FULL = {"n_train": 512, "widths": tuple(2**i for i in range(6, 12))}


@dataclass(frozen=True)
class Prediction:
    """What an infinitely wide network, or networks of one width, say of the test inputs.

    Attributes:
      name: of the limit, or the width.
      mean, std: over initialisations, of every output, `(m, C)`; of a limit `std` is `(m, 1)`.
      numbers: what results.json has of it.
    """

    name: str
    mean: np.ndarray
    std: np.ndarray
    numbers: dict[str, Any]

    @property
    def networks(self) -> str:
        """As in `8 networks of width 64`."""
        return f"{len(self.numbers['test_scores'])} networks of width {self.name}"


@dataclass(frozen=True)
class Comparison:
    """All that is reported.

    Attributes:
      score: what scores are: the accuracy of labels, `R²` of real targets.
      steps: recorded, the first 0.
      learning_rate, max_learning_rate: of gradient descent, and with which it still converges.
      limits: `nngp`, the posterior; `ntk`, gradient descent after the last step; `ntk_inf`, after
        infinitely many.
      limit_mse: `train_mse` and `test_mse` during training expected of one infinitely wide network,
        `(steps,)`.
      ensembles: by increasing width.
      fits: of distance against width, after every recorded step but 0.
      fit_widest: the last, of the two largest widths alone.
    """

    score: str
    steps: Sequence[int]
    learning_rate: float
    max_learning_rate: float
    limits: dict[str, Prediction]
    limit_mse: dict[str, np.ndarray]
    ensembles: list[Prediction]
    fits: list[PowerLaw]
    fit_widest: PowerLaw

    @property
    def times(self) -> np.ndarray:
        """Training time at the recorded steps."""
        return self.learning_rate * np.asarray(self.steps)

    def numbers(self) -> dict[str, Any]:
        """Everything but the predictions themselves, for results.json."""
        at_steps = zip(self.steps[1:], self.fits, strict=True)
        return {
            "score": self.score,
            "steps": self.steps,
            "times": self.times,
            "learning_rate": self.learning_rate,
            "max_learning_rate": self.max_learning_rate,
            "infinite": {
                **{key: {"name": p.name, **p.numbers} for key, p in self.limits.items()},
                **self.limit_mse,
            },
            "finite": [{"width": int(e.name), **e.numbers} for e in self.ensembles],
            "slope": self.fits[-1],
            "slope_of_the_two_widest": self.fit_widest,
            "slope_at_steps": [{"steps": step, **vars(fit)} for step, fit in at_steps],
        }


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def analyse(
    data: Dataset, steps: Sequence[int], limit: Arrays, networks: Mapping[int, Arrays]
) -> Comparison:
    """Compares what `ensembles.train` returned, at the recorded `steps`."""
    n = len(data.y_train)
    targets = np.concatenate([data.targets_train, data.targets_test])

    def losses(mean, var):  # of networks drawn from a Gaussian
        errors = np.square(mean - targets).mean(-1) + var
        return {"train_mse": errors[..., :n].mean(-1), "test_mse": errors[..., n:].mean(-1)}

    def predicted(name, mean, var, seconds):
        std = np.sqrt(var[n:, None])
        numbers = losses(mean, var) | {
            "test_score": _score(data, mean[n:]),
            "one_test_score": _expected_score(data, mean[n:], var[n:]),
            "equilibrium_steps": limit["equilibrium_steps"],
            "seconds": limit[seconds],
            "test_std": rms(std),
        }
        return Prediction(name, mean[n:], std, numbers)

    def trained(width, arrays):
        outputs, _, distances = ensembles.beside_limit(data, steps, limit, arrays)
        final = outputs[-1, :, n:]
        mean, std = final.mean(0), final.std(0, ddof=1)
        numbers = losses(outputs, 0) | {
            "test_score": _score(data, mean),
            "test_scores": [_score(data, of_one) for of_one in final],
            "distances": distances,
            "mean_distance": rms(mean - limits["ntk"].mean),
            "equilibrium_steps": arrays["equilibrium_steps"].max(),
            "seconds": arrays["seconds"],
            "test_std": rms(std),
        }
        return Prediction(str(width), mean, std, numbers)

    after = f"∞, NTK, t = {float(limit['learning_rate']) * steps[-1]:.4g}"
    ntk, ntk_var = limit["ntk_mean"], limit["ntk_var"]
    forever = limit["ntk_mean_inf"], limit["ntk_var_inf"]
    limits = {
        "nngp": predicted("∞, NNGP", limit["nngp_mean"], limit["nngp_var"], "nngp_seconds"),
        "ntk_inf": predicted("∞, NTK, t = ∞", *forever, "ntk_seconds"),
        "ntk": predicted(after, ntk[-1], ntk_var[-1], "ntk_seconds"),
    }
    found = {width: trained(width, arrays) for width, arrays in networks.items()}
    distances = {width: e.numbers["distances"] for width, e in found.items()}
    widest = sorted(distances)[-2:]
    return Comparison(
        score="accuracy" if data.classes else "R²",
        steps=steps,
        learning_rate=float(limit["learning_rate"]),
        max_learning_rate=float(limit["max_learning_rate"]),
        limits=limits,
        limit_mse=losses(ntk, ntk_var),
        ensembles=list(found.values()),
        fits=fits_at_steps(distances),
        fit_widest=fit_by_width({width: distances[width][-1] for width in widest}),
    )


def _score(data: Dataset, outputs: np.ndarray) -> float:
    """Accuracy or R² of test outputs `(m, C)`."""
    if data.classes:
        return float((outputs.argmax(-1) == data.y_test).mean())
    return _r_squared(data, np.square(outputs - data.targets_test))


def _r_squared(data: Dataset, squared_errors: np.ndarray) -> float:
    return 1 - float(squared_errors.mean()) / float(data.targets_test.var(axis=0).mean())


def _expected_score(data: Dataset, mean: np.ndarray, var: np.ndarray) -> float:
    """The same of outputs that are independent and normal, of means `(m, C)`, variances `(m,)`.

    The output of an input's class is the largest, given that it is `σ u` above its mean, with
    probability `Π_c Φ((μ_y - μ_c)/σ + u)`, the product over the other classes.
    """
    if not data.classes:
        return _r_squared(data, np.square(mean - data.targets_test) + var[:, None])
    rows, y = np.arange(len(mean)), data.y_test
    u, weights = np.polynomial.hermite_e.hermegauss(64)
    std = np.sqrt(np.maximum(var, np.finfo(np.float64).tiny))[:, None]
    above = ndtr(((mean[rows, y][:, None] - mean) / std)[..., None] + u)
    above[rows, y] = 1
    return float((above.prod(1) @ weights).mean() / weights.sum())


def _claims(comparison: Comparison) -> list[report.Claim]:
    e, fit = comparison.ensembles[-1], comparison.fits[-1]
    limit_std = comparison.limits["ntk"].numbers["test_std"]
    chance, distance = (
        limit_std / np.sqrt(len(e.numbers["test_scores"])),
        e.numbers["mean_distance"],
    )
    return [
        report.Claim(
            "A trained network's distance to the infinite-width prediction falls as 1/√width.",
            _measured_slope(comparison),
            fit.includes(-0.5),
        ),
        report.Claim(
            "The mean of trained networks is that of the infinite ensemble.",
            f"The mean over the {e.networks} is {distance:.4f} (RMS) from the infinite ensemble's; "
            f"as many draws from the infinite ensemble would be {chance:.4f} from it, and it has "
            f"to be within twice that. Their standard deviation is "
            f"{e.numbers['test_std'] / limit_std:.2f} times the infinite ensemble's.",
            bool(distance < 2 * chance),
        ),
    ]


def _measured_slope(comparison: Comparison) -> str:
    fit, widest, e = comparison.fits[-1], comparison.fit_widest, comparison.ensembles
    first, last = (of.numbers["distances"][-1].mean() for of in (e[0], e[-1]))
    text = (
        f"From width {e[0].name} to {e[-1].name} the distance falls {first / last:.1f}-fold "
        f"(1/√width: {np.sqrt(int(e[-1].name) / int(e[0].name)):.1f}-fold). The fitted slope is "
        f"{fit}, 95 % interval {fit.interval}"
    )
    if fit.includes(-0.5):
        return f"{text}: it agrees with theory's −1/2."
    text += (
        ": −1/2, which theory gives for widths tending to infinity, is outside. Between the two "
        f"widest alone the slope is {widest} ({widest.interval}). "
    )
    if fit.exponent > -0.5:
        return text + (
            "A slope that is too shallow says that for the narrowest networks higher orders in "
            "1/√width count. They count the more the closer the training data are fitted: "
            "larger --widths or fewer --steps bring the slope nearer to −1/2."
        )
    return text + (
        "A slope that is too steep means that the narrowest networks are outside the regime of the "
        "limit: take larger --widths, a smaller --W_std or a smaller --learning_rate."
    )


def results_table(comparison: Comparison) -> str:
    """A row for each limit, and for each width from the widest down."""
    form = ".1%" if comparison.score == "accuracy" else ".3f"
    rows = []
    for p in (*comparison.limits.values(), *reversed(comparison.ensembles)):
        of, apart = p.numbers, p.numbers.get("distances")
        one, train_mse, test_mse = (
            (of["one_test_score"], of["train_mse"], of["test_mse"])
            if apart is None
            else (np.mean(of["test_scores"]), of["train_mse"][-1], of["test_mse"][-1])
        )
        rows.append([
            p.name, f"{one:{form}}", f"{of['test_score']:{form}}", f"{np.mean(test_mse):.4f}",
            f"{np.mean(train_mse):.4f}", f"{of['test_std']:.4f}",
            "" if apart is None else f"{apart[-1].mean():.4f} ± {apart[-1].std(ddof=1):.4f}",
            str(of["equilibrium_steps"]), f"{of['seconds']:.1f}",
        ])  # fmt: skip
    header = (
        "network width", f"{comparison.score}: of one", "of the mean", "test MSE of one",
        "train MSE", "std", "distance to ∞", "equilibrium steps", "seconds",
    )  # fmt: skip
    return table(header, rows)


def write(settings: Settings, data: Dataset, comparison: Comparison, workdir: Workdir) -> None:
    """Writes results.json, compare.png and report.md."""
    e, inputs = comparison.ensembles, data.name_of_inputs
    seeds, (n_train, n_features) = settings.seeds, data.x_train.shape
    learned = f"{len(data.classes)} classes" if data.classes else "real targets"
    shown = f"say of four held-out {inputs}" if data.classes else f"predict for held-out {inputs}"
    at_steps = zip(comparison.steps[1:], comparison.times[1:], comparison.fits, strict=True)
    report.write_claims(
        workdir,
        "compare",
        title="Infinitely wide and finite deep equilibrium networks",
        introduction="A deep equilibrium network runs one layer until its state stops changing, "
        "`z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b`, and reads out `f = V φ(z*)/√n`. "
        "As its width `n` grows, its outputs before training become a Gaussian process (NNGP), and "
        "gradient descent on it becomes kernel regression with a fixed kernel, the NTK. Here both "
        "were computed and set beside trained networks of finite width.\n\n"
        f"Data: {n_train} training and {len(data.y_test)} held-out {inputs} of "
        f"`{settings.data}`, drawn at random, with {n_features} features and {learned}. "
        f"{data.preparation}\n\n"
        f"Training: {comparison.steps[-1]} steps of full-batch gradient descent on half the mean "
        f"squared error, with learning rate {comparison.learning_rate:.4g} (from "
        f"{comparison.max_learning_rate:.4g} on the infinitely wide network diverges), up to time "
        f"t = {comparison.times[-1]:.4g}; {seeds} networks of each width.",
        caption="(a) Error during training. (b) Every trained network's distance to the "
        "infinite-width prediction that starts from that network's own outputs before training: "
        f"RMS over held-out {inputs} and outputs. (c) What the infinitely wide network and "
        f"{e[-1].networks} {shown}.",
        settings=settings,
        claims=_claims(comparison),
        numbers=comparison.numbers(),
        sections={
            f"Infinite width, and networks after {comparison.steps[-1]} steps": (
                f"The {comparison.score} and the mean squared error (MSE) of one network are "
                f"averages over initialisations; of the mean: the {comparison.score} of the mean "
                f"prediction, over all initialisations or over {seeds} networks. std is how much a "
                "held-out output varies between initialisations (RMS); distance to ∞ is that of "
                "(b), mean ± standard deviation over networks; equilibrium steps are layers until "
                "the slowest input's state stops changing, to the last digits, and for the kernels "
                f"steps of their solver.\n\n{results_table(comparison)}"
            ),
            "The slope of distance against width during training": table(
                ("steps", "t", "slope ± standard error", "95 % interval"),
                [[str(k), f"{t:.4g}", str(fit), fit.interval] for k, t, fit in at_steps],
            ),
        },
        draw=lambda plt: compare_figure.draw(plt, data, comparison),
    )


def compare(settings: Settings, workdir: Workdir) -> Comparison:
    """Runs the experiment and writes its report into `workdir`.

    Raises:
      InputError, NoEquilibriumError, NotConvergedError, TrainingError: the message says why.
    """
    data, limit, networks = ensembles.train(settings, workdir)
    comparison = analyse(data, settings.recorded_steps, limit, networks)
    write(settings, data, comparison, workdir)
    return comparison


def main(settings: Settings, workdir: Workdir) -> None:
    """Compares, and prints the table."""
    print(results_table(compare(settings, workdir)))


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
