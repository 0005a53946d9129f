"""Gaussian processes of infinitely deep networks as estimators of scikit-learn.

    from nt_deq.sklearn import DEQRegressor

    model = make_pipeline(StandardScaler(), DEQRegressor(activation="gelu")).fit(X, y)

`pip install nt-deq[sklearn]`; `import nt_deq` does not import scikit-learn. All is computed in
float32, or in float64 where JAX's x64 mode is on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import optimize
from scipy.special import log_ndtr, logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from nt_deq import _checks, gp, stax
from nt_deq.activations import Activation, get_activation
from nt_deq.kernel import Get
from nt_deq.large import KernelRegression

_LEAST_NOISE = 1e-8  # of targets with variance 1
_FLOATS = [np.float64, np.float32]


class _DEQ(BaseEstimator):
    """A Gaussian process with several independent outputs, and its hyper-parameters."""

    def __init__(
        self,
        kernel: Get = "nngp",
        W_std: float = 0.8,
        U_std: float = 1.0,
        b_std: float = 0.1,
        V_std: float = 1.0,
        activation: str | Activation | Callable[[Array], Array] = "relu",
        noise: float = 0.1,
        optimize: bool = True,
        *,
        n_restarts_optimizer: int = 0,
        max_exact: int = 1000,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.kernel: Get = kernel
        self.W_std = W_std
        self.U_std = U_std
        self.b_std = b_std
        self.V_std = V_std
        self.activation = activation
        self.noise = noise
        self.optimize = optimize
        self.n_restarts_optimizer = n_restarts_optimizer
        self.max_exact = max_exact
        self.random_state = random_state

    def __getstate__(self):
        state: Any = super().__getstate__()
        state = {name: value for name, value in state.items() if name != "_regression"}  # programs
        if callable(self.activation):  # a function of JAX does not pickle, its Activation does
            state["activation"] = get_activation(self.activation)
        return state

    def _fit_process(self, X: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fits to targets `(n, C)`; returns those that the hyper-parameters are fitted to."""
        _checks.count("max_exact", self.max_exact)
        random = check_random_state(self.random_state)
        self.X_train_, self._targets = X, targets
        if len(X) > self.max_exact:
            rows = random.permutation(len(X))[: self.max_exact]
            X, targets = X[rows], targets[rows]
        self.optimum_ = None
        values = {name: getattr(self, name) for name in ("W_std", "U_std", "b_std", "V_std")}
        _checks.standard_deviations(**values)
        values["noise"] = self.noise
        if self.optimize:
            values |= self._optimize(X, targets, values, random.randint(2**31))
        self.hyperparameters_ = values
        padding = _padded_size(len(X)) - len(X)
        likelihood = self._evaluate(_likelihood, X, targets)
        constant = padding * targets.shape[1] * np.log(2 * np.pi) / 2
        self.log_marginal_likelihood_ = float(likelihood) + constant
        if len(self.X_train_) > self.max_exact:
            self._regression = self._fit_regression()
        return X, targets

    def _optimize(self, X, targets, values, seed) -> dict[str, float]:
        phi = get_activation(self.activation)
        # Of a homogeneous φ a factor of V_std is one of U_std and b_std; and 0 stays 0.
        fixed = {"V_std"} if phi.homogeneous else set()
        fixed |= {name for name, value in values.items() if value == 0}
        start = {name: value for name, value in values.items() if name not in fixed}
        bounds = {"W_std": (0.0, gp.largest_W_std(phi)), "noise": (_LEAST_NOISE, np.inf)}
        self.optimum_ = gp.fit(
            _make_kernel(phi, tuple((name, values[name]) for name in sorted(fixed))),
            *_pad(X, targets),
            start,
            bounds={name: bound for name, bound in bounds.items() if name in start},
            get=self.kernel,
            restarts=self.n_restarts_optimizer,
            seed=seed,
        )
        if not self.optimum_.converged:
            warnings.warn(
                "the hyper-parameters have not converged (see optimum_); scale the inputs, allow "
                "n_restarts_optimizer, or set optimize=False.",
                ConvergenceWarning,
                stacklevel=4,
            )
        return self.optimum_.parameters

    def _evaluate(self, fn: Callable, X: np.ndarray, targets: np.ndarray, *args: Any) -> Any:
        """A compiled function of the process and of padded data; NaN is an error."""
        make_kernel = _make_kernel(get_activation(self.activation), ())
        padded = _pad(X, targets)
        found = fn(make_kernel, self.kernel, self.hyperparameters_, *padded, *args)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
            kernel_fn = make_kernel(self.hyperparameters_)  # which says what is wrong
            noise = self.hyperparameters_["noise"]
            gp.log_marginal_likelihood(kernel_fn, *padded, noise, self.kernel)
        return found

    def _fit_regression(self) -> KernelRegression:
        p, get = self.hyperparameters_, self.kernel
        kernel_fn = _network(get_activation(self.activation), p)

        def covariance(x1, x2, _):
            return kernel_fn(x1, x2, get)

        variances = gp.variances(kernel_fn, jnp.asarray(self.X_train_, float), get)
        diag_reg = p["noise"] / float(variances.mean())
        regression = KernelRegression(covariance, "nngp", diag_reg, progress=False)
        return regression.fit(self.X_train_, self._targets)

    def _predict_process(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(m, C)` and variance `(m,)` of the function."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_FLOATS, reset=False)
        if len(self.X_train_) > self.max_exact:
            if not hasattr(self, "_regression"):
                self._regression = self._fit_regression()
            mean, std = self._regression.predict(X, return_std=True)
            return mean, std**2
        args = (self.X_train_, self._targets, _pad_inputs(X))
        mean, variance = self._evaluate(_posterior, *args)
        return np.asarray(mean, np.float64)[: len(X)], np.asarray(variance, np.float64)[: len(X)]


class DEQRegressor(RegressorMixin, _DEQ):
    """Regression by the Gaussian process of an infinitely deep and wide network.

    `f = V_std/√n V φ(z*)` with `z* = W_std/√n W φ(z*) + U_std/√d U x + b_std b`. Targets are made
    to have mean 0 and variance 1, and `noise` and `log_marginal_likelihood_` are those of them.
    Inputs are taken as they are: put a `StandardScaler` before it. One output or several, which
    share the kernel.

    Args:
      kernel: the covariance: `'nngp'`, of the network with random weights, or `'ntk'`, that
        training all of its weights by gradient descent amounts to.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      V_std: standard deviation of the readout's weights.
      activation: `φ`, as of `nt_deq.deq_kernel`.
      noise: variance of the observation noise.
      optimize: whether these numbers are but where the search for those of the largest marginal
        likelihood starts (`nt_deq.gp.fit`), with `W_std` below `nt_deq.gp.largest_W_std`. Zeros
        stay zero, and so does `V_std` what it is for a homogeneous activation such as relu, where
        `U_std` and `b_std` can do without.
      n_restarts_optimizer: further starts of the search, at random.
      max_exact: for more inputs than this the hyper-parameters are those of a random subset of so
        many, and `nt_deq.KernelRegression` does the rest.
      random_state: of restarts and subset.

    Attributes:
      hyperparameters_: what `optimize` found, or what was given.
      optimum_: the `nt_deq.gp.Fit`, or `None`.
      log_marginal_likelihood_: in nats, of the (subset of the) targets as scaled.
      X_train_: inputs.
      n_features_in_: number of features.
      feature_names_in_: their names, where the inputs have them.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> DEQRegressor:
        """Fits to inputs `X (n, d)` and targets `y (n,)` or `(n, C)`.

        Raises:
          ValueError, RuntimeError: those of `nt_deq.gp.log_marginal_likelihood`.
        """
        X, y = validate_data(self, X, y, dtype=_FLOATS, multi_output=True, y_numeric=True)
        y = np.asarray(y, np.float64)
        self._mean, scale = y.mean(axis=0), y.std(axis=0)
        self._scale = np.where(scale > 0, scale, 1.0)
        self._shape = y.shape[1:]
        self._fit_process(X, ((y - self._mean) / self._scale).reshape(len(y), -1))
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predicts `(m,)` or `(m, C)`.

        With `return_std` also the standard deviation of the function, of the same shape, without
        that of the noise.
        """
        mean, variance = self._predict_process(X)
        mean = self._mean + self._scale * mean.reshape(-1, *self._shape)
        if not return_std:
            return mean
        std = np.sqrt(variance)
        return mean, (std[:, None] if self._shape else std) * self._scale


class DEQClassifier(ClassifierMixin, _DEQ):
    """Classification by the Gaussian process of an infinitely deep and wide network.

    Least-squares classification (Rasmussen & Williams 2006, sec. 6.5): regression on targets 1 for
    the class and `-1/(C - 1)` for every other, and from mean `μ_c` and variance `σ²` of the output
    of a class the probability

        p_c ∝ Φ((α μ_c + β)/√(1 + α² σ²))

    (eq. 6.43, which for two classes is normalised as it is), with the `α` and `β` for which the
    leave-one-out predictions of the training labels are the most probable.

    Args and attributes are those of `DEQRegressor`, and

    Attributes:
      classes_: sorted labels.
      calibration_: `(α, β)`.
    """

    def fit(self, X: Any, y: Any) -> DEQClassifier:
        """Fits to inputs `X (n, d)` and labels `y (n,)`.

        Raises:
          ValueError, RuntimeError: those of `nt_deq.gp.log_marginal_likelihood`.
        """
        X, y = validate_data(self, X, y, dtype=_FLOATS)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; two or more are needed.")
        targets = (count * np.eye(count)[labels] - 1) / (count - 1)
        x, fitted = self._fit_process(X, targets[:, 1:] if count == 2 else targets)
        mean, variance = self._evaluate(_leave_one_out, x, fitted)
        mean, variance = (np.asarray(a, np.float64)[: len(x)] for a in (mean, variance))
        variance = np.maximum(variance - self.hyperparameters_["noise"], 0)
        labels = (fitted[:, 0] > 0) if count == 2 else fitted.argmax(axis=1)

        def loss(coordinates):
            log_p = _log_probabilities(mean, variance, np.exp(coordinates[0]), coordinates[1])
            return -log_p[np.arange(len(x)), labels.astype(int)].mean()

        found = optimize.minimize(loss, [0.0, 0.0], bounds=[(-5, 5), (-10, 10)])
        self.calibration_ = (float(np.exp(found.x[0])), float(found.x[1]))
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Returns the logarithm of `predict_proba(X)`, `(m, C)`."""
        return _log_probabilities(*self._predict_process(X), *self.calibration_)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns the probability of every one of `classes_`, `(m, C)`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Returns the most probable labels, `(m,)`."""
        most_probable = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[most_probable]


def _log_probabilities(mean, variance, slope, shift) -> np.ndarray:
    z = (slope * mean + shift) / np.sqrt(1 + slope**2 * variance)[:, None]
    log_p = log_ndtr(np.concatenate([-z, z], axis=1) if z.shape[1] == 1 else z)
    return log_p - logsumexp(log_p, axis=1, keepdims=True)


def _network(activation: Activation, p: dict[str, Any]) -> Callable[..., Any]:
    layer = stax.DEQ(1, p["W_std"], p["U_std"], p["b_std"], activation)
    return stax.serial(layer, stax.Dense(1, p["V_std"]))[2]


# Data are padded to a few shapes, for each of which programs are compiled once: cross-validation
# fits to many. The last feature says which inputs are there (1); a filling one (0) has nothing to
# do with the others, a variance of 1 with the noise, and targets 0: it adds -log √(2π) an output.


def _padded_size(n: int) -> int:
    """A power of two from 32 to 256, or beyond a multiple of 128."""
    return max(32, 1 << (n - 1).bit_length()) if n <= 256 else -(-n // 128) * 128


def _pad_inputs(X: np.ndarray) -> np.ndarray:
    n, d = X.shape
    features = -(-d // 8) * 8
    x = np.zeros((_padded_size(n), features + 1))
    x[:, :d] = X[np.minimum(np.arange(len(x)), n - 1)] * (features / d) ** 0.5  # keeps x·x'/d
    x[:n, -1] = 1
    return x


def _pad(X: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = _pad_inputs(X)
    return x, np.pad(targets, ((0, len(x) - len(X)), (0, 0)))


@lru_cache(maxsize=128)  # the same function again is a program that is compiled already
def _make_kernel(activation: Activation, fixed: tuple[tuple[str, float], ...]) -> Callable:
    def make_kernel(p):
        kernel_fn = _network(activation, p | dict(fixed))

        def padded(x1, x2, get):
            kernel = kernel_fn(x1[:, :-1], None if x2 is None else x2[:, :-1], get)
            there1, there2 = x1[:, -1], (x1 if x2 is None else x2)[:, -1]
            kernel *= there1[:, None] * there2
            return kernel if x2 is not None else kernel + jnp.diag((1 - there1) * (1 - p["noise"]))

        return padded

    return make_kernel


@partial(jax.jit, static_argnums=(0, 1))
def _likelihood(make_kernel, get, p, x, y):
    return gp.log_marginal_likelihood(make_kernel(p), x, y, p["noise"], get)


@partial(jax.jit, static_argnums=(0, 1))
def _leave_one_out(make_kernel, get, p, x, y):
    return gp.leave_one_out(make_kernel(p), x, y, p["noise"], get)


@partial(jax.jit, static_argnums=(0, 1))
def _posterior(make_kernel, get, p, x, y, x_test):
    return gp.posterior(make_kernel(p), x, y, p["noise"], x_test, get)
