"""Expectations of piecewise linear functions: against quadrature, and finite differences."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from nt_deq import deq_kernel, enable_x64
from nt_deq.activations import get_activation, kinks
from nt_deq.activations.activation import Formula

BOUNDED = {
    "relu6": kinks.Kinks((0.0, 6.0), (0.0, 1.0, 0.0), 0.0),
    "hard_tanh": kinks.Kinks((-1.0, 1.0), (0.0, 1.0, 0.0), 0.0),
    "hard_sigmoid": kinks.Kinks((-3.0, 3.0), (0.0, 1 / 6, 0.0), 0.5),
}
BENT = kinks.Kinks((-2.0, -0.5, 0.7), (-0.3, 1.0, 0.5, 2.0), 0.2)
POINTS = [
    *[(1.0, 2.0, 0.3), (0.5, 0.7, -0.8), (4.0, 3.0, 0.999), (30.0, 30.0, -0.9999)],
    *[(0.1, 0.3, 0.5), (1e-3, 30.0, -0.9), (1e4, 1e2, -0.99), (1e12, 1e9, 0.9)],
]


def by_quadrature(of, k1, k2, c):
    """V and V̇ of a bounded function, over `u` and over the range where `φ'` is not 0.

    Given `u`, `E[φ(u')]` is the integral of `φ'(t) E[sign(u' - t)]/2` in `t`, and half of the sum
    of the two ends of `φ`: no large terms cancel.
    """
    x, weight = np.polynomial.legendre.leggauss(40)
    (low, high), slope = of.at, of.slopes[1]
    middle, half = of.origin + slope * (low + high) / 2, (high - low) / 2
    root, width = np.sqrt(k1), np.sqrt(k2 - c * c / k1)
    turns = [t * k1 / c + way * width * k1 / c for t in of.at for way in (-9, -4, -2, 0, 2, 4, 9)]
    ends = np.sort([*of.at, *turns, *(root * np.arange(-12, 13))])
    ends = ends[np.abs(ends) <= 12 * root]
    u = ((ends[1:] + ends[:-1])[:, None] + np.diff(ends)[:, None] * x) / 2
    density = np.diff(ends)[:, None] / 2 * weight * np.exp(-u * u / k1 / 2)
    density = density / (root * np.sqrt(2 * np.pi))
    center = u * c / k1
    steps = np.linspace(low, high, 41)
    t = ((steps[1:] + steps[:-1])[:, None] + np.diff(steps)[:, None] * x).ravel() / 2
    each = half / 40 * np.tile(weight, 40)
    signs = erf((center[..., None] - t) / (width * np.sqrt(2))) / 2
    mean = middle + slope * (signs @ each)
    rise = [erf((t - center) / (width * np.sqrt(2))) / 2 for t in of.at]
    inside = (u > low) & (u < high)
    return (
        np.sum(density * (of.origin + slope * np.clip(u, low, high)) * mean),
        np.sum(density * inside * slope**2 * (rise[1] - rise[0])),
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_moments_are_the_gaussian_expectations(dtype, name):
    k1, k2, rho = np.array(POINTS).T
    at = [jnp.asarray(a, dtype) for a in (k1, k2, rho * np.sqrt(k1 * k2))]
    found = jax.jit(get_activation(getattr(jax.nn, name)).dual)(*at)
    exact = [by_quadrature(BOUNDED[name], *point) for point in np.array(at, float).T]
    sizes = [kinks.dual_diagonal(BOUNDED[name], k) for k in at[:2]]
    # An error ε of ρ is one of ε/√(1-ρ²) of the angle between u and u', times that of a step.
    bound = 64 * jnp.finfo(dtype).eps / np.sqrt(1 - rho**2)
    for which in (0, 1):
        size = np.sqrt(np.array(sizes[0][which], float) * np.array(sizes[1][which], float))
        error = np.abs(found[which] - np.array(exact)[:, which])
        assert np.all(error <= bound * size), (which, error / size / jnp.finfo(dtype).eps)


def test_derivatives(x64):
    """Finite differences of both moments, of their gradients, and of the diagonal."""
    at, step = jnp.asarray([1.3, 0.8, 0.4]), 1e-6

    def both(of, at):
        return jnp.stack(kinks.dual(of, *at))

    def central(fn, at):
        moved = [jax.jit(jax.vmap(fn))(at[None] + way * step * jnp.eye(at.size)) for way in (1, -1)]
        return jnp.moveaxis((moved[0] - moved[1]) / (2 * step), 0, -1)

    for of in (BENT, BOUNDED["relu6"]):
        gradient = jax.jit(jax.jacfwd(lambda at, of=of: both(of, at)))
        np.testing.assert_allclose(
            gradient(at), central(lambda a, of=of: both(of, a), at), atol=1e-8
        )
        np.testing.assert_allclose(gradient(at)[0, 2], both(of, at)[1], rtol=1e-14)  # Price's
    hessian = jax.jit(jax.jacfwd(lambda at: jax.jacfwd(lambda at: both(BENT, at))(at)))(at)
    gradient = jax.jit(jax.jacfwd(lambda at: both(BENT, at)))
    np.testing.assert_allclose(hessian, central(gradient, at), atol=1e-8)

    def diagonal(k):
        return jnp.stack(kinks.dual_diagonal(BENT, k[0]))

    k = jnp.asarray([0.6])
    np.testing.assert_allclose(jax.jacrev(diagonal)(k), central(diagonal, k), atol=1e-8)


def test_equal_inputs_corners_and_nan(dtype):
    k = jnp.asarray([0.0, 1e-6, 1e-2, 0.3, 1.0, 40.0, 1e4, 1e12, np.nan], dtype)

    def pull(of, k1, k2, c, ones):
        return jax.vjp(lambda *at: kinks.dual(of, *at), k1, k2, c)[1](ones)

    program = jax.jit(pull, static_argnums=0)
    for of in (BENT, BOUNDED["hard_tanh"]):
        diagonal = kinks.dual_diagonal(of, k)
        dual = jax.jit(kinks.dual, static_argnums=0)(of, k, k, k)
        for one, other in zip(diagonal, dual, strict=True):
            assert list(np.isnan(one)) == list(np.isnan(other)) == [False] * 8 + [True]
        # An error ε of c = k moves V by ε k V̇.
        eps, (v, slope) = jnp.finfo(dtype).eps, diagonal
        assert jnp.all(jnp.abs(v - dual[0])[:-1] <= 16 * eps * (v + k * slope)[:-1])
        np.testing.assert_allclose(dual[1], slope, rtol=16 * eps)
        ones = (jnp.ones_like(k), jnp.ones_like(k))
        for sign in (1, -1, 0):
            assert all(jnp.isfinite(a[:-1]).all() for a in program(of, k, k, sign * k, ones))


def test_small_variances_see_the_middle_alone(dtype):
    """Kinks that are 40 standard deviations away do not count, in values and derivatives."""
    at = [jnp.asarray(a, dtype) for a in ([1e-6, 3e-4], [1e-5, 2e-6], [-2e-6, 1e-5])]
    relu = get_activation("relu").dual
    program = jax.jit(
        lambda dual, *at: jax.vjp(lambda *at: jnp.stack(dual(*at)), *at)[1](
            jnp.ones((2, 2), dtype)
        ),
        static_argnums=0,
    )
    eps = jnp.finfo(dtype).eps
    relu6, hard_tanh = (get_activation(getattr(jax.nn, name)).dual for name in list(BOUNDED)[:2])
    np.testing.assert_allclose(relu6(*at), relu(*at), rtol=64 * eps)
    np.testing.assert_allclose(program(relu6, *at), program(relu, *at), rtol=64 * eps)
    np.testing.assert_allclose(hard_tanh(*at), [at[2], [1, 1]], rtol=8 * eps)


def known(fn):
    """The kinks by which a function is known."""
    dual = get_activation(fn).dual
    assert isinstance(dual, Formula)
    (found,) = dual.parameters
    assert isinstance(found, kinks.Kinks)
    return found


def test_functions_are_known_by_their_values():
    for name, of in BOUNDED.items():
        activation = get_activation(getattr(jax.nn, name))
        found = known(activation)
        np.testing.assert_allclose(found.at, of.at, rtol=1e-14)
        np.testing.assert_allclose(found.slopes, of.slopes, rtol=1e-14)
        assert activation.lipschitz == max(of.slopes)
        assert not activation.homogeneous
        for again in (pickle.loads(pickle.dumps(activation)), copy.deepcopy(activation)):
            assert again == activation
        z = jnp.linspace(-9, 9, 61)
        np.testing.assert_allclose(activation.fn(z), getattr(jax.nn, name)(z), atol=1e-6)
    assert get_activation(lambda z: jnp.clip(z, -1, 1)) == get_activation(jax.nn.hard_tanh)
    shifted = known(lambda z: jnp.maximum(z - 1, 0))
    assert shifted == kinks.Kinks((1.0,), (0.0, 1.0), 0.0)
    for width in (1e-3, 1e-5, 1e-9):  # a corner cut off or rounded is no kink
        cut = [
            lambda z, w=width: jnp.maximum(z - 1, 0) + jnp.maximum(z - 1 - w, 0),
            lambda z, w=width: w * jax.nn.softplus((z - 1) / w),
        ]
        for fn in cut:
            with enable_x64(True):
                assert kinks.recognise(fn) is None
    jumps = [lambda z: jnp.maximum(z, 0) + (z > 1), lambda z: jnp.floor(jnp.clip(z, -2, 2))]
    for fn in jumps:
        with pytest.raises(ValueError, match=r"its Hermite series does not converge|it jumps"):
            get_activation(fn)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_kernels_of_equal_rows(scale):
    """Rows given twice have one kernel, and it solves its equation, in float32."""
    x = scale * jax.random.normal(jax.random.key(0), (6, 4))
    x = x.at[1].set(x[0])
    fn = jax.nn.hard_tanh
    solution = deq_kernel(x, W_std=0.9, b_std=0.1, activation=fn)
    np.testing.assert_allclose(solution.nngp[0, 1], solution.nngp[0, 0], rtol=1e-5)
    k = jnp.diag(solution.nngp)
    v, slope = get_activation(fn).dual(k[0], k[2], solution.nngp[0, 2])
    s = x[0] @ x[2] / 4 + 0.01
    rounding = 16 * float(jnp.finfo(k.dtype).eps) * jnp.sqrt(k[0] * k[2])
    assert jnp.abs(0.81 * v + s - solution.nngp[0, 2]) < rounding
    expected = solution.nngp[0, 2] / (1 - 0.81 * slope)
    np.testing.assert_allclose(solution.ntk[0, 2], expected, rtol=1e-4)
    assert (solution.ntk_error >= 0).all()
    gradient = jax.grad(lambda w: jnp.sum(deq_kernel(x, W_std=w, activation=fn).ntk))
    assert jnp.isfinite(gradient(0.8))
