"""Expectations of elu and its kin: against quadrature, finite differences, and Hermite's limits."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from quadrature import by_polar_coordinates
from scipy.special import erfcx

from nt_deq import deq_kernel, enable_x64, stax
from nt_deq.activations import exponential, get_activation

SELU = exponential.Exponential(1.0507009873554805, 1.0507009873554805 * 1.6732632423543772, 1.0)
KIN = {
    "elu": exponential.Exponential(1.0, 1.0, 1.0),
    "selu": SELU,
    "celu": exponential.Exponential(1.0, 1.0, 0.3),
}
POINTS = [
    *[(1.0, 2.0, 0.3), (0.5, 0.7, -0.8), (4.0, 3.0, 0.999), (30.0, 30.0, -0.9999)],
    *[(0.2, 0.26, 0.7), (1e-3, 30.0, -0.9), (1e4, 1e2, -0.99), (1e12, 1e9, 0.9)],
    *[(1e-6, 1e-4, 0.5), (1e-6, 1e-6, 0.9999), (1e-6, 1e12, 0.6), (3.0, 1e-2, 0.99)],
]


def derivatives(of):
    """`φ`, and `φ'` and `φ''` without what they have at 0."""

    def exp(z):
        return np.exp(np.minimum(z, 0) / of.length)

    return (
        lambda z: np.where(z > 0, of.positive * z, of.scale * of.length * (exp(z) - 1)),
        lambda z: np.where(z > 0, of.positive, of.scale * exp(z)),
        lambda z: np.where(z > 0, 0, of.scale / of.length * exp(z)),
    )


def by_variance(of, k1, k2, rho):
    """`∂V/∂k1 = E[φ''(u) φ(u')]/2`, of which a kink has its share."""
    fn, _, bend = derivatives(of)
    width = np.sqrt(k2 * (1 - rho**2))
    below = of.scale * of.length / 2 * (erfcx(width / of.length / np.sqrt(2)) - 1)
    mean = of.positive * width / np.sqrt(2 * np.pi) + below
    kink = (of.positive - of.scale) / np.sqrt(2 * np.pi * k1) * mean
    return (by_polar_coordinates(bend, fn, k1, k2, rho) + kink) / 2


@pytest.mark.parametrize("name", slow_except(["elu"], KIN))
def test_moments_and_slopes_are_the_gaussian_expectations(dtype, name):
    of = KIN[name]
    k1, k2, rho = np.array(POINTS).T
    at = [jnp.asarray(a, dtype) for a in (k1, k2, rho * np.sqrt(k1 * k2))]
    (value, slope), pull = jax.vjp(jax.jit(partial(exponential.dual, of)), *at)
    by_k1, _, by_c = pull((jnp.ones_like(value), jnp.zeros_like(value)))
    np.testing.assert_allclose(by_c, slope, rtol=4 * jnp.finfo(dtype).eps)  # Price's theorem
    fn, derivative, _ = derivatives(of)
    k1, k2, c = (np.array(a, float) for a in at)
    points = list(zip(k1, k2, c / np.sqrt(k1 * k2), strict=True))
    exact = np.array([[by_polar_coordinates(f, f, *p) for p in points] for f in (fn, derivative)])
    diagonals = [np.array(exponential.dual_diagonal(of, a), float) for a in at[:2]]
    size = np.sqrt(diagonals[0] * diagonals[1])
    eps = jnp.finfo(dtype).eps
    assert np.all(np.abs(value - exact[0]) <= 64 * eps * size[0])
    # Of the reference 50 eps; an error ε of ρ is one of ε/√(1-ρ²) of the angle at a kink.
    assert np.all(np.abs(slope - exact[1]) <= 64 * eps * size[1] / np.sqrt(1 - rho**2))
    expected = np.array([by_variance(of, *point) for point in points])
    assert np.all(np.abs(by_k1 - expected) * k1 <= 64 * eps * size[0])


@pytest.mark.slow
def test_higher_derivatives(x64):
    """Finite differences of the derivatives of both moments, where series end, and beyond."""
    step = 1e-6
    gradient = jax.jit(jax.jacrev(lambda at: jnp.stack(exponential.dual(SELU, *at))))
    hessian = jax.jit(jax.jacfwd(gradient))
    for at in ([1.3, 0.8, 0.4], [0.3, 0.1, -0.05], [0.2, 40.0, 1.0]):
        at = jnp.asarray(at)
        moved = [jax.vmap(gradient)(at[None] + way * step * jnp.eye(3)) for way in (1, -1)]
        finite = jnp.moveaxis((moved[0] - moved[1]) / (2 * step), 0, -1)
        np.testing.assert_allclose(hessian(at), finite, atol=1e-8)

    def diagonal(k):
        return jnp.stack(exponential.dual_diagonal(SELU, k))

    k = jnp.asarray([0.01, 0.2, 0.3, 1.0, 50.0])
    moved = [jax.vmap(jax.jacrev(diagonal))(k * (1 + way * step)) for way in (1, -1)]
    second = jax.vmap(jax.jacfwd(jax.jacrev(diagonal)))(k)
    finite = (moved[0] - moved[1]) / (2 * step * k[:, None])
    np.testing.assert_allclose(second, finite, rtol=1e-6)
    first = (diagonal(k * (1 + step)) - diagonal(k * (1 - step))) / (2 * step * k[None])
    np.testing.assert_allclose(jax.vmap(jax.jacrev(diagonal))(k).T, first, rtol=1e-8)


def test_equal_inputs_corners_and_nan(dtype):
    k = jnp.asarray([0.0, 1e-6, 1e-2, 0.24, 0.26, 1.0, 40.0, 1e4, 1e12, np.nan], dtype)
    eps = jnp.finfo(dtype).eps

    @jax.jit
    def pull(k1, k2, c):
        moments, back = jax.vjp(partial(exponential.dual, SELU), k1, k2, c)
        return moments, back((jnp.ones_like(k1), jnp.ones_like(k1)))

    v, slope = exponential.dual_diagonal(SELU, k)
    dual, _ = pull(k, k, k)
    for one, other in zip((v, slope), dual, strict=True):
        assert list(np.isnan(one)) == list(np.isnan(other)) == [False] * 9 + [True]
    assert jnp.all(jnp.abs(v - dual[0])[:-1] <= 16 * eps * (v + k * slope)[:-1])
    np.testing.assert_allclose(dual[1][1:], slope[1:], rtol=16 * eps)
    for sign in (1, -1, 0):
        assert all(jnp.isfinite(a[:-1]).all() for a in pull(k, k, sign * k)[1])


def test_small_variances_see_a_line(dtype):
    """`φ(z) = z + O(z²)` of elu: `V` is `c` but for terms of higher order."""
    at = [jnp.asarray(a, dtype) for a in ([1e-10, 3e-14], [1e-12, 2e-16], [-2e-12, 1e-15])]
    fn = get_activation(jax.nn.elu).dual
    np.testing.assert_allclose(fn(*at)[0], at[2], rtol=2e-5)
    np.testing.assert_allclose(fn(*at)[1], jnp.ones(2), rtol=2e-5)


def known(fn):
    """The parameters by which a function is known."""
    (found,) = get_activation(fn).dual.parameters  # pyright: ignore[reportFunctionMemberAccess]
    assert isinstance(found, exponential.Exponential)
    return found


def test_functions_are_known_by_their_values():
    functions = {
        "elu": [jax.nn.elu, lambda z: jnp.where(z > 0, z, jnp.exp(jnp.minimum(z, 0)) - 1)],
        "selu": [jax.nn.selu],
        "celu": [partial(jax.nn.celu, alpha=0.3)],
    }
    for name, fns in functions.items():
        for fn in fns:
            np.testing.assert_allclose(known(fn), KIN[name], rtol=1e-14)
    activation = get_activation(jax.nn.selu)
    assert activation.lipschitz == known(jax.nn.selu).scale
    assert not activation.homogeneous
    assert pickle.loads(pickle.dumps(activation)) == activation
    z = jnp.linspace(-9, 9, 61)
    np.testing.assert_allclose(activation.fn(z), jax.nn.selu(z), atol=1e-6)
    others = [
        lambda z: jax.nn.elu(z) + 1e-9 * jnp.sin(z),
        lambda z: jnp.where(z > 0, z, jnp.exp(z) - 1 + 1e-9 * z),
        lambda z: 1e-5 * jax.nn.softplus(z / 1e-5) + jnp.expm1(jnp.minimum(z, 0)),
        lambda z: jnp.where(z > 0, 1e-3 * z, jnp.expm1(jnp.minimum(z, 0))),
    ]
    with enable_x64(True):
        assert all(exponential.recognise(fn) is None for fn in others)


@pytest.mark.parametrize("scale", slow_except([], [1e-3, 1.0, 300.0]))
def test_kernels_of_equal_rows(scale):
    """Rows given twice have one kernel, and it solves its equation, in float32, near the edge."""
    x = scale * jax.random.normal(jax.random.key(0), (6, 4))
    x = x.at[1].set(x[0])
    solution = deq_kernel(x, W_std=0.98, b_std=0.1, activation=jax.nn.elu)
    np.testing.assert_allclose(solution.nngp[0, 1], solution.nngp[0, 0], rtol=1e-5)
    k = jnp.diag(solution.nngp)
    v, slope = get_activation(jax.nn.elu).dual(k[0], k[2], solution.nngp[0, 2])
    s = x[0] @ x[2] / 4 + 0.01
    rounding = 16 * float(jnp.finfo(k.dtype).eps) * jnp.sqrt(k[0] * k[2])
    assert jnp.abs(0.98**2 * v + s - solution.nngp[0, 2]) < rounding
    expected = solution.nngp[0, 2] / (1 - 0.98**2 * slope)
    np.testing.assert_allclose(solution.ntk[0, 2], expected, rtol=1e-4)
    with enable_x64(True):
        wide = deq_kernel(np.asarray(x, float), W_std=0.98, b_std=0.1, activation=jax.nn.elu)
    for one, bound, exact in zip(
        solution[:2], (solution.nngp_error, solution.ntk_error), wide[:2], strict=True
    ):
        assert np.all(np.abs(np.asarray(one, float) - np.asarray(exact)) <= np.asarray(bound))
    gradient = jax.grad(lambda w: jnp.sum(deq_kernel(x, W_std=w, activation=jax.nn.elu).ntk))
    assert jnp.isfinite(gradient(0.8))


def test_layers_have_the_same_kernel():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    cell = stax.serial(stax.Nonlinearity(jax.nn.elu), stax.Dense(1, W_std=0.9))
    fixed = stax.FixedPoint(cell, stax.Dense(1, b_std=0.1))[2](x, None, ("nngp", "ntk"))
    ours = deq_kernel(x, W_std=0.9, b_std=0.1, activation=jax.nn.elu)
    np.testing.assert_allclose(fixed.nngp, ours.nngp, rtol=1e-5)
    np.testing.assert_allclose(fixed.ntk, ours.ntk, rtol=1e-5)
