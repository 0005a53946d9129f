"""A convolution whose derivatives are convolutions in the layout of the forward pass.

JAX transposes `lax.conv_general_dilated` into one that swaps the channels of the filter by its
dimension numbers. In a loop XLA computes that on a CPU without its fast kernels, 30 to 100 times
slower than the forward pass, and the derivative by the filter slower still; the backward pass of a
deep equilibrium model is such a loop. This primitive swaps the channels of the array instead, and
`with_fast_transposes` puts it in place of the convolutions of any function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from typing import TypeAlias, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float, PyTree

_T = TypeVar("_T")

Precision: TypeAlias = lax.Precision | tuple[lax.Precision, lax.Precision] | None
Padding: TypeAlias = tuple[tuple[int, int], ...]  # before and after, of each spatial axis


def convolve(
    x: Float[Array, "batch *_ in_features"],
    W: Float[Array, "*_ in_features out_features"],
    padding: Sequence[tuple[int, int]],
    precision: Precision = lax.Precision.HIGHEST,
) -> Float[Array, "batch *_ out_features"]:
    """`y(p) = Σ_q x(p + q - before) W(q)`, with zeros around `x`.

    Differentiable in both, to any order, in forward and in reverse mode.

    Args:
      x: `(batch, ..., in_features)`, with one to three spatial axes.
      W: the filter, `(..., in_features, out_features)`.
      padding: how many zeros go before and after each spatial axis, fewer than the filter is long.
      precision: of the products, as of `lax.conv_general_dilated`.
    """
    return _convolve.bind(x, W, padding=tuple(padding), precision=precision)


def with_fast_transposes(fn: Callable[..., _T]) -> Callable[..., _T]:
    """`fn`, with `convolve` for its convolutions of stride 1; the same values.

    Those within loops and custom derivatives of `fn` stay as they are.
    """

    def changed(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.structure(shape).unflatten(out)

    return changed


def _evaluate(jaxpr: Jaxpr, consts: Sequence[PyTree], args: Sequence[PyTree]) -> list[PyTree]:
    """Runs the equations of a jaxpr, as `jax.core.eval_jaxpr` does, but for convolutions."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands, params = [read(atom) for atom in equation.invars], equation.params
        if equation.primitive is lax.conv_general_dilated_p and _is_plain(params, operands[1]):
            out = [_replaced(operands[0], operands[1], params)]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = params["jaxpr"]
            out = _evaluate(inner.jaxpr, inner.consts, operands)
        else:
            atoms = [atom for atom in equation.invars if not isinstance(atom, Literal)]
            alone = jaxpr.replace(
                constvars=[], invars=atoms, outvars=equation.outvars, eqns=[equation]
            )
            out = jax.core.eval_jaxpr(alone, [], *map(read, atoms))
        values.update(zip(equation.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_plain(params: dict[str, PyTree], W: Array) -> bool:
    """Whether a convolution of lax with these parameters is one of `convolve`."""
    sizes = [W.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    strides = (*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"])
    groups = params["feature_group_count"], params["batch_group_count"]
    return (
        {*strides, *groups} == {1}
        and params["preferred_element_type"] in (None, W.dtype)
        and 1 <= len(sizes) <= 3
        and all(
            0 <= count < size
            for size, around in zip(sizes, params["padding"], strict=True)
            for count in around
        )
    )


def _replaced(x: Array, W: Array, params: dict[str, PyTree]) -> Array:
    """The same by `convolve`."""
    numbers = params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    out_features, in_features, *taps = numbers.rhs_spec
    y = convolve(
        jnp.transpose(x, (batch, *space, features)),
        jnp.transpose(W, (*taps, in_features, out_features)),
        [(int(before), int(after)) for before, after in params["padding"]],
        params["precision"],
    )
    batch, features, *space = numbers.out_spec
    return jnp.moveaxis(y, range(y.ndim), (batch, *space, features))


def _forward(x: Array, W: Array, *, padding: Padding, precision: Precision) -> Array:
    space = "DHW"[: len(padding)]
    return lax.conv_general_dilated(
        x,
        W,
        window_strides=(1,) * len(padding),
        padding=padding,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision=precision,
    )


def _by_taps(x: Array, W: Array, *, padding: Padding, precision: Precision) -> Array:
    """The same as a sum of matrix products, which vectorises over filters too."""
    product_precision = precision[0] if isinstance(precision, tuple) else precision
    padded = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    sizes = W.shape[:-2]
    lengths = [n - size + 1 for n, size in zip(padded.shape[1:-1], sizes, strict=True)]

    def tap(*start):
        moved = padded
        for axis, (i, n) in enumerate(zip(start, lengths, strict=True), 1):
            moved = lax.slice_in_dim(moved, i, i + n, axis=axis)
        return jnp.matmul(moved, W[start], precision=product_precision)

    return reduce(jnp.add, [tap(*start) for start in product(*map(range, sizes))])


def _transpose_x(cotangent: Array, x, W: Array, *, padding: Padding, precision: Precision) -> Array:
    """The derivative by `x`: a convolution with the reversed filter."""
    del x
    flipped = jnp.swapaxes(jnp.flip(W, range(W.ndim - 2)), -2, -1)
    around = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(W.shape[:-2], padding, strict=True)
    ]
    return convolve(cotangent, flipped, around, precision)


def _transpose_W(cotangent: Array, x: Array, W, *, padding: Padding, precision: Precision) -> Array:
    """The derivative by the filter: a convolution with the cotangent, of the batch for channels."""
    del W
    x, cotangent = jnp.swapaxes(x, 0, -1), jnp.moveaxis(cotangent, 0, -2)
    taps = convolve(x, cotangent, padding, precision)
    return jnp.moveaxis(taps, 0, -2)


def _batch(arguments, axes, **params) -> tuple[Array, int]:
    """Batches of inputs are larger batches; filters of their own go by taps."""
    (x, W), (x_axis, W_axis) = arguments, axes
    if W_axis is None:  # not mapped over
        x = jnp.moveaxis(x, x_axis, 0)
        flat = x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
        y = convolve(flat, W, **params)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    return jax.vmap(partial(_by_taps, **params), (x_axis, W_axis))(x, W), 0


_convolve = Primitive("nt_deq_convolve")
_convolve.def_impl(jax.jit(_forward, static_argnames=("padding", "precision")))
_convolve.def_abstract_eval(
    lambda x, W, **params: _abstract(jax.eval_shape(partial(_forward, **params), x, W))
)
mlir.register_lowering(_convolve, mlir.lower_fun(_forward, multiple_results=False))
ad.defbilinear(_convolve, _transpose_x, _transpose_W)
batching.primitive_batchers[_convolve] = _batch


def _abstract(struct: jax.ShapeDtypeStruct) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(struct.shape, struct.dtype)
