"""Likelihood, leave-one-out, posterior and fits against dense algebra and scikit-learn."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.test_util import check_grads
from scipy import optimize, stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct

from nt_deq import NoEquilibriumError, deq_kernel, gp, stax
from nt_deq._jax import enable_x64
from nt_deq.activations import ACTIVATIONS
from nt_deq.gp import matrices
from nt_deq.regression import NotPositiveDefiniteError

POINT = {"W_std": 0.9, "b_std": 0.4, "noise": 0.2}
W_BOUND = {"W_std": (0.0, 2**0.5)}


def make_kernel(p, activation="relu"):
    layer = stax.DEQ(1, p["W_std"], b_std=p["b_std"], activation=activation)
    return stax.serial(layer, stax.Dense(1))[2]


def make_gelu(p):
    return make_kernel(p, "gelu")


def data(n, outputs=None, d=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, rng.normal(size=n if outputs is None else (n, outputs))


def covariance(p, x, get="nngp", make=make_kernel):
    """`K + noise` in NumPy."""
    return np.asarray(make(p)(jnp.asarray(x), None, get)) + p["noise"] * np.eye(len(x))


def sample(n, outputs, p=POINT, d=3, seed=0):
    """Targets drawn from the model."""
    x = data(n, d=d, seed=seed)[0]
    root = np.linalg.cholesky(covariance(p, x))
    return x, root @ np.random.default_rng(seed + 1).normal(size=(n, outputs))


@pytest.mark.smoke
@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize("outputs", [None, 3])
def test_the_likelihood_is_that_of_a_multivariate_normal(x64, get, outputs):
    x, y = data(12, outputs)
    found = gp.GaussianProcess(
        make_kernel(POINT), x, y, POINT["noise"], get
    ).log_marginal_likelihood()
    normal = stats.multivariate_normal(cov=covariance(POINT, x, get))
    expected = sum(normal.logpdf(column) for column in y.reshape(12, -1).T)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_likelihood_gradient_and_posterior_are_scikit_learns(x64):
    """Of a linear model, which scikit-learn has: `K = W_std² x·x'/d + b_std²`."""
    x, y = data(15, d=4)
    variances = np.array([1.7 / 4, 0.3])
    kernel = ConstantKernel(variances[0]) * DotProduct(0.0, "fixed") + ConstantKernel(variances[1])
    reference = GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None).fit(x, y)

    def likelihood(log_variances):
        scale, shift = jnp.exp(log_variances)
        layer = stax.Dense(1, jnp.sqrt(4 * scale), jnp.sqrt(shift))
        return gp.GaussianProcess(layer[2], x, y, 0.1).log_marginal_likelihood()

    found = jax.jit(jax.value_and_grad(likelihood))(jnp.log(variances))
    evaluated = reference.log_marginal_likelihood(np.log(variances), eval_gradient=True)
    expected = cast(tuple[float, np.ndarray], evaluated)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9)

    x_test, _ = data(6, d=4, seed=1)
    layer = stax.Dense(1, (4 * variances[0]) ** 0.5, variances[1] ** 0.5)
    mean, variance = gp.GaussianProcess(layer[2], x, y, 0.1).posterior(x_test)
    expected_mean, expected_std = reference.predict(x_test, return_std=True)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10)
    np.testing.assert_allclose(variance, np.square(expected_std), rtol=1e-8)


@pytest.mark.parametrize(
    ("make", "get"), [(make_kernel, "ntk"), pytest.param(make_gelu, "nngp", marks=pytest.mark.slow)]
)
def test_derivatives_are_those_of_finite_differences(x64, get, make):
    x, y = data(12, 2)

    @jax.jit
    def both(p):
        kernel_fn = make({"W_std": p[0], "b_std": p[1]})
        process = gp.GaussianProcess(kernel_fn, x, y, p[2], get)
        return jnp.stack([process.log_marginal_likelihood(), process.leave_one_out_loss()])

    p, step = jnp.array(list(POINT.values())), 1e-5
    differences = [(both(p + e) - both(p - e)) / (2 * step) for e in step * jnp.eye(3)]
    found = jax.jit(jax.jacrev(both))(p)
    np.testing.assert_allclose(found, np.transpose(differences), rtol=1e-7)


def test_leave_one_out_is_n_fits_to_the_rest(x64):
    x, y = data(12, 2)
    args = (make_kernel(POINT), x, y, POINT["noise"])
    mean, variance = gp.GaussianProcess(*args).leave_one_out()
    full, loss = covariance(POINT, x), 0.0
    for i in range(12):
        rest = np.arange(12) != i
        weights = np.linalg.solve(full[np.ix_(rest, rest)], full[rest, i])
        np.testing.assert_allclose(mean[i], weights @ y[rest], rtol=1e-10)
        np.testing.assert_allclose(variance[i], full[i, i] - weights @ full[rest, i], rtol=1e-10)
        spread = np.sqrt(full[i, i] - weights @ full[rest, i])
        loss -= stats.norm.logpdf(y[i], weights @ y[rest], spread).sum()
    np.testing.assert_allclose(gp.GaussianProcess(*args).leave_one_out_loss(), loss, rtol=1e-11)
    assert gp.GaussianProcess(*args[:2], y[:, 0], *args[3:]).leave_one_out().mean.shape == (12,)


def test_weights_are_how_often_a_target_was_observed(x64):
    """And those that are 0 are as good as not there; one copy of several is left out."""
    (x, y), x_test = data(8, 2), data(3, seed=5)[0]
    weights = np.array([1, 3, 0, 1, 2, 0, 1, 1])
    rows = np.repeat(np.arange(8), weights)
    args = (make_kernel(POINT), x, y, POINT["noise"])
    repeated = (args[0], x[rows], y[rows], POINT["noise"])

    found = gp.GaussianProcess(*args, weights=weights).log_marginal_likelihood()
    np.testing.assert_allclose(
        found, gp.GaussianProcess(*repeated).log_marginal_likelihood(), rtol=1e-12
    )
    for moment, expected in zip(
        gp.GaussianProcess(*args, weights=weights).posterior(x_test),
        gp.GaussianProcess(*repeated).posterior(x_test),
        strict=True,
    ):
        np.testing.assert_allclose(moment, expected, rtol=1e-9)
    for moment, expected in zip(
        gp.GaussianProcess(*args, weights=weights).leave_one_out(),
        gp.GaussianProcess(*repeated).leave_one_out(),
        strict=True,
    ):
        np.testing.assert_allclose(moment[rows], expected, rtol=1e-9)
    loss = gp.GaussianProcess(*args, weights=weights).leave_one_out_loss()
    np.testing.assert_allclose(loss, gp.GaussianProcess(*repeated).leave_one_out_loss(), rtol=1e-10)


def test_a_target_of_little_weight_is_left_out_whole(x64):
    (x, y), weights = data(6), np.array([1, 0.3, 1, 2, 1, 1])
    args = (make_kernel(POINT), x, y, POINT["noise"])
    mean, variance = gp.GaussianProcess(*args, weights=weights).leave_one_out()
    rest = np.where(np.arange(6) == 1, 0, weights)
    expected = gp.GaussianProcess(*args, weights=rest).posterior(x[1:2])
    np.testing.assert_allclose(mean[1], expected.mean[0], rtol=1e-9)
    np.testing.assert_allclose(variance[1], expected.variance[0] + POINT["noise"], rtol=1e-9)


@pytest.mark.parametrize(
    ("weights", "noise", "message"),
    [
        (np.ones(5), 0.1, r"weights have shape \(5,\): 6 inputs need \(6,\)"),
        (-np.ones(6), 0.1, "weights must be finite, at least 0"),
        (np.zeros(6), 0.1, "not all 0"),
        (2 * np.ones(6), 0.0, "need a noise above 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_weights_are_refused(weights, noise, message):
    with pytest.raises(ValueError, match=message):
        gp.GaussianProcess(
            make_kernel(POINT), *data(6), noise, weights=weights
        ).log_marginal_likelihood()


@pytest.mark.parametrize("get", [pytest.param("nngp", marks=pytest.mark.slow), "ntk"])
def test_the_posterior_is_that_of_dense_algebra(x64, get):
    (x, y), (x_test, _) = data(12, 2), data(5, seed=1)
    kernel_fn = make_kernel(POINT)
    process = gp.GaussianProcess(kernel_fn, x, y, POINT["noise"], get)
    mean, variance = process.posterior(x_test)
    joint = np.asarray(kernel_fn(jnp.concatenate([x, x_test]), None, get))
    cross, full = joint[12:, :12], covariance(POINT, x, get)
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(full, y), rtol=1e-9)
    expected = joint[12:, 12:] - cross @ np.linalg.solve(full, cross.T)
    np.testing.assert_allclose(variance, np.diagonal(expected), rtol=1e-9)
    jointly = process.joint_posterior(x_test)
    np.testing.assert_allclose(jointly.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(jointly.covariance, expected, atol=1e-11)


def test_samples_have_the_moments_of_prior_and_posterior(x64):
    """Of inputs of which one is there twice, and one was observed."""
    (x, y), n = data(6, 2), 40_000
    x_test = np.concatenate([x[:1], np.tile(data(1, seed=1)[0], (2, 1))])
    process = gp.GaussianProcess(make_kernel(POINT), x, y, POINT["noise"])
    posterior = process.joint_posterior(x_test)
    prior = make_kernel(POINT)(x_test, None, "nngp")
    for name, draws, mean, covariance in (
        ("posterior", process.sample(random.key(0), x_test, n), *posterior),
        ("prior", process.sample_prior(random.key(1), x_test, n), 0.0, prior),
    ):
        assert draws.shape == (n, 3, 2), name
        draws, mean, covariance = map(np.asarray, (draws, mean, covariance))
        np.testing.assert_allclose(draws[:, 1], draws[:, 2], atol=1e-5)
        variance = np.diagonal(covariance)
        centred = (draws - mean).reshape(n, 6)
        error = 5 * np.sqrt(np.repeat(variance, 2) / n)
        assert (np.abs(centred.mean(0)) < error).all(), name
        full = np.kron(covariance, np.eye(2))  # outputs are independent
        spread = np.sqrt(np.multiply.outer(np.diagonal(full), np.diagonal(full)) + full**2)
        assert (np.abs(centred.T @ centred / n - full) < 5 * spread / np.sqrt(n)).all(), name
    one = gp.GaussianProcess(make_kernel(POINT), x, y[:, 0], POINT["noise"])
    assert one.sample(random.key(0), x_test, 3).shape == (3, 3)


def test_a_sample_is_differentiable_in_its_inputs(x64):
    (x, y), x_test = data(6), data(3, seed=1)[0]
    process = gp.GaussianProcess(make_kernel(POINT), x, y, POINT["noise"])

    @jax.jit
    def value(x_test):
        return jnp.sum(process.sample(random.key(0), x_test, 2) ** 2)

    direction = np.random.default_rng(2).normal(size=x_test.shape)
    step = 1e-6 * direction
    expected = (value(x_test + step) - value(x_test - step)) / 2e-6
    np.testing.assert_allclose(jnp.sum(jax.grad(value)(x_test) * direction), expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2, 1, 0, 1, 3, 1, 0.5])])
def test_conditioning_is_the_process_of_all_data(x64, weights):
    (x, y), x_test = data(8, 2), data(3, seed=1)[0]

    def moments(noise, parts):
        kernel_fn, process = make_kernel({**POINT, "W_std": 4 * noise}), None
        for rows in map(slice, parts[:-1], parts[1:]):
            some = (x[rows], y[rows])
            w = None if weights is None else weights[rows]
            process = (
                gp.GaussianProcess(kernel_fn, *some, noise, weights=w)
                if process is None
                else process.condition(*some, w)
            )
        left_out = process.leave_one_out()
        return process.log_marginal_likelihood(), process.posterior(x_test), left_out

    parts = ((0, 8), (0, 3, 7, 8))
    whole, grown = (jax.jit(jax.jacfwd(moments), static_argnums=1)(0.2, p) for p in parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), whole, grown)
    whole, grown = (moments(0.2, p) for p in parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), whole, grown)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_a_process_are_refused():
    x, y = data(5)
    process = gp.GaussianProcess(make_kernel(POINT), x, y, 0.1)
    with pytest.raises(ValueError, match=r"x_test has inputs of shape \(2,\), and x \(3,\)"):
        process.posterior(x[:, :2])
    with pytest.raises(ValueError, match=r"x has inputs of shape \(2,\), and x \(3,\)"):
        process.condition(x[:, :2], y)
    with pytest.raises(ValueError, match=r"y has shape \(5, 2\): the process has targets"):
        process.condition(x, data(5, 2)[1])
    with pytest.raises(ValueError, match="n=0 must be an integer of at least 1"):
        process.sample(random.key(0), x, 0)


def test_a_fit_recovers_what_the_targets_were_drawn_with(x64):
    """Many outputs, so that the truth is within a few small standard errors of the optimum."""
    x, y = sample(30, 40)
    start = {"W_std": 0.3, "b_std": 1.0, "noise": 1.0}
    found = gp.fit(make_kernel, x, y, start, bounds=W_BOUND, restarts=1)
    assert found.converged
    assert found.distance < 0.01
    assert found.steps >= 10
    np.testing.assert_allclose(found.losses, found.loss, rtol=1e-6)

    def unconstrained(p):
        logit = np.log(p["W_std"] / (2**0.5 - p["W_std"]))
        return np.array([logit, np.log(p["b_std"]), np.log(p["noise"])])

    u, errors = unconstrained(found.parameters), np.array(list(found.standard_errors.values()))
    assert (errors < 0.3).all()
    assert (np.abs(u - unconstrained(POINT)) < 3 * errors).all()

    # Another optimiser, of a likelihood by NumPy, ends in the same place.
    kernel = jax.jit(lambda p: make_kernel(p)(jnp.asarray(x), None, "nngp"))

    def loss(u):
        W_std = 2**0.5 / (1 + np.exp(-u[0]))
        p = dict(zip(POINT, (W_std, *np.exp(u[1:])), strict=True))
        full = np.asarray(kernel(p)) + p["noise"] * np.eye(len(x))
        _, log_determinant = np.linalg.slogdet(2 * np.pi * full)
        return 20 * log_determinant + np.sum(y * np.linalg.solve(full, y)) / 2

    assert found.loss == pytest.approx(loss(u), rel=1e-12)
    step = 1e-3 * np.eye(3)
    hessian = [
        [
            (loss(u + a + b) - loss(u + a - b) - loss(u - a + b) + loss(u - a - b)) / 4e-6
            for a in step
        ]
        for b in step
    ]
    np.testing.assert_allclose(found.hessian, hessian, rtol=1e-3, atol=1e-4 * np.max(hessian))
    np.testing.assert_allclose(errors, np.sqrt(np.diagonal(np.linalg.inv(hessian))), rtol=1e-3)
    simplex = optimize.minimize(loss, u + 0.05, method="Nelder-Mead", options={"xatol": 1e-4})
    np.testing.assert_allclose(u, simplex.x, atol=2e-3)


@pytest.mark.slow
def test_a_fit_by_leave_one_out_is_a_minimum_of_it(dtype):
    x, y = sample(20, 5)
    options = {"bounds": W_BOUND, "loss": "leave_one_out", "restarts": 0}
    found = gp.fit(make_kernel, x, y, POINT, **options)
    assert found.converged
    best = found.parameters

    def loss(p):
        return float(gp.GaussianProcess(make_kernel(p), x, y, p["noise"]).leave_one_out_loss())

    rounding = 5e-5 if dtype == np.float32 else 1e-10
    assert found.loss == pytest.approx(loss(best), rel=rounding)
    for name in ("W_std", "noise"):  # b_std goes to 0
        for factor in (0.8, 1.2):
            assert loss({**best, name: factor * best[name]}) > found.loss * (1 - rounding)

    # Twice the same inputs, and no noise: nowhere to begin.
    x, y, start = np.tile(x[:10], (2, 1)), np.tile(y[:10], (2, 1)), {**POINT, "noise": 1e-30}
    with pytest.raises(NotPositiveDefiniteError, match="drop inputs that are there twice"):
        gp.fit(make_kernel, x, y, start, **options)


def test_a_parameter_that_the_data_do_not_determine_says_so(x64):
    """Targets without bias: its standard deviation goes to 0, and its logarithm nowhere."""
    x, y = sample(30, 40, {**POINT, "b_std": 0.0})
    found = gp.fit(make_kernel, x, y, POINT, bounds=W_BOUND, restarts=0)
    assert found.converged
    assert found.parameters["b_std"] < 0.1
    assert found.standard_errors["b_std"] > 3
    assert found.standard_errors["noise"] < 0.2


def test_float32_is_near_and_never_repaired(dtype):
    x, y = data(12)
    expected = stats.multivariate_normal(cov=covariance(POINT, x)).logpdf(y)

    def likelihood(x, noise):
        process = gp.GaussianProcess(make_kernel(POINT), x, y, noise)
        return process.log_marginal_likelihood()

    for found in (likelihood(x, POINT["noise"]), jax.jit(likelihood)(x, POINT["noise"])):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=2e-6 if dtype == np.float32 else 1e-12)

    twice = np.tile(x[:6], (2, 1))
    with pytest.raises(NotPositiveDefiniteError, match=r"float64 with noise=0.0; take a noise of"):
        likelihood(twice, 0.0)
    assert np.isnan(jax.jit(likelihood)(twice, 0.0))


def test_few_inputs_are_computed_in_float64_and_given_in_float32(monkeypatch):
    """A noise that float32 does not see; inside a transformation all is float32."""
    (x, y), x_test = data(12), data(4, seed=1)[0]
    x, y, twice = x.astype(np.float32), y.astype(np.float32), np.tile(x[:6], (2, 1))
    process = gp.GaussianProcess(make_kernel(POINT), x, y, 1e-6)
    with enable_x64(True):
        exact = gp.GaussianProcess(make_kernel(POINT), x, y, 1e-6).joint_posterior(x_test)
    for found, wanted in zip(process.joint_posterior(x_test), exact, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=2e-7, atol=1e-7 * np.abs(wanted).max())
    assert np.isfinite(
        gp.GaussianProcess(make_kernel(POINT), twice, y, 1e-9).log_marginal_likelihood()
    )
    inside = jax.jit(lambda x: process.posterior(x).mean)(x_test)
    assert inside.dtype == np.float32
    np.testing.assert_allclose(inside, exact.mean, atol=1e-3 * np.abs(exact.mean).max())
    assert process.condition(x_test, y[:4]).log_marginal_likelihood().dtype == np.float32

    monkeypatch.setattr(matrices, "SMALL", 11)
    with pytest.raises(
        NotPositiveDefiniteError, match=r"float32 with noise=1e-09; take a noise of"
    ):
        gp.GaussianProcess(make_kernel(POINT), twice, y, 1e-9)
    large = process.condition(x_test, y[:4])  # beyond the limit: rounded
    assert large.posterior(x_test).mean.dtype == np.float32


def test_variances_below_rounding_are_given_as_that(dtype):
    """At inputs that were observed, with hardly any noise."""
    x, y = data(12)

    def variance():
        return gp.GaussianProcess(make_kernel(POINT), x, y, 1e-6).posterior(x).variance

    found = jax.jit(variance)()
    with enable_x64(True):
        exact = np.asarray(variance())
    assert found.dtype == dtype
    assert (found > exact / 1.5).all()
    assert found.max() < (1e-4 if dtype == np.float32 else 2e-6)


def test_no_equilibrium_is_an_error(x64):
    x, y = data(5)
    with pytest.raises(NoEquilibriumError, match=r"W_std=1\.5"):
        gp.GaussianProcess(
            make_kernel({**POINT, "W_std": 1.5}), x, y, 0.1
        ).log_marginal_likelihood()


@pytest.mark.slow
def test_a_fit_stays_where_there_is_an_equilibrium(x64):
    # Beyond √2 there is none, though the bounds reach that far.
    x, y = sample(20, 10, {**POINT, "W_std": 1.3})
    options = {"bounds": {"W_std": (0, 3)}, "restarts": 0}
    found = gp.fit(make_kernel, x, y, {**POINT, "W_std": 1.4}, **options)
    assert found.converged
    assert found.parameters["W_std"] < 2**0.5
    with pytest.raises(NoEquilibriumError, match=r"W_std=1\.5"):
        gp.fit(make_kernel, x, y, {**POINT, "W_std": 1.5}, **options)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "identity", "erf", "gelu", "tanh"])
def test_below_the_largest_W_std_there_is_an_equilibrium(x64, name):
    x = np.concatenate([1e-3 * data(3)[0], data(3)[0], 3 * data(3)[0]])
    largest = gp.largest_W_std(name)
    assert deq_kernel(x, W_std=0.999 * largest, activation=name).converged.all()
    if ACTIVATIONS[name].homogeneous:
        with pytest.raises(NoEquilibriumError):
            deq_kernel(x, W_std=1.001 * largest, activation=name)


def test_images_and_networks_without_a_readout():
    images, y = random.normal(random.key(0), (4, 5, 5, 1)), np.arange(4.0)
    flat = stax.serial(stax.Flatten(), stax.Dense(1))[2]
    found = gp.GaussianProcess(flat, images, y, 0.1).log_marginal_likelihood()
    expected = gp.GaussianProcess(
        stax.Dense(1)[2], images.reshape(4, 25), y, 0.1
    ).log_marginal_likelihood()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    conv = stax.Conv(1, (3, 3), padding="SAME")
    with pytest.raises(ValueError, match="end the network in a readout"):
        gp.GaussianProcess(conv[2], images, y, 0.1).log_marginal_likelihood()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(4)}, r"y has shape \(4,\): 5 inputs need targets"),
        ({"x": np.full((5, 3), np.nan)}, "NaN or infinite values in 5 rows of x "),
        ({"start": {"W_std": 1.0}}, "has no 'noise'"),
        ({"start": {**POINT, "b_std": 0.0}}, r"start\['b_std'\]=0.0 .* leave it out"),
        ({"bounds": {"W_std": (0, 0.5)}}, r"start\['W_std'\]=0.9 .* \(0.0, 0.5\)"),
        ({"bounds": {"V_std": (0, 1)}}, "V_std"),
        ({"get": "both"}, "get='both'"),
        ({"loss": "hinge"}, "loss='hinge' must be one of 'marginal_likelihood'"),
        ({"restarts": -1}, "restarts=-1"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(change, message):
    x, y = data(5)
    arguments = {"x": x, "y": y, "start": POINT, "restarts": 0, **change}
    with pytest.raises(ValueError, match=message):
        gp.fit(make_kernel, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_bad_noise_is_refused():
    with pytest.raises(ValueError, match="noise=-1"):
        gp.GaussianProcess(make_kernel(POINT), *data(5), -1).log_marginal_likelihood()


@pytest.mark.slow
def test_second_derivatives(x64):
    """In forward and in reverse mode, of a kernel that has them."""
    x, y = data(n=9, outputs=2)[:2]

    def likelihood(log_length, log_noise, y):
        def kernel_fn(x1, x2, get):
            square = jnp.sum((x1[:, None] - x1[None]) ** 2, -1)
            return jnp.exp(-square * jnp.exp(-2 * log_length))

        return gp.GaussianProcess(kernel_fn, x, y, jnp.exp(log_noise)).log_marginal_likelihood()

    check_grads(likelihood, (0.3, -1.0, y), order=2, modes=("fwd", "rev"), rtol=1e-5)
