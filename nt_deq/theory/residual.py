"""The kernels of residual networks whose layers have weights of their own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from nt_deq import _checks
from nt_deq.activations import Phi, get_activation
from nt_deq.errors import NotConvergedError
from nt_deq.fixed_point.implicit import keep
from nt_deq.kernels.equations import multiply
from nt_deq.trajectory import euler, integrate
from nt_deq.typing import Number


def untied_residual_kernels(
    x1: Num[ArrayLike, "n1 d"],
    x2: Num[ArrayLike, "n2 d"] | None = None,
    *,
    W_std: Number,
    T: Number = 1.0,
    layers: int | None = None,
    U_std: Number = 1.0,
    activation: Phi = "relu",
) -> tuple[Float[Array, "n1 _"], Float[Array, "n1 _"]]:
    """Returns the NNGP kernel and the NTK of a residual network with weights of their own.

    `z ← z + √(T/L) W_std/√n · W φ(z)` in `L` layers from `z = U_std/√d · U x`. A layer adds what
    is independent of the state, so the kernels of one time are enough, and `L` layers are Euler's
    rule for

        dκ/dt = W_std² V(κ),    dΘ/dt = W_std² (V(κ) + V̇(κ) Θ)

    (Hayou et al. 2021, arXiv:2010.12859, for ReLU). With `T/L` in place of its root, which is the
    scale of `stax.NeuralODE`, they would not move as `L` grows: there the layers share their
    weights, and the states of all times are correlated. ReLU's variance grows like
    `e^(W_std² T/2)`.

    Args:
      x1: inputs, `(n1, d)`.
      x2: other inputs, `(n2, d)`; `None` means `x1`.
      W_std: standard deviation of the weights.
      T: how far, above 0; it may be traced.
      layers: `L`; `None` is the limit.
      U_std: standard deviation of the input weights.
      activation: as in `global_contraction`.

    Returns:
      `κ` and `Θ` of the last `z`, `(n1, n2)` each; where the integration ends before `T`, NaN.

    Raises:
      NotConvergedError: likewise, in an eager call.
    """
    _checks.standard_deviations(W_std=W_std, U_std=U_std)
    _checks.time("T", T)
    if layers is not None:
        _checks.count("layers", layers)
    phi, (x1, x2) = get_activation(activation), _checks.input_pair(x1, x2)
    itself = x2 is None
    x2 = x1 if x2 is None else x2
    W_var, U_var = (jnp.asarray(std, x1.dtype) ** 2 for std in (W_std, U_std))
    k1, k2 = (U_var / x1.shape[1] * jnp.sum(x * x, axis=1) for x in (x1, x2))
    c = U_var / x1.shape[1] * multiply(x1, x2)
    same = jnp.eye(*c.shape, dtype=bool) & itself

    def velocity(state):
        k1, k2, c, theta = jnp.moveaxis(state, -1, 0)
        own, own_slope = phi.dual_diagonal(k1)
        moment, slope = phi.dual(k1, k2, c)
        # Rounding would put c beside the variance, where the slope of a kink is steep.
        moment, slope = jnp.where(same, own, moment), jnp.where(same, own_slope, slope)
        rates = own, phi.dual_diagonal(k2)[0], moment, moment + slope * theta
        return W_var * jnp.stack(rates, axis=-1)

    start = jnp.stack([*jnp.broadcast_arrays(k1[:, None], k2[None, :]), c, c], axis=-1)
    end, T = jnp.asarray(T, x1.dtype), float(T) if not _checks.is_traced(T) else T
    if layers is None:
        state, reached = integrate(velocity, start, end)
    else:
        state, reached = euler(velocity, start, end, layers), jnp.array(True)
    found = jnp.all(jnp.isfinite(state), axis=-1) & reached
    if not _checks.is_traced(found) and not np.all(found):
        raise NotConvergedError(
            f"the kernels of the residual network were not found until T={T:.6g} for "
            f"{np.sum(~np.asarray(found))} of {found.size} pairs: they leave {x1.dtype}, or the "
            "steps were too many; make T or W_std smaller."
        )
    return keep(found, state[..., 2]), keep(found, state[..., 3])
