"""What is passed by mistake gets an error that names the argument and the remedy."""

from fractions import Fraction

import jax
import numpy as np
import pytest

from nt_deq import KernelRegression, deq_kernel, gp, stax, theory

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
NETWORK = stax.serial(stax.DEQ(8, 1.0), stax.Dense(1))

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("value", [None, "1", Fraction(1, 2), 1j])
def test_standard_deviations_that_are_no_numbers(value):
    for name in ("W_std", "b_std"):
        with pytest.raises(TypeError, match=rf"{name}=.* is not a real number; pass a standard"):
            deq_kernel(X, **{"W_std": 1.0, name: value})
    with pytest.raises(TypeError, match=r"W_std=.* is not a real number"):
        stax.DEQ(8, value)
    with pytest.raises(TypeError, match=r"W_std=.* is not a real number"):
        theory.local_contraction(X, W_std=value)


@pytest.mark.parametrize(
    "x",
    [
        X + 1j,
        np.array([["a"]]),
        np.array([[Fraction(1, 2)]], object),
        jax.random.key(0),
        jax.random.split(jax.random.key(0), 4)[:, None],
        None,
    ],
)
def test_inputs_that_are_no_numbers(x):
    with pytest.raises(TypeError, match=r"x1 is made of .*; pass real numbers"):
        deq_kernel(x, W_std=1.0)
    with pytest.raises(TypeError, match=r"x is made of .*; pass real numbers"):
        KernelRegression(NETWORK[2]).fit(x, np.arange(4.0))


@pytest.mark.parametrize(
    "y", [1j * np.arange(4), np.array([1, "a", None, 2], object), list("abcd")]
)
def test_targets_that_are_no_numbers(y):
    with pytest.raises(TypeError, match=r"y is made of .*; pass real numbers"):
        KernelRegression(NETWORK[2]).fit(X, y)
    with pytest.raises(TypeError, match=r"y is made of .*; pass real numbers"):
        gp.GaussianProcess(NETWORK[2], X, y, 0.1).log_marginal_likelihood()


def test_a_network_in_the_place_of_its_kernel():
    with pytest.raises(TypeError, match=r"whole network .* network\[2\]"):
        KernelRegression(NETWORK)
    with pytest.raises(TypeError, match=r"whole network .* network\[2\]"):
        gp.GaussianProcess(NETWORK, X, np.arange(4.0), 0.1).log_marginal_likelihood()
    with pytest.raises(TypeError, match=r"kernel_fn='ntk' is not a function"):
        KernelRegression("ntk")


@pytest.mark.parametrize("layer", [None, stax.Dense, stax.Dense(8)[2]])
def test_what_is_no_layer(layer):
    with pytest.raises(TypeError, match=r"cell=.* is not a layer"):
        stax.FixedPoint(layer, stax.Dense(8))
    with pytest.raises(TypeError, match=r"inject=.* is not a layer"):
        stax.FixedPoint(stax.Dense(8), layer)


@pytest.mark.parametrize("noise", [None, "a", 1j, -1.0, np.inf, np.ones(2)])
def test_noise_that_is_no_variance(noise):
    with pytest.raises(ValueError, match=r"noise=.* must be a variance: one finite number"):
        gp.GaussianProcess(NETWORK[2], X, np.arange(4.0), noise).log_marginal_likelihood()
    with pytest.raises(ValueError, match=r"relative_noise=.* must be a variance"):
        KernelRegression(NETWORK[2], relative_noise=noise)


def test_no_inputs():
    for x1, x2, name in ((X[:0], None, "x1"), (X, X[:0], "x2")):
        with pytest.raises(ValueError, match=rf"{name} has shape \(0, 3\)"):
            NETWORK[2](x1, x2, "ntk")
        with pytest.raises(ValueError, match=rf"{name} has shape \(0, 3\)"):
            deq_kernel(x1, x2, W_std=1.0)


def test_a_store_without_a_name():
    with pytest.raises(ValueError, match=r"store='' names no directory"):
        KernelRegression(NETWORK[2], store="")


def test_a_nonlinearity_beyond_its_range():
    kernel_fn = stax.serial(
        stax.Dense(1, 100.0), stax.Nonlinearity(jax.nn.hard_swish), stax.Dense(1)
    )[2]
    with pytest.raises(RuntimeError, match=r"expectations are not known in float32"):
        kernel_fn(X, None, "ntk")
    assert np.isnan(jax.jit(lambda x: kernel_fn(x, None, "ntk"))(X)).any()


def test_targets_of_any_scale():
    plain = KernelRegression(NETWORK[2]).fit(X, np.arange(4.0)).predict(X)
    for scale in (1e300, 1e-300):
        scaled = KernelRegression(NETWORK[2]).fit(X, scale * np.arange(4.0)).predict(X)
        np.testing.assert_allclose(scaled / scale, plain, rtol=1e-9, atol=1e-12)
