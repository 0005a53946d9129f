"""What becomes of samples without an equilibrium, forward and backward, eager and traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import random

from nt_deq import (
    Anderson,
    ImplicitAdjoint,
    NotConvergedError,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
    adjoint_solution,
    equilibrium,
    find_equilibrium,
)
from nt_deq.flax import DEQ


def layer(z, args):
    """Contracts where `slope < 1`."""
    slope, u = args
    return slope * z + u


def problem(*slopes):
    slope = jnp.array(slopes)[:, None]
    return slope, jnp.ones((len(slopes), 3))


def solve(slope, u, **kwargs):
    return equilibrium(
        layer, jnp.zeros_like(u), (slope, u), **{"solver": Picard(max_steps=50)} | kwargs
    )


@pytest.mark.smoke
def test_on_failure_says_what_becomes_of_the_samples():
    slope, u = problem(0.5, 2.0)
    traced = jax.jit(solve, static_argnames="on_failure")
    for call in (solve, traced):
        nan, best = (call(slope, u, on_failure=choice) for choice in ("nan", "best"))
        np.testing.assert_allclose(nan[0], 2.0, rtol=1e-5)
        np.testing.assert_array_equal(nan[0], best[0])
        assert np.isnan(nan[1]).all()
        assert np.isfinite(best[1]).all()
        with pytest.raises(Exception, match="equilibrium was not reached"):
            jax.block_until_ready(call(slope, u, on_failure="raise"))
        for choice in ("raise", "nan", "best"):
            good = call(slope[:1], u[:1], on_failure=choice)
            np.testing.assert_array_equal(good, nan[:1])
    with pytest.raises(NotConvergedError, match=r"1 of 2 samples \(the first is row 1"):
        solve(slope, u)
    assert np.isnan(traced(slope, u)[1]).all()


@pytest.mark.usefixtures("unchecked")
def test_another_on_failure_is_refused():
    with pytest.raises(ValueError, match="on_failure='ignore' must be one of"):
        solve(*problem(0.5, 2.0), on_failure="ignore")


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), PhantomAdjoint()])
def test_a_derivative_through_a_sample_that_failed_is_not_a_number(adjoint):
    """As the value is. Of a loss without that sample it is as if the sample were not there."""
    slope, u = problem(0.5, 2.0)

    @partial(jax.jit, static_argnums=2)
    def gradient(factor, u, rows):
        def loss(factor, u):
            z = solve(factor * slope, u, adjoint=adjoint, on_failure="nan")
            return jnp.sum(z[:rows])

        return jax.grad(loss, (0, 1))(factor, u)

    d_factor, d_u = gradient(1.0, u, 2)
    assert np.isnan(d_factor)
    assert np.isnan(d_u[1]).all()
    np.testing.assert_array_equal(d_u[0], gradient(1.0, u, 1)[1][0])
    assert np.isfinite(gradient(1.0, u, 1)[0])
    _, tangent = jax.jvp(
        lambda u: solve(slope, u, adjoint=adjoint, on_failure="nan"), (u,), (jnp.ones_like(u),)
    )
    assert np.isfinite(tangent[0]).all()
    assert np.isnan(tangent[1]).all()


def test_the_best_of_nothing_finite_is_not_a_number():
    slope, u = problem(0.5, jnp.nan)
    best = solve(slope, u, on_failure="best")
    assert np.isfinite(best[0]).all()
    assert np.isnan(best[1]).all()


@pytest.mark.parametrize(("name", "value"), [("on_failure", "nan"), ("on_failure", "raise")])
def test_a_backward_solve_that_fails_is_told_apart(name, value):
    """Started at the equilibrium the forward solve is done; the backward one has too few steps."""
    slope, u = problem(0.9)

    def gradient(slope):
        adjoint = ImplicitAdjoint(Picard(max_steps=3))
        z = equilibrium(layer, 10.0 * u, (slope, u), adjoint=adjoint, **{name: value})
        return z.sum()

    if value == "nan":
        assert np.isnan(jax.grad(gradient)(slope)).all()
        return
    for call in (jax.grad(gradient), jax.jit(jax.grad(gradient))):
        with pytest.raises(Exception, match=r"equilibrium was reached, and the backward solve"):
            jax.block_until_ready(call(slope))


def test_the_backward_solver_follows_the_forward_one(x64):
    """Plain iteration diverges at an eigenvalue of -3, forward and backward; Anderson does not."""
    A = jnp.diag(jnp.array([0.5, -3.0, 0.2]))
    u = random.normal(random.key(0), (4, 3))

    def f(z, args):
        return z @ args[0] + args[1]

    def gradient(**kwargs):
        return jax.grad(
            lambda A: jnp.sum(equilibrium(f, jnp.zeros_like(u), (A, u), **kwargs) ** 2)
        )(A)

    exact = jax.grad(lambda A: jnp.sum((u @ jnp.linalg.inv(jnp.eye(3) - A)) ** 2))(A)
    np.testing.assert_allclose(gradient(solver=Anderson()), exact, rtol=1e-8)
    assert np.isnan(gradient(solver=Anderson(), adjoint=ImplicitAdjoint(Picard()))).all()
    assert not adjoint_solution(f, u, (A, u), u, ImplicitAdjoint(Picard())).converged.any()


def test_a_finite_depth_is_no_failure(x64):
    slope, u = problem(0.9, 2.0)
    z = solve(slope, u, adjoint=UnrolledAdjoint(12))
    expected = (1 - slope**12) / (1 - slope) * u
    np.testing.assert_allclose(z, expected, rtol=1e-12)
    found = find_equilibrium(layer, jnp.zeros_like(u), (slope, u), adjoint=UnrolledAdjoint(12))
    assert found.converged.all()
    np.testing.assert_allclose(found.residual, jnp.linalg.norm(slope**12 * u, axis=1))
    overflows = find_equilibrium(layer, u, (1e200 * slope, u), adjoint=UnrolledAdjoint(12))
    assert not overflows.converged.any()


@pytest.mark.smoke
def test_parameters_that_are_nan_are_named():
    x = random.normal(random.key(0), (4, 5))
    deq = DEQ(5, 8, W_std=0.5, b_std=0.1, rngs=nnx.Rngs(0))
    deq.inject.b = nnx.Param(deq.inject.b[...].at[0].set(jnp.nan))
    with pytest.raises(
        NotConvergedError, match=r"because parameters\.inject\.b is NaN or infinite"
    ):
        deq(x)
    deq.on_failure = "raise"
    with pytest.raises(Exception, match="because parameters is NaN"):
        jax.block_until_ready(nnx.jit(lambda m, x: m(x))(deq, x))
    healthy = DEQ(5, 8, W_std=0.5, on_failure="raise", rngs=nnx.Rngs(0))
    assert np.isfinite(nnx.jit(lambda m, x: m(x))(healthy, x)).all()
    with pytest.raises(NotConvergedError, match=r"row 0.*first step.*look at the inputs"):
        healthy(x.at[0, 0].set(jnp.nan))
