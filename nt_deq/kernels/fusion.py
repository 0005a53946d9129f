"""How to keep XLA:CPU from computing something once for each of its uses.

It does so with cheap operations, a polynomial of many terms included, and drops barriers before.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def computed_once(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same numbers, computed where this stands.

    By a division, which is not cheap, by a 1 that XLA does not see through: it does not know that
    the square of an integer is 0 or 1 modulo 4.
    """
    first = lax.bitcast_convert_type(a.ravel()[0].astype(jnp.float32), jnp.int32)
    return a / lax.stop_gradient((first * first % 4 < 2).astype(a.dtype))
