"""What launchers report with: tables, a power law fitted with its error, one figure style."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.lib.launch import Settings, format_value
from experiments.lib.workdir import Workdir, versions

# Okabe & Ito's palette, which the colour-blind tell apart too.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

Rows = Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Rows, align: str = "") -> str:
    """A table in Markdown that reads well as text too.

    Args:
      header: one text for each column.
      rows: as many texts each.
      align: `l` or `r` for each column; by default the first to the left, the others to the right.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    rule = [dashes if a == "l" else dashes[1:] + ":" for dashes, a in zip(rule, align, strict=True)]
    sides = {"l": str.ljust, "r": str.rjust}

    def line(cells):
        padded = [sides[a](cell, w) for cell, a, w in zip(cells, align, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (lines[0], rule, *lines[1:])))


def frame(data: Any, index: str) -> str:
    """The same of a pandas.DataFrame; `index` is the heading of its index."""
    rows = [[str(name), *map(str, row)] for name, row in zip(data.index, data.values, strict=True)]
    return table((index, *data.columns), rows)


@dataclass(frozen=True)
class PowerLaw:
    """`y = scale · x^exponent`, and how well the exponent is known.

    Attributes:
      exponent: the fitted slope of `log y` against `log x`.
      standard_error: of the exponent.
      low, high: its 95 % confidence interval, by Student's t distribution.
      scale: `y` at `x = 1`.
    """

    exponent: float
    standard_error: float
    low: float
    high: float
    scale: float

    def __call__(self, x: Any) -> np.ndarray:
        """The fitted `y` at `x`."""
        return self.scale * np.asarray(x, float) ** self.exponent

    def includes(self, exponent: float) -> bool:
        """Whether the interval has this exponent in it."""
        return self.low <= exponent <= self.high

    @property
    def interval(self) -> str:
        """As `−0.52 … −0.44`."""
        return f"{self.low:.3f} … {self.high:.3f}".replace("-", "−")

    def __str__(self) -> str:
        """As `-0.48 ± 0.02`."""
        return f"{self.exponent:.3f} ± {self.standard_error:.3f}".replace("-", "−")


def fit_power_law(x: Any, y: Any) -> PowerLaw:
    """Fits a power law by least squares of logarithms; at least 3 points, 2 different `x`."""
    fit: Any = stats.linregress(np.log(x), np.log(y))
    margin = float(stats.t.ppf(0.975, len(x) - 2)) * fit.stderr
    return PowerLaw(
        exponent=float(fit.slope),
        standard_error=float(fit.stderr),
        low=float(fit.slope - margin),
        high=float(fit.slope + margin),
        scale=float(np.exp(fit.intercept)),
    )


def fit_by_width(values: Mapping[int, np.ndarray]) -> PowerLaw:
    """Fits a power law of the width to one number for each network, `(seeds,)`, by width."""
    points = [(width, value) for width, of_width in values.items() for value in of_width]
    return fit_power_law(*zip(*points, strict=True))


@contextlib.contextmanager
def figure_style() -> Iterator[Any]:
    """Gives matplotlib's pyplot, drawing to files and in the style of all figures, then closes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.constrained_layout.use": True,
    }
    with plt.rc_context(style):
        try:
            yield plt
        finally:
            plt.close("all")


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and what became of it.

    Attributes:
      claim: what is claimed, with the published numbers.
      measured: what was measured here.
      holds: whether the measurement agrees; `None` if it cannot tell.
    """

    claim: str
    measured: str
    holds: bool | None


def all_hold(verdicts: Iterable[bool | None]) -> bool | None:
    """Whether all of several things hold; `None` if none fails and some cannot be told."""
    found = set(verdicts)
    return None if None in found and False not in found else all(found)


_SENTENCES = {True: "It holds.", False: "It does not hold.", None: "It cannot be told."}
_WORDS = {True: "holds", False: "FAILS", None: "open "}


def write_claims(
    workdir: Workdir,
    name: str,
    *,
    title: str,
    introduction: str,
    caption: str,
    settings: Settings,
    claims: Iterable[Claim],
    numbers: Mapping[str, Any],
    sections: Mapping[str, str],
    draw: Callable[[Any], Any],
) -> None:
    """Writes what a launcher found: results.json, NAME.png and report.md.

    Texts may have code in `backticks`, and blank lines between paragraphs.

    Args:
      workdir: where to.
      name: of the launcher.
      title: heading of the page.
      introduction: what the claims are about.
      caption: of the figure.
      settings: the flags.
      claims: what is claimed, measured, and whether it holds.
      numbers: all that was measured, for results.json.
      sections: below the figure: Markdown by heading.
      draw: makes the figure, from pyplot.
    """
    claims = list(claims)
    with figure_style() as plt:
        workdir.write_figure(f"{name}.png", draw(plt))
    verdicts = "\n\n".join(
        f"**Claim.** {c.claim}\n\n**Measured.** {c.measured}\n\n**{_SENTENCES[c.holds]}**"
        for c in claims
    )
    shown = "".join(f"## {heading}\n\n{text}\n\n" for heading, text in sections.items())
    flags = [
        [f"`--{key}`", f"`{format_value(value)}`"]
        for key, value in vars(settings).items()
        if value is not None
    ]
    used = ", ".join(f"{package} {version}" for package, version in versions().items())
    workdir.write_text(
        "report.md",
        f"# {title}\n\n{introduction}\n\n{verdicts}\n\n![figure]({name}.png)\n\n{caption}\n\n"
        f"{shown}## Settings\n\n{table(('flag', 'value'), flags)}\n\n"
        f"All numbers are in `results.json`. Versions: {used}.\n",
    )
    # Last: where it is, the others are too.
    workdir.write_json(
        "results.json",
        {"claims": claims, "settings": settings, "versions": versions(), **numbers},
    )
    for c in claims:
        print(f"{_WORDS[c.holds]}  {c.claim}\n       {c.measured}")
    print(f"\nSee {workdir.path / 'report.md'} and {name}.png beside it.")
