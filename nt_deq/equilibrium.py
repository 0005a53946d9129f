"""The equilibrium `z* = f(z*)` of a finite network, differentiated implicitly.

With `J = ∂f/∂z` at `z*`, the implicit function theorem gives `dz* = (I - J)⁻¹ ∂f dθ` (Bai et al.
2019, "Deep Equilibrium Models", thm. 1): the derivative needs no iterate but the last, so its
memory does not grow with the number of steps. The linear solve is matrix-free, in forward and
reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jax import Array, lax

from nt_deq import _checks
from nt_deq.kernel import NotConvergedError

MAX_STEPS = 1000


def equilibrium(
    f: Callable[[Array, Any], Array],
    z0: Array,
    args: Any = None,
    *,
    solver: optimistix.AbstractFixedPointSolver | optimistix.AbstractRootFinder | None = None,
) -> Array:
    """Finds `z* = f(z*, args)` for every sample of a batch.

    Args:
      f: one layer, `f(z, args) -> z`, each sample on its own. For speed outside `jax.jit` pass the
        same function object every time, and what changes in `args`.
      z0: where to start, `(batch, ...)`.
      args: a pytree; `z*` is differentiable in its arrays.
      solver: an optimistix fixed-point solver or root finder; `None` is plain iteration, each
        sample until `|f(z) - z| <= 32 ε |f(z)|` in the 2-norm.

    Returns:
      `z*`, of the shape of `z0`.

    Raises:
      NotConvergedError: 1000 steps were not enough (a traced call returns NaN instead).
    """
    # Traced values that f closes over become inputs, to be differentiated too. Where there are none
    # the solve gets f itself: an object that it has seen before is not compiled again.
    converted, closed_over = jax.closure_convert(f, z0, args)
    inputs = (args, closed_over)

    def layer(z, inputs):
        return converted(z, inputs[0], *inputs[1])

    problem = (layer, inputs) if closed_over else (f, args)
    z, converged = _solve(problem[0], lax.stop_gradient(z0), lax.stop_gradient(problem[1]), solver)
    if not _checks.is_traced(converged) and not bool(converged):
        raise NotConvergedError(
            f"the finite network's equilibrium was not reached in {MAX_STEPS} steps: its weights "
            "may be too large to have one; take a smaller W_std (or learning rate), or another "
            "solver."
        )
    return _implicit(layer, z, inputs)


def _solve(f, z0, args, solver=None):
    """Returns `z = f(z, args)`, NaN where it was not reached, and whether it was."""
    rtol = 32 * float(jnp.finfo(z0.dtype).eps)
    solution = optimistix.fixed_point(
        f, solver or Iteration(rtol), z0, args, max_steps=MAX_STEPS, throw=False
    )
    converged = solution.result == optimistix.RESULTS.successful
    return jnp.where(converged, solution.value, jnp.nan), converged


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _implicit(layer, z, inputs):
    """`z`, with the derivative that `z = layer(z, inputs)` gives it."""
    del layer, inputs
    return z


@_implicit.defjvp
def _implicit_jvp(layer, primals, tangents):
    z, inputs = primals
    z = _implicit(layer, z, inputs)  # so that higher derivatives are right too
    _, d_layer = jax.jvp(lambda inputs: layer(z, inputs), (inputs,), (tangents[1],))
    _, jacobian = jax.linearize(lambda z: layer(z, inputs), z)

    def solve(matvec, b):  # matvec(t) = t - J t: the iteration is that of the network, linearised
        return _solve(lambda t, b: b + t - matvec(t), b, b)[0]

    d_z = lax.custom_linear_solve(lambda t: t - jacobian(t), d_layer, solve, solve)
    return z, d_z


class _Residual(eqx.Module):
    excess: Array  # of every sample: its residual less what is tolerated


class Iteration(optimistix.AbstractFixedPointSolver):
    """Plain iteration `z ← f(z)`, sample by sample.

    A sample that has converged stops moving, so that its result does not depend on its batch.

    Attributes:
      rtol, atol: a sample stops where `|f(z) - z| <= atol + rtol |f(z)|`.
      norm: the norm of each sample, `(batch, ...) -> (batch,)`.
    """

    rtol: float
    atol: float = 0.0
    norm: Callable[[Array], Array] = jax.vmap(jnp.linalg.norm)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        """No sample has converged."""
        del fn, args, options, f_struct, aux_struct, tags
        return _Residual(jnp.full(y.shape[:1], jnp.inf, y.dtype))

    def step(self, fn, y, args, options, state, tags):
        """One layer for the samples that still move."""
        del options, tags
        value, aux = fn(y, args)
        allowed = self.atol + self.rtol * self.norm(value)
        # A norm that has overflowed allows nothing.
        excess = jnp.where(jnp.isfinite(allowed), self.norm(value - y) - allowed, jnp.nan)
        moving = state.excess > 0
        y = jnp.where(moving.reshape(-1, *[1] * (y.ndim - 1)), value, y)
        return y, _Residual(jnp.where(moving, excess, state.excess)), aux

    def terminate(self, fn, y, args, options, state, tags):
        """When all have converged, or one has diverged."""
        del fn, y, args, options, tags
        done = jnp.all(state.excess <= 0)
        diverged = jnp.any(jnp.isnan(state.excess))
        result = optimistix.RESULTS.where(
            diverged, optimistix.RESULTS.nonlinear_divergence, optimistix.RESULTS.successful
        )
        return done | diverged, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        """Nothing to do."""
        del fn, args, options, state, tags, result
        return y, aux, {}
