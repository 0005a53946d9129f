"""Minibatch training of a DEQ classifier: the optimiser, compiled steps, and evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from experiments.network import Network

EVALUATION_BATCH = 1000


class State(NamedTuple):
    """What a step of training changes.

    Attributes:
      params: of the network.
      optimizer: the state of the optimiser.
      step: how many steps were taken.
      loss: sum of the minibatches' losses since the last line of metrics.
      correct: inputs of these minibatches that were classified correctly.
      finite: whether the last step's loss and gradient were; no step is taken after one that was
        not.
    """

    params: Any
    optimizer: Any
    step: Array
    loss: Array
    correct: Array
    finite: Array


class Evaluation(NamedTuple):
    """Mean loss, fraction classified correctly, layers until all inputs are at equilibrium."""

    loss: float
    accuracy: float
    equilibrium_steps: int


def make_schedule(kind: str, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """The learning rate of each step.

    Args:
      kind: what follows the warm-up: `constant`, or `cosine` for half a cosine down to zero.
      learning_rate: the largest.
      warmup_steps: steps in which it rises to that, linearly.
      steps: how many there are in all.
    """
    after = (
        optax.cosine_decay_schedule(learning_rate, steps - warmup_steps)
        if kind == "cosine"
        else optax.constant_schedule(learning_rate)
    )
    if not warmup_steps:
        return after
    # The first step is not wasted on a learning rate of zero.
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(
    name: str, schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """Returns `sgd` or `adam`, with decoupled weight decay (Loshchilov and Hutter 2019).

    Every step also takes `learning_rate · weight_decay · params` off.
    """
    return optax.chain(
        optax.scale_by_adam() if name == "adam" else optax.identity(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


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
    """

    def __init__(self, network: Network, optimizer: optax.GradientTransformation, loss: str):
        self._graph, self._params = nnx.split(network, nnx.Param)
        self._optimizer = optimizer
        self._loss = LOSSES[loss]
        self.take_steps = jax.jit(self._take_steps, donate_argnums=0)
        self._evaluate = jax.jit(self._measure)

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

    def start_line(self, state: State) -> State:
        """Returns the state with a line of metrics behind it."""
        return state._replace(loss=jnp.zeros(()), correct=jnp.zeros((), jnp.int32))

    def _take_steps(
        self, state: State, x: Array, labels: Array, batches: Array, stop: Array
    ) -> State:
        """Takes steps until `stop` of them are taken, or one gives what is not a number.

        Args:
          state: where to start; its buffers are given away.
          x: all training inputs, `(n, d)`.
          labels: of all training inputs, `(n,)`.
          batches: rows of the minibatches of an epoch, `(steps_per_epoch, batch)`.
          stop: the number of steps taken in the end.
        """

        def loss_fn(params, x, labels):
            f, _ = nnx.merge(self._graph, params)(x)
            return self._loss(f, labels).mean(), jnp.sum(jnp.argmax(f, axis=1) == labels)

        def step(state):
            rows = batches[state.step % len(batches)]
            (loss, correct), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, x[rows], labels[rows]
            )
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.params)
            return State(
                params=optax.apply_updates(state.params, updates),
                optimizer=optimizer,
                step=state.step + 1,
                loss=state.loss + loss,
                correct=state.correct + correct,
                finite=_all_finite((loss, gradient)),
            )

        return lax.while_loop(lambda state: (state.step < stop) & state.finite, step, state)

    def evaluate(self, params: Any, x: Array, labels: Array) -> Evaluation:
        """Measures the network with parameters `params` on inputs, `(n, d)`, with their labels."""
        parts = [
            self._evaluate(params, x[i : i + EVALUATION_BATCH], labels[i : i + EVALUATION_BATCH])
            for i in range(0, len(x), EVALUATION_BATCH)
        ]
        loss, correct, steps = np.array(parts, float).T
        return Evaluation(loss.sum() / len(x), correct.sum() / len(x), int(steps.max()))

    def _measure(self, params: Any, x: Array, labels: Array) -> tuple[Array, Array, Array]:
        network = nnx.merge(self._graph, params)
        f, _ = network(x)
        correct = jnp.sum(jnp.argmax(f, axis=1) == labels)
        return self._loss(f, labels).sum(), correct, network.equilibrium_steps(x)


def _all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
