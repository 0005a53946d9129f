"""Solvers for scalar fixed points, one an entry of the kernel."""

from nt_deq.solvers.loop import Root, Solver, rounding, solve
from nt_deq.solvers.newton import Newton
from nt_deq.solvers.picard import Picard

__all__ = ["Newton", "Picard", "Root", "Solver", "rounding", "solve"]
