"""The convolution of a covariance, as sums of its shifts.

The weights of a filter are independent, so that the covariance of a convolution's output is a mean,

    C'(p, q) = 1/|F| Σ_{d ∈ F} C(p + d, q + d)

with the filter `F` a box: along each axis a sum of shifts, of both copies of the axis at once.
neural-tangents calls XLA's convolution, which on a CPU takes 20 times as long for a few images.
Everything else of the layer is neural-tangents' own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float
from neural_tangents._src.stax import linear

from nt_deq.kernels.fusion import computed_once
from nt_deq.typing import Number


def _convolve(
    covariance: Float[Array, "*shape"] | None,
    filter_shape: Sequence[int],
    strides: Sequence[int],
    padding: linear.Padding,
    batch_ndim: int,
    copies: int,
) -> Float[Array, "*out"] | None:
    """The covariance of a convolution's output.

    Args:
      covariance: `(n1, [n2,] h, h, w, w, ...)`, or with one copy `(n1, [n2,] h, w, ...)`; a scalar
        or `None` stays.
      filter_shape: `(h, w, ...)`.
      strides: likewise.
      padding: SAME, VALID or CIRCULAR.
      batch_ndim: how many axes come before those of positions.
      copies: 2 of all pairs of positions, 1 of each with itself.
    """
    if covariance is None or covariance.ndim == 0:
        return covariance
    for i, (size, stride) in enumerate(zip(filter_shape, strides, strict=True)):
        first = batch_ndim + copies * i
        axes = range(first, first + copies)
        total = _sum_of_shifts(computed_once(covariance), axes, size, stride, padding)
        covariance = total / size
    return covariance


full_spatial, diagonal_spatial = partial(_convolve, copies=2), partial(_convolve, copies=1)


def _sum_of_shifts(
    a: Array, axes: Sequence[int], size: int, stride: int, padding: linear.Padding
) -> Array:
    """`Σ_{d < size} a[.., stride p + d, ..]` along all of the axes, which have one length."""
    length = a.shape[axes[0]]
    if padding != linear.Padding.VALID:
        ((low, high),) = lax.padtype_to_pads((length,), (size,), (stride,), "SAME")
        widths = [(low, high) if axis in axes else (0, 0) for axis in range(a.ndim)]
        a = jnp.pad(a, widths, mode="wrap" if padding == linear.Padding.CIRCULAR else "constant")
        length += low + high
    end = length - size  # the last start of the filter, or beyond it by less than a stride

    def shift(d):
        index = [slice(None)] * a.ndim
        for axis in axes:
            index[axis] = slice(d, end + d + 1, stride)
        return a[tuple(index)]

    return sum(map(shift, range(1, size)), shift(0))


def _with_shifts(make: Callable) -> Callable:
    """A function of neural-tangents that finds the convolutions above under its names for them."""
    names = {
        "_conv_kernel_full_spatial_shared": full_spatial,
        "_conv_kernel_diagonal_spatial": diagonal_spatial,
    }
    return types.FunctionType(make.__code__, vars(linear) | names, make.__name__)


_conv = _with_shifts(linear._Conv)


def convolution(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: str,
    W_std: Number,
    b_std: Number | None,
    dimension_numbers: tuple[str, str, str] | None,
    parameterization: str,
    s: tuple[int, int],
) -> Any:
    """neural-tangents' `Conv` before its decorators, with these sums in it, and a `mask_fn`.

    It leaves the spatial axes as they are, where neural-tangents' turns their order around. That
    one it is where axes are named, which it may exchange.
    """
    make: Any = _conv if dimension_numbers is None else linear._Conv
    layer = make(
        out_chan, filter_shape, strides, padding, W_std, b_std, dimension_numbers,
        parameterization, s, transpose=False, shared_weights=True,
    )  # fmt: skip
    if dimension_numbers is not None:
        return layer
    init_fn, apply_fn, kernel_fn, mask_fn = layer

    def in_order(k, **kwargs):
        return kernel_fn(k, **kwargs).replace(is_reversed=k.is_reversed)

    vars(in_order).update(vars(kernel_fn))
    return init_fn, apply_fn, in_order, mask_fn
