"""Expectations at every variance: against quadrature in polar coordinates, and Hermite series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadrature import by_polar_coordinates

from nt_deq import deq_kernel
from nt_deq.activations import hermite
from nt_deq.activations.activation import ACTIVATIONS
from nt_deq.activations.expansion import Derivative

MIXTURES = ("tanh", "sigmoid", "softplus", "silu")
LARGE = [(k, k * ratio, rho) for k in (30.0, 1e4, 1e12) for ratio, rho in ((1, 0.3), (1e-3, -0.9))]
NEAR = [(k, k, sign * (1 - gap)) for k, gap in ((30.0, 1e-3), (1e4, 1e-6)) for sign in (1, -1)]


def derivatives(fn, order):
    """A function and its derivatives, as programs."""
    return [jax.jit(fn), *(derivatives(Derivative(fn), order - 1) if order else ())]


def at(points):
    """`(k1, k2, ρ)` to `k1`, `k2` and the covariance."""
    k1, k2, rho = np.array(points).T
    return [jnp.asarray(a) for a in (k1, k2, rho * np.sqrt(k1 * k2))]


@pytest.mark.parametrize("name", MIXTURES)
def test_large_variances_and_nearly_equal_inputs(x64, name):
    activation = ACTIVATIONS[name]
    f, slope, bend = derivatives(activation.fn, 2)
    k1, k2, c = at(LARGE + NEAR)
    value, pull = jax.vjp(jax.jit(lambda *at: activation.dual(*at)[0]), k1, k2, c)
    by_k1, by_k2, by_c = pull(jnp.ones_like(value))
    pairs = {"V": (f, f), "k1": (bend, f), "k2": (f, bend), "c": (slope, slope)}
    exact = {
        of: np.array([by_polar_coordinates(*pair, *point) for point in LARGE + NEAR])
        for of, pair in pairs.items()
    }
    eps = jnp.finfo(jnp.float64).eps
    size = jnp.sqrt(activation.dual_diagonal(k1)[0] * activation.dual_diagonal(k2)[0])
    assert np.max(np.abs(value - exact["V"]) / size) < 64 * eps
    # Rounding of the covariance moves a derivative by its relative slope, 1/(1 - |ρ|) at most.
    bound = 64 * eps / (1 - np.abs(np.array(LARGE + NEAR)[:, 2]))
    # And E[φ''(u) φ(u')] of an odd φ is 1/√k of its parts in u > 0 and u < 0, by quadrature.
    by_parts = bound + 4 * eps * jnp.sqrt(jnp.maximum(k1, k2))
    assert np.all(np.abs(by_k1 - exact["k1"] / 2) * k1 / size < by_parts)
    assert np.all(np.abs(by_k2 - exact["k2"] / 2) * k2 / size < by_parts)
    assert np.all(np.abs(by_c / exact["c"] - 1) < bound)


@pytest.mark.parametrize("name", MIXTURES)
def test_series_and_mixture_are_one_function(dtype, name):
    """Small variances alone go by the series, and beside a large one by the mixture."""
    fn, dual = ACTIVATIONS[name].fn, ACTIVATIONS[name].dual
    rng = np.random.default_rng(0)
    k1, k2 = 10.0 ** rng.uniform(-6, 0.6, (2, 500))
    c = rng.uniform(-1, 1, 500) * np.sqrt(k1 * k2)
    small = [jnp.asarray(a, dtype) for a in (k1, k2, c)]
    beside = [jnp.append(a, jnp.asarray(1e3, dtype)) for a in small]
    moments = [hermite.dual_diagonal(fn, k) for k in small[:2]]
    for i, (series, mixture) in enumerate(zip(dual(*small), dual(*beside), strict=True)):
        size = jnp.sqrt(moments[0][i] * moments[1][i])
        # Each sums some hundred terms.
        assert jnp.max(jnp.abs(series - mixture[:-1]) / size) < 24 * jnp.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_hessians_of_the_mixture_are_those_of_the_series(x64, name):
    rng = np.random.default_rng(0)
    k1, k2 = 10.0 ** rng.uniform(-3, 0.6, (2, 20))
    c = rng.uniform(-1, 1, 20) * np.sqrt(k1 * k2)
    fn = ACTIVATIONS[name].fn

    def mixture(k1, k2, c):
        beside = [jnp.stack([a, jnp.full_like(a, 1e3)]) for a in (k1, k2, c)]
        return ACTIVATIONS[name].dual(*beside)[0][0]

    def series(k1, k2, c):
        return hermite.dual(fn, fn, k1, k2, c)[0]

    ours, exact = (
        np.stack(jax.jit(jax.vmap(jax.hessian(f, (0, 1, 2))))(k1, k2, c)) for f in (mixture, series)
    )
    np.testing.assert_allclose(ours, exact, rtol=1e-10, atol=1e-12 * np.abs(exact).max())


def test_both_branches_of_vmap_are_finite():
    """A predicate that vmap makes an array computes both: what is not taken must not be NaN."""
    k = jnp.asarray([1e-3, 1.0, 50.0, 1e6])

    def value_and_slope(k):
        return jnp.stack(jax.value_and_grad(lambda k: ACTIVATIONS["tanh"].dual(k, k, k / 2)[0])(k))

    one = jax.jit(value_and_slope)
    alone = jnp.stack([one(a) for a in k])
    together = jax.jit(jax.vmap(value_and_slope))(k)
    # V hardly moves with a large k: its slope is a difference of terms of the size of V/k.
    error = jnp.abs(together - alone) * jnp.stack([jnp.ones_like(k), k], axis=1)
    assert jnp.max(error / alone[:, :1]) < 32 * jnp.finfo(k.dtype).eps


def test_an_input_nobody_scaled_has_a_kernel(dtype):
    """Features of some hundreds, as tables have them: the equation holds, and so does its slope."""
    x = 300 * jax.random.normal(jax.random.key(0), (6, 4), dtype)
    solution = deq_kernel(x, W_std=1.5, b_std=0.1, activation="tanh")
    k = jnp.diag(solution.nngp)
    by_quadrature = [
        by_polar_coordinates(jnp.tanh, jnp.tanh, float(k[i]), float(k[j]), float(rho))
        for i, j in ((0, 1), (2, 5))
        for rho in [solution.nngp[i, j] / np.sqrt(k[i] * k[j])]
    ]
    s = x @ x.T / 4 + 0.01
    expected = [
        s[i, j] + 2.25 * v for (i, j), v in zip(((0, 1), (2, 5)), by_quadrature, strict=True)
    ]
    ours = [solution.nngp[0, 1], solution.nngp[2, 5]]
    np.testing.assert_allclose(ours, expected, rtol=64 * jnp.finfo(dtype).eps)
    assert jnp.isfinite(solution.ntk).all()
    gradient = jax.grad(lambda w: jnp.sum(deq_kernel(x, W_std=w, activation="tanh").ntk))(1.5)
    assert jnp.isfinite(gradient)
