"""The exponent of the leading order, of numbers that have corrections of higher orders too.

Theory gives the distance `D` of a network of width `n` from its limit for `n → ∞` alone: it is an
expansion in `1/√n`,

    D² = (a/n) (1 + b/√n + c/n + …),

so that a line through `log D` against `log n` over widths that can be trained does not have the
slope −1/2, but one that tends to it. What can be tested is the exponent of the leading term:

    E[D²] = a n^(2s) (1 + b/√n + c/n),     is s = −1/2?

`b` and `c` are unknown, and `s` is what is known of it whatever they are. They are corrections, on
the widths that were measured: `|b/√n| <= 1` and `|c/n| <= 1`. Without that no data had an exponent,
since `a → 0` makes the next term the leading one. As many of them are fitted as there are widths
beyond two: with three widths `b` alone, with two none.

In its leading order `D²` is a quadratic form of Gaussians over `n`, so that its scatter over
networks is a constant part of it. It is estimated from all widths together, and weighs the means;
the 95 % interval is where `χ²(s)`, least in `a`, `b` and `c`, is above its least value by no more
than Student's `t²`.

What refutes an exponent is data of another one: a distance that falls to a floor (the limit is a
wrong one, or wide networks leave it, such as those in mean-field scaling) bends up, and has an
interval above −1/2; one that falls as another power has that power in its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from scipy import optimize, stats

from experiments.lib.report import PowerLaw, fit_by_width

_LOW, _HIGH, _STEPS = -2.0, 1.0, 301  # exponents that are tried; then it is refined


@dataclass(frozen=True)
class LeadingPower:
    """`D² = a n^(2 exponent) (1 + b/√n + c/n)`.

    Attributes:
      exponent: the most likely one.
      low, high: its 95 % interval.
      a, b, c: with the most likely exponent; 0 where they are not fitted.
      orders: how many corrections are fitted.
    """

    exponent: float
    low: float
    high: float
    a: float
    b: float
    c: float
    orders: int

    @property
    def is_root(self) -> bool | None:
        """Whether `D` falls as `1/√n` for all that is known; `None` if it may not fall at all."""
        within = self.low <= -0.5 <= self.high
        return None if within and self.high >= 0 else within

    @property
    def formula(self) -> str:
        """What was fitted."""
        corrections = ("", " (1 + b/√n)", " (1 + b/√n + c/n)")[self.orders]
        return f"D² = a n^(2s){corrections}"

    def __call__(self, n: np.ndarray) -> np.ndarray:
        """The fitted `D` at widths `n`, those that were measured and wider."""
        square = self.a * n ** (2 * self.exponent) * (1 + self.b / np.sqrt(n) + self.c / n)
        return np.sqrt(square)

    @property
    def interval(self) -> str:
        """As `−0.52 … −0.44`."""
        return f"{self.low:.3f} … {self.high:.3f}".replace("-", "−")

    def __str__(self) -> str:
        """As `−0.51`."""
        return f"{self.exponent:.3f}".replace("-", "−")


def fit_leading_power(distances: Mapping[int, np.ndarray]) -> LeadingPower:
    """Fits the leading exponent to the distances of networks, `(seeds,)`, by width.

    Args:
      distances: `D > 0` of every network; two widths or more, two networks of each or more.
    """
    widths = np.array(sorted(distances), float)
    squares = [np.square(distances[width]) for width in sorted(distances)]
    means = np.array([of_width.mean() for of_width in squares])
    counts = np.array([len(of_width) for of_width in squares])
    freedom = int(counts.sum()) - len(widths)
    scatter = sum(
        np.sum((of_width / mean - 1) ** 2) for of_width, mean in zip(squares, means, strict=True)
    )
    errors = means * np.sqrt(scatter / freedom / counts)

    orders = min(len(widths) - 2, 2)
    u = np.sqrt(widths[0] / widths)
    # a (1 + b/√n + c/n) with corrections of at most 1: the cone of these, with weights >= 0.
    signs = np.array(list(product((1.0, -1.0), repeat=orders)))  # (2^orders, orders)
    corners = 1 + signs @ np.array([u, u**2])[:orders]  # (2^orders, widths)

    def fit(exponent):
        basis = (corners * (widths / widths[0]) ** (2 * exponent) / errors).T
        weights, distance = optimize.nnls(basis, means / errors)
        return weights, distance**2

    def chi_squared(exponent):
        return fit(exponent)[1]

    tried = np.linspace(_LOW, _HIGH, _STEPS)
    found = np.array([chi_squared(exponent) for exponent in tried])
    best, step = tried[found.argmin()], tried[1] - tried[0]
    bounds = best - step, best + step
    refined: Any = optimize.minimize_scalar(chi_squared, bounds=bounds, method="bounded")
    best = float(refined.x)
    weights, least = fit(best)
    bound = least + float(stats.t.ppf(0.975, freedom)) ** 2

    def end(inside, outside):
        root: Any = optimize.brentq(lambda s: chi_squared(s) - bound, inside, outside)
        return float(root)

    inside = np.append(tried[found <= bound], best)
    low, high = inside.min(), inside.max()
    total = weights.sum()
    b, c = [*(weights @ signs / max(total, np.finfo(float).tiny)), 0.0, 0.0][:2]
    return LeadingPower(
        exponent=best,
        low=_LOW if low <= _LOW else end(low, max(low - step, _LOW)),
        high=_HIGH if high >= _HIGH else end(high, min(high + step, _HIGH)),
        a=float(total * widths[0] ** (-2 * best)),
        b=float(b * widths[0] ** 0.5),
        c=float(c * widths[0]),
        orders=orders,
    )


def local_slopes(distances: Mapping[int, np.ndarray]) -> list[PowerLaw]:
    """The slopes of `log D` between neighbouring widths, which tend to the leading exponent."""
    widths = sorted(distances)
    return [fit_by_width({w: distances[w] for w in pair}) for pair in pairwise(widths)]


def tell(fit: LeadingPower, local: list[PowerLaw]) -> str:
    """What was found, in words, for a claim that `D` falls as `1/√n`."""
    slopes = ", ".join(map(str, local))
    if fit.is_root:
        verdict = "it agrees with theory's −1/2"
    elif fit.is_root is None:
        verdict = "it may be 0 too, which decides nothing: take more widths, or more --seeds"
    else:
        verdict = "theory's −1/2 is outside"
    text = (
        f"The leading exponent, s in `{fit.formula}`, is {fit}, 95 % interval {fit.interval}: "
        f"{verdict}. The slope between neighbouring widths, which is to tend to it, is {slopes}."
    )
    if fit.orders == 0:
        text += " Two widths leave no room for higher orders in 1/√n: take three --widths."
    return text
