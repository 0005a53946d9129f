"""Ensembles of finite networks, trained by full-batch gradient descent.

All networks of a width are one program: seeds are vmapped, and a step starts the search for `z*`
where the step before found it, which saves most of its iterations and changes no gradient, since
that is implicit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.lib.networks import Architecture, empirical_ntk, split
from experiments.lib.workdir import Arrays
from nt_deq.errors import NtDeqError

CHUNK = 4  # steps a call: so often the progress is told and Ctrl-C heard


class TrainingError(NtDeqError, RuntimeError):
    """Training left the range where it means something; the message names the remedy."""


Forward = Callable[[Any, Array, Array], tuple[Array, Array]]


@partial(jax.jit, static_argnums=0)
def gradient_descent(
    forward: Forward, params: Any, z: Array, x: Array, y: Array, learning_rate: Array, steps: Array
) -> tuple[Any, Array, Array]:
    """Takes steps of full-batch gradient descent on `½ mean (f - y)²`, on every network.

    Args:
      forward: `(params, x, z0) -> (f, z*)`: the outputs, `(n, C)`, and the equilibrium.
      params: of all networks, each leaf with a leading axis over seeds.
      z: where the search for the equilibrium starts, `(seeds, n, width)`.
      x: inputs, `(n, d)`.
      y: targets, `(n, C)`.
      learning_rate: step size.
      steps: how many.

    Returns:
      `(params, z, loss)`: as before, and the loss before the last step, `(seeds,)`.
    """
    optimizer = optax.sgd(learning_rate)

    def loss_fn(params, z):
        f, z = forward(params, x, z)
        return jnp.mean(jnp.square(f - y)) / 2, z

    def step(_, carry):
        params, z, _ = carry
        (loss, z), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, z)
        updates, _ = optimizer.update(gradient, optimizer.init(params))
        return optax.apply_updates(params, updates), z, loss

    def train(params, z):
        return lax.fori_loop(0, steps, step, (params, z, jnp.zeros((), y.dtype)))

    return jax.vmap(train)(params, z)


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
    start = time.perf_counter()
    x_train, y_train, x_test = map(jnp.asarray, (x_train, y_train, x_test))
    x_all = jnp.concatenate([x_train, x_test])
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), width), seeds)
    call, params = split(architecture, x_train.shape[1], width, y_train.shape[1], keys)

    def forward(params, x, z0):
        return call(params, lambda network: network(x, z0))

    @jax.jit
    def evaluate(params):
        return jax.vmap(lambda p: call(p, lambda network: network(x_all)[0]))(params)

    @jax.jit
    def ntk(params):  # one network at a time: a product over all of them is slow on a CPU
        x = x_train[:ntk_inputs]
        return lax.map(lambda p: call(p, lambda network: empirical_ntk(network, x)), params)

    @jax.jit
    def count(params):
        return jax.vmap(lambda p: call(p, lambda network: network.equilibrium_steps(x_all)))(params)

    def check(numbers, step):
        wrong = [s for s in range(seeds) if not np.isfinite(numbers[s]).all()]
        if wrong:
            raise TrainingError(
                f"width {width}, step {step}: {len(wrong)} of {seeds} networks gave NaN or "
                f"infinity (first: seed {wrong[0]}), having diverged or lost their equilibrium; "
                f"take --learning_rate below {learning_rate:.4g} or --W_std below "
                f"{architecture.W_std:.4g}, or a larger width."
            )

    z = jnp.zeros((seeds, len(x_train), width), x_train.dtype)
    measure = {"outputs": evaluate} | ({"ntk": ntk} if ntk_inputs else {})
    records, done = {name: [] for name in measure}, 0
    for recorded in steps:
        while done < recorded:
            chunk = min(CHUNK, recorded - done)
            params, z, loss = gradient_descent(
                forward, params, z, x_train, y_train, learning_rate, chunk
            )
            done += chunk
            check(np.asarray(loss), done)
            progress(chunk)
        for name, of in measure.items():
            records[name].append(np.asarray(of(params)))
            check(records[name][-1], done)
    equilibrium_steps = np.asarray(count(params))
    return {
        **{name: np.stack(recorded) for name, recorded in records.items()},
        "equilibrium_steps": equilibrium_steps,
        "seconds": np.asarray(time.perf_counter() - start),
    }
