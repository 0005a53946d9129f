"""The finite equilibrium and its implicit derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from jax import lax, random

import nt_deq
from nt_deq import NotConvergedError, Picard, equilibrium, find_equilibrium
from nt_deq.fixed_point import Optimistix


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


@pytest.mark.slow
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
        layer,
        jnp.zeros((4, 20)),
        args,
        solver=Optimistix(optimistix.Newton(rtol=1e-12, atol=1e-12)),
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

    for f, failed in ((diverging, 4), (chaotic, 1), (homogeneous, 4)):
        with pytest.raises(NotConvergedError, match=rf"in \d+ steps by {failed} of 4 samples"):
            equilibrium(f, jnp.ones_like(u), (W, u))
        traced = jax.jit(lambda u, f=f: equilibrium(f, jnp.ones_like(u), (W, u)))(u)
        assert np.isnan(traced).all(axis=1).sum() == failed
        assert np.isnan(traced).sum() == failed * 20


def test_states_are_trees():
    """Two layers that read each other, as two arrays of different shapes and as one."""
    keys = random.split(random.key(0), 4)
    A = random.normal(keys[0], (6, 12)) / 6
    B = random.normal(keys[1], (12, 6)) / 6
    u = {"a": random.normal(keys[2], (3, 6)), "b": random.normal(keys[3], (3, 4, 3))}

    def pair(z, u):
        a = jnp.tanh(z["b"].reshape(3, 12)) @ B + u["a"]
        b = (jnp.tanh(z["a"]) @ A).reshape(3, 4, 3) + u["b"]
        return {"a": a, "b": b}

    def joined(z, u):
        W = jnp.block([[jnp.zeros((6, 6)), A], [B, jnp.zeros((12, 12))]])
        return jnp.tanh(z) @ W + u

    def loss(solve, u):
        return sum(jnp.sum(jnp.cos(z)) for z in jax.tree.leaves(solve(u)))

    def of_tree(u):
        return equilibrium(pair, jax.tree.map(jnp.zeros_like, u), u)

    def flat(u):
        return jnp.concatenate([u["a"], u["b"].reshape(3, 12)], axis=1)

    def of_array(u):
        return equilibrium(joined, jnp.zeros((3, 18)), flat(u))

    np.testing.assert_allclose(flat(of_tree(u)), of_array(u), atol=2e-6)
    ours = jax.jit(jax.grad(lambda u: loss(of_tree, u)))(u)
    expected = jax.grad(lambda u: loss(of_array, u))(u)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, expected)


def test_it_says_how_it_went():
    """One sample at once, one in many steps, one never: each by itself."""
    scales = jnp.array([0.0, 0.9, 1.5])[:, None]

    def f(z, u):
        return scales * z + u

    u = jnp.ones((3, 4))
    value, steps, residual, converged = find_equilibrium(
        f, jnp.zeros((3, 4)), u, solver=Picard(max_steps=200)
    )
    np.testing.assert_array_equal(converged, [True, True, False])
    np.testing.assert_allclose(value[:2], [[1.0] * 4, [10.0] * 4], rtol=1e-4)
    np.testing.assert_array_equal(value[2], 0)  # the best that it met
    np.testing.assert_allclose(residual, jnp.linalg.norm(f(value, u) - value, axis=1), atol=1e-6)
    assert 100 < steps <= 200
    with pytest.raises(
        NotConvergedError, match=r"by 1 of 3 samples \(the first is row 2, where .* 2\)"
    ):
        equilibrium(f, jnp.zeros((3, 4)), u, solver=Picard(max_steps=200))
    traced = jax.jit(lambda u: equilibrium(f, jnp.zeros((3, 4)), u))(u)
    np.testing.assert_allclose(traced[:2], value[:2], rtol=1e-6)
    assert np.isnan(traced[2]).all()


def test_what_overflows_leaves_the_others_alone():
    scales = jnp.array([0.5, 5.0])[:, None]
    found = find_equilibrium(lambda z, u: scales * z + u, jnp.zeros((2, 3)), jnp.ones((2, 3)))
    np.testing.assert_array_equal(found.converged, [True, False])
    np.testing.assert_allclose(found.value[0], 2.0, rtol=1e-5)
    assert np.isfinite(found.value).all()


def test_a_solver_of_optimistix_says_how_it_went_too():
    args = problem()
    newton = Optimistix(optimistix.Newton(rtol=1e-4, atol=1e-4))
    found = find_equilibrium(layer, jnp.zeros((4, 20)), args, solver=newton)
    assert found.converged.all()
    assert found.residual.max() < 1e-3
    assert found.steps < 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda u: equilibrium(lambda z, _: z, u, solver=nt_deq.Newton()),
            r"use nt_deq.Anderson\(\)",
        ),
        (lambda u: equilibrium(layer, u, solver=optimistix.Newton(1, 1)), "not a solver"),
        (lambda u: equilibrium(layer, u, adjoint="implicit"), "adjoint='implicit' must be"),
        (
            lambda u: equilibrium(layer, u, solver=Picard(max_steps=0)),
            "max_steps=0 must be an integer",
        ),
        (lambda u: equilibrium(layer, jnp.ones(())), r"z0 is float32\[\]"),
        (lambda u: equilibrium(layer, [u, u[:2]]), r"z0 is float32\[4, 20\], float32\[2, 20\]"),
        (lambda u: equilibrium(layer, jnp.arange(3)), r"z0 is int32\[3\]"),
        (lambda u: equilibrium(lambda z, _: z[:, :1], u), r"float32\[4, 1\] of float32\[4, 20\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(jnp.ones((4, 20)))
