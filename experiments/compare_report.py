"""The table, the figure and the page of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import report
from experiments.compare_analysis import Comparison, Ensemble, rms
from experiments.data import Dataset
from experiments.figures import draw_fit, draw_networks, log_ticks, time_axis, width_colours
from experiments.report import BLACK, console_table
from experiments.workdir import Workdir

HEADER = (
    "network width",
    "test accuracy",
    "test MSE",
    "train MSE",
    "std",
    "distance to ∞",
    "equilibrium steps",
    "seconds",
)


def write(
    settings: Mapping[str, Any], data: Dataset, comparison: Comparison, workdir: Workdir
) -> None:
    """Writes results.json, compare.png and report.md."""
    e = comparison.ensembles
    seeds = e[0].distances.shape[1]
    n_train, n_features = data.x_train.shape
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
        f"Data: {n_train} training and {len(data.y_test)} held-out images of "
        f"`{settings['data']}`, drawn at random, with {n_features} features and "
        f"{len(data.classes)} classes. The mean training image was subtracted, and every image "
        f"scaled to norm √{n_features}. Targets are one-hot less their mean.\n\n"
        f"Training: {comparison.steps[-1]} steps of full-batch gradient descent on half the mean "
        f"squared error, with learning rate {comparison.learning_rate:.4g} (from "
        f"{comparison.max_learning_rate:.4g} on the infinitely wide network diverges), up to time "
        f"t = {comparison.times[-1]:.4g}; {seeds} networks of each width.",
        caption="(a) Error during training. (b) Every trained network's distance to the "
        "infinite-width prediction that starts from that network's own outputs before training: "
        "RMS over held-out images and outputs. (c) What the infinitely wide network and "
        f"{_networks(e[-1])} say of four held-out images.",
        settings=settings,
        claims=_claims(comparison),
        numbers=comparison.numbers(),
        tables=[
            report.Table(
                HEADER,
                _rows(comparison),
                f"Infinite width, and networks after {comparison.steps[-1]} steps",
                f"Test accuracy is that of the mean prediction (over initialisations; of {seeds} "
                "networks); MSE is the mean squared error of one network, on average over "
                "initialisations; std is how much a held-out output varies between initialisations "
                "(RMS); distance to ∞ is that of (b), mean ± standard deviation over networks; "
                "equilibrium steps are layers until the slowest image's state stops changing, to "
                "the last digits, and for the kernels steps of their solver.",
            ),
            report.Table(
                ("steps", "t", "slope ± standard error", "95 % interval"),
                slopes,
                "The slope of distance against width during training",
            ),
        ],
        draw=lambda plt: _figure(plt, data, comparison),
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
            f"The mean over the {_networks(e)} is {e.mean_distance:.4f} (RMS) from the infinite "
            f"ensemble's; as many draws from the infinite ensemble would be "
            f"{limit_std / np.sqrt(seeds):.4f} from it, and it has to be within twice that. Their "
            f"standard deviation is {rms(e.std) / limit_std:.2f} times the infinite ensemble's.",
            bool(e.mean_distance < 2 * limit_std / np.sqrt(seeds)),
        ),
    ]


def console(comparison: Comparison) -> str:
    """The table of results."""
    return console_table(HEADER, _rows(comparison))


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = [
        [
            limit.name,
            f"{limit.test_accuracy:.1%}",
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
            f"{e.test_accuracy:.1%}",
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
            "1/√width count. They count the more the closer the training images are fitted: "
            "larger --widths or fewer --steps bring the slope nearer to −1/2."
        )
    return text + (
        "A slope that is too steep means that the narrowest networks are outside the regime of the "
        "limit: take larger --widths, a smaller --W_std or a smaller --learning_rate."
    )


def _figure(plt: Any, data: Dataset, comparison: Comparison) -> Any:
    figure = plt.figure(figsize=(13, 8.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1], hspace=0.04)
    train, test, distance = top.subplots(1, 3, width_ratios=[1, 1, 1.15])
    test.sharey(train)
    _draw_losses(plt, (train, test), comparison)
    _draw_distances(plt, distance, comparison)
    _draw_predictions(plt, bottom, data, comparison)
    return figure


def _draw_losses(plt: Any, axes: Any, comparison: Comparison) -> None:
    t = comparison.times
    for ax, title, attribute in (
        (axes[0], "(a) error on training images", "train_mse"),
        (axes[1], "(a) error on held-out images", "test_mse"),
    ):
        for e, colour in zip(
            comparison.ensembles, width_colours(plt, comparison.ensembles), strict=True
        ):
            mse = getattr(e, attribute)
            mean, std = mse.mean(1), mse.std(1, ddof=1)
            # A band of logarithms: it stays above 0.
            spread = np.exp(std / mean)
            ax.fill_between(t, mean / spread, mean * spread, color=colour, alpha=0.35, lw=0)
            ax.plot(t, mean, color=colour, lw=1, label=f"width {e.width}: mean ± std")
        limit = getattr(comparison, f"limit_{attribute}")
        ax.plot(t, limit, color=BLACK, lw=1.8, ls="--", label="infinite width (NTK)")
        ax.set_yscale("log")
        time_axis(ax, t)
        ax.set_title(title)
    log_ticks(axes[0])
    axes[0].set_ylabel("mean squared error of one network")
    axes[0].legend(loc="lower left")


def _draw_distances(plt: Any, ax: Any, comparison: Comparison) -> None:
    widths = [e.width for e in comparison.ensembles]
    distances = [e.distances[-1] for e in comparison.ensembles]
    draw_networks(ax, widths, distances, width_colours(plt, widths))
    fit = comparison.fits[-1]
    draw_fit(ax, widths, fit, f"fit: slope {fit}", "theory: slope −1/2")
    log_ticks(ax)
    ax.set_title("(b) distance to the infinite-width prediction")
    ax.set_ylabel(f"RMS over held-out outputs, t = {comparison.times[-1]:.4g}")
    ax.legend(loc="lower left")


def _draw_predictions(plt: Any, figure: Any, data: Dataset, comparison: Comparison) -> None:
    limit, e = comparison.ntk, comparison.ensembles[-1]
    colour = width_colours(plt, comparison.ensembles)[-1]
    ranked = np.sort(limit.mean, axis=1)
    by_margin = np.argsort(ranked[:, -1] - ranked[:, -2])
    rows = by_margin[[round(q * (len(by_margin) - 1)) for q in (0.02, 0.1, 0.5, 0.98)]]
    axes = figure.subplots(2, 4, height_ratios=[1, 2.2], sharey="row")
    classes = np.arange(len(data.classes))
    for column, row in enumerate(rows):
        image, ax = axes[:, column]
        _draw_image(image, data.images_test[row])
        image.set_title(f"a held-out {data.classes[data.y_test[row]]}", loc="center")
        ax.axvspan(data.y_test[row] - 0.5, data.y_test[row] + 0.5, color="#eeeeee", zorder=0)
        for mean, std, shift, style in (
            (limit.mean, limit.std, -0.15, {"fmt": "s", "color": BLACK, "label": "infinite width"}),
            (e.mean, e.std, 0.15, {"fmt": "o", "color": colour, "label": _networks(e)}),
        ):
            std = np.broadcast_to(std, mean.shape)
            ax.errorbar(classes + shift, mean[row], std[row], ms=4, lw=1.4, **style)
        ax.axhline(0, color=BLACK, lw=0.6)
        ax.set_xticks(classes, [str(label) for label in data.classes])
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("class (shaded: the true one)")
    axes[1, 0].set_ylabel("score: mean ± std over initialisations")
    figure.legend(
        *axes[1, 0].get_legend_handles_labels(),
        loc="upper right",
        ncols=2,
        bbox_to_anchor=(1, 1.03),
        borderaxespad=0.2,
    )
    figure.suptitle(
        f"(c) class scores of held-out images after training (t = {comparison.times[-1]:.4g}), "
        "from the least to the most certain",
        x=0.01,
        ha="left",
        fontsize=11,
    )


def _networks(e: Ensemble) -> str:
    return f"{e.distances.shape[1]} networks of width {e.width}"


def _draw_image(ax: Any, image: np.ndarray) -> None:
    """Draws pixels; an input that is not an image, as a strip of its features."""
    flat = image.ndim == 1
    side = round(image.size**0.5)
    if flat and side * side == image.size:
        image = image.reshape(side, side)
    ax.imshow(np.atleast_2d(image), cmap="gray_r", interpolation="nearest")
    ax.set_axis_off()
