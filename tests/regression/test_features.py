"""Feature maps and ridge regression on them, against the exact kernels and numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import nt_deq
from nt_deq import stax
from nt_deq.regression import (
    FeatureRegression,
    NystromFeatures,
    SketchFeatures,
    concatenate,
    deq_series,
    feature_error,
    in_batches,
)

D = 12
MNIST = dict(W_std=0.5**0.5, U_std=0.5, b_std=0.5**0.5, V_std=2**0.5)
SETTINGS = {
    "relu": dict(W_std=1.2),
    "relu with bias": MNIST,
    "leaky_relu": dict(W_std=1.3, U_std=0.7, b_std=0.2, activation="leaky_relu", mean_square=2.5),
    "abs": dict(W_std=0.7, activation="abs", V_std=0.5),  # even: every other term of V is 0
    "abs near the limit": dict(W_std=0.9999, activation="abs"),
    "one layer": dict(W_std=0.0),
}


def network(mean_square=1.0, V_std=1.0, **setting):
    """`kernel_fn` of the network whose series `deq_series` gives."""
    del mean_square
    return stax.serial(stax.DEQ(1, **setting), stax.Dense(1, V_std))[2]


@partial(jax.jit, static_argnums=2)
def exponential(x1, x2=None, get="nngp"):
    """A positive definite kernel that is quickly compiled."""
    del get
    return jnp.exp(x1 @ (x1 if x2 is None else x2).T / x1.shape[1])


def sphere(n, d=D, mean_square=1.0, seed=0, dtype=None):
    """`n` inputs of norm `√(mean_square d)` with correlations between -1 and 1."""
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5
    x *= np.sqrt(mean_square * d) / np.linalg.norm(x, axis=1, keepdims=True)
    return jnp.asarray(x, dtype)


def circle(n, mean_square):
    """Inputs on a half circle from the first one to its opposite, and their `t` with it."""
    angle = np.linspace(0, np.pi, n)
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.sqrt(2 * mean_square)
    return jnp.asarray(x), np.cos(angle)


@pytest.mark.parametrize(
    ("name", "get"), [(name, "ntk") for name in SETTINGS] + [("relu", "nngp"), ("abs", "nngp")]
)
def test_series_is_the_kernel_up_to_its_tail(x64, name, get):
    setting = SETTINGS[name]
    x, t = circle(41, setting.get("mean_square", 1.0))
    exact = np.asarray(network(**setting)(x[:1], x, get))[0]
    for degree in (1, 8, 40):
        series = deq_series(degree, get=get, **setting)
        assert series.total == pytest.approx(exact[0], rel=1e-13)
        assert (series.coefficients >= 0).all()
        assert 0 < series.tail < series.total
        left_out = exact - np.asarray(series.kernel(x[:1], x))[0]
        # κ in 1/(1 - J)² is the condition of the NTK, of which both sides have rounding errors
        rounding = 1e-13 * series.total / (1 - 0.9999**2 if "limit" in name else 1)
        bound = np.abs(t) ** (degree + 1) * series.tail
        assert (np.abs(left_out) <= bound * (1 + 1e-9) + rounding).all()
        assert left_out[0] == pytest.approx(series.tail, abs=rounding)


def test_coefficients_sum_to_the_kernel_of_an_input_with_itself():
    # tails of NNGP and NTK fall like k^(-3/2) and k^(-1/2)
    for get, power in (("nngp", 1.5), ("ntk", 0.5)):
        tails = [deq_series(degree, get=get, **MNIST).tail for degree in (200, 800)]
        assert np.log(tails[0] / tails[1]) / np.log(4) == pytest.approx(power, rel=0.02)
        assert tails[1] < {"nngp": 2e-6, "ntk": 0.01}[get]


def test_coefficients_of_one_relu_layer_are_known():
    # (√(1-t²) + (π - arccos t) t)/2π by the binomial and the arcsine series
    k = np.arange(21.0)
    root = np.where(k % 2 == 0, special.binom(0.5, k / 2) * (-1.0) ** (k // 2), 0)
    odd = np.arange(10)
    arcsine = np.zeros(21)
    arcsine[2 * odd + 2] = special.binom(2 * odd, odd) / (4.0**odd * (2 * odd + 1))
    linear = np.where(k == 1, np.pi / 2, 0)
    series = deq_series(20, W_std=0.0, get="nngp")
    np.testing.assert_allclose(
        series.coefficients, (root + arcsine + linear) / (2 * np.pi), rtol=1e-12, atol=1e-15
    )


def test_identity_has_the_linear_term_alone():
    series = deq_series(5, W_std=0.5, activation="identity", get="ntk")
    expected = 1 / 0.75 + 1 / 0.75**2  # Σ_f = S/(1-W²); Θ_f = Σ_f + S/(1-W²)²
    np.testing.assert_allclose(series.coefficients, [0, expected, 0, 0, 0, 0], atol=1e-14)
    features = SketchFeatures(series, D, 40, jax.random.key(0))
    assert features.size == D
    x = sphere(9)
    assert feature_error(features, network(W_std=0.5, activation="identity"), x, "ntk") < 1e-6


@pytest.mark.slow
def test_sketch_is_unbiased(x64):
    series = deq_series(6, **SETTINGS["one layer"])  # some degrees have no term
    assert list(series.coefficients > 0) == [True, True, True, False, True, False, True]
    x = sphere(8)
    exact = series.kernel(x, x)

    def one(key):
        z = SketchFeatures(series, D, 60, key)(x)
        return z @ z.T

    keys = jax.random.split(jax.random.key(1), 400)
    products = np.stack([one(key) for key in keys])
    spread = products.std(axis=0) / len(keys) ** 0.5
    # 36 pairs: the largest of as many normal deviates is above 4.5 once in 4000 draws
    assert (np.abs(products.mean(axis=0) - exact) <= 4.5 * spread + 1e-12).all()


@pytest.mark.slow
def test_error_of_the_sketch_falls_like_one_over_root_m(x64):
    series = deq_series(5, **SETTINGS["relu"])
    x = sphere(64)

    def error(m):
        squares = [
            feature_error(
                SketchFeatures(series, D, D + 1 + m, jax.random.key(seed)),
                lambda x, *_: series.kernel(x, x),
                x,
            )
            ** 2
            for seed in range(10)
        ]
        return np.mean(squares) ** 0.5

    sizes = np.array([100, 800, 6400])
    slope = np.polyfit(np.log(sizes), np.log([error(m) for m in sizes]), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.06)


def test_sketch_is_deterministic_exact_to_degree_one_and_jits(dtype):
    series = deq_series(1, **MNIST)
    x = sphere(7, dtype=dtype)
    first = SketchFeatures(series, D, D + 1, jax.random.key(0))
    z = first(x)
    assert z.dtype == dtype
    assert z.shape == (7, first.size) == (7, D + 1)
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(z @ z.T, series.kernel(x, x), atol=20 * unit)

    series = deq_series(6, **MNIST)
    features = SketchFeatures(series, D, 100, jax.random.key(3))
    again = SketchFeatures(series, D, 100, jax.random.key(3))
    other = SketchFeatures(series, D, 100, jax.random.key(4))
    z = features(x)
    assert z.dtype == dtype
    assert z.shape == (7, 100)
    np.testing.assert_array_equal(z, again(x))
    assert not np.allclose(z, other(x))
    np.testing.assert_allclose(jax.jit(features)(x), z, atol=20 * unit)


def test_nystrom_is_exact_on_its_landmarks(dtype):
    landmarks, x = sphere(20, dtype=dtype), sphere(20, seed=1, dtype=dtype)
    features = NystromFeatures(exponential, landmarks)
    z, zx = features(landmarks), features(x)
    assert z.dtype == dtype
    assert features.size == 20
    tolerance = 1e4 * float(jnp.finfo(dtype).eps)  # the condition number of K_LL
    np.testing.assert_allclose(z @ z.T, exponential(landmarks), atol=tolerance)
    np.testing.assert_allclose(zx @ z.T, exponential(x, landmarks), atol=tolerance)
    np.testing.assert_allclose(jax.jit(features)(x), zx, atol=tolerance)
    left_out = np.asarray(exponential(x) - zx @ zx.T, np.float64)
    assert np.linalg.eigvalsh(left_out)[0] > -tolerance


def test_nystrom_leaves_out_landmarks_that_others_determine(dtype):
    landmarks = sphere(10, dtype=dtype)
    features = NystromFeatures(exponential, jnp.concatenate([landmarks, landmarks[:4]]))
    assert features.size == 10
    assert feature_error(features, exponential, landmarks) < 1e3 * float(jnp.finfo(dtype).eps)


@pytest.mark.slow
def test_nystrom_of_images(x64):
    kernel_fn = stax.serial(
        stax.FixedPoint(
            stax.serial(stax.Relu(), stax.Conv(1, (3, 3), padding="SAME", W_std=0.6)),
            stax.Conv(1, (3, 3), padding="SAME"),
        ),
        stax.Relu(),
        stax.GlobalAvgPool(),
        stax.Dense(1),
    )[2]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 2)))
    assert feature_error(NystromFeatures(kernel_fn, x, "nngp"), kernel_fn, x, "nngp") < 1e-10


@pytest.mark.slow
def test_sketch_of_the_leading_terms_and_nystrom_of_the_remainder(x64):
    kernel_fn, series = network(**MNIST), deq_series(1, **MNIST)
    landmarks, x = sphere(20), sphere(20, seed=1)
    leading = SketchFeatures(series, D, D + 1, jax.random.key(0))
    remainder = NystromFeatures(series.remainder(kernel_fn), landmarks)
    both = concatenate(leading, remainder)
    assert both(x).shape == (20, D + 1 + 20)
    assert feature_error(both, kernel_fn, landmarks) < 1e-12
    assert feature_error(both, kernel_fn, x) < feature_error(leading, kernel_fn, x)
    with pytest.raises(ValueError, match="series of the 'ntk'"):
        series.remainder(kernel_fn)(x, None, "nngp")


def problem(n, dtype, seed=0, classes=3):
    """Inputs on the sphere and centred one-hot targets."""
    x = sphere(n, seed=seed, dtype=dtype)
    y = np.eye(classes)[np.asarray(jnp.argmax(x[:, :classes], axis=1))] - 1 / classes
    return x, y


def test_regression_is_exact_kernel_ridge_when_the_features_are_exact(x64):
    (x, y), (x_test, _) = problem(60, np.float64), problem(20, np.float64, seed=1)
    model = FeatureRegression(NystromFeatures(exponential, x), relative_noise=1e-3)
    kernel = np.asarray(exponential(x))
    ridge = 1e-3 * np.trace(kernel) / len(x)
    dual = np.linalg.solve(kernel + ridge * np.eye(len(x)), y)
    expected = np.asarray(exponential(x_test, x)) @ dual
    found = model.fit(in_batches(x, y, 60)).predict(x_test)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_regression_in_batches_is_numpy_ridge(dtype):
    (x, y), (x_test, _) = problem(200, dtype), problem(20, dtype, seed=1)
    features = SketchFeatures(deq_series(4, **MNIST), D, 50, jax.random.key(0))
    z, z_test = (np.asarray(features(a), np.float64) for a in (x, x_test))
    ridge = 1e-4 * np.sum(z * z) / len(z)
    expected = np.linalg.lstsq(
        np.concatenate([z, np.sqrt(ridge) * np.eye(50)]), np.concatenate([y, np.zeros((50, 3))])
    )[0]
    whole = FeatureRegression(features).fit([(x, y)])
    parts = FeatureRegression(features).fit(in_batches(np.asarray(x), y, 33))
    for model in (whole, parts):
        # The float32 features of a batch depend on its size by rounding.
        tolerance = 1e-8 if dtype == np.float64 else 1e-3
        np.testing.assert_allclose(model.weights, expected, rtol=tolerance, atol=tolerance)
        assert model.predict(x_test).dtype == dtype
        np.testing.assert_allclose(
            model.predict(x_test), z_test @ expected, atol=1e2 * float(jnp.finfo(dtype).eps)
        )


def test_float32_features_keep_their_digits_in_the_normal_matrix():
    # a condition number of 1e10 in Z Zᵀ, which float32 sums would not resolve
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (300, 8))
    z = (left * np.logspace(0, -5, 8) @ right.T).astype(np.float32)
    target = z.astype(np.float64) @ np.ones(8)
    model = FeatureRegression(jnp.asarray, relative_noise=0).fit(in_batches(z, target, 70))
    np.testing.assert_allclose(model.weights, np.ones(8), atol=1e-4)
    assert model.predict(z).shape == (300,)


def test_regression_takes_a_stream_once():
    seen = []

    def stream():
        for i in range(3):
            seen.append(i)
            yield problem(30, np.float32, seed=i)

    features = SketchFeatures(deq_series(3, **MNIST), D, 20, jax.random.key(0))
    FeatureRegression(features).fit(stream())
    assert seen == [0, 1, 2]


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    x, y = problem(10, np.float32)
    series = deq_series(3, **MNIST)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'erf' is not positively homogeneous"):
        deq_series(3, W_std=0.5, activation="erf")
    with pytest.raises(nt_deq.NoEquilibriumError, match=r"take W_std < 1\.41421"):
        deq_series(3, W_std=1.5)
    with pytest.raises(ValueError, match="degree=0"):
        deq_series(0, W_std=0.5)
    with pytest.raises(ValueError, match="mean_square=-1"):
        deq_series(3, W_std=0.5, mean_square=-1)
    with pytest.raises(ValueError, match="get='cov'"):
        deq_series(3, W_std=0.5, get="cov")
    with pytest.raises(ValueError, match="size=14 must be at least 15"):
        SketchFeatures(series, D, 14, key)
    features = SketchFeatures(series, D, 20, key)
    with pytest.raises(ValueError, match="12 features on the last axis"):
        features(x[:, :5])
    with pytest.raises(ValueError, match=r"1 of 10 rows off the sphere \(the first is row 4"):
        features(x.at[4].multiply(1.1))
    traced = jax.jit(features)(x.at[4].multiply(1.1))
    np.testing.assert_array_equal(np.isnan(traced).all(axis=1), np.arange(10) == 4)
    np.testing.assert_array_equal(np.isnan(traced).any(axis=1), np.arange(10) == 4)

    with pytest.raises(ValueError, match="the landmarks have shape"):
        NystromFeatures(exponential, x)(x[:, :5])
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        NystromFeatures(lambda *_: np.full((10, 10), np.nan), x)
    for matrix in ([[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]]):
        with pytest.raises(ValueError, match="not positive semi-definite"):
            NystromFeatures(lambda *_, matrix=matrix: np.array(matrix), x[:2])

    with pytest.raises(ValueError, match="relative_noise=-1"):
        FeatureRegression(features, relative_noise=-1)
    model = FeatureRegression(features)
    with pytest.raises(ValueError, match="call fit first"):
        model.predict(x)
    with pytest.raises(ValueError, match="batches is empty"):
        model.fit([])
    with pytest.raises(ValueError, match=r"batch 0 has features of shape \(10, 20\) and targets"):
        model.fit([(x, y[:9])])
    with pytest.raises(ValueError, match="batch 1 has 20 features and targets of shape"):
        model.fit([(x, y), (x, y[:, :2])])
    with pytest.raises(ValueError, match="batch 0 has NaN or infinite"):
        model.fit([(x, np.full_like(y, np.nan))])
    with pytest.raises(ValueError, match="relative_noise=0 is too small"):
        FeatureRegression(features, relative_noise=0).fit([(x[:5], y[:5])])
    with pytest.raises(ValueError, match="x has 10 rows and y has 9"):
        in_batches(x, y[:9], 5)
    with pytest.raises(ValueError, match="rows=0"):
        in_batches(x, y, 0)
