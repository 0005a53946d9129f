"""The Jacobian of a layer at its equilibrium: its spectral radius, and its norm as a penalty."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from nt_deq import _checks
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.solver import norm


def spectral_radius(
    f: Callable[[Array], Array],
    z: Float[Array, "batch ..."],
    *,
    key: PRNGKeyArray,
    steps: int = 100,
) -> Float[Array, " batch"]:
    """Estimates the largest `|λ|` of `∂f/∂z`, the rate at which `z ← f(z)` converges.

    By the growth of a random vector over the second half of `steps` products with the Jacobian,
    which also holds where the largest eigenvalues are a complex pair, as those of a random matrix
    are. The layer is linearised once. With many eigenvalues of nearly that size, as in a wide
    network with random weights, 100 steps are within a few per cent.

    Args:
      f: one layer, `(batch, ...) -> (batch, ...)`, each sample on its own; of a module
        `lambda z: module.step(z, x)`.
      z: the equilibrium.
      key: of the random vectors.
      steps: products with the Jacobian, at least 2.

    Returns:
      `(batch,)`; below 1 where the equilibrium is stable.
    """
    _checks.count("steps", steps)
    if steps < 2:
        raise ArgumentError(f"steps={steps} must be at least 2.")
    _, jacobian = jax.linearize(f, z)

    def product(v, _):
        v = jacobian(v)
        size = norm(v.reshape(len(v), -1))
        unit = jnp.where(size > 0, size, 1).reshape(-1, *[1] * (v.ndim - 1))
        return v / unit, jnp.log(size)

    _, growth = lax.scan(product, jax.random.normal(key, z.shape, z.dtype), length=steps)
    return jnp.exp(jnp.mean(growth[steps // 2 :], axis=0))


def jacobian_regularization(
    f: Callable[[Array], Array],
    z: Float[Array, "batch ..."],
    *,
    key: PRNGKeyArray,
    samples: int = 1,
) -> Float[Array, ""]:
    """Estimates `‖∂f/∂z‖²_F / size`, averaged over the batch: a penalty that keeps `z*` stable.

    Bai et al. 2021, "Stabilizing Equilibrium Models by Jacobian Regularization", eq. 5, by
    Hutchinson's estimator `E‖Jᵀε‖²`, `ε ~ N(0, I)`. Unbiased, and differentiable in what `f` closes
    over and in `z`, so also through the equilibrium.

    Args:
      f: one layer, as of `spectral_radius`.
      z: the equilibrium, `(batch, ...)` of `size` numbers each.
      key: of the random vectors.
      samples: how many of them for each sample.

    Returns:
      A scalar; at initialisation about `W_std² E[φ'(z*)²]`.
    """
    _checks.count("samples", samples)
    _, transpose = jax.vjp(f, z)

    def square(key):
        v = transpose(jax.random.normal(key, z.shape, z.dtype))[0]
        return jnp.mean(v * v)

    return jnp.mean(jax.vmap(square)(jax.random.split(key, samples)))
