"""Methods compared over data sets: ranks, tests of their differences, and the usual measures.

Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006). `accuracy` is
always a frame with a row for each data set and a column for each method. Needs `.[tabular]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scikit_posthocs
from scipy import stats

from experiments.lib.report import BLACK, BLUE, RED

MARGIN = 0.01  # of mean accuracy, within which methods are about as good


def mean_ranks(accuracy: pd.DataFrame) -> pd.Series:
    """The mean rank of each method: 1 is the best, and ties share their ranks."""
    ranks: Any = accuracy.rank(axis=1, ascending=False).mean()
    return ranks


def friedman(accuracy: pd.DataFrame) -> dict[str, float]:
    """The statistic and the p-value of the hypothesis that all methods are equally good.

    That of Iman and Davenport (1980), of which Friedman's own is a conservative form, without a
    correction for ties (Demšar 2006, JMLR 7, section 3.2.2).
    """
    N, k = accuracy.shape
    ranks = np.sum(mean_ranks(accuracy) ** 2)
    chi_square = 12 * N / (k * (k + 1)) * (ranks - k * (k + 1) ** 2 / 4)
    F = float((N - 1) * chi_square / max(N * (k - 1) - chi_square, 1e-9))
    return {"F": F, "p_value": float(stats.f.sf(F, k - 1, (k - 1) * (N - 1)))}


def nemenyi(accuracy: pd.DataFrame) -> pd.DataFrame:
    """p-values of Nemenyi's test that two methods are equally good."""
    p_values = scikit_posthocs.posthoc_nemenyi_friedman(accuracy.to_numpy())
    return p_values.set_axis(accuracy.columns).set_axis(accuracy.columns, axis=1)


def summarise(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The measures of Arora et al. (2020) of each method, a row.

    `P90` and `P95` are the fractions of data sets with 90 % and 95 % of the best method's accuracy
    or more, and `PMA` the mean percentage of it.
    """
    of_best = accuracy.div(accuracy.max(axis=1), axis=0)
    measures = {
        "mean_rank": mean_ranks(accuracy),
        "mean_accuracy": accuracy.mean(),
        "P90": (of_best >= 0.9).mean(),
        "P95": (of_best >= 0.95).mean(),
        "PMA": of_best.mean(),
    }
    return pd.DataFrame(measures)


def mean_gain(accuracy: pd.DataFrame, method: str, other: str) -> tuple[float, float, float]:
    """How much more accurate a method is than another: the mean and its 95 % interval."""
    gain: Any = accuracy[method] - accuracy[other]
    mean = float(gain.mean())
    margin = float(stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain))
    return mean, mean - margin, mean + margin


def about_as_good(low: float, high: float) -> bool | None:
    """Whether a mean gain in an interval is more than `-MARGIN`; `None` if that cannot be told."""
    return True if low > -MARGIN else False if high < -MARGIN else None


def draw_ranks(ax: Any, accuracy: pd.DataFrame, p_values: pd.DataFrame) -> None:
    """Draws the mean ranks; a bar joins methods that Nemenyi's test at 5 % cannot tell apart."""
    scikit_posthocs.critical_difference_diagram(
        mean_ranks(accuracy),
        p_values,
        ax=ax,
        label_fmt_left="{label}  {rank:.2f}",
        label_fmt_right="{rank:.2f}  {label}",
    )


def draw_gains(ax: Any, accuracy: pd.DataFrame, method: str) -> None:
    """Draws a method's accuracy less that of each other: a dot a data set, a line the mean."""
    others = accuracy.columns.drop(method)[::-1]
    for row, other in enumerate(others):
        gain: Any = 100 * (accuracy[method] - accuracy[other])
        y = row + np.linspace(-0.2, 0.2, len(gain))
        ax.plot(gain, y, "o", color=BLUE, ms=4.5, alpha=0.6, mew=0)
        ax.vlines(gain.mean(), row - 0.35, row + 0.35, color=RED, lw=2.5)
        ax.text(
            1.01, row, f"better on {(gain > 0).sum()}, worse on {(gain < 0).sum()}", va="center",
            transform=ax.get_yaxis_transform(), fontsize=9,
        )  # fmt: skip
    ax.axvline(0, color=BLACK, lw=1)
    ax.set_yticks(range(len(others)), [f"against {other}" for other in others])
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("accuracy less that of the other, percentage points")
    ax.set_title(f"{method} against each other method: right of 0 it is better")
