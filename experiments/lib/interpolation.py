"""Finite deep equilibrium networks trained until they fit their training data.

Full-batch gradient descent with Nesterov's momentum on `½ mean (f - f₀ - y)²`. A network's random
outputs `f₀` before training are subtracted (Chizat, Oyallon, Bach 2019, arXiv:1812.07956): so what
is learned tends with the width to interpolation by the NTK, without the spread of initialisations.
All networks of a width are one program, and a step starts the search for `z*` where the step before
found it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.lib.networks import Architecture, split
from experiments.lib.training import TrainingError
from experiments.lib.workdir import Arrays

CHUNK = 10  # steps a call: so often the loss is looked at, the progress told and Ctrl-C heard
MOMENTUM = 0.95
HALVINGS = 6  # of the step size at most, where training diverges


def train(
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

    Where one diverges, all start again with half the step size.

    Args:
      architecture: what they are.
      width: how wide.
      x_train: inputs, `(n, d)`.
      y_train: targets of several problems, `(problems, n, C)`.
      x_test: inputs, `(m, d)`.
      learning_rate: step size, to begin with.
      max_steps: steps at most.
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
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), width), seeds)
    call, drawn = split(architecture, x_train.shape[1], width, outputs, keys)
    params = jax.tree.map(lambda leaf: jnp.tile(leaf, (problems,) + (1,) * (leaf.ndim - 1)), drawn)

    def optimizer(learning_rate):
        return optax.sgd(learning_rate, MOMENTUM, nesterov=True)

    def loss_fn(params, z, y):
        f, z = call(params, lambda network: network(x_train, z))
        return jnp.mean(jnp.square(f - y)) / 2, z

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def take_steps(params, state, z, y, learning_rate):
        def step(_, carry):
            params, state, z, _ = carry
            (loss, z), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, z, y)
            updates, state = optimizer(learning_rate).update(gradient, state, params)
            return optax.apply_updates(params, updates), state, z, loss

        return lax.fori_loop(0, CHUNK, step, (params, state, z, jnp.zeros(())))

    @jax.jit
    @jax.vmap
    def evaluate(params):
        return call(params, lambda network: network(x_all)[0])

    def predict(params):
        return np.asarray(evaluate(params)).reshape(problems, seeds, len(x_all), outputs)

    def descend(params, learning_rate):
        state, done = jax.vmap(optimizer(learning_rate).init)(params), 0
        z = jnp.zeros((problems * seeds, n, width), jnp.float32)
        while done < max_steps:
            params, state, z, loss = take_steps(params, state, z, y, learning_rate)
            done += CHUNK
            progress(CHUNK)
            if not 2 * loss.max() > enough:  # or NaN
                break
        return predict(params), done

    start = predict(params)
    if not np.isfinite(start).all():
        raise TrainingError(
            f"a network of width {width} has no equilibrium before training: take larger --widths "
            "or a smaller --W_std."
        )
    y = jnp.reshape(start[:, :, :n] + y_train[:, None], (problems * seeds, n, outputs))
    for halvings in range(HALVINGS + 1):
        end, done = descend(params, learning_rate / 2**halvings)
        if np.isfinite(end).all():
            learned = end - start
            errors = learned[:, :, :n] - np.asarray(y_train)[:, None]
            return {
                "learned": learned,
                "train_mse": np.square(errors).mean((2, 3)),
                "steps": np.asarray(done),
                "learning_rate": np.asarray(learning_rate / 2**halvings),
            }
    raise TrainingError(
        f"networks of width {width} diverged or lost their equilibrium with step sizes down to "
        f"{learning_rate / 2**HALVINGS:.3g}: take larger --widths or a smaller --W_std."
    )
