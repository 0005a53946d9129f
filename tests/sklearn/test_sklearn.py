"""The estimators are scikit-learn's in every respect, and `nt_deq.gp`'s in what they compute."""

# scikit-learn types a clone as a container of estimators.
# pyright: reportAttributeAccessIssue=false

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from scipy import integrate, stats
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_info

from nt_deq import NoEquilibriumError, gp, stax
from nt_deq._jax import enable_x64
from nt_deq.activations import ACTIVATIONS
from nt_deq.sklearn import DEQClassifier, DEQRegressor, padding

FIXED = [DEQRegressor(optimize=False), DEQClassifier(optimize=False)]
LAPLACE = DEQClassifier(likelihood="laplace", optimize=False)
STDS = {"W_std": 0.9, "U_std": 1.1, "b_std": 0.3, "V_std": 1.2}


@pytest.mark.usefixtures("unchecked")  # any value is set for a parameter
@parametrize_with_checks(FIXED[:1], legacy=False)
def test_interface(estimator, check):
    """The part of scikit-learn's checks that it calls the interface."""
    check(estimator)


def equal_to_few_digits(estimator):
    """What is searched for ends somewhere else by rounding: `test_weights_are_repetitions`."""
    if estimator is FIXED[0] or estimator is LAPLACE:
        return {}
    return {"check_sample_weight_equivalence_on_dense_data": "equal to five digits, not to nine"}


@pytest.mark.slow  # hundreds of fits, to data of many shapes
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [*FIXED, LAPLACE, DEQRegressor(), DEQClassifier(get="ntk")],
    expected_failed_checks=equal_to_few_digits,
)
def test_all_checks(estimator, check):
    check(estimator)


def data(n=40, d=3, outputs=None, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = np.sin(x[:, 0]) + 0.5 * x[:, 1] + 0.1 * rng.normal(size=n)
    return x, 5 + 3 * (y if outputs is None else np.stack([y, x[:, 2] ** 2], axis=1))


def kernel_fn(p):
    layer = stax.DEQ(1, p["W_std"], p["U_std"], p["b_std"])
    return stax.serial(layer, stax.Dense(1, p["V_std"]))[2]


@pytest.mark.parametrize("get", ["nngp", pytest.param("ntk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("outputs", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_regressor_is_the_process_on_scaled_data(get, outputs):
    """Padding does not show, and all is in float64 whatever JAX's mode is."""
    (x, y), x_test = data(outputs=outputs), data(7, seed=1)[0]
    model = DEQRegressor(get, **STDS, noise=0.2, optimize=False).fit(x, y)
    mean, std = model.predict(x_test, return_std=True)
    noisy = model.predict(x_test, return_std=True, include_noise=True)[1]
    centre, scale = y.mean(0), y.std(0)
    with enable_x64(True):
        args = (kernel_fn(STDS), (x - x.mean(0)) / x.std(0), (y - centre) / scale, 0.2)
        scaled = (x_test - x.mean(0)) / x.std(0)
        expected, variance = map(np.asarray, gp.GaussianProcess(*args, get).posterior(scaled))
        likelihood = gp.GaussianProcess(*args, get).log_marginal_likelihood()
    np.testing.assert_allclose(mean, centre + scale * expected, rtol=1e-10)
    np.testing.assert_allclose(std, np.multiply.outer(np.sqrt(variance), scale), rtol=1e-8)
    np.testing.assert_allclose(noisy, np.multiply.outer(np.sqrt(variance + 0.2), scale), rtol=1e-8)
    np.testing.assert_allclose(model.log_marginal_likelihood_, likelihood, rtol=1e-10)
    assert jnp.zeros(()).dtype == np.float32


def test_what_is_padded_does_not_show(x64):
    x, y = data(40, d=3, outputs=2)
    weights = np.random.default_rng(0).uniform(0.5, 2, len(x))
    problem = padding.pad(x, y, weights)
    assert [a.shape for a in problem] == [(64, 8), (64, 2), (64,)]
    k = kernel_fn(STDS)
    np.testing.assert_allclose(k(problem.x[:40], None, "ntk"), k(x, None, "ntk"), rtol=1e-12)
    likelihood = gp.GaussianProcess(k, x, y, 0.2, weights=weights).log_marginal_likelihood()
    padded = gp.GaussianProcess(
        k, problem.x, problem.y, 0.2, weights=problem.weights
    ).log_marginal_likelihood()
    np.testing.assert_allclose(padded, likelihood, rtol=1e-12)


def test_inputs_are_standardized_unless_told_not_to():
    x, y = data()
    units = np.array([1e4, 1.0, 1e-3])
    options = {"optimize": False, "noise": 0.01}
    expected = DEQRegressor(**options).fit(x, y).predict(x)
    np.testing.assert_allclose(
        DEQRegressor(**options).fit(x * units + 7, y).predict(x * units + 7), expected
    )
    as_it_is = DEQRegressor(**options, standardize=False)
    scaled = StandardScaler().fit_transform(x)
    np.testing.assert_allclose(as_it_is.fit(scaled, y).predict(scaled), expected)
    assert np.abs(as_it_is.fit(x + 3, y).predict(x + 3) - expected).max() > 0.1


@pytest.mark.parametrize("max_exact", [1000, 20])
def test_a_noise_that_float32_cannot_tell(max_exact):
    """Interpolates to eight digits."""
    x, y = data()
    model = DEQRegressor(noise=1e-10, optimize=False, max_exact=max_exact).fit(x, y)
    np.testing.assert_allclose(model.predict(x), y, rtol=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [
        *FIXED,
        LAPLACE,
        pytest.param(DEQRegressor(optimize=False, max_exact=30), marks=pytest.mark.slow),
    ],
)
def test_weights_are_repetitions(estimator):
    x, y = data()
    y = y if isinstance(estimator, DEQRegressor) else y > 5
    weights = np.random.default_rng(0).integers(0, 3, len(x))
    rows = np.repeat(np.arange(len(x)), weights)
    found, expected = clone(estimator).fit(x, y, weights), clone(estimator).fit(x[rows], y[rows])
    if isinstance(estimator, DEQRegressor):
        tolerance = 1e-9 if estimator.max_exact > len(x) else 1e-6
        for a, b in zip(
            found.predict(x, return_std=True), expected.predict(x, return_std=True), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=tolerance)
    else:
        np.testing.assert_allclose(found.predict_proba(x), expected.predict_proba(x), atol=1e-5)
    for wrong, message in ((-weights, "[Nn]egative"), (0 * weights, "all rows|non-zero")):
        with pytest.raises(ValueError, match=message):
            clone(estimator).fit(x, y, wrong)


@pytest.mark.slow
def test_length_scales_tell_which_features_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = np.sin(3 * x[:, 1]) + 0.05 * rng.normal(size=60)
    model = DEQRegressor(length_scale=np.ones(3)).fit(x, y)
    scales = model.hyperparameters_["length_scale"]
    assert scales.shape == (3,)
    assert scales[1] < 0.3 * min(scales[0], scales[2])
    assert model.hyperparameters_["U_std"] == 1  # one with the length scales
    assert model.log_marginal_likelihood_ > DEQRegressor().fit(x, y).log_marginal_likelihood_ + 5
    # Given, they are used as they are.
    given = DEQRegressor(**model.hyperparameters_, optimize=False).fit(x, y)
    np.testing.assert_allclose(given.predict(x), model.predict(x), rtol=1e-6)
    divided = DEQRegressor(optimize=False, standardize=False).fit(x / [1, 2, 3], y)
    scaled = DEQRegressor(length_scale=[1, 2, 3], optimize=False, standardize=False).fit(x, y)
    np.testing.assert_allclose(scaled.predict(x), divided.predict(x / [1, 2, 3]), rtol=1e-9)


def test_no_prediction_is_an_error_and_no_class():
    """Of inputs that are large enough there is an equilibrium, of others not."""
    x, y = data(d=2)
    x *= 20
    options = {"activation": "erf", "W_std": 1.2, "optimize": False, "standardize": False}
    x_test = np.concatenate([x[:2], np.zeros((3, 2))])
    for model in (DEQRegressor(**options).fit(x, y), DEQClassifier(**options).fit(x, y > 5)):
        model.predict(x)
        with pytest.raises(NoEquilibriumError, match=r"3 rows of X \(the first is row 2\)"):
            model.predict(x_test)


def test_an_error_counts_the_rows_there_are():
    x = np.random.default_rng(0).normal(size=(11, 3))
    with pytest.raises(NoEquilibriumError, match="is not for 11 rows of x1 "):
        DEQRegressor(W_std=1.5, optimize=False).fit(x, x[:, 0])


def test_one_thread_of_blas_computes(monkeypatch):
    """OpenBLAS' threads wait for each other in a loop, for minutes on a busy machine."""
    threads = []

    def fit(*args, **kwargs):
        threads.append(
            [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(gp, "fit", fit)
    before = threadpool_info()
    with pytest.raises(KeyboardInterrupt):
        DEQRegressor().fit(*data())
    assert set(threads[0]) == {1}
    assert threadpool_info() == before


def test_hyperparameters_are_those_of_the_largest_likelihood():
    x, y = data()
    model = DEQRegressor(random_state=0).fit(x, y)
    assert model.optimum_.converged
    assert model.hyperparameters_["V_std"] == 1.0  # one with U_std and b_std
    assert model.score(x, y) > 0.95
    for name in ("U_std", "noise"):
        for factor in (0.8, 1.2):
            changed = {**model.hyperparameters_, name: factor * model.hyperparameters_[name]}
            other = DEQRegressor(**changed, optimize=False).fit(x, y)
            assert other.log_marginal_likelihood_ < model.log_marginal_likelihood_ + 1e-3
    without = DEQRegressor(b_std=0.0).fit(x, y)
    assert without.hyperparameters_["b_std"] == 0


def test_tools_of_scikit_learn():
    x, y = data()
    pipeline = make_pipeline(StandardScaler(), DEQRegressor(optimize=False, noise=0.01))
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.8
    grid = {"deqregressor__get": ["nngp", "ntk"], "deqregressor__noise": [0.01, 100.0]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(x, y)
    assert search.best_params_["deqregressor__noise"] == 0.01
    np.testing.assert_array_equal(
        clone(search.best_estimator_).fit(x, y).predict(x), search.predict(x)
    )


@pytest.mark.parametrize(
    "activation", [*slow_except([jax.nn.relu], [jnp.tanh, jax.nn.relu, jax.nn.gelu]), lambda z: z]
)
def test_a_function_for_an_activation(activation):
    x, y = data()
    model = DEQRegressor(activation=activation, optimize=False).fit(x, y)
    for found in (pickle.loads(pickle.dumps(model)), clone(model).fit(x, y), copy.deepcopy(model)):
        np.testing.assert_array_equal(found.predict(x), model.predict(x))
    assert model.activation is activation
    assert pickle.loads(pickle.dumps(model)).get_params()["activation"].name in ACTIVATIONS
    assert np.isfinite(cross_val_score(model, x, y, cv=2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_many_inputs_are_those_of_kernel_regression(get):
    (x, y), x_test = data(100, outputs=2), data(7, seed=1)[0]
    options = {**STDS, "get": get, "noise": 0.2, "optimize": False}
    exact = DEQRegressor(**options).fit(x, y).predict(x_test, return_std=True)
    model = DEQRegressor(**options, max_exact=30, random_state=0).fit(x, y)
    for found in (model, pickle.loads(pickle.dumps(model))):
        mean, std = found.predict(x_test, return_std=True)
        np.testing.assert_allclose(mean, exact[0], rtol=1e-6)
        np.testing.assert_allclose(std, exact[1], rtol=1e-5)
    subset = DEQRegressor(**options).fit(x[:30], y[:30])
    assert model.log_marginal_likelihood_ == pytest.approx(subset.log_marginal_likelihood_, rel=1)


def test_probabilities_of_two_classes_are_the_expected_probit():
    """`∫ Φ(α f + β) N(f | μ, σ²) df`, by quadrature."""
    x, y = data()
    labels = np.where(y > 5, "high", "low")
    model = DEQClassifier(**STDS, noise=0.2, optimize=False).fit(x, labels)
    assert list(model.classes_) == ["high", "low"]
    mean, variance = model._predict_process(x[:4])
    slope, shift = model.calibration_
    for i, probability in enumerate(model.predict_proba(x[:4])):
        f = stats.norm(mean[i, 0], np.sqrt(variance[i]))
        expected, _ = integrate.quad(
            lambda z, f=f: stats.norm.cdf(slope * z + shift) * f.pdf(z),
            f.mean() - 10 * f.std(),
            f.mean() + 10 * f.std(),
        )
        np.testing.assert_allclose(probability, [1 - expected, expected], atol=1e-8)
    assert model.score(x, labels) > 0.9


@pytest.mark.parametrize("max_exact", [1000, pytest.param(20, marks=pytest.mark.slow)])
def test_laplace_is_that_of_the_process(max_exact):
    """Padding does not show, and beyond `max_exact` all rows take part."""
    x, y = data()
    labels, x_test = np.digitize(y, [4, 6]), data(7, seed=1)[0]
    options = {"likelihood": "laplace", "optimize": False, "max_exact": max_exact}
    model = DEQClassifier(**{**STDS, "V_std": 5.0}, **options).fit(x, labels)
    scaled = (x - x.mean(0)) / x.std(0)
    expected = gp.LaplaceClassifier(kernel_fn({**STDS, "V_std": 5.0}), scaled, labels)
    found = expected.predict_proba((x_test - x.mean(0)) / x.std(0))
    np.testing.assert_allclose(model.predict_proba(x_test), found, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(x_test), np.argmax(found, axis=1))
    if max_exact > len(x):
        evidence = expected.log_marginal_likelihood()
        np.testing.assert_allclose(model.log_marginal_likelihood_, evidence, rtol=1e-6)


@pytest.mark.slow
def test_laplace_finds_hyperparameters_of_more_evidence():
    x, y = data()
    given = DEQClassifier(likelihood="laplace", optimize=False).fit(x, y > 5)
    model = DEQClassifier(likelihood="laplace", noise=0.0).fit(x, y > 5)
    assert model.optimum_.converged
    assert "noise" not in model.optimum_.parameters
    assert model.log_marginal_likelihood_ > given.log_marginal_likelihood_ + 1
    assert model.score(x, y > 5) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("max_exact", [1000, 100])
def test_probabilities_of_digits_are_calibrated(max_exact):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:500]
    x, y = x[order] / 16, y[order]
    model = DEQClassifier(max_exact=max_exact, random_state=0).fit(x[:250], y[:250])
    probabilities, labels = model.predict_proba(x[250:]), model.predict(x[250:])
    accuracy = (labels == y[250:]).mean()
    assert accuracy > 0.9
    assert log_loss(y[250:], probabilities) < 0.5
    assert probabilities.max(axis=1).mean() == pytest.approx(accuracy, abs=0.1)


@pytest.mark.usefixtures("unchecked")
def test_one_class_and_bad_arguments_are_refused():
    x, y = data()
    with pytest.raises(ValueError, match="one class"):
        DEQClassifier().fit(x, np.zeros(len(x)))
    with pytest.raises(ValueError, match=r"^likelihood='probit' must be one of"):
        DEQClassifier(likelihood="probit").fit(x, y > 5)
    for arguments, message in (
        ({"W_std": -1}, "W_std=-1 "),
        ({"W_std": 1.5}, r"W_std=1\.5 must be below 1\.41421 for activation='relu'"),
        ({"W_std": 0.9, "activation": "erf"}, r"W_std=0\.9 must be below 0\.886"),
        ({"max_exact": 0}, "max_exact=0"),
        ({"get": "rbf"}, "^get='rbf'"),
        ({"noise": -1}, "^noise=-1 must be"),
        ({"noise": 0.0}, r"^noise=0\.0 must be above 1e-08"),
        ({"n_restarts_optimizer": -1}, "^n_restarts_optimizer=-1"),
        ({"length_scale": [1, 2]}, r"^length_scale has shape \(2,\): .* each of the 3 features"),
        ({"length_scale": 0.0}, r"^length_scale=0\.0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            DEQRegressor(**arguments).fit(x, y)
    with pytest.raises(NoEquilibriumError, match=r"W_std=1\.5"):
        DEQRegressor(W_std=1.5, optimize=False).fit(x, y)
    twice = np.tile(x[:5], (2, 1))
    with pytest.raises(
        RuntimeError, match=r"not positive definite to rounding in float64 with noise=0\.0"
    ):
        DEQRegressor(noise=0.0, optimize=False).fit(twice, np.arange(10.0))
