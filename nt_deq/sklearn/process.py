"""What regressor and classifier share: the process, and the search for its hyper-parameters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree, Shaped
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted
from sklearn.utils.validation import validate_data as _validate_data

from nt_deq import _checks, gp
from nt_deq._batches import by_batches
from nt_deq.activations import Phi, get_activation
from nt_deq.errors import ArgumentError, NoEquilibriumError
from nt_deq.regression import KernelRegression
from nt_deq.sklearn import programs
from nt_deq.sklearn.padding import pad, pad_features
from nt_deq.typing import Get, KernelFn

# A type checker takes its defaults, which are words, for its types.
validate_data = cast(Callable[..., PyTree], _validate_data)

FLOATS = [np.float64, np.float32]
_LEAST_NOISE = 1e-8  # of targets with variance 1
_LARGEST_B_STD = 100.0  # likewise: beyond, the kernel is a constant and rounding errors
TEST = 4096  # inputs predicted at once


def observed(
    X: Float[np.ndarray, "n d"], y: Shaped[np.ndarray, "n ..."], sample_weight: ArrayLike | None
) -> tuple[Float[np.ndarray, "rows d"], Shaped[np.ndarray, "rows ..."], Float[np.ndarray, " rows"]]:
    """The rows that were observed, and how often.

    Raises:
      ValueError: a weight is negative, or all are 0.
    """
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    there = weights > 0
    if not there.any():
        raise ArgumentError("sample_weight is 0 for all rows: one at least must be above 0.")
    return X[there], y[there], weights[there]


class DEQProcess(BaseEstimator):
    """A Gaussian process with several independent outputs, and its hyper-parameters."""

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
        standardize: bool = True,
        length_scale: ArrayLike = 1.0,
        n_restarts_optimizer: int = 0,
        max_exact: int = 1000,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.get: Get = get
        self.W_std = W_std
        self.U_std = U_std
        self.b_std = b_std
        self.V_std = V_std
        self.activation = activation
        self.noise = noise
        self.optimize = optimize
        self.standardize = standardize
        self.length_scale = length_scale
        self.n_restarts_optimizer = n_restarts_optimizer
        self.max_exact = max_exact
        self.random_state = random_state

    @property
    def _laplace(self) -> bool:
        """Whether targets are classes, 0 and 1, and have no noise."""
        return False

    def __getstate__(self):
        state = cast(dict, super().__getstate__())
        state = {name: value for name, value in state.items() if name != "_regression"}  # programs
        if callable(self.activation):  # a function of JAX does not pickle, its Activation does
            state["activation"] = get_activation(self.activation)
        return state

    def _fit_process(self, X: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Fits to targets `(n, C)`; returns the rows that the hyper-parameters are fitted to."""
        n, random = len(X), check_random_state(self.random_state)
        self.hyperparameters_ = self._check_parameters(X.shape[1])
        self.X_train_, self._targets, self._weights = X, targets, weights
        scaler = StandardScaler(with_mean=self.standardize, with_std=self.standardize)
        self._scaler = scaler.fit(X, sample_weight=weights)
        rows = random.permutation(n)[: self.max_exact] if n > self.max_exact else np.arange(n)
        x = np.asarray(self._scaler.transform(X[rows]))
        self._problem = pad(x, targets[rows], weights[rows])
        self.optimum_ = None
        with programs.exactly():
            if self.optimize:
                self._optimize(random.randint(2**31))
            likelihood = programs.evidence if self._laplace else programs.likelihood
            self.log_marginal_likelihood_ = float(self._evaluate(likelihood))
            if n > self.max_exact and self._laplace:
                self._problem = pad(np.asarray(self._scaler.transform(X)), targets, weights)
            elif n > self.max_exact:
                self._regression = self._fit_regression()
        return rows

    def _check_parameters(self, features: int) -> programs.Hyperparameters:
        """The hyper-parameters as given; an error names an argument of the estimator."""
        _checks.kernel_name(self.get)
        _checks.count("max_exact", self.max_exact)
        if self.n_restarts_optimizer < 0:
            raise ArgumentError(f"n_restarts_optimizer={self.n_restarts_optimizer} must be >= 0.")
        values: programs.Hyperparameters = {
            name: getattr(self, name) for name in ("W_std", "U_std", "b_std", "V_std")
        }
        _checks.standard_deviations(**values)
        _checks.variance("noise", self.noise)
        scale = np.asarray(self.length_scale, float)
        if scale.shape not in ((), (features,)):
            raise ArgumentError(
                f"length_scale has shape {scale.shape}: pass one number, or one for each of the "
                f"{features} features."
            )
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ArgumentError(f"length_scale={self.length_scale} must be finite and above 0.")
        if self.optimize:
            self._check_start()
        return {
            **values,
            "noise": self.noise,
            "length_scale": scale if scale.ndim else float(scale),
        }

    def _check_start(self) -> None:
        """Raises where no search can start."""
        largest = gp.largest_W_std(self.activation)
        if self.W_std >= largest:
            raise ArgumentError(
                f"W_std={self.W_std} must be below {largest:.6g} for "
                f"activation={self.activation!r}: the search for hyper-parameters stays where "
                "every input has an equilibrium. Take a smaller one, or optimize=False."
            )
        if self.noise <= _LEAST_NOISE and not self._laplace:
            raise ArgumentError(
                f"noise={self.noise} must be above {_LEAST_NOISE:.2g}, the least that the search "
                "for hyper-parameters tries. Take a larger one, or optimize=False."
            )

    def _optimize(self, seed: int) -> None:
        """Searches for the hyper-parameters, from those that were given."""
        phi, values = get_activation(self.activation), programs.flat(self.hyperparameters_)
        own_scales = "length_scale" not in values
        # A factor of U_std is one of all length scales, and of a homogeneous φ one of V_std is one
        # of U_std and b_std; and 0 stays 0.
        fixed = {"U_std" if own_scales else "length_scale"}
        fixed |= {"V_std"} if phi.homogeneous else set()
        fixed |= {"noise"} if self._laplace else set()
        fixed |= {name for name, value in values.items() if value == 0}
        start = {name: value for name, value in values.items() if name not in fixed}
        bounds = {
            "W_std": (0.0, gp.largest_W_std(phi)),
            "b_std": (0.0, max(_LARGEST_B_STD, 10 * self.b_std)),
            "noise": (_LEAST_NOISE, np.inf),
        }
        y = self._problem.y
        search, y = (gp.fit_classifier, y.argmax(axis=1)) if self._laplace else (gp.fit, y)
        self.optimum_ = search(
            programs.make_kernel(phi, tuple((name, values[name]) for name in sorted(fixed))),
            self._problem.x,
            y,
            start,
            bounds={name: bound for name, bound in bounds.items() if name in start},
            get=self.get,
            weights=self._problem.weights,
            restarts=self.n_restarts_optimizer,
            seed=seed,
        )
        if not self.optimum_.converged:
            warnings.warn(
                "the hyper-parameters have not converged (see optimum_); allow "
                "n_restarts_optimizer, or set optimize=False.",
                ConvergenceWarning,
                stacklevel=4,
            )
        self.hyperparameters_ = programs.nested(values | self.optimum_.parameters)

    def _kernel_fn(self) -> KernelFn:
        """The stax `kernel_fn` of standardised inputs."""
        make = programs.make_kernel(get_activation(self.activation))
        return make(programs.flat(self.hyperparameters_))

    def _evaluate(self, fn: Callable[..., PyTree], *args: np.ndarray) -> PyTree:
        """A compiled function of the process; NaN is an error, which says why."""
        make = programs.make_kernel(get_activation(self.activation))
        given = (make, self.get, programs.flat(self.hyperparameters_), self._problem, *args)
        found = jax.tree.map(np.asarray, fn(*given))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
            x = jnp.asarray(self._scaler.transform(self.X_train_), np.float64)
            self._kernel_fn()(x, None, self.get)  # which says what is wrong, of the rows there are
            inspect.unwrap(fn)(*given)  # or this does
            raise FloatingPointError("the Gaussian process is NaN or infinite.")
        return found

    def _fit_regression(self) -> KernelRegression:
        """Of all rows; in float64, in which it must be called."""
        get, noise = self.get, self.hyperparameters_["noise"]
        kernel_fn = self._kernel_fn()

        def covariance(x1, x2, _):  # of √w y, as if each were one observation
            root1, root2 = (x[:, -1] for x in (x1, x1 if x2 is None else x2))
            kernel = kernel_fn(x1[:, :-1], None if x2 is None else x2[:, :-1], get)
            return root1[:, None] * root2[None, :] * kernel

        root = np.sqrt(self._weights)[:, None]
        x = np.hstack([self._scaler.transform(self.X_train_), root]).astype(np.float64)
        variances = gp.variances(covariance, jnp.asarray(x), get)
        relative_noise = noise / float(variances.mean())
        regression = KernelRegression(covariance, "nngp", relative_noise, progress=False)
        return regression.fit(x, root * self._targets)

    def _predict_process(
        self, X: ArrayLike
    ) -> tuple[Float[np.ndarray, "m C"], Float[np.ndarray, " m"]]:
        """Mean `(m, C)` and variance `(m,)` of the function; errors are those of `_predict`."""
        return self._predict(X, self._predict_scaled)

    def _predict(self, X: ArrayLike, predict_scaled: Callable[[np.ndarray], PyTree]) -> PyTree:
        """What is predicted of inputs, from standardised ones.

        Raises:
          NoEquilibriumError: the network has none for some of the inputs.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        x = np.asarray(self._scaler.transform(X))
        try:
            return predict_scaled(x)
        except NoEquilibriumError as error:
            with programs.exactly():
                variances = gp.variances(self._kernel_fn(), jnp.asarray(x), self.get)
            rows = np.flatnonzero(~np.isfinite(variances))
            first = f" (the first is row {rows[0]})" if len(rows) else ""
            raise NoEquilibriumError(
                f"there is no prediction for {len(rows)} rows of X{first}: {error}"
            ) from error

    def _predict_scaled(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with programs.exactly():
            if len(self.X_train_) <= self.max_exact:
                return by_batches(
                    partial(self._evaluate, programs.posterior), pad_features(x), TEST
                )
            if not hasattr(self, "_regression"):
                self._regression = self._fit_regression()
            once = np.ones((len(x), 1))
            mean, std = self._regression.predict(np.hstack([x, once]), return_std=True)
            return mean, std**2
