"""Gradient descent on a wide deep equilibrium network is that of its NTK, at every step.

The loss and the predictions of finite networks during training against the closed form from the
same starts, and how far their empirical NTK is from its limit and drifts from its start. Writes
results.json, dynamics.png and report.md to --workdir.

    python -m experiments.claims.dynamics --workdir=out/dynamics
    python -m experiments.claims.dynamics --workdir=out/dynamics-full --config=full
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.lib import ensembles, figures, launch, report
from experiments.lib.data import Dataset
from experiments.lib.launch import flag
from experiments.lib.leading_order import fit_leading_power, local_slopes, tell
from experiments.lib.workdir import Arrays, Workdir
from nt_deq.errors import InputError

FULL = {"widths": tuple(2**i for i in range(6, 12))}


@dataclass(frozen=True)
class Settings(ensembles.Settings):
    """The flags."""

    n_train: int = flag(64, "training inputs, drawn at random", at_least=2)
    n_test: int = flag(200, "test inputs, drawn at random", at_least=1)
    steps: int = flag(
        32, "steps of gradient descent; the training time is learning_rate · steps", at_least=1
    )
    ntk_inputs: int = flag(
        16, "training inputs between which the empirical NTK is recorded", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ntk_inputs > self.n_train:
            raise InputError(
                f"--ntk_inputs={self.ntk_inputs} is too large: they are training inputs, of which "
                f"there are --n_train={self.n_train}."
            )


def _measure_width(data: Dataset, steps: list[int], limit: Arrays, trained: Arrays) -> Arrays:
    """What networks of one width have done.

    Returns:
      `loss`, `closed_form_loss`: `½ mean (f - y)²` on the training inputs, `(steps, seeds)`;
      `loss_deviation`: `|loss / closed_form_loss - 1|`, `(steps, seeds)`;
      `distance`: RMS over held-out inputs and outputs from the closed form, `(steps, seeds)`;
      `ntk_drift`: `‖Θₜ - Θ₀‖/‖Θ₀‖` in Frobenius norm, `(steps, seeds)`;
      `ntk_error`: `‖Θ₀ - Θ*‖/‖Θ*‖`, `(seeds,)`.
    """
    outputs, expected, distance = ensembles.beside_limit(data, steps, limit, trained)
    n, ntk = len(data.y_train), trained["ntk"].astype(np.float64)
    loss, closed_form_loss = (
        np.square(f[:, :, :n] - data.targets_train).mean((2, 3)) / 2 for f in (outputs, expected)
    )
    count = ntk.shape[-1]
    theta = limit["ntk_train_train"][:count, :count].astype(np.float64)
    norm = partial(np.linalg.norm, axis=(-2, -1))
    return {
        "loss": loss,
        "closed_form_loss": closed_form_loss,
        "loss_deviation": np.abs(loss / closed_form_loss - 1),
        "distance": distance,
        "ntk_drift": norm(ntk - ntk[0]) / norm(ntk[0]),
        "ntk_error": norm(ntk[0] - theta) / np.linalg.norm(theta),
    }


def measure(
    data: Dataset, steps: list[int], limit: Arrays, networks: Mapping[int, Arrays]
) -> dict[str, Any]:
    """Measures what `ensembles.train` returned, at the recorded `steps`; the numbers reported.

    Returns:
      `steps`; `times`, the learning rate times these;
      `ensembles`, what `_measure_width` returns, by increasing width;
      fits against width: `loss_fit`, of the largest deviation of a network's loss over all steps;
      `distance_fits` and `drift_fits`, after every recorded step but 0; `ntk_fit`, of the distance
      of `Θ₀` from `Θ*`; `distance_leading` and `ntk_leading`, leading exponents of the same;
      `local_slopes` and `ntk_local_slopes`, between neighbouring widths, of the distance after the
      last step, and of that of `Θ₀`.
    """
    found = {width: _measure_width(data, steps, limit, of) for width, of in networks.items()}
    fit, fits = report.fit_by_width, ensembles.fits_at_steps
    distances = {width: e["distance"] for width, e in found.items()}
    last = {width: of_width[-1] for width, of_width in distances.items()}
    ntk_errors = {width: e["ntk_error"] for width, e in found.items()}
    return {
        "steps": steps,
        "times": float(limit["learning_rate"]) * np.asarray(steps),
        "ensembles": found,
        "loss_fit": fit({width: e["loss_deviation"].max(0) for width, e in found.items()}),
        "distance_fits": fits(distances),
        "distance_leading": ensembles.leading_powers_at_steps(distances),
        "drift_fits": fits({width: e["ntk_drift"] for width, e in found.items()}),
        "local_slopes": local_slopes(last),
        "ntk_fit": fit(ntk_errors),
        "ntk_leading": fit_leading_power(ntk_errors),
        "ntk_local_slopes": local_slopes(ntk_errors),
    }


def _claims(found: dict[str, Any]) -> list[report.Claim]:
    of_width, fits, drifts = found["ensembles"], found["distance_fits"], found["drift_fits"]
    leading, steps = found["distance_leading"], found["steps"][1:]
    widths, loss_fit = list(of_width), found["loss_fit"]
    narrow, wide = of_width[widths[0]], of_width[widths[-1]]
    largest = [e["loss_deviation"].max(0).mean() for e in of_width.values()]
    by_step = [e["loss_deviation"][1:].mean(1) for e in (narrow, wide)]
    missing = [str(step) for step, power in zip(steps, leading, strict=True) if not power.is_root]
    where = f"not so after step {', '.join(missing)}" if missing else "so after all"
    return [
        report.Claim(
            "The training loss of a finite network follows the closed form at every t.",
            "The largest relative deviation over all recorded t, on average over networks: "
            + ", ".join(f"{d:.2%} (width {w})" for w, d in zip(widths, largest, strict=True))
            + f"; slope {loss_fit} ({loss_fit.interval}). It has to fall from every width to the "
            "next, and at every t from the narrowest to the widest.",
            bool((np.diff(largest) < 0).all() and (by_step[1] < by_step[0]).all()),
        ),
        report.Claim(
            "The RMS distance of held-out predictions to the closed form falls as width^−1/2 in "
            "its leading order, at every t.",
            f"After the last step the slope is {fits[-1]} ({fits[-1].interval}). "
            f"{tell(leading[-1], found['local_slopes'])} −1/2 must be in the interval of s after "
            f"every recorded step, and 0 above it; that is {where}.",
            report.all_hold(power.is_root for power in leading),
        ),
        report.Claim(
            "The empirical NTK drifts during training by a relative distance that falls with width,"
            " between width^−1/2 and width^−1, at every t.",
            f"At width {widths[-1]} it drifts by {wide['ntk_drift'][-1].mean():.2%}, at width "
            f"{widths[0]} by {narrow['ntk_drift'][-1].mean():.1%}; slope {drifts[-1]} "
            f"({drifts[-1].interval}). The interval has to meet −1 … −1/2, and 0 to be above "
            "it, after every recorded step.",
            all(f.low <= -0.5 and -1 <= f.high < 0 for f in drifts),
        ),
        report.Claim(
            "The empirical NTK before training is off its limit by width^−1/2 in its leading "
            "order.",
            f"By {wide['ntk_error'].mean():.1%} at width {widths[-1]}, "
            f"{narrow['ntk_error'].mean():.0%} at width {widths[0]}; slope {found['ntk_fit']} "
            f"({found['ntk_fit'].interval}). "
            f"{tell(found['ntk_leading'], found['ntk_local_slopes'])}",
            found["ntk_leading"].is_root,
        ),
    ]


def _draw(found: dict[str, Any], plt: Any) -> Any:
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.2))
    widths, t = list(found["ensembles"]), found["times"]
    colours = figures.width_colours(plt, widths)
    for (width, e), colour in zip(found["ensembles"].items(), colours, strict=True):
        axes[0, 0].plot(t, e["loss"].mean(1), "o", ms=5, color=colour, label=f"width {width}")
        axes[0, 0].plot(t, e["closed_form_loss"].mean(1), color=colour, lw=1.2)
        for ax, values in ((axes[0, 1], e["distance"]), (axes[0, 2], e["ntk_drift"])):
            ax.plot(t[1:], values[1:].mean(1), "o-", ms=4, color=colour, label=f"width {width}")
    axes[0, 0].plot([], [], color=report.BLACK, lw=1.2, label="closed form, same starts")
    axes[0, 0].set(title="Training loss, mean of networks", ylabel="½ mean squared error")
    axes[0, 1].set(
        title="Distance of predictions to the closed form", ylabel="RMS over held-out outputs"
    )
    axes[0, 2].set(title="Drift of the empirical NTK", ylabel="‖Θₜ − Θ₀‖ / ‖Θ₀‖")
    for ax in axes[0]:
        ax.set_yscale("log")
        figures.time_axis(ax, t)

    def against_width(ax, of, fit, label, theory="slope −1/2", marker="o", ls="-"):
        figures.draw_networks(ax, widths, [of(e) for e in by_width], colours, marker)
        figures.draw_fit(ax, widths, fit, f"{label}: slope {fit}", theory, ls)

    by_width, drift = found["ensembles"].values(), found["drift_fits"][-1]
    against_width(axes[1, 0], lambda e: e["loss_deviation"].max(0), found["loss_fit"], "fit")
    plain = found["distance_fits"][-1]
    against_width(axes[1, 1], lambda e: e["distance"][-1], plain, "plain", ls="--")
    figures.draw_leading(axes[1, 1], widths, found["distance_leading"][-1], found["local_slopes"])
    against_width(
        axes[1, 2], lambda e: e["ntk_error"], found["ntk_fit"], "Θ₀ from Θ* (□)", marker="s"
    )
    against_width(axes[1, 2], lambda e: e["ntk_drift"][-1], drift, "drift (○)", "", ls="--")
    axes[1, 0].set(title="Loss: largest deviation over t", ylabel="relative to the closed form")
    axes[1, 1].set(title="Distance after the last step")
    for ax in axes[:, 1]:
        ax.set_ylabel("RMS over held-out outputs")
    axes[1, 2].set(title="NTK: error at the start, and drift", ylabel="relative Frobenius distance")
    for ax in axes.flat:
        figures.log_ticks(ax)
        ax.legend(loc="best")
    return figure


def _sections(found: dict[str, Any]) -> dict[str, str]:
    slopes = [
        [str(step), f"{t:.4g}", *(cell for f in fits for cell in (str(f), f.interval))]
        for step, t, *fits in zip(
            found["steps"][1:],
            found["times"][1:],
            found["distance_fits"],
            found["distance_leading"],
            found["drift_fits"],
            strict=True,
        )
    ]
    rows = [
        [
            str(width),
            f"{e['loss_deviation'].max(0).mean():.3%}",
            *(
                f"{v.mean():.4f} ± {v.std(ddof=1):.4f}"
                for v in (e["distance"][-1], e["ntk_drift"][-1], e["ntk_error"])
            ),
        ]
        for width, e in found["ensembles"].items()
    ]
    by_width = ("width", "loss: largest deviation", "distance", "NTK: drift", "NTK: Θ₀ from Θ*")
    interval = "95 % interval"
    by_step = ("step", "t", "distance", interval, "its s", interval, "drift", interval)
    return {
        "After the last step, by width": "Mean ± standard deviation over networks.\n\n"
        + report.table(by_width, rows),
        "Slopes against width, by step": "A line through all widths has the slope; s is the "
        f"exponent of the leading term in `{found['distance_leading'][-1].formula}`.\n\n"
        + report.table(by_step, slopes),
    }


def main(settings: Settings, workdir: Workdir) -> None:
    """Trains, measures and writes the report."""
    data, limit, networks = ensembles.train(settings, workdir, settings.ntk_inputs)
    found = measure(data, settings.recorded_steps, limit, networks)
    report.write_claims(
        workdir,
        "dynamics",
        title="Gradient descent on a wide network is that of its NTK",
        introduction="Networks of finite width are trained by full-batch gradient descent on "
        "`½ mean (f - y)²`. The closed form takes the same network's outputs before training and "
        f"the NTK `Θ*` of infinite width: on the training {data.name_of_inputs} `f_k - y = (I - η "
        "Θ*/(n C))^k (f_0 - y)` after `k` steps of size `η`, in discrete steps, so that the "
        "distance is due to the width alone. The empirical NTK `Θₜ` is that of one network, "
        f"averaged over its outputs, between {settings.ntk_inputs} training {data.name_of_inputs}.",
        caption="Above: during training, means over networks. Below: against width; a point is a "
        "network, and the dotted line has the slope −1/2 of the leading order; blue is the fit "
        "with higher orders, and the numbers are slopes between neighbouring widths.",
        settings=settings,
        claims=_claims(found),
        numbers={"measured": found},
        sections=_sections(found),
        draw=lambda plt: _draw(found, plt),
    )


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
