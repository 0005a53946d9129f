"""What `generalization` found: errors, claims, the figure and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lib import report
from experiments.lib.data import Dataset
from experiments.lib.kernels import MODES
from experiments.lib.workdir import Arrays, Workdir

NTK = "DEQ, NTK"
MARGIN = 0.005  # of test error, besides chance, within which kernels are about as good

Summary = dict[str, Any]


def summarise(
    data: Dataset,
    labels: np.ndarray,
    kernels: Mapping[str, Arrays],
    networks: Mapping[int, Arrays],
    enough: float,
) -> Summary:
    """Reduces predictions to errors; the numbers are those of results.json.

    Args:
      data: what was learned.
      labels: the training labels, `(noises, n)`.
      kernels: what `regress` returned, by name.
      networks: what `generalization.measure_networks` returned, by width.
      enough: the mean squared error of a network that fits.
    """
    noises, n = labels.shape
    summary: Summary = {"kernels": {}, "networks": {}, "comparison": []}
    wrong: dict[str, np.ndarray] = {}
    for name, found in kernels.items():
        train = found["train"].argmax(-1) != labels
        test = found["test"].argmax(-1) != data.y_test
        wrong[name] = test[MODES.index("tuned")]
        summary["kernels"][name] = {
            mode: {
                "shape": found["shape"][i].tolist(),
                "regularisation": found["regularisation"][i].tolist(),
                "train_error": train[i].mean(-1).tolist(),
                "test_error": test[i].mean(-1).tolist(),
            }
            for i, mode in enumerate(MODES)
        }
    for i in range(noises):
        by_error = sorted(wrong, key=lambda name: wrong[name][i].mean())
        ours = next(name for name in by_error if name.startswith("DEQ"))
        other = next(name for name in by_error if not name.startswith("DEQ"))
        difference = wrong[ours][i].astype(float) - wrong[other][i]  # image by image
        summary["comparison"].append(
            {
                "deq": ours,
                "other": other,
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
            }
        )
    for width, found in networks.items():
        learned, limit = found["learned"], found["limit"]
        distance = np.sqrt(np.square(learned[:, :, n:] - limit[:, None]).mean((2, 3)))
        summary["networks"][width] = {
            "steps": int(found["steps"]),
            "learning_rate": float(found["learning_rate"]),
            "train_mse": found["train_mse"].tolist(),
            "fits": (found["train_mse"] <= enough).tolist(),
            "train_error": (learned[:, :, :n].argmax(-1) != labels[:, None]).mean(-1).tolist(),
            "test_error": (learned[:, :, n:].argmax(-1) != data.y_test).mean(-1).tolist(),
            "limit_test_error": (limit.argmax(-1) != data.y_test).mean(-1).tolist(),
            "distance": distance.tolist(),
        }
    return summary


def write(
    settings: Mapping[str, Any],
    noises: Sequence[float],
    found: Mapping[int, Summary],
    workdir: Workdir,
) -> None:
    """Writes results.json, generalization.png and report.md."""
    report.write_claims(
        workdir,
        "generalization",
        title="Infinitely deep kernels fit wrong labels, and generalise",
        introduction=f"Regression on centred one-hot targets of `{settings['data']}`; the class is "
        "the largest output. A wrong training label is another class, drawn at random; test labels "
        f"are right, {settings['n_test']} of them. The mean image of the largest training set was "
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
        claims=_claims(settings, noises, found),
        numbers={"noises": list(noises), "measured": found},
        tables=[
            report.Table(
                ("kernel, n", *(f"{_noise_name(p)}: {c}" for p in noises for c in
                 ("tuned", "its λ", "t = ∞", "training"))),
                _kernel_rows(found),
                "Test error of kernels",
                "λ is what tuning adds to the diagonal, relative to its mean; t = ∞ is "
                "interpolation, and training is its error on its training images.",
            ),
            report.Table(
                ("width, n", "labels", "training MSE", "fits", "training error", "test error",
                 "at infinite width", "distance to it", "steps"),
                _network_rows(noises, found),
                "Finite networks",
                "Means over networks; the training MSE is the largest, and the distance is RMS "
                "over test outputs.",
            ),
        ],
        draw=lambda plt: _draw(plt, noises, found),
    )  # fmt: skip


def _noise_name(noise: float) -> str:
    return f"{noise:.0%} wrong" if noise else "right labels"


def _kernel_rows(found: Mapping[int, Summary]) -> list[list[str]]:
    rows = []
    for count, summary in found.items():
        for name, by_mode in summary["kernels"].items():
            tuned, free = (by_mode[mode] for mode in MODES)
            cells = [
                f"{value:{form}}"
                for i in range(len(tuned["test_error"]))
                for value, form in (
                    (tuned["test_error"][i], ".2%"),
                    (tuned["regularisation"][i], ".1g"),
                    (free["test_error"][i], ".2%"),
                    (free["train_error"][i], ".2%"),
                )
            ]
            rows.append([f"{name}, {count}", *cells])
    return rows


def _network_rows(noises: Sequence[float], found: Mapping[int, Summary]) -> list[list[str]]:
    return [
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


def _by_count(found: Mapping[int, Summary], of: Any, form: str = ".2%") -> str:
    return ", ".join(f"{of(summary):{form}} ({count})" for count, summary in found.items())


def _claims(
    settings: Mapping[str, Any], noises: Sequence[float], found: Mapping[int, Summary]
) -> list[report.Claim]:
    free = [summary["kernels"][NTK]["interpolating"] for summary in found.values()]
    last, noise = max(found), noises[1]
    claims = [
        report.Claim(
            "Trained for ever, the infinitely wide DEQ (its NTK) fits every training label, wrong "
            "ones too.",
            f"Its error on {', '.join(map(str, found))} training images is at most "
            f"{max(max(f['train_error']) for f in free):.2%}, without wrong labels and with "
            f"{noise:.0%}; it has to be 0.",
            all(error == 0 for f in free for error in f["train_error"]),
        )
    ]
    for i, noise in enumerate(noises):
        first_error, last_error = free[0]["test_error"][i], free[-1]["test_error"][i]
        chance = np.sqrt(
            (first_error * (1 - first_error) + last_error * (1 - last_error)) / settings["n_test"]
        )
        below = not noise or last_error < noise
        claims.append(
            report.Claim(
                f"{_noise_name(noise).capitalize()}: interpolating, its test error falls with the "
                "number of training images all the same"
                + (", and below the fraction of wrong labels." if noise else "."),
                _by_count(found, lambda s, i=i: s["kernels"][NTK]["interpolating"]["test_error"][i])
                + f"; from first to last it has to fall by two standard errors, {2 * chance:.2%}.",
                bool(first_error - last_error > 2 * chance and below),
            )
        )

    def excess(summary):
        tuned, free = (summary["kernels"][NTK][mode]["test_error"][1] for mode in MODES)
        return free - tuned

    before = [excess(summary) for count, summary in found.items() if count != last]
    claims.append(
        report.Claim(
            f"{_noise_name(noises[1]).capitalize()}: overfitting is benign, what interpolation "
            "adds to the test error of the tuned kernel vanishes as training images get more.",
            f"The DEQ's NTK adds {_by_count(found, excess, '+.2%')}; the last has to be below the "
            "largest before and below one percentage point.",
            excess(found[last]) < min(0.01, max(before)),
        )
    )
    for i, noise in enumerate(noises):
        c = found[last]["comparison"][i]
        bound = MARGIN + 2 * c["standard_error"]
        ours, other = (
            found[last]["kernels"][c[key]]["tuned"]["test_error"][i] for key in ("deq", "other")
        )
        claims.append(
            report.Claim(
                f"{_noise_name(noise).capitalize()}: infinitely deep kernels are about as good as "
                "explicit ones and an RBF kernel.",
                f"Tuned, on {last} training images, the better of the DEQ's ({c['deq']}) has a "
                f"test error of {ours:.2%}, the best of the others ({c['other']}) {other:.2%}; the "
                f"difference, {c['difference']:+.2%}, has to be below {MARGIN:.1%} and two "
                f"standard errors (image by image), together {bound:.2%}.",
                c["difference"] < bound,
            )
        )
    return [*claims, _network_claim(noises, found)]


def _network_claim(noises: Sequence[float], found: Mapping[int, Summary]) -> report.Claim:
    measured, holds, unfitted = [], True, []
    for count, summary in found.items():
        networks = summary["networks"]
        for i, noise in enumerate(noises):
            distances = [float(np.mean(network["distance"][i])) for network in networks.values()]
            if not distances:
                continue
            shown = ", ".join(f"{d:.3f} ({w})" for d, w in zip(distances, networks, strict=True))
            measured.append(f"{count} images, {_noise_name(noise)}: {shown}")
            holds &= bool((np.diff(distances) < 0).all())
            unfitted += [
                f"width {width} on {count} images, {_noise_name(noise)}"
                for width, network in networks.items()
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
    ax.set_xlim(left=0)
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
