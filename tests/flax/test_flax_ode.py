"""The finite neural ODE: against SciPy's integration, differentiated, failing sample by sample."""

import diffrax
import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax, random
from marks import slow_except
from scipy.integrate import solve_ivp
from scipy.special import erf

from nt_deq import NotConvergedError, stax
from nt_deq.flax import Conv, Dense, NeuralODE, from_stax, functional, to_stax

WIDTH = 8
X = np.random.default_rng(0).standard_normal((3, 4))


def ode(phi=lax.erf, W_std=0.9, **kwargs):
    rngs = nnx.Rngs(0)
    cell = nnx.Sequential(phi, Dense(WIDTH, WIDTH, W_std=W_std, b_std=0.3, rngs=rngs))
    return NeuralODE(cell, Dense(4, WIDTH, rngs=rngs), **kwargs)


def velocity(module, phi):
    """`z -> cell(z)` and `inject(X)` in NumPy, from the parameters alone."""
    ((_, (W, b)),), (U, _) = (to_stax(module)[0],), to_stax(module)[1]
    W, b, U = (np.asarray(a, np.float64) for a in (W, b, U))
    return (lambda z: 0.9 / WIDTH**0.5 * phi(z) @ W + 0.3 * b[0]), X @ U / 2


@pytest.mark.smoke
@pytest.mark.parametrize("inject_always", [False, True])
def test_it_is_what_scipy_integrates(dtype, inject_always):
    module = ode(T=1.5, leak=0.3, inject_always=inject_always)
    cell, u = velocity(module, erf)
    start, added = (0 * u, u) if inject_always else (u, 0)

    def rate(t, z):
        z = z.reshape(u.shape)
        return (cell(z) - 0.3 * z + added).ravel()

    expected = solve_ivp(rate, (0, 1.5), start.ravel(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    found = module.solve(jnp.asarray(X, dtype))
    assert found.value.dtype == dtype
    assert found.reached.all()
    # A step's error is at most 16 eps of the state, which is about 3, and there are about 20 steps;
    # those of SciPy are likewise at most 1e-12.
    atol = max(200 * jnp.finfo(dtype).eps, 1e-11)
    np.testing.assert_allclose(found.value, expected.reshape(u.shape), rtol=0, atol=atol)
    np.testing.assert_array_equal(module.output(found), found.value)


def test_steps_are_the_layers_of_a_residual_network(x64):
    module = ode(T=1.5, leak=0.3, steps=3)
    cell, z = velocity(module, erf)
    for _ in range(3):
        z = z + 0.5 * (cell(z) - 0.3 * z)
    found = module.solve(jnp.asarray(X))
    np.testing.assert_allclose(found.value, z, rtol=1e-13)
    np.testing.assert_array_equal(found.accepted, [3, 3, 3])


ADJOINTS = {
    "default": None,
    "checkpoint": diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": diffrax.BacksolveAdjoint(),
    "steps": 4,
}


def with_adjoint(adjoint, **kwargs):
    return ode(
        **({"steps": adjoint} if isinstance(adjoint, int) else {"adjoint": adjoint}), **kwargs
    )


def along(module, x=X, weights=1.0):
    """A loss as a function of a number by which parameters move, and of the parameters."""
    apply_fn, params = functional(module)
    direction = jax.tree.map(jnp.cos, params)

    def loss(s):
        moved = jax.tree.map(lambda p, d: p + s * d, params, direction)
        return jnp.sum(weights * jnp.sin(apply_fn(moved, jnp.asarray(x))))

    return jax.jit(loss)


@pytest.mark.parametrize("name", slow_except(["default", "backsolve"], ADJOINTS))
def test_gradients_are_those_of_finite_differences(x64, name):
    loss = along(with_adjoint(ADJOINTS[name]))
    difference = (loss(1e-4) - loss(-1e-4)) / 2e-4  # right to 1e-8
    gradient = jax.jit(jax.grad(loss))(0.0)
    np.testing.assert_allclose(gradient, difference, rtol=1e-7)
    if name in ("default", "steps"):
        forward = jax.jit(lambda: jax.jvp(loss, (0.0,), (1.0,))[1])()
        np.testing.assert_allclose(forward, gradient, rtol=1e-12)


@pytest.mark.slow
def test_forward_mode(x64):
    loss = along(ode(adjoint=diffrax.ForwardMode()))
    difference = (loss(1e-4) - loss(-1e-4)) / 2e-4
    forward = jax.jit(lambda: jax.jvp(loss, (0.0,), (1.0,))[1])()
    np.testing.assert_allclose(forward, difference, rtol=1e-7)


def test_solvers_and_controllers_are_those_of_diffrax(x64):
    """Heun's rule with a step of 1/4, by hand; and what a tolerance leaves."""
    common = {"solver": diffrax.Heun(), "stepsize_controller": diffrax.ConstantStepSize()}
    module = ode(dt0=0.25, **common)
    cell, z = velocity(module, erf)
    for _ in range(4):
        k = cell(z)
        z = z + 0.125 * (k + cell(z + 0.25 * k))
    found = module.solve(jnp.asarray(X))
    np.testing.assert_allclose(found.value, z, rtol=1e-12)
    np.testing.assert_array_equal(found.accepted, 4)
    rough = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    found = ode(solver=diffrax.Tsit5(), stepsize_controller=rough).solve(jnp.asarray(X))
    exact = ode()(jnp.asarray(X))
    assert 1e-9 < np.abs(found.value - exact).max() < 1e-2
    assert found.accepted.max() < 6


# exp makes the state of the middle one grow beyond every number at once.
HUGE = X * np.array([1, 1e3, 1])[:, None]


@pytest.mark.smoke
@pytest.mark.parametrize("name", slow_except(["default"], ["default", "checkpoint", "steps"]))
def test_each_sample_fails_on_its_own(x64, name):
    """Values and derivatives of the others are what they are without it."""
    keys = {"phi": jnp.exp, "W_std": 0.2, "T": 0.5}
    module = with_adjoint(ADJOINTS[name], **keys)
    with pytest.raises(NotConvergedError, match=r"to its end T for row 1 of x: after"):
        module(jnp.asarray(HUGE))
    found = nnx.jit(lambda m, x: m.solve(x))(module, jnp.asarray(HUGE))
    np.testing.assert_array_equal(found.reached, [True, False, True])
    assert found.rejected.max() < 100
    others = jnp.asarray(HUGE[::2])
    z = nnx.jit(lambda m, x: m(x))(module, jnp.asarray(HUGE))
    np.testing.assert_array_equal(np.isnan(z).all(axis=1), [False, True, False])
    np.testing.assert_allclose(z[::2], module(others), rtol=1e-13)
    weights = jnp.array([1.0, 0.0, 1.0])[:, None]
    apply_fn, params = functional(module)

    def loss(params, x, weights):
        z = apply_fn(params, x)
        return jnp.sum(jnp.sin(jnp.where(weights == 0, 0, z)))

    grad = jax.jit(jax.grad(loss))
    found, expected = grad(params, HUGE, weights), grad(params, others, jnp.ones((2, 1)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    everything = grad(params, HUGE, jnp.ones((3, 1)))
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(everything))


def test_what_becomes_of_a_failure(x64):
    keys = {"phi": jnp.exp, "W_std": 0.2, "T": 0.5}
    z = ode(on_failure="nan", **keys)(jnp.asarray(HUGE))
    np.testing.assert_array_equal(np.isnan(z).any(axis=1), [False, True, False])
    with pytest.raises(Exception, match="was not integrated to its end T"):
        nnx.jit(lambda m, x: m(x))(ode(on_failure="raise", **keys), jnp.asarray(HUGE))
    with pytest.raises(NotConvergedError, match=r"3 rows of x .*after 2 steps"):
        ode(max_steps=2)(jnp.asarray(X))
    module = ode()
    params = jax.tree.map(lambda p: p * jnp.nan, to_stax(module))
    from_stax(module, params)
    with pytest.raises(
        NotConvergedError, match=r"because parameters\.cell\.layers\.1\.W,.* are NaN"
    ):
        module(jnp.asarray(X))


def test_samples_of_stax_fail_on_their_own(x64):
    """The same code: a sample that overflows was the end of the batch."""
    cell = stax.serial(stax.Relu(), stax.Dense(64, 50.0))
    init_fn, apply_fn, _ = stax.NeuralODE(cell, stax.Dense(64), T=30.0)
    x = jnp.asarray(np.concatenate([0 * X[:1], X[1:]]))
    params = init_fn(random.key(0), x.shape)[1]
    with pytest.raises(NotConvergedError, match=r"2 rows of x .the first is row 1."):
        apply_fn(params, x)
    z = jax.jit(apply_fn)(params, x)
    np.testing.assert_array_equal(np.isnan(z).any(axis=1), [False, True, True])


@pytest.mark.smoke
@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("steps", [None, 3])
def test_parameters_go_to_stax_and_back(x64, steps):
    rngs, common = nnx.Rngs(0), {"T": 0.8, "leak": 0.4, "inject_always": True, "steps": steps}
    cell = nnx.Sequential(jnp.sin, Conv(6, 6, (3,), W_std=0.7, b_std=0.1, rngs=rngs))
    module = nnx.Sequential(
        NeuralODE(cell, Conv(3, 6, (2,), padding="VALID", rngs=rngs), **common),
        jnp.sin,
    )
    layer = stax.NeuralODE(
        stax.serial(stax.Sin(), stax.Conv(6, (3,), padding="SAME", W_std=0.7, b_std=0.1)),
        stax.Conv(6, (2,)),
        **common,
    )
    init_fn, apply_fn, _ = stax.serial(layer, stax.Sin())
    x = random.normal(random.key(1), (2, 5, 3))
    np.testing.assert_allclose(apply_fn(to_stax(module), x), module(x), rtol=1e-12, atol=1e-13)
    params = init_fn(random.key(2), x.shape)[1]
    from_stax(module, params)
    np.testing.assert_allclose(apply_fn(params, x), module(x), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
def test_the_empirical_ntk(x64):
    """By both implementations, against the Jacobian."""
    apply_fn, params = functional(ode())
    x = jnp.asarray(X)
    found = [
        nt.empirical_ntk_fn(apply_fn, vmap_axes=0, implementation=i)(x, None, params)
        for i in (
            nt.NtkImplementation.JACOBIAN_CONTRACTION,
            nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
        )
    ]
    jacobian = jax.jit(jax.jacobian(lambda p: apply_fn(p, x)))(params)
    jacobian = np.concatenate(
        [j.reshape(*x.shape[:1], WIDTH, -1) for j in jax.tree.leaves(jacobian)], -1
    )
    expected = np.einsum("iap,jap->ij", jacobian, jacobian) / WIDTH
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)
    np.testing.assert_allclose(found[1], expected, rtol=1e-9)


def test_every_sample_has_a_mask_of_dropout_for_all_times(x64):
    """So the state of one sample is that of a network whose cell has lost the same columns."""
    rngs = nnx.Rngs(0)
    cell = nnx.Sequential(
        lax.erf, Dense(WIDTH, WIDTH, W_std=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    )
    module = NeuralODE(cell, Dense(4, WIDTH, rngs=rngs), inject_always=True)
    x = jnp.asarray(np.tile(X[:1], (8, 1)))
    u, z = module.inject(x), module(x)
    dropped = np.isclose(z, u, rtol=1e-10)  # ż = u there, and T is 1
    assert 0.2 < dropped.mean() < 0.8
    assert len({tuple(row) for row in dropped}) > 4


@pytest.mark.usefixtures("promotion")
def test_it_trains():
    x, y = jnp.asarray(X, jnp.float32), jnp.sin(jnp.asarray(X[:, :1], jnp.float32))
    rough = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    layer = ode(
        solver=diffrax.Tsit5(),
        stepsize_controller=rough,
        adjoint=diffrax.RecursiveCheckpointAdjoint(),
        max_steps=64,
    )
    apply_fn, params = functional(nnx.Sequential(layer, Dense(WIDTH, 1, rngs=nnx.Rngs(1))))
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply_fn(p, x) - y) ** 2))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda c: lax.scan(step, c, length=100))((params, optimizer.init(params)))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0.0}, r"T=0\.0 must be one finite number above 0"),
        ({"leak": -1.0}, r"leak=-1\.0 must be one finite number of at least 0"),
        ({"steps": 0}, "steps=0 must be an integer"),
        ({"max_steps": 0}, "max_steps=0 must be an integer"),
        ({"on_failure": "best"}, "on_failure='best' must be one of"),
        ({"solver": "tsit5"}, "solver='tsit5' must be a diffrax.AbstractSolver"),
        ({"adjoint": 1}, "adjoint=1 must be a diffrax.AbstractAdjoint"),
        ({"dt0": -1.0}, r"dt0=-1\.0 must be"),
        ({"stepsize_controller": diffrax.ConstantStepSize()}, "needs dt0"),
        ({"steps": 3, "dt0": 0.1}, r"dt0=0\.1 is of the differential equation, and steps=3"),
        ({"steps": 3, "adjoint": diffrax.DirectAdjoint()}, "adjoint=.* is of the differential"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ode(**arguments)


def test_a_cell_that_changes_the_shape_is_refused():
    rngs = nnx.Rngs(0)
    module = NeuralODE(Dense(WIDTH, 5, rngs=rngs), Dense(4, WIDTH, rngs=rngs))
    with pytest.raises(ValueError, match=r"NeuralODE: the cell turns z of shape \(1, 8\)"):
        module(jnp.asarray(X, jnp.float32))
