"""A cell with tied weights and what is injected into it: of `stax.FixedPoint` and `NeuralODE`."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import neural_tangents as nt
from jax import Array, random
from jaxtyping import PyTree
from neural_tangents import stax

from nt_deq import _checks
from nt_deq.kernels.cell import unreversed
from nt_deq.kernels.check_cell import check_gaussian, check_no_bypass, check_shape
from nt_deq.typing import AnyLayer

_MASKED: PyTree = stax.MaskedArray  # typed as a class without fields


class TiedCell:
    """`cell` and `inject`, whose parameters are `(cell, inject)`.

    Attributes:
      requirements: of both, on a kernel.
      batch_axis: of their inputs.
    """

    def __init__(self, layer: str, cell: AnyLayer, inject: AnyLayer):
        """`layer` is the name in messages."""
        self._layer, self._cell, self._inject = layer, cell, inject
        self.requirements = vars(stax.serial(inject, cell, cell)[2])["input_req"]
        self.batch_axis = self.requirements.get("batch_axis", 0)
        # Once per shape: it runs the finite cell.
        self._check_bypass = cache(partial(check_no_bypass, layer, *cell[:2]))

    def init(self, rng: Array, input_shape: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree]:
        """The shape of the state, and parameters."""
        rng_cell, rng_inject = random.split(rng)
        shape, inject_params = self._inject[0](rng_inject, input_shape, **kwargs)
        cell_shape, cell_params = self._cell[0](rng_cell, shape, **kwargs)
        check_shape(self._layer, cell_shape, shape)
        return shape, (cell_params, inject_params)

    def injected(
        self, params: PyTree, inputs: PyTree, kwargs: dict[str, PyTree]
    ) -> tuple[Array, Array | None, dict[str, PyTree]]:
        """`inject(x)`, its mask if it has one, and the `kwargs` that are the cell's too."""
        u = self._inject[1](params[1], inputs, **kwargs)
        # `mask_constant` is a value of the inputs, not of z.
        kwargs = {name: value for name, value in kwargs.items() if name != "mask_constant"}
        return (u.masked_value, u.mask, kwargs) if isinstance(u, _MASKED) else (u, None, kwargs)

    def apply(self, params: PyTree, z: Array, mask: Array | None, **kwargs: PyTree) -> Array:
        """`cell(z)`, of the cell's own parameters."""
        out = self._cell[1](params, masked(z, mask), **kwargs)
        return out if mask is None else out.masked_value

    def by_samples(
        self, u: Array, mask: Array | None, kwargs: dict[str, PyTree]
    ) -> tuple[dict[str, PyTree], PyTree]:
        """What the cell takes of all samples, and of each: its `u`, mask and key, along axis 0."""
        if kwargs.get("pattern") is not None:
            raise self._no_pattern()
        key = kwargs.get("rng")
        rng = {} if key is None else {"rng": random.split(key, u.shape[self.batch_axis])}
        rest = {name: value for name, value in kwargs.items() if name not in ("rng", "pattern")}
        first = jax.tree.map(lambda a: jnp.moveaxis(a, self.batch_axis, 0), (u, mask))
        return rest, (*first, rng)

    def as_batch(self, sample: PyTree) -> PyTree:
        """A batch of one sample."""
        return jax.tree.map(lambda a: jnp.expand_dims(a, self.batch_axis), sample)

    def injected_kernel(self, k: nt.Kernel, **kwargs: PyTree) -> nt.Kernel:
        """The kernel of `inject(x)`; raises unless the kernels of both describe the layer."""
        _checks.batches(k)
        if kwargs.get("pattern") is not None:
            raise self._no_pattern()
        u = unreversed(self._inject[2](k, **kwargs))
        assert u.shape1 is not None
        check_gaussian(self._layer, self._cell[2], u)
        before, after = u.shape1[: self.batch_axis], u.shape1[self.batch_axis + 1 :]
        self._check_bypass((*before, 2, *after))
        return u

    def _no_pattern(self) -> NotImplementedError:
        return NotImplementedError(f"{self._layer} does not take the `pattern` of stax.Aggregate.")


def masked(z: Array, mask: Array | None) -> PyTree:
    """What layers take of masked values."""
    return z if mask is None else _MASKED(z, mask)
