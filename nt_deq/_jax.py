"""What had another home, or another fault, in a JAX that is supported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jaxtyping import PyTree


def enable_x64(enabled: bool) -> AbstractContextManager[None]:
    """JAX's context of float64 arrays, which had another home before JAX 0.8."""
    import jax

    context = getattr(jax, "enable_x64", None)
    if context is None:
        context = importlib.import_module("jax.experimental").enable_x64
    return context(enabled)


def nothing_is_traced() -> bool:
    """Whether no transformation of JAX is going on, so that every array has its numbers."""
    return importlib.import_module("jax._src.core").trace_state_clean()


def instantiate_cotangents() -> None:
    """Lets JAX before 0.7 transpose a linear solve on whose solution nothing depends."""
    import jax

    if jax.__version_info__ >= (0, 7):
        return
    from jax.interpreters import ad

    primitive = importlib.import_module("jax._src.lax.control_flow.solves").linear_solve_p
    rule = ad.primitive_transposes[primitive]

    def transpose(cotangents, *operands, **params):
        return rule([ad.instantiate_zeros(ct) for ct in cotangents], *operands, **params)

    ad.primitive_transposes[primitive] = transpose


def shard_map(fn: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """JAX's `shard_map` without its check of replication, which loops of kernels do not pass."""
    import jax

    if hasattr(jax, "shard_map"):
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    experimental = importlib.import_module("jax.experimental.shard_map")
    return experimental.shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False
    )
