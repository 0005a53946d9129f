"""The neural ODE of the experiments and its readout, infinitely wide and finite.

`f = V φ(z(T))/√n` with `ż = -leak · z + W_std/√n · W φ(z)` from `z(0) = U x/√d`, or, with
`inject_always`, from 0 with `U x/√d` added all the time. All of `W`, `U`, `V` from `N(0, 1)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from nt_deq import enable_x64, stax
from nt_deq.activations import get_activation
from nt_deq.flax import Dense, NeuralODE, functional
from nt_deq.typing import Layer, LayerKernelFn

# Of derivatives: steps of float32's tolerance are about a dozen.
_ADJOINT = {"adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=16), "max_steps": 256}


@dataclass(frozen=True)
class Ode:
    """What the network is, but for its width; `steps` of Euler's rule are the residual network."""

    W_std: float
    activation: str
    T: float = 1.0
    leak: float = 0.0
    steps: int | None = None
    inject_always: bool = False

    @property
    def _dynamics(self) -> dict[str, Any]:
        names = "T", "leak", "steps", "inject_always"
        return {name: getattr(self, name) for name in names}

    @property
    def _state(self) -> Layer:
        cell = stax.serial(stax.Nonlinearity(self.activation), stax.Dense(1, self.W_std))
        return stax.NeuralODE(cell, stax.Dense(1), **self._dynamics)

    @property
    def kernel_fn(self) -> LayerKernelFn:
        """The kernels of `f` of the infinitely wide network."""
        return stax.serial(self._state, stax.Nonlinearity(self.activation), stax.Dense(1))[2]

    def kernels(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The NNGP kernel and the NTK of `f`, float64, `(m, m)` each."""
        return _both(self.kernel_fn, x)

    def state_kernels(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of `z(T)`."""
        return _both(self._state[2], x)

    def layer(self, in_features: int, width: int, rngs: nnx.Rngs, **options: Any) -> NeuralODE:
        """Its layer, finitely wide; `options` are those of `nt_deq.flax.NeuralODE`."""
        cell = nnx.Sequential(
            get_activation(self.activation).fn, Dense(width, width, W_std=self.W_std, rngs=rngs)
        )
        inject = Dense(in_features, width, rngs=rngs)
        return NeuralODE(cell, inject, **self._dynamics, **options)

    def network(self, in_features: int, width: int, outputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
        """The finite network, to be differentiated in reverse mode."""
        options = {} if self.steps else _ADJOINT
        layer = self.layer(in_features, width, rngs, **options)
        phi, readout = get_activation(self.activation).fn, Dense(width, outputs, rngs=rngs)
        return nnx.Sequential(layer, phi, readout)


def _both(kernel_fn: LayerKernelFn, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with enable_x64(True):
        found = kernel_fn(jnp.asarray(x, jnp.float64), None, ("nngp", "ntk"))
        return np.asarray(found.nngp), np.asarray(found.ntk)


@partial(jax.jit, static_argnames=("ode", "width", "outputs"))
def sample(keys: Array, *, x: Array, ode: Ode, width: int, outputs: int) -> dict[str, Array]:
    """Draws a network with every key; NaN where one was not integrated to its end.

    Returns:
      `outputs (networks, m, outputs)`, and `covariances (networks, m, m)`, `h hᵀ/width` with
      `h = φ(z(T))`.
    """

    def draw(key):
        *to_h, readout = ode.network(x.shape[1], width, outputs, nnx.Rngs(params=key)).layers
        h = nnx.Sequential(*to_h)(x)
        return {"outputs": readout(h), "covariances": h @ h.T / width}

    with jax.default_matmul_precision("highest"):
        return lax.map(draw, keys)  # not batched: XLA's batched products are slow on a CPU


@partial(jax.jit, static_argnames=("ode", "width"))
def empirical_ntks(keys: Array, *, x: Array, ode: Ode, width: int) -> dict[str, Array]:
    """The empirical NTK of a network of one output with every key, `ntk (networks, m, m)`."""

    def draw(key):
        apply_fn, params = functional(ode.network(x.shape[1], width, 1, nnx.Rngs(params=key)))

        def gradient(x):
            return jax.grad(lambda params: apply_fn(params, x[None])[0, 0])(params)

        leaves = [a.reshape(len(x), -1) for a in jax.tree.leaves(lax.map(gradient, x))]
        return {"ntk": sum(a @ a.T for a in leaves)}

    with jax.default_matmul_precision("highest"):
        return lax.map(draw, keys)


@partial(jax.jit, static_argnames=("ode", "width", "steps"))
def residual_errors(
    keys: Array, *, x: Array, ode: Ode, width: int, steps: Sequence[int]
) -> dict[str, Array]:
    """How far networks of so many layers are from the ODE with the same weights.

    Returns:
      `errors (networks, len(steps))`, RMS of the difference of `z(T)` relative to that of `z(T)`.
    """

    def draw(key):
        def end_of(ode):  # the same key draws the same weights
            return ode.layer(x.shape[1], width, nnx.Rngs(params=key))(x)

        end, ends = end_of(ode), [end_of(replace(ode, steps=count)) for count in steps]
        norm = jnp.linalg.norm
        return {"errors": jnp.stack([norm(z - end) for z in ends]) / norm(end)}

    with jax.default_matmul_precision("highest"):
        return lax.map(draw, keys)
