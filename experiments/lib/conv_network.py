"""The convolutional network of the classifier: a stem, a DEQ of few pixels, a readout."""

from __future__ import annotations

import math

import jax
from flax import nnx
from jax import Array

from experiments.lib.networks import Architecture, EquilibriumNetwork
from nt_deq.iterations import FixedPointSolver

PIXELS = 8  # along a side, that the DEQ works on at most


class ConvNetwork(EquilibriumNetwork):
    """Images through strided convolutions, group normalisation, a convolutional DEQ, and a readout.

    The convolutions of the stem halve the image until no side has more than `PIXELS` pixels. All
    layers are in standard parameterisation, so that one learning rate fits them.

    Args:
      architecture: of the DEQ.
      shape: of an image, `(height, width, colours)`.
      channels: of the state of the DEQ.
      outputs: number of outputs.
      rngs: draws the parameters.
      kernel_size: of the DEQ's filters, along a side.
      solver: finds the equilibrium, as in `nt_deq.flax.DEQ`.
      lipschitz: bounds the layer, as in `nt_deq.flax.DEQ`.
    """

    def __init__(
        self,
        architecture: Architecture,
        shape: tuple[int, int, int],
        channels: int,
        outputs: int,
        rngs: nnx.Rngs,
        kernel_size: int = 3,
        solver: FixedPointSolver | None = None,
        lipschitz: float | None = None,
    ):
        *sides, features = shape
        halvings = max(0, math.ceil(math.log2(max(sides) / PIXELS)))
        stride, stem = 2 if halvings else 1, []
        for left in reversed(range(max(halvings, 1))):
            wide = max(1, channels >> left)
            filters = (3, 3) if stem else (5, 5)
            stem += [nnx.Conv(features, wide, filters, strides=stride, rngs=rngs), jax.nn.relu]
            features = wide
            sides = [-(-side // stride) for side in sides]
        groups = math.gcd(channels, 8)
        stem[-1] = nnx.GroupNorm(channels, num_groups=groups, rngs=rngs)
        self.stem = nnx.Sequential(*stem)
        self.deq = architecture.deq(
            channels,
            channels,
            kernel_size=(kernel_size, kernel_size),
            parameterization="standard",
            solver=solver,
            lipschitz=lipschitz,
            rngs=rngs,
        )
        self.readout = nnx.Linear(math.prod(sides) * channels, outputs, rngs=rngs)

    def features(self, x: Array) -> Array:
        """What the stem makes of images, `(n, height, width, colours)`."""
        return self.stem(x)

    def read(self, z: Array) -> Array:
        """The outputs, `(n, C)`, of equilibria `z*`, `(n, ..., channels)`."""
        h = self.deq.activation.fn(z)
        return self.readout(h.reshape(len(h), -1))
