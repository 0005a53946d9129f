"""A cell with tied weights and what is injected into it: of `FixedPoint` and `NeuralODE`."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jax import Array
from jaxtyping import PyTree

from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.solver import at_least_single
from nt_deq.flax.layers import normalize


class Tied(nnx.Module):
    """`cell` and `inject`, as modules have them."""

    def __init__(self, cell: nnx.Module, inject: Callable[[Array], Array]):
        if not isinstance(cell, nnx.Module):
            raise ArgumentError(
                f"cell={cell!r} must be an nnx.Module; wrap functions in nnx.Sequential."
            )
        self.cell = cell
        self.inject = inject

    def _split(self, x: PyTree) -> tuple[Array, nnx.GraphDef, nnx.State]:
        """`u = inject(x)`, in at least single precision, and the cell, its weights scaled."""
        u = self.inject(x)
        u = u.astype(at_least_single(u.dtype))
        graph, state = nnx.split(normalize(self.cell, u.shape[1:-1]))
        return u, graph, state


def check_shapes(layer: str, z: Array, out: Array, u: Array) -> None:
    """Raises unless the cell keeps the shape of `z`, which is that of `u`."""
    if not out.shape == z.shape == u.shape:
        raise ArgumentError(
            f"{layer}: the cell turns z of shape {z.shape} into {out.shape}, and inject(x) "
            f"has shape {u.shape}: all must be the same."
        )
