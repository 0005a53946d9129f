"""Trained networks against neural-tangents, dense algebra and finite networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from nt_deq import NotPositiveDefiniteError, gp, nt, stax
from nt_deq._jax import enable_x64

NETWORK = stax.serial(stax.DEQ(1, 0.8, b_std=0.2), stax.Dense(1))
KERNEL_FN = NETWORK[2]


def data(outputs=None):
    rng = np.random.default_rng(0)
    y = rng.normal(size=8 if outputs is None else (8, outputs))
    return rng.normal(size=(8, 3)), y, rng.normal(size=(3, 3))


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize(("noise", "t"), [(0.0, 7.0), (0.3, 7.0), (0.3, 0.0)])
def test_it_is_neural_tangents_at_finite_times(x64, noise, t):
    x, y, x_test = data(2)
    reference = nt.predict.gradient_descent_mse_ensemble(
        KERNEL_FN, x, y, diag_reg=noise, diag_reg_absolute_scale=True
    )
    wanted = reference(t=t, x_test=x_test, get="ntk", compute_cov=True)
    assert not isinstance(wanted, dict)
    found = gp.TrainedEnsemble(KERNEL_FN, x, y, noise).predict(x_test, t)
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-11)
    np.testing.assert_allclose(found.covariance, wanted.covariance, atol=1e-10)


def test_it_is_dense_algebra_in_the_end(x64):
    x, y, x_test = data()
    both = np.concatenate([x, x_test])
    K, T = (np.asarray(KERNEL_FN(both, None, get)) for get in ("nngp", "ntk"))
    ensemble = gp.TrainedEnsemble(KERNEL_FN, x, y, 0.1)
    A = T[8:, :8] @ np.linalg.inv(T[:8, :8] + 0.1 * np.eye(8))
    residual = np.concatenate([-A, np.eye(3)], axis=1)  # of f* - A f, which stays
    mean, covariance = ensemble.predict(x_test)
    np.testing.assert_allclose(mean, A @ y, rtol=1e-10)
    np.testing.assert_allclose(covariance, residual @ K @ residual.T, atol=1e-11)
    late = ensemble.predict(x_test, 1e6)
    np.testing.assert_allclose(late.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(late.covariance, covariance, atol=1e-11)

    # It goes through the targets that it was trained on, without noise.
    exact = gp.TrainedEnsemble(KERNEL_FN, x, y).predict(x)
    np.testing.assert_allclose(exact.mean, y, atol=1e-9)
    np.testing.assert_allclose(exact.covariance, 0, atol=1e-9)


@pytest.mark.slow
def test_it_is_the_scatter_of_finite_networks(x64):
    """2000 networks of width 1000, one hidden layer, trained by gradient descent on all weights."""
    x, y, x_test = data()
    width, rate, steps, n = 1000, 0.4, 60, 2000
    init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(width), stax.Erf(), stax.Dense(1))

    def train(key):
        def loss(p):
            return jnp.mean((apply_fn(p, x)[:, 0] - y) ** 2) / 2

        def step(p, _):
            return jax.tree.map(lambda a, g: a - rate * g, p, jax.grad(loss)(p)), None

        p, _ = jax.lax.scan(step, init_fn(key, (-1, 3))[1], length=steps)
        return apply_fn(p, x_test)[:, 0]

    draws = np.asarray(jax.jit(lambda k: jax.lax.map(train, k))(random.split(random.key(0), n)))
    mean, covariance = gp.TrainedEnsemble(kernel_fn, x, y).predict(x_test, rate * steps)
    spread = np.sqrt(np.diagonal(covariance))
    # Five standard errors, with 1/width and the finite rate beside them.
    assert (np.abs(draws.mean(0) - mean) < 5 * spread / np.sqrt(n) + 0.02).all()
    limit = (5 * np.sqrt(2 / n) + 0.02) * np.multiply.outer(spread, spread)
    assert (np.abs(np.cov(draws.T) - covariance) < limit).all()


def test_samples_have_its_moments_and_times_may_be_traced(x64):
    x, y, x_test = data(2)
    ensemble = gp.TrainedEnsemble(KERNEL_FN, x, y)
    mean, covariance = map(np.asarray, ensemble.predict(x_test, 5.0))
    draws = np.asarray(ensemble.sample(random.key(0), x_test, 20_000, 5.0))
    spread = np.sqrt(np.diagonal(covariance))
    assert (np.abs(draws.mean(0) - mean) < 5 * spread[:, None] / np.sqrt(20_000)).all()
    first = np.cov(draws[..., 0].T)
    limit = 5 * np.sqrt(2 / 20_000) * np.multiply.outer(spread, spread)
    assert (np.abs(first - covariance) < limit).all()

    by_time = jax.jit(jax.vmap(lambda t: ensemble.predict(x_test, t).mean))
    times = np.array([0.0, 5.0, np.inf])
    found = by_time(times)
    for t, wanted in zip(times, found, strict=True):
        np.testing.assert_allclose(ensemble.predict(x_test, t).mean, wanted, atol=1e-11)


def test_derivatives_are_those_of_finite_differences(x64):
    x, y, x_test = data()

    @jax.jit
    def value(p):
        kernel_fn = stax.serial(stax.DEQ(1, p[0], b_std=0.2), stax.Dense(1))[2]
        mean, covariance = gp.TrainedEnsemble(kernel_fn, x, y, p[1]).predict(x_test, p[2])
        return jnp.sum(mean**2) + jnp.sum(covariance**2)

    p = jnp.array([0.8, 0.1, 5.0])
    expected = [(value(p + e) - value(p - e)) / 2e-5 for e in 1e-5 * jnp.eye(3)]
    np.testing.assert_allclose(jax.jit(jax.jacrev(value))(p), expected, rtol=1e-6)


def test_float32_is_computed_in_float64(dtype):
    x, y, x_test = data()
    mean, covariance = gp.TrainedEnsemble(KERNEL_FN, x, y).predict(x_test)
    with enable_x64(True):
        exact = gp.TrainedEnsemble(KERNEL_FN, x, y).predict(x_test)
    assert mean.dtype == covariance.dtype == dtype
    np.testing.assert_allclose(mean, exact.mean, rtol=2e-7)
    np.testing.assert_allclose(covariance, exact.covariance, rtol=2e-7, atol=1e-12)


def test_a_singular_kernel_has_no_end_and_every_other_time(x64):
    """Of an input that is there twice: in the end only targets that agree can be met."""
    x, y, x_test = data()
    ensemble = gp.TrainedEnsemble(KERNEL_FN, np.tile(x[:4], (2, 1)), y)
    with pytest.raises(NotPositiveDefiniteError, match="drop inputs that are there twice"):
        ensemble.predict(x_test)
    assert np.isnan(jax.jit(lambda t: ensemble.predict(x_test, t).mean)(np.inf)).all()
    # Their mean, of half the number of targets, at the same time for each.
    once = gp.TrainedEnsemble(KERNEL_FN, x[:4], (y[:4] + y[4:]) / 2)
    for found, wanted in zip(ensemble.predict(x_test, 9.0), once.predict(x_test, 9.0), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused():
    x, y, x_test = data()
    ensemble = gp.TrainedEnsemble(KERNEL_FN, x, y)
    with pytest.raises(ValueError, match="t=-1 must be a time of training"):
        ensemble.predict(x_test, -1)
    with pytest.raises(ValueError, match="t=nan must be a time"):
        ensemble.predict(x_test, float("nan"))
    with pytest.raises(ValueError, match="noise=-1"):
        gp.TrainedEnsemble(KERNEL_FN, x, y, -1)
    with pytest.raises(ValueError, match="n=0"):
        ensemble.sample(random.key(0), x_test, 0)
    with pytest.raises(ValueError, match=r"x_test has inputs of shape \(2,\)"):
        ensemble.predict(x_test[:, :2])
