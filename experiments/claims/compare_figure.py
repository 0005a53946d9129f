"""The figure of the comparison: losses, distances, and what is predicted of held-out inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.lib.data import Dataset
from experiments.lib.figures import (
    draw_fit,
    draw_leading,
    draw_networks,
    log_ticks,
    time_axis,
    width_colours,
)
from experiments.lib.report import BLACK, RED

Predictions = Mapping[str, tuple[np.ndarray, np.ndarray]]


def draw(plt: Any, data: Dataset, found: dict[str, Any], predictions: Predictions) -> Any:
    """Draws it.

    Args:
      plt: pyplot.
      data: what was learned.
      found: the numbers of results.json.
      predictions: mean and standard deviation over initialisations of the test outputs, `(m, C)`,
        of the infinitely wide network and of the widest networks, by what they are called.
    """
    figure = plt.figure(figsize=(13, 8.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.1], hspace=0.04)
    train, test, distance = top.subplots(1, 3, width_ratios=[1, 1, 1.15])
    test.sharey(train)
    colours = width_colours(plt, found["finite"])
    _draw_losses((train, test), data.name_of_inputs, found, colours)
    _draw_distances(distance, found, colours)
    drawn = _draw_scores if data.classes else _draw_regression
    drawn(bottom, data, predictions, colours[-1], f"t = {found['times'][-1]:.4g}")
    return figure


def _draw_losses(axes: Any, inputs: str, found: dict[str, Any], colours: Any) -> None:
    t = found["times"]
    for ax, title, name in (
        (axes[0], f"(a) error on training {inputs}", "train_mse"),
        (axes[1], f"(a) error on held-out {inputs}", "test_mse"),
    ):
        for e, colour in zip(found["finite"], colours, strict=True):
            mean, std = e[name].mean(1), e[name].std(1, ddof=1)
            # A band of logarithms: it stays above 0.
            spread = np.exp(std / mean)
            ax.fill_between(t, mean / spread, mean * spread, color=colour, alpha=0.35, lw=0)
            ax.plot(t, mean, color=colour, lw=1, label=f"width {e['width']}: mean ± std")
        ax.plot(
            t, found["infinite"][name], color=BLACK, lw=1.8, ls="--", label="infinite width (NTK)"
        )
        ax.set_yscale("log")
        time_axis(ax, t)
        ax.set_title(title)
    log_ticks(axes[0])
    axes[0].set_ylabel("mean squared error of one network")
    axes[0].legend(loc="lower left")


def _draw_distances(ax: Any, found: dict[str, Any], colours: Any) -> None:
    widths, fit = [e["width"] for e in found["finite"]], found["slope"]
    draw_networks(ax, widths, [e["distances"][-1] for e in found["finite"]], colours)
    draw_fit(ax, widths, fit, f"plain slope {fit}", "theory: slope −1/2", "--")
    draw_leading(ax, widths, found["leading"], found["local_slopes"])
    log_ticks(ax)
    ax.set_title("(b) distance to the infinite-width prediction")
    ax.set_ylabel(f"RMS over held-out outputs, t = {found['times'][-1]:.4g}")
    ax.legend(loc="lower left")


def _draw_scores(figure: Any, data: Dataset, predictions: Predictions, colour: Any, t: str) -> None:
    """Four held-out inputs: their pictures, if they are images, above the scores of all classes."""
    (limit, (limit_mean, limit_std)), (networks, (mean, std)) = predictions.items()
    ranked = np.sort(limit_mean, axis=1)
    by_margin = np.argsort(ranked[:, -1] - ranked[:, -2])
    rows = by_margin[[round(q * (len(by_margin) - 1)) for q in (0.02, 0.1, 0.5, 0.98)]]
    if data.images_test is None:
        axes = figure.subplots(1, 4, sharey=True)
        titled = axes
    else:
        titled, axes = figure.subplots(2, 4, height_ratios=[1, 2.2], sharey="row")
        for image, row in zip(titled, rows, strict=True):
            image.imshow(data.images_test[row], cmap="gray_r", interpolation="nearest")
            image.set_axis_off()
    classes = np.arange(len(data.classes))
    for ax, title, row in zip(axes, titled, rows, strict=True):
        title.set_title(f"a held-out {data.classes[data.y_test[row]]}", loc="center")
        ax.axvspan(data.y_test[row] - 0.5, data.y_test[row] + 0.5, color="#eeeeee", zorder=0)
        style: Any = {"ms": 4, "lw": 1.4}
        ax.errorbar(
            classes - 0.15, limit_mean[row], limit_std[row], fmt="s", color=BLACK, label=limit,
            **style,
        )  # fmt: skip
        ax.errorbar(
            classes + 0.15, mean[row], std[row], fmt="o", color=colour, label=networks, **style
        )
        ax.axhline(0, color=BLACK, lw=0.6)
        ax.set_xticks(classes, [str(label) for label in data.classes])
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("class (shaded: the true one)")
    axes[0].set_ylabel("score: mean ± std over initialisations")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="upper right",
        ncols=2,
        bbox_to_anchor=(1, 1.03),
        borderaxespad=0.2,
    )
    figure.suptitle(
        f"(c) class scores of held-out {data.name_of_inputs} after training "
        f"({t}), from the least to the most certain",
        x=0.01,
        ha="left",
        fontsize=11,
    )


def _draw_regression(
    figure: Any, data: Dataset, predictions: Predictions, colour: Any, t: str
) -> None:
    """Every held-out input, by what the infinitely wide network predicts: the first target."""
    (limit, (limit_mean, limit_std)), (networks, (mean, std)) = predictions.items()
    order = np.argsort(limit_mean[:, 0])
    rank, centre, spread = np.arange(len(order)), limit_mean[order, 0], limit_std[order, 0]
    ax = figure.subplots()
    ax.plot(rank, data.targets_test[order, 0], "x", ms=4, color=RED, label="held-out targets")
    ax.fill_between(rank, centre - spread, centre + spread, color="#cccccc", lw=0)
    ax.plot(rank, centre, color=BLACK, label=f"{limit}: mean ± std over initialisations")
    ax.errorbar(
        rank, mean[order, 0], std[order, 0], fmt="o", ms=3, lw=0.8, color=colour, label=networks
    )
    ax.set_xlim(-1, len(order))
    ax.set_xlabel(f"held-out {data.name_of_inputs}, by the prediction at infinite width")
    outputs = data.targets_test.shape[1]
    ax.set_ylabel(f"target{f' 1 of {outputs}' if outputs > 1 else ''}, standardised")
    ax.legend(loc="upper left")
    ax.set_title(f"(c) predictions after training ({t})")
