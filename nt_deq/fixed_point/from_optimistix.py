"""Solvers of optimistix, in the place of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from nt_deq import _checks
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.solver import Bounds, Function, Solution, Solver, norm

if TYPE_CHECKING:
    from optimistix import AbstractFixedPointSolver, AbstractRootFinder


@dataclass(frozen=True)
class Optimistix(Solver):
    """A fixed-point solver or root finder of optimistix, on all samples of a network together.

    Attributes:
      solver: with its tolerances, for example `optimistix.Newton(rtol=1e-6, atol=1e-6)`; they say
        when it has converged.
      max_steps: after so many of its steps it has not.
    """

    solver: AbstractFixedPointSolver | AbstractRootFinder
    max_steps: int = 1000

    def __post_init__(self):
        import optimistix

        kinds = optimistix.AbstractFixedPointSolver, optimistix.AbstractRootFinder
        if not isinstance(self.solver, kinds):
            raise ArgumentError(
                f"Optimistix(solver={self.solver!r}): solver must be a fixed-point solver or a "
                "root finder of optimistix."
            )
        _checks.count("max_steps", self.max_steps)

    def solve_vectors(
        self,
        fn: Function,
        y: Float[Array, "*batch size"],
        args: PyTree,
        rounding: float,
        keep_best: bool = True,
    ) -> Solution:
        """`y = F(y)`, with one outcome for all samples."""
        del rounding, keep_best
        import optimistix

        found = optimistix.fixed_point(
            lambda y, args: fn(y, args).value,
            self.solver,
            y,
            args,
            max_steps=self.max_steps,
            throw=False,
        )
        residual = norm(fn(found.value, args).value - found.value)
        success = found.result == optimistix.RESULTS.successful
        converged = success & jnp.isfinite(residual)
        return Solution(found.value, found.stats["num_steps"], residual, converged)

    def solve_entries(
        self, fn: Function, y: Float[Array, "*shape"], args: PyTree, bounds: Bounds
    ) -> NoReturn:
        """Refused: a kernel's entries are independent equations."""
        raise ArgumentError(
            f"solver={self} is for networks; kernels need nt_deq.Newton(), nt_deq.Anderson() or "
            "nt_deq.Picard()."
        )
