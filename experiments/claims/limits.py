"""Depth and width of a deep equilibrium network may be exchanged; those of an MLP may not.

Covariances of finite tied networks of every depth and width against the kernel of that depth and
against `Σ*`; how fast the kernel itself converges with depth; and the same for the untied ReLU MLP
without injection (`W_std² = 2`). Writes results.json, limits.png and report.md to --workdir.

    python -m experiments.claims.limits --workdir=out/limits
    python -m experiments.claims.limits --workdir=out/limits-full --config=full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nt_deq import enable_x64, theory
from experiments.lib import launch, random_networks, report
from experiments.lib.launch import flag
from experiments.lib.random_networks import (
    ACTIVATIONS,
    by_calls,
    chance_error,
    relative_error,
)
from experiments.lib.workdir import Workdir
from nt_deq._progress import progress_bar
from nt_deq.activations import get_activation

DEPTHS = (1, 2, 3, 5, 10, 30)
MLP_DEPTHS = (1, 4, 16, 64)
KERNEL_DEPTHS = tuple(range(1, 13))  # of the kernel's own convergence
MLP_KERNEL_DEPTHS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
FULL = {
    "widths": (32, 64, 128, 256, 512, 1000),
    "mlp_widths": (16, 32, 64, 128, 256, 512),
    "networks": 1000,
    "inputs_count": 10,
}


@dataclass(frozen=True)
class Settings(random_networks.Settings):
    """The flags."""

    inputs_count: int = flag(5, "Gaussian inputs of 10 features", at_least=2)
    widths: tuple[int, ...] = flag(
        (32, 128, 512), "widths of the tied networks", at_least=2, different=2
    )
    mlp_widths: tuple[int, ...] = flag((16, 64, 256), "widths of the MLPs", at_least=2)
    networks: int = flag(100, "networks of each width", at_least=3)


@partial(jax.jit, static_argnames="width")
def _draw_mlps(keys, *, x, width):
    """`z zᵀ/n` of the layers MLP_DEPTHS of untied ReLU networks."""

    def network(key):
        def layer(index, h):
            W = jax.random.normal(jax.random.fold_in(key, index), (width, width), x.dtype)
            return jnp.maximum(h, 0) @ W * (2 / width) ** 0.5

        first = jax.random.normal(jax.random.fold_in(key, 0), (x.shape[1], width), x.dtype)
        z, covariances = x @ first * (2 / x.shape[1]) ** 0.5, []
        for before, after in zip((1, *MLP_DEPTHS), MLP_DEPTHS, strict=False):
            z = lax.fori_loop(before, after, layer, z)
            covariances.append(z @ z.T / width)
        return jnp.stack(covariances)

    with jax.default_matmul_precision("highest"):
        return lax.map(network, keys)


def _mlps(settings: Settings, workdir: Workdir, x: np.ndarray, width: int) -> np.ndarray:
    """Covariances of MLPs, `(networks, len(MLP_DEPTHS), m, m)`."""
    x32, count = x.astype(np.float32), settings.networks

    def compute():
        draw = partial(_draw_mlps, x=x32, width=width)
        root = jax.random.fold_in(jax.random.key(settings.seed), width)
        with progress_bar(total=count, desc=f"mlp-width-{width}", unit="network") as bar:
            return {"covariances": by_calls(draw, root, range(count), bar.update)}

    inputs = {"x": x32, "width": width, "networks": count, "seed": settings.seed}
    inputs["depths"] = list(MLP_DEPTHS)
    return workdir.part(f"mlp-width-{width}", inputs, compute)["covariances"].astype(np.float64)


def _against(covariances: np.ndarray, limits: np.ndarray) -> dict[str, np.ndarray]:
    """Errors of networks `(count, depths, m, m)` to a limit for each depth, `(depths, m, m)`."""
    return {
        "mean_error": relative_error(covariances.mean(axis=0), limits),
        "chance_error": chance_error(covariances, limits),
        "median_single_error": np.median(relative_error(covariances, limits), axis=0),
    }


def measure(settings: Settings, workdir: Workdir, activation: str) -> dict[str, Any]:
    """Measures the tied networks of one activation."""
    x = settings.inputs(settings.inputs_count)
    limit = settings.limit(x, activation)
    options = {"W_std": settings.W_std, "U_std": settings.U_std, "activation": activation}
    dual = get_activation(activation).dual
    with enable_x64(True):

        def of_depths(depths):
            kernels = theory.depth_kernels(jnp.asarray(x), depths=depths, **options)
            variances = [jnp.diagonal(kernel) for kernel in kernels]
            pairs = zip(variances, kernels, strict=True)
            return np.stack([dual(k[:, None], k[None, :], kernel)[0] for k, kernel in pairs])

        by_depth, iterates = of_depths(DEPTHS), of_depths(KERNEL_DEPTHS)
        rates = np.asarray(theory.convergence_rate(jnp.asarray(x), **options))
    errors = np.abs(iterates - limit)
    slowest = np.unravel_index(np.argmax(rates), rates.shape)
    last = 8  # above rounding, with the rate's transient gone
    grid = {}
    for width in sorted(settings.widths):
        drawn = random_networks.sample(
            settings, workdir, x, activation=activation, width=width,
            count=settings.networks, depths=DEPTHS,
        )["covariances"].astype(np.float64)  # fmt: skip
        grid[width] = {
            "of_this_depth": _against(drawn, by_depth),
            "of_the_equilibrium": _against(drawn, np.broadcast_to(limit, by_depth.shape)),
        }
    return {
        "depths": DEPTHS,
        "grid": grid,
        "kernel_depths": KERNEL_DEPTHS,
        "kernel_errors": relative_error(iterates, limit),
        "rate": float(rates.max()),
        "measured_rate": float(errors[last][slowest] / errors[last - 1][slowest]),
    }


def measure_mlp(settings: Settings, workdir: Workdir) -> dict[str, Any]:
    """Measures the MLP without injection."""
    x = settings.inputs(settings.inputs_count)
    with enable_x64(True):
        by_depth = np.asarray(theory.mlp_kernels(jnp.asarray(x), depths=MLP_DEPTHS))
        kernels = np.asarray(theory.mlp_kernels(jnp.asarray(x), depths=MLP_KERNEL_DEPTHS))
        asymptote = np.asarray(theory.mlp_correlation_gap(jnp.array(MLP_KERNEL_DEPTHS)))
    scale = np.sqrt(np.einsum("lii->li", kernels))
    gaps = 1 - (kernels / (scale[:, :, None] * scale[:, None, :]))[:, 0, 1]
    return {
        "depths": MLP_DEPTHS,
        "grid": {
            width: _against(_mlps(settings, workdir, x, width), by_depth)
            for width in sorted(settings.mlp_widths)
        },
        "kernel_depths": MLP_KERNEL_DEPTHS,
        "correlation_gap": gaps,
        "asymptote": asymptote,
        "smallest_eigenvalue": [theory.smallest_eigenvalue(k).value for k in kernels],
    }


def _claims(settings: Settings, found: dict[str, Any]) -> Iterator[report.Claim]:
    for activation in ACTIVATIONS:
        f = found[activation]
        wide = max(f["grid"])
        exact, equilibrium = (f["grid"][wide][k] for k in ("of_this_depth", "of_the_equilibrium"))
        # A network of finite width has a mean covariance that is off by O(1/width) itself.
        bias = 15 / wide**2
        off = max(
            (m - bias) / c for m, c in zip(exact["mean_error"], exact["chance_error"], strict=True)
        )
        yield report.Claim(
            f"{activation}: depth first or width first, the covariance is Σ*.",
            f"Width first: the kernel of depth {KERNEL_DEPTHS[-1]} is within "
            f"{f['kernel_errors'][-1]:.1g} of Σ* (relative squared error). Depth first: the "
            f"mean over {settings.networks} networks of width {wide} and depth {DEPTHS[-1]} is "
            f"within {equilibrium['mean_error'][-1]:.2g}, where chance gives "
            f"{equilibrium['chance_error'][-1]:.2g}; at every depth it is at most "
            f"{max(off, 0):.1f} times chance from the kernel of that depth.",
            off < 4 and f["kernel_errors"][-1] < 1e-10,
        )
        single = equilibrium["median_single_error"]
        yield report.Claim(
            f"{activation}: one network's error has its floor after 1–2 iterations (published: "
            "near 1.5e-2 at width 1000).",
            f"At width {wide}, the median by depth: "
            + ", ".join(f"{e:.3g} ({d})" for d, e in zip(DEPTHS, single, strict=True))
            + f"; the floor is {single[-1] * wide:.1f}/width.",
            single[2] < 1.5 * single[-1],
        )
        yield report.Claim(
            f"{activation}: the kernel converges geometrically with depth, at the rate "
            "W_std² E[φ'φ'] of its slowest entry.",
            f"The slowest entry's error falls by {f['measured_rate']:.4f} a layer; the rate is "
            f"{f['rate']:.4f}.",
            abs(f["measured_rate"] / f["rate"] - 1) < 0.1,
        )
    mlp = found["mlp"]
    yield report.Claim(
        "The infinitely deep ReLU MLP degenerates: its correlations go to 1 as 9π²/(2l²) and "
        "its kernel's smallest eigenvalue to 0.",
        f"At depth {MLP_KERNEL_DEPTHS[-1]} 1 - ρ = {mlp['correlation_gap'][-1]:.3g} (9π²/(2l²) = "
        f"{mlp['asymptote'][-1]:.3g}), λ_min = {mlp['smallest_eigenvalue'][-1]:.2g}, from "
        f"{max(mlp['smallest_eigenvalue']):.2g} at its largest.",
        abs(mlp["correlation_gap"][-1] / mlp["asymptote"][-1] - 1) < 0.01
        and mlp["smallest_eigenvalue"][-1] < 1e-3 * max(mlp["smallest_eigenvalue"]),
    )
    narrow = mlp["grid"][min(mlp["grid"])]["median_single_error"]
    yield report.Claim(
        "The limits of the MLP do not commute: at a fixed width, more depth takes it away from "
        "its infinitely wide limit.",
        f"At width {min(mlp['grid'])} the median relative squared error of a network to the "
        f"kernel of its depth is {narrow[0]:.2g} at depth 1 and {narrow[-1]:.2g} at depth "
        f"{MLP_DEPTHS[-1]}.",
        narrow[-1] > 3 * narrow[0],
    )


def _draw(found: dict[str, Any], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5))
    colours = [report.ORANGE, report.SKY, report.GREEN, report.BLUE, report.RED, report.PINK]
    for ax, (name, f) in zip(
        (axes[0, 0], axes[0, 1]), (("relu", found["relu"]), ("mlp", found["mlp"])), strict=True
    ):
        for colour, (width, errors) in zip(colours, f["grid"].items(), strict=False):
            errors = errors["of_the_equilibrium"] if name == "relu" else errors
            ax.loglog(
                f["depths"], errors["median_single_error"], "o-", color=colour,
                label=f"width {width}",
            )  # fmt: skip
        ax.set_xticks(f["depths"], f["depths"])
        ax.minorticks_off()
        ax.set(xlabel="depth l", ylabel="relative squared error of one network (median)")
        ax.set_ylim(top=3 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper left", ncols=3)
    axes[0, 0].set_title("Tied ReLU network with injection, against Σ*:\ndeeper is no further away")
    axes[0, 1].set_title(
        "ReLU MLP, against the infinitely wide one of its depth:\ndeeper is further away"
    )
    for activation, colour in (("tanh", report.BLUE), ("relu", report.RED)):
        f = found[activation]
        depths = np.array(KERNEL_DEPTHS)
        errors = np.sqrt(f["kernel_errors"])
        axes[1, 0].semilogy(depths, errors, "o", color=colour, label=f"{activation}: kernel")
        line = errors[7] * f["rate"] ** (depths - depths[7])
        axes[1, 0].semilogy(
            depths, line, color=colour, lw=1, label=f"rate W_std² E[φ'φ'] = {f['rate']:.3f}"
        )
    axes[1, 0].set(
        title="Infinite width: distance of depth l to Σ*", xlabel="depth l", ylabel="relative error"
    )
    mlp = found["mlp"]
    axes[1, 1].loglog(
        MLP_KERNEL_DEPTHS, mlp["correlation_gap"], "o", color=report.BLUE,
        label="1 − correlation of two inputs",
    )  # fmt: skip
    axes[1, 1].loglog(
        MLP_KERNEL_DEPTHS, mlp["asymptote"], color=report.BLACK, lw=1, label="9π²/(2l²)"
    )
    axes[1, 1].loglog(
        MLP_KERNEL_DEPTHS, mlp["smallest_eigenvalue"], "s", color=report.RED,
        label="smallest eigenvalue of the kernel",
    )  # fmt: skip
    axes[1, 1].set(title="Infinitely wide MLP: it degenerates", xlabel="depth l")
    axes[1, 0].legend()
    axes[1, 1].legend()
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures the tied networks and the MLP and writes the report."""
    found: dict[str, Any] = {a: measure(settings, workdir, a) for a in ACTIVATIONS}
    found["mlp"] = measure_mlp(settings, workdir)
    rows = [
        [f"{name}, width {width}"] + [f"{e:.3g}" for e in f["of_the_equilibrium"]["mean_error"]]
        for name in ACTIVATIONS
        for width, f in found[name]["grid"].items()
    ]
    report.write_claims(
        workdir,
        "limits",
        title="Depth and width may be exchanged",
        introduction="A tied network of depth `l` and width `n` has the covariance `h hᵀ/n`, "
        "`h = φ(z^l)`. Width first, it tends to the kernel of depth `l` and that to Σ*; depth "
        "first, to the covariance at the equilibrium of a finite network and that to Σ*. The MLP "
        "has fresh weights in every layer and no injection.",
        caption="Above: medians over networks of `‖C - Σ‖²/‖Σ‖²`. Below: infinite width.",
        settings=settings,
        claims=_claims(settings, found),
        numbers={"measured": found},
        sections={
            "Mean covariance against Σ*: relative squared error by depth": report.table(
                ("networks", *(f"depth {d}" for d in DEPTHS)), rows
            )
        },
        draw=lambda plt: _draw(found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
