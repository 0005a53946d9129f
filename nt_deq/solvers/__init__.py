"""Solvers for scalar fixed points, one an entry of the kernel."""

from nt_deq.solvers.anderson import Anderson
from nt_deq.solvers.chebyshev import Chebyshev
from nt_deq.solvers.loop import Root, Solver, implicit, iterate, rounding, solve, spread
from nt_deq.solvers.newton import Newton
from nt_deq.solvers.picard import Picard
from nt_deq.solvers.tiles import by_tiles

__all__ = [
    "Anderson",
    "Chebyshev",
    "Newton",
    "Picard",
    "Root",
    "Solver",
    "by_tiles",
    "implicit",
    "iterate",
    "rounding",
    "solve",
    "spread",
]
