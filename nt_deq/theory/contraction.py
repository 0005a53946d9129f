"""When an equilibrium exists, and how fast the layers approach it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from nt_deq import _checks
from nt_deq.activations import Phi, get_activation
from nt_deq.errors import NoEquilibriumError
from nt_deq.kernels.dense import deq_kernel
from nt_deq.kernels.diagnosis import verdict
from nt_deq.kernels.equations import dense_solver, marginal_map, solve_marginals
from nt_deq.typing import Number


def global_contraction(W_std: Number, activation: Phi = "relu") -> Number:
    """Returns `2 · W_std · Lip(φ)`: below 1, every wide network has exactly one equilibrium.

    The spectral norm of `W_std/√n · W` tends to `2 · W_std` (Bai & Yin 1993), so the layer then
    contracts everywhere. It is the condition of the theorems of Gao et al. 2023, sufficient and far
    from necessary: see `local_contraction`.

    Args:
      W_std: standard deviation of the recurrent weights.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function, or an
        `nt_deq.Activation`.
    """
    _checks.standard_deviations(W_std=W_std)
    return 2 * W_std * get_activation(activation).lipschitz


def local_contraction(
    x: Num[ArrayLike, "n d"],
    *,
    W_std: Number,
    U_std: Number = 1.0,
    b_std: Number = 0.0,
    activation: Phi = "relu",
) -> Float[Array, " n"]:
    """Returns `J = W_std² E[φ'(z*)²]` of every input: below 1, its equilibrium is stable.

    By the circular law with a variance profile, the Jacobian `W_std/√n · W diag(φ'(z*))` of a wide
    network has spectral radius `√J`. `J` is what `Θ* = K*/(1 - J)` (Feng & Kolter 2023) needs to be
    below 1, and the ratio of `E|z^(l+1) - z^l|²` to that of the layer before.

    Args:
      x: inputs, `(n, d)`.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      activation: as in `global_contraction`.

    Returns:
      `J`, `(n,)`; at 1 and above there is no stable equilibrium. NaN where the variance of `z^l`
      grows beyond those at which `J` is known, and the network has none either; under a
      transformation also where `J` was not found.

    Raises:
      OverflowError, NotConvergedError: the variance overflows, or `J` was not found.
    """
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=b_std)
    phi, x = get_activation(activation), _checks.inputs("x", x)
    W_var, U_var, b_var = (jnp.asarray(std, x.dtype) ** 2 for std in (W_std, U_std, b_std))
    s = U_var * (jnp.sum(x * x, axis=1) / x.shape[1]) + b_var
    solver = dense_solver(None, phi)
    found = jax.jit(solve_marginals, static_argnums=(0, 1))(phi, solver, W_var, s)
    if not _checks.is_traced(found):
        for row in np.flatnonzero(~found.root.converged):
            failure = verdict(phi, solver, W_std, "x", found, np.array([row]))
            if not isinstance(failure, NoEquilibriumError):
                raise failure
    return jnp.where(found.exists | (found.rate >= 1), found.rate, jnp.nan)


def convergence_rate(
    x: Num[ArrayLike, "n d"],
    *,
    W_std: Number,
    U_std: Number = 1.0,
    b_std: Number = 0.0,
    activation: Phi = "relu",
) -> Float[Array, "n n"]:
    """Returns the factor by which a layer brings `K^l` closer to `K*`, for large `l`.

    The error of the entry `(x, x')` is multiplied by `W_std² E[φ'φ']` (Price's theorem), that of a
    variance by `W_std² E[φ'² + φφ'']`; an entry inherits the errors of its two variances, so its
    rate is the largest of the three.

    Args:
      x: inputs, `(n, d)`.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      activation: as in `global_contraction`.

    Returns:
      `(n, n)`; on the diagonal the rate of the variance.

    Raises:
      NoEquilibriumError, NotConvergedError: there is no `K*`, as in `nt_deq.deq_kernel`.
    """
    phi, x = get_activation(activation), _checks.inputs("x", x)
    k = deq_kernel(x, W_std=W_std, U_std=U_std, b_std=b_std, activation=phi).nngp
    variance = jnp.diagonal(k)
    W_var = jnp.asarray(W_std, x.dtype) ** 2
    by_covariance = W_var * phi.dual(variance[:, None], variance[None, :], k)[1]
    slope = marginal_map(phi, variance, (W_var, jnp.zeros_like(variance))).slope
    assert slope is not None
    by_variance = jnp.abs(slope)
    inherited = jnp.maximum(by_variance[:, None], by_variance[None, :])
    diagonal = jnp.eye(len(x), dtype=bool)
    return jnp.where(diagonal, inherited, jnp.maximum(jnp.abs(by_covariance), inherited))
