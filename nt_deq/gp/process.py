"""Likelihood, leave-one-out and posterior of a Gaussian process, by one Cholesky factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular

from nt_deq import _checks
from nt_deq.kernel import Get, NotPositiveDefiniteError

KernelFn = Callable[..., Any]


class Prediction(NamedTuple):
    """Normal distributions.

    Attributes:
      mean: `(m,)` or `(m, C)`, like the targets.
      variance: `(m,)`, of every output.
    """

    mean: Array
    variance: Array


def log_marginal_likelihood(
    kernel_fn: KernelFn, x: Any, y: Any, noise: float | Array, get: Get = "nngp"
) -> Array:
    """Computes `log N(y | 0, K + noise)`, in nats, summed over outputs (GPML eq. 2.30).

    Args:
      kernel_fn: any stax `kernel_fn(x1, x2, get)`, ours or not.
      x: inputs, `(n, ...)`.
      y: targets with mean zero, `(n,)` or `(n, C)`: the outputs are independent and share `K`.
      noise: variance of the observation noise, `>= 0`; may be traced.
      get: which kernel is the covariance, `'nngp'` or `'ntk'`.

    Returns:
      A scalar.

    Raises:
      NotPositiveDefiniteError: `K + noise` is not, to rounding (inside `jax.jit`: NaN).
      NoEquilibriumError, NotConvergedError: by `kernel_fn` (likewise).
      ValueError: an argument cannot be right; the message says why.
    """
    _, y, covariance = _problem(kernel_fn, x, y, noise, get)
    value = _log_normal(covariance, y)
    _check_definite(value, covariance, noise, get)
    return value


def leave_one_out(
    kernel_fn: KernelFn, x: Any, y: Any, noise: float | Array, get: Get = "nngp"
) -> Prediction:
    """Predicts every `y_i` from all others, at the price of one fit (GPML eq. 5.12).

    Arguments and errors are those of `log_marginal_likelihood`.

    Returns:
      Mean and variance of `y_i`, noise included, given the other targets.
    """
    shape = np.shape(y)
    _, y, factor = _factorise(kernel_fn, x, y, noise, get)
    inverse = cho_solve((factor, True), jnp.eye(len(y), dtype=y.dtype))
    variance = 1 / jnp.diagonal(inverse)
    mean = y - variance[:, None] * jnp.matmul(inverse, y, precision="highest")
    return Prediction(mean.reshape(shape), variance)


def leave_one_out_loss(
    kernel_fn: KernelFn, x: Any, y: Any, noise: float | Array, get: Get = "nngp"
) -> Array:
    """Computes `-Σᵢ log p(y_i | x, y_{-i})`, in nats, summed over outputs (GPML eq. 5.10, 5.11).

    Against a wrong model it is the more robust criterion of the two (GPML sec. 5.4.2). Arguments
    and errors are those of `log_marginal_likelihood`.
    """
    mean, variance = leave_one_out(kernel_fn, x, y, noise, get)
    error = (jnp.asarray(y, mean.dtype) - mean).reshape(len(variance), -1)
    return jnp.sum(error**2 / variance[:, None] + jnp.log(2 * jnp.pi * variance)[:, None]) / 2


def posterior(
    kernel_fn: KernelFn,
    x: Any,
    y: Any,
    noise: float | Array,
    x_test: Any,
    get: Get = "nngp",
) -> Prediction:
    """Predicts `f` at other inputs (GPML eq. 2.25, 2.26).

    For many inputs there is `nt_deq.KernelRegression`, which does not hold `K` on a device. Errors
    are those of `log_marginal_likelihood`.

    Args:
      kernel_fn: any stax `kernel_fn(x1, x2, get)`.
      x: inputs, `(n, ...)`.
      y: targets with mean zero, `(n,)` or `(n, C)`.
      noise: variance of the observation noise, `>= 0`; may be traced.
      x_test: other inputs, `(m, ...)`.
      get: which kernel is the covariance, `'nngp'` or `'ntk'`.

    Returns:
      Mean and variance of `f`; add `noise` to the variance for that of a new observation.
    """
    shape = np.shape(y)[1:]
    x, y, factor = _factorise(kernel_fn, x, y, noise, get)
    x_test = jnp.asarray(x_test, x.dtype)
    if x_test.shape[1:] != x.shape[1:]:
        raise ValueError(f"x_test has inputs of shape {x_test.shape[1:]}, and x {x.shape[1:]}.")
    whitened = solve_triangular(factor, _matrix(kernel_fn, x, x_test, get), lower=True)
    mean = jnp.matmul(whitened.T, solve_triangular(factor, y, lower=True), precision="highest")
    variance = variances(kernel_fn, x_test, get) - jnp.sum(whitened**2, axis=0)
    return Prediction(mean.reshape(len(x_test), *shape), jnp.maximum(variance, 0))


def variances(kernel_fn: KernelFn, x: Array, get: Get = "nngp") -> Array:
    """Returns the kernel of every input `(n, ...)` with itself, `(n,)`, and no other entry."""
    return jax.vmap(lambda x: kernel_fn(x[None], None, get)[0, 0])(x)


def data(x: Any, y: Any) -> tuple[Array, Array]:
    """`x (n, ...)` and `y (n, C)` in the dtype of everything."""
    x, y = jnp.asarray(x, float), jnp.asarray(y, float)
    _checks.examples("x", x)
    _checks.targets("y", y, len(x))
    return x, y.reshape(len(y), -1)


def _matrix(kernel_fn: KernelFn, x1: Array, x2: Array | None, get: str) -> Array:
    with jax.default_matmul_precision("highest"):
        kernel = kernel_fn(x1, x2, get)
    shape = (len(x1), len(x1 if x2 is None else x2))
    if kernel.shape != shape:
        raise ValueError(
            f"kernel_fn gives an array of shape {kernel.shape}, and a covariance has {shape}: end "
            "the network in a readout, such as stax.Dense(1)."
        )
    return kernel


def _problem(kernel_fn, x, y, noise, get) -> tuple[Array, Array, Array]:
    """The data, and `K + noise`."""
    _checks.kernel_name(get)
    if np.ndim(noise) or not (_checks.is_traced(noise) or 0 <= noise < np.inf):
        raise ValueError(f"noise={noise} has to be a variance: one finite number of at least 0.")
    x, y = data(x, y)
    kernel = _matrix(kernel_fn, x, None, get)
    return x, y, kernel + noise * jnp.eye(len(x), dtype=x.dtype)


def _factorise(kernel_fn, x, y, noise, get) -> tuple[Array, Array, Array]:
    """The data, and the Cholesky factor of `K + noise`."""
    x, y, covariance = _problem(kernel_fn, x, y, noise, get)
    factor = jnp.linalg.cholesky(covariance)
    _check_definite(factor, covariance, noise, get)
    return x, y, factor


def _check_definite(found, covariance, noise, get) -> None:
    """Raises where what was computed by a Cholesky factor is not finite (and not traced)."""
    if _checks.is_traced(found) or jnp.isfinite(found).all():
        return
    if not jnp.isfinite(covariance).all():
        raise ValueError(f"kernel_fn(x, None, {get!r}) is NaN or infinite: look at it there.")
    unit = float(jnp.finfo(covariance.dtype).eps) * float(jnp.trace(covariance))
    raise NotPositiveDefiniteError(
        f"K + noise is not positive definite to rounding in {covariance.dtype} with "
        f"noise={noise}; take a noise of more than about {unit:.1g}, drop inputs that are there "
        "twice, or compute in float64: jax.config.update('jax_enable_x64', True)."
    )


@jax.custom_jvp
def _log_normal(covariance: Array, y: Array) -> Array:
    """`Σ_c log N(y_c | 0, covariance)`."""
    return _log_normal_of(jnp.linalg.cholesky(covariance), y)


def _log_normal_of(factor, y):
    whitened = solve_triangular(factor, y, lower=True)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    n, outputs = y.shape
    return -(jnp.sum(whitened**2) + outputs * (log_determinant + n * jnp.log(2 * jnp.pi))) / 2


@_log_normal.defjvp
def _log_normal_jvp(primals, tangents):
    """In closed form (GPML eq. 5.9), at a third of the price of going through the factor."""
    covariance, y = primals
    factor = jnp.linalg.cholesky(covariance)
    weights = cho_solve((factor, True), y)
    inverse = cho_solve((factor, True), jnp.eye(len(y), dtype=y.dtype))
    outer = jnp.matmul(weights, weights.T, precision="highest")
    of_covariance = jnp.sum((outer - y.shape[1] * inverse) * tangents[0]) / 2
    return _log_normal_of(factor, y), of_covariance - jnp.sum(weights * tangents[1])
