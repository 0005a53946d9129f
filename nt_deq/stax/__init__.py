"""`neural_tangents.stax` with networks of infinite depth.

Everything that `neural_tangents.stax` exports is here too, so that one import changes:
`from nt_deq import stax`. `Relu`, `LeakyRelu`, `Abs`, `ABRelu`, `Erf`, `Gelu`, `Sin`, `Cos` and
`Rbf` compute the same functions with kernels that are exact, and differentiable, where an input
meets itself, and `Conv` one that is faster; a network's kernel is computed tile by tile of pairs
(`nt_deq.tiled`), with matrix products in full precision on every platform.
"""

# ruff: noqa: E402, F401

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from neural_tangents import stax as _nt_stax
from neural_tangents.stax import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary, reportAssignmentType]

from nt_deq.stax._layer import with_exact_kernel as _with_exact_kernel

for _name, _make in vars(_nt_stax).items():
    _combines = _name in ("serial", "parallel", "repeat")
    if inspect.isfunction(_make) and (_name[0].isupper() or _combines):
        globals()[_name] = _with_exact_kernel(_make)

# After those that they take the place of.
from nt_deq.stax.explicit import (
    ABRelu,
    Abs,
    Conv,
    Cos,
    Erf,
    Gelu,
    LeakyRelu,
    Nonlinearity,
    Rbf,
    Relu,
    Sin,
)
from nt_deq.stax.infinite import DEQ, FixedPoint, NeuralODE

if TYPE_CHECKING:
    from nt_deq.typing import AnyLayer, Layer

    def serial(*layers: AnyLayer) -> Layer:
        """`neural_tangents.stax.serial`, whose kernel is typed there as any tree of kernels."""
        ...


__all__ = [name for name in dir(_nt_stax) if not name.startswith("_")] + [  # pyright: ignore[reportUnsupportedDunderAll]
    "DEQ",
    "FixedPoint",
    "NeuralODE",
    "Nonlinearity",
]
