"""The kernels of deep equilibrium networks are strictly positive definite for distinct inputs.

Smallest eigenvalues of `Σ*` and of the NTK against `W_std` and the number of inputs, of finite
networks against width, of the ReLU MLP against depth, and the exact exceptions. Writes
results.json, spectrum.png and report.md to --workdir.

    python -m experiments.claims.spectrum --workdir=out/spectrum
    python -m experiments.claims.spectrum --workdir=out/spectrum-full --config=full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from nt_deq import enable_x64, theory
from experiments.lib import launch, random_networks, report
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture
from experiments.lib.random_networks import ACTIVATIONS
from experiments.lib.workdir import Workdir

PUBLISHED = {  # λ_min of E[φφᵀ] of one network, by width
    "tanh": {
        32: 0.0127, 64: 0.0244, 128: 0.0342, 256: 0.0389,
        512: 0.0480, 1024: 0.0429, 2048: 0.0470, 4096: 0.0476,
    },
    "relu": {
        32: 0.0247, 64: 0.0403, 128: 0.0626, 256: 0.0722,
        512: 0.0672, 1024: 0.0790, 2048: 0.0795, 4096: 0.0835,
    },
}  # fmt: skip
W_STDS = tuple(round(0.1 * i, 1) for i in range(1, 11))
MLP_DEPTHS = (1, 3, 10, 30, 100, 300, 1000)
FULL = {
    "widths": tuple(2**i for i in range(5, 13)),
    "repeats": 20,
    "counts": (5, 10, 20, 50, 100, 200, 500, 1000),
}


@dataclass(frozen=True)
class Settings(random_networks.Settings):
    """The flags."""

    inputs_count: int = flag(10, "Gaussian inputs of 10 features, of networks", at_least=2)
    counts: tuple[int, ...] = flag(
        (5, 10, 20, 50, 100, 200), "numbers of inputs of the kernels", at_least=2
    )
    widths: tuple[int, ...] = flag((32, 64, 128, 256, 512), "widths of the networks", at_least=2)
    repeats: int = flag(10, "networks of each width", at_least=2)


def _smallest(kernel: np.ndarray) -> dict[str, Any]:
    smallest = theory.smallest_eigenvalue(kernel)
    return {**smallest._asdict(), "positive": smallest.positive}


def measure(settings: Settings, workdir: Workdir, activation: str) -> dict[str, Any]:
    """Measures the kernels and the networks of one activation."""

    def kernels(count, W_std):
        x = settings.inputs(count)
        nngp, ntk = Architecture(W_std, settings.U_std, 0.0, activation).kernels(x)
        return {"nngp": _smallest(nngp), "ntk": _smallest(ntk)}

    x = settings.inputs(settings.inputs_count)
    limit = theory.smallest_eigenvalue(settings.limit(x, activation)).value
    finite = {}
    for width in sorted(settings.widths):
        drawn = random_networks.sample(
            settings, workdir, x, activation=activation, width=width, count=settings.repeats
        )
        covariances = random_networks.converged(drawn)["covariances"]
        finite[width] = [
            theory.smallest_eigenvalue(c.astype(np.float32)).value for c in covariances
        ]
    return {
        "by_W_std": {W_std: kernels(settings.inputs_count, W_std) for W_std in W_STDS},
        "by_count": {n: kernels(n, settings.W_std) for n in sorted(settings.counts)},
        "limit": limit,
        "finite": finite,
    }


def exceptions(settings: Settings) -> dict[str, dict[str, Any]]:
    """Inputs and activations for which theory says that the kernel is singular, and a control."""
    x = settings.inputs(4)
    more = settings.inputs(random_networks.FEATURES + 2)  # than features
    cases = {
        "tanh on {x, −x}": ("tanh", np.concatenate([x, -x]), 0.0),
        "relu on {x, 2x}": ("relu", np.concatenate([x, 2 * x]), 0.0),
        "linear φ, more inputs than features": ("identity", more, 0.0),
        "tanh on {x, −x}, with a bias": ("tanh", np.concatenate([x, -x]), 0.5),
        "relu on {x, 2x}, with a bias": ("relu", np.concatenate([x, 2 * x]), 0.5),
        "relu, more inputs than features": ("relu", more, 0.0),
    }
    W_std, U_std = settings.W_std, settings.U_std
    return {
        name: _smallest(Architecture(W_std, U_std, bias, phi).kernels(inputs)[0])
        for name, (phi, inputs, bias) in cases.items()
    }


def _mlp(settings: Settings) -> list[dict[str, Any]]:
    x = settings.inputs(settings.inputs_count)
    with enable_x64(True):
        kernels = theory.mlp_kernels(jnp.asarray(x), depths=MLP_DEPTHS)
    # As the covariance of an output, as Σ* is: with W_std² = 2 the next layer's, over 2.
    return [_smallest(np.asarray(kernel) / 2) for kernel in kernels]


def _claims(found: dict[str, Any]) -> Iterator[report.Claim]:
    for activation in ACTIVATIONS:
        f = found[activation]
        cases = [*f["by_W_std"].values(), *f["by_count"].values()]
        smallest = {k: min(case[k]["value"] for case in cases) for k in ("nngp", "ntk")}
        yield report.Claim(
            f"{activation}: Σ* and the NTK of distinct inputs are strictly positive definite, "
            "for every W_std and number of inputs.",
            f"λ_min over {len(cases)} settings (W_std {W_STDS[0]} to {W_STDS[-1]}; up to "
            f"{max(f['by_count'])} inputs) is at least {smallest['nngp']:.2g} (Σ*) and "
            f"{smallest['ntk']:.2g} (NTK), each above what rounding could make of 0.",
            all(case[k]["positive"] for case in cases for k in ("nngp", "ntk")),
        )
        wide = max(f["finite"])
        means = {w: float(np.mean(values)) for w, values in f["finite"].items()}
        published = ", ".join(f"{v:.4f}" for v in PUBLISHED[activation].values())
        yield report.Claim(
            f"{activation}: λ_min of a network tends to that of Σ* from below as it gets wider "
            f"(published, one network of width 32 to 4096: {published}).",
            "Means by width: "
            + ", ".join(f"{mean:.4f} ({w})" for w, mean in means.items())
            + f"; Σ* has {f['limit']:.4f} for these inputs. They are other draws than the "
            "published ones, and λ_min is a property of the inputs.",
            means[min(means)] < means[wide] and abs(means[wide] / f["limit"] - 1) < 0.25,
        )
    yield report.Claim(
        "The kernel of the ReLU MLP without injection degenerates with depth.",
        "λ_min by depth: "
        + ", ".join(
            f"{s['value']:.2g} ({d})" for d, s in zip(MLP_DEPTHS, found["mlp"], strict=True)
        )
        + f"; that of the DEQ, of infinite depth, is {found['relu']['limit']:.2g}.",
        # The kernel of depth 1 is linear, so the largest and not the first.
        found["mlp"][-1]["value"] < 0.01 * max(s["value"] for s in found["mlp"])
        and found["mlp"][-1]["value"] < found["relu"]["limit"],
    )
    cases = found["exceptions"]
    singular = list(cases)[:3]
    yield report.Claim(
        "Without bias, odd φ is singular on {x, −x}, homogeneous φ on {x, cx}, and linear φ on "
        "more inputs than features; a bias, or another φ, repairs it.",
        "; ".join(f"{name}: λ_min = {case['value']:.1e}" for name, case in cases.items()) + ".",
        all(case["positive"] == (name not in singular) for name, case in cases.items()),
    )


def _draw(found: dict[str, Any], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    for activation, colour in (("tanh", report.BLUE), ("relu", report.RED)):
        f = found[activation]
        for ax, name in ((axes[0, 0], "by_W_std"), (axes[0, 1], "by_count")):
            for kernel, style, label in (("nngp", "o-", "Σ*"), ("ntk", "s--", "NTK")):
                values = [case[kernel]["value"] for case in f[name].values()]
                ax.plot(list(f[name]), values, style, color=colour, label=f"{activation}, {label}")
        for width, values in f["finite"].items():
            axes[1, 0].plot([width] * len(values), values, ".", color=colour, alpha=0.35)
        means = [np.mean(values) for values in f["finite"].values()]
        axes[1, 0].plot(list(f["finite"]), means, color=colour, label=f"{activation}, mean")
        axes[1, 0].axhline(f["limit"], color=colour, ls="--", label=f"{activation}, Σ*")
    axes[0, 0].set(yscale="log", xlabel="W_std", title="Smallest eigenvalue of the kernels")
    axes[0, 1].set(
        xscale="log", yscale="log", xlabel="number of inputs", title="With more inputs: above 0"
    )
    axes[1, 0].set(
        xscale="log", xlabel="width", title="One finite network (a dot) against the limit"
    )
    widths = list(found["relu"]["finite"])
    axes[1, 0].set_xticks(widths, widths)
    axes[1, 0].minorticks_off()
    axes[1, 1].loglog(
        MLP_DEPTHS, [s["value"] for s in found["mlp"]], "o-", color=report.ORANGE,
        label="ReLU MLP without injection",
    )  # fmt: skip
    axes[1, 1].axhline(
        found["relu"]["limit"], color=report.RED, ls="--", label="ReLU DEQ, infinite depth"
    )
    axes[1, 1].set(xlabel="depth", title="The MLP's kernel becomes singular")
    for ax in axes.ravel():
        ax.set_ylabel("λ_min")
        ax.legend()
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures kernels and networks and writes the report."""
    found: dict[str, Any] = {a: measure(settings, workdir, a) for a in ACTIVATIONS}
    found |= {"mlp": _mlp(settings), "exceptions": exceptions(settings)}
    rows = [
        [name, f"{of['value']:.2e}", f"{of['rounding']:.1e}", "yes" if of["positive"] else "no"]
        for name, of in found["exceptions"].items()
    ]
    report.write_claims(
        workdir,
        "spectrum",
        title="The kernels are strictly positive definite",
        introduction="λ_min is the smallest eigenvalue of the matrix of `Σ*` (the covariance of an "
        "output), of the NTK, or of `h hᵀ/n` of a network, on standard Gaussian inputs. Kernels "
        "are computed in float64.",
        caption="Above: kernels. Below: finite networks, and the MLP.",
        settings=settings,
        claims=_claims(found),
        numbers={"published": PUBLISHED, "measured": found},
        sections={
            "Exceptions": report.table(("inputs", "λ_min of Σ*", "rounding", "positive"), rows)
        },
        draw=lambda plt: _draw(found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
