"""Infinitely wide deep equilibrium models: their kernels for neural-tangents, and the networks.

Names are imported when they are first used, so that `import nt_deq` costs next to nothing; it makes
neural-tangents work on the installed JAX, whoever imports it afterwards.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nt_deq import _bridges

if TYPE_CHECKING:
    import neural_tangents as nt

    from nt_deq import activations, fixed_point, flax, gp, regression, stax, theory
    from nt_deq._jax import enable_x64
    from nt_deq.activations import Activation
    from nt_deq.errors import (
        ModelError,
        NoEquilibriumError,
        NotConvergedError,
        NotPositiveDefiniteError,
    )
    from nt_deq.fixed_point import (
        Anderson,
        Broyden,
        ImplicitAdjoint,
        Newton,
        PhantomAdjoint,
        Picard,
        Solution,
        UnrolledAdjoint,
        adjoint_solution,
        equilibrium,
        find_equilibrium,
        jacobian_regularization,
        spectral_radius,
    )
    from nt_deq.kernels.dense import KernelSolution, deq_kernel
    from nt_deq.kernels.series import Chebyshev
    from nt_deq.kernels.tiled import tiled
    from nt_deq.networks import deq_network
    from nt_deq.regression import KernelClassifier, KernelRegression

    __version__: str

_bridges.install()

_HOMES = {
    "nt_deq._jax": ("enable_x64",),
    "nt_deq.activations": ("Activation",),
    "nt_deq.errors": (
        "ModelError",
        "NoEquilibriumError",
        "NotConvergedError",
        "NotPositiveDefiniteError",
    ),
    "nt_deq.fixed_point": (
        "Anderson",
        "Broyden",
        "ImplicitAdjoint",
        "Newton",
        "PhantomAdjoint",
        "Picard",
        "Solution",
        "UnrolledAdjoint",
        "adjoint_solution",
        "equilibrium",
        "find_equilibrium",
        "jacobian_regularization",
        "spectral_radius",
    ),
    "nt_deq.kernels.dense": ("KernelSolution", "deq_kernel"),
    "nt_deq.kernels.series": ("Chebyshev",),
    "nt_deq.kernels.tiled": ("tiled",),
    "nt_deq.networks": ("deq_network",),
    "nt_deq.regression": ("KernelClassifier", "KernelRegression"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = {
    name: f"nt_deq.{name}"
    for name in ("activations", "fixed_point", "flax", "gp", "regression", "stax", "theory")
}
_MODULES["nt"] = "neural_tangents"

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name == "__version__":
        from importlib.metadata import version

        value = version("nt-deq")
    else:
        raise AttributeError(f"module 'nt_deq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
