"""The pairs of a kernel as one list, in batches of the same size.

Those of every input with itself come first, for who needs what they say of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from nt_deq.fixed_point.implicit import select
from nt_deq.kernels.tiles import mirrored


class Batches(NamedTuple):
    """Batches of pairs: of all inputs with themselves first, then of two inputs.

    Attributes:
      first, second: the numbers of both inputs.
      own: whether both are the same, so that `C` gives its own variances; one number per batch.
      usable: whether it is a pair at all, with finite covariances.
      same: whether the inputs are the same, which the first batches solve, and `Dropout` must know.
      nngp, ntk: of `inject(x)`; the latter where it is asked for.
      mask1, mask2: of masked inputs, else `None`.
    """

    first: Int[Array, "*_ size"]
    second: Int[Array, "*_ size"]
    own: Bool[Array, "*_"]
    usable: Bool[Array, "*_ size"]
    same: Bool[Array, "*_ size"]
    nngp: Float[Array, "*_"]
    ntk: Float[Array, "*_"] | None
    mask1: Bool[Array, "*_"] | None
    mask2: Bool[Array, "*_"] | None


def batches(inject: nt.Kernel, size: int) -> tuple[Array, Batches]:
    """The covariances of all inputs with themselves, and batches of at most `size` pairs."""
    k, n1 = inject, inject.nngp.shape[0]
    rows, columns = _pairs(inject)
    symmetric = k.cov2 is None
    covariances, masks = k.cov1, k.mask1
    if k.cov2 is not None:
        covariances = jnp.concatenate([k.cov1, k.cov2])
        masks = _both_masks(k.mask1, k.mask2, k.nngp.shape[:2])
    own = np.arange(len(covariances))
    size = min(size, max(len(own), len(rows)))

    def split(*parts):
        parts = [
            jnp.concatenate([part, jnp.zeros((-len(part) % size, *part.shape[1:]), part.dtype)])
            for part in map(jnp.asarray, parts)
        ]
        whole = jnp.concatenate(parts)
        return whole.reshape(-1, size, *whole.shape[1:])

    finite = jnp.all(jnp.isfinite(covariances), axis=tuple(range(1, covariances.ndim)))
    usable = split(finite, jnp.ones(len(rows), bool))
    nngp = split(covariances, k.nngp[rows, columns])
    ntk = None
    if k.ntk is not None:
        of_own = jnp.zeros_like(covariances)
        if symmetric or n1 == k.nngp.shape[1]:  # of the first inputs, if the second are the same
            of_own = of_own.at[:n1].set(k.ntk[own[:n1], own[:n1]])
        ntk = select(usable, split(of_own, k.ntk[rows, columns]), jnp.ones_like(nngp))
    first, second = split(own, rows), split(own, columns if symmetric else n1 + columns)
    found = Batches(
        first=first,
        second=second,
        own=jnp.arange(len(first)) < -(-len(own) // size),
        usable=usable,
        same=split(np.ones(len(own), bool), k.x1_is_x2 & (rows == columns)),
        nngp=select(usable, nngp, jnp.ones_like(nngp)),
        ntk=ntk,
        mask1=None if masks is None else masks[first],
        mask2=None if masks is None else masks[second],
    )
    return select(finite, covariances, jnp.ones_like(covariances)), found


def _both_masks(mask1, mask2, sizes) -> Array | None:
    """One mask of all inputs, where a side without one has nothing masked."""
    either = mask2 if mask1 is None else mask1
    if either is None:
        return None
    none = [jnp.zeros((n, *either.shape[1:]), bool) for n in sizes]
    sides = zip((mask1, mask2), none, strict=True)
    return jnp.concatenate([empty if mask is None else mask for mask, empty in sides])


def _pairs(inject: nt.Kernel) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of two inputs; where the second are the first, `i < j`."""
    n1, n2 = inject.nngp.shape[:2]
    if inject.cov2 is None:
        return np.triu_indices(n1, 1)
    rows, columns = np.indices((n1, n2)).reshape(2, -1)
    return rows, columns


def gather(
    inject: nt.Kernel, a: Shaped[Array, "batches size ..."]
) -> tuple[Shaped[Array, "n1 ..."], Shaped[Array, "n2 ..."], Shaped[Array, "n1 n2 ..."]]:
    """What was found of the batches: of the first and the second inputs, and of the pairs."""
    n1, n2 = inject.nngp.shape[:2]
    rows, columns = _pairs(inject)
    symmetric = inject.cov2 is None
    own = n1 if symmetric else n1 + n2
    flat, padded = a.reshape(-1, *a.shape[2:]), -(-own // a.shape[1]) * a.shape[1]
    own1, own2, of_two = flat[:n1], flat[own - n2 : own], flat[padded : padded + len(rows)]
    whole = jnp.zeros((n1, n2, *a.shape[2:]), a.dtype).at[rows, columns].set(of_two)
    if symmetric:
        whole = whole.at[columns, rows].set(mirrored(inject.diagonal_spatial, of_two[:, None])[0])
    if n1 == n2:
        with_own = whole.at[jnp.diag_indices(n1)].set(own1)
        whole = jnp.where(symmetric | inject.x1_is_x2, with_own, whole)
    return own1, own2, whole
