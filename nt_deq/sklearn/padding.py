"""Data padded to the few shapes that programs are compiled for: cross-validation has many sizes.

What fills them does not show, because

    k(x √(D/d), 0), of D ≥ d features     = k(x)       : a kernel depends on x·x'/d,
    a target with weight 0                 is not there : see `nt_deq.gp`,
    an input more to predict for           is ignored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nt_deq._batches import pad_rows, padded_size

_FEATURES = 8  # their number is a multiple of it


class Problem(NamedTuple):
    """Padded data in float64: inputs, targets `(n, C)`, and how often each was observed."""

    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, "n C"]
    weights: Float[np.ndarray, " n"]


def pad_features(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n features"]:
    """Pads inputs `(n, d)` with zeros to a multiple of 8 features, in float64."""
    d = x.shape[1]
    features = -(-d // _FEATURES) * _FEATURES
    return np.pad(np.asarray(x, np.float64) * (features / d) ** 0.5, ((0, 0), (0, features - d)))


def pad(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n C"], weights: Float[np.ndarray, " n"]
) -> Problem:
    """Pads inputs `(n, d)`, targets `(n, C)` and weights `(n,)`, the last with 0."""
    size = padded_size(len(x))
    more = (0, size - len(x))
    return Problem(
        pad_rows(pad_features(x), size), np.pad(y, (more, (0, 0))), np.pad(weights, more)
    )
