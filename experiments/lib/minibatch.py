"""Minibatch training of a DEQ classifier: the optimiser, compiled steps, and evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from nt_deq import spectral_radius
from experiments.lib.networks import Network

EVALUATION_BATCH = 1000
JACOBIAN_INPUTS, JACOBIAN_STEPS = 100, 40  # of the estimate of a spectral radius


class State(NamedTuple):
    """What a step of training changes.

    Attributes:
      params: of the network.
      optimizer: the state of the optimiser.
      step: how many steps were taken; does not grow any more after one that was not finite.
      loss: sum of the minibatches' losses since the last line of metrics.
      correct: inputs of these minibatches that were classified correctly.
      finite: whether the loss and the gradient of every step were.
    """

    params: Any
    optimizer: Any
    step: Array
    loss: Array
    correct: Array
    finite: Array


def make_schedule(kind: str, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """The learning rate of each step.

    Args:
      kind: what follows the warm-up: `constant`, or `cosine` for half a cosine down to zero.
      learning_rate: the largest.
      warmup_steps: steps in which it rises to that, linearly.
      steps: how many there are in all.
    """
    first = learning_rate / (warmup_steps + 1)  # not 0, which would be a step wasted
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(first, learning_rate, warmup_steps, steps)
    return optax.linear_schedule(first, learning_rate, warmup_steps)


def make_optimizer(
    name: str, schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """Returns `sgd` or `adam`, with decoupled weight decay (Loshchilov and Hutter 2019).

    Every step also takes `learning_rate · weight_decay · params` off.
    """
    if name == "adam":
        return optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule))


def cross_entropy(f: Array, labels: Array) -> Array:
    """Softmax cross-entropy of each input, `(n,)`, from outputs `(n, C)`."""
    return optax.softmax_cross_entropy_with_integer_labels(f, labels)


def squared_error(f: Array, labels: Array) -> Array:
    """`½ mean (f - y)²` of each input, `(n,)`, with the centred one-hot targets of `data`."""
    classes = f.shape[1]
    return jnp.mean((f - jax.nn.one_hot(labels, classes) + 1 / classes) ** 2, axis=1) / 2


LOSSES = {"cross_entropy": cross_entropy, "mse": squared_error}


class Classifier:
    """A network and how it is trained, compiled once for a data set.

    Args:
      network: the network as it is before training; it is not changed.
      optimizer: gives the updates.
      loss: the name of one of `LOSSES`.
      shift: each training image is moved at random, by at most so many pixels along each axis; its
        border is repeated.
      seed: of these moves.
    """

    def __init__(
        self,
        network: Network,
        optimizer: optax.GradientTransformation,
        loss: str,
        shift: int = 0,
        seed: int = 0,
    ):
        self._graph, self._params = nnx.split(network, nnx.Param)
        self._optimizer = optimizer
        self._loss = LOSSES[loss]
        self._shift, self._seed = shift, seed
        # One step, not many in a loop: there gradients of convolutions are slow on a CPU.
        self._take_step = jax.jit(self._step, donate_argnums=0)
        self._evaluate = jax.jit(self._measure)
        self._radius = jax.jit(self._spectral_radius)

    def init(self) -> State:
        """The state before the first step."""
        params = jax.tree.map(jnp.copy, self._params)  # steps overwrite the state they are given
        return State(
            params=params,
            optimizer=self._optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
            loss=jnp.zeros(()),
            correct=jnp.zeros((), jnp.int32),
            finite=jnp.ones((), bool),
        )

    def network(self, params: Any) -> Network:
        """The network with parameters `params`."""
        return nnx.merge(self._graph, params)

    def start_line(self, state: State) -> State:
        """Returns the state with a line of metrics behind it."""
        return state._replace(loss=jnp.zeros(()), correct=jnp.zeros((), jnp.int32))

    def take_steps(
        self, state: State, x: Array, labels: Array, batches: Array, steps: int
    ) -> State:
        """Takes steps.

        Args:
          state: where to start; its buffers are given away.
          x: all training inputs, `(n, ...)`.
          labels: of all training inputs, `(n,)`.
          batches: rows of the minibatches of an epoch, `(steps_per_epoch, batch)`.
          steps: how many.
        """
        for _ in range(steps):
            state = self._take_step(state, x, labels, batches)
        return state

    def _step(self, state: State, x: Array, labels: Array, batches: Array) -> State:
        rows = batches[state.step % len(batches)]
        images = x[rows]
        if self._shift:
            key = jax.random.fold_in(jax.random.key(self._seed), state.step)
            images = shifted(images, self._shift, key)

        def loss_fn(params):
            f, _ = self.network(params)(images)
            correct = jnp.sum(jnp.argmax(f, axis=1) == labels[rows])
            return self._loss(f, labels[rows]).mean(), correct

        (loss, correct), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
        return State(
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer,
            step=state.step + state.finite.astype(state.step.dtype),
            loss=state.loss + loss,
            correct=state.correct + correct,
            finite=state.finite & _all_finite((loss, gradient)),
        )

    def evaluate(self, params: Any, x: Array, labels: Array) -> dict[str, float]:
        """Measures the network with parameters `params` on inputs, `(n, ...)`, with their labels.

        Returns:
          `test_loss`, the mean, NaN where an input has no equilibrium; `test_accuracy`, the
          fraction classified correctly; `equilibrium_steps`, layers until all inputs are at
          equilibrium; `residual`, the largest `|f(z) - z| / |z|` of an input; `spectral_radius`,
          the largest estimate of it at the equilibrium of one of the first `JACOBIAN_INPUTS`.
        """
        parts = [
            self._evaluate(params, x[i : i + EVALUATION_BATCH], labels[i : i + EVALUATION_BATCH])
            for i in range(0, len(x), EVALUATION_BATCH)
        ]
        loss, correct, steps, residual = np.array(parts, float).T
        return {
            "test_loss": loss.sum() / len(x),
            "test_accuracy": correct.sum() / len(x),
            "equilibrium_steps": int(steps.max()),
            "residual": residual.max(),
            "spectral_radius": float(self._radius(params, x[:JACOBIAN_INPUTS])),
        }

    def _measure(self, params: Any, x: Array, labels: Array) -> tuple[Array, ...]:
        network = self.network(params)
        solution = network.deq.solve(network.stem(x))
        f = network.read(solution.value)
        loss = jnp.where(solution.converged, self._loss(f, labels), jnp.nan)
        size = jax.vmap(jnp.linalg.norm)(solution.value)
        residual = solution.residual / jnp.where(size > 0, size, 1)
        correct = jnp.sum(jnp.argmax(f, axis=1) == labels)
        return loss.sum(), correct, solution.steps, residual.max()

    def _spectral_radius(self, params: Any, x: Array) -> Array:
        network = self.network(params)
        features = network.stem(x)
        z = network.deq.equilibrium(features)
        radii = spectral_radius(
            lambda z: network.deq.step(z, features),
            z,
            key=jax.random.key(0),
            steps=JACOBIAN_STEPS,
        )
        return radii.max()


def shifted(images: Array, pixels: int, key: Array) -> Array:
    """Moves each image of `(n, height, width, ...)` at random, at most `pixels` along an axis."""
    around = [(0, 0), (pixels, pixels), (pixels, pixels)] + [(0, 0)] * (images.ndim - 3)
    padded = jnp.pad(images, around, mode="edge")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def cut(image, start):
        at = (*start, *[0] * (image.ndim - 2))
        return lax.dynamic_slice(image, at, images.shape[1:])

    return jax.vmap(cut)(padded, starts)


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
