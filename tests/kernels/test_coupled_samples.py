"""Cells that couple a pair's entries: no block's value or derivative depends on other blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from marks import slow_except

from nt_deq import (
    Anderson,
    Chebyshev,
    Newton,
    NoEquilibriumError,
    NotConvergedError,
    Picard,
    deq_kernel,
    stax,
)
from nt_deq.kernels import tied_cell

CONV = dict(filter_shape=(3,), padding="CIRCULAR")


def network(W_std, phi="erf", solver=None):
    """The kernel of a convolutional equilibrium of sequences."""
    cell = stax.serial(stax.Nonlinearity(phi), stax.Conv(4, W_std=W_std, **CONV))
    return stax.FixedPoint(cell, stax.Conv(4, b_std=0.1, **CONV), solver)[2]


def sequences(n, size=1.0):
    return size * random.normal(random.key(0), (n, 5, 2))


def slopes(x, W_std, get, phi="erf"):
    """The derivative in `W_std` of the entries of the first input with itself."""

    def first(W_std):
        return getattr(network(W_std, phi)(x, None, (get,)), get)[0, 0].sum()

    return jax.jit(jax.value_and_grad(first))(W_std)


@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_a_large_neighbour_does_not_change_a_derivative(get):
    x = sequences(2)
    alone = slopes(x[:1] / 300, 0.9, get)
    beside = slopes(x * jnp.array([1 / 300, 1.0])[:, None, None], 0.9, get)
    np.testing.assert_allclose(beside, alone, rtol=2e-5)  # it is 1e-5 between two solves


@pytest.mark.parametrize("get", slow_except(["ntk"], ["nngp", "ntk"]))
def test_a_neighbour_without_an_equilibrium_does_not_change_a_derivative(get):
    """GELU is steep where it is large: at this W_std small inputs have an equilibrium."""
    x, W_std = sequences(2, 0.1), 1.45
    large = x.at[1].multiply(300.0)
    alone = slopes(x[:1], W_std, get, "gelu")
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(slopes(large, W_std, get, "gelu"), alone, rtol=2e-5)
    k = jax.jit(lambda x: network(W_std, "gelu")(x, None, (get,)))(large)
    missing = np.isnan(getattr(k, get)).any(axis=(2, 3))
    np.testing.assert_array_equal(missing, [[False, True], [True, True]])
    with pytest.raises((NoEquilibriumError, NotConvergedError), match="row 1 of x1"):
        network(W_std, "gelu")(large, None, get)


def test_derivatives_near_criticality(x64):
    """ReLU is linear in the kernel, so that K* = S/(1 - W²/2) on a torus of equal pixels."""
    W_std = (2 * 0.999) ** 0.5
    x = jnp.ones((1, 5, 2))

    def first(W_std):
        return network(W_std, "relu")(x, None, "nngp")[0, 0, 0, 0]

    value, slope = jax.value_and_grad(first)(W_std)
    np.testing.assert_allclose(value, 1.01 / (1 - W_std**2 / 2), rtol=1e-9)
    np.testing.assert_allclose(slope, value * W_std / (1 - W_std**2 / 2), rtol=1e-6)


@pytest.mark.parametrize("solver", [Picard(max_steps=3), Anderson(max_steps=3)])
def test_too_few_steps_are_not_a_missing_equilibrium(solver):
    with pytest.raises(NotConvergedError, match="did not converge in 3 steps"):
        network(1.1, solver=solver)(sequences(15), None, "ntk")


def test_pairs_that_have_not_converged_are_an_error():
    """Where the inputs' own blocks need fewer steps than their pairs, as those of equal pixels."""
    x = jnp.stack([jnp.ones((5, 2)), -jnp.ones((5, 2))])
    own = network(1.2, solver=Picard(max_steps=1000))
    steps = next(k for k in range(2, 200) if _solved(x, k))
    with pytest.raises(NotConvergedError, match="pairs did not converge"):
        network(1.2, solver=Picard(max_steps=steps))(x, None, ("nngp", "ntk"))
    assert np.isfinite(own(x, None, "ntk")).all()


def _solved(x, steps):
    """Whether every input's own block is, in so many steps."""
    try:
        network(1.2, solver=Picard(max_steps=steps))(x, None, "nngp")
    except NotConvergedError as error:
        return "pairs" in str(error)
    return True


def test_the_finite_cell_is_run_once_per_shape(monkeypatch):
    """Whether z bypasses the weights does not depend on the batch, nor is it asked again."""
    shapes = []
    monkeypatch.setattr(
        tied_cell, "check_no_bypass", lambda layer, init, apply, shape: shapes.append(shape)
    )
    cell = stax.serial(stax.Erf(), stax.Dense(4, 0.5))
    layer = stax.FixedPoint(cell, stax.Dense(4))[2]
    for n in (2, 3, 3):
        layer(random.normal(random.key(n), (n, 3)), None, "nngp")
    assert shapes == [(2, 4)]


@pytest.mark.parametrize("width", [1, 8])
def test_a_bypass_is_seen_whatever_the_standard_deviations(width):
    def kernel(W_std):
        branch = stax.serial(stax.Erf(), stax.Dense(width, W_std))
        cell = stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), branch), stax.FanInSum())
        inject = stax.Dense(width)
        return stax.FixedPoint(cell, inject)[2](jnp.ones((1, 3)), None, "nngp")

    for transformed in (kernel, jax.jit(kernel), jax.grad(lambda w: kernel(w).sum())):
        with pytest.raises(ValueError, match="skip connection"):
            transformed(0.5)


@pytest.mark.parametrize("solver", [Newton(), Chebyshev()])
def test_a_solver_of_vectors_serves_images_too(solver):
    """What is for independent entries is not for images, where the layer chooses by itself."""
    x = random.normal(random.key(0), (2, 3, 3, 2))
    ours = stax.DEQ(4, 0.7, solver=solver)[2](x, None, "ntk")
    np.testing.assert_array_equal(ours, stax.DEQ(4, 0.7)[2](x, None, "ntk"))


def test_a_neighbour_without_an_equilibrium_does_not_change_a_dense_derivative():
    x = jnp.array([[0.1, 0.2], [-0.2, 0.1], [40.0, 50.0]])

    def first(W_std, x):
        k = stax.DEQ(4, W_std, activation="gelu")[2](x, None, ("nngp", "ntk"))
        solution = deq_kernel(x, W_std=W_std, activation="gelu")
        return (k.nngp + k.ntk + solution.nngp + solution.ntk)[:2, :2].sum()

    alone = jax.jit(jax.value_and_grad(first))(1.45, x[:2])
    beside = jax.jit(jax.value_and_grad(first))(1.45, x)
    np.testing.assert_allclose(beside, alone, rtol=1e-6)
    assert np.isnan(jax.jit(lambda x: deq_kernel(x, W_std=1.45, activation="gelu").ntk)(x)[2]).all()
