"""Ensembles of finite networks, trained by full-batch gradient descent.

All networks of a width are one program: they are vmapped, and a step starts the search for `z*`
where the step before found it, which saves most of its iterations and changes no gradient, since
that is implicit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.lib.networks import Architecture, draw, empirical_ntk
from experiments.lib.workdir import Arrays
from nt_deq.errors import NtDeqError

CHUNK = 4  # steps per call: so often the loss is looked at, the progress told and Ctrl-C heard
CHUNK_TO_FIT = 10  # likewise of `interpolate`, which ends after one of them
MOMENTUM = 0.95  # of `interpolate`
HALVINGS = 6  # of its step size at most, where training diverges


class TrainingError(NtDeqError, RuntimeError):
    """Training left the range where it means something; the message names the remedy."""


class State(NamedTuple):
    """What steps change, of all networks: every leaf has a leading axis over them.

    Attributes:
      params: of the networks.
      optimizer: the state of the optimiser.
      z: where the search for the equilibrium starts, `(networks, n, width)`.
      loss: before the last step, `(networks,)`.
    """

    params: Any
    optimizer: Any
    z: Array
    loss: Array


def _sgd(learning_rate: Any, momentum: float | None) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum, nesterov=momentum is not None)


def start(params: Any, width: int, y: Array, momentum: float | None = None) -> State:
    """The state before the first step, of networks with targets `y`, `(networks, n, C)`."""
    networks, n, _ = y.shape
    optimizer = jax.vmap(_sgd(0.0, momentum).init)(params)
    return State(params, optimizer, jnp.zeros((networks, n, width), y.dtype), y[:, 0, 0])


Forward = Callable[[Any, Array, Array], tuple[Array, Array]]


@partial(jax.jit, static_argnames=("forward", "momentum"))
def gradient_descent(
    forward: Forward,
    state: State,
    x: Array,
    y: Array,
    learning_rate: Array | float,
    steps: Array | int,
    momentum: float | None = None,
) -> State:
    """Takes steps of full-batch gradient descent on `½ mean (f - y)²`, on every network.

    Args:
      forward: `(params, x, z0) -> (f, z*)`: the outputs, `(n, C)`, and the equilibrium.
      state: of the networks.
      x: inputs, `(n, d)`.
      y: targets of every network, `(networks, n, C)`.
      learning_rate: step size.
      steps: how many.
      momentum: of Nesterov; `None` is none.
    """
    optimizer = _sgd(learning_rate, momentum)

    def loss_fn(params, z, y):
        f, z = forward(params, x, z)
        return jnp.mean(jnp.square(f - y)) / 2, z

    def step(state, y):
        (loss, z), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.z, y)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), memory, z, loss)

    def train(state, y):
        return lax.fori_loop(0, steps, lambda _, state: step(state, y), state)

    return jax.vmap(train)(state, y)


def train(
    architecture: Architecture,
    width: int,
    x_train: Any,
    y_train: Any,
    x_test: Any,
    *,
    learning_rate: float,
    steps: Sequence[int],
    seeds: int,
    seed: int,
    progress: Callable[[int], Any],
    ntk_inputs: int = 0,
) -> Arrays:
    """Trains networks of one width.

    Args:
      architecture: what they are.
      width: how wide.
      x_train: inputs, `(n, d)`.
      y_train: targets, `(n, C)`.
      x_test: inputs, `(m, d)`.
      learning_rate: step size.
      steps: at which steps to record, increasing, from 0 on.
      seeds: how many networks.
      seed: of their initialisation.
      progress: told of every few steps how many they were.
      ntk_inputs: of how many training inputs, the first, to record the empirical NTK; 0 is none.

    Returns:
      `outputs`, `(steps, seeds, n+m, C)` for the training and test inputs, in this order;
      with `ntk_inputs`, `ntk (steps, seeds, ntk_inputs, ntk_inputs)`, averaged over outputs;
      `equilibrium_steps`, `(seeds,)`: layers that one solve from zeros takes, at the end;
      `seconds`.

    Raises:
      TrainingError: a loss, an output or an NTK is not a number any more.
    """
    start_time = time.perf_counter()
    x_train, y_train, x_test = map(jnp.asarray, (x_train, y_train, x_test))
    x_all = jnp.concatenate([x_train, x_test])
    shape = x_train.shape[1], width, y_train.shape[1]
    networks, params = draw(architecture, *shape, seeds, seed)
    measure = {"outputs": networks.of_each(lambda network: network(x_all)[0])}
    if ntk_inputs:  # a product over all networks at once is slow on a CPU
        measure["ntk"] = networks.of_each(
            lambda network: empirical_ntk(architecture, network, x_train[:ntk_inputs]),
            one_by_one=True,
        )
    count = networks.of_each(lambda network: network.deq.solve(x_all).steps)

    def check(numbers, step):
        wrong = [s for s in range(seeds) if not np.isfinite(numbers[s]).all()]
        if wrong:
            raise TrainingError(
                f"width {width}, step {step}: {len(wrong)} of {seeds} networks gave NaN or "
                f"infinity (first: seed {wrong[0]}), having diverged or lost their equilibrium; "
                f"take --learning_rate below {learning_rate:.4g} or --W_std below "
                f"{architecture.W_std:.4g}, or a larger width."
            )

    records, done = {name: [] for name in measure}, 0
    y = jnp.broadcast_to(y_train, (seeds, *y_train.shape))
    state = start(params, width, y)
    for recorded in steps:
        while done < recorded:
            chunk = min(CHUNK, recorded - done)
            state = gradient_descent(networks.forward, state, x_train, y, learning_rate, chunk)
            done += chunk
            check(np.asarray(state.loss), done)
            progress(chunk)
        for name, of in measure.items():
            records[name].append(np.asarray(of(state.params)))
            check(records[name][-1], done)
    return {
        **{name: np.stack(recorded) for name, recorded in records.items()},
        "equilibrium_steps": np.asarray(count(state.params)),
        "seconds": np.asarray(time.perf_counter() - start_time),
    }


def interpolate(
    architecture: Architecture,
    width: int,
    x_train: Any,
    y_train: Any,
    x_test: Any,
    *,
    learning_rate: float,
    max_steps: int,
    enough: float,
    seeds: int,
    seed: int,
    progress: Callable[[int], Any],
) -> Arrays:
    """Trains networks of one width until all fit, or for `max_steps`.

    By Nesterov's momentum on `½ mean (f - f₀ - y)²`. A network's random outputs `f₀` before
    training are subtracted (Chizat, Oyallon, Bach 2019, arXiv:1812.07956): so what is learned tends
    with the width to interpolation by the NTK, without the spread of initialisations. Where one
    diverges, all start again with half the step size.

    Args:
      architecture: what they are.
      width: how wide.
      x_train: inputs, `(n, d)`.
      y_train: targets of several problems, `(problems, n, C)`.
      x_test: inputs, `(m, d)`.
      learning_rate: step size, to begin with.
      max_steps: steps at most, in calls of `CHUNK_TO_FIT`.
      enough: the mean squared error of a network that fits.
      seeds: how many networks for every problem; they start alike.
      seed: of their initialisation.
      progress: told of every few steps how many they were.

    Returns:
      `learned`: outputs after training less those before, `(problems, seeds, n+m, C)`, for the
      training and test inputs, in this order; `train_mse (problems, seeds)`; `steps` taken, and
      the `learning_rate` of these.

    Raises:
      TrainingError: one has no equilibrium before training, or they diverge with the smallest
        step size too.
    """
    x_train, y_train, x_test = (jnp.asarray(a, jnp.float32) for a in (x_train, y_train, x_test))
    problems, n, outputs = y_train.shape
    x_all = jnp.concatenate([x_train, x_test])
    networks, drawn = draw(architecture, x_train.shape[1], width, outputs, seeds, seed)
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * problems), drawn)
    evaluate = networks.of_each(lambda network: network(x_all)[0])

    def predict(params):
        return np.asarray(evaluate(params)).reshape(problems, seeds, len(x_all), outputs)

    before = predict(params)
    if not np.isfinite(before).all():
        raise TrainingError(
            f"a network of width {width} has no equilibrium before training: take larger --widths "
            "or a smaller --W_std."
        )
    y = jnp.reshape(before[:, :, :n] + y_train[:, None], (problems * seeds, n, outputs))
    for halvings in range(HALVINGS + 1):
        rate, done = learning_rate / 2**halvings, 0
        state = start(params, width, y, MOMENTUM)
        while done < max_steps and (not done or 2 * state.loss.max() > enough):  # and not NaN
            state = gradient_descent(
                networks.forward, state, x_train, y, rate, CHUNK_TO_FIT, MOMENTUM
            )
            done += CHUNK_TO_FIT
            progress(CHUNK_TO_FIT)
        learned = predict(state.params) - before
        if np.isfinite(learned).all():
            errors = learned[:, :, :n] - np.asarray(y_train)[:, None]
            return {
                "learned": learned,
                "train_mse": np.square(errors).mean((2, 3)),
                "steps": np.asarray(done),
                "learning_rate": np.asarray(rate),
            }
    raise TrainingError(
        f"networks of width {width} diverged or lost their equilibrium with step sizes down to "
        f"{learning_rate / 2**HALVINGS:.3g}: take larger --widths or a smaller --W_std."
    )
