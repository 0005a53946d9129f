"""ImplicitAdjoint, phantom and unrolled derivatives of dense and convolutional cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from nt_deq import (
    Anderson,
    Broyden,
    ImplicitAdjoint,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
    adjoint_solution,
    equilibrium,
    find_equilibrium,
)


def dense(z, args):
    W, u = args
    return jnp.tanh(z) @ W + u


def convolution(z, args):
    W, u = args
    z = jnp.pad(jax.nn.gelu(z), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(z, W, (1, 1), "VALID", dimension_numbers=numbers) + u


def problem(f, scale=0.7):
    keys = random.split(random.key(0))
    if f is dense:
        return scale / 5 * random.normal(keys[0], (25, 25)), random.normal(keys[1], (3, 25))
    W = scale / 6 * random.normal(keys[0], (3, 3, 4, 4))
    return W, random.normal(keys[1], (2, 4, 5, 4))


def value_and_grad(f, args, **kwargs):
    def loss(args):
        return jnp.sum(jnp.cos(equilibrium(f, jnp.zeros_like(args[1]), args, **kwargs)))

    return jax.jit(jax.value_and_grad(loss))(args)


def assert_close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("f", [dense, convolution])
def test_the_implicit_gradient_is_that_of_500_layers(x64, f):
    args = problem(f)
    exact = value_and_grad(f, args, adjoint=UnrolledAdjoint(500))
    for linear in (Picard(), Anderson(window=2))[: 2 if f is dense else 1]:
        assert_close(value_and_grad(f, args, adjoint=ImplicitAdjoint(linear)), exact, atol=1e-10)


def test_many_phantom_steps_are_the_implicit_gradient(x64):
    args = problem(dense)
    value, exact = value_and_grad(dense, args)
    error = {}
    for steps in (1, 5, 200):
        phantom_value, phantom = value_and_grad(dense, args, adjoint=PhantomAdjoint(steps, 0.3))
        np.testing.assert_allclose(phantom_value, value, rtol=1e-14)
        error[steps] = np.linalg.norm(phantom[0] - exact[0]) / np.linalg.norm(exact[0])
    assert error[200] < 1e-12 < 1e-3 < error[5] < error[1] < 1
    # One undamped step is the derivative of the layer alone.
    z = equilibrium(dense, jnp.zeros_like(args[1]), args)
    free = jax.grad(lambda args: jnp.sum(jnp.cos(dense(z, args))))(args)
    assert_close(value_and_grad(dense, args, adjoint=PhantomAdjoint(1, 0.0))[1], free, atol=1e-12)


@pytest.mark.parametrize(
    "adjoint", [ImplicitAdjoint(), PhantomAdjoint(100, 0.0), UnrolledAdjoint(150)]
)
def test_forward_reverse_and_second_derivatives_agree(x64, adjoint):
    W, u = problem(dense)

    def loss(s):
        z = equilibrium(dense, jnp.zeros_like(u), (s[0] * W, s[1] * u), adjoint=adjoint)
        return jnp.sum(z**2)

    s, e, step = jnp.array([0.9, 1.1]), jnp.array([0.6, 0.8]), 1e-4
    grad = jax.jit(jax.grad(loss))
    forward, backward = loss(s + step * e), loss(s - step * e)
    np.testing.assert_allclose(grad(s) @ e, (forward - backward) / (2 * step), rtol=1e-6)
    product = jax.jit(lambda s, e: jax.jvp(loss, (s,), (e,))[1])(s, e)
    np.testing.assert_allclose(product, grad(s) @ e, rtol=1e-9)
    if isinstance(adjoint, PhantomAdjoint):
        return  # its second derivative is another approximation
    hessian = jax.jit(jax.hessian(loss))(s)
    difference = (grad(s + step * e) - grad(s - step * e)) / (2 * step)
    np.testing.assert_allclose(hessian @ e, difference, rtol=1e-6)


def test_the_unrolled_network_may_be_short():
    """It is a network of that depth, and its residual says how far from an equilibrium."""
    args = problem(dense)
    z0 = jnp.zeros_like(args[1])
    found = find_equilibrium(dense, z0, args, adjoint=UnrolledAdjoint(7))
    z = z0
    for _ in range(7):
        z = dense(z, args)
    np.testing.assert_allclose(found.value, z, atol=1e-6)
    np.testing.assert_allclose(
        found.residual, jnp.linalg.norm(dense(z, args) - z, axis=1), rtol=1e-3
    )
    assert int(found.steps) == 7
    assert (found.residual > 1e-4).all()
    damped = Picard(damping=0.2)
    slower = find_equilibrium(dense, z0, args, solver=damped, adjoint=UnrolledAdjoint(7))
    z = z0
    for _ in range(7):
        z = 0.2 * z + 0.8 * dense(z, args)
    np.testing.assert_allclose(slower.value, z, atol=1e-6)
    with pytest.raises(ValueError, match="UnrolledAdjoint differentiates plain iteration"):
        find_equilibrium(dense, z0, args, solver=Anderson(), adjoint=UnrolledAdjoint(20))


def test_a_backward_solve_that_fails_gives_nan(x64):
    """An equilibrium that Broyden's method finds, and at which the plain iteration diverges."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    A = jnp.asarray(Q * np.linspace(-3.0, 0.5, 8) @ Q.T)
    u = jnp.asarray(rng.normal(size=(2, 8)))

    def f(z, u):
        return z @ A + u

    def loss(u, adjoint):
        return jnp.sum(equilibrium(f, jnp.zeros_like(u), u, solver=Broyden(), adjoint=adjoint))

    assert np.isnan(jax.grad(loss)(u, ImplicitAdjoint(Picard(max_steps=50)))).all()
    found = jax.grad(loss)(u, ImplicitAdjoint())
    expected = np.broadcast_to(np.linalg.solve(np.eye(8) - A, np.ones(8)), (2, 8))
    np.testing.assert_allclose(found, expected, rtol=1e-10)

    z = equilibrium(f, jnp.zeros_like(u), u, solver=Broyden())
    failed = adjoint_solution(f, z, u, jnp.ones_like(z), ImplicitAdjoint(Picard(max_steps=50)))
    assert not failed.converged.any()
    assert (failed.residual > 0.1).all()
    solved = adjoint_solution(f, z, u, jnp.ones_like(z), ImplicitAdjoint(Broyden()))
    assert solved.converged.all()
    np.testing.assert_allclose(solved.value, expected, rtol=1e-10)
    assert (solved.residual < 1e-12).all()


def test_the_layer_is_linearised_once():
    """No step of the backward pass evaluates the nonlinearity or its derivative."""
    args = problem(dense)

    def loss(args):
        return jnp.sum(equilibrium(dense, jnp.zeros_like(args[1]), args))

    def loops(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "while":
                yield str(eqn.params["body_jaxpr"])
            for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from loops(inner)

    bodies = list(loops(jax.make_jaxpr(jax.grad(loss))(args).jaxpr))
    with_tanh = [body for body in bodies if "tanh" in body]
    without = [body for body in bodies if "tanh" not in body and "dot_general" in body]
    assert len(with_tanh) == 1
    assert without
    assert all(body.count("dot_general") <= 2 for body in without)


def test_memory_does_not_grow_with_the_number_of_steps():
    args = problem(dense)

    def memory(adjoint):
        def loss(args):
            found = find_equilibrium(
                dense,
                jnp.zeros((3, 25)),
                args,
                adjoint=adjoint,
                solver=getattr(adjoint, "solver", None) or Picard(),
            )
            return jnp.sum(found.value)

        compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(ImplicitAdjoint(Picard(max_steps=10))) == memory(
        ImplicitAdjoint(Picard(max_steps=10_000))
    )
    state = 4 * 3 * 25
    short, long = memory(UnrolledAdjoint(100)), memory(UnrolledAdjoint(10_000))
    assert long - short > 100 * state  # which 10,000 steps take: of 2 √steps states
    assert long - short < 1000 * state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PhantomAdjoint(0), "steps=0"),
        (lambda: PhantomAdjoint(3, 1.0), r"damping=1.0.*\[0, 1\)"),
        (lambda: UnrolledAdjoint(0), "steps=0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
