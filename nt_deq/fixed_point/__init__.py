"""Fixed points `y = F(y)` of a batch of samples, each stopped by itself, and their derivatives."""

from nt_deq.fixed_point.adjoints import Adjoint, ImplicitAdjoint, PhantomAdjoint, UnrolledAdjoint
from nt_deq.fixed_point.anderson import Anderson
from nt_deq.fixed_point.broyden import Broyden
from nt_deq.fixed_point.from_optimistix import Optimistix
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solve import adjoint_solution, equilibrium, find_equilibrium
from nt_deq.fixed_point.solver import Solution, Solver
from nt_deq.fixed_point.stability import jacobian_regularization, spectral_radius

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "ImplicitAdjoint",
    "Newton",
    "Optimistix",
    "PhantomAdjoint",
    "Picard",
    "Solution",
    "Solver",
    "UnrolledAdjoint",
    "adjoint_solution",
    "equilibrium",
    "find_equilibrium",
    "jacobian_regularization",
    "spectral_radius",
]
