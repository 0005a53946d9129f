"""How good predictions are."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def of_numbers(found: Float[np.ndarray, "n ..."], y: Float[np.ndarray, "n ..."]) -> str:
    """Tells R² and the root mean square error of predictions `(n,)` or `(n, C)`."""
    error = np.mean((found - y) ** 2)
    variance = np.mean((y - y.mean(axis=0)) ** 2)
    share = f"R² {1 - error / variance:.4f}, " if variance > 0 else ""
    return f"{share}root mean square error {error**0.5:.4g} (of the mean: {variance**0.5:.4g})"


def of_labels(
    found: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    log_probabilities: Float[np.ndarray, "n C"] | None = None,
) -> str:
    """Tells the accuracy, and of log-probabilities `(n, C)` the mean log loss.

    Args:
      found: indices of the predicted classes, `(n,)`.
      labels: those of the true ones; -1 is one that was not there in training.
      log_probabilities: of the classes, or `None`.
    """
    right = found == labels
    most = np.unique(labels, return_counts=True)[1].max()
    told = (
        f"{right.mean():.2%} right, {right.sum()} of {len(labels)} (the most frequent class is "
        f"{most / len(labels):.2%})"
    )
    if log_probabilities is None:
        return told
    known = labels >= 0
    of_true = np.where(known, log_probabilities[np.arange(len(labels)), labels], -np.inf)
    return f"{told}; log loss {-of_true.mean():.4f}"
