"""The derivative of a fixed point, by the implicit function theorem.

With `J = ∂F/∂y` at `y* = F(y*, args)`, `dy* = (I - J)⁻¹ ∂F/∂args · d args`. The value in a rule has
the rule's own derivative, so that derivatives of every order are right, in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PyTree

from nt_deq._jax import instantiate_cotangents
from nt_deq.fixed_point.solver import Evaluation, Function, Solution, Solver

instantiate_cotangents()

SolveLinear: TypeAlias = Callable[[Callable[[Array], Array], Array], Array]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def implicit_entries(
    fn: Function, y: Float[Array, "*shape"], args: PyTree
) -> Float[Array, "*shape"]:
    """`y`, whose every number solves an equation of its own, with its derivative in `args`.

    Args:
      fn: gives the slope too, and closes over no traced value.
      y: the root.
      args: of `fn`.
    """
    del fn, args
    return y


@implicit_entries.defjvp
def _implicit_entries_jvp(fn, primals, tangents):
    y, args = primals
    y = implicit_entries(fn, y, args)

    def value_and_slope(args):
        found = fn(y, args)
        return found.value, found.slope

    _, d_value, slope = jax.jvp(value_and_slope, (args,), (tangents[1],), has_aux=True)
    return y, d_value / (1 - slope)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def implicit_vectors(
    layer: Callable[[Array, PyTree], Array],
    solve_linear: SolveLinear,
    y: Float[Array, "*batch size"],
    args: PyTree,
) -> Float[Array, "*batch size"]:
    """`y`, whose vectors along the last axis solve `y = layer(y, args)`, with that derivative.

    Args:
      layer: closes over no traced value.
      solve_linear: `(matvec, b) -> t` with `matvec(t) = t - J t = b`, or with `Jᵀ`.
      y: the root.
      args: of `layer`.
    """
    del layer, solve_linear, args
    return y


@implicit_vectors.defjvp
def _implicit_vectors_jvp(layer, solve_linear, primals, tangents):
    y, args = primals
    y = implicit_vectors(layer, solve_linear, y, args)
    _, d_layer = jax.jvp(lambda args: layer(y, args), (args,), (tangents[1],))
    _, jacobian = jax.linearize(lambda y: layer(y, args), y)

    def matvec(t):
        return t - jacobian(t)

    return y, lax.custom_linear_solve(matvec, d_layer, solve_linear, solve_linear)


def solve_linear(
    solver: Solver,
    matvec: Callable[[Array], Array],
    b: Float[Array, "*batch size"],
    rounding: float,
    keep_best: bool = False,
) -> Solution:
    """Solves `matvec(t) = t - J t = b`, which is a fixed point too, from `t = b`."""
    return solver.solve_vectors(
        lambda t, b: Evaluation(b + t - matvec(t)), b, b, rounding, keep_best
    )


def select(
    converged: Bool[Array, "*batch"],
    y: Float[Array, "*shape"],
    otherwise: Float[Array, "*shape"] | float,
) -> Float[Array, "*shape"]:
    """`y`, and something else where a sample has not converged."""
    return jnp.where(
        converged.reshape(converged.shape + (1,) * (y.ndim - converged.ndim)), y, otherwise
    )


@jax.custom_jvp
def keep(converged: Bool[Array, "*batch"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`y`, and NaN where a sample has not converged, as is its derivative.

    But for a tangent or a cotangent of 0, which stays 0: who leaves a sample out of the loss gets
    the derivative of the others, if `y` is finite.
    """
    return select(converged, y, jnp.nan)


@keep.defjvp
def _keep_jvp(primals, tangents):
    converged, y = primals

    def nan_or_zero(matvec, t):  # linear but for its NaN, so that JAX cannot transpose it
        del matvec
        return select(converged, t, jnp.where(t == 0, 0, jnp.nan))

    def identity(t):
        return t

    tangent = lax.custom_linear_solve(identity, tangents[1], nan_or_zero, nan_or_zero)
    return keep(converged, y), tangent
