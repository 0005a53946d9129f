"""Where deep equilibrium networks have an equilibrium, by `W_std` and activation.

The theorem's bound `2 W_std Lip(φ) < 1`, the local one `W_std² E[φ'(z*)²] < 1`, the rate at which
the kernel converges, and finite networks: the spectral radius of their Jacobian, and whether
plain iteration comes to rest. Writes results.json, phase.png and report.md to --workdir.

    python -m experiments.claims.phase --workdir=out/phase
    python -m experiments.claims.phase --workdir=out/phase-full --config=full
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from scipy import optimize

from nt_deq import Picard, enable_x64, theory
from experiments.lib import launch, report
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture
from experiments.lib.random_networks import ACTIVATIONS, FEATURES
from experiments.lib.workdir import Workdir
from nt_deq._progress import progress_bar

LARGEST = 2.0  # of the W_std that are tried
MAX_STEPS = 1000
TOLERANCE = 1e-9
FULL = {"width": 1000, "networks": 5, "points": 40}


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags."""

    U_std: float = flag(1.0, "standard deviation of the input weights", above=0)
    inputs_count: int = flag(5, "Gaussian inputs of 10 features", at_least=1)
    points: int = flag(12, f"values of W_std, up to {LARGEST}", at_least=4)
    width: int = flag(400, "of the finite networks", at_least=2)
    networks: int = flag(4, "finite networks for every W_std", at_least=1)
    seed: int = flag(0, "of the inputs and of the networks", at_least=0)


@partial(jax.jit, static_argnames=("U_std", "activation"))
def _solve(W: Array, U: Array, x: Array, U_std: float, activation: str) -> tuple[Array, Array]:
    """Whether the network comes to rest from 0, and its Jacobian there at the first input.

    `W_std` is in the weights `W`: with some there is no equilibrium, and here that is a finding.
    """
    solver = Picard(TOLERANCE, max_steps=MAX_STEPS)
    architecture = Architecture(1.0, U_std, 0.0, activation)
    deq: Any = architecture.deq(len(U), len(W), rngs=nnx.Rngs(0), solver=solver)
    deq.hidden.W[...], deq.inject.W[...] = W, U
    found = deq.solve(x)
    jacobian = jax.jacobian(lambda z: deq.step(z[None], x[:1])[0])(found.value[0])
    return found.converged.all(), jacobian


def measure(settings: Settings, workdir: Workdir, activation: str) -> list[dict[str, Any]]:
    """Measures one activation at every `W_std`; the numbers are those of results.json."""
    x = np.random.default_rng(settings.seed).standard_normal((settings.inputs_count, FEATURES))
    W_stds = np.linspace(0, LARGEST, settings.points + 1)[1:].round(6).tolist()
    found = []
    for W_std in progress_bar(W_stds, desc=activation, unit="W_std"):

        def compute(W_std=W_std):
            converged, radii = [], []
            for network in range(settings.networks):
                rng = np.random.default_rng((settings.seed, settings.width, network))
                W = W_std * rng.standard_normal((settings.width,) * 2).T
                U = rng.standard_normal((FEATURES, settings.width))
                with enable_x64(True):
                    at_rest, jacobian = _solve(W, U, x, settings.U_std, activation)
                converged.append(bool(at_rest))
                radii.append(np.abs(np.linalg.eigvals(jacobian)).max() if at_rest else np.nan)
            return {"converged": np.array(converged), "radii": np.array(radii)}

        inputs = {"x": x, "activation": activation, "W_std": W_std}
        inputs |= {k: v for k, v in vars(settings).items() if k != "points"}
        networks = workdir.part(f"{activation}-W_std-{W_std:.4g}", inputs, compute)
        options = {"W_std": W_std, "U_std": settings.U_std, "activation": activation}
        with enable_x64(True):
            local = np.asarray(theory.local_contraction(jnp.asarray(x), **options))
            stable = bool((local < 1).all())
            rate = np.max(theory.convergence_rate(jnp.asarray(x), **options)) if stable else None
        found.append(
            {
                "W_std": W_std,
                "global": theory.global_contraction(W_std, activation),
                "local": [float(j) if np.isfinite(j) else None for j in local],
                "kernel_rate": None if rate is None else float(rate),
                "converged": float(networks["converged"].mean()),
                "spectral_radii": networks["radii"][networks["converged"]].tolist(),
            }
        )
    return found


def _largest(point: dict[str, Any]) -> float:
    """The largest local rate of the inputs, infinite where it is not known."""
    return max(np.inf if rate is None else rate for rate in point["local"])


def _crossing(points: list[dict[str, Any]]) -> float | None:
    """The `W_std` where the largest local rate is 1, between those that were tried.

    `W_std² E[φ'(z*)²] = 1`, with `E[φ'²]` linear in `W_std` from a point to the next, and where it
    is not known what it was at the point before: of relu it is 1/2 everywhere.
    """
    for below, above in itertools.pairwise(points):
        if _largest(above) >= 1:
            (low, slope), (high, next_slope) = (
                (p["W_std"], _largest(p) / p["W_std"] ** 2) for p in (below, above)
            )
            step = next_slope - slope if np.isfinite(next_slope) else 0.0
            if high**2 * (slope + step) < 1:
                return high  # it is not known there, and far from what it was before

            def excess(W_std, low=low, high=high, slope=slope, step=step):
                return W_std**2 * (slope + step * (W_std - low) / (high - low)) - 1

            edge: Any = optimize.brentq(excess, low, high)
            return float(edge)
    return None


def _claims(settings: Settings, found: dict[str, list[dict[str, Any]]]) -> Iterator[report.Claim]:
    for activation, points in found.items():
        inside = [p for p in points if p["global"] < 1]
        at_rest = [p["W_std"] for p in points if p["converged"] == 1]
        yield report.Claim(
            f"{activation}: where 2 W_std Lip(φ) < 1 there is an equilibrium; the published "
            "figures, at W_std = 0.6, are outside of this bound.",
            f"{np.mean([p['converged'] for p in inside]):.0%} of networks of width "
            f"{settings.width} come to rest within the bound; all of them do up to W_std = "
            f"{max(at_rest, default=0):.3g}.",
            all(p["converged"] == 1 for p in inside),
        )
        margin = 4 / settings.width**0.5  # finite networks differ from wide ones by so much
        below = [p for p in points if _largest(p) < 1 - margin]
        above = [p for p in points if _largest(p) > 1 + margin]
        crossing = _crossing(points)
        share_below = float(np.mean([p["converged"] for p in below]))
        share_above = float(np.mean([p["converged"] for p in above])) if above else None
        measured = (
            f"It stays below 1 up to W_std = {points[-1]['W_std']:.3g}."
            if crossing is None
            else f"It reaches 1 at W_std = {crossing:.4g}."
        )
        measured += (
            f" Where it is below {1 - margin:.2f}, {share_below:.0%} of networks come to rest"
        )
        if share_above is not None:
            measured += f"; above {1 + margin:.2f}, {share_above:.0%}"
        yield report.Claim(
            f"{activation}: what decides is W_std² E[φ'(z*)²] < 1.",
            f"{measured}.",
            share_below > 0.98 and (share_above is None or share_above < 0.2),
        )
        ratios = [
            float(np.mean(p["spectral_radii"]) / p["local"][0] ** 0.5)
            for p in below
            if p["spectral_radii"]
        ]
        yield report.Claim(
            f"{activation}: the spectral radius of a wide network's Jacobian is "
            "√(W_std² E[φ'²]) (circular law).",
            f"At width {settings.width} the mean radius is {min(ratios):.2f} to "
            f"{max(ratios):.2f} times that.",
            abs(float(np.mean(ratios)) - 1) < 0.1,
        )


def _draw(found: dict[str, list[dict[str, Any]]], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True, height_ratios=(2, 1))
    for column, (activation, points) in zip(axes.T, found.items(), strict=True):
        W_stds = [p["W_std"] for p in points]
        column[0].plot(
            W_stds, [p["global"] for p in points], ":", color=report.BLACK,
            label="2 W_std Lip(φ): the theorem's bound",
        )  # fmt: skip
        column[0].plot(
            W_stds, [np.sqrt(_largest(p)) for p in points], color=report.BLUE,
            label="√(W_std² E[φ'²]), infinite width",
        )  # fmt: skip
        column[0].plot(
            W_stds, [np.nan if p["kernel_rate"] is None else p["kernel_rate"] for p in points],
            "--", color=report.GREEN, label="rate of the kernel's convergence",
        )  # fmt: skip
        for p in points:
            radii = p["spectral_radii"]
            column[0].plot([p["W_std"]] * len(radii), radii, ".", color=report.RED, alpha=0.6)
        column[0].plot([], [], ".", color=report.RED, label="spectral radius of a network")
        column[0].axhline(1, color="#999999", lw=1)
        column[0].set(title=f"{activation}: stable below 1", ylim=(0, 1.6))
        column[0].legend(loc="lower right")
        column[1].plot(W_stds, [p["converged"] for p in points], "o-", color=report.RED)
        column[1].set(
            title="Finite networks that come to rest", xlabel="W_std", ylabel="share of networks"
        )
    return figure


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures both activations and writes the report."""
    found = {activation: measure(settings, workdir, activation) for activation in ACTIVATIONS}
    rows = [
        [
            f"{activation}, W_std {p['W_std']:.3g}",
            f"{p['global']:.3g}",
            f"{_largest(p):.4f}",
            "" if p["kernel_rate"] is None else f"{p['kernel_rate']:.4f}",
            f"{np.mean(p['spectral_radii']):.3f}" if p["spectral_radii"] else "",
            f"{p['converged']:.0%}",
        ]
        for activation, points in found.items()
        for p in points
    ]
    header = (
        "networks", "2 W_std Lip(φ)", "W_std² E[φ'²]", "kernel's rate", "spectral radius",
        "come to rest",
    )  # fmt: skip
    report.write_claims(
        workdir,
        "phase",
        title="Where an equilibrium exists",
        introduction="Plain iteration `z ← W φ(z) + U x` from 0, until a step changes `z` by less "
        f"than {TOLERANCE:g} of its norm, for all inputs at once, within {MAX_STEPS} steps.",
        caption="Above: three measures of stability. Below: whether finite networks come to rest.",
        settings=settings,
        claims=_claims(settings, found),
        numbers={"measured": found},
        sections={"At every W_std": report.table(header, rows)},
        draw=lambda plt: _draw(found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
