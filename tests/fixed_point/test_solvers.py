"""The solvers, against closed forms and each other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from nt_deq import Anderson, Broyden, Newton, Picard, find_equilibrium
from nt_deq.fixed_point.solver import Bounds, Evaluation

ITERATIONS = [Picard(), Picard(damping=0.3), Anderson(), Anderson(damping=0.3), Broyden()]


def network(z, args):
    W, u = args
    return jnp.tanh(z) @ W + u


def affine(z, args):
    A, u = args
    return z @ A + u


def weights(eigenvalues, seed=0):
    """A symmetric matrix."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return jnp.asarray(Q * eigenvalues @ Q.T)


@pytest.mark.parametrize("solver", ITERATIONS, ids=repr)
def test_all_find_the_same(dtype, solver):
    W = 0.7 / 30**0.5 * random.normal(random.key(0), (30, 30))
    u = random.normal(random.key(1), (4, 30))
    found = find_equilibrium(network, jnp.zeros_like(u), (W, u), solver=solver)
    assert found.converged.all()
    assert found.value.dtype == dtype
    eps = jnp.finfo(dtype).eps
    size = jnp.linalg.norm(found.value, axis=1)
    assert (found.residual <= 40 * eps * size).all()
    z = u
    for _ in range(150):
        z = network(z, (W, u))
    np.testing.assert_allclose(found.value, z, atol=500 * eps)


def test_acceleration_saves_steps(x64):
    """Eigenvalues up to .99, which plain iteration needs thousands of steps for."""
    A = weights(np.linspace(-0.5, 0.99, 40))
    u = random.normal(random.key(1), (3, 40))
    exact = np.linalg.solve((np.eye(40) - A).T, u.T).T
    steps = {}
    for solver in (Picard(), Anderson(), Broyden(terms=20)):
        found = find_equilibrium(
            affine, jnp.zeros_like(u), (A, u), solver=replace(solver, max_steps=5000)
        )
        assert found.converged.all()
        np.testing.assert_allclose(found.value, exact, rtol=1e-9, atol=1e-9)
        steps[solver] = int(found.steps)
    plain = steps.pop(Picard())
    assert plain > 2000
    assert max(steps.values()) < plain / 5, steps


def test_damping_helps_with_eigenvalues_below_minus_one(x64):
    A = weights(np.linspace(-2.5, 0.5, 20))
    u = random.normal(random.key(1), (3, 20))
    exact = np.linalg.solve((np.eye(20) - A).T, u.T).T
    for solver in (Picard(damping=0.5), Anderson(window=3), Broyden()):
        found = find_equilibrium(affine, jnp.zeros_like(u), (A, u), solver=solver)
        assert found.converged.all(), solver
        np.testing.assert_allclose(found.value, exact, atol=1e-10)
    assert not find_equilibrium(affine, jnp.zeros_like(u), (A, u)).converged.any()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_a_singular_system_is_no_trouble(solver):
    """Samples that stand still, that are solved in one step, and that move along one line."""
    u = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
    slopes = jnp.array([0.5, 0.0, 0.9])[:, None]
    found = find_equilibrium(
        lambda z, args: args[0] * z + args[1], jnp.zeros((3, 3)), (slopes, u), solver=solver
    )
    assert found.converged.all()
    np.testing.assert_allclose(found.value, u / (1 - slopes), rtol=1e-5)


@pytest.mark.parametrize("solver", [Anderson(window=2), Broyden()], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(solver):
    W = 0.9 / 20**0.5 * random.normal(random.key(0), (20, 20))
    u = jnp.array([0.0, 1.0, 100.0])[:, None] * random.normal(random.key(1), (3, 20))
    together = find_equilibrium(network, jnp.zeros_like(u), (W, u), solver=solver).value
    each = jax.vmap(
        lambda u: find_equilibrium(network, jnp.zeros((1, 20)), (W, u[None]), solver=solver).value
    )(u)
    np.testing.assert_allclose(together, each[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_the_best_iterate_is_kept(solver):
    """After too few steps of something chaotic the residual is that of the best of them."""
    W = 5.0 / 20**0.5 * random.normal(random.key(0), (20, 20))
    u = random.normal(random.key(1), (3, 20))
    residuals = []
    for steps in (3, 12):
        found = find_equilibrium(
            network, jnp.zeros_like(u), (W, u), solver=replace(solver, max_steps=steps)
        )
        assert not found.converged.any()
        assert int(found.steps) == steps
        actual = jnp.linalg.norm(network(found.value, (W, u)) - found.value, axis=1)
        np.testing.assert_allclose(found.residual, actual, rtol=1e-4)
        residuals.append(found.residual)
    assert (residuals[0] >= residuals[1]).all()


def test_the_tolerance_is_what_was_asked_for():
    W = 0.7 / 20**0.5 * random.normal(random.key(0), (20, 20))
    u = random.normal(random.key(1), (3, 20))

    def solve(**tolerance):
        return find_equilibrium(network, jnp.zeros_like(u), (W, u), solver=Picard(**tolerance))

    loose, tight = solve(rtol=1e-2), solve(rtol=1e-4)
    assert loose.steps < tight.steps
    assert (loose.residual <= 1e-2 * jnp.linalg.norm(loose.value, axis=1)).all()
    assert (solve(rtol=0.0, atol=1.0).residual <= 1.0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(rtol=-1.0), r"Picard\(rtol=-1.0\)"),
        (lambda: Picard(atol=float("nan")), r"Picard\(atol=nan\)"),
        (lambda: Broyden(damping=1.0), r"Broyden\(damping=1.0\).*\[0, 1\)"),
        (lambda: Anderson(window=0), r"window=0.*from 1 to 20"),
        (lambda: Anderson(angle=0.0), r"angle=0.0.*\(0, 1\)"),
        (lambda: Broyden(terms=0), r"terms=0.*from 1 to 100"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("start", [0.7, 1.5, 3.0])
def test_newton_doubles_where_the_function_rises(start):
    """Those of `y = y + sin(y)/10` are the multiples of π; below π/2 F' is above 1."""
    y = jnp.array([start])

    def fn(y, args):
        del args
        return Evaluation(y + jnp.sin(y) / 10, y, 1 + jnp.cos(y) / 10)

    solution, _ = Newton().solve_entries(fn, y, None, Bounds(y, jnp.full_like(y, jnp.inf)))
    assert solution.converged.all()
    np.testing.assert_allclose(solution.value, jnp.pi, rtol=1e-5)


def plain_iteration(fn, y):
    for _ in range(20_000):
        y = fn(y)
    return y


@pytest.mark.usefixtures("x64")
def test_newton_finds_the_first_of_several_roots():
    """Steps of `F`, as smooth as those of a variance `E[φ²]`, which make up to 7 roots."""
    rng = np.random.default_rng(0)
    height, place, start = (10 ** rng.uniform(-2, 3, (3, 2000)) for _ in range(3))
    args = height, place, start[0] / 100

    def evaluate(y, args):
        height, place, start = args
        square = (y * y)[None]
        return start + (height * square / (square + place**2)).sum(0)

    def fn(y, args):
        value, slope = jax.jvp(lambda y: evaluate(y, args), (y,), (jnp.ones_like(y),))
        return Evaluation(value, y, slope)

    expected = plain_iteration(lambda y: evaluate(y, args), args[2])
    args = jax.tree.map(jnp.asarray, args)
    bounds = Bounds(args[2], jnp.full_like(args[2], jnp.inf))
    solution, _ = jax.jit(lambda args: Newton().solve_entries(fn, args[2], args, bounds))(args)
    assert solution.converged.all()
    np.testing.assert_allclose(solution.value, expected, rtol=1e-9)
