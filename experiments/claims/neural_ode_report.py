"""What `experiments.claims.neural_ode` tells: claims, tables and a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.claims.gaussianity import LEVEL
from experiments.lib import figures, report
from experiments.lib.launch import Settings
from experiments.lib.leading_order import tell
from experiments.lib.workdir import Workdir

GETS = ("NNGP", "NTK")


def _process(f: dict[str, Any]) -> Iterator[report.Claim]:
    yield report.Claim(
        "The covariance of one random network is off that of the Gaussian process by width^−1/2 in "
        "its leading order.",
        _by_width(f["covariance_errors"]) + tell(f["covariance_leading"], f["covariance_slopes"]),
        f["covariance_leading"].is_root,
    )
    p = {name: f[name]["p_value"] for name in ("skewness", "kurtosis", "covariance_test")}
    yield report.Claim(
        "Outputs for several inputs are jointly Gaussian, with the covariance of the limit.",
        f"{f['networks_used']} networks: Mardia's skewness p = {p['skewness']:.3f}, kurtosis "
        f"p = {p['kurtosis']:.3f}, covariance p = {p['covariance_test']:.3f} (rejected below "
        f"{LEVEL}).",
        min(p.values()) > LEVEL,
    )
    yield report.Claim(
        "The empirical NTK of one random network is off its limit by width^−1/2 in its leading "
        "order.",
        _by_width(f["ntk_errors"]) + tell(f["ntk_leading"], f["ntk_slopes"]),
        f["ntk_leading"].is_root,
    )


def _by_width(values: dict[int, np.ndarray]) -> str:
    means = ", ".join(f"{np.mean(v):.2g} ({width})" for width, v in values.items())
    return f"Means by width: {means}. "


def _training(f: dict[str, Any]) -> report.Claim:
    widest = f["losses"][max(f["losses"])]
    before, after = ({name: of[i].mean() for name, of in widest.items()} for i in (0, -1))
    return report.Claim(
        "Gradient descent on wide networks is that of the NTK: held-out predictions are off the "
        "closed form by width^−1/2 in the leading order.",
        f"The loss of the widest falls from {before['network']:.3f} to {after['network']:.4f}, in "
        f"closed form to {after['closed_form']:.4f}. {_by_width(f['distances'])}"
        f"{tell(f['leading'], f['slopes'])}",
        f["leading"].is_root,
    )


def _layers(f: dict[str, Any]) -> Iterator[report.Claim]:
    exponents, most = f["kernel_exponents"], max(f["kernel_errors"])
    yield report.Claim(
        "At infinite width the kernels of a residual network of L layers with tied weights "
        "approach those of the neural ODE as 1/L.",
        f"At L = {most} they are off by {f['kernel_errors'][most][0]:.2g} (NNGP) and "
        f"{f['kernel_errors'][most][1]:.2g} (NTK); the exponents between the three largest L tend "
        f"to {exponents['nngp']:.3f} and {exponents['ntk']:.3f}, which must be within 0.05 of −1.",
        all(abs(exponent + 1) < 0.05 for exponent in exponents.values()),
    )
    slope, means = f["network_slope"], f["network_errors"].mean(0)
    yield report.Claim(
        "At width 512 a residual network of L layers approaches the neural ODE with its weights as "
        "1/L.",
        f"From {means[0]:.2g} at one layer to {means[-1]:.2g} at 1000; the exponent over the four "
        f"largest L is {slope.exponent:.3f}, and must be within 0.05 of −1.",
        abs(slope.exponent + 1) < 0.05,
    )


def _definiteness(f: dict[str, Any]) -> Iterator[report.Claim]:
    cases = [*f["by_T"].values(), *f["by_count"].values()]
    smallest = {get: min(case[get]["value"] for case in cases) for get in ("nngp", "ntk")}
    yield report.Claim(
        "The kernels of distinct inputs are strictly positive definite, for every T and number of "
        "inputs.",
        f"λ_min over {len(cases)} settings (T {min(f['by_T'])} to {max(f['by_T'])}; up to "
        f"{max(f['by_count'])} inputs) is at least {smallest['nngp']:.2g} (NNGP) and "
        f"{smallest['ntk']:.2g} (NTK), each above what rounding could make of 0.",
        all(case[get]["positive"] for case in cases for get in ("nngp", "ntk")),
    )
    exceptions = f["exceptions"]
    singular = list(exceptions)[:2]
    yield report.Claim(
        "Odd φ is singular on {x, −x}, and linear φ on more inputs than features; another φ is "
        "not.",
        "; ".join(f"{name}: λ_min = {case['value']:.1e}" for name, case in exceptions.items())
        + ".",
        all(case["positive"] == (name not in singular) for name, case in exceptions.items()),
    )


def _ties(f: dict[str, Any]) -> report.Claim:
    tied, untied, chance = (f[of] for of in ("error_to_tied", "error_to_untied", "chance_error"))
    apart = ", ".join(f"{a:.0%} and {b:.0%} (T = {T:g})" for T, (a, b) in f["apart"].items())
    return report.Claim(
        "Tied and untied weights have different kernels, and networks with tied weights that of "
        "tied ones.",
        f"NNGP kernel and NTK of the last state are apart by {apart}, relative to the tied ones. "
        f"The mean covariance of {f['networks_used']} networks with tied weights at T = {f['T']:g} "
        f"is off the tied kernel by {tied:.2g} and off the untied one by {untied:.2g} (relative "
        f"squares; chance leaves {chance:.2g}); the second must be ten times the first.",
        bool(untied > 10 * tied and min(min(pair) for pair in f["apart"].values()) > 0.01),
    )


def _equilibrium(f: dict[str, Any]) -> report.Claim:
    errors, expected = np.array(list(f["errors"].values())), f["expected_rate"]
    shown = ", ".join(f"{a:.1e} and {b:.1e} (T = {T:g})" for T, (a, b) in f["errors"].items())
    nngp, ntk = f["rates"]
    near = np.abs(f["rates"] / expected - 1) < 0.25
    return report.Claim(
        "With a leak of 1 and injection at all times, the kernels become those of the deep "
        "equilibrium network as T grows, but for powers of T as exp(−2(1 − √J)T).",
        f"NNGP kernel and NTK are off by {shown}: between the last two T they fall at rates of "
        f"{nngp:.2f} and {ntk:.2f}, where 2(1 − √J) is {expected:.2f}. Both must fall with T, and "
        "the rates be within a quarter of that.",
        bool((np.diff(errors, axis=0) < 0).all() and near.all()),
    )


def _images(f: dict[str, Any], count: int) -> report.Claim:
    best = {
        family: min(of["error"] for name, of in f.items() if name.startswith(family))
        for family in ("neural ODE", "DEQ", "explicit")
    }
    chance = 2 * np.sqrt(best["explicit"] * (1 - best["explicit"]) / count)
    return report.Claim(
        "Infinitely deep kernels generalise as explicit ones do.",
        "Test errors, the better of NNGP and NTK: "
        + ", ".join(f"{name} {error:.1%}" for name, error in best.items())
        + f". The first two may be above the last by two standard errors, {chance:.1%}.",
        bool(max(best["neural ODE"], best["DEQ"]) <= best["explicit"] + chance),
    )


def _draw(found: dict[str, Any], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.2))
    process, layers = found["process"], found["layers"]
    for ax, name, title in (
        (axes[0, 0], "covariance", "Covariance of one network"),
        (axes[0, 1], "ntk", "Empirical NTK of one network"),
    ):
        errors = process[f"{name}_errors"]
        widths = list(errors)
        figures.draw_networks(ax, widths, errors.values(), figures.width_colours(plt, widths))
        leading, slopes = process[f"{name}_leading"], process[f"{name}_slopes"]
        figures.draw_leading(ax, widths, leading, slopes)
        ax.set(title=title, ylabel="relative distance to the limit")
    trained = found["training"]
    widths = list(trained["distances"])
    colours = figures.width_colours(plt, widths)
    figures.draw_networks(axes[0, 2], widths, trained["distances"].values(), colours)
    figures.draw_leading(axes[0, 2], widths, trained["leading"], trained["slopes"])
    axes[0, 2].set(title="Trained networks and the closed form", ylabel="RMS over held-out outputs")
    for i, (get, colour) in enumerate(zip(GETS, (report.BLUE, report.ORANGE), strict=True)):
        errors = layers["kernel_errors"]
        values = [pair[i] for pair in errors.values()]
        axes[1, 0].loglog(list(errors), values, "o-", color=colour, label=f"{get}, infinite width")
        apart = found["ties"]["apart"]
        values = [pair[i] for pair in apart.values()]
        axes[1, 1].loglog(list(apart), values, "o-", color=colour, label=f"{get}, tied from untied")
        errors = found["equilibrium"]["errors"]
        values = [pair[i] for pair in errors.values()]
        axes[1, 2].semilogy(list(errors), values, "o-", color=colour, label=get)
    counts, means = layers["counts"], layers["network_errors"].mean(0)
    axes[1, 0].loglog(counts, means, "s-", color=report.GREEN, label="states, width 512")
    ends = np.array([counts[0], counts[-1]])
    axes[1, 0].loglog(ends, means[-1] * ends[-1] / ends, ":", color=report.RED, label="1/L")
    axes[1, 0].set(
        title="Residual networks and the ODE", xlabel="layers L", ylabel="relative distance"
    )
    times = list(found["ties"]["apart"])
    axes[1, 1].set(
        title="Tied and untied weights", xlabel="T", ylabel="relative distance",
        xticks=times, xticklabels=[f"{T:g}" for T in times],
    )  # fmt: skip
    axes[1, 2].set(
        title="Leak 1 and injection: on the way to the DEQ", xlabel="T", ylabel="relative distance"
    )
    for ax in (*axes[0], axes[1, 1]):
        figures.log_ticks(ax)
    for ax in axes.flat:
        ax.legend()
    return figure


def write(settings: Settings, workdir: Workdir, found: dict[str, Any]) -> None:
    """Writes results.json, the figure and report.md."""
    process = found["process"]
    claims = [
        *_process(process),
        _training(found["training"]),
        *_layers(found["layers"]),
        *_definiteness(found["definiteness"]),
        _ties(found["ties"]),
        _equilibrium(found["equilibrium"]),
        _images(found["images"], found["images_tested"]),
    ]
    images = [
        [name, f"{of['shape']:g}", f"{of['error']:.1%}"] for name, of in found["images"].items()
    ]
    spectrum = [
        [heading.format(key), f"{of['nngp']['value']:.2e}", f"{of['ntk']['value']:.2e}"]
        for name, heading in (("by_T", "T = {}"), ("by_count", "{} inputs"))
        for key, of in found["definiteness"][name].items()
    ]
    report.write_claims(
        workdir,
        "neural_ode",
        title="Wide neural ODEs are Gaussian processes",
        introduction="A network is `f = V φ(z(T))/√n` with `ż = W_std/√n · W φ(z)` from `z(0) = U "
        "x/√d` and one `W` for all times (Gao, Sun, Liu & Gao, arXiv 2509.22436). Relative "
        "distances are `‖A - B‖/‖B‖` in Frobenius norm. Kernels are computed in float64, those of "
        "images in float32. Of networks that are trained, of smallest eigenvalues and of images φ "
        "is erf.",
        caption="Above: finite networks; a point is a network, the line the fit with higher orders "
        "in 1/√n, and the numbers are slopes between neighbouring widths. Below: kernels.",
        settings=settings,
        claims=claims,
        numbers={"measured": found},
        sections={
            "Images": "Tuned on a fifth of the training images: T, W_std and the number of hidden "
            "layers, and the regularisation.\n\n"
            + report.table(("kernel", "chosen", "test error"), images),
            "Smallest eigenvalues": report.table(("", "NNGP", "NTK"), spectrum),
        },
        draw=lambda plt: _draw(found, plt),
    )
