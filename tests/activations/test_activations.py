"""The Gaussian expectations of the activations, against quadrature and finite differences."""

import copy
import itertools
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow_except
from scipy import integrate

from nt_deq import Activation
from nt_deq.activations import ACTIVATIONS, get_activation, piecewise_linear

SMOOTH = [name for name, a in ACTIVATIONS.items() if not a.homogeneous]
HOMOGENEOUS = [name for name, a in ACTIVATIONS.items() if a.homogeneous]
EXPANDED = ["tanh", "sigmoid", "softplus", "silu"]  # known over a range of variances only
PAIRS = [(1.0, 2.0, 0.3), (0.5, 0.7, -0.8), (3.0, 1.5, 0.97), (4.0, 4.0, 0.0), (2.0, 3.0, -1.0)]


def by_trapezoids(fn, k1, k2, rho):
    """E[fn(u) fn(u')] for a smooth `fn`; this rule converges geometrically in its step."""
    x = np.arange(-225, 226) * 0.04
    a, b = np.meshgrid(x, x, indexing="ij")
    u = np.sqrt(k1) * a
    v = np.sqrt(k2) * (rho * a + np.sqrt(1 - rho**2) * b)
    weight = np.exp(-(a**2 + b**2) / 2) * 0.04**2 / (2 * np.pi)
    return np.sum(weight * np.asarray(fn(u)) * np.asarray(fn(v)))


def by_angle(fn, rho, power):
    """E[fn(u) fn(u')] for unit variances and `fn` homogeneous of degree `power / 2`.

    In polar coordinates; the integrand is smooth between the four angles where u or u' is 0.
    """
    angle = np.arccos(rho)
    kinks = np.sort(np.mod(np.pi / 2 + np.array([0, np.pi, angle, angle + np.pi]), 2 * np.pi))

    def integrand(t):
        return float(fn(np.cos(t))) * float(fn(np.cos(t - angle)))

    ends = [0, *kinks, 2 * np.pi]
    total = sum(
        integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in itertools.pairwise(ends)
    )
    return total / (2 * np.pi) * (2 if power == 2 else 1)  # E[r²] = 2


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_are_the_gaussian_expectations(x64, name, pair):
    k1, k2, rho = pair
    activation = ACTIVATIONS[name]
    derivative = jax.vmap(jax.vmap(jax.grad(activation.fn)))
    dual, dual_slope = activation.dual(*jnp.asarray([k1, k2, rho * np.sqrt(k1 * k2)]))
    # The rule is exact to rounding here; the terms are of order 1.
    np.testing.assert_allclose(dual, by_trapezoids(activation.fn, k1, k2, rho), atol=1e-13)
    np.testing.assert_allclose(dual_slope, by_trapezoids(derivative, k1, k2, rho), atol=1e-13)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_duals_are_the_gaussian_expectations(x64, name, pair):
    k1, k2, rho = pair
    slopes = {"relu": (0, 1), "leaky_relu": (0.01, 1), "abs": (-1, 1), "identity": (1, 1)}[name]
    dual, dual_slope = ACTIVATIONS[name].dual(*jnp.asarray([k1, k2, rho * np.sqrt(k1 * k2)]))

    def fn(z):
        return slopes[int(z > 0)] * z

    def derivative(z):
        return slopes[int(z > 0)]

    np.testing.assert_allclose(dual, np.sqrt(k1 * k2) * by_angle(fn, rho, 2), atol=1e-12)
    np.testing.assert_allclose(dual_slope, by_angle(derivative, rho, 0), atol=1e-12)
    z = jnp.linspace(-2, 2, 9)
    np.testing.assert_array_equal(ACTIVATIONS[name].fn(z), [fn(float(t)) for t in z])


@pytest.mark.parametrize("name", slow_except(set(ACTIVATIONS) - set(EXPANDED[1:]), ACTIVATIONS))
def test_the_derivatives_of_the_dual(x64, name):
    at = jnp.asarray([1.3, 0.8, 0.4])
    step = 1e-6

    @jax.jit
    def dual(at):
        return jnp.stack(ACTIVATIONS[name].dual(*at))

    finite = [(dual(at + step * e) - dual(at - step * e)) / (2 * step) for e in jnp.eye(3)]
    exact = jax.jit(jax.jacrev(dual))(at)
    np.testing.assert_allclose(exact, np.transpose(finite), atol=1e-8)  # step² and rounding / step
    np.testing.assert_allclose(exact[0, 2], dual(at)[1], rtol=1e-14)  # Price's theorem


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_diagonal_is_the_dual_at_equal_arguments(dtype, name):
    large = [10.0] if name in EXPANDED else [40.0, 1e5]
    k = jnp.asarray([1e-6, 0.3, 1.0, *large], dtype)
    moments = ACTIVATIONS[name].dual_diagonal(k)
    for ours, dual in zip(moments, ACTIVATIONS[name].dual(k, k, k), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, dual, rtol=20 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_keeps_its_digits(name):
    rng = np.random.default_rng(0)
    largest = 1 if name in EXPANDED else 3
    k1, k2 = 10.0 ** rng.uniform(-3, largest, (2, 2000)).astype(np.float32)
    rho = np.concatenate([rng.uniform(-1, 1, 1000), 1 - 10.0 ** rng.uniform(-6, 0, 1000)])
    c = (rho * np.sqrt(k1 * k2.astype(float))).astype(np.float32)
    single = np.asarray(ACTIVATIONS[name].dual(*map(jnp.asarray, (k1, k2, c))))
    jax.config.update("jax_enable_x64", True)
    k1, k2, c = (jnp.asarray(a, "float64") for a in (k1, k2, c))
    double = np.asarray(ACTIVATIONS[name].dual(k1, k2, c))
    diagonals = [np.asarray(ACTIVATIONS[name].dual_diagonal(k)) for k in (k1, k2)]
    jax.config.update("jax_enable_x64", False)
    size = np.sqrt(diagonals[0] * diagonals[1])
    eps = np.finfo(np.float32).eps
    # Sums of some ten terms; half of it where multiplications and additions are fused.
    assert np.max(np.abs(single[0] - double[0]) / size[0]) < 16 * eps
    # V̇ has an infinite slope at ρ = 1 if φ has a kink: an error ε of c is one of √ε there.
    slope_error = np.abs(single[1] - double[1]) / np.maximum(size[1], 1e-30)
    assert np.max(slope_error) < (4 * np.sqrt(eps) if name in HOMOGENEOUS else 2e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_finite_at_the_corners(dtype, name):
    corners = [(1, 1, 1), (1, 1, -1), (2, 2, 2), (0, 1, 0), (0, 0, 0)]
    corners += [(1e-12, 5, 1)] if name in EXPANDED else [(1e-12, 1e12, 1), (1e12,) * 3]

    @jax.jit
    def values_and_derivatives(at):
        dual = lambda at: jnp.stack(ACTIVATIONS[name].dual(*at))  # noqa: E731
        return dual(at), jax.jacrev(dual)(at)

    for corner in corners:
        for value in values_and_derivatives(jnp.asarray(corner, dtype)):
            assert np.isfinite(value).all(), (corner, value)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    for i in range(3):
        at = [jnp.float32(1.0), jnp.float32(2.0), jnp.float32(0.5)]
        at[i] = jnp.float32(jnp.nan)
        dual, dual_slope = ACTIVATIONS[name].dual(*at)
        assert np.isnan(dual), at
        assert np.isnan(dual_slope) or name == "identity", at
    assert np.isnan(ACTIVATIONS[name].dual_diagonal(jnp.float32(jnp.nan))[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_lipschitz_constant_is_the_largest_slope(x64, name):
    z = jnp.linspace(-24, 24, 1_600_001)
    slope = jnp.max(jnp.abs(jax.vmap(jax.grad(ACTIVATIONS[name].fn))(z)))
    np.testing.assert_allclose(slope, ACTIVATIONS[name].lipschitz, rtol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_homogeneity_is_what_it_says(x64, name):
    z = jnp.linspace(-3, 3, 13)
    scaled = ACTIVATIONS[name].fn(2.5 * z)
    assert np.allclose(scaled, 2.5 * ACTIVATIONS[name].fn(z)) == ACTIVATIONS[name].homogeneous


def test_names_resolve_and_others_are_refused():
    assert get_activation("relu") is ACTIVATIONS["relu"]
    assert get_activation(ACTIVATIONS["erf"]) is ACTIVATIONS["erf"]
    with pytest.raises(
        ValueError, match=r"activation='rleu' is unknown; use one of relu, leaky_relu"
    ):
        get_activation("rleu")
    with pytest.raises(
        TypeError, match=r"activation=3 is neither a name nor an nt_deq\.Activation"
    ):
        get_activation(3)
    for name in ("sin", "erf", *EXPANDED):
        assert get_activation(ACTIVATIONS[name].fn) is ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("relu", [jax.nn.relu, nnx.relu, lambda z: jnp.maximum(z, 0)]),
        ("leaky_relu", [jax.nn.leaky_relu, partial(nnx.leaky_relu, negative_slope=0.01)]),
        ("abs", [jnp.abs, jnp.absolute, jax.lax.abs]),
        ("identity", [lambda z: z, lambda z: 1.0 * z]),
        ("erf", [jax.scipy.special.erf, jax.lax.erf]),
        ("gelu", [partial(jax.nn.gelu, approximate=False)]),
        ("sin", [jnp.sin, jax.lax.sin]),
        ("cos", [jnp.cos, jax.lax.cos]),
        ("tanh", [jnp.tanh, jax.nn.tanh, jax.lax.tanh, nnx.tanh]),
        ("sigmoid", [jax.nn.sigmoid, jax.lax.logistic, nnx.sigmoid]),
        ("softplus", [jax.nn.softplus, nnx.softplus]),
        ("silu", [jax.nn.silu, jax.nn.swish, nnx.swish]),
    ],
)
def test_functions_mean_the_names(name, functions):
    for fn in functions:
        assert get_activation(fn) is ACTIVATIONS[name], fn
        assert get_activation(copy.deepcopy(fn)) is ACTIVATIONS[name], fn  # as sklearn's clone does


def test_any_slopes_have_a_closed_form(x64):
    steep = get_activation(partial(jax.nn.leaky_relu, negative_slope=0.3))
    expected = piecewise_linear("by its slopes", 0.3, 1.0)
    at = jnp.asarray([1.3, 0.8, 0.4])
    np.testing.assert_array_equal(steep.dual(*at), expected.dual(*at))
    assert steep.homogeneous
    assert steep.name == "piecewise_linear(0.3, 1)"


def test_functions_that_are_near_are_not_taken_for_the_names(x64):
    """The default of `jax.nn.gelu` is an approximation by tanh, and has kernels of its own."""
    near = [jax.nn.gelu, lambda z: jnp.maximum(z, 1e-9 * z), lambda z: jnp.tanh((1 + 1e-9) * z)]
    for fn in near:
        assert get_activation(fn) not in ACTIVATIONS.values()
    k = jnp.ones(())
    difference = jnp.abs(get_activation(jax.nn.gelu).dual_diagonal(k)[0] - by_gelu(k))
    assert 1e-5 < difference < 1e-3
    with pytest.raises(ValueError, match="its derivative is not the one that JAX has"):
        get_activation(lambda z: jax.lax.stop_gradient(jnp.tanh(z)))


def by_gelu(k):
    return ACTIVATIONS["gelu"].dual_diagonal(k)[0]


@pytest.mark.smoke
def test_a_function_may_be_seen_first_under_a_transformation():
    from nt_deq import deq_kernel

    x = jnp.arange(6.0).reshape(3, 2) / 6

    def kernel(w, fn):
        return deq_kernel(x, W_std=w, activation=fn).ntk

    for make in (lambda: lambda z: jnp.maximum(z, 0), lambda: lambda z: jnp.tanh(z) + jnp.sin(z)):
        expected = kernel(0.3, make())
        np.testing.assert_allclose(jax.jit(partial(kernel, fn=make()))(0.3), expected, rtol=1e-5)
        many = jax.vmap(jax.jit(partial(kernel, fn=make())))(jnp.array([0.3]))
        np.testing.assert_allclose(many[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="elu: its Hermite series does not converge"):
        jax.jit(partial(kernel, fn=jax.nn.elu))(0.3)


def test_activations_pickle():
    for name, activation in ACTIVATIONS.items():
        assert pickle.loads(pickle.dumps(activation)) is activation, name
        assert copy.deepcopy(activation) is activation, name
    for fn in (jax.nn.gelu, jax.nn.mish, by_gelu_approximately):
        assert pickle.loads(pickle.dumps(get_activation(fn))) is get_activation(fn), fn
    slopes = pickle.loads(pickle.dumps(piecewise_linear("mine", -0.5, 2.0)))
    assert slopes.name == "mine"
    np.testing.assert_array_equal(slopes.fn(jnp.array([-2.0, 1.0])), [1.0, 2.0])


def by_gelu_approximately(z):
    return jax.nn.gelu(z) + 0 * z


def test_an_activation_of_ones_own_is_used():
    double_relu = Activation(
        "double_relu",
        lambda z: 2 * jnp.maximum(z, 0),
        lambda *a: tuple(4 * m for m in ACTIVATIONS["relu"].dual(*a)),
        lambda k: tuple(4 * m for m in ACTIVATIONS["relu"].dual_diagonal(k)),
        lipschitz=2.0,
        homogeneous=True,
    )
    from nt_deq import deq_kernel

    x = jax.random.normal(jax.random.key(0), (4, 3))
    ours = deq_kernel(x, W_std=0.3, activation=double_relu)
    np.testing.assert_allclose(ours.nngp, deq_kernel(x, W_std=0.6).nngp, rtol=1e-5)
