"""An ordinary training script with a DEQ in it: it learns, quickly, and never sees NaN."""

import time

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from nt_deq import UnrolledAdjoint
from nt_deq.flax import DEQ

BATCH, N_TRAIN = 64, 1437


class Network(nnx.Module):
    def __init__(self, channels, rngs, **options):
        self.stem = nnx.Conv(1, channels, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(channels, num_groups=8, rngs=rngs)
        self.deq = DEQ(channels, channels, kernel_size=(3, 3), rngs=rngs, **options)
        self.readout = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.deq(self.norm(self.stem(x))).mean((1, 2)))


@nnx.jit
def train_step(network, optimizer, x, y):
    def loss_fn(network):
        return optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, gradients)
    return loss


@nnx.jit
def accuracy(network, x, y):
    return (network(x).argmax(1) == y).mean()


@nnx.jit
def all_converged(network, x):
    return network.deq.solve(network.norm(network.stem(x))).converged.all()


def train(channels, epochs, batches=N_TRAIN // BATCH, seed=0, learning_rate=3e-3, **options):
    """Returns the losses, the network, the held-out digits, and the median seconds of an epoch."""
    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    network = Network(channels, nnx.Rngs(seed), **options)
    optimizer = nnx.Optimizer(network, optax.adam(learning_rate), wrt=nnx.Param)
    losses, seconds = [], []
    for epoch in range(epochs):
        rows = np.random.default_rng((seed, epoch)).permutation(order[:N_TRAIN])
        start = time.process_time()
        for i in range(batches):
            batch = rows[i * BATCH : (i + 1) * BATCH]
            losses.append(train_step(network, optimizer, x[batch], y[batch]))
        jax.block_until_ready(losses)
        seconds.append(time.process_time() - start)
    test = order[N_TRAIN:]
    return np.array(losses), network, (x[test], y[test]), np.median(seconds[1:])


@pytest.mark.usefixtures("promotion")
def test_an_ordinary_script_learns():
    losses, network, (x, y), _ = train(8, 4, learning_rate=0.02, W_std=0.8, lipschitz=0.9)
    assert np.isfinite(losses).all()
    assert losses[-10:].mean() < 0.6 * losses[:5].mean()
    assert accuracy(network, x, y) > 0.5
    assert all_converged(network, x)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_an_ordinary_script_reaches_90_per_cent(seed):
    losses, network, (x, y), _ = train(32, 5, seed=seed, W_std=0.8, lipschitz=0.9)
    assert np.isfinite(losses).all()
    assert accuracy(network, x, y) > 0.9


@pytest.mark.slow
def test_it_takes_at_most_three_times_as_long_as_eight_layers():
    *_, implicit = train(24, 4, W_std=0.7, lipschitz=0.9)
    *_, layers = train(24, 4, W_std=0.7, parameterization="standard", adjoint=UnrolledAdjoint(8))
    assert implicit < 3 * layers


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"parameterization": "ntk"}, {}])
def test_long_and_fast_training_keeps_the_equilibrium(options):
    losses, network, (x, _), _ = train(
        16, 30, learning_rate=0.02, W_std=0.8, lipschitz=0.9, **options
    )
    assert np.isfinite(losses).all()
    assert all_converged(network, x)
    assert losses[-22:].mean() < 0.5
