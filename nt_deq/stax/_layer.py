"""What makes a layer: its `kernel_fn` goes by tiles, in full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import jax
import neural_tangents as nt
from neural_tangents import stax as _nt_stax

from nt_deq.kernels.tiled import tiled
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


def with_exact_kernel(make: Callable[_P, AnyLayer]) -> Callable[_P, Layer]:
    """A layer whose `kernel_fn` goes by tiles, in full precision, that of `x·xᵀ` included."""

    @wraps(make)
    def wrapped(*args, **kwargs):
        init_fn, apply_fn, kernel_fn = make(*args, **kwargs)
        return init_fn, apply_fn, tiled(full_precision(kernel_fn))

    return wrapped


def layer(make: Callable[_P, AnyLayer]) -> Callable[_P, Layer]:
    """Lets the `kernel_fn` of a new layer take inputs too, in full precision."""
    return with_exact_kernel(_nt_stax.layer(make))


def requires(**requirements) -> Callable[[Callable[..., nt.Kernel]], LayerKernelFn]:
    """Says what a new layer's `kernel_fn` needs of its kernel; `layer` does the rest."""
    return cast(Callable, _nt_stax.requires(**requirements))
