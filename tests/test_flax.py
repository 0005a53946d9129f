"""The Flax modules: the function of `stax.DEQ`, trained, linearised and checked."""

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import optax
import pytest
from flax import nnx
from jax import random

import nt_deq
from nt_deq import NotConvergedError, stax
from nt_deq.flax import DEQ, Dense, functional


class Network(nnx.Module):
    """A DEQ with a readout, as a user writes it."""

    def __init__(self, d, width, out, rngs, **kwargs):
        self.deq = DEQ(d, width, rngs=rngs, **kwargs)
        self.readout = Dense(width, out, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.deq(x))


def inputs(n=4, d=5, seed=0):
    return random.normal(random.key(seed), (n, d))


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_it_is_the_function_of_stax(dtype, activation):
    x = inputs()
    init_fn, apply_fn, _ = stax.serial(
        stax.DEQ(40, 0.7, 1.3, 0.2, activation=activation), stax.Dense(2, 1.5, 0.3)
    )
    params = init_fn(random.key(0), x.shape)[1]
    (((W, _), (U, b)), (V, c)) = params
    deq = DEQ(5, 40, W_std=0.7, U_std=1.3, b_std=0.2, activation=activation, rngs=nnx.Rngs(1))
    readout = Dense(40, 2, W_std=1.5, b_std=0.3, rngs=nnx.Rngs(1))
    for module, name, value in (
        (deq.hidden, "W", W),
        (deq.inject, "W", U),
        (deq.inject, "b", b[0]),
        (readout, "W", V),
        (readout, "b", c[0]),
    ):
        assert getattr(module, name).shape == value.shape
        setattr(module, name, nnx.Param(value))
    h = deq(x)
    assert h.dtype == dtype
    eps = jnp.finfo(dtype).eps
    expected = stax.DEQ(40, 0.7, 1.3, 0.2, activation=activation)[1](params[0], x)
    np.testing.assert_allclose(h, expected, atol=40 * eps)
    np.testing.assert_allclose(readout(h), apply_fn(params, x), atol=100 * eps)
    np.testing.assert_allclose(deq.activation.fn(deq.equilibrium(x)), h, rtol=1e-6)


def test_parameters_are_standard_normal():
    module = Network(300, 400, 10, nnx.Rngs(0), W_std=0.5, b_std=1.0)
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sorted(leaf.shape for leaf in leaves) == [(300, 400), (400,), (400, 10), (400, 400)]
    for leaf in leaves:
        assert abs(leaf.mean()) < 5 / leaf.size**0.5
        assert abs(leaf.var() - 1) < 5 * (2 / leaf.size) ** 0.5
    other = Network(300, 400, 10, nnx.Rngs(1), W_std=0.5, b_std=1.0)
    assert not np.allclose(other.deq.hidden.W[...], module.deq.hidden.W[...])


@pytest.mark.smoke
def test_functional_serves_neural_tangents(x64):
    x = inputs()
    module = Network(5, 64, 1, nnx.Rngs(0), W_std=0.6, b_std=0.1, activation="erf")
    apply_fn, params = functional(module)
    np.testing.assert_array_equal(apply_fn(params, x), module(x))
    contraction, products = (
        nt.empirical_ntk_fn(apply_fn, vmap_axes=0, implementation=i)(x, None, params)
        for i in (
            nt.NtkImplementation.JACOBIAN_CONTRACTION,
            nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
        )
    )
    np.testing.assert_allclose(contraction, products, rtol=1e-10)
    linear = nt.linearize(apply_fn, params)
    moved = jax.tree.map(lambda p: p + 1e-3 * jnp.cos(p), params)
    np.testing.assert_allclose(linear(params, x), module(x), rtol=1e-12)
    error = np.abs(linear(moved, x) - apply_fn(moved, x)).max()
    assert error < 1e-2 * np.abs(apply_fn(moved, x) - module(x)).max()
    assert jax.tree.leaves(params)[0] is not jax.tree.leaves(moved)[0]
    np.testing.assert_array_equal(apply_fn(params, x), module(x))


def test_its_kernels_approach_the_infinite_ones():
    """The empirical NTK of one network of width 1500; its fluctuation is about 2/√1500."""
    x = inputs(3)
    module = Network(5, 1500, 1, nnx.Rngs(0), W_std=0.6, b_std=0.1)
    apply_fn, params = functional(module)
    ntk = nt.empirical_ntk_fn(apply_fn, vmap_axes=0)(x, None, params)
    exact = stax.serial(stax.DEQ(1, 0.6, 1.0, 0.1), stax.Dense(1))[2](x, None, "ntk")
    assert np.abs(ntk - exact).max() < 0.1 * np.abs(exact).max()


def test_it_trains():
    x, y = inputs(16), jnp.sin(inputs(16)[:, :1])
    module = Network(5, 64, 1, nnx.Rngs(0), W_std=0.6, activation="gelu")
    apply_fn, params = functional(module)
    optimizer = optax.sgd(1.0)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: 0.5 * jnp.mean((apply_fn(p, x) - y) ** 2))(
            params
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses[-1] < 0.05 * losses[0]


def test_a_warm_start_changes_nothing(x64):
    x = inputs()
    deq = DEQ(5, 32, W_std=0.7, rngs=nnx.Rngs(0))
    z = deq.equilibrium(x)
    np.testing.assert_allclose(deq(x, z + 0.1), deq(x), atol=1e-13)


def test_no_equilibrium_is_an_error_or_nan():
    deq = DEQ(5, 100, W_std=4.0, rngs=nnx.Rngs(0))
    with pytest.raises(NotConvergedError, match="take a smaller W_std"):
        deq(inputs())
    assert np.isnan(nnx.jit(lambda m, x: m(x))(deq, inputs())).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **k: DEQ(5, 8, W_std=-1.0, **k), r"W_std=-1\.0 has to be"),
        (lambda **k: DEQ(5, 8, W_std=0.5, b_std=-1.0, **k), r"b_std=-1\.0 has to be"),
        (lambda **k: DEQ(0, 8, W_std=0.5, **k), "in_features=0 has to be an integer"),
        (lambda **k: DEQ(5, 0, W_std=0.5, **k), "width=0 has to be an integer"),
        (lambda **k: DEQ(5, 8, W_std=0.5, activation="x", **k), "activation='x' is unknown"),
        (lambda **k: Dense(5, -1, **k), "out_features=-1 has to be an integer"),
        (
            lambda **k: DEQ(5, 8, W_std=0.5, **k)(jnp.ones((2, 4))),
            r"x has shape \(2, 4\).*5 features",
        ),
        (lambda **k: Dense(5, 8, **k)(jnp.ones((2, 4))), r"x has shape \(2, 4\).*5 features"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))
    assert nt_deq.flax.DEQ is DEQ
