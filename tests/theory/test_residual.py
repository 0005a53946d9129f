"""Residual networks without tied weights, against closed forms and neural-tangents' layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from nt_deq import NotConvergedError, stax, theory
from nt_deq.activations import get_activation

X = np.array([[1.0, 2, -1], [0.5, -1, 2], [2, 0, 1]])


@pytest.mark.parametrize("layers", [None, 7])
def test_linear_networks_have_a_closed_form(dtype, layers):
    """`κ = S e^(W²T)` and `Θ = S (1 + W²T) e^(W²T)`, or `(1 + a)^L` with `a = W²T/L`."""
    rate, S = 0.64 * 2.0, X @ X.T / 3
    nngp, ntk = theory.untied_residual_kernels(
        X.astype(dtype), W_std=0.8, T=2.0, layers=layers, activation="identity"
    )
    grown, more = (np.exp(rate), rate)
    if layers is not None:
        grown, more = (1 + rate / layers) ** layers, rate / (1 + rate / layers)
    rtol = 60 * np.finfo(dtype).eps
    np.testing.assert_allclose(nngp, S * grown, rtol=rtol)
    np.testing.assert_allclose(ntk, S * (1 + more) * grown, rtol=rtol)


def test_layers_are_those_of_neural_tangents(x64):
    L, T, W_std, x2 = 3, 1.5, 0.9, X[:2] + 0.1
    branch = stax.serial(stax.Relu(), stax.Dense(1, W_std * (T / L) ** 0.5))
    block = stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), branch), stax.FanInSum())
    network = stax.serial(stax.Dense(1), *[block] * L)[2](X, x2, ("nngp", "ntk"))
    found = theory.untied_residual_kernels(X, x2, W_std=W_std, T=T, layers=L)
    for a, b in zip(found, network, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_many_layers_approach_the_limit(x64):
    """Like `1/L`, also where an input meets itself; and the limit moves as its equation says."""
    setting = {"W_std": 0.9, "activation": "relu"}

    def kernels(T, layers=None):
        return jnp.stack(theory.untied_residual_kernels(X, T=T, layers=layers, **setting))

    (nngp, ntk), velocity = jax.jit(lambda T: jax.jvp(kernels, (T,), (1.0,)))(1.0)
    limit = jnp.stack([nngp, ntk])
    once, twice = kernels(1.0, 200), kernels(1.0, 400)
    np.testing.assert_allclose(2 * twice - once, limit, rtol=1e-5)
    assert jnp.max(jnp.abs(twice - limit)) > 1e-4
    k = jnp.diag(nngp)
    off = ~np.eye(3, dtype=bool)
    moment, slope = get_activation("relu").dual(k[:, None], k[None, :], nngp)
    np.testing.assert_allclose(velocity[0][off], 0.81 * moment[off], rtol=1e-9)
    np.testing.assert_allclose(velocity[1][off], 0.81 * (moment + slope * ntk)[off], rtol=1e-9)
    np.testing.assert_allclose(k, np.exp(0.405) * np.sum(X**2, 1) / 3, rtol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_kernel_says_so():
    x = random.normal(random.key(0), (2, 3))
    with pytest.raises(NotConvergedError, match="not found until T=1000"):
        theory.untied_residual_kernels(x, W_std=1.0, T=1000.0, layers=1000)
    for argument, message in (({"T": 0.0}, "T=0.0 must be"), ({"layers": 0}, "layers=0 must be")):
        with pytest.raises(ValueError, match=message):
            theory.untied_residual_kernels(x, W_std=1.0, **argument)
