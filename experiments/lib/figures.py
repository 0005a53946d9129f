"""What figures of networks of several widths share: colours, ticks, axes of time and width."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from experiments.lib.leading_order import LeadingPower
from experiments.lib.report import BLACK, BLUE, RED, PowerLaw


def width_colours(plt: Any, widths: Sized) -> list[Any]:
    """One a width, from light to dark; viridis is in order for the colour-blind and in print."""
    return list(plt.get_cmap("viridis")(np.linspace(0.85, 0.2, len(widths))))


def round_ticks(low: float, high: float, digits: tuple[int, ...] = (1, 2, 5)) -> list[float]:
    """Round numbers between two positive ones."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def log_ticks(ax: Any) -> None:
    """Puts round numbers on a logarithmic `y` axis, after all is drawn."""
    ax.set_yticks(round_ticks(*ax.get_ylim()))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def time_axis(ax: Any, t: np.ndarray) -> None:
    """Makes `x` the training time, logarithmic from the first step on, with 0."""
    ax.set_xscale("symlog", linthresh=t[1], linscale=0.5)
    ax.set_xlim(0, t[-1])
    ax.set_xticks([0, *round_ticks(t[1], t[-1], (1,))])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_xlabel("training time  t = learning rate × steps")


def draw_networks(
    ax: Any, widths: Sequence[int], values: Sequence[Any], colours: Sequence[Any], marker: str = "o"
) -> None:
    """Draws a point for every network against its width, on logarithmic axes.

    Args:
      ax: where to.
      widths: by increasing width.
      values: of the networks of each width.
      colours: one a width.
      marker: of a point.
    """
    for width, value, colour in zip(widths, values, colours, strict=True):
        beside = width * np.geomspace(0.93, 1.07, len(value))
        ax.plot(beside, value, marker, ms=5, color=colour, mec=BLACK, mew=0.4)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.minorticks_off()
    ax.set_xlabel("width of the finite network (a point: one network)")


def draw_fit(
    ax: Any, widths: Sequence[int], fit: PowerLaw, label: str, theory: str = "", ls: str = "-"
) -> None:
    """Draws a fit, and through its centre the slope −1/2 if `theory` names it."""
    ends = np.array([widths[0] / 1.4, widths[-1] * 1.4])
    ax.plot(ends, fit(ends), color=BLACK, ls=ls, label=label)
    if theory:
        centre = np.exp(np.log(widths).mean())
        guide = fit(centre) * np.sqrt(centre / ends)
        ax.plot(ends, guide, color=RED, ls=":", lw=2, label=theory)


def draw_leading(
    ax: Any, widths: Sequence[int], fit: LeadingPower, local: Sequence[PowerLaw]
) -> None:
    """Draws a fit with its higher orders, and the slopes between neighbouring widths beside it."""
    n = np.geomspace(widths[0], widths[-1] * 1.4, 50)
    label = f"with higher orders: s = {fit}"
    ax.plot(n, fit(n), color=BLUE, lw=1.6, label=label)
    for left, right, slope in zip(widths[:-1], widths[1:], local, strict=True):
        centre = np.sqrt(left * right)
        ax.annotate(
            f"{slope.exponent:.2f}".replace("-", "−"),
            (centre, fit(np.array(centre))),
            (4, 6),
            textcoords="offset points",
            color=BLUE,
            fontsize=9,
        )
