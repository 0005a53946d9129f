"""Networks of infinite depth, from input to output."""

from __future__ import annotations

from nt_deq import _checks, stax
from nt_deq.activations import Phi
from nt_deq.typing import Layer, Number


def deq_network(
    W_std: Number,
    U_std: Number = 1.0,
    b_std: Number = 0.0,
    activation: Phi = "relu",
    V_std: Number = 1.0,
    *,
    width: int = 1,
    outputs: int = 1,
) -> Layer:
    """A deep equilibrium layer and its linear readout, `f = V_std/√width · V φ(z*)`.

    `stax.serial(stax.DEQ(...), stax.Dense(outputs, V_std))`: what regression and Gaussian processes
    take. Standard deviations may be traced.

    Args:
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias; 0 is no bias.
      activation: `φ`, as of `stax.DEQ`.
      V_std: standard deviation of the readout's weights.
      width: of the state of the finite network; its kernels do not depend on it.
      outputs: of the finite network, likewise.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`; errors are those of `stax.DEQ`.
    """
    has_bias = _checks.is_traced(b_std) or b_std != 0
    layer = stax.DEQ(width, W_std, U_std, b_std if has_bias else None, activation)
    return stax.serial(layer, stax.Dense(outputs, V_std))
