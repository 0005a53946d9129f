"""Laplace's approximation against matrices of `nC × nC`, scikit-learn, differences and draws."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF

from nt_deq import ModelError, gp, stax
from nt_deq.errors import ArgumentError, NotConvergedError
from nt_deq.gp.curvature import ManyClasses, curvature
from nt_deq.gp.probabilities import log_probabilities

RNG = np.random.default_rng(0)
X, X_TEST = RNG.normal(size=(12, 3)), RNG.normal(size=(4, 3))
LABELS = {2: RNG.permutation(12) % 2, 4: RNG.permutation(12) % 4}


def rbf(scale, length=1.5):
    def kernel_fn(x1, x2, get):
        x2 = x1 if x2 is None else x2
        squares = jnp.sum((x1[:, None] - x2[None]) ** 2, axis=2)
        return scale * jnp.exp(-squares / (2 * length**2))

    return kernel_fn


def dense(kernel, labels, weights):
    """The mode, `W` and the evidence, by plain damped Newton steps with everything in one."""
    y = np.eye(labels.max() + 1)[labels]
    (n, classes), f, p, bend = y.shape, np.zeros(y.shape), y, np.zeros((y.size, y.size))
    full, eye = np.kron(kernel, np.eye(classes)), np.eye(y.size)
    for _ in range(60):
        p = special.softmax(f, axis=1)
        bend = np.zeros((y.size, y.size))
        for i in range(n):
            own = slice(i * classes, (i + 1) * classes)
            bend[own, own] = weights[i] * (np.diag(p[i]) - np.outer(p[i], p[i]))
        target = bend @ f.ravel() + (weights[:, None] * (y - p)).ravel()
        step = (full @ np.linalg.solve(eye + bend @ full, target)).reshape(y.shape) - f
        f = f + step / max(1, np.abs(step).max())
    a = weights[:, None] * (y - p)
    log_p = np.sum(weights * np.log(np.sum(p * y, axis=1)))
    evidence = log_p - np.sum(a * f) / 2 - np.linalg.slogdet(eye + full @ bend)[1] / 2
    return a, bend, evidence


@pytest.mark.smoke
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_mode_evidence_and_posterior_are_those_of_dense_algebra(x64, classes, weighted):
    weights = np.linspace(0.5, 3, 12) if weighted else np.ones(12)
    kernel_fn, labels = rbf(20.0), LABELS[classes]
    kernel, cross = np.asarray(kernel_fn(X, None, "")), np.asarray(kernel_fn(X, X_TEST, ""))
    a, bend, evidence = dense(kernel, labels, weights)
    model = gp.LaplaceClassifier(kernel_fn, X, labels, weights=weights if weighted else None)
    np.testing.assert_allclose(model.log_marginal_likelihood(), evidence, rtol=1e-12)
    mean, covariance = model.posterior(X_TEST)
    np.testing.assert_allclose(mean, cross.T @ a, atol=1e-11)
    eye = np.eye(classes)
    full, sides = np.kron(kernel, eye), np.kron(cross, eye)
    reduced = sides.T @ np.linalg.solve(np.eye(len(full)) + bend @ full, bend @ sides)
    for i in range(len(X_TEST)):
        own = slice(i * classes, (i + 1) * classes)
        np.testing.assert_allclose(covariance[i], 20 * eye - reduced[own, own], atol=1e-11)


def test_two_classes_are_scikit_learns(x64):
    """Its logistic likelihood of one function, whose kernel is that of a difference, `2K`."""
    reference = GaussianProcessClassifier(2 * 7.0 * RBF(1.5), optimizer=None).fit(X, LABELS[2])
    model = gp.LaplaceClassifier(rbf(7.0), X, LABELS[2])
    # scikit-learn's Newton ends where the evidence gains 1e-10.
    expected = reference.log_marginal_likelihood_value_
    np.testing.assert_allclose(model.log_marginal_likelihood(), expected, rtol=1e-8)
    mean, _ = model.posterior(X)
    found = cast(Any, reference.base_estimator_)
    np.testing.assert_allclose(mean[:, 1] - mean[:, 0], found.f_cached, atol=1e-4)
    # And its probabilities are a sum of five error functions, good to 1e-2.
    proba = model.predict_proba(X_TEST)
    np.testing.assert_allclose(proba, reference.predict_proba(X_TEST), atol=1e-2)


def test_two_classes_are_a_case_of_many(x64):
    """`ManyClasses` with a third that no input has, which is as good as not there far below."""
    kernel, weights = rbf(5.0)(X, None, ""), jnp.linspace(0.0, 2.0, 12)
    f = jnp.asarray(RNG.normal(size=(12, 2)))
    two = curvature(kernel, f, weights)
    many = curvature(kernel, jnp.pad(f, ((0, 0), (0, 1)), constant_values=-60.0), weights)
    assert isinstance(many, ManyClasses)
    np.testing.assert_allclose(two.half_log_determinant(), many.half_log_determinant(), rtol=1e-12)
    np.testing.assert_allclose(two.solve(f), many.solve(jnp.pad(f, ((0, 0), (0, 1))))[:, :2])
    np.testing.assert_allclose(two.blocks(), many.blocks(), atol=1e-12)
    np.testing.assert_allclose(two.reduce(kernel[0]), many.reduce(kernel[0])[:2, :2], atol=1e-11)


@pytest.mark.parametrize("classes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_derivatives_are_those_of_finite_differences(x64, classes):
    """Of scale, length and a weight, through the mode; under jit, vmap, grad and hessian."""

    def evidence(p):
        weights = jnp.ones(12).at[3].set(p[2])
        model = gp.LaplaceClassifier(rbf(*p[:2]), X, LABELS[classes], weights=weights)
        return model.log_marginal_likelihood()

    p, step = jnp.array([9.0, 1.3, 1.7]), 1e-4
    places = jnp.concatenate([p[None] + step * jnp.eye(3), p[None] - step * jnp.eye(3), p[None]])
    both = jax.jit(jax.vmap(jax.value_and_grad(evidence)))
    values, slopes = both(places)
    differences = (values[:3] - values[3:6]) / (2 * step)
    np.testing.assert_allclose(slopes[6], differences, rtol=1e-7)  # of step² and rounding/step
    # The Hessian through all rules is that of differences of the gradient.
    hessian = jax.jit(jax.hessian(evidence))(p)
    np.testing.assert_allclose(hessian, (slopes[:3] - slopes[3:6]) / (2 * step), atol=1e-6)


def test_weights_are_how_often_a_label_was_observed(x64):
    """Those that are 0 are as good as not there, and inputs may be there many times."""
    weights = np.array([1, 3, 0, 1, 2, 0, 1, 1, 1, 1, 2, 1])
    rows = np.repeat(np.arange(12), weights)
    for labels in LABELS.values():
        model = gp.LaplaceClassifier(rbf(30.0), X, labels, weights=weights)
        repeated = gp.LaplaceClassifier(rbf(30.0), X[rows], labels[rows])
        found, expected = (m.log_marginal_likelihood() for m in (model, repeated))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for a, b in zip(model.posterior(X_TEST), repeated.posterior(X_TEST), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("scale", [1e-8, 1e3, 1e6, 1e8])
def test_kernels_large_and_small(x64, scale, classes):
    """With inputs that are there twice, of different classes: the mode's equation holds."""
    x = X.copy()
    x[:4] = x[4:8]
    kernel, labels = np.asarray(rbf(scale)(x, None, "")), LABELS[classes]
    model = gp.LaplaceClassifier(rbf(scale), x, labels)
    a = np.asarray(model._state.coefficients)
    f = kernel @ a
    residual = np.eye(classes)[labels] - special.softmax(f, axis=1)
    np.testing.assert_allclose(a, residual, atol=1e-15 * (1 + scale))  # that of f
    np.testing.assert_allclose(model.posterior(x).mean, f, atol=1e-13 * (1 + scale))
    assert np.isfinite(model.log_marginal_likelihood())
    np.testing.assert_allclose(model.predict_proba(x).sum(axis=1), 1, rtol=1e-12)


def test_what_float32_cannot_tell_is_no_number():
    x = np.concatenate([X, X[:4]])
    labels = np.concatenate([LABELS[4], LABELS[4][4:8]])
    assert gp.LaplaceClassifier(rbf(1e7), x, labels).posterior(X_TEST).mean.dtype == np.float32

    def evidence(scale):
        return gp.LaplaceClassifier(rbf(scale), x, labels).log_marginal_likelihood()

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(evidence)))(jnp.array([5.0, -3.0, 1e10]))
    assert np.isfinite([values[0], slopes[0]]).all()
    assert np.isnan([values[1:], slopes[1:]]).all()  # no covariance, and one beyond all digits
    np.testing.assert_allclose(values[0], evidence(5.0), rtol=1e-5)
    with pytest.raises(NotConvergedError, match="not positive semi-definite"):
        evidence(-3.0)


def test_probabilities_of_two_classes_are_the_integral(x64):
    for mean, variance in ((0.3, 1e-6), (-2.0, 3.0), (1.0, 50.0), (-300.0, 1e5)):
        covariance = np.array([[[0.7, 0.1], [0.1, 0.5]]]) * variance  # of the difference: 1
        found = log_probabilities(jnp.array([[mean, 0.0]]), jnp.asarray(covariance))
        std = variance**0.5
        expected, _ = integrate.quad(
            lambda z, mean=mean, std=std: special.expit(mean + std * z) * stats.norm.pdf(z),
            -12, 12, points=[min(max(-mean / std, -11), 11)], epsabs=1e-13, limit=500,
        )  # fmt: skip
        np.testing.assert_allclose(np.exp(found), [[expected, 1 - expected]], atol=1e-9)


@pytest.mark.parametrize(("variance", "tolerance"), [(0.5, 1e-3), (50.0, 5e-3)])
def test_probabilities_of_many_classes_are_those_of_a_million_draws(x64, variance, tolerance):
    rng, classes = np.random.default_rng(1), 4
    mean = rng.normal(size=(3, classes)) * variance**0.5
    roots = rng.normal(size=(3, classes, classes)) * (variance / classes) ** 0.5
    covariance = roots @ roots.transpose(0, 2, 1)
    found = np.exp(log_probabilities(jnp.asarray(mean), jnp.asarray(covariance)))
    by_chance = np.exp(
        log_probabilities(jnp.asarray(mean), jnp.asarray(covariance), jax.random.key(0))
    )
    for i in range(3):
        draws = mean[i] + rng.normal(size=(1_000_000, classes)) @ roots[i].T
        expected = special.softmax(draws, axis=1).mean(axis=0)
        error = 4 * (expected * (1 - expected) / 1e6) ** 0.5  # of the million
        assert (np.abs(found[i] - expected) < tolerance + error).all()
        noise = 5 * (expected * (1 - expected) / 4096) ** 0.5
        assert (np.abs(by_chance[i] - expected) < noise + error).all()
    assert not np.array_equal(found, by_chance)


@pytest.mark.parametrize("kind", ["words", "objects", "Booleans", "integers"])
def test_a_classifier_is_saved_with_its_labels(kind, tmp_path):
    labels = {
        "words": np.array(["a", "b", "c", "d"])[LABELS[4]],
        "objects": np.array(["a", "b", "c", "d"], object)[LABELS[4]],
        "Booleans": LABELS[2] == 1,
        "integers": LABELS[4] * 10**12 - 5,
    }[kind]
    model = gp.LaplaceClassifier(rbf(9.0), X, labels)
    assert set(model.predict(X_TEST)) <= set(labels)
    likely = np.asarray(model.predict_proba(X)).argmax(axis=1)
    assert model.predict(X).tolist() == [sorted(set(labels.tolist()))[i] for i in likely]
    model.save(tmp_path)
    again = gp.LaplaceClassifier.load(tmp_path, rbf(9.0))
    assert again.classes_.tolist() == sorted(set(labels.tolist()))
    np.testing.assert_array_equal(again.predict_proba(X_TEST), model.predict_proba(X_TEST))
    np.testing.assert_array_equal(again.log_marginal_likelihood(), model.log_marginal_likelihood())
    with pytest.raises(ModelError, match="another kernel"):
        gp.LaplaceClassifier.load(tmp_path, rbf(8.0))


def test_fifty_classes_and_classes_of_one_row():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    labels = np.minimum(np.arange(60), 49)
    model = gp.LaplaceClassifier(rbf(10.0, 0.5), x, labels)
    assert (model.predict(x) == labels).mean() > 0.9
    two = gp.LaplaceClassifier(rbf(1.0), X[:2], np.array(["no", "yes"]))
    np.testing.assert_allclose(two.predict_proba(X[:2]), two.predict_proba(X[:2])[::-1, ::-1])


def make_kernel(p):
    return rbf(p["scale"], p["length"])


@pytest.mark.parametrize("classes", [2, 4])
def test_a_fit_is_a_maximum_of_the_evidence(classes):
    """In float64, whatever JAX's mode is."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(32, 2))
    labels = np.digitize(x[:, 0] + 0.3 * rng.normal(size=32), [0.0, 0.6, 1.2][: classes - 1])
    found = gp.fit_classifier(make_kernel, x, labels, {"scale": 2.0, "length": 1.0}, restarts=0)
    assert found.converged
    best = gp.LaplaceClassifier(make_kernel(found.parameters), x, labels)
    np.testing.assert_allclose(best.log_marginal_likelihood(), -found.loss, rtol=1e-6)
    for name, value in found.parameters.items():
        for factor in (0.8, 1.25):
            other = make_kernel({**found.parameters, name: factor * value})
            assert gp.LaplaceClassifier(other, x, labels).log_marginal_likelihood() < -found.loss


@pytest.mark.slow
def test_a_network_of_infinite_depth_is_fitted():
    def make(p):
        layer = stax.DEQ(1, p["W_std"], b_std=p["b_std"], activation="erf")
        return stax.serial(layer, stax.Dense(1, p["V_std"]))[2]

    start = {"W_std": 0.5, "b_std": 0.3, "V_std": 2.0}
    bounds = {"W_std": (0.0, gp.largest_W_std("erf"))}
    found = gp.fit_classifier(make, X, LABELS[4], start, bounds=bounds, restarts=1)
    first = gp.LaplaceClassifier(make(start), X, LABELS[4]).log_marginal_likelihood()
    assert -found.loss >= first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": np.zeros(12)}, ArgumentError, r"y has the classes \[0\.0\]; two or more"),
        ({"y": LABELS[2][:5]}, ArgumentError, r"y has shape \(5,\): 12 inputs need labels \(12,\)"),
        ({"y": np.where(LABELS[2], np.nan, 1.0)}, ArgumentError, "y has NaN"),
        ({"x": np.where(X > 1, np.nan, X)}, ArgumentError, "NaN or infinite values in .* of x"),
        ({"weights": -np.ones(12)}, ArgumentError, "weights must be finite"),
        ({"kernel_fn": rbf(np.nan)}, ArgumentError, r"kernel_fn\(x, None, 'nngp'\) is NaN"),
        ({"x": X[:1], "y": [1]}, ArgumentError, "two or more"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(arguments, error, message):
    arguments = {"kernel_fn": rbf(1.0), "x": X, "y": LABELS[2]} | arguments
    with pytest.raises(error, match=message):
        gp.LaplaceClassifier(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_traced_or_searched_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="y is traced"):
        jax.jit(lambda y: gp.LaplaceClassifier(rbf(1.0), X, y).posterior(X))(LABELS[2])
    with pytest.raises(ArgumentError, match="is traced: save"):
        jax.jit(lambda s: gp.LaplaceClassifier(rbf(s), X, LABELS[2]).save(tmp_path))(1.0)
    for start, message in (({}, "no hyper-parameters"), ({"scale": -1.0}, "inside of its bounds")):
        with pytest.raises(ArgumentError, match=message):
            gp.fit_classifier(make_kernel, X, LABELS[2], start)
