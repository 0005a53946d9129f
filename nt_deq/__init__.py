"""Infinitely wide deep equilibrium models: their kernels for neural-tangents, and the networks."""

import importlib.metadata

from nt_deq import _compat

_compat.install()  # makes neural-tangents importable, so it comes before everything that needs it

import neural_tangents as nt  # noqa: E402

from nt_deq import flax, gp, iterations, large, stax, theory  # noqa: E402
from nt_deq.activations import Activation, activations  # noqa: E402
from nt_deq.adjoints import Implicit, Phantom, Unrolled  # noqa: E402
from nt_deq.equilibrium import (  # noqa: E402
    adjoint_solution,
    equilibrium,
    find_equilibrium,
)
from nt_deq.iterations import SampleSolution  # noqa: E402
from nt_deq.jacobian import jacobian_regularization, spectral_radius  # noqa: E402
from nt_deq.kernel import (  # noqa: E402
    KernelSolution,
    NoEquilibriumError,
    NotConvergedError,
    deq_kernel,
)
from nt_deq.large import KernelRegression  # noqa: E402
from nt_deq.solvers import Anderson, Chebyshev, Newton, Picard  # noqa: E402

__version__ = importlib.metadata.version("nt-deq")

__all__ = [
    "Activation",
    "Anderson",
    "Chebyshev",
    "Implicit",
    "KernelRegression",
    "KernelSolution",
    "Newton",
    "NoEquilibriumError",
    "NotConvergedError",
    "Phantom",
    "Picard",
    "SampleSolution",
    "Unrolled",
    "activations",
    "adjoint_solution",
    "deq_kernel",
    "equilibrium",
    "find_equilibrium",
    "flax",
    "gp",
    "iterations",
    "jacobian_regularization",
    "large",
    "nt",
    "spectral_radius",
    "stax",
    "theory",
]
