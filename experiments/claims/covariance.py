"""The covariance of wide random deep equilibrium networks is that of the Gaussian process.

The mean of `h hᵀ/n` over many networks of one width, and that of single networks of growing width,
against `Σ*`. Writes results.json, covariance.png and report.md to --workdir.

    python -m experiments.claims.covariance --workdir=out/covariance
    python -m experiments.claims.covariance --workdir=out/covariance-full --config=full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.lib import launch, random_networks, report
from experiments.lib.launch import flag
from experiments.lib.random_networks import ACTIVATIONS, chance_error, relative_error
from experiments.lib.workdir import Workdir

PUBLISHED = {"tanh": 5.5e-5, "relu": 3.2e-6}  # at width 1000, of the mean over 10⁴ networks
PUBLISHED_SAMPLES = 100_000  # of the expectations by which their code has Σ* of tanh
LAYERS = 16  # the kernel of tanh converges by a factor of .19 a layer
FULL = {
    "mean_width": 1000,
    "networks": 10_000,
    "widths": tuple(2**i for i in range(5, 13)),
    "repeats": 20,
    "limits": 40,
}


@dataclass(frozen=True)
class Settings(random_networks.Settings):
    """The flags."""

    inputs_count: int = flag(10, "Gaussian inputs of 10 features", at_least=1)
    mean_width: int = flag(256, "width of the networks whose covariances are averaged", at_least=1)
    networks: int = flag(1000, "how many are averaged", at_least=2)
    widths: tuple[int, ...] = flag(
        (32, 64, 128, 256, 512, 1024), "widths of the single networks", at_least=2, different=3
    )
    repeats: int = flag(12, "single networks of each width", at_least=2)
    samples: int = flag(
        PUBLISHED_SAMPLES, "draws by which Σ* of tanh is estimated as in the paper", at_least=2
    )
    limits: int = flag(10, "such estimates of Σ*", at_least=2)


def sampled_limit(settings: Settings, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`Σ*` of tanh by Monte Carlo: each layer's `E[φφᵀ]` is a mean over draws of its own."""
    injected = settings.U_std**2 * x @ x.T / x.shape[1]
    kernel = injected
    for _ in range(LAYERS):
        draws = rng.standard_normal((settings.samples, len(x))) @ np.linalg.cholesky(kernel).T
        h = np.tanh(draws)
        kernel = settings.W_std**2 * (h.T @ h / settings.samples) + injected
    return (kernel - injected) / settings.W_std**2


def measure(settings: Settings, workdir: Workdir, activation: str) -> dict[str, Any]:
    """Measures one activation; the numbers are those of results.json."""
    x = settings.inputs(settings.inputs_count)
    limit = settings.limit(x, activation)

    def covariances(width, count):
        drawn = random_networks.sample(
            settings, workdir, x, activation=activation, width=width, count=count
        )
        return random_networks.converged(drawn)["covariances"]

    ensemble = covariances(settings.mean_width, settings.networks)
    mean = ensemble.mean(axis=0)
    widths = sorted(settings.widths)
    errors = [relative_error(covariances(width, settings.repeats), limit) for width in widths]
    return {
        "limit": limit,
        "mean_covariance": mean,
        "networks_used": len(ensemble),
        "mean_error": relative_error(mean, limit),
        "chance_error": chance_error(ensemble, limit),
        "widths": widths,
        "single_errors": errors,
        "slope": report.fit_by_width(dict(zip(widths, errors, strict=True))),
        "error_times_width": np.mean(np.multiply([e.mean() for e in errors], widths)),
    }


def _claims(settings: Settings, found: dict[str, dict[str, Any]]) -> Iterator[report.Claim]:
    for activation, f in found.items():
        bias = 15.0 / settings.mean_width**2  # 1/width in every entry, squared
        yield report.Claim(
            f"{activation}: the mean covariance of many wide networks is Σ*: published, 10⁴ "
            f"networks of width 1000, relative squared error near {PUBLISHED[activation]:.2g}.",
            f"{f['networks_used']} networks of width {settings.mean_width}: {f['mean_error']:.2g}, "
            f"of which {f['chance_error']:.2g} is what that number of networks is off by chance; "
            f"it must be below 4 times that and 15/width² = {bias:.2g} together.",
            bool(f["mean_error"] <= 4 * f["chance_error"] + bias),
        )
        s = f["slope"]
        yield report.Claim(
            f"{activation}: the relative squared error of one network falls as 1/width: "
            "published near 15/width.",
            f"width^{s.exponent:.3f} (95 % interval {s.low:.3f} to {s.high:.3f}, over "
            f"{settings.repeats} networks of each of {len(f['widths'])} widths); error · width "
            f"is {f['error_times_width']:.1f} on average.",
            s.includes(-1),
        )


def _sampled_claim(settings: Settings, errors: np.ndarray) -> report.Claim:
    low, high = errors.min(), errors.max()
    return report.Claim(
        f"tanh: the published error, {PUBLISHED['tanh']:.2g}, is not that of the networks but of a "
        f"Σ* that was estimated by {PUBLISHED_SAMPLES} draws.",
        f"The same mean covariance is {errors.mean():.2g} from Σ* as estimated by "
        f"{settings.samples} draws a layer ({low:.2g} to {high:.2g} in {len(errors)} estimates; "
        "the published figure, of other inputs, must be within a factor of 2 of that range).",
        bool(low / 2 <= PUBLISHED["tanh"] <= 2 * high),
    )


def _draw(settings: Settings, found: dict[str, dict[str, Any]], plt: Any) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1, 1, 1.2))
    for ax, (activation, f) in zip(axes, found.items(), strict=False):
        limit, mean = f["limit"].ravel(), f["mean_covariance"].ravel()
        ax.plot(limit, limit, color=report.BLACK, lw=1, label="equal")
        ax.plot(limit, mean, "o", ms=4, color=report.BLUE, alpha=0.7)
        ax.set(
            title=f"{activation}: mean of {f['networks_used']} networks\n"
            f"(width {settings.mean_width}), every pair of inputs",
            xlabel="covariance at infinite width, Σ*",
            ylabel="mean covariance of finite networks",
        )
        ax.legend()
    for (activation, f), colour in zip(found.items(), (report.BLUE, report.RED), strict=True):
        for width, errors in zip(f["widths"], f["single_errors"], strict=True):
            axes[2].loglog([width] * len(errors), errors, ".", color=colour, alpha=0.35)
        s = f["slope"]
        label = f"{activation}: width^{s.exponent:.2f}"
        axes[2].loglog(f["widths"], s(f["widths"]), color=colour, label=label)
    widths = np.array(sorted(settings.widths))
    axes[2].loglog(widths, 15 / widths, "--", color=report.BLACK, label="published: 15/width")
    axes[2].set(
        title="One network: distance to Σ*\n(a dot is a network)",
        xlabel="width",
        ylabel="relative squared error",
        xticks=widths,
        xticklabels=widths,
    )
    axes[2].minorticks_off()
    axes[2].legend()
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures both activations and writes the report."""
    found = {activation: measure(settings, workdir, activation) for activation in ACTIVATIONS}
    x, rng = settings.inputs(settings.inputs_count), np.random.default_rng(settings.seed)
    estimates = [sampled_limit(settings, x, rng) for _ in range(settings.limits)]
    sampled = np.array([relative_error(found["tanh"]["mean_covariance"], e) for e in estimates])
    rows = [
        [activation, str(w), f"{np.mean(e):.3g}", f"{np.std(e, ddof=1):.2g}"]
        for activation, f in found.items()
        for w, e in zip(f["widths"], f["single_errors"], strict=True)
    ]
    header = ("activation", "width", "mean relative squared error", "its standard deviation")
    report.write_claims(
        workdir,
        "covariance",
        title="The covariance of wide random networks is Σ*",
        introduction="A network's covariance is `h hᵀ/n`, with `h = φ(z*)` at its equilibrium and "
        "`n` its width; `Σ* = E[φ(z*)φ(z*)ᵀ]` is computed from the kernel equation. Errors are "
        "`‖C - Σ*‖²/‖Σ*‖²` in Frobenius norm.",
        caption="Left and middle: every entry of the mean covariance against the same of Σ*. "
        "Right: single networks of growing width.",
        settings=settings,
        claims=[*_claims(settings, found), _sampled_claim(settings, sampled)],
        numbers={"published": PUBLISHED, "measured": found, "errors_to_sampled_limits": sampled},
        sections={"Single networks": report.table(header, rows)},
        draw=lambda plt: _draw(settings, found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
