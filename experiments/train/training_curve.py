"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.lib.report import BLACK, RED


def draw(plt: Any, metrics: Sequence[dict[str, Any]]) -> Any:
    """Draws errors, the spectral radius at the equilibria, and the steps that finding them takes.

    Args:
      plt: pyplot.
      metrics: the lines of `experiments.train.classifier`.

    Returns:
      A figure.
    """
    figure, (errors, radii, steps) = plt.subplots(1, 3, figsize=(12, 3.4))
    epochs = [line["epoch"] for line in metrics]
    marker = "o" if len(metrics) < 40 else ""

    def curve(ax, values, colour, label=None):
        ax.plot(epochs, values, marker=marker, ms=4, color=colour, label=label)
        ax.set(xlabel="epoch", xlim=(0, None))
        ax.set_ylim(0, 1.1 * ax.dataLim.y1)

    for data, colour in (("train", BLACK), ("test", RED)):
        errors_of = [100 * (1 - line[f"{data}_accuracy"]) for line in metrics]
        curve(errors, errors_of, colour, f"{data}, {errors_of[-1]:.2f} % at the end")
    errors.set(title="Images classified wrongly", ylabel="per cent")
    errors.legend()
    curve(radii, [line["spectral_radius"] for line in metrics], BLACK)
    radii.set(title="Largest spectral radius at an equilibrium")
    curve(steps, [line["equilibrium_steps"] for line in metrics], BLACK)
    steps.set(title="Layers to the last test image's equilibrium")
    return figure
