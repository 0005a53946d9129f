"""Which cells the kernels of `stax.FixedPoint` and `stax.NeuralODE` describe."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from nt_deq.errors import ArgumentError
from nt_deq.kernels.cell import KernelMap
from nt_deq.typing import ApplyFn, InitFn


def check_shape(
    layer: str, found: Sequence[int | np.integer], expected: Sequence[int | np.integer]
) -> None:
    """Raises unless the cell gives back the shape that it gets."""
    if tuple(found) != tuple(expected):
        raise ArgumentError(
            f"{layer}: the cell turns z of shape {tuple(expected)} into {tuple(found)}, "
            "but reads its own output; make it keep the shape (the width of its last "
            "layer that of inject's, padding='SAME' or 'CIRCULAR', no strides)."
        )


def check_gaussian(layer: str, kernel_fn: KernelMap, inject: nt.Kernel) -> None:
    """Raises unless `inject(x)` and the cell's output are Gaussian, and of one shape."""
    if not inject.is_gaussian:
        raise ArgumentError(
            f"{layer}: inject does not end in a layer with random weights, so that inject(x) is "
            "not Gaussian; end it in one, for example stax.serial(..., stax.Dense(width))."
        )
    out = jax.eval_shape(kernel_fn, inject)
    assert inject.shape1 is not None
    check_shape(layer, out.shape1, inject.shape1)
    if not out.is_gaussian:
        raise ArgumentError(
            f"{layer}: the cell's last layer is not linear with random weights, so that its "
            f"state is not Gaussian; write {layer}(stax.serial(phi, Dense), inject) for "
            f"{layer}(stax.serial(Dense, phi), inject), and put phi after it."
        )


def check_no_bypass(layer: str, init_fn: InitFn, apply_fn: ApplyFn, shape: tuple[int, ...]) -> None:
    """Raises if the output depends on the input when all weights are zero.

    Args:
      layer: its name in messages.
      init_fn: of the cell.
      apply_fn: of the cell.
      shape: of a batch of two states.
    """

    def outputs(key):
        params = jax.eval_shape(lambda key: init_fn(key, shape)[1], key)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        keys = jax.random.split(key)
        return [apply_fn(zeros, jax.random.normal(k, shape), rng=key) for k in keys]

    with jax.ensure_compile_time_eval():
        key = jax.random.key(1)
    closed = jax.make_jaxpr(outputs)(key)
    # Traced standard deviations, which multiply the zeros, may be any number.
    consts = [np.ones(c.shape, c.dtype) if isinstance(c, Tracer) else c for c in closed.consts]
    with jax.ensure_compile_time_eval():
        first, second = jax.jit(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts)))(key)
        bypassed = bool(jnp.any(first != second))
    if bypassed:
        raise ArgumentError(
            f"{layer}: z reaches the cell's output without random weights on the way (a skip "
            "connection such as z + W phi(z)). With tied weights z then is correlated with its own "
            "past, which no kernel of one layer describes; pass that path through a layer of its "
            "own, for example stax.parallel(stax.Dense(width), ...) for "
            "stax.parallel(stax.Identity(), ...)."
        )
