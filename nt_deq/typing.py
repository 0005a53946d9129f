"""The types that the rest of the package speaks in."""

from __future__ import annotations

from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    overload,
    runtime_checkable,
)

import numpy as np
from jax import Array
from jaxtyping import Num, PyTree

if TYPE_CHECKING:
    import neural_tangents as nt

Number: TypeAlias = float | Num[Array | np.ndarray | np.number, ""]
"""A number, or one that is traced."""

Get: TypeAlias = Literal["nngp", "ntk"]
"""Which kernel of a network: that of the network at initialisation, or of its training."""

KernelFn: TypeAlias = Callable[[Array, Array | None, Get], PyTree]
"""A kernel that is asked for, `(x1, x2, get) -> (n1, n2)`: neural-tangents types that as a tree."""

JSON: TypeAlias = PyTree[str | bool | float | None]
"""What a JSON file can say."""

Batch: TypeAlias = Array | np.ndarray
"""Inputs of a network, `(n, ...)`."""

MakeKernel: TypeAlias = Callable[[dict[str, PyTree]], KernelFn]
"""Makes a kernel of hyper-parameters."""


class Kernels(NamedTuple):
    """What a layer's `kernel_fn` gives for `get=("nngp", "ntk")`, `(n1, n2, ...)` each."""

    nngp: Array
    ntk: Array


@runtime_checkable
class InitFn(Protocol):
    """Makes the parameters of a finite network: `(rng, input_shape) -> (output_shape, params)`."""

    def __call__(
        self, rng: Array, input_shape: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree]: ...


@runtime_checkable
class ApplyFn(Protocol):
    """The finite network, `(params, inputs) -> outputs`; `rng` and masks are options."""

    def __call__(self, params: PyTree, inputs: PyTree, **kwargs: PyTree) -> Array: ...


@runtime_checkable
class LayerKernelFn(Protocol):
    """The kernel of a layer: of inputs what `get` names, of a `neural_tangents.Kernel` the next."""

    @overload
    def __call__(
        self, x1: Batch | nt.Kernel, x2: Batch | None = None, get: None = None, **kwargs: PyTree
    ) -> nt.Kernel: ...

    @overload
    def __call__(self, x1: Batch, x2: Batch | None, get: str, **kwargs: PyTree) -> Array: ...

    @overload
    def __call__(
        self, x1: Batch, x2: Batch | None = None, *, get: str, **kwargs: PyTree
    ) -> Array: ...

    @overload
    def __call__(
        self, x1: Batch, x2: Batch | None, get: tuple[Get, Get], **kwargs: PyTree
    ) -> Kernels: ...

    @overload
    def __call__(
        self, x1: Batch, x2: Batch | None = None, *, get: tuple[Get, Get], **kwargs: PyTree
    ) -> Kernels: ...

    @overload  # as neural-tangents asks for it
    def __call__(
        self, x1: PyTree, x2: PyTree = None, get: str | tuple[str, ...] | None = None, **kwargs
    ) -> PyTree: ...


AnyLayer: TypeAlias = tuple[Callable[..., PyTree], Callable[..., PyTree], Callable[..., PyTree]]
"""A layer that is asked for, of neural-tangents too."""

Layer: TypeAlias = tuple[InitFn, ApplyFn, LayerKernelFn]
"""A layer that is made, with one input and one output: `(init_fn, apply_fn, kernel_fn)`."""
