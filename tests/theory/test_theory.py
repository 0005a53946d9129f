"""What the theorems say: against closed forms, quadrature, finite networks and known samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from scipy import stats

import nt_deq
from nt_deq import theory

X = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0], [2.0, 0.0, 1.0]])
TANH = {"W_std": 0.6, "U_std": 1.0, "b_std": 0.2, "activation": "tanh"}
GELU = {**TANH, "activation": "gelu"}
RELU = {"W_std": 0.6, "U_std": 1.0, "b_std": 0.0, "activation": "relu"}


def test_the_global_bound_is_the_lipschitz_constant_times_the_spectral_norm():
    assert theory.global_contraction(0.5, "relu") == 1.0
    W = np.random.default_rng(0).standard_normal((400, 400)) * 0.3 / np.sqrt(400)
    assert theory.global_contraction(0.3, "tanh") == pytest.approx(np.linalg.norm(W, 2), rel=0.04)


@pytest.mark.parametrize("W_std", [0.3, 1.2, 1.5, 2.0])
def test_the_local_rate_of_relu_is_half_of_the_variance_of_the_weights(W_std):
    rate = theory.local_contraction(X, W_std=W_std)
    np.testing.assert_allclose(rate, W_std**2 / 2, rtol=1e-6)


def test_the_local_rate_is_the_squared_spectral_radius_of_a_wide_network():
    x, width = X[:1], 400
    rng = np.random.default_rng(1)
    W = rng.standard_normal((width, width)) * 0.9 / np.sqrt(width)
    u = rng.standard_normal((width, 3)) @ x[0] / np.sqrt(3)
    z = np.zeros(width)
    for _ in range(200):
        z = W @ np.tanh(z) + u
    radius = np.max(np.abs(np.linalg.eigvals(W / np.cosh(z) ** 2)))
    rate = theory.local_contraction(x, W_std=0.9, activation="tanh")[0]
    assert np.sqrt(rate) == pytest.approx(radius, rel=0.08)


@pytest.mark.usefixtures("x64")
def test_the_local_rate_is_known_where_the_equilibrium_is_unstable():
    g = np.linspace(-10, 10, 4001)
    density = np.exp(-g * g / 2) / np.sum(np.exp(-g * g / 2))  # trapezoidal rule
    k = 1.0
    for _ in range(500):
        k = 2.4**2 * np.tanh(np.sqrt(k) * g) ** 2 @ density + 2.0
    expected = 2.4**2 * np.cosh(np.sqrt(k) * g) ** -4.0 @ density
    assert expected > 1
    rate = theory.local_contraction(X[:1], W_std=2.4, activation="tanh")
    np.testing.assert_allclose(rate, [expected], rtol=1e-9)


@pytest.mark.parametrize(
    ("scale", "activation", "error", "message"),
    [
        (1e30, "gelu", OverflowError, "the variance of row 1 of x overflows float32"),
        (1e3, jax.nn.mish, nt_deq.NotConvergedError, "expectations are not known.* row 1 of x "),
    ],
)
def test_a_rate_that_is_not_found_is_not_called_none(scale, activation, error, message):
    x = X.astype(np.float32) * np.array([[1], [scale], [1]], np.float32)
    with pytest.raises(error, match=message):
        theory.local_contraction(x, W_std=0.8, activation=activation)


def test_a_rate_is_none_where_the_variance_grows_for_ever():
    rates = theory.local_contraction(X, W_std=1.6, activation="gelu")
    assert (np.isnan(rates) | (rates >= 1)).all()


def test_the_local_rate_is_the_rate_of_the_kernel_solver():
    rates = theory.local_contraction(X, **TANH)
    np.testing.assert_allclose(np.max(rates), nt_deq.deq_kernel(X, **TANH).rate, rtol=1e-5)


def quadrature(phi, k1, k2, c, nodes=120):
    """E[φ(u)φ(u')] by Gauss-Hermite quadrature."""
    g, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    u = np.sqrt(k1) * g[:, None]
    rest = np.sqrt(max(k2 - c * c / k1, 0)) if k1 else np.sqrt(k2)
    v = (c / np.sqrt(k1) * g[:, None] if k1 else 0) + rest * g[None, :]
    return np.sum(w[:, None] * w[None, :] * phi(u) * phi(v))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lag", [0, 2])
def test_the_kernels_of_finite_depth_are_the_recursion_by_quadrature(lag):
    S = X[:2] @ X[:2].T / 3 + 0.04
    k = np.zeros((lag + 5, 2))
    for layer in range(lag + 4):
        for i in range(2):
            moment = quadrature(np.tanh, *[k[layer, i]] * 3)
            k[layer + 1, i] = 0.36 * moment + S[i, i]
    expected = [0.0]
    for layer in range(4):
        c = quadrature(np.tanh, k[layer, 0], k[layer + lag, 1], expected[-1])
        expected.append(0.36 * c + S[0, 1])
    kernels = theory.depth_kernels(X[:1], X[1:2], depths=range(5), lag=lag, **TANH)
    np.testing.assert_allclose(kernels[:, 0, 0], expected, rtol=1e-10, atol=1e-12)


def test_the_kernels_of_finite_depth_are_the_covariances_of_a_wide_tied_network():
    width, networks = 400, 60
    rng = np.random.default_rng(0)
    states = []  # layers 0 to 3
    for _ in range(networks):
        W = rng.standard_normal((width, width)) * 0.6 / np.sqrt(width)
        inject = X @ rng.standard_normal((3, width)) / np.sqrt(3)
        inject += 0.2 * rng.standard_normal(width)
        z = [np.zeros((3, width))]
        for _ in range(3):
            z.append(np.tanh(z[-1]) @ W.T + inject)
        states.append(z)
    z = np.array(states)
    for depth, lag in ((1, 0), (3, 0), (1, 1), (2, 1), (1, 2)):
        samples = np.einsum("bin,bjn->bij", z[:, depth], z[:, depth + lag]) / width
        error = samples.std(axis=0, ddof=1) / np.sqrt(networks)
        kernel = theory.depth_kernels(X, depths=[depth], lag=lag, **TANH)[0]
        assert np.max(np.abs(samples.mean(axis=0) - kernel) / error) < 4


@pytest.mark.parametrize("setting", [TANH, RELU], ids=["tanh", "relu"])
@pytest.mark.parametrize("lag", slow_except([3], [0, 3]))
def test_the_kernels_of_finite_depth_tend_to_that_of_the_equilibrium(setting, lag, dtype):
    x = X.astype(dtype)
    deep = theory.depth_kernels(x, depths=[60], lag=lag, **setting)[0]
    assert deep.dtype == dtype
    np.testing.assert_allclose(
        deep, nt_deq.deq_kernel(x, **setting).nngp, rtol=0, atol=50 * np.finfo(dtype).eps
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("setting", "depth", "rtol"),
    [
        pytest.param({**TANH, "W_std": 1.1}, 10, 0.02, marks=pytest.mark.slow),
        ({**RELU, "W_std": 1.2}, 60, 1e-6),
        pytest.param(
            {**TANH, "W_std": 0.9, "activation": "gelu"}, 30, 1e-3, marks=pytest.mark.slow
        ),
    ],
    ids=["tanh", "relu", "gelu"],
)
@pytest.mark.usefixtures("promotion")
def test_the_kernel_converges_at_its_rate(setting, depth, rtol):
    limit = nt_deq.deq_kernel(X, **setting).nngp
    errors = np.abs(theory.depth_kernels(X, depths=(depth, depth + 1), **setting) - limit)
    rate = theory.convergence_rate(X, **setting)
    np.testing.assert_allclose(errors[1] / errors[0], rate, rtol=rtol)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_layers_of_the_tied_network_approach_each_other_at_the_local_rate():
    setting = {**TANH, "W_std": 1.1}
    k, ahead = (
        np.array(
            [
                np.diagonal(kernel)
                for kernel in theory.depth_kernels(X, depths=[14, 15, 16], lag=lag, **setting)
            ]
        )
        for lag in (0, 1)
    )
    increments = k[1:] + k[:-1] - 2 * ahead[:-1]  # E|z^(l+1) - z^l|²
    rate = theory.local_contraction(X, **setting)
    np.testing.assert_allclose(increments[1] / increments[0], rate, rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_correlations_of_the_relu_mlp_go_to_one():
    depths = [1, 2, 100, 10_000]
    kernels = np.asarray(theory.mlp_kernels(X, depths=depths))
    np.testing.assert_allclose(kernels[0], 2 * X @ X.T / 3)
    scale = np.sqrt(np.diagonal(kernels[0]))
    rho = kernels / np.outer(scale, scale)
    angle = np.arccos(np.clip(rho[0], -1, 1))
    np.testing.assert_allclose(
        rho[1], (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi, atol=1e-7
    )
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(1 - rho[-1][off], 4.43e-7, rtol=3e-3)
    np.testing.assert_allclose(1 - rho[-1][off], theory.mlp_correlation_gap(10_000), rtol=5e-3)
    smallest = [theory.smallest_eigenvalue(k).value for k in kernels]
    assert smallest[0] > 0.05 > smallest[2] > 1e-5 > smallest[3]


def test_the_smallest_eigenvalue_tells_singular_from_positive_definite():
    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    kernel = nt_deq.deq_kernel(x, W_std=0.6, activation="relu").nngp
    exact = np.linalg.eigvalsh(np.asarray(kernel, np.float64))[0]
    assert theory.smallest_eigenvalue(kernel).value == pytest.approx(exact)
    assert theory.smallest_eigenvalue(kernel).positive
    odd = nt_deq.deq_kernel(np.concatenate([x, -x]), W_std=0.6, activation="tanh").nngp
    assert not theory.smallest_eigenvalue(odd).positive
    linear = nt_deq.deq_kernel(x, W_std=0.6, activation="identity").nngp
    assert not theory.smallest_eigenvalue(linear).positive


def test_lilliefors_statistic_and_p_value_are_those_of_scipy():
    sample = np.random.default_rng(3).standard_normal(60) ** 3 / 12 + np.arange(60) / 20
    ours = theory.lilliefors(sample, draws=4000)
    theirs = stats.goodness_of_fit(
        stats.norm, sample, statistic="ks", n_mc_samples=4000, rng=np.random.default_rng(0)
    )
    assert ours.statistic == pytest.approx(float(theirs.statistic), rel=1e-12)
    assert ours.p_value == pytest.approx(float(theirs.pvalue), abs=0.03)


def test_lilliefors_critical_value_is_the_published_one_of_large_samples():
    result = theory.lilliefors(np.random.default_rng(0).standard_normal(1000))
    assert result.critical == pytest.approx(0.886 / np.sqrt(1000), rel=0.03)
    assert result.null_mean < result.critical


def test_p_values_are_uniform_under_the_hypothesis():
    rng = np.random.default_rng(0)
    root = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.3, 2.0]])
    p_values = []
    for _ in range(200):
        sample = rng.standard_normal((1000, 3)) @ root.T
        skewness, kurtosis = theory.mardia(sample)
        p_values.append(
            [
                theory.lilliefors(sample[:, 2]).p_value,
                skewness.p_value,
                kurtosis.p_value,
                theory.covariance_test(sample, root @ root.T).p_value,
            ]
        )
    for column in np.transpose(p_values):
        assert stats.kstest(column, "uniform").pvalue > 1e-3


def test_each_test_rejects_what_it_is_for():
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((3000, 2))
    skewed = gaussian**2 + gaussian
    scale_mixture = gaussian * rng.choice([0.7, 1.3], (3000, 1))  # uncorrelated, not independent
    assert theory.lilliefors(skewed[:, 0]).p_value < 1e-3
    assert theory.mardia(skewed).skewness.p_value < 1e-6
    assert theory.mardia(scale_mixture).kurtosis.p_value < 1e-6
    assert theory.covariance_test(gaussian, 1.1 * np.eye(2)).p_value < 1e-3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.global_contraction(-1.0), "W_std=-1.0"),
        (lambda: theory.depth_kernels(X, depths=[2, 1], W_std=0.6), "ascending"),
        (lambda: theory.depth_kernels(X, depths=[1], lag=-1, W_std=0.6), "lag=-1"),
        (lambda: theory.depth_kernels(X, X[:, :2], depths=[1], W_std=0.6), "3 features"),
        (lambda: theory.mlp_kernels(X, depths=[0]), "at least 1"),
        (lambda: theory.smallest_eigenvalue(X[:2]), "square"),
        (lambda: theory.smallest_eigenvalue(X), "not symmetric"),
        (lambda: theory.lilliefors(np.full(10, 1.0)), "constant"),
        (lambda: theory.lilliefors(np.array([1.0, 2.0, 3.0, np.nan])), "NaN"),
        (lambda: theory.mardia(np.zeros((2, 3))), "n >= 4"),
        (lambda: theory.covariance_test(np.ones((9, 2)), np.ones((2, 2))), "singular"),
        (lambda: theory.convergence_rate(X, W_std=1.5), "no stable"),
    ],
)
def test_an_argument_that_cannot_be_right_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_kernels_of_finite_depth_are_compiled_and_differentiated():
    def entry(W_std):
        return theory.depth_kernels(
            jnp.asarray(X), depths=[3], W_std=W_std, U_std=1.0, activation="erf"
        )[0, 0, 1]

    slope = jax.jit(jax.grad(entry))(0.6)
    np.testing.assert_allclose(slope, (entry(0.61) - entry(0.59)) / 0.02, rtol=1e-3)
