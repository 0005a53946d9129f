"""The outputs of random deep equilibrium networks become Gaussian as the width grows.

One output for one input: histogram, quantiles, Lilliefors' test. All outputs for all inputs at
once: Mardia's tests and the covariance `Σ* ⊗ I`. Two outputs: whether they become independent.
Writes results.json, gaussianity.png and report.md to --workdir.

    python -m experiments.claims.gaussianity --workdir=out/gaussianity
    python -m experiments.claims.gaussianity --workdir=out/gaussianity-full --config=full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from nt_deq import theory
from experiments.lib import launch, random_networks, report
from experiments.lib.launch import flag
from experiments.lib.random_networks import ACTIVATIONS, OUTPUTS
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

PUBLISHED = {  # KS distance of 10⁴ networks, by width
    "tanh": {10: 0.0154, 50: 0.0080, 100: 0.0054, 500: 0.0065, 1000: 0.0068},
    "relu": {10: 0.1217, 50: 0.0137, 100: 0.0127, 500: 0.0070, 1000: 0.0056},
}
FULL = {"widths": (10, 50, 100, 500, 1000), "networks": 10_000}
LEVEL = 0.001  # below it a hypothesis is rejected: a dozen of them are tested


@dataclass(frozen=True)
class Settings(random_networks.Settings):
    """The flags."""

    inputs_count: int = flag(3, "Gaussian inputs of 10 features, tested jointly", at_least=1)
    widths: tuple[int, ...] = flag(
        (10, 50, 100, 400), "widths of the networks", at_least=2, different=2
    )
    networks: int = flag(2000, "networks of each width", at_least=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.networks <= OUTPUTS * self.inputs_count:
            raise InputError(
                f"--networks={self.networks} is too small: it must be above "
                f"{OUTPUTS * self.inputs_count}, the size of the vectors that are tested."
            )


def measure(outputs: np.ndarray, limit: np.ndarray) -> dict[str, Any]:
    """Tests networks of one width.

    Args:
      outputs: `(networks, m, OUTPUTS)`.
      limit: `Σ*`, `(m, m)`.

    Returns:
      The numbers of results.json.
    """
    one = outputs[:, 0, 0]
    test = theory.lilliefors(one)
    plain = stats.kstest(one, stats.norm(one.mean(), one.std(ddof=1)).cdf)
    vectors = outputs.reshape(len(outputs), -1)
    joint = theory.mardia(vectors)
    covariance = theory.covariance_test(vectors, np.kron(limit, np.eye(OUTPUTS)))
    squares: Any = stats.pearsonr(outputs[:, 0, 0] ** 2, outputs[:, 0, 1] ** 2)
    return {
        "networks_used": len(outputs),
        "lilliefors": test._asdict(),
        "plain_ks_p_value": float(plain.pvalue),
        "excess_kurtosis": float(stats.kurtosis(one)),
        "mardia_skewness": joint.skewness._asdict(),
        "mardia_kurtosis": joint.kurtosis._asdict(),
        "covariance_test": covariance._asdict(),
        "correlation_of_squares": float(squares.statistic),
        "independence_p_value": float(squares.pvalue),
    }


def _claims(found: dict[str, dict[int, dict[str, Any]]]) -> Iterator[report.Claim]:
    for activation, by_width in found.items():
        narrow, wide = min(by_width), max(by_width)
        f, first = by_width[wide], by_width[narrow]
        test = f["lilliefors"]
        published = ", ".join(f"{d:.4f} at {w}" for w, d in PUBLISHED[activation].items())
        yield report.Claim(
            f"{activation}: an output of a random network tends to a Gaussian (published KS "
            f"distances of 10⁴ networks: {published}).",
            f"At width {wide}, {f['networks_used']} networks: D = {test['statistic']:.4f} "
            f"(Gaussian samples of that size: {test['null_mean']:.4f} on average, 5 % above "
            f"{test['critical']:.4f}), p = {test['p_value']:.3f} by simulation; at width {narrow} "
            f"D = {first['lilliefors']['statistic']:.4f}. The plain KS test, which takes the "
            f"fitted variance for the true one, says p = {f['plain_ks_p_value']:.3f}.",
            test["p_value"] > LEVEL,
        )
        joint = {
            "skewness": f["mardia_skewness"]["p_value"],
            "kurtosis": f["mardia_kurtosis"]["p_value"],
            "covariance Σ* ⊗ I": f["covariance_test"]["p_value"],
            "correlation of two outputs' squares": f["independence_p_value"],
        }
        yield report.Claim(
            f"{activation}: outputs for several inputs are jointly Gaussian with covariance "
            "Σ*, and different outputs independent.",
            f"At width {wide}: "
            + ", ".join(f"{name} p = {p:.3f}" for name, p in joint.items())
            + f" (rejected below {LEVEL}); at width {narrow} the kurtosis is off by "
            f"{first['mardia_kurtosis']['statistic']:.1f} standard errors, at {wide} by "
            f"{f['mardia_kurtosis']['statistic']:.1f}.",
            min(joint.values()) > LEVEL,
        )


def _draw(
    samples: dict[str, dict[int, np.ndarray]],
    found: dict[str, dict[int, dict[str, Any]]],
    plt: Any,
) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), width_ratios=(1, 1, 1.1))
    grid = np.linspace(-4, 4, 200)
    for row, (activation, by_width) in zip(axes, samples.items(), strict=True):
        narrow, wide = min(by_width), max(by_width)
        for width, colour in ((narrow, report.ORANGE), (wide, report.BLUE)):
            sample = by_width[width][:, 0, 0]
            z = (sample - sample.mean()) / sample.std(ddof=1)
            row[0].hist(
                z, np.linspace(-4, 4, 41), density=True, histtype="step", color=colour, lw=1.5,
                label=f"width {width}",
            )  # fmt: skip
            quantiles = stats.norm.ppf((np.arange(len(z)) + 0.5) / len(z))
            row[1].plot(quantiles, np.sort(z), ".", ms=3, color=colour, label=f"width {width}")
        row[0].plot(grid, stats.norm.pdf(grid), color=report.BLACK, lw=1, label="Gaussian")
        row[1].plot(grid, grid, color=report.BLACK, lw=1, label="Gaussian")
        row[1].set(ylim=(-7, 7))
        row[0].set(title=f"{activation}: an output, standardised", xlabel="z", ylabel="density")
        row[1].set(
            title="Its quantiles", xlabel="of a Gaussian", ylabel="of the standardised output"
        )
        tests = found[activation]
        widths = sorted(tests)
        lilliefors = [tests[w]["lilliefors"] for w in widths]
        row[2].loglog(
            widths, [t["statistic"] for t in lilliefors], "o-", color=report.RED, label="measured"
        )
        published = PUBLISHED[activation]
        row[2].loglog(
            list(published), list(published.values()), "x:", color=report.BLACK,
            label="published (10⁴ networks)",
        )  # fmt: skip
        n = tests[widths[0]]["networks_used"]
        row[2].axhline(
            lilliefors[-1]["critical"], color=report.SKY, ls="--",
            label=f"5 % of Gaussian samples\nof size {n} are above",
        )  # fmt: skip
        row[2].set(title="Distance to a Gaussian", xlabel="width", ylabel="KS distance D")
        for ax in row:
            ax.legend()
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Tests every width of both activations and writes the report."""
    x = settings.inputs(settings.inputs_count)
    samples: dict[str, dict[int, np.ndarray]] = {}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for activation in ACTIVATIONS:
        limit = settings.limit(x, activation)
        samples[activation] = {}
        for width in sorted(settings.widths):
            drawn = random_networks.sample(
                settings, workdir, x, activation=activation, width=width, count=settings.networks
            )
            samples[activation][width] = random_networks.converged(drawn)["outputs"]
        found[activation] = {w: measure(f, limit) for w, f in samples[activation].items()}
    rows = [
        [
            activation,
            str(width),
            str(f["networks_used"]),
            f"{f['lilliefors']['statistic']:.4f}",
            f"{PUBLISHED[activation][width]:.4f}" if width in PUBLISHED[activation] else "",
            f"{f['lilliefors']['p_value']:.4f}",
            f"{f['plain_ks_p_value']:.4f}",
            f"{f['mardia_kurtosis']['p_value']:.4f}",
            f"{f['covariance_test']['p_value']:.4f}",
            f"{f['correlation_of_squares']:.3f}",
        ]
        for activation, by_width in found.items()
        for width, f in by_width.items()
    ]
    header = (
        "activation", "width", "networks", "D", "published D", "p (Lilliefors)", "p (plain KS)",
        "p (Mardia's kurtosis)", "p (covariance Σ*)", "correlation of two outputs' squares",
    )  # fmt: skip
    report.write_claims(
        workdir,
        "gaussianity",
        title="Outputs of wide random networks are Gaussian",
        introduction=f"Every network has {OUTPUTS} outputs `V φ(z*)/√n` for each of "
        f"{settings.inputs_count} inputs. Networks that come to no equilibrium are left out.",
        caption="Left: one output over many networks. Middle: its quantiles against those of a "
        "Gaussian. Right: the largest difference of distribution functions.",
        settings=settings,
        claims=_claims(found),
        numbers={"published": PUBLISHED, "measured": found},
        sections={"At every width": report.table(header, rows)},
        draw=lambda plt: _draw(samples, found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
