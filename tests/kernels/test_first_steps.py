"""Newton's first steps over pairs, without a bracket, against its loop alone, which has one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nt_deq import Newton
from nt_deq.activations import ACTIVATIONS
from nt_deq.fixed_point.solver import Bounds, Evaluation
from nt_deq.kernels.equations import _pair_map

CLOSED = ["relu", "leaky_relu", "abs", "erf", "gelu", "sin", "cos"]


@partial(jax.jit, static_argnums=0)
def solve(activation, variance, rate, rho):
    """From `√(k k') ρ` by the loop, and by the first steps; inputs of `J = rate` at `variance`."""
    k1, k2 = variance, jnp.roll(variance, 1)
    J1, J2 = (activation.dual_diagonal(k)[1] for k in (k1, k2))
    W_var, scale = rate / jnp.maximum(J1, J2), jnp.sqrt(k1) * jnp.sqrt(k2)
    pair = partial(_pair_map, activation.between(k1, k2))
    bounds = Bounds(-scale, scale)
    # So much is injected that the largest covariance has a root there.
    injected = (scale - W_var * activation.dual(k1, k2, scale)[0]) * rho
    args = (W_var, injected, k1, k2)
    near, steps = Newton().approach(pair, scale * rho, args, bounds)
    by_loop, _ = Newton().solve_entries(pair, scale * rho, args, bounds)
    after, (_, slope) = Newton().solve_entries(pair, near, args, bounds)
    return steps, by_loop, after, scale, 1 - W_var * slope


@pytest.mark.parametrize("name", CLOSED)
def test_they_lead_to_where_the_loop_ends(dtype, name):
    rng = np.random.default_rng(0)
    variance = 10 ** rng.uniform(-3, 1, 600)
    rate = 1 - 10 ** rng.uniform(-2, 0, 600)
    rho = np.concatenate([rng.uniform(-1, 1, 300), 1 - 10 ** rng.uniform(-6, 0, 298), [1, -1]])
    numbers = (jnp.asarray(a, dtype) for a in (variance, rate, rho))
    steps, by_loop, after, scale, gap = solve(ACTIVATIONS[name], *numbers)
    assert steps == (3 if dtype == np.float32 else 4)
    assert after.converged.all()
    assert by_loop.converged.all()
    # Both stop at a residual of 4 to 8 eps of the scale.
    error = np.abs(after.value - by_loop.value) * gap / scale
    assert error.max() < 16 * np.finfo(dtype).eps
    # What is left to the loop is to find that most have converged.
    assert after.steps <= by_loop.steps - 2


@pytest.mark.parametrize(("max_steps", "allowed"), [(1, 0), (2, 1), (100, 3)])
def test_they_leave_one_evaluation_to_the_loop(max_steps, allowed):
    def half(y, args):
        del args
        return Evaluation(y / 2, slope=jnp.zeros_like(y))  # so that a step of Newton's halves y

    y = jnp.ones(3)
    near, steps = Newton(max_steps=max_steps).approach(half, y, None, Bounds(-y, y))
    assert steps == allowed
    np.testing.assert_array_equal(near, y / 2**allowed)
