"""Solvers for scalar fixed points, one an entry of the kernel."""

from nt_deq.solvers.anderson import Anderson
from nt_deq.solvers.loop import Root, Solver, implicit, iterate, rounding, solve, spread
from nt_deq.solvers.newton import Newton
from nt_deq.solvers.picard import Picard

__all__ = [
    "Anderson",
    "Newton",
    "Picard",
    "Root",
    "Solver",
    "implicit",
    "iterate",
    "rounding",
    "solve",
    "spread",
]
