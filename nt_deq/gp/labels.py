"""Labels as the targets of a classifier."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real, Shaped

from nt_deq import _checks
from nt_deq.errors import ArgumentError
from nt_deq.gp.matrices import checked_inputs, observations


def classes_of(y: Shaped[ArrayLike, " n"], n: int) -> Shaped[np.ndarray, " C"]:
    """The sorted labels of `n` inputs, of which there are two or more, or an error."""
    if _checks.is_traced(y):
        raise ArgumentError("y is traced, and classes must be known: close over the labels.")
    y = np.asarray(y)
    if y.shape != (n,):
        raise ArgumentError(f"y has shape {y.shape}: {n} inputs need labels ({n},).")
    if np.issubdtype(y.dtype, np.inexact) and not np.isfinite(y).all():
        raise ArgumentError("y has NaN or infinite values; drop or impute them.")
    classes = np.unique(y)
    if len(classes) < 2:
        raise ArgumentError(f"y has the classes {classes.tolist()}; two or more are needed.")
    return classes


def labelled(
    x: Real[ArrayLike, "n ..."],
    y: Shaped[ArrayLike, " n"],
    classes: Shaped[np.ndarray, " C"],
    weights: Real[ArrayLike, " n"] | None,
) -> tuple[Float[Array, "n ..."], Float[Array, "n C"], Float[Array, " n"]]:
    """Inputs, 1 for the class of each and 0 for every other, and how often each was observed."""
    inputs = checked_inputs(x)
    counts = observations(weights, 1.0, len(inputs), inputs.dtype)
    own = np.asarray(y)[:, None] == classes[None, :]
    return inputs, jnp.asarray(own, inputs.dtype), counts
