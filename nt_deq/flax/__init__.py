"""Finite networks as `flax.nnx` modules, the functions of the stax layers of the same names."""

from nt_deq.flax.convert import from_stax, functional, to_stax
from nt_deq.flax.deq import DEQ, FixedPoint
from nt_deq.flax.layers import Conv, Dense
from nt_deq.flax.ode import NeuralODE

__all__ = [
    "DEQ",
    "Conv",
    "Dense",
    "FixedPoint",
    "NeuralODE",
    "from_stax",
    "functional",
    "to_stax",
]
