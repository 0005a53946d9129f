"""Infinitely wide deep equilibrium models: their kernels for neural-tangents, and the networks."""

from nt_deq import _compat

_compat.install()  # makes neural-tangents importable, so it comes before everything that needs it

from nt_deq import flax, stax  # noqa: E402
from nt_deq.activations import Activation, activations  # noqa: E402
from nt_deq.equilibrium import equilibrium  # noqa: E402
from nt_deq.kernel import (  # noqa: E402
    KernelSolution,
    NoEquilibriumError,
    NotConvergedError,
    deq_kernel,
)
from nt_deq.solvers import Anderson, Chebyshev, Newton, Picard  # noqa: E402

__all__ = [
    "Activation",
    "Anderson",
    "Chebyshev",
    "KernelSolution",
    "Newton",
    "NoEquilibriumError",
    "NotConvergedError",
    "Picard",
    "activations",
    "deq_kernel",
    "equilibrium",
    "flax",
    "stax",
]
