"""The finite equilibrium and its implicit derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from jax import lax, random

from nt_deq import NotConvergedError, equilibrium


def layer(z, args):
    W, u = args
    return jnp.tanh(z) @ W + u


def problem(width=20, batch=4, scale=0.5, seed=0):
    keys = random.split(random.key(seed))
    W = scale / width**0.5 * random.normal(keys[0], (width, width))
    return W, random.normal(keys[1], (batch, width))


def unrolled(args, steps=500):
    return lax.fori_loop(0, steps, lambda _, z: layer(z, args), jnp.zeros_like(args[1]))


@pytest.mark.smoke
def test_it_is_the_end_of_the_iteration(dtype):
    args = problem()
    z = equilibrium(layer, jnp.zeros((4, 20)), args)
    assert z.dtype == dtype
    np.testing.assert_allclose(z, unrolled(args), atol=100 * jnp.finfo(dtype).eps)


@pytest.mark.smoke
def test_derivatives_are_those_of_the_unrolled_network(x64):
    args = problem()

    def loss(solve, args):
        return jnp.sum(jnp.cos(solve(args)))

    def implicit(args):
        return equilibrium(layer, jnp.zeros((4, 20)), args)

    def scanned(args):
        return lax.scan(lambda z, _: (layer(z, args), None), jnp.zeros((4, 20)), None, 100)[0]

    ours = jax.grad(lambda a: loss(implicit, a))(args)
    exact = jax.grad(lambda a: loss(scanned, a))(args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, exact)
    tangents = jax.tree.map(jnp.cos, args)
    _, forward = jax.jvp(implicit, (args,), (tangents,))
    _, expected = jax.jvp(scanned, (args,), (tangents,))
    np.testing.assert_allclose(forward, expected, atol=1e-12)


def test_second_derivatives(x64):
    W, u = problem(6, 2)

    def loss(s):
        return jnp.sum(equilibrium(layer, jnp.zeros((2, 6)), (s[0] * W, s[1] * u)) ** 2)

    s = jnp.array([0.9, 1.1])
    step = 1e-5
    finite = [
        (jax.grad(loss)(s + step * e) - jax.grad(loss)(s - step * e)) / (2 * step)
        for e in jnp.eye(2)
    ]
    np.testing.assert_allclose(jax.hessian(loss)(s), finite, rtol=1e-8)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(loss))(s), finite, rtol=1e-8)


def test_what_the_layer_closes_over_is_differentiated(x64):
    W, u = problem()

    def loss(s):
        return jnp.sum(equilibrium(lambda z, u: jnp.tanh(z) @ (s * W) + u, jnp.zeros_like(u), u))

    difference = (loss(1.0 + 1e-6) - loss(1.0 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(loss)(1.0), difference, rtol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.0), difference, rtol=1e-7)


def test_under_vmap(x64):
    args = problem(10, 3)
    many = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a, 1.2 * a]), args)

    def grad(args):
        return jax.grad(lambda a: jnp.sum(equilibrium(layer, jnp.zeros((3, 10)), a) ** 2))(args)

    batch = jax.vmap(grad)(many)
    for i in range(3):
        alone = grad(jax.tree.map(lambda a, i=i: a[i], many))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-12), batch, alone
        )


def test_a_sample_does_not_depend_on_its_batch(x64):
    """One that converges at once stays where it is while another takes many steps."""
    W, u = problem(batch=2)
    u = u.at[0].set(0)
    both = equilibrium(layer, jnp.zeros_like(u), (W, u))
    np.testing.assert_array_equal(both[0], 0)
    alone = equilibrium(layer, jnp.zeros((1, 20)), (W, u[1:]))
    np.testing.assert_allclose(both[1:], alone, atol=1e-15)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_tolerance_is_relative(size):
    """Whatever the scale: a homogeneous network gives a homogeneous equilibrium."""
    W, u = problem()

    def relu(z, args):
        return jnp.maximum(z, 0) @ args[0] + args[1]

    unit = equilibrium(relu, jnp.zeros_like(u), (W, u))
    scaled = equilibrium(relu, jnp.zeros_like(u), (W, size * u))
    np.testing.assert_allclose(scaled / size, unit, rtol=1e-4, atol=1e-5)


def test_a_warm_start_and_another_solver_find_the_same(x64):
    args = problem()
    z = equilibrium(layer, jnp.zeros((4, 20)), args)
    warm = equilibrium(layer, z + 0.01, args)
    newton = equilibrium(
        layer, jnp.zeros((4, 20)), args, solver=optimistix.Newton(rtol=1e-12, atol=1e-12)
    )
    np.testing.assert_allclose(warm, z, atol=1e-13)
    np.testing.assert_allclose(newton, z, atol=1e-12)


def test_divergence_is_an_error_or_nan():
    W, u = problem(scale=0.5)

    def diverging(z, args):
        return 3 * z + args[1]

    def chaotic(z, args):
        return 5 * layer(z, args)

    def homogeneous(z, args):  # overflows in its norm before it does in its entries
        return jnp.maximum(z, 0) @ (4 * args[0]) + args[1]

    for f in (diverging, chaotic, homogeneous):
        with pytest.raises(NotConvergedError, match="was not reached in 1000 steps"):
            equilibrium(f, jnp.ones_like(u), (W, u))
        traced = jax.jit(lambda u, f=f: equilibrium(f, jnp.ones_like(u), (W, u)))(u)
        assert np.isnan(traced).all()
