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

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr

from experiments.claims import compare_figure
from experiments.lib import ensembles, launch, report
from experiments.lib.data import Dataset
from experiments.lib.ensembles import Settings, fits_at_steps, leading_powers_at_steps
from experiments.lib.leading_order import LeadingPower, local_slopes, tell
from experiments.lib.report import PowerLaw, table
from experiments.lib.workdir import Arrays, Workdir

LIMITS = ("nngp", "ntk_inf", "ntk")
FULL = {"n_train": 512, "widths": tuple(2**i for i in range(6, 12))}


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def analyse(
    data: Dataset, steps: Sequence[int], limit: Arrays, networks: Mapping[int, Arrays]
) -> tuple[dict[str, Any], list[PowerLaw], list[LeadingPower]]:
    """Compares what `ensembles.train` returned, at the recorded `steps`.

    Returns:
      The numbers of results.json, and the slopes and leading exponents of the distance after every
      recorded step but the first; `score` is what scores are, the accuracy of labels or the `R²` of
      real targets.
    """
    n = len(data.y_train)
    targets = np.concatenate([data.targets_train, data.targets_test])

    def losses(mean, var: Any = 0):  # of networks drawn from a Gaussian
        errors = np.square(mean - targets).mean(-1) + var
        return {"train_mse": errors[..., :n].mean(-1), "test_mse": errors[..., n:].mean(-1)}

    def predicted(name, mean, var, seconds):
        return {
            "name": name,
            **losses(mean, var),
            "test_score": _score(data, mean[n:]),
            "one_test_score": _expected_score(data, mean[n:], var[n:]),
            "equilibrium_steps": limit["equilibrium_steps"],
            "seconds": limit[seconds],
            "test_std": rms(np.sqrt(var[n:])),
        }

    def trained(width, arrays):
        outputs, _, distances = ensembles.beside_limit(data, steps, limit, arrays)
        final = outputs[-1, :, n:]
        return {
            "width": width,
            **losses(outputs),
            "test_score": _score(data, final.mean(0)),
            "test_scores": [_score(data, of_one) for of_one in final],
            "distances": distances,
            "mean_distance": rms(final.mean(0) - limit["ntk_mean"][-1, n:]),
            "equilibrium_steps": arrays["equilibrium_steps"].max(),
            "seconds": arrays["seconds"],
            "test_std": rms(final.std(0, ddof=1)),
        }

    times = float(limit["learning_rate"]) * np.asarray(steps)
    after, ntk, ntk_var = f"∞, NTK, t = {times[-1]:.4g}", limit["ntk_mean"], limit["ntk_var"]
    forever = limit["ntk_mean_inf"], limit["ntk_var_inf"]
    finite = [trained(width, arrays) for width, arrays in networks.items()]
    distances = {e["width"]: e["distances"] for e in finite}
    fits, leading = fits_at_steps(distances), leading_powers_at_steps(distances)
    found = {
        "score": "accuracy" if data.classes else "R²",
        "steps": steps,
        "times": times,
        "learning_rate": float(limit["learning_rate"]),
        "max_learning_rate": float(limit["max_learning_rate"]),
        "infinite": {
            "nngp": predicted("∞, NNGP", limit["nngp_mean"], limit["nngp_var"], "nngp_seconds"),
            "ntk": predicted(after, ntk[-1], ntk_var[-1], "ntk_seconds"),
            "ntk_inf": predicted("∞, NTK, t = ∞", *forever, "ntk_seconds"),
            **losses(ntk, ntk_var),  # of one network during training
        },
        "finite": finite,
        "slope": fits[-1],
        "leading": leading[-1],
        "local_slopes": local_slopes({w: of_width[-1] for w, of_width in distances.items()}),
        "at_steps": [
            {"steps": step, "slope": fit, "leading": power}
            for step, fit, power in zip(steps[1:], fits, leading, strict=True)
        ],
    }
    return found, fits, leading


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


def _claims(found: dict[str, Any]) -> Iterator[report.Claim]:
    yield report.Claim(
        "A trained network's distance to the infinite-width prediction falls as 1/√width, in its "
        "leading order.",
        _measured_slope(found),
        found["leading"].is_root,
    )
    e, limit_std = found["finite"][-1], found["infinite"]["ntk"]["test_std"]
    distance, chance = e["mean_distance"], limit_std / np.sqrt(len(e["test_scores"]))
    yield report.Claim(
        "The mean of trained networks is that of the infinite ensemble.",
        f"The mean over the {_networks(e)} is {distance:.4f} (RMS) from the infinite ensemble's; "
        f"as many draws from the infinite ensemble would be {chance:.4f} from it, and it must be "
        "within twice that. Their standard deviation is "
        f"{e['test_std'] / limit_std:.2f} times the infinite ensemble's.",
        bool(distance < 2 * chance),
    )


def _networks(e: dict[str, Any]) -> str:
    return f"{len(e['test_scores'])} networks of width {e['width']}"


def _measured_slope(found: dict[str, Any]) -> str:
    (first, from_first), *_, (last, from_last) = (
        (e["width"], e["distances"][-1].mean()) for e in found["finite"]
    )
    return (
        f"From width {first} to {last} the distance falls {from_first / from_last:.1f}-fold "
        f"(1/√width: {np.sqrt(last / first):.1f}-fold), by a slope of {found['slope']} "
        f"({found['slope'].interval}). {tell(found['leading'], found['local_slopes'])}"
    )


def results_table(found: dict[str, Any]) -> str:
    """A row for each limit, and for each width from the widest down."""
    form = ".1%" if found["score"] == "accuracy" else ".3f"
    header = (
        "network width", f"{found['score']}: of one", "of the mean", "test MSE of one",
        "train MSE", "std", "distance to ∞", "equilibrium steps", "seconds",
    )  # fmt: skip

    def row(name, of, one_score, train_mse, test_mse, apart=""):
        return [
            name, f"{one_score:{form}}", f"{of['test_score']:{form}}", f"{test_mse:.4f}",
            f"{train_mse:.4f}", f"{of['test_std']:.4f}", apart, str(of["equilibrium_steps"]),
            f"{of['seconds']:.1f}",
        ]  # fmt: skip

    limits = (found["infinite"][name] for name in LIMITS)
    rows = [
        row(of["name"], of, *(of[key] for key in ("one_test_score", "train_mse", "test_mse")))
        for of in limits
    ]
    for e in reversed(found["finite"]):
        train_mse, test_mse, last = (e[of][-1] for of in ("train_mse", "test_mse", "distances"))
        means = np.mean(e["test_scores"]), train_mse.mean(), test_mse.mean()
        apart = f"{last.mean():.4f} ± {last.std(ddof=1):.4f}"
        rows.append(row(str(e["width"]), e, *means, apart))
    return table(header, rows)


def main(settings: Settings, workdir: Workdir) -> None:
    """Runs the experiment, writes its report into `workdir`, and prints the table."""
    data, limit, networks = ensembles.train(settings, workdir)
    found, fits, leading = analyse(data, settings.recorded_steps, limit, networks)
    inputs, (n_train, n_features) = data.name_of_inputs, data.x_train.shape
    learned = f"{len(data.classes)} classes" if data.classes else "real targets"
    say = f"say of four held-out {inputs}" if data.classes else f"predict for held-out {inputs}"
    final = networks[max(networks)]["outputs"][-1, :, n_train:]
    wide = _networks(found["finite"][-1])
    mean, var = (limit[of][-1, n_train:] for of in ("ntk_mean", "ntk_var"))
    predictions = {
        "infinite width": (mean, np.broadcast_to(np.sqrt(var[:, None]), mean.shape)),
        wide: (final.mean(0), final.std(0, ddof=1)),
    }
    slopes = [
        [str(step), f"{t:.4g}", str(fit), fit.interval, str(power), power.interval]
        for step, t, fit, power in zip(
            found["steps"][1:], found["times"][1:], fits, leading, strict=True
        )
    ]
    report.write_claims(
        workdir,
        "compare",
        title="Infinitely wide and finite deep equilibrium networks",
        introduction="A deep equilibrium network runs one layer until its state stops changing, "
        "`z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b`, and reads out `f = V φ(z*)/√n`. "
        "As its width `n` grows, its outputs before training become a Gaussian process (NNGP), and "
        "gradient descent on it becomes kernel regression with a fixed kernel, the NTK. Here both "
        "were computed and set beside trained networks of finite width.\n\n"
        f"Data: {n_train} training and {len(data.y_test)} held-out {inputs} of `{settings.data}`, "
        f"drawn at random, with {n_features} features and {learned}. {data.preparation}\n\n"
        f"Training: {settings.steps} steps of full-batch gradient descent on half the mean squared "
        f"error, with learning rate {found['learning_rate']:.4g} (from "
        f"{found['max_learning_rate']:.4g} on the infinitely wide network diverges), up to time t "
        f"= {found['times'][-1]:.4g}; {settings.seeds} networks of each width.",
        caption="(a) Error during training. (b) Every trained network's distance to the "
        "infinite-width prediction that starts from that network's own outputs before training: "
        f"RMS over held-out {inputs} and outputs; the blue numbers are slopes between neighbouring "
        "widths. (c) What the infinitely wide network and "
        f"{wide} {say}.",
        settings=settings,
        claims=_claims(found),
        numbers=found,
        sections={
            f"Infinite width, and networks after {settings.steps} steps": (
                f"The {found['score']} and the mean squared error (MSE) of one network are "
                f"averages over initialisations; of the mean: the {found['score']} of the mean "
                f"prediction, over all initialisations or over {settings.seeds} networks. std is "
                "how much a held-out output varies between initialisations (RMS); distance to ∞ is "
                "that of (b), mean ± standard deviation over networks; equilibrium steps are "
                "layers until the slowest input's state stops changing, to the last digits, and "
                f"for the kernels steps of their solver.\n\n{results_table(found)}"
            ),
            "The slope of distance against width during training": (
                "A line through all widths has the slope; what theory gives is s, the exponent of "
                f"the leading term in `{leading[-1].formula}`.\n\n"
            )
            + table(
                ("steps", "t", "slope ± standard error", "95 % interval", "s", "95 % interval"),
                slopes,
            ),
        },
        draw=lambda plt: compare_figure.draw(plt, data, found, predictions),
    )
    print(results_table(found))


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
