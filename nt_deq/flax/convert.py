"""Modules as functions of their parameters, for neural-tangents and its stax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from nt_deq.errors import ArgumentError
from nt_deq.flax.deq import DEQ, Hidden
from nt_deq.flax.layers import Conv, Dense
from nt_deq.flax.tied import Tied
from nt_deq.typing import ApplyFn


def functional(module: nnx.Module) -> tuple[ApplyFn, PyTree]:
    """Turns a module into a function of its parameters, as neural-tangents takes it.

    `apply_fn` works with `nt.empirical_ntk_fn`, `nt.empirical_nngp_fn`, `nt.linearize` and every
    JAX transformation.

    Args:
      module: any `nnx.Module`; it is not changed.

    Returns:
      `(apply_fn, params)` with `apply_fn(params, x) == module(x)`. Keyword arguments of `apply_fn`
      that neural-tangents passes on (`rng`) are not for the module and are dropped.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply_fn(params: PyTree, inputs: PyTree, **kwargs: PyTree) -> Array:
        del kwargs
        return nnx.merge(graphdef, params, rest)(inputs)

    return apply_fn, params


def to_stax(module: nnx.Module) -> PyTree:
    """Returns the parameters of a module as the stax layer of the same function takes them.

    Args:
      module: a `Dense`, `Conv`, `DEQ`, or a `FixedPoint`, `NeuralODE` or `nnx.Sequential` of these
        and of functions without parameters.

    Returns:
      The `params` of `apply_fn(params, x)` of `stax.Dense`, `Conv`, `DEQ`, `FixedPoint`,
      `NeuralODE`, `serial`. Those of a `DEQ` with `kernel_size` are for
      `serial(FixedPoint(...), φ)`.

    Raises:
      ValueError: the module is of another kind.
    """
    return jax.tree.map(_params, _layers(module), is_leaf=_is_linear)


def from_stax(module: nnx.Module, params: PyTree) -> None:
    """Gives a module, in place, the parameters of the stax layer of the same function.

    Args:
      module: as of `to_stax`.
      params: what `init_fn` of the stax layer returned, or training made of it.

    Raises:
      ValueError: `params` has another structure or other shapes.
    """
    layers, tree = jax.tree.flatten(_layers(module), is_leaf=_is_linear)
    expected, found = _shapes(to_stax(module)), _shapes(params)
    if found != expected:
        raise ArgumentError(f"params have the shapes {found}; this module takes {expected}.")
    for layer, pair in zip(layers, tree.flatten_up_to(params), strict=True):
        old, structure = jax.tree.flatten(nnx.state(layer, nnx.Param))  # W and b, in this order
        new = [jnp.reshape(p, q.shape) for p, q in zip(jax.tree.leaves(pair), old, strict=True)]
        nnx.update(layer, structure.unflatten(new))


def _shapes(params: PyTree) -> PyTree:
    """Without the axes of size 1, of which a bias has as many as the inputs have axes."""
    return jax.tree.map(lambda p: tuple(size for size in jnp.shape(p) if size != 1), params)


def _layers(module: object) -> PyTree:
    """The Dense and Conv layers of a module, nested as the parameters of stax: serial's a list."""
    match module:
        case Dense() | Conv():
            return module
        case DEQ() if isinstance(module.hidden, Dense):
            return module.hidden, module.inject
        case DEQ():
            return [(_layers(module.cell), module.inject), ()]
        case Tied():
            return _layers(module.cell), _layers(module.inject)
        case Hidden():
            return [(), module.linear]
        case nnx.Sequential():
            return [_layers(layer) for layer in module.layers]
        case nnx.Module() if jax.tree.leaves(nnx.state(module)):
            raise ArgumentError(
                f"{type(module).__name__} has no stax layer of the same function: use Dense, Conv, "
                "DEQ, FixedPoint, NeuralODE and nnx.Sequential."
            )
    return ()


def _is_linear(module: object) -> bool:
    return isinstance(module, Dense | Conv)


def _params(layer: Dense | Conv) -> tuple[Array, Array | None]:
    W = layer.W[...]
    if layer.b_std is None:
        return W, None
    b = layer.b[...]
    return W, b.reshape((1,) * (W.ndim - 1) + b.shape)
