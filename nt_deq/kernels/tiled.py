"""The kernel of a whole network, tile by tile of pairs.

Every layer of a network reads and writes arrays of the size of the kernel. No pair of inputs enters
another's kernel, so a tile of pairs goes through all layers at once, `x·xᵀ` included: what the
layers keep is then of the size of a tile and stays in the processor's cache, and a kernel of inputs
with themselves costs half of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import cast

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array
from jaxtyping import PyTree
from neural_tangents import stax

from nt_deq import _checks
from nt_deq.kernels.tiles import by_tiles, fits, mirrored
from nt_deq.typing import LayerKernelFn

_PARTS = frozenset({"nngp", "ntk"})  # what belongs to pairs


def tiled(kernel_fn: Callable[..., PyTree]) -> LayerKernelFn:
    """Lets the `kernel_fn` of a network of stax layers compute its kernels tile by tile of pairs.

    The results are the same; where an input meets itself `x·x` is the very number that its variance
    is, so that the diagonal is exact. Memory holds the results and a few MB. Everything in
    `nt_deq.stax` is tiled already; this is for networks of `neural_tangents.stax`.

    A call goes by tiles where it asks for `'nngp'`, `'ntk'` or both of two batches of inputs, of
    which one is larger than a tile (320 vectors on a CPU). All else goes whole: smaller batches, a
    `neural_tangents.Kernel`, `get=None` and other parts of it, options (`mask_constant`, `pattern`,
    `diagonal_batch`, `diagonal_spatial`), networks that need the covariances between the inputs of
    one batch, and those whose first axis is not the batch.

    Args:
      kernel_fn: the third function of a stax layer or network.

    Returns:
      The same function; `nt.batch`, `nt.predict` and the transformations of JAX take it as before.
      In reverse mode a tile is computed again instead of being kept.
    """
    return tiled_by(kernel_fn, 1)


def tiled_by(kernel_fn: Callable[..., PyTree], least: int) -> LayerKernelFn:
    """`tiled`, by tiles of at least so many inputs a side."""
    if hasattr(kernel_fn, "least"):
        return cast(LayerKernelFn, kernel_fn)
    network = _Network(kernel_fn, least)

    @wraps(kernel_fn)
    def wrapped(x1, x2=None, get=None, **kwargs):
        if get is None or (block := network.block(x1, x2, get, kwargs)) is None:
            return kernel_fn(x1, x2, get, **kwargs)
        return network(x1, None if x2 is x1 else x2, get, block)

    vars(wrapped)["least"] = least
    return cast(LayerKernelFn, wrapped)


class _Network:
    """A `kernel_fn` and its compiled programs."""

    def __init__(self, kernel_fn: Callable[..., PyTree], least: int):
        requirements = vars(kernel_fn).get("input_req", {})
        self.kernel_fn, self.least = kernel_fn, least
        self.batch_first = requirements.get("batch_axis", 0) == 0
        self.inputs = _inputs(**requirements)[2]
        self.pairs = jax.jit(self._pairs, static_argnames=("with_ntk", "symmetric"))
        self.whole = jax.jit(self._whole, static_argnames=("get", "block"))

    def block(
        self, x1: PyTree, x2: PyTree, get: str | tuple[str, ...], kwargs: dict[str, PyTree]
    ) -> int | None:
        """How many entries a pair of inputs has, or `None` where a call does not go by tiles."""
        if any(value is not None for value in kwargs.values()):
            return None
        if not _PARTS.issuperset(_names(get)):
            return None
        x2 = x1 if x2 is None else x2
        arrays = [jax.tree.leaves(batch, is_leaf=_is_kernel) for batch in (x1, x2)]
        if not self.batch_first or not all(_is_batch(a) for side in arrays for a in side):
            return None
        if not all(side and len({len(a) for a in side}) == 1 for side in arrays):
            return None  # neural-tangents says what is wrong
        one, other = (jax.tree.map(lambda a: a[:1], x) for x in (x1, x2))
        k = jax.eval_shape(lambda x1, x2: self.inputs(x1, x2, None), one, other)
        kernels = jax.tree.leaves(k, is_leaf=_is_kernel)
        if not all(k.diagonal_batch for k in kernels):
            return None
        block = max(k.nngp.size for k in kernels)
        return None if fits([len(side[0]) for side in arrays], block, self.least) else block

    def __call__(self, x1: PyTree, x2: PyTree, get: str | tuple[str, ...], block: int) -> PyTree:
        """What `get` names of the kernel, as neural-tangents returns it."""
        get = get if isinstance(get, str) else tuple(get)
        kernel, lost = self.whole(x1, x2, get=get, block=block)
        if not _checks.is_traced(lost) and lost:
            self._raise(x1, x2, get, jax.tree.leaves(kernel)[0])
        return kernel

    def _whole(self, x1, x2, *, get, block):
        """The kernel, and whether any number of it is NaN."""
        parts, symmetric = _names(get), x2 is None
        pairs = partial(self.pairs, with_ntk="ntk" in parts, symmetric=symmetric)

        @partial(jax.checkpoint, prevent_cse=False)
        def tile(rows, columns, _):
            kernels = jax.tree.leaves(pairs(rows, columns), is_leaf=_is_kernel)
            found = [tuple(getattr(k, part) for part in parts) for k in kernels]
            lost = [jnp.any(jnp.isnan(a)) for a in jax.tree.leaves(found)]
            return found, jnp.any(jnp.stack(lost))

        rows = _side(x1)
        columns = rows if symmetric else _side(x2)
        one = jax.eval_shape(pairs, *(jax.tree.map(lambda a: a[:1], s) for s in (rows, columns)))
        kernels, tree = jax.tree.flatten(one, is_leaf=_is_kernel)
        diagonal = all(k.diagonal_spatial for k in kernels)
        mirror = partial(mirrored, diagonal) if symmetric else None
        found, lost = by_tiles(tile, rows, columns, None, mirror, block, self.least)
        kernels = [
            k.replace(**dict(zip(parts, arrays, strict=True)))
            for k, arrays in zip(kernels, found, strict=True)
        ]
        return stax.Identity()[2](tree.unflatten(kernels), None, get), lost

    def _pairs(self, rows, columns, *, with_ntk, symmetric):
        """The kernel of a tile of pairs."""
        (number1, x1), (number2, x2) = rows, columns
        same = symmetric & (number1[:, None] == number2[None, :])

        def own(k):
            where = same.reshape(*same.shape, *[1] * (k.nngp.ndim - 2))
            return k.replace(
                nngp=jnp.where(where, k.cov1[:, None], k.nngp),
                ntk=k.ntk if with_ntk else None,
                x1_is_x2=symmetric & (number1[0] == number2[0]),
            )

        return self.kernel_fn(jax.tree.map(own, self.inputs(x1, x2, None), is_leaf=_is_kernel))

    def _raise(self, x1: PyTree, x2: PyTree, get, kernel: Array) -> None:
        """Lets the layers say what is wrong with an eager kernel that has NaN in it, if anything.

        They are given the inputs of which all pairs are lost, with one other that has a pair.
        """
        blocks = np.isnan(np.asarray(kernel)).reshape(*kernel.shape[:2], -1)
        lost: np.ndarray = np.any(blocks, axis=2)
        if lost.all(axis=1).any():
            column = np.argmin(lost.sum(axis=0))
            self.kernel_fn(x1, _input(x1 if x2 is None else x2, column), get)
        row = np.argmin(np.where(lost.any(axis=1), lost.sum(axis=1), lost.size))
        columns = x1 if x2 is None else x2
        if not lost.all(axis=0).any():
            columns = _input(columns, np.argmax(lost[row]))
        self.kernel_fn(_input(x1, row), columns, get)


@stax.layer
def _inputs(**requirements):
    """A layer that leaves its kernel as it is, with the requirements of a network."""

    def init_fn(rng, input_shape, **kwargs):
        del rng, kwargs
        return input_shape, ()

    def apply_fn(params, inputs, **kwargs):
        del params, kwargs
        return inputs

    @stax.requires(**requirements)
    def kernel_fn(k, **kwargs):
        del kwargs
        return k

    return init_fn, apply_fn, kernel_fn


def _names(get: str | tuple[str, ...]) -> tuple[str, ...]:
    """As neural-tangents takes them."""
    return tuple(name.lower() for name in ((get,) if isinstance(get, str) else get))


def _is_kernel(leaf: PyTree) -> bool:
    return isinstance(leaf, nt.Kernel)


def _is_batch(leaf: PyTree) -> bool:
    return isinstance(leaf, (np.ndarray, Array)) and leaf.ndim > 1 and len(leaf) > 0


def _side(x: PyTree) -> PyTree:
    """Inputs with their numbers."""
    return jnp.arange(len(jax.tree.leaves(x)[0])), x


def _input(x: PyTree, number: np.integer) -> PyTree:
    """One of the inputs, as a batch."""
    return jax.tree.map(lambda a: a[number : number + 1], x)
