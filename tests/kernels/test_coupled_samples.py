"""Cells that couple a pair's entries: no block's value or derivative depends on other blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from nt_deq import Anderson, NoEquilibriumError, NotConvergedError, Picard, stax

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


@pytest.mark.parametrize("get", ["nngp", "ntk"])
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


def test_pairs_that_have_not_converged_are_an_error(monkeypatch):
    """Where the inputs' own blocks need fewer steps than their pairs, as those of equal pixels."""
    x = jnp.stack([jnp.ones((5, 2)), -jnp.ones((5, 2)), sequences(1)[0]])
    own = network(1.2, solver=Picard(max_steps=1000))
    steps = next(k for k in range(2, 200) if _solved(x[:2], k))
    with pytest.raises(NotConvergedError, match="pairs did not converge"):
        network(1.2, solver=Picard(max_steps=steps))(x[:2], None, ("nngp", "ntk"))
    assert np.isfinite(own(x[:2], None, "ntk")).all()


def _solved(x, steps):
    """Whether every input's own block is, in so many steps."""
    try:
        network(1.2, solver=Picard(max_steps=steps))(x, None, "nngp")
    except NotConvergedError as error:
        return "pairs" in str(error)
    return True
