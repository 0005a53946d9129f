"""What `generalization` found: errors, claims, the figure and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.lib import report
from experiments.lib.kernels import MODES
from experiments.lib.workdir import Workdir

if TYPE_CHECKING:
    from experiments.claims.generalization import Settings, Summary

NTK = "DEQ, NTK"
MARGIN = 0.005  # of test error, besides chance, within which kernels are about as good


def write(settings: Settings, found: Mapping[int, Summary], workdir: Workdir) -> None:
    """Writes results.json, generalization.png and report.md."""
    noises = settings.noises
    report.write_claims(
        workdir,
        "generalization",
        title="Infinitely deep kernels fit wrong labels, and generalise",
        introduction=f"Regression on centred one-hot targets of `{settings.data}`; the class is "
        "the largest output. A wrong training label is another class, drawn at random; test labels "
        f"are right, {settings.n_test} of them. The mean image of the largest training set was "
        "subtracted, and every image scaled to one norm.\n\n"
        "Every kernel is used twice: interpolating (nothing added to its diagonal but 10⁻¹⁰ of its "
        "mean; of an NTK this is gradient descent at t = ∞) and tuned (as much as is best). What "
        "is added, the DEQ's W_std and the RBF kernel's length scale are chosen by the mean "
        "squared error of one and the same fifth of the training images, whose labels are as "
        "noisy; then all training images are used.\n\n"
        "Finite networks are trained by full-batch gradient descent with momentum until their mean "
        "squared error is 1 % of that of the answer 0. Their random outputs before training are "
        "subtracted, so that they are to be compared with the NTK at t = ∞ (of the same W_std).",
        caption="Left: test error against the number of training images. Middle: all kernels at "
        "the largest number. Right: finite networks trained until they interpolate, and the NTK "
        "at t = ∞ (dashed), which is what they would learn if they were infinitely wide.",
        settings=settings,
        claims=_claims(settings, found),
        numbers={"noises": list(noises), "measured": found},
        sections={
            "Test error of kernels": "λ is what tuning adds to the diagonal, relative to its mean; "
            "t = ∞ is interpolation, and training is its error on its training images.\n\n"
            + _kernel_table(noises, found),
            "Finite networks": "Means over networks; the training MSE is the largest, and the "
            f"distance is RMS over test outputs.\n\n{_network_table(noises, found)}",
        },
        draw=lambda plt: _draw(plt, noises, found),
    )


def _noise_name(noise: float) -> str:
    return f"{noise:.0%} wrong" if noise else "right labels"


def _kernel_table(noises: Sequence[float], found: Mapping[int, Summary]) -> str:
    columns = ("tuned", "its λ", "t = ∞", "training")
    header = [f"{_noise_name(noise)}: {column}" for noise in noises for column in columns]
    rows = []
    for count, summary in found.items():
        for name, by_mode in summary["kernels"].items():
            tuned, free = (by_mode[mode] for mode in MODES)
            row = [f"{name}, {count}"]
            for i in range(len(noises)):
                row += [f"{tuned['test_error'][i]:.2%}", f"{tuned['regularisation'][i]:.1g}"]
                row += [f"{free[of][i]:.2%}" for of in ("test_error", "train_error")]
            rows.append(row)
    return report.table(("kernel, n", *header), rows)


def _network_table(noises: Sequence[float], found: Mapping[int, Summary]) -> str:
    header = (
        "width, n", "labels", "training MSE", "fits", "training error", "test error",
        "at infinite width", "distance to it", "steps",
    )  # fmt: skip
    rows = [
        [
            f"{width}, {count}",
            _noise_name(noise),
            f"{max(network['train_mse'][i]):.5f}",
            "yes" if all(network["fits"][i]) else "no",
            f"{np.mean(network['train_error'][i]):.2%}",
            f"{np.mean(network['test_error'][i]):.2%}",
            f"{network['limit_test_error'][i]:.2%}",
            f"{np.mean(network['distance'][i]):.4f}",
            str(network["steps"]),
        ]
        for count, summary in found.items()
        for width, network in summary["networks"].items()
        for i, noise in enumerate(noises)
    ]
    return report.table(header, rows)


def _by_count(values: Mapping[int, float], form: str = ".2%") -> str:
    return ", ".join(f"{value:{form}} ({count})" for count, value in values.items())


def _claims(settings: Settings, found: Mapping[int, Summary]) -> Iterator[report.Claim]:
    noises, last = settings.noises, found[max(found)]
    tuned, free = (
        {count: summary["kernels"][NTK][mode] for count, summary in found.items()} for mode in MODES
    )
    train_errors = [error for of in free.values() for error in of["train_error"]]
    yield report.Claim(
        "Trained for ever, the infinitely wide DEQ (its NTK) fits every training label, wrong ones "
        "too.",
        f"Its error on {', '.join(map(str, found))} training images is at most "
        f"{max(train_errors):.2%}, without wrong labels and with {noises[1]:.0%}; it must be 0.",
        not any(train_errors),
    )
    for i, noise in enumerate(noises):
        errors = {count: of["test_error"][i] for count, of in free.items()}
        first_error, *_, last_error = errors.values()
        chance = np.sqrt(sum(e * (1 - e) for e in (first_error, last_error)) / settings.n_test)
        below = not noise or last_error < noise
        yield report.Claim(
            f"{_noise_name(noise).capitalize()}: interpolating, its test error falls with the "
            "number of training images all the same"
            + (", and below the fraction of wrong labels." if noise else "."),
            f"{_by_count(errors)}; from first to last it has to fall by two standard errors, "
            f"{2 * chance:.2%}.",
            bool(first_error - last_error > 2 * chance and below),
        )
    excess = {n: free[n]["test_error"][1] - tuned[n]["test_error"][1] for n in found}
    *before, at_last = excess.values()
    yield report.Claim(
        f"{_noise_name(noises[1]).capitalize()}: overfitting is benign, what interpolation "
        "adds to the test error of the tuned kernel vanishes as training images get more.",
        f"The DEQ's NTK adds {_by_count(excess, '+.2%')}; the last must be below the "
        "largest before and below one percentage point.",
        bool(at_last < min(0.01, max(before))),
    )
    for noise, i, c in zip(noises, (0, 1), last["comparison"], strict=True):
        bound = MARGIN + 2 * c["standard_error"]
        ours, other = (
            last["kernels"][c[key]]["tuned"]["test_error"][i] for key in ("deq", "other")
        )
        yield report.Claim(
            f"{_noise_name(noise).capitalize()}: infinitely deep kernels are about as good as "
            "explicit ones and an RBF kernel.",
            f"Tuned, on {max(found)} training images, the better of the DEQ's ({c['deq']}) has "
            f"a test error of {ours:.2%}, the best of the others ({c['other']}) {other:.2%}; "
            f"the difference, {c['difference']:+.2%}, must be below {MARGIN:.1%} and two "
            f"standard errors (image by image), together {bound:.2%}.",
            bool(c["difference"] < bound),
        )
    yield _network_claim(noises, found)


def _network_claim(noises: Sequence[float], found: Mapping[int, Summary]) -> report.Claim:
    measured, holds, unfitted = [], True, []
    for count, summary in found.items():
        if not summary["networks"]:
            continue
        for i, noise in enumerate(noises):
            distances = {w: of["distance"][i].mean() for w, of in summary["networks"].items()}
            shown = ", ".join(f"{distance:.3f} ({width})" for width, distance in distances.items())
            measured.append(f"{count} images, {_noise_name(noise)}: {shown}")
            holds &= bool((np.diff(list(distances.values())) < 0).all())
            unfitted += [
                f"width {width} on {count} images, {_noise_name(noise)}"
                for width, network in summary["networks"].items()
                if not all(network["fits"][i])
            ]
    return report.Claim(
        "Finite networks that fit their training data approach the infinitely wide one with width.",
        f"RMS distance over test outputs, by width: {'; '.join(measured)}. It has to fall with "
        "every width, and every network has to fit. "
        + (f"Did not fit: {'; '.join(unfitted)}." if unfitted else "All fit."),
        holds and not unfitted,
    )


def _draw(plt: Any, noises: Sequence[float], found: Mapping[int, Summary]) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(14, 9), width_ratios=(1.15, 1, 1))
    for i, (noise, row) in enumerate(zip(noises, axes, strict=True)):
        title = f"{noise:.0%} of training labels wrong" if noise else "All training labels right"
        _draw_counts(row[0], i, noise, found)
        _draw_kernels(row[1], i, found[max(found)])
        _draw_networks(plt, row[2], i, found)
        row[0].set_title(f"{title}:\ntest error against training images")
        row[1].set_title(f"{title}:\nall kernels, {max(found)} training images")
        row[2].set_title(f"{title}:\nfinite networks")
    return figure


def _draw_counts(ax: Any, i: int, noise: float, found: Mapping[int, Summary]) -> None:
    counts = list(found)
    for name, mode, style, colour, label in (
        (NTK, "interpolating", "o-", report.RED, "DEQ NTK, t = ∞ (training error 0)"),
        (NTK, "tuned", "o-", report.BLUE, "DEQ NTK, tuned"),
        ("DEQ, NNGP", "tuned", "s-", report.SKY, "DEQ NNGP, tuned"),
        ("ReLU, depth 1, NTK", "tuned", "^--", report.GREEN, "ReLU NTK of depth 1, tuned"),
        ("RBF", "tuned", "v--", report.ORANGE, "RBF, tuned"),
    ):
        errors = [100 * found[n]["kernels"][name][mode]["test_error"][i] for n in counts]
        if mode == "interpolating" and any(
            found[n]["kernels"][name][mode]["train_error"][i] for n in counts
        ):
            label = "DEQ NTK, t = ∞"
        wide = {"lw": 5, "alpha": 0.5} if mode == "interpolating" else {}  # seen below an equal one
        ax.plot(counts, errors, style, color=colour, ms=5, label=label, **wide)
    if noise:
        ax.axhline(100 * noise, color=report.BLACK, ls=":", label="wrong training labels")
    ax.set(xscale="log", yscale="log", xlabel="training images", ylabel="test error, %")
    ax.set_xticks(counts, [str(n) for n in counts])
    low, high = ax.get_ylim()
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 30, 50, 80) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.legend(loc="lower left")


def _draw_kernels(ax: Any, i: int, summary: Summary) -> None:
    names = list(reversed(summary["kernels"]))
    tuned, free = (
        [100 * summary["kernels"][name][mode]["test_error"][i] for name in names] for mode in MODES
    )
    ax.hlines(range(len(names)), tuned, free, color="#bbbbbb", lw=1.5)
    ring = {"mfc": "white", "mec": report.RED, "ms": 9}  # seen around a tuned one that is equal
    ax.plot(free, range(len(names)), "o", label="interpolating", **ring)
    ax.plot(tuned, range(len(names)), "o", color=report.BLUE, label="tuned")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1.05 * max(tuned + free))
    ax.set_ylim(-1.6, len(names) - 0.5)
    ax.set_xlabel("test error, %")
    ax.legend(loc="lower left", ncols=2)


def _draw_networks(plt: Any, ax: Any, i: int, found: Mapping[int, Summary]) -> None:
    counts = [count for count, summary in found.items() if summary["networks"]]
    widths = list(found[counts[0]]["networks"])
    colours = plt.get_cmap("viridis")(np.linspace(0.6, 0.1, len(counts)))
    unfitted = False
    for count, colour in zip(counts, colours, strict=True):
        networks = found[count]["networks"]
        means = [100 * np.mean(network["test_error"][i]) for network in networks.values()]
        limits = [100 * network["limit_test_error"][i] for network in networks.values()]
        ax.plot(widths, means, "-", color=colour, label=f"{count} training images")
        ax.plot(widths, limits, "--", color=colour)
        for width, network in networks.items():
            for error, fits in zip(network["test_error"][i], network["fits"][i], strict=True):
                ax.plot(width, 100 * error, "o", mfc=colour if fits else "white", mec=colour, ms=5)
                unfitted |= not fits
    ax.plot([], [], "--", color="#666666", label="the same, infinitely wide")
    if unfitted:
        ax.plot([], [], "o", mfc="white", mec="#666666", label="a network that did not fit")
    ax.set(xscale="log", xlabel="width (a dot is a network)", ylabel="test error, %")
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower left")
