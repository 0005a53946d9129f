"""A convolution whose derivatives are convolutions in the layout of the forward pass.

JAX transposes `lax.conv_general_dilated` into one that swaps the channels of the filter by its
dimension numbers. In a loop XLA computes that on a CPU without its fast kernels, 30 to 100 times
slower than the forward pass, and the derivative by the filter slower still; a backward pass of a
deep equilibrium model is such a loop. This primitive swaps the channels of the array instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import product

import jax
import jax.core
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Padding = tuple[tuple[int, int], ...]  # before and after, of each spatial axis


def convolve(x: Array, W: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """`y(p) = Σ_q x(p + q - before) W(q)`, with zeros around `x`; at full precision.

    Differentiable in both, to any order, in forward and in reverse mode.

    Args:
      x: `(batch, ..., in_features)`, with one or two spatial axes.
      W: the filter, `(..., in_features, out_features)`.
      padding: how many zeros go before and after each spatial axis, fewer than the filter is long.
    """
    return _convolve.bind(x, W, padding=tuple(padding))


def _forward(x: Array, W: Array, *, padding: Padding) -> Array:
    space = "HW"[: len(padding)]
    return lax.conv_general_dilated(
        x,
        W,
        window_strides=(1,) * len(padding),
        padding=padding,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision="highest",
    )


def _by_taps(x: Array, W: Array, *, padding: Padding) -> Array:
    """The same as a sum of matrix products, which vectorises over filters too."""
    padded = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    sizes = W.shape[:-2]
    lengths = [n - size + 1 for n, size in zip(padded.shape[1:-1], sizes, strict=True)]

    def tap(*start):
        moved = padded
        for axis, (i, n) in enumerate(zip(start, lengths, strict=True), 1):
            moved = lax.slice_in_dim(moved, i, i + n, axis=axis)
        return jnp.matmul(moved, W[start], precision="highest")

    return reduce(jnp.add, [tap(*start) for start in product(*map(range, sizes))])


def _transpose_x(cotangent: Array, x, W: Array, *, padding: Padding) -> Array:
    """The derivative by `x`: a convolution with the reversed filter."""
    del x
    flipped = jnp.swapaxes(jnp.flip(W, range(W.ndim - 2)), -2, -1)
    around = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(W.shape[:-2], padding, strict=True)
    ]
    return convolve(cotangent, flipped, around)


def _transpose_W(cotangent: Array, x: Array, W, *, padding: Padding) -> Array:
    """The derivative by the filter: a convolution with the cotangent, of the batch for channels."""
    del W
    taps = convolve(jnp.swapaxes(x, 0, -1), jnp.moveaxis(cotangent, 0, -2), padding)
    return jnp.moveaxis(taps, 0, -2)


def _batch(arguments, axes, *, padding: Padding) -> tuple[Array, int]:
    """Batches of inputs are larger batches; filters of their own go by taps."""
    (x, W), (x_axis, W_axis) = arguments, axes
    if W_axis is None:  # not mapped over
        x = jnp.moveaxis(x, x_axis, 0)
        flat = x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
        y = convolve(flat, W, padding)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    return jax.vmap(partial(_by_taps, padding=padding), (x_axis, W_axis))(x, W), 0


_convolve = Primitive("nt_deq_convolve")
_convolve.def_impl(jax.jit(_forward, static_argnames="padding"))
_convolve.def_abstract_eval(
    lambda x, W, *, padding: _abstract(jax.eval_shape(partial(_forward, padding=padding), x, W))
)
mlir.register_lowering(_convolve, mlir.lower_fun(_forward, multiple_results=False))
ad.defbilinear(_convolve, _transpose_x, _transpose_W)
batching.primitive_batchers[_convolve] = _batch


def _abstract(struct: jax.ShapeDtypeStruct) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(struct.shape, struct.dtype)
