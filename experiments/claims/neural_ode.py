"""Wide neural ODEs are Gaussian processes, and residual networks with tied weights tend to them.

Covariances, outputs and empirical NTKs of random finite networks against the infinitely wide one;
gradient descent on digits against the closed form; residual networks of many layers; when the
kernel is strictly positive definite; tied weights against weights of every layer's own; the deep
equilibrium network that a neural ODE with a leak comes to; and what the kernels make of digits.
Writes results.json, neural_ode.png and report.md to --workdir.

    python -m experiments.claims.neural_ode --workdir=out/neural_ode
    python -m experiments.claims.neural_ode --workdir=out/neural_ode-full --config=full \
      --data=mnist --data_dir=MNIST
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nt_deq import deq_kernel, enable_x64, theory
from experiments.claims import neural_ode_report
from experiments.lib import infinite, kernels, launch, odes, random_networks, report, training
from experiments.lib.data import Dataset, DataSettings, load
from experiments.lib.launch import flag
from experiments.lib.leading_order import fit_leading_power, local_slopes
from experiments.lib.networks import Architecture
from experiments.lib.odes import Ode
from experiments.lib.random_networks import by_calls, chance_error, relative_error
from experiments.lib.workdir import Arrays, Workdir
from nt_deq._progress import progress_bar
from nt_deq.activations import get_activation
from nt_deq.flax import functional

TIMES = (0.25, 0.5, 1.0, 2.0, 4.0)
LONG_TIMES = (2.0, 4.0, 8.0, 16.0)  # on the way to the equilibrium
LAYERS = (1, 3, 10, 30, 100, 300, 1000)  # of the finite residual networks
RESIDUAL_WIDTH = 512
LAYER_INPUTS = 3
GAUSSIAN_INPUTS, OUTPUTS = 3, 2  # of the test of joint normality
ON_MANY = "erf"  # whose kernels of hundreds of inputs take seconds, where softplus takes minutes
FULL = {
    "widths": (64, 128, 256, 512, 1024, 2048),
    "networks": 10_000,
    "seeds": 20,
    "kernel_layers": (1, 2, 4, 8, 16, 32, 64, 128),
    "counts": (5, 10, 20, 50, 100, 200),
    "n_train": 1000,
    "n_test": 1000,
}


@dataclass(frozen=True)
class Settings(random_networks.Settings, DataSettings):
    """The flags."""

    W_std: float = flag(1.0, "standard deviation of the weights of the cell", above=0)
    activation: str = flag("erf", "φ, by name; where there are many inputs it is erf")
    inputs_count: int = flag(5, "Gaussian inputs of 10 features", at_least=3)
    widths: tuple[int, ...] = flag(
        (64, 128, 256, 512, 1024), "widths of the networks", at_least=2, different=2
    )
    seeds: int = flag(10, "single networks of each width", at_least=2)
    mean_width: int = flag(256, "width of the networks that are averaged", at_least=1)
    networks: int = flag(500, "how many are averaged", at_least=20)
    ntk_widths: tuple[int, ...] = flag(
        (64, 128, 256, 512), "widths of the empirical NTKs", at_least=2, different=2
    )
    trained_widths: tuple[int, ...] = flag(
        (64, 128, 256), "widths of the networks that are trained", at_least=2, different=2
    )
    trained_seeds: int = flag(3, "trained networks of each width", at_least=2)
    steps: int = flag(16, "steps of their gradient descent", at_least=1)
    fitted: int = flag(48, "images that they are trained on", at_least=2)
    kernel_layers: tuple[int, ...] = flag(
        (1, 2, 4, 8, 16, 32), "layers of infinitely wide residual networks", different=3
    )
    counts: tuple[int, ...] = flag((5, 10, 20), "numbers of inputs of the kernels", at_least=2)
    n_train: int = flag(200, "images that kernels are fitted to", at_least=10)
    n_test: int = flag(300, "test images", at_least=2)

    @property
    def ode(self) -> Ode:
        """The network of most of the claims."""
        return Ode(self.W_std, self.activation)


def _drawn(
    settings: Settings,
    workdir: Workdir,
    name: str,
    draw: Callable[..., Any],
    count: int,
    **options: Any,
) -> Arrays:
    """`draw(keys, **options)` of so many networks, in float64, those aside that are NaN."""
    root = jax.random.fold_in(jax.random.key(settings.seed), options["width"])
    options["x"] = options["x"].astype(np.float32)

    def compute():
        with progress_bar(total=count, desc=name, unit="network") as bar:
            return by_calls(partial(draw, **options), root, range(count), bar.update)

    inputs = options | {"ode": vars(options["ode"]), "count": count, "seed": settings.seed}
    arrays = workdir.part(name, inputs, compute)
    whole = np.logical_and.reduce(
        [np.isfinite(a).reshape(count, -1).all(axis=1) for a in arrays.values()]
    )
    return {key: a[whole].astype(np.float64) for key, a in arrays.items()}


def measure_process(settings: Settings, workdir: Workdir) -> dict[str, Any]:
    """Random networks of all widths, and many of one."""
    ode, x = settings.ode, settings.inputs(settings.inputs_count)
    nngp, ntk = ode.kernels(x)
    common = {"x": x, "ode": ode}
    errors = {}
    for width in sorted(settings.widths):
        drawn = _drawn(
            settings, workdir, f"width-{width}", odes.sample, settings.seeds,
            **common, width=width, outputs=OUTPUTS,
        )  # fmt: skip
        errors[width] = np.sqrt(relative_error(drawn["covariances"], nngp))
    many = _drawn(
        settings, workdir, "many", odes.sample, settings.networks,
        **common, width=settings.mean_width, outputs=OUTPUTS,
    )  # fmt: skip
    vectors = many["outputs"][:, :GAUSSIAN_INPUTS].reshape(len(many["outputs"]), -1)
    joint = theory.mardia(vectors)
    few = nngp[:GAUSSIAN_INPUTS, :GAUSSIAN_INPUTS]
    covariance = theory.covariance_test(vectors, np.kron(few, np.eye(OUTPUTS)))
    ntk_errors = {}
    for width in sorted(settings.ntk_widths):
        drawn = _drawn(
            settings, workdir, f"ntk-{width}", odes.empirical_ntks, settings.seeds,
            **common, width=width,
        )  # fmt: skip
        ntk_errors[width] = np.sqrt(relative_error(drawn["ntk"], ntk))
    return {
        "covariance_errors": errors,
        "covariance_leading": fit_leading_power(errors),
        "covariance_slopes": local_slopes(errors),
        "networks_used": len(many["covariances"]),
        "mean_error": relative_error(many["covariances"].mean(0), nngp),
        "chance_error": chance_error(many["covariances"], nngp),
        "skewness": joint.skewness._asdict(),
        "kurtosis": joint.kurtosis._asdict(),
        "covariance_test": covariance._asdict(),
        "ntk_errors": ntk_errors,
        "ntk_leading": fit_leading_power(ntk_errors),
        "ntk_slopes": local_slopes(ntk_errors),
    }


def measure_training(settings: Settings, workdir: Workdir, data: Dataset) -> dict[str, Any]:
    """Trains finite networks on images, beside the closed form from the same starts."""
    ode = replace(settings.ode, activation=ON_MANY)
    x, y = data.x_train[: settings.fitted], data.targets_train[: settings.fitted]
    x_all = np.concatenate([x, data.x_test[: settings.fitted]]).astype(np.float32)
    theta = np.asarray(ode.kernel_fn(jnp.asarray(x_all), None, "ntk"), np.float64)
    own = theta[: len(x), : len(x)]
    rate = infinite.LEARNING_RATE_FRACTION * 2 * y.size / np.linalg.eigvalsh(own)[-1]
    limit = {
        "ntk_train_train": own,
        "ntk_test_train": theta[len(x) :, : len(x)],
        "learning_rate": np.asarray(rate),
    }
    distances, losses = {}, {}
    for width in sorted(settings.trained_widths):

        def compute(width=width):
            keys = jax.random.split(jax.random.key(settings.seed + width), settings.trained_seeds)
            network = ode.network(x_all.shape[1], width, y.shape[1], nnx.Rngs(0))
            apply_fn, _ = functional(network)

            def forward(params, x, z0):
                return apply_fn(params, x), z0

            results = []
            for key in keys:
                drawn = ode.network(x_all.shape[1], width, y.shape[1], nnx.Rngs(params=key))
                params = jax.tree.map(lambda a: a[None], functional(drawn)[1])
                targets = jnp.asarray(y[None], jnp.float32)
                state = training.start(params, 1, targets)
                trained = training.gradient_descent(
                    forward, state, jnp.asarray(x, jnp.float32), targets, rate, settings.steps
                )
                pair = (jax.tree.map(lambda a: a[0], p) for p in (params, trained.params))
                results.append(np.stack([jax.jit(apply_fn)(p, x_all) for p in pair]))
            return {"outputs": np.stack(results, axis=1)}

        inputs = {
            "ode": vars(ode), "width": width, "x": x_all, "y": y, "rate": float(rate),
            "steps": settings.steps, "seeds": settings.trained_seeds, "seed": settings.seed,
        }  # fmt: skip
        outputs = workdir.part(f"trained-{width}", inputs, compute)["outputs"].astype(np.float64)
        expected = infinite.from_start(limit, y, outputs[0], [0, settings.steps])
        apart = np.square(outputs[1] - expected[1])[:, len(x) :]
        distances[width] = np.sqrt(apart.mean((1, 2)))
        losses[width] = {
            name: np.square(f[:, :, : len(x)] - y).mean((2, 3)) / 2
            for name, f in (("network", outputs), ("closed_form", expected))
        }
    return {
        "distances": distances,
        "leading": fit_leading_power(distances),
        "slopes": local_slopes(distances),
        "losses": losses,
    }


def measure_layers(settings: Settings, workdir: Workdir, data: Dataset) -> dict[str, Any]:
    """Residual networks of so many layers against the ODE, infinitely wide and of one width."""
    ode, x = settings.ode, data.x_train[:LAYER_INPUTS]
    limit = ode.kernels(x)
    errors = {
        count: [
            float(np.sqrt(relative_error(k, of)))
            for k, of in zip(replace(ode, steps=count).kernels(x), limit, strict=True)
        ]
        for count in sorted(settings.kernel_layers)
    }
    finite = _drawn(
        settings, workdir, "layers", odes.residual_errors, settings.seeds,
        x=x, ode=ode, width=RESIDUAL_WIDTH, steps=LAYERS,
    )["errors"]  # fmt: skip
    last = {count: finite[:, i] for i, count in enumerate(LAYERS)}
    last = {count: last[count] for count in LAYERS[-4:]}
    return {
        "kernel_errors": errors,
        "kernel_exponents": {
            get: limiting_exponent({count: pair[i] for count, pair in errors.items()})
            for i, get in enumerate(("nngp", "ntk"))
        },
        "counts": LAYERS,
        "network_errors": finite,
        "network_slope": report.fit_by_width(last),
    }


def limiting_exponent(errors: Mapping[int, float]) -> float:
    """The exponent that `(a/L)(1 + b/L + …)` tends to, from the three largest `L`.

    Between two `L` the exponent is that of `1/L` up to a multiple of one over their mean.
    """
    counts = sorted(errors)[-3:]
    x, y = np.log(counts), np.log([errors[count] for count in counts])
    slopes, means = np.diff(y) / np.diff(x), np.exp((x[1:] + x[:-1]) / 2)
    return float((slopes[1] * means[1] - slopes[0] * means[0]) / (means[1] - means[0]))


def measure_definiteness(settings: Settings) -> dict[str, Any]:
    """λ_min against `T` and the number of inputs, and the exceptions."""

    def smallest(kernels, count=None):
        found = {}
        for get, kernel in zip(("nngp", "ntk"), kernels, strict=True):
            value = theory.smallest_eigenvalue(kernel[:count, :count])
            found[get] = {**value._asdict(), "positive": value.positive}
        return found

    ode, x = replace(settings.ode, activation=ON_MANY), settings.inputs(4)
    most = ode.kernels(settings.inputs(max(settings.counts)))
    more = settings.inputs(random_networks.FEATURES + 2)  # than features
    cases = {
        "erf on {x, −x}": ("erf", np.concatenate([x, -x])),
        "linear φ, more inputs than features": ("identity", more),
        "gelu on {x, −x}": ("gelu", np.concatenate([x, -x])),
        "erf, more inputs than features": ("erf", more),
    }
    return {
        "by_T": {
            T: smallest(replace(ode, T=T).kernels(settings.inputs(settings.inputs_count)))
            for T in TIMES
        },
        "by_count": {count: smallest(most, count) for count in sorted(settings.counts)},
        "exceptions": {
            name: smallest(replace(ode, activation=phi).kernels(inputs))["nngp"]
            for name, (phi, inputs) in cases.items()
        },
    }


def measure_ties(settings: Settings, workdir: Workdir) -> dict[str, Any]:
    """How far kernels of tied and of untied weights are apart, and which one networks have."""
    x = settings.inputs(settings.inputs_count)
    apart, dual = {}, get_activation(settings.activation).dual
    last = replace(settings.ode, T=TIMES[-1])  # where they are far apart
    drawn = _drawn(
        settings, workdir, "tied", odes.sample, settings.networks // 10,
        x=x, ode=last, width=settings.mean_width, outputs=OUTPUTS,
    )  # fmt: skip
    with enable_x64(True):

        def untied(T):
            options = {"W_std": settings.W_std, "T": T, "activation": settings.activation}
            return theory.untied_residual_kernels(jnp.asarray(x), **options)

        for T in TIMES[::2]:
            tied = replace(settings.ode, T=T).state_kernels(x)
            apart[T] = [
                float(np.sqrt(relative_error(np.asarray(b), a)))
                for a, b in zip(tied, untied(T), strict=True)
            ]
        kernel = untied(last.T)[0]
        k = jnp.diagonal(kernel)
        other = np.asarray(dual(k[:, None], k[None, :], kernel)[0])
    mean, own = drawn["covariances"].mean(0), last.kernels(x)[0]
    return {
        "apart": apart,
        "T": last.T,
        "networks_used": len(drawn["covariances"]),
        "error_to_tied": relative_error(mean, own),
        "error_to_untied": relative_error(mean, other),
        "chance_error": chance_error(drawn["covariances"], own),
    }


def measure_equilibrium(settings: Settings) -> dict[str, Any]:
    """The ODE with leak 1 and injection, as `T` grows, against the deep equilibrium network."""
    x = settings.inputs(settings.inputs_count)
    limit = Architecture(settings.W_std, 1.0, 0.0, settings.activation).kernels(x)
    errors = {}
    for T in LONG_TIMES:
        ode = Ode(settings.W_std, settings.activation, T, leak=1.0, inject_always=True)
        errors[T] = [
            float(np.sqrt(relative_error(k, of)))
            for k, of in zip(ode.kernels(x), limit, strict=True)
        ]
    with enable_x64(True):
        found = deq_kernel(x, W_std=settings.W_std, activation=settings.activation)
        slopes = get_activation(settings.activation).dual_diagonal(jnp.diagonal(found.nngp))[1]
    rate = settings.W_std**2 * float(slopes.max())
    (before, earlier), (after, later) = list(errors.items())[-2:]
    fall = np.log(np.divide(earlier, later)) / (after - before)
    # A disturbance of (∂t + 1)(∂s + 1) C = J C + S decays as exp(-(1 - √J)(t + s)).
    return {"errors": errors, "rates": fall, "expected_rate": 2 * (1 - rate**0.5)}


def measure_images(settings: Settings, workdir: Workdir, data: Dataset) -> dict[str, Any]:
    """Regression on images with the kernels of ODEs, DEQs and explicit networks."""

    def kernel(kernel_fn, get):
        def of(x1, x2):
            pair = jnp.asarray(x1), None if x1 is x2 else jnp.asarray(x2)
            with enable_x64(False):
                return np.asarray(kernel_fn(*pair, get), np.float64)

        return of

    def ode(T, get):
        return kernel(Ode(settings.W_std, ON_MANY, T).kernel_fn, get)

    def deq(W_std, get):
        return kernel(Architecture(W_std, 1.0, 0.0, ON_MANY).kernel_fn(1), get)

    families = {
        "neural ODE": (ode, TIMES[1:4]),
        "DEQ": (deq, (0.4, 0.6, 0.8)),
        "explicit": (lambda depth, get: kernels.explicit(get, depth), (1, 3, 10)),
    }
    found = {}
    for name, (family, shapes) in families.items():
        for get in ("nngp", "ntk"):

            def compute(family=family, shapes=shapes, get=get):
                x, y, x_test = data.x_train, data.targets_train[None], data.x_test
                return kernels.regress(partial(family, get=get), shapes, x, y, x_test, lambda: None)

            inputs = {
                "name": name, "get": get, "shapes": list(shapes), "x": data.x_train,
                "y": data.targets_train, "x_test": data.x_test, "W_std": settings.W_std,
            }  # fmt: skip
            of = workdir.part(f"images-{name.replace(' ', '-')}-{get}", inputs, compute)
            wrong = of["test"][0, 0].argmax(1) != data.y_test  # tuned
            found[f"{name}, {get.upper()}"] = {
                "shape": float(of["shape"][0, 0]),
                "error": float(wrong.mean()),
            }
    return found


def main(settings: Settings, workdir: Workdir) -> None:
    """Measures everything and writes the report."""
    data = load(settings.data, settings.data_dir, settings.n_train, settings.n_test, settings.seed)
    process = measure_process(settings, workdir)
    found = {
        "process": process,
        "training": measure_training(settings, workdir, data),
        "layers": measure_layers(settings, workdir, data),
        "definiteness": measure_definiteness(settings),
        "ties": measure_ties(settings, workdir),
        "equilibrium": measure_equilibrium(settings),
        "images": measure_images(settings, workdir, data),
        "images_tested": len(data.y_test),
    }
    neural_ode_report.write(settings, workdir, found)


if __name__ == "__main__":
    launch.main(Settings, main, FULL)
