"""The kernel of an elementwise nonlinearity, from the expectations of its activation."""

from __future__ import annotations

import jax.numpy as jnp
import neural_tangents as nt
from jax import Array

from nt_deq._checks import is_traced
from nt_deq.activations import Activation
from nt_deq.errors import ArgumentError, NotConvergedError
from nt_deq.kernels.fusion import computed_once


def apply_dual(activation: Activation, k: nt.Kernel) -> nt.Kernel:
    """The kernel of `φ(z)` for Gaussian `z` with kernel `k`: `V` for `nngp`, `V̇ Θ` for `ntk`.

    Exact to rounding, with finite derivatives, also where an input meets itself.
    """
    if not k.is_gaussian:
        raise ArgumentError(
            f"the nonlinearity {activation.name!r} follows a layer without random weights: its "
            "input is not Gaussian; put a stax.Dense or stax.Conv before it."
        )
    if k.diagonal_spatial or k.cov1.ndim == 1:
        rows, columns = k.cov1, k.cov1 if k.cov2 is None else k.cov2

        def within(cov):
            return computed_once(activation.dual_diagonal(cov)[0])
    else:
        rows, _ = _outer(_variances(k.cov1))
        _, columns = _outer(_variances(k.cov1 if k.cov2 is None else k.cov2))

        def within(cov):
            return activation.dual(*_outer(_variances(cov)), cov)[0]

    cov1, cov2 = (cov if cov is None else within(cov) for cov in (k.cov1, k.cov2))
    _raise_beyond_range(activation, ((k.cov1, cov1), (k.cov2, cov2)))
    nngp, slope = activation.dual(rows[:, None], columns[None, :], k.nngp)
    return k.replace(
        nngp=nngp,
        ntk=None if k.ntk is None else slope * k.ntk,
        cov1=cov1,
        cov2=cov2,
        is_gaussian=False,
    )


def _raise_beyond_range(activation, covariances) -> None:
    """Raises where inputs' own covariances, pairs of those before and after, lost their numbers.

    An eager kernel alone; what is not known of a pair is not known of one of its inputs.
    """
    for before, after in covariances:
        if before is None or is_traced(before, after):
            continue
        lost = jnp.isfinite(before) & jnp.isnan(after)
        if jnp.any(lost):
            largest = float(jnp.max(jnp.where(jnp.isfinite(before), before, 0)))
            raise NotConvergedError(
                f"activation={activation.name!r}: its expectations are not known in {after.dtype} "
                f"at all variances, of which the largest here is {largest:.4g}; make the inputs or "
                "the weights before it smaller, or take an activation with a closed form, such as "
                "'erf'."
            )


def _variances(cov: Array) -> Array:
    """`(n, h, h, w, w) -> (n, h, w)`."""
    for axis in range(1, (cov.ndim + 1) // 2):
        cov = jnp.moveaxis(jnp.diagonal(cov, axis1=axis, axis2=axis + 1), -1, axis)
    return cov


def _outer(variances: Array) -> tuple[Array, Array]:
    """`(n, h, w) -> (n, h, 1, w, 1), (n, 1, h, 1, w)`, which broadcast to `(n, h, h, w, w)`."""
    spatial = range(1, variances.ndim)
    return (
        jnp.expand_dims(variances, tuple(2 * axis for axis in spatial)),
        jnp.expand_dims(variances, tuple(2 * axis - 1 for axis in spatial)),
    )
