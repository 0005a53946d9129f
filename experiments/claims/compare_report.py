"""The table, the figure and the page of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.claims import compare_figure
from experiments.claims.compare_analysis import Comparison, rms
from experiments.claims.compare_figure import describe
from experiments.lib import report
from experiments.lib.data import Dataset
from experiments.lib.report import table
from experiments.lib.workdir import Workdir


def write(
    settings: Mapping[str, Any], data: Dataset, comparison: Comparison, workdir: Workdir
) -> None:
    """Writes results.json, compare.png and report.md."""
    e = comparison.ensembles
    seeds = e[0].distances.shape[1]
    n_train, n_features = data.x_train.shape
    inputs = data.name_of_inputs
    learned = f"{len(data.classes)} classes" if data.classes else "real targets"
    of_inputs = (
        f"say of four held-out {inputs}" if data.classes else f"predict for held-out {inputs}"
    )
    slopes = [
        [str(step), f"{time:.4g}", str(fit), fit.interval]
        for step, time, fit in zip(
            comparison.steps[1:], comparison.times[1:], comparison.fits, strict=True
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
        f"Data: {n_train} training and {len(data.y_test)} held-out {inputs} of "
        f"`{settings['data']}`, drawn at random, with {n_features} features and {learned}. "
        f"{data.preparation}\n\n"
        f"Training: {comparison.steps[-1]} steps of full-batch gradient descent on half the mean "
        f"squared error, with learning rate {comparison.learning_rate:.4g} (from "
        f"{comparison.max_learning_rate:.4g} on the infinitely wide network diverges), up to time "
        f"t = {comparison.times[-1]:.4g}; {seeds} networks of each width.",
        caption="(a) Error during training. (b) Every trained network's distance to the "
        "infinite-width prediction that starts from that network's own outputs before training: "
        f"RMS over held-out {inputs} and outputs. (c) What the infinitely wide network and "
        f"{describe(e[-1])} {of_inputs}.",
        settings=settings,
        claims=_claims(comparison),
        numbers=comparison.numbers(),
        tables=[
            report.Table(
                _header(comparison),
                _rows(comparison),
                f"Infinite width, and networks after {comparison.steps[-1]} steps",
                f"The {comparison.score} and the mean squared error (MSE) of one network are "
                f"averages over initialisations; of the mean: the {comparison.score} of the mean "
                f"prediction, over all initialisations or over {seeds} networks. std is how much a "
                "held-out output varies between initialisations (RMS); distance to ∞ is that of "
                "(b), mean ± standard deviation over networks; equilibrium steps are layers until "
                "the slowest input's state stops changing, to the last digits, and for the kernels "
                "steps of their solver.",
            ),
            report.Table(
                ("steps", "t", "slope ± standard error", "95 % interval"),
                slopes,
                "The slope of distance against width during training",
            ),
        ],
        draw=lambda plt: compare_figure.draw(plt, data, comparison),
    )


def _claims(comparison: Comparison) -> list[report.Claim]:
    e, limit_std = comparison.ensembles[-1], rms(comparison.ntk.std)
    seeds = e.distances.shape[1]
    return [
        report.Claim(
            "A trained network's distance to the infinite-width prediction falls as 1/√width.",
            _measured(comparison),
            comparison.fits[-1].includes(-0.5),
        ),
        report.Claim(
            "The mean of trained networks is that of the infinite ensemble.",
            f"The mean over the {describe(e)} is {e.mean_distance:.4f} (RMS) from the infinite "
            f"ensemble's; as many draws from the infinite ensemble would be "
            f"{limit_std / np.sqrt(seeds):.4f} from it, and it has to be within twice that. Their "
            f"standard deviation is {rms(e.std) / limit_std:.2f} times the infinite ensemble's.",
            bool(e.mean_distance < 2 * limit_std / np.sqrt(seeds)),
        ),
    ]


def console(comparison: Comparison) -> str:
    """The table of results."""
    return table(_header(comparison), _rows(comparison))


def _header(comparison: Comparison) -> tuple[str, ...]:
    return (
        "network width",
        f"{comparison.score}: of one",
        "of the mean",
        "test MSE of one",
        "train MSE",
        "std",
        "distance to ∞",
        "equilibrium steps",
        "seconds",
    )


def _rows(comparison: Comparison) -> list[list[str]]:
    score = ".1%" if comparison.score == "accuracy" else ".3f"
    rows = [
        [
            limit.name,
            format(limit.one_test_score, score),
            format(limit.test_score, score),
            f"{limit.test_mse:.4f}",
            f"{limit.train_mse:.4f}",
            f"{rms(limit.std):.4f}",
            "",
            str(limit.equilibrium_steps),
            f"{limit.seconds:.1f}",
        ]
        for limit in (comparison.nngp, comparison.ntk_inf, comparison.ntk)
    ]
    rows += [
        [
            str(e.width),
            format(e.test_scores.mean(), score),
            format(e.test_score, score),
            f"{e.test_mse[-1].mean():.4f}",
            f"{e.train_mse[-1].mean():.4f}",
            f"{rms(e.std):.4f}",
            f"{e.distances[-1].mean():.4f} ± {e.distances[-1].std(ddof=1):.4f}",
            str(e.equilibrium_steps),
            f"{e.seconds:.1f}",
        ]
        for e in reversed(comparison.ensembles)
    ]
    return rows


def _measured(comparison: Comparison) -> str:
    fit, widest, e = comparison.fits[-1], comparison.fit_widest, comparison.ensembles
    fell = e[0].distances[-1].mean() / e[-1].distances[-1].mean()
    text = (
        f"From width {e[0].width} to {e[-1].width} the distance falls {fell:.1f}-fold "
        f"(1/√width: {np.sqrt(e[-1].width / e[0].width):.1f}-fold). The fitted slope is {fit}, "
        f"95 % interval {fit.interval}"
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
