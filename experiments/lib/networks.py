"""The network of the experiments, infinitely wide and finite: a DEQ and a linear readout.

`f(x) = V h*/√n` with `h* = φ(z*)`, `z* = W_std/√n · W φ(z*) + U_std/√d · U x + b_std · b`, in NTK
parameterisation: every parameter is drawn from `N(0, 1)` and trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import nt_deq

PIXELS = 8  # along a side, that a convolutional DEQ works on at most


@dataclass(frozen=True)
class Architecture:
    """What the network is, but for its width; `b_std=0` is no bias."""

    W_std: float
    U_std: float
    b_std: float
    activation: str

    def kernel_fn(self, outputs: int) -> Callable[..., Any]:
        """The kernels of the infinitely wide network, for neural-tangents."""
        stds = self.W_std, self.U_std, self.b_std
        return nt_deq.deq_network(*stds, self.activation, outputs=outputs)[2]

    def kernels(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Σ* = E[φ(z*)φ(z*)ᵀ]` and the NTK of an output at infinite width, float64, `(m, m)`."""
        with nt_deq.enable_x64(True):
            found = self.kernel_fn(1)(jnp.asarray(x), None, ("nngp", "ntk"))
            return np.asarray(found.nngp), np.asarray(found.ntk)

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


class Network(nnx.Module):
    """A finite network with one DEQ layer, between `stem` and `readout`."""

    def __init__(self, deq: nt_deq.flax.DEQ, readout: nnx.Module, stem: Callable[[Array], Array]):
        self.deq, self.stem = deq, stem
        self.readout: Any = readout

    def __call__(self, x: Array, z0: Array | None = None) -> tuple[Array, Array]:
        """Returns the outputs for `x`, `(n, C)`, and `z*`, found from `z0`, like `z*`."""
        z = self.deq.equilibrium(self.stem(x), z0)
        return self.read(z), z

    def read(self, z: Array) -> Array:
        """The outputs, `(n, C)`, of equilibria `z*`, `(n, ..., width)`."""
        h = self.deq.activation.fn(z)
        return self.readout(h.reshape(len(h), -1))


def _as_it_is(x: Array) -> Array:
    return x


def dense(
    architecture: Architecture,
    in_features: int,
    width: int,
    outputs: int,
    rngs: nnx.Rngs,
    **options: Any,
) -> Network:
    """The network of inputs `(n, in_features)`; `options` are those of `nt_deq.flax.DEQ`."""
    deq = architecture.deq(in_features, width, parameterization="ntk", rngs=rngs, **options)
    return Network(deq, nt_deq.flax.Dense(width, outputs, rngs=rngs), _as_it_is)


def conv(
    architecture: Architecture,
    shape: tuple[int, int, int],
    channels: int,
    outputs: int,
    rngs: nnx.Rngs,
    kernel_size: int = 3,
    **options: Any,
) -> Network:
    """A network of images: strided convolutions, normalised, a convolutional DEQ, and a readout.

    The convolutions halve the image until no side has more than `PIXELS` pixels. All layers are in
    standard parameterisation, so that one learning rate fits them.

    Args:
      architecture: of the DEQ.
      shape: of an image, `(height, width, colours)`.
      channels: of the state of the DEQ.
      outputs: number of outputs.
      rngs: draws the parameters.
      kernel_size: of the DEQ's filters, along a side.
      options: of `nt_deq.flax.DEQ`.
    """
    *sides, features = shape
    halvings = max(0, math.ceil(math.log2(max(sides) / PIXELS)))
    stride, stem = 2 if halvings else 1, []
    for left in reversed(range(max(halvings, 1))):
        wide = max(1, channels >> left)
        filters = (3, 3) if stem else (5, 5)
        stem += [nnx.Conv(features, wide, filters, strides=stride, rngs=rngs), jax.nn.relu]
        features = wide
        sides = [-(-side // stride) for side in sides]
    stem[-1] = nnx.GroupNorm(channels, num_groups=math.gcd(channels, 8), rngs=rngs)
    deq = architecture.deq(
        channels,
        channels,
        kernel_size=(kernel_size, kernel_size),
        parameterization="standard",
        rngs=rngs,
        **options,
    )
    readout = nnx.Linear(math.prod(sides) * channels, outputs, rngs=rngs)
    return Network(deq, readout, nnx.Sequential(*stem))


def empirical_ntk(architecture: Architecture, network: Network, x: Array) -> Array:
    """The NTK of one finite `dense` network for inputs `x`, averaged over its outputs, `(n, n)`.

    The derivative by a weight is what it multiplies times `δ`, the derivative by what it adds to:
    `Θ(x, x') = (W_std²/n h·h' + U_std²/d x·x' + b_std²) δ·δ' + h·h'/n`, and no Jacobian of the
    weights is held. Entries of an input without an equilibrium are NaN.
    """
    deq = network.deq
    z = deq.equilibrium(x)

    def outputs(added):
        return network.read(nt_deq.equilibrium(lambda z, added: deq.step(z, x) + added, z, added))

    f, pull_back = jax.vjp(outputs, jnp.zeros_like(z))
    one_hot = jnp.eye(f.shape[1], dtype=f.dtype)
    (delta,) = jax.vmap(lambda output: pull_back(jnp.broadcast_to(output, f.shape)))(one_hot)

    def mean_products(a):
        return jnp.matmul(a, a.mT, precision="highest") / a.shape[-1]

    hidden = mean_products(deq.activation.fn(z))
    injected = architecture.U_std**2 * mean_products(x) + architecture.b_std**2
    by_z = jnp.mean(mean_products(delta), axis=0) * z.shape[1]
    return (architecture.W_std**2 * hidden + injected) * by_z + hidden


@dataclass(frozen=True, eq=False)
class Ensemble:
    """`dense` networks of one width as functions of their parameters; they share `graph`."""

    graph: Any

    def one(self, params: Any) -> Network:
        """The network with parameters `params`."""
        return nnx.merge(self.graph, params)

    def forward(self, params: Any, x: Array, z0: Array) -> tuple[Array, Array]:
        """What one network makes of `x`, as of `Network`."""
        return self.one(params)(x, z0)

    def of_each(
        self, method: Callable[[Network], Any], one_by_one: bool = False
    ) -> Callable[[Any], Any]:
        """A compiled function of the parameters of all: `method(network)` of every network."""

        def of_one(params):
            return method(self.one(params))

        return jax.jit(partial(jax.lax.map, of_one) if one_by_one else jax.vmap(of_one))


def draw(
    architecture: Architecture, in_features: int, width: int, outputs: int, seeds: int, seed: int
) -> tuple[Ensemble, Any]:
    """Draws `seeds` networks at random; returns them and their parameters, on a leading axis."""

    def network(key):
        return dense(architecture, in_features, width, outputs, nnx.Rngs(params=key))

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), width), seeds)
    graph, _ = nnx.split(nnx.eval_shape(lambda: network(keys[0])))
    return Ensemble(graph), jax.vmap(lambda key: nnx.split(network(key))[1])(keys)
