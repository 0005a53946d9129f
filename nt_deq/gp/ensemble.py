"""The ensemble of infinitely wide networks that gradient descent has trained."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, Real

from nt_deq import _checks
from nt_deq.errors import ArgumentError
from nt_deq.gp.matrices import (
    check_definite,
    compute,
    data,
    in_float64,
    inputs_like,
    kernel_matrix,
    mode,
    rows,
    variance_rounding,
)
from nt_deq.gp.process import JointPrediction
from nt_deq.gp.sampling import draw
from nt_deq.typing import KernelFn, Number


class _State(NamedTuple):
    x: Array  # (n, ...)
    y: Array  # (n, C)
    nngp: Array  # (n, n), K
    values: Array  # (n,), eigenvalues of Θ + noise, from the least
    vectors: Array  # (n, n), their eigenvectors


class TrainedEnsemble:
    """Networks that start at random and are trained on the same targets by gradient descent.

    Of infinite width they are a normal distribution at every time `t` (Lee et al. 2019, arXiv
    1902.06720, eq. 13-15). With the NNGP kernel `K`, the NTK `Θ`, `*` for test inputs and

        A = (Θ + noise)⁻¹ (1 - exp(-(Θ + noise) t/N)):

        mean         Θ* A y
        covariance   K** - Θ* A K*ᵀ - K* A Θ*ᵀ + Θ* A K A Θ*ᵀ

    Gradient flow of rate 1 is on `Σ (f - y)²/(2N)`, with `N` the number of entries of `y`, as in
    `nt.predict`; gradient descent of a small rate is at `t = rate · steps`. A `noise` above 0 adds
    `noise ‖θ - θ₀‖²/(2N)` to this loss. The covariance is the scatter of trained networks; that of
    a posterior is `gp.GaussianProcess`'s.

        ensemble = gp.TrainedEnsemble(kernel_fn, x, y)
        mean, covariance = ensemble.predict(x_test)         # trained to the end
        mean, covariance = ensemble.predict(x_test, t=100.0)

    Derivatives are those of `Θ`'s eigenvectors, and need its eigenvalues to differ. Where it is
    computed in float64 is said at `gp.GaussianProcess`.

    Attributes:
      kernel_fn: the kernels.
    """

    def __init__(
        self,
        kernel_fn: KernelFn,
        x: Real[ArrayLike, "n ..."],
        y: Real[ArrayLike, "n ..."],
        noise: Number = 0.0,
    ):
        """Computes both kernels and the eigenvalues of the NTK.

        Args:
          kernel_fn: any stax `kernel_fn(x1, x2, get)` with both kernels.
          x: inputs, `(n, ...)`.
          y: targets, `(n,)` or `(n, C)`.
          noise: the variance that is added to the diagonal of the NTK, `>= 0`; may be traced.

        Raises:
          NoEquilibriumError, NotConvergedError: by `kernel_fn` (inside `jax.jit`: NaN).
          ValueError: an argument cannot be right; the message says why.
        """
        _checks.variance("noise", noise)
        self.kernel_fn, self._noise = kernel_fn, noise
        self._shape = np.shape(y)[1:]
        self._double = in_float64(rows(x), x, y, noise)
        with mode(self._double):
            self._state = self._first_state(x, y, noise)

    def predict(self, x_test: Real[ArrayLike, "m ..."], t: Number = np.inf) -> JointPrediction:
        """Returns mean and covariance of the outputs of the networks.

        Args:
          x_test: inputs, `(m, ...)`.
          t: time of training, `>= 0`; may be traced.

        Raises:
          NotPositiveDefiniteError: `t` is infinite, and `Θ + noise` singular to rounding (inside
            `jax.jit`: NaN).
        """
        self._check_time(t)
        return compute(lambda state: self._joint(state, x_test, t)[0], self._state, self._double)

    def sample(
        self, key: Key[Array, ""], x_test: Real[ArrayLike, "m ..."], n: int, t: Number = np.inf
    ) -> Float[Array, "samples m ..."]:
        """Draws trained networks, with what rounding leaves unknown of a variance.

        Args:
          key: of `jax.random`.
          x_test: inputs that the networks are evaluated at, `(m, ...)`.
          n: how many networks, at least 1.
          t: time of training, `>= 0`; may be traced.

        Returns:
          Their outputs, `(n, m)` or `(n, m, C)`.

        Raises:
          ArgumentError, NoEquilibriumError, NotConvergedError: as `predict`.
        """
        _checks.count("n", n)
        self._check_time(t)

        def samples(state):
            (mean, covariance), rounding = self._joint(state, x_test, t)
            return mean[None] + draw(key, covariance, rounding, (n, *mean.shape))

        return compute(samples, self._state, self._double)

    def _first_state(self, x, y, noise) -> _State:
        x, y = data(x, y)
        nngp, ntk = (kernel_matrix(self.kernel_fn, x, None, get) for get in ("nngp", "ntk"))
        values, vectors = jnp.linalg.eigh(ntk)
        check_definite(values, ntk, noise, "ntk")
        return _State(x, y, nngp, values + jnp.asarray(noise, x.dtype), vectors)

    def _check_time(self, t) -> None:
        if np.ndim(t) != 0 or not (_checks.is_traced(t) or t >= 0):
            raise ArgumentError(f"t={t} must be a time of training: one number of at least 0.")

    def _joint(self, state: _State, x_test, t) -> tuple[JointPrediction, Array]:
        inputs = inputs_like(state.x, x_test)
        nngp, ntk = (kernel_matrix(self.kernel_fn, inputs, state.x, get) for get in ("nngp", "ntk"))
        rates = _rates(state.values, jnp.asarray(t, state.x.dtype) / state.y.size)
        check_definite(rates, state.nngp, self._noise, "ntk")
        weights = _product(_product(ntk, state.vectors) * rates[None, :], state.vectors.T)
        prior = kernel_matrix(self.kernel_fn, inputs, None, "nngp")
        half = _product(weights, nngp.T - _product(state.nngp, weights.T) / 2)
        mean = _product(weights, state.y).reshape(len(inputs), *self._shape)
        largest = jnp.max(jnp.diagonal(state.nngp))
        squares = jnp.sum(weights**2, axis=1)
        rounding = variance_rounding(prior.dtype, jnp.diagonal(prior), largest, squares)
        return JointPrediction(mean, prior - half - half.T), rounding


def _rates(values: Array, time: Array) -> Array:
    """Eigenvalues of `A`, `(1 - exp(-λt))/λ`: `t` where `λ` is 0, NaN where neither is known."""
    unit = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    forever = jnp.isinf(time)
    finite = jnp.where(forever, 0, time)
    known = values > unit
    slow = jnp.abs(values * finite) < jnp.finfo(values.dtype).eps
    divisor = jnp.where(known | ~slow, values, 1)
    trained = jnp.where(slow, finite, -jnp.expm1(-divisor * finite) / divisor)
    return jnp.where(forever, jnp.where(known, 1 / divisor, jnp.nan), trained)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
