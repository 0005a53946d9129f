"""Covariances of a Gaussian process: checks, dtype, and the likelihood by their factor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, PyTree, Real

from nt_deq import _checks
from nt_deq._jax import enable_x64, nothing_is_traced
from nt_deq.errors import ArgumentError, NotPositiveDefiniteError
from nt_deq.typing import Get, KernelFn

T = TypeVar("T", Array, np.ndarray)

SMALL = 2000  # inputs, of which float64 costs about a second and 100 MB


def in_float64(n: int, *values) -> bool:
    """Whether `n` inputs are computed in float64 in a float32 mode: few, and none traced."""
    small = n <= SMALL and not jax.config.read("jax_enable_x64")
    return small and nothing_is_traced() and not _checks.is_traced(values)


def mode(double: bool) -> AbstractContextManager[None]:
    """In which a state is made: x64 where it is computed in float64, else as it is."""
    return enable_x64(True) if double else nullcontext()


def rows(x: ArrayLike) -> int:
    """The number of inputs in `x`, which may yet turn out to be none."""
    return sum(np.shape(x)[:1])


def compute(function: Callable[..., PyTree], state: PyTree, double: bool) -> PyTree:
    """Calls `function(state)` in the dtype of a state, and gives the result in that of the mode.

    A float64 state that is used inside of a transformation is rounded to the float32 of that.
    """
    if not double:
        return function(state)
    if not nothing_is_traced():
        return function(rounded(state))
    with enable_x64(True):
        found = function(state)
    return rounded(found)


def rounded(tree: PyTree) -> PyTree:
    """Arrays of float64 as float32."""
    return jax.tree.map(lambda a: a.astype(np.float32), tree)


def variances(
    kernel_fn: KernelFn, x: Float[Array, "n ..."], get: Get = "nngp"
) -> Float[Array, " n"]:
    """Returns the kernel of every input `(n, ...)` with itself, `(n,)`, and no other entry."""
    return jax.vmap(lambda x: kernel_fn(x[None], None, get)[0, 0])(x)


def variance_rounding(dtype: DTypeLike, prior: T, largest: T | float, squares: T) -> T:
    """What the rounding of a kernel in a dtype, as if by chance, leaves unknown of variances.

    Args:
      dtype: of the kernel.
      prior: the kernel of every test input with itself, `(m,)`.
      largest: the largest of those of the training inputs.
      squares: sums of the squared weights of the targets, `(m,)`.
    """
    return float(jnp.finfo(dtype).eps) * (prior + largest * squares)


def data(
    x: Real[ArrayLike, "n ..."], y: Real[ArrayLike, "n ..."]
) -> tuple[Float[Array, "n ..."], Float[Array, "n C"]]:
    """`x (n, ...)` and `y (n, C)` in the dtype of everything."""
    x = checked_inputs(x)
    _checks.real_numbers("y", y)
    y = jnp.asarray(y, float)
    _checks.targets("y", y, len(x))
    return x, y.reshape(len(y), -1)


def checked_inputs(x: Real[ArrayLike, "n ..."]) -> Float[Array, "n ..."]:
    """Inputs in the dtype of everything."""
    _checks.real_numbers("x", x)
    x = jnp.asarray(x, float)
    _checks.examples("x", x)
    return x


def same_inputs(name: str, new: Array, x: Array) -> None:
    """Raises unless one of the new inputs has the shape of one of `x`."""
    if new.shape[1:] != x.shape[1:]:
        raise ArgumentError(f"{name} has inputs of shape {new.shape[1:]}, and x {x.shape[1:]}.")


def inputs_like(x: Array, x_test: Real[ArrayLike, "m ..."]) -> Array:
    """Test inputs in the dtype of the inputs `x`, of whose shape each must be."""
    _checks.real_numbers("x_test", x_test)
    inputs = jnp.asarray(x_test, x.dtype)
    same_inputs("x_test", inputs, x)
    return inputs


def kernel_matrix(kernel_fn: KernelFn, x1: Array, x2: Array | None, get: Get) -> Array:
    """The kernel of `x1` and `x2`, in full precision, or an error where it is no matrix."""
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


def observations(weights, noise, n, dtype) -> Array:
    """How many observations each of `n` targets stands for, `(n,)`."""
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


def check_definite(found, covariance, noise, get) -> None:
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
def log_normal(covariance: Array, factor: Array, y: Array) -> Array:
    """`Σ_c log N(y_c | 0, covariance)` by the Cholesky factor of the covariance.

    Its derivative is that in the covariance, in closed form: none goes through the factor.
    """
    del covariance
    whitened = solve_triangular(factor, y, lower=True)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    n, outputs = y.shape
    return -(jnp.sum(whitened**2) + outputs * (log_determinant + n * jnp.log(2 * jnp.pi))) / 2


@log_normal.defjvp
def _log_normal_jvp(primals, tangents):
    """GPML eq. 5.9, at a third of the price of going through the factor."""
    _, factor, y = primals
    weights = cho_solve((factor, True), y)
    inverse = cho_solve((factor, True), jnp.eye(len(y), dtype=y.dtype))
    outer = jnp.matmul(weights, weights.T, precision="highest")
    of_covariance = jnp.sum((outer - y.shape[1] * inverse) * tangents[0]) / 2
    return log_normal(*primals), of_covariance - jnp.sum(weights * tangents[2])
