"""Draws from normal distributions that may be singular."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, random
from jaxtyping import Float, Key

from nt_deq import _checks
from nt_deq.errors import NotPositiveDefiniteError


def draw(
    key: Key[Array, ""],
    covariance: Float[Array, "m m"],
    rounding: Float[Array, " m"],
    shape: tuple[int, ...],
) -> Float[Array, "n m ..."]:
    """Draws from `N(0, covariance)`, with `m` times its rounding added to the diagonal.

    Args:
      key: of `jax.random`.
      covariance: of the second axis; draws are independent along the others.
      rounding: what is not known of each variance; `m` of them bound the norm of the errors.
      shape: `(n, m)` or `(n, m, C)`.
    """
    unknown = len(covariance) * rounding
    factor = jnp.linalg.cholesky(covariance + jnp.diag(unknown))
    if not _checks.is_traced(factor) and not jnp.isfinite(factor).all():
        raise NotPositiveDefiniteError(
            f"the covariance at x_test is not positive definite, not even with {unknown.max():.1g} "
            "on its diagonal; take a larger noise, or look at kernel_fn(x_test, None)."
        )
    normal = random.normal(key, shape, covariance.dtype)
    return jnp.einsum("ij,nj...->ni...", factor, normal, precision="highest")
