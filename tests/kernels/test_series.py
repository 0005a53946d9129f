"""The series for homogeneous activations, against the explicit inverse, Newton and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nt_deq import Activation, Chebyshev, Newton, deq_kernel, stax
from nt_deq.activations import ACTIVATIONS

HOMOGENEOUS = ["relu", "leaky_relu", "abs", "identity"]
BY_SERIES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.998]
BY_NEWTON = [0.0, 1e-8, 1e-4, 0.99999, 1 - 1e-6]
solve = jax.jit(lambda omega, chord: Chebyshev().angles(Chebyshev().series(omega), chord))


def chords(omega, dtype):
    """Chords between inputs, dense in [0, 2] and towards 0, and the angles that belong to them."""
    angle = np.concatenate([[0.0], np.logspace(-9, 0, 200), np.linspace(0, np.pi, 2001)])
    angle = angle.astype(np.longdouble)
    excess = np.sin(angle) - angle * np.cos(angle)
    small = angle < 0.01  # its Taylor series, where that difference cancels
    powers, factors = angle[small][:, None] ** [3, 5, 7, 9], 1 / np.array([3, -30, 840, -45360])
    excess[small] = np.sum(powers * factors, axis=1)
    half = 2 * np.sin(angle / 2) ** 2 + omega * excess / np.pi
    inside = half <= 2
    chord = np.sqrt(2 * half[inside]).astype(dtype)
    return chord, angle[inside]


@pytest.mark.smoke
@pytest.mark.parametrize("a", BY_SERIES + BY_NEWTON)
def test_it_inverts_the_explicit_inverse(dtype, a):
    eps = np.finfo(dtype).eps
    omega = float(dtype.type(a / (1 - a)))
    chord, expected = chords(omega, dtype)
    angle, steps = solve(dtype.type(omega), chord)
    angle = np.asarray(angle, np.longdouble)
    assert (int(steps) > 0) == (a in BY_NEWTON)
    assert steps < 10
    # What K* and 1 - J = (1 - a)(1 + ω α/π) are made of; ρ at α = π has the rounding of x² = 4.
    assert np.abs(np.cos(angle) - np.cos(expected)).max() < 16 * eps
    error = omega / np.pi * np.abs(angle - expected) / (1 + omega / np.pi * expected)
    assert error.max() < 40 * eps
    np.testing.assert_array_equal(angle[expected == 0], 0)


def circle(n=24):
    """Inputs at angles that include 0, π and very small ones, of different norms."""
    t = np.concatenate([np.linspace(0, np.pi, n), [1e-2, 1e-4, 1e-6, np.pi - 1e-5]])
    return np.stack([np.cos(t), np.sin(t)], 1) * np.logspace(-1, 1, t.size)[:, None]


@pytest.mark.parametrize("W_var", [0.1, 0.9, 0.97])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_it_is_newton_in_fewer_passes(x64, name, W_var):
    x = circle()
    W_std = (W_var / float(ACTIVATIONS[name].dual_diagonal(jnp.ones(()))[0])) ** 0.5
    series, newton = (
        stax.DEQ(1, W_std, 1.0, 0.1, activation=name, solver=s)[2](x) for s in (None, Newton())
    )
    scale = np.sqrt(np.outer(newton.cov1, newton.cov1))
    np.testing.assert_allclose(series.nngp / scale, newton.nngp / scale, atol=1e-13)
    # Newton's V̇ loses half of the digits where two inputs nearly agree.
    ntk_scale = np.sqrt(np.outer(np.diag(newton.ntk), np.diag(newton.ntk)))
    np.testing.assert_allclose(series.ntk / ntk_scale, newton.ntk / ntk_scale, atol=1e-6)
    apart = np.abs(np.subtract.outer(np.arange(28), np.arange(28))) > 6
    apart[24:] = apart[:, 24:] = False
    error = np.abs(np.subtract(series.ntk, newton.ntk)) / ntk_scale
    assert error[apart].max() < 1e-12


@pytest.mark.slow
def test_derivatives_to_second_order(x64):
    """Those of `V` and `V̇`; `tests/kernels/test_dense.py` has those of `K*` and `Θ*`."""
    x = circle(4)
    x = jnp.asarray(np.concatenate([x, x[:1], -x[1:2], 0 * x[:1]]))
    weights = jnp.cos(jnp.arange(len(x) ** 2.0)).reshape(len(x), len(x))

    def fn(p, solver):
        layer = stax.DEQ(1, p[0], p[1], p[2], solver=solver)
        kernels = stax.serial(layer, stax.Dense(1))[2](x)
        return jnp.sum(weights * (kernels.ntk + kernels.nngp**2))

    p = jnp.array([0.7, 1.2, 0.4])
    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        derive = jax.jit(transform(fn), static_argnums=1)
        exact, reference = derive(p, None), derive(p, Newton())
        np.testing.assert_allclose(exact, reference, rtol=1e-7, atol=1e-9)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(deq_kernel(x, W_std=0.7).ntk))(x)).all()


@pytest.mark.parametrize("a", [1e-5, 0.01, 0.3, 0.7, 0.95, 0.999, 0.9999])
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.usefixtures("promotion")
def test_the_error_bound_bounds_the_error(request, a, tol):
    x = circle().astype(np.float32)
    x[3] = 0
    W_std = np.float32((2 * a) ** 0.5)
    ours = deq_kernel(x, W_std=W_std, solver=Chebyshev(rtol=tol))
    jax.config.update("jax_enable_x64", True)
    request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))
    wide = deq_kernel(np.asarray(x, float), W_std=float(W_std), solver=Newton())
    size = np.sqrt(np.outer(np.diag(wide.nngp), np.diag(wide.nngp)))
    error = np.abs(np.asarray(ours.nngp, float) - wide.nngp)
    assert (error <= ours.nngp_error).all()
    assert ours.converged.all()
    if tol and a == 0.3:
        assert error.max() > 1e-6 * size.max()
        assert (np.asarray(ours.residual) > 0).any()


def test_it_falls_back_to_newton_where_the_series_is_too_long(x64):
    x = circle()
    for a, solver, steps in (
        (0.5, Chebyshev(), 0),
        (1e-6, Chebyshev(), 4),
        (0.999999, Chebyshev(), 4),
        (0.5, Chebyshev(rtol=1e-3), 0),
    ):
        ours = deq_kernel(x, W_std=(2 * a) ** 0.5, solver=solver)
        assert (ours.steps > 0) == (steps > 0)
        assert ours.steps <= steps
    traced = jax.jit(lambda w: deq_kernel(x, W_std=w).steps)
    assert traced(1.0) == 0
    assert traced(0.001) > 0
    both = jax.vmap(lambda w: deq_kernel(x, W_std=w))(jnp.array([1.0, 0.001]))
    for i, w in enumerate((1.0, 0.001)):
        alone = deq_kernel(x, W_std=w, solver=Newton())
        np.testing.assert_allclose(both.nngp[i], alone.nngp, atol=1e-11)


def test_the_program_is_bounded():
    def size(solver):
        fn = jax.jit(lambda x, w: deq_kernel(x, W_std=w, solver=solver)[:2])
        return len(fn.lower(circle(), 1.0).as_text())

    assert size(Chebyshev()) < 6 * size(Newton())
    assert size(Chebyshev(rtol=1e-30)) < 1.3 * size(Chebyshev())
    assert size(Chebyshev(rtol=1e-3)) < size(Chebyshev())


def test_an_activation_of_the_users_own():
    slope = dict(dual=ACTIVATIONS["abs"].dual, dual_diagonal=ACTIVATIONS["abs"].dual_diagonal)
    mine = Activation("mine", jnp.abs, lipschitz=1.0, homogeneous=True, **slope)
    ours, theirs = (deq_kernel(circle(), W_std=0.8, activation=f) for f in (mine, "abs"))
    np.testing.assert_array_equal(ours.ntk, theirs.ntk)
    assert ours.steps == 0


def test_where_it_does_not_apply_is_an_error():
    series = Chebyshev()
    with pytest.raises(ValueError, match=r"'erf' is not; pass None or nt_deq\.Newton"):
        deq_kernel(circle(), W_std=0.5, activation="erf", solver=series)
    with pytest.raises(ValueError, match="'gelu' is not"):
        stax.DEQ(1, 0.5, activation="gelu", solver=series)
    cell = stax.serial(stax.Relu(), stax.Dense(1, 0.5))
    with pytest.raises(ValueError, match=r"the series of stax\.DEQ"):
        stax.FixedPoint(cell, stax.Dense(1), solver=series)
    with pytest.raises(ValueError, match=r"Chebyshev\(rtol=2\)"):
        Chebyshev(rtol=2)
