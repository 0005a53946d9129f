"""Regression by the Gaussian process of an infinitely deep and wide network."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import RegressorMixin
from sklearn.preprocessing import StandardScaler

from nt_deq.sklearn.process import FLOATS, DEQProcess, observed, validate_data


class DEQRegressor(RegressorMixin, DEQProcess):
    """Regression by the Gaussian process of an infinitely deep and wide network.

    `f = V_std/√n V φ(z*)` with `z* = W_std/√n W φ(z*) + U_std/√d U x + b_std b`. Targets are made
    to have mean 0 and variance 1, and `noise` and `log_marginal_likelihood_` are those of them.
    One output or several, which share the kernel. All is in float64.

    Args:
      get: which kernel is the covariance: `'nngp'`, of the network with random weights, or
        `'ntk'`, that training all of its weights by gradient descent amounts to.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      V_std: standard deviation of the readout's weights.
      activation: `φ`, as of `nt_deq.deq_kernel`.
      noise: variance of the observation noise.
      optimize: whether these numbers are but where the search for those of the largest marginal
        likelihood starts (`nt_deq.gp.fit`), with `W_std` below `nt_deq.gp.largest_W_std`. Zeros
        stay zero, and so does `V_std` what it is for a homogeneous activation such as relu, where
        `U_std` and `b_std` can do without. It takes some 50 times as long as one fit.
      standardize: whether every feature is made to have mean 0 and variance 1 over the rows of
        `fit`. Without, mind that `U_std² x·x'/d` should be of the order of 1.
      length_scale: what the (standardised) features are divided by: one number, which is kept,
        `U_std` being the other way to say it; or one for each feature, `(d,)`, such as
        `np.ones(d)`, which `optimize` fits (automatic relevance determination) in the place of
        `U_std`. A feature that does not count gets a large one.
      n_restarts_optimizer: further starts of the search, at random.
      max_exact: for more inputs than this the hyper-parameters are those of a random subset of so
        many, and `nt_deq.KernelRegression` does the rest.
      random_state: of restarts and subset.

    Attributes:
      hyperparameters_: what `optimize` found, or what was given, by the names of the arguments.
      optimum_: the `nt_deq.gp.Fit`, or `None`.
      log_marginal_likelihood_: in nats, of the (subset of the) targets as scaled.
      X_train_: inputs, of the rows that have a weight.
      n_features_in_: number of features.
      feature_names_in_: their names, where the inputs have them.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> DEQRegressor:
        """Fits.

        Args:
          X: inputs, `(n, d)`.
          y: targets, `(n,)` or `(n, C)`.
          sample_weight: how many observations each row stands for, `(n,)`, real numbers of at least
            0: `noise` is divided by them. `None` is one each.

        Raises:
          ValueError, RuntimeError: those of `nt_deq.gp.GaussianProcess`.
        """
        inputs, targets = validate_data(self, X, y, dtype=FLOATS, multi_output=True, y_numeric=True)
        X, y, weights = observed(inputs, np.asarray(targets, np.float64), sample_weight)
        self._shape = y.shape[1:]
        y = y.reshape(len(y), -1)
        self._target_scaler = StandardScaler().fit(y, sample_weight=weights)
        self._fit_process(X, np.asarray(self._target_scaler.transform(y)), weights)
        return self

    @overload
    def predict(
        self, X: ArrayLike, return_std: Literal[False] = False, *, include_noise: bool = False
    ) -> Float[np.ndarray, "m ..."]: ...

    @overload
    def predict(
        self, X: ArrayLike, return_std: Literal[True], *, include_noise: bool = False
    ) -> tuple[Float[np.ndarray, "m ..."], Float[np.ndarray, "m ..."]]: ...

    def predict(
        self, X: ArrayLike, return_std: bool = False, *, include_noise: bool = False
    ) -> Float[np.ndarray, "m ..."] | tuple[Float[np.ndarray, "m ..."], Float[np.ndarray, "m ..."]]:
        """Predicts.

        Args:
          X: inputs, `(m, d)`.
          return_std: whether to give standard deviations too.
          include_noise: whether they are those of a new observation, instead of the function.

        Returns:
          The mean, `(m,)` or `(m, C)`, and with `return_std` also standard deviations of the same
          shape.

        Raises:
          NoEquilibriumError: the network has none for some of the inputs.
        """
        mean, variance = self._predict_process(X)
        mean = self._target_scaler.inverse_transform(mean).reshape(-1, *self._shape)
        if not return_std:
            return mean
        if include_noise:
            variance = variance + self.hyperparameters_["noise"]
        std = np.sqrt(variance)[:, None] * self._target_scaler.scale_
        return mean, std.reshape(mean.shape)
