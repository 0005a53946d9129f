"""Kernel classification with any stax kernel, as large as time allows."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Real, Shaped

from nt_deq import _saving
from nt_deq.errors import ArgumentError
from nt_deq.regression.kernel_regression import KernelRegression, Predicted, inputs


class KernelClassifier(KernelRegression):
    """Classification by `KernelRegression`, whose arguments and attributes these are too.

    The targets are 1 for an input's class and 0 for every other, less their mean over classes,
    `1/C`, and the class of the largest score is predicted.

    Attributes:
      classes_: sorted labels.
    """

    def fit(self, x: Real[ArrayLike, "n ..."], y: Shaped[ArrayLike, " n"]) -> KernelClassifier:
        """Fits to inputs `x (n, ...)` and labels `y (n,)`: integers, words or Booleans.

        Errors are those of `KernelRegression.fit`.
        """
        x, y = inputs(x), np.asarray(y)
        if y.shape != (len(x),):
            raise ArgumentError(f"y has shape {y.shape}: {len(x)} inputs need labels ({len(x)},).")
        if np.issubdtype(y.dtype, np.inexact) and not np.isfinite(y).all():
            raise ArgumentError("y has NaN or infinite values; drop or impute them.")
        classes, labels = np.unique(y, return_inverse=True)
        self._fit(x, np.eye(len(classes))[labels] - 1 / len(classes))
        self.classes_ = classes
        return self

    def _own_arrays(self) -> dict[str, np.ndarray]:
        return {"classes": _saving.words(self.classes_)}

    def _restore(self, fitted: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super()._restore(fitted, arrays)
        self.classes_ = arrays["classes"]

    @overload
    def decision_function(
        self, x: Real[ArrayLike, "m ..."], return_std: Literal[False] = False
    ) -> Float[np.ndarray, "m C"]: ...

    @overload
    def decision_function(
        self, x: Real[ArrayLike, "m ..."], return_std: Literal[True]
    ) -> tuple[Float[np.ndarray, "m C"], Float[np.ndarray, " m"]]: ...

    @overload
    def decision_function(self, x: Real[ArrayLike, "m ..."], return_std: bool) -> Predicted: ...

    def decision_function(self, x: Real[ArrayLike, "m ..."], return_std: bool = False) -> Predicted:
        """Scores inputs `(m, ...)` for each of `classes_`, `(m, C)`, of which the largest counts.

        With `return_std` their standard deviation too, `(m,)`: see `KernelRegression.predict`.
        """
        return super().predict(x, return_std)

    def predict(self, x: Real[ArrayLike, "m ..."]) -> Shaped[np.ndarray, " m"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Predicts the labels of inputs `(m, ...)`, `(m,)`."""
        return self.classes_[self.decision_function(x).argmax(axis=1)]
