"""What `uci` found: measures beside the published ones, ranks, claims, the figure, results.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.claims.uci_methods import METHODS
from experiments.lib import ranks, report
from experiments.lib.workdir import Arrays, Workdir

WAYS = ("as published", "chosen inside")
MEASURES = ("mean_accuracy", "P90", "P95", "PMA")
COUNT = 90  # data sets of Arora et al.
# Arora et al., table 1. P90, P95 and PMA are relative to the best of the 179
# classifiers of Fernández-Delgado et al., of which the Gaussian kernel and the forest are two.
PUBLISHED = {
    "NTK": (0.8195, 0.8889, 0.7222, 0.9572),
    "random forest": (0.8156, 0.8556, 0.6778, 0.9525),
    "RBF": (0.8103, 0.8556, 0.7222, 0.9456),
}
REPRODUCED = 0.003  # of mean accuracy

Found = Mapping[str, Mapping[str, Arrays]]


def write(
    settings: Any, sizes: Mapping[str, Mapping[str, int]], found: Found, workdir: Workdir
) -> None:
    """Writes results.json, results.csv, uci.png and report.md.

    Only of the data sets that all methods are finished on, if there are two.

    Args:
      settings: the flags.
      sizes: rows, features and classes of each data set.
      found: over data sets and methods, what `uci.kept` returned.
      workdir: where to.
    """
    methods = settings.methods.split(",")
    done = {name: found[name] for name in sizes if len(found[name]) == len(methods)}
    if len(done) < 2:
        return
    by_way = {
        way: pd.DataFrame(
            {name: {m: of[m]["accuracy"][i].mean() for m in methods} for name, of in done.items()}
        ).T
        for i, way in enumerate(WAYS)
    }
    summaries = {way: ranks.summarise(accuracy) for way, accuracy in by_way.items()}
    p_values = {way: ranks.nemenyi(accuracy) for way, accuracy in by_way.items()}
    size = pd.DataFrame(sizes).T.loc[list(done)]
    table = size.join([of.add_suffix(f", {way}") for way, of in by_way.items()])
    workdir.write_text("results.csv", table.to_csv(index_label="data set", float_format="%.6f"))
    report.write_claims(
        workdir,
        "uci",
        title="Infinitely deep kernels in the table of Arora et al.",
        introduction=_introduction(len(done), len(sizes), settings.max_n, by_way),
        caption="Above: mean ranks over data sets, the best to the left, hyper-parameters chosen "
        "as published and inside the training rows; of methods that a bar joins it cannot be said "
        "that they differ (Nemenyi's test at 5 %). Below: one method's accuracy less that of each "
        "other, a dot a data set; a line is the mean.",
        settings=settings,
        claims=_claims(by_way, summaries),
        numbers={
            "sizes": {name: list(sizes[name].values()) for name in done},
            "summary": {way: summary.to_dict("index") for way, summary in summaries.items()},
            "friedman": {way: ranks.friedman(accuracy) for way, accuracy in by_way.items()},
            "nemenyi": {way: of.to_numpy() for way, of in p_values.items()},
            "measured": done,
        },
        sections=_sections(size, len(sizes), by_way, summaries, done),
        draw=lambda plt: _draw(plt, by_way, p_values),
    )


def _introduction(done: int, count: int, max_n: int, by_way: Mapping[str, Any]) -> str:
    tests = "; ".join(
        f"{way}: F = {test['F']:.2f}, p = {test['p_value']:.2g}"
        for way, test in ((way, ranks.friedman(of)) for way, of in by_way.items())
    )
    return (
        f"{done} of the {count} data sets of at most {max_n} rows are finished. The protocol is "
        "that of Arora et al. (2020, arXiv:1910.01663): a support vector machine, one-versus-one, "
        "on the kernel matrix. What is fitted to one half of the rows is chosen by its accuracy on "
        "the other, and the chosen one is fitted to all but the test rows of each of four splits; "
        "accuracy is the mean of the four. So test rows have a part in the choice. *Chosen inside* "
        "is the same with the test rows of a split left out of both halves, so that they have "
        "none.\n\n"
        "The NTK is theirs: 1 to 5 layers, the first 0 to 4 of them not trained, 15 kernels. The "
        "DEQ has 15 too: ReLU without and with a bias (b_std 0, 1; W_std .3 to 1.3) and erf (W_std "
        ".8, U_std .25 to 4). So has the neural ODE: ReLU, W_std 1, T .25 to 4, with the input as "
        "the first state, without and with a leak, or added all the time. The RBF kernel has 13, "
        "exp(-γ ‖x - x'‖²), γ from 2⁻¹⁶ to 2⁸. Each has 7 values of C, 10⁻² to 10⁴. A forest has "
        "500 trees, and 2, 4, 6 or 8 features to split by.\n\n"
        f"Friedman's test that all are equally good: {tests}."
    )


def _claims(by_way: Mapping[str, Any], summaries: Mapping[str, Any]) -> Iterator[report.Claim]:
    published_way = WAYS[0]
    count = len(by_way[published_way])
    for method, (published, *_) in PUBLISHED.items():
        if method in by_way[published_way] and count == COUNT:
            mean = float(by_way[published_way][method].mean())
            yield report.Claim(
                f"{method}: the published mean accuracy on {COUNT} data sets is {published:.2%}.",
                f"Ours is {mean:.2%}; it must be within {REPRODUCED:.1%}.",
                abs(mean - published) < REPRODUCED,
            )
    if "DEQ-NTK" not in by_way[published_way]:
        return
    for way, accuracy in by_way.items():
        for other in accuracy.columns.drop("DEQ-NTK"):
            mean, low, high = ranks.mean_gain(accuracy, "DEQ-NTK", other)
            ours, theirs = summaries[way].loc["DEQ-NTK"], summaries[way].loc[other]
            yield report.Claim(
                f"Hyper-parameters {way}: the NTK of infinite depth is at least about as good as "
                f"{other}.",
                f"Its accuracy is {mean:+.2%} on average, with 95 % confidence {low:+.2%} to "
                f"{high:+.2%}, and must be above {-ranks.MARGIN:.0%}; its mean rank is "
                f"{ours.mean_rank:.2f}, and the other's {theirs.mean_rank:.2f}.",
                ranks.about_as_good(low, high),
            )


def _sections(
    size: pd.DataFrame,
    count: int,
    by_way: Mapping[str, pd.DataFrame],
    summaries: Mapping[str, pd.DataFrame],
    done: Found,
) -> dict[str, str]:
    accuracy = size.join(by_way[WAYS[0]].map("{:.2%}".format))
    header = ("method", "hyper-parameters", "mean rank", "mean accuracy", "P90", "P95", "PMA")
    sections = {
        "Methods": f"On {len(size)} of {count} data sets, those with {size['rows'].min()} to "
        f"{size['rows'].max()} rows. P90 and P95: data sets with at least 90 % and 95 % of the "
        "best method's accuracy; PMA: percentage of it, on average. The best is that of the "
        "methods here, with their hyper-parameters chosen alike; in the published rows it is that "
        "of the 179 classifiers of Fernández-Delgado et al. too, so that these are lower.\n\n"
        + report.table(header, _measures(summaries), align="llrrrrr")
    }
    if "DEQ-NTK" in accuracy:
        sections["The infinitely deep NTK against the others"] = (
            "Accuracy of the DEQ's NTK less that of the other, on average with its 95 % interval, "
            "in percentage points.\n\n" + report.table(("against", *WAYS), _gains(by_way))
        )
    return sections | {
        "Accuracy": f"Hyper-parameters {WAYS[0]}.\n\n" + report.frame(accuracy, "data set"),
        "What was chosen": f"Hyper-parameters {WAYS[0]}, without C; the five most frequent.\n\n"
        + report.table(("method", "chosen (data sets)"), _chosen(done), align="ll"),
    }


def _measures(summaries: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    rows = []
    for way, summary in summaries.items():
        for method, measures in summary.sort_values("mean_rank", kind="stable").iterrows():
            shown = [f"{measures[name]:.2%}" for name in MEASURES]
            rows.append([str(method), way, f"{measures['mean_rank']:.2f}", *shown])
    where = f"published, {COUNT} data sets"
    for method, measures in PUBLISHED.items():
        rows.append([method, where, "", *(f"{of:.2%}" for of in measures)])
    return rows


def _gains(by_way: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    rows = []
    for other in by_way[WAYS[0]].columns.drop("DEQ-NTK"):
        gains = (ranks.mean_gain(accuracy, "DEQ-NTK", other) for accuracy in by_way.values())
        shown = [f"{100 * m:+.2f} ({100 * a:+.2f} to {100 * b:+.2f})" for m, a, b in gains]
        rows.append([str(other), *shown])
    return rows


def _chosen(done: Found) -> list[list[str]]:
    rows = []
    for method in next(iter(done.values())):
        shapes, costs, _ = METHODS[method]
        indices = [int(of[method]["chosen"][0, 0]) // len(costs) for of in done.values()]
        counts = np.bincount(indices, minlength=len(shapes))
        order = [i for i in np.argsort(-counts, kind="stable") if counts[i]][:5]
        shown = [
            f"{' '.join(f'{k}={v}' for k, v in shapes[i].items())} ({counts[i]})" for i in order
        ]
        rows.append([method, ", ".join(shown)])
    return rows


def _draw(plt: Any, by_way: Mapping[str, Any], p_values: Mapping[str, Any]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(15, 8.5), height_ratios=(1, 1.3))
    for (above, below), (way, accuracy) in zip(axes.T, by_way.items(), strict=True):
        ranks.draw_ranks(above, accuracy, p_values[way])
        above.set_title(f"Mean rank on {len(accuracy)} data sets, hyper-parameters {way}")
        first = "DEQ-NTK" if "DEQ-NTK" in accuracy else accuracy.columns[0]
        ranks.draw_gains(below, accuracy, first)
    return figure
