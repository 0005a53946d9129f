"""Classification by a Gaussian process of every class, by Laplace's approximation."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, Real, Shaped

from nt_deq import _checks, _saving
from nt_deq._probe import probe
from nt_deq.errors import ArgumentError, NotConvergedError, NotPositiveDefiniteError
from nt_deq.gp.curvature import Curvature, curvature, reduce_columns
from nt_deq.gp.labels import classes_of, labelled
from nt_deq.gp.laplace import MAX_STEPS, Mode, find_mode, log_evidence
from nt_deq.gp.matrices import (
    compute,
    in_float64,
    inputs_like,
    kernel_matrix,
    mode,
    rows,
    variances,
)
from nt_deq.gp.probabilities import log_probabilities
from nt_deq.typing import Get, KernelFn


class Functions(NamedTuple):
    """Normal distributions of the functions of all classes.

    Attributes:
      mean: `(m, C)`.
      covariance: between classes, `(m, C, C)`.
    """

    mean: Float[Array, "m C"]
    covariance: Float[Array, "m C C"]


class _State(NamedTuple):
    x: Array  # (n, ...)
    kernel: Array  # (n, n)
    y: Array  # (n, C), 1 for an input's class and 0 for every other
    weights: Array  # (n,)
    coefficients: Array  # (n, C), a
    curvature: Curvature


class LaplaceClassifier:
    """`p(y | f) = softmax(f)_y`, with `f_c ~ GP(0, K)` for every class `c`, given labels at `x`.

    The posterior is approximated by the normal distribution at its mode (Laplace; Rasmussen &
    Williams 2006, GPML, sec. 3.5). There is no noise: the softmax is the noise, and the scale of
    the kernel says how sure the classes are.

        model = gp.LaplaceClassifier(kernel_fn, x, labels)
        model.log_marginal_likelihood()
        model.predict(x_test)           # labels
        model.predict_proba(x_test)     # (m, C), in the order of model.classes_

    Newton's iteration takes about 5 steps, and 20 where functions reach 1e3. A step is one Cholesky
    factor of `n × n` for two classes, and one with an inverse per class for more, of which memory
    holds `C n²` numbers. Make it inside of `jax.jit` and `jax.grad`, where hyper-parameters are
    traced, and labels are not: derivatives are those of the mode, by the implicit function theorem.
    Where it is computed in float64 is said at `gp.GaussianProcess`. Classes in float32 should have
    a kernel of at most about 1e3.

    Attributes:
      kernel_fn: the kernel.
      get: which kernel is the covariance.
      classes_: sorted labels.
    """

    def __init__(
        self,
        kernel_fn: KernelFn,
        x: Real[ArrayLike, "n ..."],
        y: Shaped[ArrayLike, " n"],
        get: Get = "nngp",
        weights: Real[ArrayLike, " n"] | None = None,
    ):
        """Computes the covariance, and finds the mode.

        Args:
          kernel_fn: any stax `kernel_fn(x1, x2, get)`, ours or not.
          x: inputs, `(n, ...)`.
          y: labels of two classes or more, `(n,)`: integers, words or Booleans.
          get: which kernel is the covariance, `'nngp'` or `'ntk'`.
          weights: how many observations each label stands for, `(n,)`, real numbers of at least 0;
            may be traced. `None` is one each.

        Raises:
          NoEquilibriumError, NotConvergedError: by `kernel_fn`; or `NotConvergedError`, the mode
            was not found (inside `jax.jit`: NaN).
          ValueError: an argument cannot be right; the message says why.
        """
        self.kernel_fn = kernel_fn
        self.get: Get = get
        self.classes_ = classes_of(y, rows(x))
        self._double = in_float64(rows(x), x, weights)
        with mode(self._double):
            problem = labelled(x, y, self.classes_, weights)
            self._state = _fitted(kernel_fn, get, *problem)

    def log_marginal_likelihood(self) -> Float[Array, ""]:
        """Computes Laplace's approximation of `log p(y | x)`, in nats (GPML eq. 3.44)."""
        return compute(lambda state: log_evidence(*state[1:]), self._state, self._double)

    def posterior(self, x_test: Real[ArrayLike, "m ..."]) -> Functions:
        """Predicts the functions of all classes at other inputs (GPML, algorithm 3.4).

        Args:
          x_test: other inputs, `(m, ...)`.

        Returns:
          Mean and covariance between classes, with what rounding leaves unknown of a variance on
          its diagonal. A constant that is added to all classes changes no probability.
        """
        return compute(lambda state: self._functions(state, x_test), self._state, self._double)

    def predict_log_proba(
        self, x_test: Real[ArrayLike, "m ..."], key: Key[Array, ""] | None = None
    ) -> Float[Array, "m C"]:
        """Returns the logarithm of `predict_proba(x_test, key)`, `(m, C)`."""

        def predict(state):
            found = log_probabilities(*self._functions(state, x_test), key)
            if not _checks.is_traced(found) and not jnp.isfinite(found).all():
                raise NotPositiveDefiniteError(
                    "the covariance between classes at x_test is not positive definite to rounding "
                    f"in {found.dtype}; look at kernel_fn(x_test, None), or scale the kernel down."
                )
            return found

        return compute(predict, self._state, self._double)

    def predict_proba(
        self, x_test: Real[ArrayLike, "m ..."], key: Key[Array, ""] | None = None
    ) -> Float[Array, "m C"]:
        """Computes the probabilities of the classes, `E[softmax(f)]`.

        Of two classes to 1e-9 (or rounding) in closed form. Of more by 4096 quasi-random draws,
        always the same: the largest errors measured are 1e-4 where variances of functions are about
        0.3, 2e-3 at 3 and 6e-3 at 100. Draws by chance err more.

        Args:
          x_test: inputs, `(m, ...)`.
          key: of `jax.random`, for draws by chance; `None` for those that are always the same.

        Returns:
          `(m, C)`, in the order of `classes_`.

        Raises:
          NotPositiveDefiniteError: the kernel of an input is not, by more than rounding.
        """
        return jnp.exp(self.predict_log_proba(x_test, key))

    def predict(self, x_test: Real[ArrayLike, "m ..."]) -> Shaped[np.ndarray, " m"]:
        """Returns the most probable labels, `(m,)`; not inside of `jax.jit`."""
        return self.classes_[np.asarray(self.predict_log_proba(x_test)).argmax(axis=1)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes inputs, labels and mode to a directory, from which `load` has the classifier back.

        How a directory is replaced is said at `gp.GaussianProcess.save`.

        Args:
          path: a directory, which is made if need be.

        Raises:
          ArgumentError: the classifier is traced, or labels are objects that are no words.
          ModelError: the directory holds something else, or cannot be written.
        """
        state = self._state
        if _checks.is_traced(state):
            raise ArgumentError("the classifier is traced: save it outside of jax.jit, jax.grad.")
        arrays = {
            "x": np.asarray(state.x),
            "y": np.asarray(state.y),
            "weights": np.asarray(state.weights),
            "coefficients": np.asarray(state.coefficients),
            "classes": _saving.words(self.classes_),
        }
        with mode(self._double):
            arrays["probe"] = probe(self.kernel_fn, self.get, arrays["x"])
        _saving.write(path, type(self).__name__, {"get": self.get}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], kernel_fn: KernelFn) -> LaplaceClassifier:
        """Reads the classifier that `save` has written.

        The kernel is computed and factorised once: a step of Newton's iteration. What was computed
        in float64 is loaded where JAX's x64 mode is on, and for up to 2000 inputs also where it is
        not.

        Args:
          path: the directory.
          kernel_fn: the kernel that the classifier was made with. It is compared, to rounding,
            between eight of the inputs.

        Raises:
          ModelError: there is no such classifier, it is of a later version or damaged, another
            kernel's, or in float64 while JAX is not.
        """
        _checks.kernel_function(kernel_fn)
        _, settings, arrays = _saving.read(path, cls.__name__)
        found: Any = settings
        x = arrays["x"]
        model = object.__new__(cls)
        model.kernel_fn, model.get, model.classes_ = kernel_fn, found["get"], arrays["classes"]
        model._double = x.dtype == np.float64 and in_float64(len(x))
        with mode(model._double):
            _saving.check_precision(path, x.dtype)
            _saving.check_kernel(path, arrays["probe"], kernel_fn, model.get, x)
            names = "x", "y", "weights", "coefficients"
            x, y, weights, a = (jnp.asarray(arrays[name]) for name in names)
            kernel = kernel_matrix(kernel_fn, x, None, model.get)
            model._state = _State(x, kernel, y, weights, a, _curvature(kernel, a, weights))
        return model

    def _functions(self, state: _State, x_test) -> Functions:
        inputs = inputs_like(state.x, x_test)
        cross = kernel_matrix(self.kernel_fn, state.x, inputs, self.get)
        prior = variances(self.kernel_fn, inputs, self.get)
        return _predict(state, cross, prior)


def of_targets(
    kernel_fn: KernelFn,
    x: Float[Array, "n ..."],
    y: Float[Array, "n C"],
    weights: Float[Array, " n"],
    get: Get,
) -> LaplaceClassifier:
    """A classifier whose targets, 1 for an input's class and 0 for every other, may be traced.

    Its classes are numbers, of which some may have no input.
    """
    model = object.__new__(LaplaceClassifier)
    model.kernel_fn, model.get, model.classes_ = kernel_fn, get, np.arange(y.shape[1])
    model._double = False
    model._state = _fitted(kernel_fn, get, x, y, weights)
    return model


def _fitted(kernel_fn, get, x, y, weights) -> _State:
    kernel = kernel_matrix(kernel_fn, x, None, get)
    found = find_mode(kernel, y, weights)
    _check_mode(found, kernel, get)
    return _State(x, kernel, y, weights, found.coefficients, found.curvature)


def _check_mode(found: Mode, kernel: Float[Array, "n n"], get: Get) -> None:
    """Raises where the mode was not found (and nothing is traced)."""
    if _checks.is_traced(found) or bool(found.converged):
        return
    if not jnp.isfinite(kernel).all():
        raise ArgumentError(f"kernel_fn(x, None, {get!r}) is NaN or infinite: look at it there.")
    largest = float(jnp.max(jnp.diagonal(kernel)))
    remedy = "take a smaller V_std"
    if kernel.dtype == jnp.float32:
        remedy += ", or compute in float64: jax.config.update('jax_enable_x64', True)"
    raise NotConvergedError(
        f"Newton's iteration for the mode ended after {int(found.steps)} of at most {MAX_STEPS} "
        f"steps without it, in {kernel.dtype}. Variances of the kernel reach {largest:.3g}: "
        f"{remedy}. If they are small, the kernel is not positive semi-definite."
    )


@jax.jit
def _curvature(kernel: Array, a: Array, weights: Array) -> Curvature:
    return curvature(kernel, jnp.matmul(kernel, a, precision="highest"), weights)


@jax.jit
def _predict(state: _State, cross: Array, prior: Array) -> Functions:
    """From the kernel of inputs and test inputs `(n, m)`, and of those with themselves `(m,)`."""
    mean = jnp.matmul(cross.T, state.coefficients, precision="highest")
    unknown = len(cross) * jnp.finfo(prior.dtype).eps * prior
    eye = jnp.eye(mean.shape[1], dtype=prior.dtype)
    own = (prior + unknown)[:, None, None] * eye[None]
    return Functions(mean, own - reduce_columns(state.curvature, cross))
