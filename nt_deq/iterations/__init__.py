"""Iterations for the equilibrium of a finite network, as optimistix fixed-point solvers.

Each works sample by sample on an array `(batch, ...)`: a sample that has converged stops moving, so
that its result does not depend on its batch, and one that overflows is given up without the others.
What is returned is the iterate with the smallest residual, and that residual is its own.

`nt_deq.solvers` are for the entries of a kernel.
"""

from nt_deq.iterations.anderson import Anderson
from nt_deq.iterations.broyden import Broyden
from nt_deq.iterations.iteration import FixedPointSolver, Iteration, SampleSolution, run

__all__ = ["Anderson", "Broyden", "FixedPointSolver", "Iteration", "SampleSolution", "run"]
