"""Classification by the Gaussian process of an infinitely deep and wide network."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from nt_deq._batches import by_batches
from nt_deq.activations import Phi
from nt_deq.errors import ArgumentError
from nt_deq.gp.calibration import calibrate, log_probabilities
from nt_deq.sklearn import programs
from nt_deq.sklearn.padding import pad_features
from nt_deq.sklearn.process import FLOATS, TEST, DEQProcess, observed, validate_data
from nt_deq.typing import Get

_Likelihood: TypeAlias = Literal["gaussian", "laplace"]


class DEQClassifier(ClassifierMixin, DEQProcess):
    """Classification by the Gaussian process of an infinitely deep and wide network.

    Least-squares classification (Rasmussen & Williams 2006, sec. 6.5): regression on targets 1 for
    the class and `-1/(C - 1)` for every other, and from mean `μ_c` and variance `σ²` of the output
    of a class the probability

        p_c ∝ Φ((α μ_c + β)/√(1 + α² σ²))

    (eq. 6.43, which for two classes is normalised as it is), with the `α` and `β` for which the
    leave-one-out predictions of the training labels are the most probable.

    Or, with `likelihood='laplace'`, `nt_deq.gp.LaplaceClassifier`: a softmax of one function per
    class, with hyper-parameters of the largest evidence. There is no `noise`, and nothing to
    calibrate. More than `max_exact` rows take part exactly, too, which takes their number cubed.

    Args and attributes are those of `DEQRegressor`, and

    Args:
      likelihood: of the labels, `'gaussian'` or `'laplace'`.

    Attributes:
      classes_: sorted labels.
      calibration_: `(α, β)`, unless `likelihood='laplace'`.
    """

    def __init__(
        self,
        get: Get = "nngp",
        W_std: float = 0.8,
        U_std: float = 1.0,
        b_std: float = 0.1,
        V_std: float = 1.0,
        activation: Phi = "relu",
        noise: float = 0.1,
        optimize: bool = True,
        *,
        likelihood: _Likelihood = "gaussian",
        standardize: bool = True,
        length_scale: ArrayLike = 1.0,
        n_restarts_optimizer: int = 0,
        max_exact: int = 1000,
        random_state: int | np.random.RandomState | None = None,
    ):
        stds = W_std, U_std, b_std, V_std
        super().__init__(
            get,
            *stds,
            activation,
            noise,
            optimize,
            standardize=standardize,
            length_scale=length_scale,
            n_restarts_optimizer=n_restarts_optimizer,
            max_exact=max_exact,
            random_state=random_state,
        )
        self.likelihood = likelihood

    @property
    def _laplace(self) -> bool:
        return self.likelihood == "laplace"

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> DEQClassifier:
        """Fits.

        Args:
          X: inputs, `(n, d)`.
          y: labels, `(n,)`.
          sample_weight: how many observations each row stands for, `(n,)`, real numbers of at least
            0: `noise` is divided by them. `None` is one each.

        Raises:
          ValueError, RuntimeError: those of `nt_deq.gp.GaussianProcess`, or of
            `nt_deq.gp.LaplaceClassifier`.
        """
        if self.likelihood not in get_args(_Likelihood):
            raise ArgumentError(
                f"likelihood={self.likelihood!r} must be one of {get_args(_Likelihood)}."
            )
        inputs, targets = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(targets)
        X, y, weights = observed(inputs, targets, sample_weight)
        self.classes_, labels = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ArgumentError(f"y has one class, {self.classes_[0]!r}; two or more are needed.")
        if self._laplace:
            self._fit_process(X, np.eye(count)[labels], weights)
            return self
        targets = (count * np.eye(count)[labels] - 1) / (count - 1)
        rows = self._fit_process(X, targets[:, 1:] if count == 2 else targets, weights)
        with programs.exactly():
            mean, variance = (a[: len(rows)] for a in self._evaluate(programs.leave_one_out))
        variance = np.maximum(variance - self.hyperparameters_["noise"], 0)
        self.calibration_ = calibrate(mean, variance, labels[rows], weights[rows])
        return self

    def predict_log_proba(self, X: ArrayLike) -> Float[np.ndarray, "m C"]:
        """Returns the logarithm of `predict_proba(X)`, `(m, C)`."""
        if self._laplace:
            return self._predict(X, self._classify_scaled)
        return log_probabilities(*self._predict_process(X), *self.calibration_)

    def _classify_scaled(self, x: np.ndarray) -> np.ndarray:
        classify = partial(self._evaluate, programs.class_probabilities)
        with programs.exactly():
            return by_batches(classify, pad_features(x), TEST)

    def predict_proba(self, X: ArrayLike) -> Float[np.ndarray, "m C"]:
        """Returns the probability of every one of `classes_`, `(m, C)`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: ArrayLike) -> Shaped[np.ndarray, " m"]:
        """Returns the most probable labels, `(m,)`."""
        most_probable = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[most_probable]
