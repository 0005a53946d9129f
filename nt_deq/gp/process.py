"""A Gaussian process that keeps the Cholesky factor of its covariance."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import xlogy
from jax.typing import ArrayLike
from jaxtyping import Float, Key, Real

from nt_deq import _checks, _saving
from nt_deq._jax import enable_x64
from nt_deq._probe import probe
from nt_deq.errors import ArgumentError
from nt_deq.gp.matrices import (
    check_definite,
    compute,
    data,
    in_float64,
    inputs_like,
    kernel_matrix,
    log_normal,
    mode,
    observations,
    rows,
    same_inputs,
    variance_rounding,
    variances,
)
from nt_deq.gp.sampling import draw
from nt_deq.typing import Get, KernelFn, Number


class Prediction(NamedTuple):
    """Normal distributions.

    Attributes:
      mean: `(m,)` or `(m, C)`, like the targets.
      variance: `(m,)`, of every output.
    """

    mean: Float[Array, "m ..."]
    variance: Float[Array, " m"]


class JointPrediction(NamedTuple):
    """A normal distribution of the values at several inputs.

    Attributes:
      mean: `(m,)` or `(m, C)`, like the targets.
      covariance: `(m, m)`, of every output; outputs are independent of each other.
    """

    mean: Float[Array, "m ..."]
    covariance: Float[Array, "m m"]


class _State(NamedTuple):
    """The data as if each target were one observation, and their covariance with its factor.

    `N(y | 0, K + noise/w)` is, but for a constant, `N(√w y | 0, √w K √w + noise)`. A target that is
    not there is one of 0, with variance 1, and independent of all others.
    """

    x: Array  # (n, ...)
    y: Array  # (n, C), √w y
    counts: Array  # (n,), w
    noise: Array
    covariance: Array  # (n, n)
    factor: Array  # (n, n), lower


class GaussianProcess:
    """`y = f(x) + ε`, with `f ~ GP(0, K)` and `ε ~ N(0, noise)`, given the targets `y` at `x`.

    The covariance is factorised once, here, and everything else uses the factor:

        process = gp.GaussianProcess(kernel_fn, x, y, noise=0.1)
        process.log_marginal_likelihood()
        mean, variance = process.posterior(x_test)
        functions = process.sample(jax.random.key(0), x_test, 10)
        process = process.condition(x_more, y_more)

    Make it inside of `jax.jit` and `jax.grad`, where hyper-parameters are traced; it is no pytree.
    Up to 2000 inputs are computed in float64 outside of these also where JAX's x64 mode is off, and
    the results are given in float32.

    Attributes:
      kernel_fn: the kernel.
      get: which kernel is the covariance.
    """

    def __init__(
        self,
        kernel_fn: KernelFn,
        x: Real[ArrayLike, "n ..."],
        y: Real[ArrayLike, "n ..."],
        noise: Number,
        get: Get = "nngp",
        weights: Real[ArrayLike, " n"] | None = None,
    ):
        """Computes the covariance and its Cholesky factor.

        Args:
          kernel_fn: any stax `kernel_fn(x1, x2, get)`, ours or not.
          x: inputs, `(n, ...)`.
          y: targets with mean zero, `(n,)` or `(n, C)`: outputs are independent and share `K`.
          noise: variance of the observation noise, `>= 0`; may be traced.
          get: which kernel is the covariance, `'nngp'` or `'ntk'`. The posterior mean with the NTK
            is what gradient descent converges to; its covariance is not that of trained networks,
            which is `gp.TrainedEnsemble`'s.
          weights: how many observations each target stands for, `(n,)`, real numbers `>= 0`;
            `None` is one each. A target with weight 0 is not there.

        Raises:
          NotPositiveDefiniteError: `K + noise` is not, to rounding (inside `jax.jit`: NaN).
          NoEquilibriumError, NotConvergedError: by `kernel_fn` (likewise).
          ValueError: an argument cannot be right; the message says why.
        """
        _checks.kernel_name(get)
        _checks.variance("noise", noise)
        self.kernel_fn = kernel_fn
        self.get: Get = get
        self._shape = np.shape(y)[1:]
        self._weighted = weights is not None
        self._double = in_float64(rows(x), x, y, noise, weights)
        with mode(self._double):
            self._state = self._first_state(x, y, noise, weights)

    def log_marginal_likelihood(self) -> Float[Array, ""]:
        """Computes `log N(y | 0, K + noise)`, in nats, summed over outputs (GPML eq. 2.30).

        With weights it is the likelihood of every `y_i` observed `weights_i` times:

            log N(y | 0, K + noise/w) - Σᵢ [(wᵢ - 1) log(2π noise) + log wᵢ] / 2 for each output.
        """
        return compute(self._log_marginal_likelihood, self._state, self._double)

    def leave_one_out(self) -> Prediction:
        """Predicts every `y_i` from all others, at the price of one fit (GPML eq. 5.12).

        Of a target with a weight above 1 one observation is left out, and the others of it stay.

        Returns:
          Mean and variance of `y_i`, noise included, given the other targets.
        """
        return compute(self._leave_one_out, self._state, self._double)

    def leave_one_out_loss(self) -> Float[Array, ""]:
        """Computes `-Σᵢ wᵢ log p(y_i | x, y_{-i})`, in nats, of all outputs (GPML eq. 5.10, 5.11).

        Against a wrong model it is the more robust criterion of the two (GPML sec. 5.4.2).
        """

        def loss(state):
            mean, variance = self._leave_one_out(state)
            y = state.y / jnp.sqrt(_there(state.counts))[:, None]
            error = y - mean.reshape(y.shape)
            losses = (error**2 / variance[:, None] + jnp.log(2 * jnp.pi * variance)[:, None]) / 2
            return jnp.sum(state.counts[:, None] * losses)

        return compute(loss, self._state, self._double)

    def posterior(self, x_test: Real[ArrayLike, "m ..."]) -> Prediction:
        """Predicts `f` at other inputs (GPML eq. 2.25, 2.26).

        For many inputs there is `nt_deq.KernelRegression`, which does not hold `K` on a device.

        Args:
          x_test: other inputs, `(m, ...)`.

        Returns:
          Mean and variance of `f`; add `noise` to the variance for that of a new observation. A
          variance below its rounding is not known any better than that, and given as that: without
          noise it is never 0.
        """

        def predict(state):
            inputs = inputs_like(state.x, x_test)
            mean, whitened = self._mean(state, inputs)
            prior = variances(self.kernel_fn, inputs, self.get)
            variance = prior - jnp.sum(whitened**2, axis=0)
            return Prediction(mean, jnp.maximum(variance, _rounding(state, prior, whitened)))

        return compute(predict, self._state, self._double)

    def joint_posterior(self, x_test: Real[ArrayLike, "m ..."]) -> JointPrediction:
        """Predicts `f` at other inputs, with the covariance between them (GPML eq. 2.24).

        Args:
          x_test: other inputs, `(m, ...)`.
        """
        return compute(lambda state: self._joint(state, x_test)[0], self._state, self._double)

    def sample(
        self, key: Key[Array, ""], x_test: Real[ArrayLike, "m ..."], n: int
    ) -> Float[Array, "samples m ..."]:
        """Draws functions from the posterior.

        What rounding leaves unknown of a variance is drawn too, so that inputs may be there twice.

        Args:
          key: of `jax.random`.
          x_test: inputs that the functions are evaluated at, `(m, ...)`.
          n: how many functions, at least 1.

        Returns:
          Values of `f`, `(n, m)` or `(n, m, C)`, without the noise of observations.

        Raises:
          NotPositiveDefiniteError: the covariance at `x_test` is not, by more than rounding.
        """
        _checks.count("n", n)

        def samples(state):
            (mean, covariance), rounding = self._joint(state, x_test)
            return mean[None] + draw(key, covariance, rounding, (n, *mean.shape))

        return compute(samples, self._state, self._double)

    def sample_prior(
        self, key: Key[Array, ""], x_test: Real[ArrayLike, "m ..."], n: int
    ) -> Float[Array, "samples m ..."]:
        """Draws functions from the prior, as `sample` does from the posterior."""
        _checks.count("n", n)

        def samples(state):
            covariance = kernel_matrix(self.kernel_fn, inputs_like(state.x, x_test), None, self.get)
            rounding = jnp.finfo(covariance.dtype).eps * jnp.diagonal(covariance)
            return draw(key, covariance, rounding, (n, len(covariance), *self._shape))

        return compute(samples, self._state, self._double)

    def condition(
        self,
        x: Real[ArrayLike, "k ..."],
        y: Real[ArrayLike, "k ..."],
        weights: Real[ArrayLike, " k"] | None = None,
    ) -> GaussianProcess:
        """Returns the process given further targets too, at the price of `n²k`.

        The factor gets `k` rows more; those that there are stay.

        Args:
          x: further inputs, `(k, ...)`.
          y: targets of them, `(k,)` or `(k, C)` like the first.
          weights: how many observations each stands for, `(k,)`; `None` is one each.

        Raises:
          ArgumentError, NotPositiveDefiniteError: as `GaussianProcess` itself.
        """
        if np.shape(y)[1:] != self._shape:
            raise ArgumentError(
                f"y has shape {np.shape(y)}: the process has targets (n, *{self._shape})."
            )
        further = object.__new__(GaussianProcess)
        further.kernel_fn, further.get, further._shape = self.kernel_fn, self.get, self._shape
        further._weighted = self._weighted or weights is not None
        n = rows(self._state.x) + rows(x)
        further._double = self._double and in_float64(n, x, y, weights)
        state = self._state

        def grow(state):
            return self._grown(state, x, y, weights)

        if further._double:
            with enable_x64(True):
                further._state = grow(state)
        else:
            further._state = compute(grow, state, self._double)
        return further

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the process, with its factor, to a directory, from which `load` has it back.

        A process that is there is replaced, at once and not before the new one is complete, so that
        one or the other is there whenever the program is killed. The kernel function is not in it.

        Args:
          path: a directory, which is made if need be.

        Raises:
          ArgumentError: the process is traced: save it outside of `jax.jit`.
          ModelError: the directory holds something else, or cannot be written.
        """
        if _checks.is_traced(self._state):
            raise ArgumentError("the process is traced: save it outside of jax.jit and jax.grad.")
        arrays = {name: np.asarray(array) for name, array in self._state._asdict().items()}
        with mode(self._double):
            arrays["probe"] = probe(self.kernel_fn, self.get, arrays["x"])
        settings = {"get": self.get, "shape": list(self._shape), "weighted": self._weighted}
        _saving.write(path, type(self).__name__, settings, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], kernel_fn: KernelFn) -> GaussianProcess:
        """Reads the process that `save` has written; other versions of this package may have.

        Nothing is factorised again. What was computed in float64 is loaded where JAX's x64 mode is
        on, and for up to 2000 inputs also where it is not.

        Args:
          path: the directory.
          kernel_fn: the kernel that the process was made with. It is compared, to rounding, between
            eight of the inputs.

        Raises:
          ModelError: there is no such process, it is of a later version or damaged, another
            kernel's, or in float64 while JAX is not.
        """
        _checks.kernel_function(kernel_fn)
        _, settings, arrays = _saving.read(path, cls.__name__)
        found: Any = settings
        kernel_numbers, x = arrays.pop("probe"), arrays["x"]
        process = object.__new__(cls)
        process.kernel_fn, process.get = kernel_fn, found["get"]
        process._shape, process._weighted = tuple(found["shape"]), found["weighted"]
        process._double = x.dtype == np.float64 and in_float64(len(x))
        with mode(process._double):
            _saving.check_precision(path, x.dtype)
            _saving.check_kernel(path, kernel_numbers, kernel_fn, process.get, x)
            process._state = _State(**{name: jnp.asarray(a) for name, a in arrays.items()})
        return process

    def _first_state(self, x, y, noise, weights) -> _State:
        x, y, counts, covariance = self._problem(x, y, noise, weights)
        factor = jnp.linalg.cholesky(covariance)
        check_definite(factor, covariance, noise, self.get)
        return _State(x, y, counts, jnp.asarray(noise, x.dtype), covariance, factor)

    def _problem(self, x, y, noise, weights):
        x, y = data(x, y)
        counts = observations(weights, noise, len(x), x.dtype)
        root = jnp.sqrt(counts)
        kernel = kernel_matrix(self.kernel_fn, x, None, self.get)
        covariance = root[:, None] * root[None, :] * kernel
        covariance += jnp.diag(jnp.where(counts > 0, jnp.asarray(noise, x.dtype), 1))
        return x, root[:, None] * y, counts, covariance

    def _grown(self, state: _State, x, y, weights) -> _State:
        """The factor of a matrix with a block more: `[[L, 0], [Bᵀ, chol(C - BᵀB)]]`."""
        x, y, counts, corner = self._problem(x, y, state.noise, weights)
        same_inputs("x", x, state.x)
        side = jnp.sqrt(state.counts)[:, None] * jnp.sqrt(counts)[None, :]
        side *= kernel_matrix(self.kernel_fn, state.x, x, self.get)
        whitened = solve_triangular(state.factor, side, lower=True)
        left = corner - jnp.matmul(whitened.T, whitened, precision="highest")
        new = jnp.linalg.cholesky(left)
        covariance = jnp.block([[state.covariance, side], [side.T, corner]])
        check_definite(new, covariance, state.noise, self.get)
        factor = jnp.block([[state.factor, jnp.zeros_like(side)], [whitened.T, new]])
        return _State(
            x=jnp.concatenate([state.x, x]),
            y=jnp.concatenate([state.y, y]),
            counts=jnp.concatenate([state.counts, counts]),
            noise=state.noise,
            covariance=covariance,
            factor=factor,
        )

    def _log_marginal_likelihood(self, state: _State) -> Array:
        value = log_normal(state.covariance, state.factor, state.y)
        if self._weighted:
            there = state.counts > 0
            more = jnp.sum(jnp.where(there, state.counts - 1, 0))
            # A target that is not there has variance 1, and adds -log √(2π) for each output.
            absent = jnp.sum(~there, dtype=more.dtype)
            constant = xlogy(more, state.noise) + (more - absent) * jnp.log(2 * jnp.pi)
            value -= state.y.shape[1] * constant / 2
        return value

    def _leave_one_out(self, state: _State) -> Prediction:
        y, noise = state.y, state.noise
        inverse = cho_solve((state.factor, True), jnp.eye(len(y), dtype=y.dtype))
        weighted = jnp.matmul(inverse, y, precision="highest")
        precision = jnp.diagonal(inverse)
        if not self._weighted:
            mean = y - weighted / precision[:, None]
            return Prediction(mean.reshape(-1, *self._shape), 1 / precision)
        counts = _there(state.counts)
        root, left_out = jnp.sqrt(counts)[:, None], jnp.minimum(counts, 1)
        stays = jnp.where(counts > 1, (counts - 1) / noise, 0)
        scale = 1 / (left_out * (precision + stays))
        mean = y / root - root * weighted * scale[:, None]
        return Prediction(mean.reshape(-1, *self._shape), noise + (1 - noise * precision) * scale)

    def _mean(self, state: _State, inputs: Array) -> tuple[Array, Array]:
        """The posterior mean, and `L⁻¹ K(x, inputs)`."""
        cross = kernel_matrix(self.kernel_fn, state.x, inputs, self.get)
        whitened = solve_triangular(
            state.factor, jnp.sqrt(state.counts)[:, None] * cross, lower=True
        )
        targets = solve_triangular(state.factor, state.y, lower=True)
        mean = jnp.matmul(whitened.T, targets, precision="highest")
        return mean.reshape(len(inputs), *self._shape), whitened

    def _joint(self, state: _State, x_test) -> tuple[JointPrediction, Array]:
        """The posterior, and what rounding leaves unknown of its variances."""
        inputs = inputs_like(state.x, x_test)
        mean, whitened = self._mean(state, inputs)
        prior = kernel_matrix(self.kernel_fn, inputs, None, self.get)
        covariance = prior - jnp.matmul(whitened.T, whitened, precision="highest")
        rounding = _rounding(state, jnp.diagonal(prior), whitened)
        return JointPrediction(mean, covariance), rounding


def _there(counts: Array) -> Array:
    """Weights, with 1 for those of targets that are not there."""
    return jnp.where(counts > 0, counts, 1)


def _rounding(state: _State, prior: Array, whitened: Array) -> Array:
    """What the rounding of the kernel leaves unknown of posterior variances, `(m,)`."""
    weights = solve_triangular(state.factor, whitened, lower=True, trans=1)
    squares = jax.lax.stop_gradient(jnp.sum(weights**2, axis=0))
    largest = jnp.max(jnp.sum(state.factor**2, axis=1))
    return variance_rounding(prior.dtype, prior, largest, squares)
