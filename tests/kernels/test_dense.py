"""`deq_kernel` against closed forms, the table of the design, unrolled layers and differences."""

# neural-tangents types a kernel as any tree of kernels.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from neural_tangents import stax as nt_stax
from scipy import optimize

from nt_deq import (
    KernelSolution,
    Newton,
    NoEquilibriumError,
    NotConvergedError,
    Picard,
    deq_kernel,
)
from nt_deq.activations import ACTIVATIONS

X = np.array([[1, 2, -1], [0.5, -1, 2], [2, 0, 1]])
# From independent quadrature: K*(0,0), K*(0,1), K*(0,2), Θ*(0,0), Θ*(0,1).
TABLE = {
    ("relu", 0.6, 1.0, 0.0): (
        2.4390243902, -1.1206955399, 0.5101836748, 2.9744199881, -1.1929651760
    ),
    ("relu", 1.2, 1.0, 0.3): (
        7.4642857143, 0.8439336246, 3.4260824471, 26.6581632653, 1.3782640956
    ),
    ("erf", 0.8, 1.0, 0.1): (
        2.4074893004, -1.3666046529, 0.4039049011, 3.2097008046, -1.6442000519
    ),
    ("gelu", 0.9, 1.0, 0.1): (
        3.2785030895, -1.0436798531, 0.8125267387, 5.5311004339, -1.2276757986
    ),
    ("tanh", 0.6, 1.0, 0.2): (
        2.2341915399, -1.2282804426, 0.4064811554, 2.5385492799, -1.3481217710
    ),
    ("sin", 0.7, 1.0, 0.0): (
        2.2422357017, -1.2626482633, 0.3556980868, 2.9807621422, -1.4229939070
    ),
}  # fmt: skip
SOLVERS = [Newton(), Picard()]
SETTINGS = {
    "relu": dict(W_std=1.2, U_std=0.8, b_std=0.3),
    "leaky_relu": dict(W_std=1.0, U_std=1.3),
    "abs": dict(W_std=0.8, b_std=0.5),
    "identity": dict(W_std=0.7, b_std=0.1),
    "erf": dict(W_std=0.9, b_std=0.2),
    "gelu": dict(W_std=1.1, U_std=0.7, b_std=0.1),
    "sin": dict(W_std=0.9, b_std=0.1),
    "cos": dict(W_std=0.9, U_std=0.5),
    "tanh": dict(W_std=0.9, U_std=0.5, b_std=0.1),
    "sigmoid": dict(W_std=1.5, b_std=0.1),
    "softplus": dict(W_std=0.8, U_std=0.7),
    "silu": dict(W_std=1.1, U_std=0.7, b_std=0.1),
}
# The same formulas as relu, sin and tanh, and compiling them takes long.
ALIKE = ("leaky_relu", "abs", "identity", "sin", "cos", "sigmoid", "softplus", "silu")
EVERY = slow_except(set(SETTINGS) - set(ALIKE), SETTINGS)
# Derivatives take longest to compile: by Chebyshev and by Newton one each.
DIFFERENTIATED = slow_except(("relu", "erf"), SETTINGS)


def inputs(n=6, d=5, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), dtype)


@pytest.mark.smoke
@pytest.mark.parametrize("solver", slow_except([Newton()], SOLVERS), ids=repr)
@pytest.mark.parametrize("setting", TABLE, ids=str)
def test_the_table(dtype, setting, solver):
    activation, W_std, U_std, b_std = setting
    solution = deq_kernel(
        jnp.asarray(X, dtype),
        W_std=W_std,
        U_std=U_std,
        b_std=b_std,
        activation=activation,
        solver=solver,
    )
    ours = np.array([*solution.nngp[0], solution.ntk[0, 0], solution.ntk[0, 1]])
    expected = np.array(TABLE[setting])
    assert solution.nngp.dtype == solution.ntk.dtype == dtype
    if dtype == np.float64:
        np.testing.assert_allclose(ours, expected, rtol=1e-9)
    else:  # 1e-5 of √(K K'), which is what an entry is made of
        scale = np.repeat(expected[[0, 3]], [3, 2])
        np.testing.assert_allclose(ours / scale, expected / scale, atol=1e-5)
        if solver == Newton():
            np.testing.assert_allclose(ours, expected, rtol=1e-5)


def unrolled(x1, x2, activation, W_std, U_std=1.0, b_std=0.0, layers=300):
    """The kernels of `layers` explicit layers of neural-tangents: `K ← cell(K) + inject(K_x)`."""
    phi = {
        "relu": nt_stax.Relu(),
        "leaky_relu": nt_stax.LeakyRelu(0.01),
        "abs": nt_stax.Abs(),
        "identity": nt_stax.Identity(),
        "erf": nt_stax.Erf(),
        "gelu": nt_stax.Gelu(),
        "sin": nt_stax.Sin(),
        "cos": nt_stax.Cos(),
    }.get(activation)
    if phi is None:  # 128² nodes integrate the others to rounding at the variances below
        with warnings.catch_warnings(action="ignore"):
            phi = nt_stax.ElementwiseNumerical(ACTIVATIONS[activation].fn, deg=128)
    cell = nt_stax.serial(phi, nt_stax.Dense(1, W_std))
    s = nt_stax.Dense(1, U_std, b_std)[2](x1, x2)

    @jax.jit
    def run(s):
        def step(_, k):
            new = cell[2](s.replace(nngp=k[0], ntk=k[1], cov1=k[2], cov2=k[3]))
            return new.nngp + s.nngp, new.ntk + s.ntk, new.cov1 + s.cov1, new.cov2 + s.cov2

        return jax.lax.fori_loop(0, layers, step, (s.nngp, s.ntk, s.cov1, s.cov2))[:2]

    return run(s)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("activation", EVERY)
def test_it_is_the_limit_of_unrolled_layers(x64, activation, solver):
    x1, x2 = inputs(), inputs(4, seed=1)
    nngp, ntk = unrolled(x1, x2, activation, **SETTINGS[activation])
    ours = deq_kernel(x1, x2, activation=activation, solver=solver, **SETTINGS[activation])
    np.testing.assert_allclose(ours.nngp, nngp, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.ntk, ntk, rtol=1e-11, atol=1e-11)
    assert ours.converged.all()
    assert (ours.residual <= 1e-14 * np.abs(nngp).max()).all()


def test_relu_inverts_in_closed_form(x64):
    x, W_std = inputs(8), 1.3
    a = W_std**2 / 2
    ours = deq_kernel(x, W_std=W_std)
    s = np.asarray(x @ x.T) / x.shape[1]
    k = np.diag(s) / (1 - a)
    np.testing.assert_allclose(np.diag(ours.nngp), k, rtol=1e-14)
    np.testing.assert_allclose(np.diag(ours.ntk), k / (1 - a), rtol=1e-13)
    rho = np.clip(ours.nngp / np.sqrt(np.outer(k, k)), -1, 1)
    kappa1 = (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / np.pi
    r = (rho - a * kappa1) / (1 - a)
    np.testing.assert_allclose(r, s / np.sqrt(np.outer(np.diag(s), np.diag(s))), atol=1e-13)


def test_identity_is_linear(x64):
    x = inputs()
    s = 1.44 * x @ x.T / 5 + 0.09
    ours = deq_kernel(x, W_std=0.6, U_std=1.2, b_std=0.3, activation="identity")
    np.testing.assert_allclose(ours.nngp, s / (1 - 0.36), rtol=1e-13)
    np.testing.assert_allclose(ours.ntk, s / (1 - 0.36) ** 2, rtol=1e-13)


def test_without_recurrence_it_is_the_input_kernel(dtype):
    x = inputs(dtype=dtype)
    ours = deq_kernel(x, W_std=0.0, b_std=0.5)
    np.testing.assert_allclose(ours.nngp, x @ x.T / 5 + 0.25, rtol=1e-5)
    np.testing.assert_array_equal(ours.ntk, ours.nngp)


@pytest.mark.parametrize("activation", EVERY)
def test_x2_defaults_to_x1(dtype, activation):
    x = inputs(dtype=dtype)
    one = deq_kernel(x, activation=activation, **SETTINGS[activation])
    two = deq_kernel(x, x, activation=activation, **SETTINGS[activation])
    eps = jnp.finfo(dtype).eps
    for a, b in zip(one[:2], two[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * eps * np.abs(a).max())
        np.testing.assert_array_equal(a, a.T)


def test_duplicates_antipodes_and_zeros(dtype):
    """ReLU, where the NTK has a kink at ρ = 1: a rounding error of ρ must not become its root."""
    x = inputs(5, 40, dtype=dtype)
    x = jnp.concatenate([x, x, -x, 3 * x, jnp.zeros((1, 40), dtype)])
    ours = deq_kernel(x, W_std=1.2)
    a, eps = 0.72, float(jnp.finfo(dtype).eps)
    k = np.sum(np.asarray(x, float) ** 2, axis=1) / 40 / (1 - a)
    tight = dict(rtol=60 * eps)  # the condition number of Θ* in the rate is 1/(1-a)², 13
    np.testing.assert_allclose(np.diag(ours.nngp), k, **tight)
    np.testing.assert_allclose(np.diag(ours.ntk), k / (1 - a), **tight)
    for start, factor in ((5, 1), (15, 3)):
        pairs = np.arange(5), np.arange(start, start + 5)
        np.testing.assert_allclose(ours.nngp[pairs], factor * k[:5], **tight)
        np.testing.assert_allclose(ours.ntk[pairs], factor * k[:5] / (1 - a), **tight)
    assert (ours.nngp[-1] == 0).all()
    assert (ours.ntk[-1] == 0).all()
    assert np.isfinite(ours.ntk).all()


@pytest.mark.parametrize("activation", EVERY)
def test_float32_agrees_with_float64(x64, activation):
    x = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    single, double = (
        deq_kernel(x.astype(dtype), activation=activation, **SETTINGS[activation])
        for dtype in ("float32", "float64")
    )
    assert single.nngp.dtype == np.float32
    for ours, exact in zip(np.asarray(single[:2]), np.asarray(double[:2]), strict=True):
        assert np.abs(ours - exact).max() < 5e-6 * np.abs(exact).max()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_near_criticality(x64, solver):
    a = 0.999
    x = inputs(6, 8)
    solver = type(solver)(max_steps=100_000)
    ours = deq_kernel(x, W_std=np.sqrt(2 * a), solver=solver)
    k = np.sum(np.asarray(x) ** 2, axis=1) / 8 / (1 - a)
    rho = np.clip(ours.nngp / np.sqrt(np.outer(k, k)), -1, 1)
    kappa1 = (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / np.pi
    r = np.asarray(x @ x.T) / 8 / (1 - a) / np.sqrt(np.outer(k, k))
    np.testing.assert_allclose((rho - a * kappa1) / (1 - a), r, atol=1e-11)  # ε / (1 - a) · 50
    np.testing.assert_allclose(ours.rate, a, rtol=1e-14)
    assert (ours.nngp_error < 1e-8 * k.max()).all()  # ε / (1 - a)² · 45


@pytest.mark.usefixtures("promotion")
def test_newton_takes_few_steps_and_picard_many(x64):
    x = inputs(20, 10)
    setting = dict(W_std=1.3, b_std=0.1)
    newton, picard = (deq_kernel(x, solver=s, **setting) for s in SOLVERS)
    assert newton.steps <= 6
    assert picard.steps > 40
    np.testing.assert_allclose(newton.nngp, picard.nngp, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(newton.rate, 0.845, rtol=1e-14)
    loose = deq_kernel(x, solver=Picard(rtol=1e-4), **setting)
    assert loose.steps < picard.steps / 2
    error = np.abs(loose.nngp - newton.nngp)
    assert error.max() > 1e-8
    assert (error <= loose.nngp_error + 1e-4 * loose.nngp.max()).all()


def weighted_sum(p, x, activation):
    solution = deq_kernel(x * p[2], W_std=p[0], b_std=p[1], activation=activation)
    kernels = jnp.stack(solution[:2])
    return jnp.sum(jnp.cos(jnp.arange(kernels.size)).reshape(kernels.shape) * kernels)


@pytest.mark.parametrize("activation", DIFFERENTIATED)
def test_derivatives_in_the_hyperparameters(x64, activation):
    x = inputs(4, 3)
    x = jnp.concatenate([x, x[:1], -x[:1]])  # and where arccos' derivative is infinite
    p = jnp.array([0.7, 0.4, 1.2])
    step = 1e-5

    def central(fn, p):
        return jnp.stack([(fn(p + step * e) - fn(p - step * e)) / (2 * step) for e in jnp.eye(3)])

    fn = jax.jit(lambda p: weighted_sum(p, x, activation))
    gradient = jax.jit(jax.grad(fn))
    np.testing.assert_allclose(gradient(p), central(fn, p), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(fn)(p), gradient(p), rtol=1e-10)
    np.testing.assert_allclose(jax.hessian(fn)(p), central(gradient, p), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", DIFFERENTIATED)
def test_derivatives_in_the_inputs(x64, activation):
    x1, x2 = inputs(3, 4), inputs(2, 4, seed=1)
    step = 1e-6
    for args in ((x1,), (x1, x2)):

        def fn(x, args=args):
            return jnp.sum(deq_kernel(x, *args[1:], W_std=0.7, activation=activation).ntk ** 2)

        direction = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
        finite = (fn(x1 + step * direction) - fn(x1 - step * direction)) / (2 * step)
        exact = jnp.sum(jax.grad(fn)(x1) * direction)
        np.testing.assert_allclose(exact, finite, rtol=1e-7)


def test_gradients_at_duplicates_are_finite(dtype):
    x = inputs(3, 4, dtype=dtype)
    gradient = jax.grad(lambda x: jnp.sum(deq_kernel(x, x1, W_std=1.0).ntk))
    x1 = jnp.concatenate([x, -x, 0 * x])
    assert np.isfinite(gradient(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_derivatives_in_float32(x64, activation):
    x = inputs(4, 3)
    x = jnp.concatenate([x, x[:1], -x[:1]])
    fn = partial(weighted_sum, activation=activation)
    for differentiate in (jax.grad, jax.hessian):
        derivative = jax.jit(differentiate(fn))
        single, double = (
            derivative(jnp.array([0.7, 0.4, 1.2], dtype), x.astype(dtype))
            for dtype in ("float32", "float64")
        )
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, double, atol=3e-5 * np.abs(double).max())


def test_jit_and_vmap(x64):
    x = inputs()
    stds = jnp.array([0.3, 0.8, 1.1])
    batch = jax.jit(jax.vmap(lambda w: deq_kernel(x, W_std=w)))(stds)
    for i, w in enumerate(stds):
        alone = deq_kernel(x, W_std=w)
        np.testing.assert_allclose(batch.nngp[i], alone.nngp, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(batch.ntk[i], alone.ntk, rtol=1e-13, atol=1e-13)
    assert batch.steps.shape == (3,)


def test_an_entry_does_not_depend_on_the_others(x64):
    x = inputs(10, 6)
    whole = deq_kernel(x, x, W_std=1.3)
    part = deq_kernel(x[:3], x[2:5], W_std=1.3)
    np.testing.assert_allclose(part.nngp, whole.nngp[:3, 2:5], rtol=1e-14)
    np.testing.assert_allclose(part.ntk, whole.ntk[:3, 2:5], rtol=1e-13)


@pytest.mark.parametrize("activation", slow_except(["relu"], ["relu", "erf"]))
def test_tiles_join(x64, activation):
    """More entries than are solved at a time, in numbers that tiles do not divide."""
    x = inputs(340, 3)
    part = jnp.array([0, 1, 163, 164, 165, 175, 176, 338, 339])

    def fn(x, part):
        return deq_kernel(x, W_std=0.9, b_std=0.1, activation=activation).ntk[part][:, part]

    np.testing.assert_allclose(fn(x, part), fn(x[part], slice(None)), rtol=1e-13, atol=1e-13)
    tangent = jax.jvp(lambda x: fn(x, part), (x,), (jnp.cos(x),))[1]
    alone = jax.jvp(lambda x: fn(x, slice(None)), (x[part],), (jnp.cos(x[part]),))[1]
    np.testing.assert_allclose(tangent, alone, rtol=1e-11, atol=1e-11)
    wide = deq_kernel(x[:7], jnp.tile(x, (100, 1)), W_std=0.9, b_std=0.1, activation=activation)
    tight = deq_kernel(x[:7], x, W_std=0.9, b_std=0.1, activation=activation)
    np.testing.assert_allclose(wide.nngp[:, -340:], tight.nngp, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(wide.ntk[:, :340], tight.ntk, rtol=1e-13, atol=1e-13)
    assert wide.converged.all()


def test_the_program_does_not_grow_with_the_steps():
    def size(solver):
        fn = jax.jit(lambda x: deq_kernel(x, W_std=1.0, solver=solver).ntk)
        return len(fn.lower(inputs()).as_text())

    assert abs(size(Picard(max_steps=10)) - size(Picard(max_steps=10_000))) < 100


@pytest.mark.parametrize(
    ("activation", "W_std"), [("relu", 1.5), ("relu", 2**0.5), ("identity", 1.0), ("gelu", 1.6)]
)
@pytest.mark.parametrize("solver", slow_except([Newton()], SOLVERS), ids=repr)
def test_no_equilibrium_is_an_error(activation, W_std, solver):
    x = inputs()
    with pytest.raises(NoEquilibriumError, match=rf"W_std={W_std:.6g}.*must be below 1.*take "):
        deq_kernel(x, W_std=W_std, activation=activation, solver=solver)
    traced = jax.jit(lambda w: deq_kernel(x, W_std=w, activation=activation, solver=solver))(W_std)
    assert np.isnan(traced.nngp).all()
    assert np.isnan(traced.ntk).all()
    assert not traced.converged.any()


def bisected_variance(activation, W_std, s):
    """The only root above `s` of `k = W_std² V(k) + s` with a concave `V`, and its `J`."""
    low, k, high = s, s, s + W_std**2  # V is at most 1
    for _ in range(200):
        k = (low + high) / 2
        dual = -np.expm1(-2 * k) / 2 if activation == "sin" else erf_dual(k)
        above = W_std**2 * dual + s > k
        low, high = np.where(above, k, low), np.where(above, high, k)
    slope = (1 + np.exp(-2 * k)) / 2 if activation == "sin" else 4 / np.pi / np.sqrt(1 + 4 * k)
    return k, W_std**2 * slope


def erf_dual(k):
    return 2 / np.pi * np.arctan2(2 * k, np.sqrt(1 + 4 * k))


@pytest.mark.parametrize(("activation", "critical"), [("sin", 1.0), ("erf", np.pi**0.5 / 2)])
def test_there_are_equilibria_at_the_edge(activation, critical, dtype):
    """At and just above the W_std at which 0 loses its stability, for inputs near 0."""
    edges = np.array([-1e-3, 0, 1e-4, 1e-3, 5e-3, 0.02, 0.1])
    norm, W_std = np.meshgrid(10 ** np.linspace(-4, 0, 33), critical * (1 + edges))
    norm, W_std = norm.ravel().astype(dtype), W_std.ravel().astype(dtype)
    wide = norm.astype(np.longdouble), W_std.astype(np.longdouble)
    k, rate = bisected_variance(activation, wide[1], wide[0] ** 2)

    def solve(norm, W_std):
        return deq_kernel(norm[None, None], W_std=W_std, activation=activation)

    found = jax.jit(jax.vmap(solve))(norm, W_std)
    exists = 1 - rate > 16 * np.finfo(dtype).eps
    assert exists.sum() > 150
    assert found.converged[exists].all()
    error = np.abs(np.asarray(found.nngp[:, 0, 0]) - k)
    assert (error <= np.asarray(found.nngp_error[:, 0, 0]))[exists].all()
    for i in np.flatnonzero(exists)[::20]:  # eagerly nothing is raised
        solve(norm[i], W_std[i])


def test_only_the_inputs_without_equilibrium_are_nan():
    """erf: a larger input saturates the units, which stabilises the network."""
    x = jnp.array([[0.1, 0.0], [3.0, 1.0], [0.0, 0.2], [-2.0, 5.0]])
    unstable = np.array([True, False, True, False])
    with pytest.raises(NoEquilibriumError, match=r"for 2 rows of x1 \(the first is row 0\)"):
        deq_kernel(x, W_std=2.0, activation="erf")
    with pytest.raises(NoEquilibriumError, match=r"for 2 rows of x2 \(the first is row 0\)"):
        deq_kernel(x[1::2], x, W_std=2.0, activation="erf")
    both = jax.jit(lambda x: deq_kernel(x, W_std=2.0, activation="erf"))(x)
    expected = unstable[:, None] | unstable[None, :]
    np.testing.assert_array_equal(np.isnan(both.nngp), expected)
    np.testing.assert_array_equal(np.isnan(both.ntk), expected)
    np.testing.assert_array_equal(both.converged, ~expected)
    alone = deq_kernel(x[1::2], W_std=2.0, activation="erf")
    np.testing.assert_allclose(both.ntk[1::2, 1::2], alone.ntk, rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "U_std", "message"),
    [
        ("relu", 1e30, r"the variance of 3 rows of x1 \(the first is row 0\) overflows float32"),
        ("relu", 1.11e19, r"the variance of row 0 of x1 overflows float32"),  # K*, not S
        ("gelu", 1e30, "the variance of 3 rows of x1"),
        ("tanh", 1e30, "the variance of 3 rows of x1"),
        ("sin", 1e30, "the variance of 3 rows of x1"),
        ("erf", 1e18, "the product of two variances overflows float32.* 6 of 9 pairs"),
    ],
)
def test_overflow_is_called_so(activation, U_std, message):
    with pytest.raises(OverflowError, match=message):
        deq_kernel(X, W_std=0.8, U_std=U_std, activation=activation)


def test_rows_of_x2_are_named():
    x2 = jnp.asarray(X).at[1].multiply(1e30)
    with pytest.raises(OverflowError, match="row 1 of x2 overflows"):
        deq_kernel(X, x2, W_std=0.8)
    with pytest.raises(ValueError, match="infinite values in row 1 of x2;"):
        deq_kernel(X, x2.at[1].set(jnp.nan), W_std=0.8)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(half):
    """A bfloat16 has 3 digits: in it the kernels were 3 % off, and `converged`."""
    x = jnp.asarray(X, half)
    solution = deq_kernel(x, W_std=0.8, b_std=0.1, activation="gelu")
    exact = deq_kernel(x.astype("float32"), W_std=0.8, b_std=0.1, activation="gelu")
    assert solution.nngp.dtype == solution.nngp_error.dtype == np.float32
    np.testing.assert_array_equal(solution.nngp, exact.nngp)
    np.testing.assert_array_equal(solution.ntk, exact.ntk)
    assert deq_kernel(x, x.astype("float32"), W_std=0.8).ntk.dtype == np.float32


def test_a_solution_is_printed_in_four_lines():
    solution = deq_kernel(X, W_std=0.8, activation="gelu")
    lines = repr(solution).splitlines()
    assert len(lines) == 4
    assert lines[0] == "KernelSolution: nngp and ntk of shape (3, 3), float32"
    assert lines[1].split() == f"steps: {solution.steps}, rate: {solution.rate:.6g}".split()
    bounds = (solution.nngp_error.max(), solution.ntk_error.max())
    assert lines[2].strip() == "nngp_error: at most {:.2g}, ntk_error: at most {:.2g}".format(
        *bounds
    )
    assert lines[3].split() == ["converged:", "all", "9", "pairs"]
    x = jnp.array([[0.1, 0.0], [3.0, 1.0]])
    part = jax.jit(lambda x: deq_kernel(x, W_std=2.0, activation="erf"))(x)
    assert repr(part).endswith("converged: 1 of 4 pairs")
    jax.jit(lambda x: [repr(deq_kernel(x, W_std=0.5)).index("traced"), x][1])(x)


def test_too_few_steps_is_an_error():
    x = inputs()
    few = Picard(max_steps=5)
    with pytest.raises(NotConvergedError, match="not converged after 5 steps of Picard"):
        deq_kernel(x, W_std=1.3, solver=few)
    with pytest.raises(NotConvergedError, match="not converged after 1 steps of Picard"):
        deq_kernel(x / 100, W_std=1.3, activation="erf", solver=Picard(max_steps=1))  # J(S) > 1
    with pytest.raises(NotConvergedError, match=r"pairs have not converged after 2 steps"):
        deq_kernel(x, W_std=1.3, solver=Newton(max_steps=2))  # enough for the variances
    traced = jax.jit(lambda w: deq_kernel(x, W_std=w, solver=few))(1.3)
    assert np.isnan(traced.nngp).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(W_std=-0.5), r"W_std=-0\.5 must be a finite standard deviation of at least 0"),
        (dict(W_std=float("nan")), "W_std=nan must be"),
        (dict(W_std=0.5, U_std=float("inf")), "U_std=inf must be"),
        (dict(W_std=0.5, b_std=-1), "b_std=-1 must be"),
        (dict(W_std=np.ones(2)), r"W_std has shape \(2,\)"),
        (dict(W_std=0.5, activation="tan"), "activation='tan' is unknown"),
        (dict(W_std=0.5, x1=np.ones(3)), r"x1 has shape \(3,\); pass inputs of shape \(n, d\)"),
        (dict(W_std=0.5, x1=np.ones((2, 0))), r"x1 has shape \(2, 0\)"),
        (dict(W_std=0.5, x2=np.ones((2, 4))), "x1 has 3 features and x2 has 4"),
        (
            dict(W_std=0.5, x1=np.array([[0, 1, 2], [0, np.nan, 1]])),
            "infinite values in row 1 of x1;",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        deq_kernel(**(dict(x1=X) | arguments))


@pytest.mark.usefixtures("unchecked")
def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="solver='newton' is not a solver"):
        deq_kernel(X, W_std=0.5, solver="newton")
    with pytest.raises(TypeError, match="x1 is made of complex"):
        deq_kernel(X + 1j, W_std=0.5)
    with pytest.raises(ValueError, match=r"Newton\(rtol=2\): rtol is a relative"):
        Newton(rtol=2)
    with pytest.raises(ValueError, match=r"max_steps=0\.5"):
        Picard(max_steps=0.5)


@pytest.mark.usefixtures("promotion")
def test_integers_and_mixed_dtypes_are_promoted(x64):
    whole = deq_kernel(np.array([[1, 2], [3, 4]]), np.ones((1, 2), np.float32), W_std=0.5)
    assert isinstance(whole, KernelSolution)
    assert whole.nngp.dtype == np.float64
    assert whole.nngp.shape == whole.residual.shape == whole.converged.shape == (2, 1)


def test_every_activation_is_tested():
    assert set(SETTINGS) == set(ACTIVATIONS)


@pytest.mark.parametrize("W_std", [1.005, 1.05, 1.5])
def test_verdicts_of_small_inputs_above_the_critical_weights(x64, W_std):
    """sin: E[φ²] = (1 - e^{-2k})/2, so that K* and J are known without a solver of ours."""

    def exists(s):
        k = optimize.brentq(lambda k: s - W_std**2 * np.expm1(-2 * k) / 2 - k, s, s + W_std**2)
        return W_std**2 * (1 + np.exp(-2 * k)) / 2 < 1

    solve = jax.jit(lambda x: deq_kernel(x, W_std=W_std, activation="sin").converged)
    x = np.geomspace(1e-6, 3.0, 60)[:, None]
    np.testing.assert_array_equal(np.diag(solve(x)), [exists(s) for s in x[:, 0] ** 2])
    with pytest.raises(NoEquilibriumError, match=r"must be below 1, and is not for row 0"):
        deq_kernel(x[:1], W_std=W_std, activation="sin")


def squared_relu(z):
    return jax.nn.relu(z) ** 2


@pytest.mark.parametrize("W_std", [0.3, 0.40824, 1e-3])
def test_a_square_has_the_equilibrium_that_is_near(dtype, W_std):
    """`k = 3/2 W_std² k² + s`: of its two roots the smaller one, up to where they meet."""
    x = jnp.asarray([[1.0], [-0.5]], dtype)
    solution = deq_kernel(x, W_std=W_std, activation=squared_relu)
    W_var, s = float(dtype.type(W_std)) ** 2, np.array([1.0, 0.25])
    root = np.sqrt(1 - 6 * W_var * s)
    k = 2 * s / (1 + root)
    # The root moves by 1/√(1-6W²s) of an error of the equation.
    rtol = 16 * jnp.finfo(dtype).eps / root
    assert np.all(np.abs(jnp.diag(solution.nngp) / k - 1) < rtol)
    assert np.all(np.abs(jnp.diag(solution.ntk) / (k / (1 - 2 * W_var * k)) - 1) < 4 * rtol)
    assert np.all(solution.nngp_error[0, 0] >= np.abs(np.float64(solution.nngp[0, 0]) - k[0]))


def test_a_square_without_an_equilibrium_grows_or_overflows():
    x = jnp.ones((1, 1))
    with pytest.raises(NoEquilibriumError, match="smaller W_std, or smaller inputs, U_std and b_s"):
        deq_kernel(x, W_std=0.4083, activation=squared_relu)
    with pytest.raises(OverflowError, match=r"overflows float32.* or compute in float64"):
        deq_kernel(1e12 * x, W_std=1e-15, activation=squared_relu)
