"""What is wrong where an eager solve of a kernel found no equilibrium."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from nt_deq import _checks
from nt_deq.activations import Activation
from nt_deq.errors import ArgumentError, NoEquilibriumError, NotConvergedError
from nt_deq.fixed_point.solver import Solver
from nt_deq.typing import Number

if TYPE_CHECKING:
    from nt_deq.kernels.cell import CellSolution
    from nt_deq.kernels.equations import Marginals
    from nt_deq.kernels.two_time import TwoTimeSolution


def raise_unless_solved(
    activation: Activation,
    solver: Solver,
    W_std: Number,
    converged: Bool[Array, "n1 n2"],
    marginals1: Marginals,
    marginals2: Marginals,
) -> None:
    """Raises where an eager solve found no equilibrium; traced values pass, as NaN."""
    if _checks.is_traced((converged, marginals1, marginals2)) or bool(jnp.all(converged)):
        return
    for side, marginals in (("x1", marginals1), ("x2", marginals2)):
        missing = np.flatnonzero(~np.asarray(marginals.exists))
        if missing.size:
            raise verdict(activation, solver, W_std, side, marginals, missing)
    dtype = marginals1.rate.dtype
    largest = float(jnp.finfo(dtype).max)
    failed = ~np.asarray(converged)
    variances = (float(jnp.max(marginals.variance)) for marginals in (marginals1, marginals2))
    if math.prod(variances) > largest:
        raise OverflowError(
            f"the product of two variances overflows {dtype}, whose largest number is "
            f"{largest:.2g}, in {failed.sum()} of {failed.size} pairs; make the inputs, U_std or "
            f"b_std smaller{_or_wider(dtype)}."
        )
    raise NotConvergedError(
        f"{failed.sum()} of {failed.size} pairs have not converged after {solver.max_steps} steps "
        f"of {type(solver).__name__}; allow more max_steps, a larger rtol, or use nt_deq.Newton()."
    )


def verdict(
    activation: Activation,
    solver: Solver,
    W_std: Number,
    side: str,
    marginals: Marginals,
    missing: Int[np.ndarray, " m"],
) -> Exception:
    """What became of the first of the rows of `side` that no equilibrium was found of.

    It is none where the solver found one that is not stable, or where the variance grows for ever;
    what else there may be is a failure to find it.
    """
    dtype, row, where = marginals.rate.dtype, missing[0], _checks.rows(side, missing)
    rate, k = float(marginals.rate[row]), float(marginals.root.value[row])
    if np.isnan(k):
        return ArgumentError(f"there are NaN or infinite values in {where}; drop or impute them.")
    overflows = np.isinf([k, float(marginals.root.residual[row])]).any()
    if overflows and not _rate_of_large(activation, W_std, k, dtype) >= 1:
        return OverflowError(
            f"the variance of {where} overflows {dtype}, whose largest number is "
            f"{float(jnp.finfo(dtype).max):.2g}; make the inputs, U_std or b_std smaller"
            f"{_or_wider(dtype)}."
        )
    if np.isnan(rate) and np.isfinite(k):
        return NotConvergedError(
            f"activation={activation.name!r}: its expectations are not known in "
            f"{dtype} at the variance K* = {k:.4g} that {where} reached; make the inputs or "
            "U_std smaller, or take an activation with a closed form, such as 'erf'."
        )
    slow = not marginals.root.converged[row] and np.isfinite(k)
    if slow and not (rate >= 1 and _rate_of_large(activation, W_std, k, dtype) >= 1):
        return NotConvergedError(
            f"the variance of {where} has not converged after {solver.max_steps} steps of "
            f"{type(solver).__name__} (W_std² E[φ'(z*)²] = {rate:.6g}); allow more max_steps, "
            "a larger rtol, or use nt_deq.Newton()."
        )
    remedy = (
        f"take W_std < {1 / np.sqrt(float(activation.dual_diagonal(jnp.ones(()))[1])):.6g}"
        if activation.homogeneous
        else f"take a smaller W_std (any W_std < {0.5 / activation.lipschitz:.4g} has one)"
        if math.isfinite(activation.lipschitz)
        else "take a smaller W_std, or smaller inputs, U_std and b_std"
    )
    return NoEquilibriumError(
        f"W_std={float(W_std):.6g} with activation={activation.name!r}: W_std² E[φ'(z*)²] = "
        f"{rate:.6g} must be below 1, and is not for {where}, so the network has no stable "
        f"equilibrium there; {remedy}."
    )


def _or_wider(dtype) -> str:
    return "" if dtype == np.float64 else ", or compute in float64"


def _rate_of_large(activation, W_std, k, dtype) -> float:
    """`W_std² E[φ'²]` at a variance that is much larger than `k`, NaN where it is not known."""
    largest = float(jnp.sqrt(jnp.finfo(dtype).max)) / 1e6
    large = jnp.asarray(min(1e6 * k, largest), dtype)
    return float(W_std) ** 2 * float(activation.dual_diagonal(large)[1])


def _raise_for_missing(layer, missing, rows) -> None:
    if missing.any():
        raise ArgumentError(
            f"{layer}: there are NaN or infinite values in {rows(missing)}; drop or impute them."
        )


def raise_unless_cell_solved(
    solution: CellSolution,
    large_rates: Callable[[], tuple[Float[Array, " n1"], Float[Array, " n2"]]],
) -> None:
    """The same of `stax.FixedPoint`; `large_rates` gives the rates where variances are large."""
    _, rates1, rates2, converged, steps = solution
    if _checks.is_traced((rates1, rates2, converged)):
        return
    for i, (side, rates) in enumerate((("x1", rates1), ("x2", rates2))):
        rate, injected = np.asarray(rates.rate), np.asarray(rates.injected)
        solved, dtype = np.asarray(rates.converged), rates.rate.dtype

        def rows(which, side=side):
            return _checks.rows(side, np.flatnonzero(which))

        _raise_for_missing("FixedPoint", np.isnan(injected), rows)
        if np.isinf(injected).any():
            raise OverflowError(
                f"FixedPoint: the variance of inject of {rows(np.isinf(injected))} overflows "
                f"{dtype}; make the inputs or the weights of inject smaller."
            )
        gone = ~np.isfinite(np.asarray(rates.residual))
        unstable = solved & ~np.asarray(rates.stable)
        if not solved.all():
            large = np.asarray(large_rates()[i])
            unstable |= ~solved & (gone | ~(rate < 1)) & (large >= 1)
            rate = np.where(gone & np.isnan(rate), large, rate)
            unknown = gone & np.isnan(large)
            if unknown.any():
                raise NotConvergedError(
                    f"FixedPoint: the expectations of a nonlinearity of the cell are not known in "
                    f"{dtype} at the variances that {rows(unknown)} reached; make the inputs or "
                    "the weights of inject smaller, or take one with a closed form, such as "
                    "stax.Erf."
                )
            overflowed = gone & ~unstable
            if overflowed.any():
                raise OverflowError(
                    f"FixedPoint: the variance of {rows(overflowed)} overflows {dtype}; make the "
                    "inputs or the weights of inject smaller."
                )
        if np.asarray(rates.jumps)[unstable].any():
            raise NoEquilibriumError(
                "FixedPoint: a nonlinearity of the cell jumps, as stax.Sign does: states that are "
                "near end far apart, so that the network has no stable equilibrium, whatever W_std "
                "is; use one that is continuous, such as stax.Erf."
            )
        if unstable.any():
            raise NoEquilibriumError(
                f"FixedPoint: the cell's kernel contracts at the rate {rate[unstable][0]:.6g}, "
                f"which must be below 1, and is not for {rows(unstable)}: the network has no "
                "stable equilibrium there; take a smaller W_std in the cell."
            )
        if not solved.all():
            raise NotConvergedError(
                f"FixedPoint: {rows(~solved)} did not converge in {int(rates.steps)} steps; allow "
                "the solver more max_steps or a larger rtol."
            )
    failed = ~np.asarray(converged)
    if failed.any():
        raise NotConvergedError(
            f"FixedPoint: {failed.sum()} of {failed.size} pairs did not converge in {int(steps)} "
            "steps; allow the solver more max_steps or a larger rtol."
        )


def raise_unless_two_time_solved(solution: TwoTimeSolution, T: Number) -> None:
    """The same of `stax.NeuralODE`."""
    _, variances, own1, own2, pairs = solution
    tolerance = solution.tolerance
    if _checks.is_traced(solution):
        return
    for side, injected, own in zip(("x1", "x2"), variances, (own1, own2), strict=True):
        injected, error = np.asarray(injected), np.asarray(own.error)
        dtype = own.error.dtype
        until = f"T={float(T):.6g}"

        def rows(which, side=side):
            return _checks.rows(side, np.flatnonzero(which))

        _raise_for_missing("NeuralODE", np.isnan(injected), rows)
        overflowed = np.isinf(injected) | ~np.isfinite(own.residual)
        if overflowed.any():
            raise OverflowError(
                f"NeuralODE: the variance of {rows(overflowed)} overflows {dtype} until {until}; "
                "make T, the inputs or the standard deviations smaller, or the leak larger."
            )
        _raise_unless_known(rows, ~np.asarray(own.converged), error > tolerance, until, tolerance)
    failed, inexact = ~np.asarray(pairs.converged), np.asarray(pairs.error) > tolerance

    def number(which):
        return f"{which.sum()} of {which.size} pairs"

    _raise_unless_known(number, failed, inexact & ~failed, f"T={float(T):.6g}", tolerance)


def _raise_unless_known(name, failed, inexact, until, tolerance) -> None:
    if failed.any():
        raise NotConvergedError(
            f"NeuralODE: the integral equation until {until} of {name(failed)} did not converge; "
            "allow the solver more max_steps or a larger rtol, or make T smaller."
        )
    if inexact.any():
        raise NotConvergedError(
            f"NeuralODE: the nodes in time are too few for the relative error {tolerance:.0e} of "
            f"{name(inexact)} until {until}; make T or the standard deviations of the cell "
            "smaller, or take steps=..., a residual network."
        )
