"""Likelihood, leave-one-out and posterior of a Gaussian process, by one Cholesky factor."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import xlogy
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Real

from nt_deq import _checks
from nt_deq.errors import ArgumentError, NotPositiveDefiniteError
from nt_deq.typing import Get, KernelFn, Number

T = TypeVar("T", Array, np.ndarray)


class Prediction(NamedTuple):
    """Normal distributions.

    Attributes:
      mean: `(m,)` or `(m, C)`, like the targets.
      variance: `(m,)`, of every output.
    """

    mean: Float[Array, "m ..."]
    variance: Float[Array, " m"]


def log_marginal_likelihood(
    kernel_fn: KernelFn,
    x: Real[ArrayLike, "n ..."],
    y: Real[ArrayLike, "n ..."],
    noise: Number,
    get: Get = "nngp",
    weights: Real[ArrayLike, " n"] | None = None,
) -> Float[Array, ""]:
    """Computes `log N(y | 0, K + noise)`, in nats, summed over outputs (GPML eq. 2.30).

    With weights it is the likelihood of every `y_i` observed `weights_i` times:

        log N(y | 0, K + noise/w) - Σᵢ [(wᵢ - 1) log(2π noise) + log wᵢ] / 2   for each output.

    Args:
      kernel_fn: any stax `kernel_fn(x1, x2, get)`, ours or not.
      x: inputs, `(n, ...)`.
      y: targets with mean zero, `(n,)` or `(n, C)`: the outputs are independent and share `K`.
      noise: variance of the observation noise, `>= 0`; may be traced.
      get: which kernel is the covariance, `'nngp'` or `'ntk'`.
      weights: how many observations each target stands for, `(n,)`, real numbers `>= 0`; `None`
        is one each. A target with weight 0 is not there.

    Returns:
      A scalar.

    Raises:
      NotPositiveDefiniteError: `K + noise` is not, to rounding (inside `jax.jit`: NaN).
      NoEquilibriumError, NotConvergedError: by `kernel_fn` (likewise).
      ValueError: an argument cannot be right; the message says why.
    """
    _, y, covariance, counts = _problem(kernel_fn, x, y, noise, get, weights)
    value = _log_normal(covariance, y)
    if weights is not None:
        there = counts > 0
        more = jnp.sum(jnp.where(there, counts - 1, 0))
        # A target that is not there has variance 1, and adds -log √(2π) for each output.
        constant = xlogy(more, noise) + (more - jnp.sum(~there, dtype=more.dtype)) * jnp.log(
            2 * jnp.pi
        )
        value -= y.shape[1] * constant / 2
    _check_definite(value, covariance, noise, get)
    return value


def leave_one_out(
    kernel_fn: KernelFn,
    x: Real[ArrayLike, "n ..."],
    y: Real[ArrayLike, "n ..."],
    noise: Number,
    get: Get = "nngp",
    weights: Real[ArrayLike, " n"] | None = None,
) -> Prediction:
    """Predicts every `y_i` from all others, at the price of one fit (GPML eq. 5.12).

    Arguments and errors are those of `log_marginal_likelihood`. Of a target with a weight above 1
    one observation is left out, and the others of it stay.

    Returns:
      Mean and variance of `y_i`, noise included, given the other targets.
    """
    shape = np.shape(y)
    _, y, factor, counts = _factorise(kernel_fn, x, y, noise, get, weights)
    inverse = cho_solve((factor, True), jnp.eye(len(y), dtype=y.dtype))
    weighted = jnp.matmul(inverse, y, precision="highest")
    precision = jnp.diagonal(inverse)
    if weights is None:
        mean = y - weighted / precision[:, None]
        return Prediction(mean.reshape(shape), 1 / precision)
    counts = jnp.where(counts > 0, counts, 1)
    root, left_out = jnp.sqrt(counts)[:, None], jnp.minimum(counts, 1)
    stays = jnp.where(counts > 1, (counts - 1) / noise, 0)
    scale = 1 / (left_out * (precision + stays))
    mean = y / root - root * weighted * scale[:, None]
    return Prediction(mean.reshape(shape), noise + (1 - noise * precision) * scale)


def leave_one_out_loss(
    kernel_fn: KernelFn,
    x: Real[ArrayLike, "n ..."],
    y: Real[ArrayLike, "n ..."],
    noise: Number,
    get: Get = "nngp",
    weights: Real[ArrayLike, " n"] | None = None,
) -> Float[Array, ""]:
    """Computes `-Σᵢ wᵢ log p(y_i | x, y_{-i})`, in nats, over all outputs (GPML eq. 5.10, 5.11).

    Against a wrong model it is the more robust criterion of the two (GPML sec. 5.4.2). Arguments
    and errors are those of `log_marginal_likelihood`.
    """
    mean, variance = leave_one_out(kernel_fn, x, y, noise, get, weights)
    error = (jnp.asarray(y, mean.dtype) - mean).reshape(len(variance), -1)
    losses = (error**2 / variance[:, None] + jnp.log(2 * jnp.pi * variance)[:, None]) / 2
    return jnp.sum(
        losses if weights is None else jnp.asarray(weights, losses.dtype)[:, None] * losses
    )


def posterior(
    kernel_fn: KernelFn,
    x: Real[ArrayLike, "n ..."],
    y: Real[ArrayLike, "n ..."],
    noise: Number,
    x_test: Real[ArrayLike, "m ..."],
    get: Get = "nngp",
    weights: Real[ArrayLike, " n"] | None = None,
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
      weights: how many observations each target stands for, `(n,)`; `None` is one each.

    Returns:
      Mean and variance of `f`; add `noise` to the variance for that of a new observation. A
      variance below its rounding is not known any better than that, and given as that: without
      noise it is never 0, and in float32 about 1e-7 of the variance before at the least.
    """
    shape = np.shape(y)[1:]
    x, y, factor, counts = _factorise(kernel_fn, x, y, noise, get, weights)
    x_test = jnp.asarray(x_test, x.dtype)
    if x_test.shape[1:] != x.shape[1:]:
        raise ArgumentError(f"x_test has inputs of shape {x_test.shape[1:]}, and x {x.shape[1:]}.")
    covariance = jnp.sqrt(counts)[:, None] * _matrix(kernel_fn, x, x_test, get)
    whitened = solve_triangular(factor, covariance, lower=True)
    mean = jnp.matmul(whitened.T, solve_triangular(factor, y, lower=True), precision="highest")
    prior = variances(kernel_fn, x_test, get)
    variance = prior - jnp.sum(whitened**2, axis=0)
    weights = jax.lax.stop_gradient(solve_triangular(factor, whitened, lower=True, trans=1))
    largest = jnp.max(jnp.sum(factor**2, axis=1))
    rounding = variance_rounding(variance.dtype, prior, largest, jnp.sum(weights**2, axis=0))
    return Prediction(mean.reshape(len(x_test), *shape), jnp.maximum(variance, rounding))


def variance_rounding(dtype: DTypeLike, prior: T, largest: T | float, squares: T) -> T:
    """What the rounding of a kernel in a dtype, as if by chance, leaves unknown of variances.

    Args:
      dtype: of the kernel.
      prior: the kernel of every test input with itself, `(m,)`.
      largest: the largest of those of the training inputs.
      squares: sums of the squared weights of the targets, `(m,)`.
    """
    return float(jnp.finfo(dtype).eps) * (prior + largest * squares)


def variances(
    kernel_fn: KernelFn, x: Float[Array, "n ..."], get: Get = "nngp"
) -> Float[Array, " n"]:
    """Returns the kernel of every input `(n, ...)` with itself, `(n,)`, and no other entry."""
    return jax.vmap(lambda x: kernel_fn(x[None], None, get)[0, 0])(x)


def data(
    x: Real[ArrayLike, "n ..."], y: Real[ArrayLike, "n ..."]
) -> tuple[Float[Array, "n ..."], Float[Array, "n C"]]:
    """`x (n, ...)` and `y (n, C)` in the dtype of everything."""
    for name, numbers in (("x", x), ("y", y)):
        _checks.real_numbers(name, numbers)
    x, y = jnp.asarray(x, float), jnp.asarray(y, float)
    _checks.examples("x", x)
    _checks.targets("y", y, len(x))
    return x, y.reshape(len(y), -1)


def _matrix(kernel_fn: KernelFn, x1: Array, x2: Array | None, get: Get) -> Array:
    _checks.kernel_function(kernel_fn)
    with jax.default_matmul_precision("highest"):
        kernel = kernel_fn(x1, x2, get)
    shape = (len(x1), len(x1 if x2 is None else x2))
    if kernel.shape != shape:
        raise ArgumentError(
            f"kernel_fn gives an array of shape {kernel.shape}, and a covariance has {shape}: end "
            "the network in a readout, such as stax.Dense(1)."
        )
    return kernel


def _problem(kernel_fn, x, y, noise, get, weights) -> tuple[Array, Array, Array, Array]:
    """The data as if each target were one observation, their covariance, and the weights.

    `N(y | 0, K + noise/w)` is, but for a constant, `N(√w y | 0, √w K √w + noise)`. A target that is
    not there is one of 0, with variance 1, and independent of all others.
    """
    _checks.kernel_name(get)
    _checks.variance("noise", noise)
    x, y = data(x, y)
    weights = _weights(weights, noise, len(x), x.dtype)
    root = jnp.sqrt(weights)
    kernel = root[:, None] * root[None, :] * _matrix(kernel_fn, x, None, get)
    covariance = kernel + jnp.diag(jnp.where(weights > 0, noise, 1))
    return x, root[:, None] * y, covariance, weights


def _weights(weights, noise, n, dtype) -> Array:
    if weights is None:
        return jnp.ones(n, dtype)
    weights = jnp.asarray(weights, dtype)
    if weights.shape != (n,):
        raise ArgumentError(f"weights have shape {weights.shape}: {n} inputs need ({n},).")
    if _checks.is_traced(weights, noise):
        return weights
    if not (jnp.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ArgumentError("weights must be finite, at least 0, and not all 0.")
    if noise == 0 and not ((weights == 0) | (weights == 1)).all():
        raise ArgumentError("weights other than 0 and 1 need a noise above 0, which they divide.")
    return weights


def _factorise(kernel_fn, x, y, noise, get, weights) -> tuple[Array, Array, Array, Array]:
    """Like `_problem`, with the Cholesky factor of the covariance in the place of it."""
    x, y, covariance, weights = _problem(kernel_fn, x, y, noise, get, weights)
    factor = jnp.linalg.cholesky(covariance)
    _check_definite(factor, covariance, noise, get)
    return x, y, factor, weights


def _check_definite(found, covariance, noise, get) -> None:
    """Raises where what was computed by a Cholesky factor is not finite (and not traced)."""
    if _checks.is_traced(found) or jnp.isfinite(found).all():
        return
    if not jnp.isfinite(covariance).all():
        raise ArgumentError(f"kernel_fn(x, None, {get!r}) is NaN or infinite: look at it there.")
    unit = float(jnp.finfo(covariance.dtype).eps) * float(jnp.trace(covariance))
    remedies = [f"take a noise of more than about {unit:.1g}", "drop inputs that are there twice"]
    if covariance.dtype == jnp.float32:
        remedies.append("compute in float64: jax.config.update('jax_enable_x64', True)")
    raise NotPositiveDefiniteError(
        f"K + noise is not positive definite to rounding in {covariance.dtype} with "
        f"noise={noise}; {', '.join(remedies[:-1])}, or {remedies[-1]}."
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
