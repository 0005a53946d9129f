"""Finite networks as `flax.nnx` modules, the functions of the stax layers of the same names."""

from nt_deq.flax.convert import from_stax, functional, to_stax
from nt_deq.flax.deq import DEQ, FixedPoint
from nt_deq.flax.layers import Conv, Dense

__all__ = ["DEQ", "Conv", "Dense", "FixedPoint", "from_stax", "functional", "to_stax"]
