"""The Gaussian expectations of the activations, against quadrature and finite differences."""

import copy
import gc
import itertools
import math
import pickle
import weakref
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import integrate

from nt_deq import Activation
from nt_deq.activations import ACTIVATIONS, get_activation, piecewise_linear
from nt_deq.activations.activation import piecewise_square
from nt_deq.errors import ArgumentError

SMOOTH = [name for name, a in ACTIVATIONS.items() if not a.homogeneous]
HOMOGENEOUS = [name for name, a in ACTIVATIONS.items() if a.homogeneous]
MIXTURES = ["tanh", "sigmoid", "softplus", "silu"]
PAIRS = [(1.0, 2.0, 0.3), (0.5, 0.7, -0.8), (3.0, 1.5, 0.97), (4.0, 4.0, 0.0), (2.0, 3.0, -1.0)]


def by_trapezoids(fn, k1, k2, rho):
    """E[fn(u) fn(u')] for a smooth `fn`; this rule converges geometrically in its step."""
    x = np.arange(-225, 226) * 0.04
    a, b = np.meshgrid(x, x, indexing="ij")
    u = np.sqrt(k1) * a
    v = np.sqrt(k2) * (rho * a + np.sqrt(1 - rho**2) * b)
    weight = np.exp(-(a**2 + b**2) / 2) * 0.04**2 / (2 * np.pi)
    return np.sum(weight * np.asarray(fn(jnp.asarray(u))) * np.asarray(fn(jnp.asarray(v))))


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


class Evaluated(NamedTuple):
    """What is known of an activation at some points `(k1, k2, c)`.

    Attributes:
      dual: V and V̇, `(2, points)`.
      derivatives: theirs in k1, k2 and c, by reverse mode, `(2, 3, points)`.
      diagonal: both at `k1 = k2 = c`, for each k1, `(2, points)`.
    """

    dual: np.ndarray
    derivatives: np.ndarray
    diagonal: np.ndarray


@lru_cache
def _program(name):
    activation = ACTIVATIONS[name]

    @jax.jit
    def evaluate(k1, k2, c):
        dual, pull = jax.vjp(lambda *at: jnp.stack(activation.dual(*at)), k1, k2, c)
        ones = jnp.zeros_like(dual).at[0].set(1)
        derivatives = jnp.stack([jnp.stack(pull(which)) for which in (ones, ones[::-1])])
        return dual, derivatives, jnp.stack(activation.dual_diagonal(k1))

    return evaluate


def evaluate(name, points, dtype=np.float64, size=8):
    """Everything of up to `size` points: one program serves all tests of a function and dtype."""
    padded = jnp.asarray([*points, *[(1, 1, 0)] * (size - len(points))], dtype).T
    return Evaluated(*(np.asarray(a)[..., : len(points)] for a in _program(name)(*padded)))


def covariances(pairs):
    return [(k1, k2, rho * np.sqrt(k1 * k2)) for k1, k2, rho in pairs]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_are_the_gaussian_expectations(x64, name):
    fn = ACTIVATIONS[name].fn
    derivative = jax.vmap(jax.vmap(jax.grad(fn)))
    exact = [[by_trapezoids(f, *pair) for pair in PAIRS] for f in (fn, derivative)]
    # The rule is exact to rounding here; the terms are of order 1.
    np.testing.assert_allclose(evaluate(name, covariances(PAIRS)).dual, exact, atol=1e-13)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_duals_are_the_gaussian_expectations(x64, name):
    slopes = {"relu": (0, 1), "leaky_relu": (0.01, 1), "abs": (-1, 1), "identity": (1, 1)}[name]

    def fn(z):
        return slopes[int(z > 0)] * z

    def derivative(z):
        return slopes[int(z > 0)]

    dual, dual_slope = evaluate(name, covariances(PAIRS)).dual
    exact = [np.sqrt(k1 * k2) * by_angle(fn, rho, 2) for k1, k2, rho in PAIRS]
    np.testing.assert_allclose(dual, exact, atol=1e-12)
    exact = [by_angle(derivative, rho, 0) for _, _, rho in PAIRS]
    np.testing.assert_allclose(dual_slope, exact, atol=1e-12)
    z = jnp.linspace(-2, 2, 9)
    np.testing.assert_array_equal(ACTIVATIONS[name].fn(z), [fn(float(t)) for t in z])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivatives_of_the_dual(x64, name):
    at, step = np.array([1.3, 0.8, 0.4]), 1e-6
    steps = step * np.eye(3)
    found = evaluate(name, [at, *(at + steps), *(at - steps)])
    finite = (found.dual[:, 1:4] - found.dual[:, 4:]) / (2 * step)
    exact = found.derivatives[:, :, 0]
    np.testing.assert_allclose(exact, finite, atol=1e-8)  # step² and rounding / step
    np.testing.assert_allclose(exact[0, 2], found.dual[1, 0], rtol=1e-14)  # Price's theorem


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_diagonal_is_the_dual_at_equal_arguments(dtype, name):
    variances = [1e-6, 0.3, 1.0, 40.0, 1e5]
    found = evaluate(name, [(k, k, k) for k in variances], dtype)
    assert found.dual.dtype == found.diagonal.dtype == dtype
    np.testing.assert_allclose(found.diagonal, found.dual, rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_keeps_its_digits(name):
    rng = np.random.default_rng(0)
    k1, k2 = 10.0 ** rng.uniform(-3, 3, (2, 2000)).astype(np.float32)
    rho = np.concatenate([rng.uniform(-1, 1, 1000), 1 - 10.0 ** rng.uniform(-6, 0, 1000)])
    c = (rho * np.sqrt(k1 * k2.astype(float))).astype(np.float32)
    dual = jax.jit(ACTIVATIONS[name].dual)
    single = np.asarray(dual(*map(jnp.asarray, (k1, k2, c))))
    jax.config.update("jax_enable_x64", True)
    k1, k2, c = (jnp.asarray(a, "float64") for a in (k1, k2, c))
    double = np.asarray(dual(k1, k2, c))
    diagonals = [np.asarray(jax.jit(ACTIVATIONS[name].dual_diagonal)(k)) for k in (k1, k2)]
    jax.config.update("jax_enable_x64", False)
    size = np.sqrt(diagonals[0] * diagonals[1])
    eps = np.finfo(np.float32).eps
    # Sums of some ten terms; half of it where multiplications and additions are fused.
    assert np.max(np.abs(single[0] - double[0]) / size[0]) < 16 * eps
    # V̇ has an infinite slope at ρ = 1 if φ has a kink: an error ε of c is one of √ε there.
    slope_error = np.abs(single[1] - double[1]) / np.maximum(size[1], 1e-30)
    bound = 4 * np.sqrt(eps) if name in HOMOGENEOUS else 2e-4
    assert np.max(slope_error) < bound


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_finite_at_the_corners(dtype, name):
    corners = [(1, 1, 1), (1, 1, -1), (2, 2, 2), (0, 1, 0), (0, 0, 0)]
    corners += [(1e-12, 1e12, 1), (1e12,) * 3]
    for values in evaluate(name, corners, dtype):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    nan = np.nan
    points = [(nan, 2.0, 0.5), (1.0, nan, 0.5), (1.0, 2.0, nan)]
    found = evaluate(name, points, np.float32)
    assert np.isnan(found.dual[0]).all()
    assert np.isnan(found.dual[1]).all() or name == "identity"
    assert list(np.isnan(found.diagonal[0])) == [True, False, False]


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


@pytest.mark.usefixtures("unchecked")
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
    for name in ("sin", "erf", *MIXTURES):
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


def by_angle_of_degree(fn, rho, degree):
    """The same for `fn` homogeneous of any degree: `E[r^2d]` is `2^d d!`."""
    return by_angle(fn, rho, 0) * 2**degree * math.factorial(degree)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-1.0, 1.0), (0.3, 2.0)])
def test_squares_have_a_closed_form(x64, slopes):
    negative, positive = slopes
    squared = get_activation(
        lambda z: positive * jax.nn.relu(z) ** 2 + negative * jnp.minimum(z, 0) ** 2
    )
    assert squared == piecewise_square("by its slopes", negative, positive)
    assert pickle.loads(pickle.dumps(squared)) == squared
    assert squared.lipschitz == np.inf
    at = jnp.asarray(covariances(PAIRS)).T
    found = squared.dual(*at)
    for moment, degree, fn in (
        (found[0], 2, lambda z: slopes[int(z > 0)] * z * z),
        (found[1], 1, lambda z: 2 * slopes[int(z > 0)] * z),
    ):
        exact = [
            (k1 * k2) ** (degree / 2) * by_angle_of_degree(fn, r, degree) for k1, k2, r in PAIRS
        ]
        np.testing.assert_allclose(moment, exact, atol=1e-11)
    both = jax.jacrev(lambda at: jnp.stack(squared.dual(*at)))
    point, step = jnp.asarray([1.3, 0.8, 0.4]), 1e-6
    moved = [
        jnp.stack([jnp.stack(squared.dual(*(point + way * d))) for d in step * jnp.eye(3)])
        for way in (1, -1)
    ]
    np.testing.assert_allclose(both(point), (moved[0] - moved[1]).T / (2 * step), atol=1e-7)
    k = jnp.asarray([0.0, 1e-6, 1.0, 1e12])
    diagonal = squared.dual_diagonal(k)
    np.testing.assert_allclose(squared.dual(k, k, k), diagonal, rtol=1e-14)
    np.testing.assert_allclose(
        jax.vmap(both)(jnp.stack([k, k, k], axis=1))[:, 0, 2], diagonal[1], rtol=1e-14
    )


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
    with pytest.raises(ValueError, match="its Hermite series does not converge"):
        jax.jit(partial(kernel, fn=lambda z: jnp.tanh(z) + jnp.abs(z)))(0.3)


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


def test_activations_of_one_formula_are_equal_and_compile_once():
    @partial(jax.jit, static_argnums=0)
    def variance(activation, k):
        return activation.dual_diagonal(k)[0]

    def made_twice():
        return [piecewise_linear("leaky", -0.5, 2.0), piecewise_linear("again", -0.5, 2)]

    for activation in [*made_twice(), *(pickle.loads(pickle.dumps(a)) for a in made_twice())]:
        variance(activation, jnp.ones(2))
        assert activation == made_twice()[0]
        assert hash(activation) == hash(made_twice()[0])
    assert variance._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert piecewise_linear("x", 0, 1) == ACTIVATIONS["relu"] != piecewise_linear("relu", 0.0, 2.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "transform", [jax.jit, jax.grad, lambda f: lambda a: jax.vmap(f)(jnp.array([a]))]
)
def test_an_activation_that_closes_over_a_traced_value_is_refused(transform):
    def variance(a):
        return get_activation(lambda z: jnp.tanh(a * z)).dual_diagonal(jnp.ones(()))[0]

    with pytest.raises(ArgumentError, match=r"activation=<lambda>: it closes over .* is traced"):
        transform(variance)(0.5)
    with pytest.raises(ArgumentError, match=r"leaky: a slope is traced"):
        transform(lambda a: piecewise_linear("leaky", a, 1.0).dual_diagonal(a)[0])(0.5)


def test_an_activation_that_is_not_hashable_is_refused():
    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, z):
            return jnp.tanh(z)

    fn = Unhashable()
    for activation in (fn, Activation("mine", fn, fn, fn, lipschitz=1.0)):
        with pytest.raises(ArgumentError, match=r"unhashable.*dataclass\(frozen=True\)"):
            get_activation(activation)


def test_a_function_may_be_seen_first_by_a_fit_or_an_adapter():
    from nt_deq import gp, stax

    x = jnp.arange(12.0).reshape(6, 2) / 6
    bends = [lambda z: jnp.tanh(z) + 0.3 * jnp.sin(z) for _ in range(2)]

    def make_kernel(hyper, fn):
        return stax.serial(stax.DEQ(1, hyper["W_std"], activation=fn), stax.Dense(1))[2]

    start = {"W_std": 0.5, "noise": 0.1}
    first = partial(make_kernel, fn=bends[0])
    fitted = gp.fit(first, x, x[:, 0], start, restarts=1, max_steps=2)
    assert jnp.isfinite(fitted.loss)
    tinygp = pytest.importorskip("tinygp")
    from nt_deq.tinygp import StaxKernel

    @jax.jit
    def log_probability(hyper):
        kernel = StaxKernel(partial(make_kernel, fn=bends[1]), hyper)
        return tinygp.GaussianProcess(kernel, x, diag=0.1).log_probability(x[:, 0])

    assert jnp.isfinite(log_probability(start))


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_derivatives_at_equal_inputs_do_not_depend_on_rounding(name):
    """`V = exp(-(k1 + k2)/2) sinh c`, or cosh, where `k1 + k2 - 2c` is a few ulp of either sign."""
    k = np.random.default_rng(0).uniform(0.1, 20.0, 300).astype(np.float32)
    above, below = np.nextafter(k, np.float32(np.inf)), np.nextafter(k, np.float32(0))
    found = jax.vmap(jax.grad(lambda *args: ACTIVATIONS[name].dual(*args)[0], (0, 1, 2)))
    fn, slope = (np.sinh, np.cosh) if name == "sin" else (np.cosh, np.sinh)
    for c, k2 in ((above, k), (above, below), (k, below), (k, k)):
        size = np.exp(-(k.astype(float) + k2) / 2)
        c64 = c.astype(float)
        expected = [-size * fn(c64) / 2, -size * fn(c64) / 2, size * slope(c64)]
        # 2c exceeds k1 + k2 by up to 3 ulp of 20, and exp moves by half of that
        np.testing.assert_allclose(found(k, k2, c), expected, rtol=1e-5, err_msg=name)


@dataclass(frozen=True)
class Leaky:
    slope: float

    def __call__(self, z):
        return jnp.where(z > 0, z, self.slope * z)


def test_equal_functions_are_one_activation():
    assert get_activation(Leaky(0.2)) is get_activation(Leaky(0.2))
    assert get_activation(Leaky(0.2)) != get_activation(Leaky(0.3))


def test_functions_made_anew_are_not_kept_for_ever():
    """The last 64 are, with what was found out about them."""
    made = []
    for _ in range(70):
        fn = lambda z: jnp.maximum(z, 0)  # noqa: E731
        assert get_activation(fn).name == "relu"
        made.append(weakref.ref(fn))
    jax.clear_caches()
    gc.collect()
    assert sum(ref() is not None for ref in made) <= 64


def test_a_corner_that_is_rounded_is_no_kink():
    """Its kernel is another one where variances are as small as the corner."""
    with pytest.raises(ValueError, match="does not converge"):
        get_activation(lambda z: 1e-5 * jax.nn.softplus(z / 1e-5))
