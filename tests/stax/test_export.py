"""What it compiles to: for every platform, without callbacks, with exact matrix products."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import export, random

import nt_deq
from nt_deq import Anderson, Broyden, ImplicitAdjoint, Newton, Picard, stax
from nt_deq.activations import ACTIVATIONS

PLATFORMS = ("cpu", "cuda", "tpu")


def assert_runs_everywhere(fn, *args):
    """Lowers for every platform; `export` refuses host callbacks and unstable custom calls."""
    text = export.export(jax.jit(fn), platforms=PLATFORMS)(*args).mlir_module()
    assert not re.findall(r"callback|lapack", text)
    assert "f64" not in text
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    for product in products:
        assert "HIGHEST" in product, product
    return products


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_deq_kernel(activation):
    x = jnp.ones((4, 3))
    products = assert_runs_everywhere(
        lambda x, w: nt_deq.deq_kernel(x, W_std=w, activation=activation)[:2], x, 0.5
    )
    assert products


def test_deq_kernel_in_tiles():
    x = jnp.ones((300, 3))
    assert_runs_everywhere(lambda x, w: nt_deq.deq_kernel(x, W_std=w)[:2], x, 0.5)


@pytest.mark.parametrize("solver", [Newton(), Picard()], ids=repr)
def test_kernel_fn_and_its_gradient(solver):
    x = jnp.ones((4, 3))

    def loss(x):
        layer = stax.serial(stax.DEQ(8, 0.5, solver=solver), stax.Dense(1))
        return layer[2](x, None, "ntk").sum()

    assert_runs_everywhere(jax.value_and_grad(loss), x)


def test_a_convolutional_cell():
    cell = stax.serial(stax.Erf(), stax.Conv(8, (3, 3), padding="SAME", W_std=0.7))
    inject = stax.Conv(8, (3, 3), padding="SAME")
    kernel_fn = stax.serial(stax.FixedPoint(cell, inject, Anderson()), stax.GlobalAvgPool())[2]
    x = jnp.ones((2, 4, 4, 1))
    assert_runs_everywhere(lambda x: kernel_fn(x, None, ("nngp", "ntk")).ntk, x)


def test_the_finite_network_and_one_step_of_training():
    x, y = jnp.ones((4, 3)), jnp.ones((4, 1))
    init_fn, apply_fn, _ = stax.DEQ(8, 0.5)
    assert_runs_everywhere(apply_fn, init_fn(random.key(0), x.shape)[1], x)

    class Network(nnx.Module):
        def __init__(self):
            self.deq = nt_deq.flax.DEQ(3, 8, W_std=0.5, rngs=nnx.Rngs(0))
            self.readout = nt_deq.flax.Dense(8, 1, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.readout(self.deq(x))

    module_fn, state = nt_deq.flax.functional(Network())
    leaves, tree = jax.tree.flatten(state)
    optimizer = optax.sgd(0.1)

    def step(leaves, x, y):
        def loss(leaves):
            return jnp.mean((module_fn(tree.unflatten(leaves), x) - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(leaves)
        updates, _ = optimizer.update(gradient, optimizer.init(leaves))
        return value, optax.apply_updates(leaves, updates)

    assert assert_runs_everywhere(step, leaves, x, y)


def test_a_convolutional_network_with_accelerated_solvers():
    deq = nt_deq.flax.DEQ(
        3, 4, W_std=0.5, kernel_size=(3, 3), solver=Anderson(window=2),
        adjoint=ImplicitAdjoint(Broyden(terms=2)), rngs=nnx.Rngs(0),
    )  # fmt: skip
    module_fn, state = nt_deq.flax.functional(deq)
    leaves, tree = jax.tree.flatten(state)

    def gradient(leaves, x):
        return jax.grad(lambda leaves: module_fn(tree.unflatten(leaves), x).sum())(leaves)

    assert assert_runs_everywhere(gradient, leaves, jnp.ones((2, 4, 4, 3)))
