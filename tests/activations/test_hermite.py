"""Hermite expansions: against closed forms and quadrature, their range, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except

from nt_deq import NotConvergedError, deq_kernel
from nt_deq.activations.activation import ACTIVATIONS, get_activation, smooth
from nt_deq.activations.expansion import Derivative, expand
from nt_deq.activations.hermite import check, dual

# Known beyond their series too (`test_mixtures`); here they are functions like any other.
EXPANDED = slow_except(("tanh", "silu"), ("tanh", "sigmoid", "softplus", "silu"))
# The largest variances that are promised, a little below those that are reached.
RANGE = {"tanh": (50, 11), "sigmoid": (200, 45), "softplus": (600, 60), "silu": (300, 45)}


def expansion(name):
    """The Hermite expansion of an activation, whatever else is known of it."""
    fn = ACTIVATIONS[name].fn
    return smooth(name, fn, check(name, fn))


def random_pairs(dtype, largest=1.0, smallest=-6.0):
    rng = np.random.default_rng(0)
    k1 = 10 ** rng.uniform(smallest, largest, (40, 1))
    k2 = 10 ** rng.uniform(smallest, largest, (1, 40))
    rho = np.clip(rng.uniform(-1.2, 1.2, (40, 40)), -1, 1)
    return [jnp.asarray(a, dtype) for a in (k1, k2, rho * np.sqrt(k1 * k2))]


@pytest.mark.parametrize(
    "name",
    slow_except(("erf", "identity"), ("erf", "gelu", "sin", "cos", "identity")),
)
def test_an_expansion_agrees_with_the_closed_form(dtype, name):
    known, expanded = ACTIVATIONS[name], expansion(name)
    k1, k2, c = random_pairs(dtype)
    eps = jnp.finfo(dtype).eps
    squares = zip(known.dual_diagonal(k1), known.dual_diagonal(k2), strict=True)
    sizes = [np.sqrt(a * b) for a, b in squares]
    duals = expanded.dual(k1, k2, c), known.dual(k1, k2, c)
    for ours, exact, size in zip(*duals, sizes, strict=True):
        assert np.max(np.abs(ours - exact) / size) < 16 * eps
    for ours, exact in zip(expanded.dual_diagonal(k1), known.dual_diagonal(k1), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=32 * eps)
    np.testing.assert_allclose(expanded.lipschitz, known.lipschitz, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erf", "gelu", "sin"])
def test_derivatives_agree_with_those_of_the_closed_form(x64, name):
    known, expanded = ACTIVATIONS[name], expansion(name)
    for at in ((1.3, 0.8, 0.4), (1e-8, 0.8, 5e-5), (0.7, 0.7, 0.7), (2.0, 0.5, -1.0)):
        for differentiate in (jax.jacrev, jax.hessian):
            ours, exact = (
                jax.jit(differentiate(lambda at, d=a.dual: jnp.stack(d(*at))))(jnp.asarray(at))
                for a in (expanded, known)
            )
            np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EXPANDED)
def test_near_equal_and_opposite_inputs(x64, name):
    """At ρ = ±1 there is one Gaussian, and nearby the error is no larger than at ±1."""
    activation, x = expansion(name), np.arange(-2000, 2001) * 0.006
    weight = np.exp(-(x**2) / 2) * 0.006 / np.sqrt(2 * np.pi)
    k1, k2 = np.repeat([[0.3, 8.0, 1e-6], [5.0, 8.0, 1.0]], 2, axis=1)
    sign = np.array([1, -1] * 3)
    ours = activation.dual(*map(jnp.asarray, (k1, k2, sign * np.sqrt(k1 * k2))))
    u, v = np.sqrt(k1)[:, None] * x, (sign * np.sqrt(k2))[:, None] * x
    slope = jax.vmap(jax.vmap(jax.grad(activation.fn)))
    for value, f in zip(ours, (activation.fn, slope), strict=True):
        exact = (np.asarray(f(jnp.asarray(u))) * np.asarray(f(jnp.asarray(v)))) @ weight
        np.testing.assert_allclose(value, exact, rtol=3e-14, atol=1e-15)


@pytest.mark.parametrize("name", EXPANDED)
def test_small_variances_keep_their_digits(x64, name):
    """φ is linear there: E[φ'(u)φ'(u')] = φ'(0)², and V - E[φ]E[φ] is that times c."""
    activation = expansion(name)
    at_zero = jnp.zeros(())
    slope = jax.grad(activation.fn)(at_zero)
    k = jnp.asarray([0.0, 1e-30, 1e-12])
    dual, dual_slope = activation.dual(k, 2 * k, -k)
    np.testing.assert_allclose(dual_slope, jnp.full(3, slope**2), rtol=1e-11)
    expected = activation.fn(at_zero) ** 2
    assert np.all(np.abs(dual - expected) <= 1e-11 * expected + 2 * k)
    np.testing.assert_allclose(activation.dual_diagonal(k)[1], jnp.full(3, slope**2), rtol=1e-11)
    if name == "tanh":
        odd, _ = activation.dual(*jnp.asarray([[1e-30] * 3, [1e-28] * 3, [1e-30] * 3]))
        np.testing.assert_allclose(odd, jnp.full(3, 1e-30), rtol=1e-13)


@pytest.mark.parametrize("name", EXPANDED)
def test_beyond_the_range_it_is_nan_and_within_it_right(dtype, name):
    activation = expansion(name)
    limit = RANGE[name][dtype == np.float64]
    eps = jnp.finfo(dtype).eps
    k = jnp.asarray([limit, 1.0, 100 * limit, jnp.nan, -1.0], dtype)
    for ours, exact in zip(activation.dual(k, k, k), activation.dual_diagonal(k), strict=True):
        assert list(np.isfinite(ours)) == list(np.isfinite(exact)) == [True] * 2 + [False] * 3
        # The rounding of ρ counts as often as the degree.
        np.testing.assert_allclose(ours[:2], exact[:2], rtol=8 * eps * limit)
    one = jnp.ones((), dtype)
    assert np.isnan(activation.dual(100 * limit * one, one, one)).all()
    assert np.isnan(activation.dual(one, 100 * limit * one, one)).all()


@pytest.mark.parametrize("name", EXPANDED)
def test_it_is_symmetric_to_the_bit(dtype, name):
    k1, k2, c = random_pairs(dtype)
    for ours, exchanged in zip(
        expansion(name).dual(k1, k2, c), expansion(name).dual(k2.T, k1.T, c.T), strict=True
    ):
        np.testing.assert_array_equal(ours, exchanged.T)


def test_small_variances_need_few_terms():
    limits = expand(Derivative(jnp.tanh), np.dtype(np.float32)).limits
    assert limits[0] > 0.7  # 16 terms of every second degree
    assert np.all(np.diff(limits) >= 0)


def test_one_large_variance_does_not_change_the_others(x64):
    k = jnp.asarray([0.1, 1.0, 10.0])
    together = expansion("tanh").dual(k[:, None], k[None, :], 0.05 * jnp.ones((3, 3)))
    alone = expansion("tanh").dual(k[:1], k[:1], jnp.asarray([0.05]))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[0, 0], b[0], rtol=1e-14)


def test_the_same_function_is_the_same_activation():
    def fn(z):
        return jnp.tanh(z) + 0.1 * z

    assert get_activation(fn) is get_activation(fn)
    assert get_activation(fn).name == "fn"
    np.testing.assert_allclose(get_activation(fn).lipschitz, 1.1, rtol=1e-5)


def test_kernels_of_an_expansion_are_those_of_the_closed_form(x64):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    ours = deq_kernel(x, W_std=0.9, b_std=0.1, activation=expansion("gelu"))
    known = deq_kernel(x, W_std=0.9, b_std=0.1, activation="gelu")
    np.testing.assert_allclose(ours.nngp, known.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, known.ntk, rtol=1e-12)


def test_vmap_and_jit(x64):
    k1, k2, c = random_pairs(np.float64)
    silu = expansion("silu")
    whole = silu.dual(k1, k2, c)
    rows = jax.jit(jax.vmap(lambda k1, c: silu.dual(k1, k2[0], c)))(k1, c)
    for a, b in zip(whole, rows, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda z: jnp.tanh(z) + jnp.abs(z), r"its Hermite series .*: at variance .* kink"),
        (lambda z: jnp.abs(z - 1) * z, "its Hermite series does not converge"),
        (lambda z: jnp.tanh(100 * z), "does not converge"),
        (jnp.log, "log: its Hermite series does not converge"),
        (lambda z: 1 / z, "does not converge"),
        (jnp.sign, "sign: .* it jumps, or its derivative is not the one"),
        (jnp.round, "round: .* it jumps"),
        (lambda z: jax.lax.stop_gradient(jnp.tanh(z)), "its derivative is not the one"),
        (jax.nn.softmax, "softmax: its value at one element depends on the others"),
        (lambda z: jnp.sum(z) * z, "depends on the others"),
        (jnp.sum, r"sum: it maps float32\(6,\) to .* must be elementwise"),
        (lambda z: z + 1j, "complex64.* must be elementwise and real"),
        (lambda z: (z, z), "must be elementwise and real"),
        (np.tanh, "tanh: it is not a function of a JAX array"),
        (lambda a, b: a, "it is not a function of a JAX array"),
    ],
)
def test_what_has_no_expansion_is_refused(fn, message):
    with pytest.raises(ValueError, match=rf"(?s)activation=.*{message}"):
        get_activation(fn)


@pytest.mark.slow
def test_derivatives_of_every_order_are_of_the_same_kind(x64):
    """E[u³ u'³] = 9 k1 k2 c + 6 c³, and all of its derivatives."""
    at = jnp.asarray([1.3, 0.8, 0.4])

    def exact(at):
        return 9 * at[0] * at[1] * at[2] + 6 * at[2] ** 3

    def ours(at):
        return dual(_cube, _cube, *at)[0]

    for order in (jax.grad, jax.hessian):
        np.testing.assert_allclose(jax.jit(order(ours))(at), order(exact)(at), rtol=1e-12)


def _cube(z):
    return z**3


def test_a_variance_beyond_the_range_is_named():
    x = 100 * jnp.ones((2, 3))
    with pytest.raises(
        NotConvergedError, match=r"'hard_silu': its expectations are not known in float32"
    ):
        deq_kernel(x, W_std=0.5, activation=jax.nn.hard_swish)
