"""The Flax modules: the function of `stax.DEQ`, trained, linearised and checked."""

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import optax
import pytest
from flax import nnx
from jax import random
from marks import slow_except

import nt_deq
from nt_deq import (
    Anderson,
    Broyden,
    ImplicitAdjoint,
    NoEquilibriumError,
    NotConvergedError,
    Picard,
    UnrolledAdjoint,
    jacobian_regularization,
    spectral_radius,
    stax,
)
from nt_deq.flax import DEQ, Conv, Dense, FixedPoint, from_stax, functional, to_stax


class Network(nnx.Module):
    """A DEQ with a readout, as a user writes it."""

    def __init__(self, d, width, out, rngs, **kwargs):
        self.deq = DEQ(d, width, rngs=rngs, **kwargs)
        self.readout = Dense(width, out, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.deq(x))


def inputs(n=4, d=5, seed=0):
    return random.normal(random.key(seed), (n, d))


@pytest.mark.smoke
@pytest.mark.parametrize("activation", slow_except(["gelu"], ["relu", "gelu"]))
def test_it_is_the_function_of_stax(dtype, activation):
    x = inputs()
    init_fn, apply_fn, _ = stax.serial(
        stax.DEQ(40, 0.7, 1.3, 0.2, activation=activation), stax.Dense(2, 1.5, 0.3)
    )
    params = init_fn(random.key(0), x.shape)[1]
    (((W, _), (U, b)), (V, c)) = params
    deq = DEQ(5, 40, W_std=0.7, U_std=1.3, b_std=0.2, activation=activation, rngs=nnx.Rngs(1))
    readout = Dense(40, 2, W_std=1.5, b_std=0.3, rngs=nnx.Rngs(1))
    for module, name, value in (
        (deq.hidden, "W", W),
        (deq.inject, "W", U),
        (deq.inject, "b", b[0]),
        (readout, "W", V),
        (readout, "b", c[0]),
    ):
        assert getattr(module, name).shape == value.shape
        setattr(module, name, nnx.Param(value))
    h = deq(x)
    assert h.dtype == dtype
    eps = jnp.finfo(dtype).eps
    expected = stax.DEQ(40, 0.7, 1.3, 0.2, activation=activation)[1](params[0], x)
    np.testing.assert_allclose(h, expected, atol=40 * eps)
    np.testing.assert_allclose(readout(h), apply_fn(params, x), atol=100 * eps)
    np.testing.assert_allclose(deq.activation.fn(deq.equilibrium(x)), h, rtol=1e-6)


def test_parameters_are_standard_normal():
    module = Network(300, 400, 10, nnx.Rngs(0), W_std=0.5, b_std=1.0)
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sorted(leaf.shape for leaf in leaves) == [(300, 400), (400,), (400, 10), (400, 400)]
    for leaf in leaves:
        assert abs(leaf.mean()) < 5 / leaf.size**0.5
        assert abs(leaf.var() - 1) < 5 * (2 / leaf.size) ** 0.5
    other = Network(300, 400, 10, nnx.Rngs(1), W_std=0.5, b_std=1.0)
    assert not np.allclose(other.deq.hidden.W[...], module.deq.hidden.W[...])


@pytest.mark.slow
@pytest.mark.smoke
def test_functional_serves_neural_tangents(x64):
    x = inputs()
    module = Network(5, 64, 1, nnx.Rngs(0), W_std=0.6, b_std=0.1, activation="erf")
    apply_fn, params = functional(module)
    np.testing.assert_array_equal(apply_fn(params, x), module(x))
    contraction, products = (
        nt.empirical_ntk_fn(apply_fn, vmap_axes=0, implementation=i)(x, None, params)
        for i in (
            nt.NtkImplementation.JACOBIAN_CONTRACTION,
            nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
        )
    )
    np.testing.assert_allclose(contraction, products, rtol=1e-10)
    linear = nt.linearize(apply_fn, params)
    moved = jax.tree.map(lambda p: p + 1e-3 * jnp.cos(p), params)
    np.testing.assert_allclose(linear(params, x), module(x), rtol=1e-12)
    error = np.abs(np.subtract(linear(moved, x), apply_fn(moved, x))).max()
    assert error < 1e-2 * np.abs(apply_fn(moved, x) - module(x)).max()
    assert jax.tree.leaves(params)[0] is not jax.tree.leaves(moved)[0]
    np.testing.assert_array_equal(apply_fn(params, x), module(x))


@pytest.mark.slow
@pytest.mark.smoke
def test_structured_derivatives_say_what_to_use_instead():
    x = inputs(2)
    apply_fn, params = functional(DEQ(5, 4, W_std=0.5, activation="erf", rngs=nnx.Rngs(0)))
    structured = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    with pytest.raises(NotImplementedError, match=r"every deep equilibrium .*NTK_VECTOR_PRODUCTS"):
        nt.empirical_ntk_fn(apply_fn, vmap_axes=0, implementation=structured)(x, None, params)


def test_it_trains():
    x, y = inputs(16), jnp.sin(inputs(16)[:, :1])
    module = Network(5, 64, 1, nnx.Rngs(0), W_std=0.6, activation="gelu")
    apply_fn, params = functional(module)
    optimizer = optax.sgd(1.0)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: 0.5 * jnp.mean((apply_fn(p, x) - y) ** 2))(
            params
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses[-1] < 0.05 * losses[0]


def test_a_warm_start_changes_nothing(x64):
    x = inputs()
    deq = DEQ(5, 32, W_std=0.7, rngs=nnx.Rngs(0))
    z = deq.equilibrium(x)
    np.testing.assert_allclose(deq(x, z + 0.1), deq(x), atol=1e-13)


def test_no_equilibrium_is_an_error_or_nan():
    deq = DEQ(5, 100, W_std=4.0, activation="erf", rngs=nnx.Rngs(0))
    with pytest.raises(NotConvergedError, match="take a smaller W_std"):
        deq(inputs())
    assert np.isnan(nnx.jit(lambda m, x: m(x))(deq, inputs())).all()
    assert not deq.solve(inputs()).converged.any()


def test_a_W_std_with_which_no_input_has_an_equilibrium_is_refused(caplog):
    """ReLU: W_std² E[φ'²] = W_std²/2; a saturating φ may be stable for large inputs."""
    for W_std, phi in ((1.5, "relu"), (1.0, "abs"), (1.0, "identity")):
        with pytest.raises(NoEquilibriumError, match=rf"W_std={W_std} must be below .* for {phi}"):
            DEQ(5, 8, W_std=W_std, activation=phi, rngs=nnx.Rngs(0))
    caplog.set_level("INFO", "nt_deq")
    for W_std, phi in ((0.44, "relu"), (1.41, "relu"), (1.41, "relu"), (3.3, "tanh")):
        DEQ(5, 8, W_std=W_std, activation=phi, rngs=nnx.Rngs(0))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("W_std=1.41 with relu: wide random networks have a stable")
    assert said[1].startswith("W_std=3.3 with tanh: an equilibrium is stable for those inputs")


@pytest.mark.parametrize("name", ["W_std", "U_std", "b_std"])
def test_a_traced_standard_deviation_is_refused(name):
    def call(std):
        return DEQ(3, 8, **{"W_std": 0.5, name: std}, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))

    with pytest.raises(ValueError, match="W_std, U_std or b_std is traced"):
        jax.jit(call)(0.5)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "parameterization", [pytest.param("ntk", marks=pytest.mark.slow), "standard"]
)
@pytest.mark.usefixtures("promotion")
def test_parameters_go_to_stax_and_back(x64, parameterization):
    same = {"parameterization": parameterization}
    rngs, x, image = nnx.Rngs(0), inputs(), random.normal(random.key(1), (2, 4, 5, 3))

    def conv(features, size, **kwargs):
        return Conv(features, 6, size, rngs=rngs, **kwargs, **same)

    def stax_conv(size, padding="SAME", **kwargs):
        return stax.Conv(6, size, padding=padding, **kwargs, **same)

    common = {"W_std": 0.7, "U_std": 1.3, "b_std": 0.2, "activation": "erf"}
    pairs = [
        (DEQ(5, 8, rngs=rngs, **common, **same), stax.DEQ(8, 0.7, 1.3, 0.2, "erf", **same), x),
        (
            DEQ(3, 6, kernel_size=(3, 2), padding="CIRCULAR", rngs=rngs, **common, **same),
            stax.serial(
                stax.FixedPoint(
                    stax.serial(stax.Erf(), stax_conv((3, 2), "CIRCULAR", W_std=0.7)),
                    stax_conv((3, 2), "CIRCULAR", W_std=1.3, b_std=0.2),
                ),
                stax.Erf(),
            ),
            image,
        ),
        (
            nnx.Sequential(
                FixedPoint(
                    nnx.Sequential(jnp.sin, conv(6, (3,), W_std=0.5, b_std=0.1)),
                    conv(3, (2,), padding="VALID", b_std=0.3),
                ),
                jnp.sin,
                Dense(6, 2, W_std=1.5, b_std=0.4, rngs=rngs, **same),
            ),
            stax.serial(
                stax.FixedPoint(
                    stax.serial(stax.Sin(), stax_conv((3,), W_std=0.5, b_std=0.1)),
                    stax_conv((2,), "VALID", b_std=0.3),
                ),
                stax.Sin(),
                stax.Dense(2, 1.5, 0.4, **same),
            ),
            image[:, 0],
        ),
    ]
    for module, (init_fn, apply_fn, _), x in pairs:
        fresh = init_fn(random.key(2), x.shape)[1]
        ours, theirs = nnx.jit(lambda m, x: m(x)), jax.jit(apply_fn)
        np.testing.assert_allclose(ours(module, x), theirs(to_stax(module), x), atol=1e-12)
        from_stax(module, fresh)
        np.testing.assert_allclose(ours(module, x), theirs(fresh, x), atol=1e-12)
        back = to_stax(module)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.ravel(), b.ravel()), back, fresh)
        with pytest.raises(ValueError, match="params have the shapes"):
            from_stax(module, fresh[:1])


def test_what_stax_does_not_have_is_refused():
    with pytest.raises(ValueError, match="Linear has no stax layer of the same function"):
        to_stax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_standard_parameters_have_the_deviations(x64):
    stds = {"W_std": 0.5, "b_std": 2.0}
    module = Conv(20, 300, (3, 3), **stds, parameterization="standard", rngs=nnx.Rngs(0))
    assert abs(module.W[...].std() * (9 * 20) ** 0.5 - 0.5) < 0.01
    assert abs(module.b[...].std() - 2.0) < 0.3
    scaled = Conv(20, 300, (3, 3), **stds, rngs=nnx.Rngs(0))
    x = random.normal(random.key(0), (1, 4, 4, 20))
    np.testing.assert_allclose(module(x), scaled(x), atol=1e-12)  # drawn from the same numbers


@pytest.mark.slow
def test_any_cell_with_any_solver_and_adjoint():
    """A gated cell with state of its own, found and differentiated in three ways."""

    class Cell(nnx.Module):
        def __init__(self, rngs):
            self.gate, self.linear = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
            self.calls = nnx.Variable(jnp.array(0))

        def __call__(self, z):
            self.calls[...] += 1
            return 0.3 * nnx.sigmoid(self.gate(z)) * jnp.tanh(self.linear(z))

    rngs, x = nnx.Rngs(0), inputs(3)
    cell, inject = Cell(rngs), Dense(5, 8, rngs=rngs)
    found = {}
    for solver, adjoint in (
        (None, None),
        (Anderson(window=2), ImplicitAdjoint(Broyden())),
        (Picard(damping=0.1), UnrolledAdjoint(60)),
    ):
        network = FixedPoint(cell, inject, solver=solver, adjoint=adjoint)
        z = network(x)
        np.testing.assert_allclose(network.step(z, x), z, atol=1e-5)
        loss, gradient = nnx.value_and_grad(lambda n: jnp.sum(n(x) ** 2))(network)
        found[type(solver)] = (loss, jax.tree.leaves(nnx.state(gradient, nnx.Param)))
        assert network.solve(x).steps <= 100
    for loss, gradient in found.values():
        np.testing.assert_allclose(loss, found[type(None)][0], rtol=1e-5)
        for a, b in zip(gradient, found[type(None)][1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match=r"wrap functions in nnx\.Sequential"):
        FixedPoint(jnp.tanh, inject)
    with pytest.raises(ValueError, match=r"z of shape \(3, 8\) into \(3, 4\), and inject"):
        FixedPoint(Dense(8, 4, rngs=rngs), inject)(x)


def test_the_jacobian_at_the_equilibrium(x64):
    x = inputs(2)
    deq = DEQ(5, 60, W_std=0.8, activation="tanh", rngs=nnx.Rngs(0))
    graph, params = nnx.split(deq)
    key = random.key(1)  # not that of the weights

    @jax.jit
    def measure(params):
        deq = nnx.merge(graph, params)
        z = deq.equilibrium(x)
        J = jax.vmap(jax.jacobian(lambda z, x: deq.step(z[None], x[None])[0]))(z, x)
        radius = spectral_radius(lambda z: deq.step(z, x), z, key=key, steps=300)
        return J, radius, penalty(params, 2000)

    def penalty(params, samples):
        deq = nnx.merge(graph, params)
        step = lambda z: deq.step(z, x)  # noqa: E731
        return jacobian_regularization(step, deq.equilibrium(x), key=key, samples=samples)

    J, radius, regularization = measure(params)
    np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(J)).max(axis=1), rtol=0.02)
    exact = np.mean(np.sum(np.square(J), axis=(1, 2))) / 60
    np.testing.assert_allclose(regularization, exact, rtol=0.02)

    direction = jax.tree.map(jnp.cos, params)
    along = jax.jit(lambda s: penalty(jax.tree.map(lambda p, d: p + s * d, params, direction), 1))
    difference = (along(1e-4) - along(-1e-4)) / 2e-4
    np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **k: DEQ(5, 8, W_std=-1.0, **k), r"W_std=-1\.0 must be"),
        (lambda **k: DEQ(5, 8, W_std=0.5, b_std=-1.0, **k), r"b_std=-1\.0 must be"),
        (lambda **k: DEQ(0, 8, W_std=0.5, **k), "in_features=0 must be an integer"),
        (lambda **k: DEQ(5, 0, W_std=0.5, **k), "width=0 must be an integer"),
        (lambda **k: DEQ(5, 8, W_std=0.5, activation="x", **k), "activation='x' is unknown"),
        (lambda **k: Dense(5, -1, **k), "out_features=-1 must be an integer"),
        (
            lambda **k: DEQ(5, 8, W_std=0.5, **k)(jnp.ones((2, 4))),
            r"x has shape \(2, 4\).*5 features",
        ),
        (lambda **k: Dense(5, 8, **k)(jnp.ones((2, 4))), r"x has shape \(2, 4\).*5 features"),
        (lambda **k: Dense(5, 8, parameterization="mup", **k), "parameterization='mup' must be"),
        (lambda **k: Conv(5, 8, (), **k), r"kernel_size=\(\) must be one or two"),
        (lambda **k: Conv(5, 8, (3, 0), **k), "kernel_size=0 must be an integer"),
        (lambda **k: Conv(5, 8, (3,), padding="FULL", **k), "padding='FULL' must be one of"),
        (lambda **k: Conv(5, 8, (3,), **k)(jnp.ones((2, 5))), r"\(2, 5\).*1 spatial axes"),
        (
            lambda **k: DEQ(5, 8, W_std=0.5, kernel_size=(3,), padding="VALID", **k),
            "padding='VALID' changes the shape",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))
    assert nt_deq.flax.DEQ is DEQ


def spectral_network(lipschitz=None, **kwargs):
    return DEQ(5, 48, W_std=1.3, lipschitz=lipschitz, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.smoke
@pytest.mark.parametrize("activation", slow_except(["erf"], ["relu", "erf"]))
def test_lipschitz_keeps_the_layer_a_contraction(x64, activation):
    """However large its weights: and where they are small it changes nothing."""
    x, lipschitz = inputs(3), 0.9
    deq = spectral_network(lipschitz, activation=activation, solver=Picard())
    for scale in (1.0, 50.0, 1e6):
        deq.hidden.W = nnx.Param(scale * deq.hidden.W[...])
        jacobian = jax.jacobian(lambda z: deq.step(z[None], x[:1])[0])
        for size in (1e-3, 1.0):
            z = size * random.normal(random.key(1), (48,))
            assert np.linalg.norm(jacobian(z), 2) <= lipschitz
        z = deq.equilibrium(x)
        np.testing.assert_allclose(deq.step(z, x), z, atol=1e-12 * np.abs(z).max())
    deq.hidden.W = nnx.Param(1e-9 * deq.hidden.W[...])
    free = spectral_network(parameterization="standard", activation=activation)
    free.hidden.W, free.inject.W = deq.hidden.W, deq.inject.W
    np.testing.assert_allclose(deq(x), free(x), rtol=1e-12)


def test_lipschitz_is_differentiated(x64):
    """By the weights that it scales, through the equilibrium and the norm."""
    x = inputs(3)
    graph, params = nnx.split(spectral_network(0.9, solver=Picard(), activation="erf"))
    direction = jax.tree.map(jnp.cos, params)

    @jax.jit
    def along(s):
        moved = jax.tree.map(lambda p, d: p + s * d, params, direction)
        return jnp.sum(nnx.merge(graph, moved)(x) ** 2)

    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-6)


@pytest.mark.parametrize("W_std", slow_except([1.3], [0.3, 1.3]))
def test_the_limit_of_a_lipschitz_network(W_std):
    """The kernel of `stax.DEQ` with a smaller `W_std`, as the docstring says; one wide network."""
    x, width = inputs(4), 800
    deq = DEQ(5, width, W_std=W_std, lipschitz=0.9, activation="erf", rngs=nnx.Rngs(0))
    h = nnx.jit(lambda deq, x: deq(x))(deq, x)
    smaller = min(W_std, 0.9 / (2 * deq.activation.lipschitz))
    expected = stax.DEQ(1, smaller, activation="erf")[2](x, None, "nngp")
    # Products of two units over the width have deviations of about 1/√width; the norm is known to
    # a few per cent, which moves the kernel by less.
    np.testing.assert_allclose(h @ h.T / width, expected, atol=4 / width**0.5)


@pytest.mark.slow
def test_the_convolutional_one_keeps_an_equilibrium_of_every_size():
    deq = DEQ(2, 6, W_std=30.0, lipschitz=0.95, kernel_size=(3, 3), rngs=nnx.Rngs(0))
    for shape in ((2, 4, 4, 2), (1, 7, 3, 2)):
        solution = deq.solve(random.normal(random.key(0), shape))
        assert solution.converged.all()
        assert deq.output(solution).shape == (*shape[:-1], 6)
    inner = nnx.Sequential(
        lambda z: z[:, ::2], Conv(6, 6, (3,), spectral_bound=0.9, rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match=r"spectral_bound was applied for the spatial axes \(8,\)"):
        FixedPoint(inner, Conv(2, 6, (3,), rngs=nnx.Rngs(0)))(jnp.ones((1, 8, 2)))


@pytest.mark.parametrize("dtype", slow_except(["bfloat16"], ["bfloat16", "float16"]))
def test_mixed_precision(dtype):
    """Products in 16 bits, the state in 32: the result is as exact as 16 bits are."""
    x = inputs()
    exact = DEQ(5, 64, W_std=0.7, rngs=nnx.Rngs(0))
    eps = float(jnp.finfo(dtype).eps)
    for param_dtype in (None, dtype):
        mixed = DEQ(5, 64, W_std=0.7, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        solution, h = mixed.solve(x), mixed(x)
        assert solution.value.dtype == solution.residual.dtype == "float32"
        assert h.dtype == dtype
        assert solution.converged.all()
        reference = exact
        if param_dtype is not None:  # rounded, or drawn otherwise
            reference = DEQ(5, 64, W_std=0.7, rngs=nnx.Rngs(0))
            reference.hidden.W = nnx.Param(mixed.hidden.W[...].astype("float32"))
            reference.inject.W = nnx.Param(mixed.inject.W[...].astype("float32"))
        z = reference.equilibrium(x)
        # J is about .5, so that the residual of 2 eps is an error of about 4.
        error = jnp.linalg.norm(solution.value - z, axis=1) / jnp.linalg.norm(z, axis=1)
        assert (error < 5 * eps).all(), error
    gradient = nnx.grad(lambda m: jnp.sum(m(x).astype("float32") ** 2))(mixed)
    assert all(np.isfinite(g.astype("float32")).all() for g in jax.tree.leaves(gradient))


def test_states_on_the_way_have_the_derivative_of_one_step(x64):
    x = inputs()
    deq = DEQ(5, 16, W_std=0.6, activation="erf", rngs=nnx.Rngs(0))
    states, solution = deq.trajectory(x, steps=(2, 5))
    z, expected = jnp.zeros((4, 16)), []
    for _ in range(5):
        z = deq.step(z, x)
        expected.append(z)
    # The iterate of the smallest residual so far is the one before the last evaluation.
    np.testing.assert_allclose(states[0], expected[0], atol=1e-12)
    np.testing.assert_allclose(solution.value, deq.equilibrium(x), atol=1e-12)
    gradient = nnx.grad(lambda d: jnp.sum(d.trajectory(x, steps=(2,))[0][0] ** 2))(deq)
    one_step = nnx.grad(
        lambda d: 2 * jnp.sum(jax.lax.stop_gradient(states[0]) * d.step(states[0], x))
    )(deq)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_step), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    with pytest.raises(ValueError, match=r"steps=\[5, 2\] must increase"):
        deq.trajectory(x, steps=(5, 2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lipschitz": 1.0}, r"lipschitz=1\.0 must lie between 0 and 1"),
        ({"dtype": "int32"}, "dtype=int32 must be a floating-point dtype"),
        ({"on_failure": "warn"}, "on_failure='warn' must be one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_for_training_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DEQ(5, 8, W_std=0.5, **kwargs, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"spectral_bound=0 must be a positive number"):
        Dense(5, 8, spectral_bound=0, rngs=nnx.Rngs(0))
