"""Statistics of several classifiers on several data sets: ranks and whether they differ.

Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006), section 3.2.
Scores are `(N, k)`: of `k` classifiers on `N` data sets, larger is better.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Friedman(NamedTuple):
    """Friedman's test of whether classifiers are all equally good.

    Attributes:
      chi_square: `χ²_F`, without a correction for ties.
      F: that of Iman and Davenport (1980), which is less conservative.
      p_value: of `F`, with `k - 1` and `(k - 1)(N - 1)` degrees of freedom.
    """

    chi_square: float
    F: float
    p_value: float


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """The mean rank of each classifier, `(k,)`: 1 is the best, and ties share their ranks."""
    return stats.rankdata(-scores, axis=1).mean(axis=0)


def friedman(scores: np.ndarray) -> Friedman:
    """Tests whether all are equally good, from `scores (N, k)`; at least 2 of each."""
    N, k = scores.shape
    chi_square = 12 * N / (k * (k + 1)) * (np.sum(mean_ranks(scores) ** 2) - k * (k + 1) ** 2 / 4)
    left = N * (k - 1) - chi_square  # 0 where all data sets rank them the same
    F = (N - 1) * chi_square / left if left > 1e-9 else np.inf
    return Friedman(float(chi_square), float(F), float(stats.f.sf(F, k - 1, (k - 1) * (N - 1))))


def critical_difference(k: int, N: int, alpha: float = 0.05) -> float:
    """How far mean ranks of two of `k` classifiers on `N` data sets lie apart by chance.

    Nemenyi's test: `q_α √(k (k + 1)/(6 N))`, with `q_α` of the studentised range over √2.
    """
    q: Any = stats.studentized_range.ppf(1 - alpha, k, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(k * (k + 1) / (6 * N)))


def cliques(ranks: np.ndarray, difference: float) -> list[tuple[int, int]]:
    """The largest groups of which no two differ.

    Args:
      ranks: mean ranks, sorted, `(k,)`.
      difference: from which on two differ.

    Returns:
      First and last of each group of two or more; none lies within another.
    """
    ends = [int(np.flatnonzero(ranks - rank < difference)[-1]) for rank in ranks]
    return [
        (start, end)
        for start, end in enumerate(ends)
        if end > start and (start == 0 or ends[start - 1] < end)
    ]
