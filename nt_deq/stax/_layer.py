"""What makes a layer: its `kernel_fn` goes by tiles, in full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import jax
import neural_tangents as nt
from neural_tangents import stax as _nt_stax

from nt_deq.kernels.tiled import tiled_by
from nt_deq.typing import AnyLayer, Layer, LayerKernelFn

_P = ParamSpec("_P")
_Fn = TypeVar("_Fn", bound=Callable)


def full_precision(fn: _Fn) -> _Fn:
    """Makes the products in a function exact: a TPU's default keeps 8 bits."""

    @wraps(fn)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return cast(_Fn, wrapped)


def with_exact_kernel(make: Callable[_P, AnyLayer], least: int = 1) -> Callable[_P, Layer]:
    """A layer whose `kernel_fn` goes by tiles, in full precision, that of `x·xᵀ` included.

    Args:
      make: gives the layer; of one made of others, some of its arguments are layers.
      least: inputs a side that its tiles have; or those of the layers that it is made of.
    """

    @wraps(make)
    def wrapped(*args, **kwargs):
        init_fn, apply_fn, kernel_fn = make(*args, **kwargs)
        parts = [
            getattr(each[2], "least", 1)
            for each in args
            if isinstance(each, tuple) and len(each) == 3
        ]
        return init_fn, apply_fn, tiled_by(full_precision(kernel_fn), max([least, *parts]))

    return wrapped


def layer(make: Callable[_P, AnyLayer]) -> Callable[_P, Layer]:
    """Lets the `kernel_fn` of a new layer take inputs too, in full precision."""
    return with_exact_kernel(_nt_stax.layer(make))


def solving_layer(make: Callable[_P, AnyLayer]) -> Callable[_P, Layer]:
    """`layer` of one that solves an equation for every input of a tile, before those of its pairs.

    With one pair of images a tile those are two equations a pair, as dear as its own; with 2 × 2
    one.
    """
    return with_exact_kernel(_nt_stax.layer(make), least=2)


def requires(**requirements) -> Callable[[Callable[..., nt.Kernel]], LayerKernelFn]:
    """Says what a new layer's `kernel_fn` needs of its kernel; `layer` does the rest."""
    return cast(Callable, _nt_stax.requires(**requirements))
