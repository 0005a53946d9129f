"""Any function at large variances: against quadrature, and finite differences."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from quadrature import by_polar_coordinates

from nt_deq import NotConvergedError, deq_kernel, enable_x64
from nt_deq.activations import get_activation, nested
from nt_deq.activations.expansion import Derivative

POINTS = [
    *[(30.0, 30.0, -0.9999), (1e-3, 30.0, -0.9), (1e4, 1e2, -0.99), (1e4, 1e4, 0.99)],
    *[(1e-6, 1e4, 0.6), (1e4, 1e4, 1 - 1e-5)],
]


@pytest.mark.parametrize("fn", slow_except([jax.nn.soft_sign], [jax.nn.soft_sign, jax.nn.mish]))
def test_moments_are_the_gaussian_expectations(dtype, fn):
    k1, k2, rho = np.array(POINTS).T
    at = [jnp.asarray(a, dtype) for a in (k1, k2, rho * np.sqrt(k1 * k2))]
    slope = Derivative(fn)
    found = nested.expect(((fn, fn), (slope, slope)), *at)
    k1, k2, c = (np.array(a, float) for a in at)
    rho = c / np.sqrt(k1 * k2)
    reach = nested.Reach(1e4, 1e4)
    sizes = [np.array(nested.dual_diagonal(fn, reach, k), float) for k in at[:2]]
    # An error ε of ρ moves what has the width √k by ε√(k/(1-ρ²)).
    bound = (1e-5 if dtype == np.float32 else 1e-11) + jnp.finfo(dtype).eps * np.sqrt(
        np.minimum(k1, k2) / (1 - rho**2)
    )
    with enable_x64(True):
        for i, f in enumerate(map(jax.jit, (fn, slope))):
            points = zip(k1, k2, rho, strict=True)
            exact = np.array([by_polar_coordinates(f, f, *point) for point in points])
            error = np.abs(np.array(found[i], float) - exact)
            assert np.all(error <= bound * np.sqrt(sizes[0][i] * sizes[1][i]))


def test_derivatives(x64):
    """Finite differences of both moments, and of the diagonal; of φ'' that jumps none further."""
    fn = jax.nn.soft_sign
    reach = nested.Reach(1e4, 1e4)
    step = 1e-6
    at = jnp.asarray([30.0, 8.0, 9.0])

    @jax.jit
    def both(at):
        return jnp.stack(nested.dual(fn, reach, *at))

    moved = [jnp.stack([both(at + way * d) for d in step * jnp.eye(3)], 1) for way in (1, -1)]
    found = jax.jit(jax.jacfwd(both))(at)
    np.testing.assert_allclose(found, (moved[0] - moved[1]) / (2 * step), atol=1e-8)
    k = jnp.asarray([1e-3, 1.0, 1e3])
    diagonal = nested.dual_diagonal(fn, reach, k)
    np.testing.assert_allclose(nested.dual(fn, reach, k, k, k), diagonal, rtol=1e-10)
    slopes = jax.jvp(lambda k: nested.dual_diagonal(fn, reach, k), (k,), (k,))[1]
    moved = [nested.dual_diagonal(fn, reach, k * (1 + way * step)) for way in (1, -1)]
    for slope, up, down in zip(slopes, *moved, strict=True):
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7, atol=1e-9)
    assert np.isnan(nested.dual(fn, reach, 1e5 * k, k, k)[0][2])


def test_what_is_known_of_a_function():
    """Those that are smooth on either side of 0 are; what bends elsewhere has its series alone."""
    activation = get_activation(jax.nn.soft_sign)
    assert activation.lipschitz == pytest.approx(1, abs=1e-3)
    assert pickle.loads(pickle.dumps(activation)) is activation
    with enable_x64(True):
        for fn in (jnp.arctan, jax.nn.gelu):
            assert min(nested.measure(fn)) >= 1e4, fn
        for fn in (jax.nn.hard_swish, lambda z: jnp.tanh(z) + 0.1 * jnp.abs(z)):
            assert min(nested.measure(fn)) < 1e4, fn


@pytest.mark.slow
def test_kernels_of_inputs_nobody_scaled():
    """Equal rows have one kernel, which solves its equation and is within its bounds."""
    x = 50 * jax.random.normal(jax.random.key(0), (3, 4))
    x = x.at[1].set(x[0])
    fn = jax.nn.soft_sign
    solution = deq_kernel(x, W_std=1.2, b_std=0.1, activation=fn)
    np.testing.assert_allclose(solution.nngp[0, 1], solution.nngp[0, 0], rtol=1e-5)
    k, s = jnp.diag(solution.nngp), x[0] @ x[2] / 4 + 0.01
    v = by_polar_coordinates(
        fn, fn, float(k[0]), float(k[2]), float(solution.nngp[0, 2] / jnp.sqrt(k[0] * k[2]))
    )
    np.testing.assert_allclose(solution.nngp[0, 2], s + 1.44 * v, rtol=1e-5)
    with enable_x64(True):
        wide = deq_kernel(np.asarray(x, float), W_std=1.2, b_std=0.1, activation=fn)
    assert np.all(
        np.abs(np.array(solution.nngp, float) - np.array(wide.nngp))
        <= np.array(solution.nngp_error)
    )
    assert np.all(
        np.abs(np.array(solution.ntk, float) - np.array(wide.ntk)) <= np.array(solution.ntk_error)
    )
    assert np.all(solution.nngp_error <= 1e-4 * k[0])  # and they are of use
    gradient = jax.grad(lambda w: jnp.sum(deq_kernel(x, W_std=w, activation=fn).ntk))(1.2)
    assert jnp.isfinite(gradient)


def test_a_variance_beyond_the_range_is_named():
    with pytest.raises(NotConvergedError, match="its expectations are not known in float32"):
        deq_kernel(1e9 * jnp.ones((2, 3)), W_std=0.5, activation=jax.nn.soft_sign)
