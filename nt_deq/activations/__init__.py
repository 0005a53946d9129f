"""Activation functions with their exact Gaussian expectations."""

from nt_deq.activations.activation import ACTIVATIONS, Activation, get_activation, piecewise_linear

__all__ = ["ACTIVATIONS", "Activation", "get_activation", "piecewise_linear"]
