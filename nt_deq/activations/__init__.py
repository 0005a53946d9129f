"""Activation functions with their exact Gaussian expectations."""

from nt_deq.activations.activation import (
    ACTIVATIONS,
    Activation,
    Phi,
    get_activation,
    piecewise_linear,
)

__all__ = ["ACTIVATIONS", "Activation", "Phi", "get_activation", "piecewise_linear"]
