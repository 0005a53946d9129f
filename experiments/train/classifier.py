"""Trains a deep equilibrium classifier on images, by minibatches, in Flax with optax.

Writes to the directory --workdir: metrics.jsonl (a line an epoch, or every --log_every steps),
curve.png (of these, at the end), checkpoint.npz (the last one) and run.json (what the run
depends on). The same command goes on where a killed one was, and ends with the same parameters and
metrics to the last bit. With more --epochs it goes on where the last command ended; a cosine
schedule is from there on that of the new number, so that the step size jumps up again, and what was
done before stays as it is.

    python -m experiments.train.classifier --workdir=out/train
    python -m experiments.train.classifier --workdir=out/mnist --network=conv --data=mnist \
      --data_dir=MNIST --n_train=60000 --n_test=10000 --batch_size=128 --shift=1 \
      --warmup_steps=100 --epochs=8

experiments.train.trained.load(workdir) is the network of the last checkpoint, to predict with.

A line of metrics:
    step, epoch          steps taken, and the same in epochs
    train_loss, train_accuracy
                         means over the minibatches since the line before, each before its step
    test_loss, test_accuracy
                         of all test images
    equilibrium_steps    layers applied until the last test image is at its equilibrium
    residual             the largest |f(z) - z| / |z| of a test image where it stops
    spectral_radius      the largest of ∂f/∂z at the equilibria of 100 test images: a step without
                         acceleration leaves about so much of the error, and above 1 none is stable
    learning_rate        of the last step
    seconds              since the beginning, without the time between a kill and going on
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import joblib
import numpy as np
from flax import nnx
from jax import Array
from optax import Schedule

from nt_deq import NoEquilibriumError, Picard
from experiments.lib import launch
from experiments.lib.data import Dataset, DataSettings, load
from experiments.lib.launch import flag
from experiments.lib.minibatch import LOSSES, Classifier, make_optimizer, make_schedule
from experiments.lib.networks import Architecture, conv, dense
from experiments.lib.report import figure_style, table
from experiments.lib.training import TrainingError
from experiments.lib.workdir import Workdir, versions
from experiments.train import training_curve
from experiments.train.checkpoints import Run
from nt_deq._progress import progress_bar
from nt_deq.activations import ACTIVATIONS
from nt_deq.errors import InputError

CHUNK = 8  # steps between two looks at whether all is finite

DEFAULTS = {
    "dense": {"width": 256, "lipschitz": 0.0, "learning_rate": 0.01},
    "conv": {"width": 24, "lipschitz": 0.9, "learning_rate": 0.005},
}


@dataclass(frozen=True)
class Settings(DataSettings):
    """The flags."""

    n_train: int = flag(1437, "training images, drawn at random", at_least=2)
    n_test: int = flag(360, "test images, drawn at random", at_least=1)
    network: str = flag(
        "dense",
        "dense, a DEQ of flattened images in NTK parameterisation, or conv, strided convolutions "
        "down to 8 pixels along a side and a convolutional DEQ, in standard parameterisation",
        one_of=DEFAULTS,
    )
    width: int = flag(
        None,
        "width of the state, by default 256; its channels with conv, by default 24",
        at_least=1,
    )
    kernel_size: int = flag(3, "of the filters of a conv DEQ, along a side", at_least=1)
    lipschitz: float = flag(
        None,
        "bound on the DEQ layer's Lipschitz constant that its weights are scaled to keep, below 1, "
        "or 0 for none; by default .9 with conv, and 0",
        at_least=0,
        below=1,
    )
    W_std: float = flag(
        0.6, "standard deviation of the recurrent weights before training", at_least=0
    )
    U_std: float = flag(1.0, "standard deviation of the input weights", above=0)
    b_std: float = flag(0.1, "standard deviation of the biases, 0 for none", at_least=0)
    activation: str = flag("relu", f"one of {', '.join(ACTIVATIONS)}", one_of=ACTIVATIONS)
    rtol: float = flag(
        1e-3,
        "how closely an equilibrium is solved: |f(z) - z| <= rtol |f(z)|",
        at_least=4e-6,
        at_most=0.1,
    )
    loss: str = flag("cross_entropy", f"one of {', '.join(LOSSES)}", one_of=LOSSES)
    optimizer: str = flag("adam", "adam or sgd", one_of=("adam", "sgd"))
    learning_rate: float = flag(
        None,
        "largest step size, by default .01; .005 with conv, whose weights are about 1/√width times "
        "as large",
        above=0,
    )
    schedule: str = flag(
        "cosine",
        "of the step size after the warm-up: constant, or cosine to 0",
        one_of=("constant", "cosine"),
    )
    warmup_steps: int = flag(0, "steps in which the step size rises to its largest", at_least=0)
    weight_decay: float = flag(
        0.0, "a step takes learning_rate · weight_decay of the parameters off", at_least=0
    )
    shift: int = flag(
        0, "pixels by which training images are moved at random, at most, with conv", at_least=0
    )
    batch_size: int = flag(64, "images a step", at_least=1)
    epochs: int = flag(10, "times that the training images are gone through", at_least=1)
    log_every: int | None = flag(None, "steps a line of metrics; by default an epoch", at_least=1)
    checkpoint_every: int | None = flag(None, "steps a checkpoint; by default an epoch", at_least=1)
    seed: int = flag(0, "of the choice of images, their order and the initialisation", at_least=0)

    def __post_init__(self) -> None:
        for name, default in DEFAULTS.get(self.network, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        super().__post_init__()
        if self.network == "dense" and self.shift:
            raise InputError(f"--shift={self.shift} is for --network=conv alone.")
        if self.batch_size > self.n_train:
            raise InputError(
                f"--batch_size={self.batch_size} is too large: there are --n_train={self.n_train} "
                "training images."
            )
        if self.warmup_steps >= self.steps:
            raise InputError(
                f"--warmup_steps={self.warmup_steps} is too large: there are {self.steps} steps."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole minibatches in an epoch; what is left over is other images each epoch."""
        return self.n_train // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.epochs * self.steps_per_epoch


def train(settings: Settings, workdir: Workdir) -> list[dict[str, float]]:
    """Trains a network, or goes on where an earlier run of the same settings but `epochs` was.

    Returns:
      The lines of metrics.

    Raises:
      InputError, TrainingError: the message says why.
    """
    data = load(settings.data, settings.data_dir, settings.n_train, settings.n_test, settings.seed)
    shape = data.shape
    classifier = make_classifier(settings, shape, len(data.classes))
    run = Run(workdir, _identity(settings, data))
    schedule = _schedule(settings)
    state, step, seconds = run.restore(classifier.init())
    start = time.perf_counter() - seconds
    _plan(run, step, settings)
    line_before = ([0] + [line["step"] for line in run.metrics()])[-1]
    train_set = on_device(settings, data.x_train, shape), jnp.asarray(data.y_train, jnp.int32)
    test_set = on_device(settings, data.x_test, shape), jnp.asarray(data.y_test, jnp.int32)
    log_every = settings.log_every or settings.steps_per_epoch
    checkpoint_every = settings.checkpoint_every or settings.steps_per_epoch

    with progress_bar(total=settings.steps, initial=step, unit="step") as bar:
        for epoch in range(step // settings.steps_per_epoch, settings.epochs):
            batches = _batches(settings, epoch)
            end = (epoch + 1) * settings.steps_per_epoch
            while step < end:
                stop = min(step + CHUNK, end, _next(step, log_every), _next(step, checkpoint_every))
                state = classifier.take_steps(state, *train_set, batches, stop - step)
                _check(bool(state.finite), settings, int(state.step), "a minibatch")
                bar.update(stop - step)
                step = stop
                if step % log_every == 0 or step == settings.steps:
                    measured = classifier.evaluate(state.params, *test_set)
                    _check(np.isfinite(measured["test_loss"]), settings, step, "the test images")
                    steps, line_before = step - line_before, step
                    line = {
                        "step": step,
                        "epoch": step / settings.steps_per_epoch,
                        "train_loss": float(state.loss) / steps,
                        "train_accuracy": int(state.correct) / (steps * settings.batch_size),
                        **measured,
                        "learning_rate": float(np.asarray(schedule(step - 1))),
                        "seconds": time.perf_counter() - start,
                    }
                    run.log(line)
                    state = classifier.start_line(state)
                    bar.set_postfix_str(
                        f"loss {line['train_loss']:.4f}, test accuracy {line['test_accuracy']:.2%}"
                    )
                if step % checkpoint_every == 0 or step == settings.steps:
                    run.save(step, state, time.perf_counter() - start)
    return run.metrics()


def _identity(settings: Settings, data: Dataset) -> dict[str, dict[str, Any]]:
    arrays = (data.x_train, data.y_train, data.x_test, data.y_test)
    # Of --data_dir counts what was read there, and more --epochs can follow.
    flags = {k: v for k, v in vars(settings).items() if k not in ("data_dir", "epochs")}
    scale = None if data.scale is None else data.scale.tolist()
    return {
        "settings": flags,
        "versions": versions(),
        "data": {
            "digest": joblib.hash(arrays),
            "shape": data.shape,
            "mean": data.mean.tolist(),
            "scale": scale,
            "classes": data.classes,
        },
    }


def _plan(run: Run, step: int, settings: Settings) -> None:
    """Writes down how many epochs there are to be, and says so where that has changed."""
    if step > settings.steps:
        raise InputError(
            f"--epochs={settings.epochs} is too small: the run has taken {step} steps, which are "
            f"{step / settings.steps_per_epoch:.4g} epochs."
        )
    before = run.plan(step, settings.epochs)
    if before != settings.epochs:
        print(
            f"Goes on after {step} steps of a run that was to have {before} epochs; the "
            f"{settings.schedule} step size is from here on that of {settings.epochs}.",
            file=sys.stderr,
        )


def make_classifier(settings: Settings, shape: tuple[int, ...], classes: int) -> Classifier:
    """The network of the settings, untrained, for inputs of this shape, and how it is trained."""
    architecture = Architecture(settings.W_std, settings.U_std, settings.b_std, settings.activation)
    options: dict[str, Any] = {
        "rngs": nnx.Rngs(settings.seed),
        "solver": Picard(rtol=settings.rtol),
        "lipschitz": settings.lipschitz or None,
    }
    try:
        if settings.network == "dense":
            network = dense(architecture, math.prod(shape), settings.width, classes, **options)
        else:
            colours = _image_shape(settings, shape)
            options["kernel_size"] = settings.kernel_size
            network = conv(architecture, colours, settings.width, classes, **options)
    except NoEquilibriumError as error:
        raise InputError(f"--{error}") from error
    optimizer = make_optimizer(settings.optimizer, _schedule(settings), settings.weight_decay)
    return Classifier(network, optimizer, settings.loss, settings.shift, settings.seed)


def _image_shape(settings: Settings, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`(height, width, colours)` of an image."""
    if len(shape) not in (2, 3):
        raise InputError(
            f"--network=conv is for images, and one of --data={settings.data} has shape {shape}; "
            "it must be (height, width) or (height, width, colours)."
        )
    height, width, colours = (*shape, 1)[:3]
    return height, width, colours


def on_device(settings: Settings, x: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Standardised inputs, `(n, d)`, as the network of the settings takes them."""
    if settings.network == "conv":
        x = x.reshape(len(x), *_image_shape(settings, shape))
    return jnp.asarray(x, jnp.float32)


def _schedule(settings: Settings) -> Schedule:
    return make_schedule(
        settings.schedule, settings.learning_rate, settings.warmup_steps, settings.steps
    )


def _batches(settings: Settings, epoch: int) -> Array:
    """The rows of an epoch's minibatches: of the seed and the epoch alone."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(settings.n_train)
    used = settings.steps_per_epoch * settings.batch_size
    return jnp.asarray(order[:used].reshape(-1, settings.batch_size), jnp.int32)


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _check(finite: bool, settings: Settings, step: int, where: str) -> None:
    if not finite:
        remedy = f"--W_std below {settings.W_std:.4g}"
        if step > 1:
            bound = "" if settings.lipschitz else "--lipschitz=0.9, "
            remedy = (
                f"{bound}--learning_rate below {settings.learning_rate:.4g}, more --warmup_steps, "
                f"or {remedy}"
            )
        raise TrainingError(
            f"step {step} of {settings.steps}: the loss of {where}, or its gradient, is NaN or "
            f"infinite: the network has no equilibrium that the solver reaches, or training "
            f"diverged; take {remedy}, and another --workdir."
        )


def main(settings: Settings, workdir: Workdir) -> None:
    """Trains, draws the metrics, and prints the last lines of them."""
    metrics = train(settings, workdir)
    with figure_style() as plt:
        workdir.write_figure("curve.png", training_curve.draw(plt, metrics))
    header = ("epoch", "train loss", "train acc.", "test loss", "test acc.", "layers", "seconds")
    shown = {
        "epoch": ".4g", "train_loss": ".4f", "train_accuracy": ".2%", "test_loss": ".4f",
        "test_accuracy": ".2%", "equilibrium_steps": "d", "seconds": ".1f",
    }  # fmt: skip
    rows = [[f"{line[name]:{form}}" for name, form in shown.items()] for line in metrics[-10:]]
    print(table(header, rows))
    print(f"\nSee {workdir.path / 'curve.png'}, and metrics.jsonl and checkpoint.npz beside it.")


if __name__ == "__main__":
    launch.main(Settings, main)
