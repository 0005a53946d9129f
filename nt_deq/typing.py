"""The types that the rest of the package speaks in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from jax import Array
from jaxtyping import Num

Get: TypeAlias = Literal["nngp", "ntk"]
"""Which kernel of a network: that of the network at initialisation, or of its training."""

KernelFn: TypeAlias = Callable[..., Any]
"""The kernel of a stax network, `(x1, x2, get) -> (n1, n2)`."""

Layer: TypeAlias = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""A layer of `neural_tangents.stax`: `(init_fn, apply_fn, kernel_fn)`."""

Real: TypeAlias = float | Num[Array, ""]
"""A number, or one that is traced."""
