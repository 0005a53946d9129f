"""Gauss' rule."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache
def half_rule(count: int) -> np.ndarray:
    """Nodes in [0, 1] and weights of the rule of Gauss and Legendre, `(count, 2)`.

    Near the ends numpy's weights are off by some ten units of the last place.
    """
    x = np.polynomial.legendre.leggauss(count)[0].astype(np.longdouble)
    slope = np.ones_like(x)
    for _ in range(3):
        last, value = np.ones_like(x), x
        for n in range(2, count + 1):
            last, value = value, ((2 * n - 1) * x * value - (n - 1) * last) / n
        slope = count * (x * value - last) / (x * x - 1)
        x = x - value / slope
    return np.stack([(1 + x) / 2, 1 / ((1 - x * x) * slope**2)], axis=1).astype(np.float64)
