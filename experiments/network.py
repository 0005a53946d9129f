"""The network of the experiments, infinitely wide and finite: a DEQ and a linear readout.

`f(x) = V h*/√n` with `h* = φ(z*)`, `z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b`, in NTK
parameterisation: every parameter is drawn from `N(0, 1)` and trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax import Array

import nt_deq
from nt_deq import stax
from nt_deq.iterations import FixedPointSolver


@dataclass(frozen=True)
class Architecture:
    """What the network is, but for its width; `b_std=0` is no bias."""

    W_std: float
    U_std: float
    b_std: float
    activation: str

    def kernel_fn(self, outputs: int) -> Callable[..., Any]:
        """The kernels of the infinitely wide network, for neural-tangents."""
        deq = stax.DEQ(1, self.W_std, self.U_std, self.b_std or None, self.activation)
        return stax.serial(deq, stax.Dense(outputs))[2]


class Network(nnx.Module):
    """The finite network, `width` wide; `solver` finds its equilibrium, as in `nt_deq.flax.DEQ`."""

    def __init__(
        self,
        architecture: Architecture,
        in_features: int,
        width: int,
        outputs: int,
        rngs: nnx.Rngs,
        solver: FixedPointSolver | None = None,
    ):
        self.deq = nt_deq.flax.DEQ(
            in_features,
            width,
            W_std=architecture.W_std,
            U_std=architecture.U_std,
            b_std=architecture.b_std or None,
            activation=architecture.activation,
            solver=solver,
            rngs=rngs,
        )
        self.readout = nt_deq.flax.Dense(width, outputs, rngs=rngs)

    def __call__(self, x: Array, z0: Array | None = None) -> tuple[Array, Array]:
        """Returns the outputs for `x`, `(n, C)`, and `z*`, found from `z0`, `(n, width)`."""
        z = self.deq.equilibrium(x, z0)
        return self.readout(self.deq.activation.fn(z)), z

    def equilibrium_steps(self, x: Array) -> Array:
        """Returns how many layers the solve of `z*` for `x` applies, from zeros."""
        return self.deq.solve(x).steps


def split(
    architecture: Architecture, in_features: int, width: int, outputs: int, keys: Array
) -> tuple[Callable[[Any, Callable[[Network], Any]], Any], Any]:
    """Draws networks as functions of their parameters.

    Args:
      architecture: what they are.
      in_features: size of an input.
      width: size of the state.
      outputs: number of outputs.
      keys: one an network, `(seeds,)`.

    Returns:
      `(call, params)`: the parameters of all networks, stacked on a leading axis, and
      `call(params, method)`, which is `method(network)` of the network with parameters `params`.
    """

    def draw(key):
        return Network(architecture, in_features, width, outputs, nnx.Rngs(params=key))

    graph, _ = nnx.split(nnx.eval_shape(lambda: draw(keys[0])))

    def call(params, method):
        return method(nnx.merge(graph, params))

    return call, jax.vmap(lambda key: nnx.split(draw(key))[1])(keys)
