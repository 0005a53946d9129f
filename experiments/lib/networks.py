"""The network of the experiments, infinitely wide and finite: a DEQ and a linear readout.

`f(x) = V h*/√n` with `h* = φ(z*)`, `z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b`, in NTK
parameterisation: every parameter is drawn from `N(0, 1)` and trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
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

    def deq(self, in_features: int, width: int, **options: Any) -> nt_deq.flax.DEQ:
        """Its layer of infinite depth, finitely wide; `options` are those of `nt_deq.flax.DEQ`."""
        return nt_deq.flax.DEQ(
            in_features,
            width,
            W_std=self.W_std,
            U_std=self.U_std,
            b_std=self.b_std or None,
            activation=self.activation,
            **options,
        )


class EquilibriumNetwork(nnx.Module):
    """A network with one DEQ layer, `deq`, between `features` and `read`."""

    deq: nt_deq.flax.DEQ

    def features(self, x: Array) -> Array:
        """What the DEQ layer is given of inputs `x`, `(n, ...)`."""
        return x

    def read(self, z: Array) -> Array:
        """The outputs, `(n, C)`, of equilibria `z*`."""
        raise NotImplementedError

    def __call__(self, x: Array, z0: Array | None = None) -> tuple[Array, Array]:
        """Returns the outputs for `x`, `(n, C)`, and `z*`, found from `z0`, like `z*`."""
        z = self.deq.equilibrium(self.features(x), z0)
        return self.read(z), z

    def equilibrium_steps(self, x: Array) -> Array:
        """Returns how many layers the solve of `z*` for `x` applies, from zeros."""
        return self.deq.solve(self.features(x)).steps


class Network(EquilibriumNetwork):
    """The finite network, `width` wide.

    `solver` finds its equilibrium and `lipschitz` bounds its layer, as in `nt_deq.flax.DEQ`.
    """

    def __init__(
        self,
        architecture: Architecture,
        in_features: int,
        width: int,
        outputs: int,
        rngs: nnx.Rngs,
        solver: FixedPointSolver | None = None,
        lipschitz: float | None = None,
    ):
        self.architecture = architecture
        self.deq = architecture.deq(
            in_features,
            width,
            parameterization="ntk",
            solver=solver,
            lipschitz=lipschitz,
            rngs=rngs,
        )
        self.readout = nt_deq.flax.Dense(width, outputs, rngs=rngs)

    def read(self, z: Array) -> Array:
        """The outputs, `(n, C)`, of equilibria `z*`, `(n, width)`."""
        return self.readout(self.deq.activation.fn(z))


def empirical_ntk(network: Network, x: Array) -> Array:
    """The NTK of one finite network for inputs `x`, on average over its outputs, `(n, n)`.

    The derivative by a weight is what it multiplies times `δ`, the derivative by what it adds to:
    `Θ(x, x') = (W_std²/n h·h' + U_std²/d x·x' + b_std²) δ·δ' + h·h'/n`, and no Jacobian of the
    weights is held. Entries of an input without an equilibrium are NaN.
    """
    deq, architecture = network.deq, network.architecture
    z = deq.equilibrium(x)

    def outputs(added):
        at = nt_deq.equilibrium(lambda z, added: deq.step(z, x) + added, z, added)
        return network.readout(deq.activation.fn(at))

    f, pull_back = jax.vjp(outputs, jnp.zeros_like(z))
    one_hot = jnp.eye(f.shape[1], dtype=f.dtype)
    (delta,) = jax.vmap(lambda output: pull_back(jnp.broadcast_to(output, f.shape)))(one_hot)

    def mean_products(a):
        return jnp.matmul(a, a.mT, precision="highest") / a.shape[-1]

    hidden = mean_products(deq.activation.fn(z))
    injected = architecture.U_std**2 * mean_products(x) + architecture.b_std**2
    by_z = jnp.mean(mean_products(delta), axis=0) * z.shape[1]
    return (architecture.W_std**2 * hidden + injected) * by_z + hidden


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
