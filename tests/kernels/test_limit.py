"""Finite networks approach the kernels of the infinitely wide one like one over the root of width.

The kernels come from one-dimensional equations, the networks from their weights: no shared code.
"""

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from flax import nnx
from jax import random

import nt_deq
from nt_deq import stax
from nt_deq.flax import DEQ, Dense, functional

X = random.normal(random.key(0), (3, 4))


class Network(nnx.Module):
    def __init__(self, width, activation, rngs):
        self.deq = DEQ(4, width, W_std=0.7, b_std=0.2, activation=activation, rngs=rngs)
        self.readout = Dense(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.deq(x))


def exact(activation):
    layers = stax.serial(stax.DEQ(1, 0.7, 1.0, 0.2, activation), stax.Dense(1))
    return layers[2](X, None, ("nngp", "ntk"))


def errors(activation, width, seeds):
    """Relative distances of the empirical NNGP kernel and NTK of networks of a width."""
    limit = exact(activation)
    nngp, ntk = [], []

    @jax.jit
    def kernels(params):
        h = deq_fn(params["deq"], X)
        theta = nt.empirical_ntk_fn(
            apply_fn, vmap_axes=0, implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION
        )
        return h @ h.T / width, theta(X, None, params)

    for seed in range(seeds):
        network = Network(width, activation, nnx.Rngs(seed))
        if not seed:
            apply_fn, _ = functional(network)
            deq_fn, _ = functional(network.deq)
        found = kernels(functional(network)[1])
        for errors, kernel, right in zip((nngp, ntk), found, limit, strict=True):
            errors.append(np.linalg.norm(kernel - right) / np.linalg.norm(right))
    return np.mean(nngp), np.mean(ntk)


def slopes(activation, widths, seeds):
    distance = [errors(activation, width, seeds) for width in widths]
    return distance, np.polyfit(np.log(widths), np.log(distance), 1)[0]


@pytest.mark.slow
def test_the_kernels_of_small_networks_approach_the_limit():
    distance, slope = slopes("relu", [32, 128, 512], 12)
    assert (np.abs(slope + 0.5) < 0.2).all(), (distance, slope)
    assert max(distance[-1]) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_the_kernels_of_wide_networks_approach_the_limit(activation):
    distance, slope = slopes(activation, [128, 256, 512, 1024, 2048], 24)
    assert (np.abs(slope + 0.5) < 0.1).all(), (distance, slope)
    assert max(distance[-1]) < 0.08


@pytest.mark.slow
def test_depth_first_and_width_first_limits_agree():
    """Tied networks of finite depth and width: along either axis first to the same kernel."""
    limit = np.asarray(exact("relu").nngp)
    phi = nt_deq.activations.ACTIVATIONS["relu"]
    start = X @ X.T / 4 + 0.2**2
    infinite, k = {}, start
    for depth in range(1, 33):  # width first: the kernel of an explicit network of that depth
        d = jnp.diag(k)
        k = 0.7**2 * phi.dual(d[:, None], d[None, :], k)[0] + start
        infinite[depth] = np.asarray(phi.dual(jnp.diag(k)[:, None], jnp.diag(k)[None, :], k)[0])
    np.testing.assert_allclose(infinite[32], limit, rtol=1e-5)

    def finite(depth, width, seed):
        deq = DEQ(4, width, W_std=0.7, b_std=0.2, rngs=nnx.Rngs(seed))
        z = deq.inject(X)
        for _ in range(depth):
            z = deq.step(z, X)
        h = jax.nn.relu(z)
        return np.asarray(h @ h.T / width), np.asarray(deq(X) @ deq(X).T / width)

    def distance(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(limit)

    for depth in (1, 4, 16):  # at every depth the tied network approaches the untied kernel
        found = [np.mean([finite(depth, w, s)[0] for s in range(8)], 0) for w in (64, 2048)]
        assert distance(found[1], infinite[depth]) < 0.03
    for seed in range(3):  # depth first: every network approaches its own equilibrium
        to_equilibrium = [distance(*finite(depth, 256, seed)) for depth in (1, 4, 16)]
        assert to_equilibrium[0] > 5 * to_equilibrium[1] > 25 * to_equilibrium[2]
    equilibria = np.mean([finite(1, 2048, s)[1] for s in range(8)], 0)
    assert distance(equilibria, limit) < 0.03
    assert distance(infinite[1], limit) > 0.05
