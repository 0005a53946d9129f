"""Deep equilibrium networks as `flax.nnx` modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.adjoints import MAX_STEPS, Adjoint
from nt_deq.equilibrium import find_equilibrium, value_or_error
from nt_deq.flax.layers import Conv, Dense
from nt_deq.iterations import FixedPointSolver, SampleSolution
from nt_deq.kernel import NoEquilibriumError

_logger = logging.getLogger(__name__)


class FixedPoint(nnx.Module):
    """A network of infinite depth, `z* = cell(z*) + inject(x)`, from any nnx modules.

    The function of `stax.FixedPoint(cell, inject)`. Returns the equilibrium itself: put the
    nonlinearity and the readout after it. The cell is applied with its state as it is at the start
    (running statistics, keys of dropout), the same in every step, and what it changes is dropped.

    Args:
      cell: what is iterated, `z -> z`, `(batch, ...)`, each sample on its own; for example
        `nnx.Sequential(nnx.relu, Conv(64, 64, (3, 3), W_std=0.9, rngs=rngs))`.
      inject: what the input goes through, once, `x -> u`, of the shape of `z`.
      solver: what finds `z*`: one of `nt_deq.iterations`, or an optimistix fixed-point solver or
        root finder. `None` is plain iteration of each sample to the last digits.
      adjoint: how `z*` is differentiated: `nt_deq.Implicit(...)`, which is what `None` means,
        `Phantom(...)` or `Unrolled(...)`.
      max_steps: after so many steps a sample has not converged.
    """

    def __init__(
        self,
        cell: nnx.Module,
        inject: Callable[[Array], Array],
        *,
        solver: FixedPointSolver | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int = MAX_STEPS,
    ):
        if not isinstance(cell, nnx.Module):
            raise ValueError(
                f"cell={cell!r} has to be an nnx.Module; wrap functions in nnx.Sequential."
            )
        self.cell: Any = cell
        self.inject = inject
        self.solver, self.adjoint, self.max_steps = solver, adjoint, max_steps

    def __call__(self, x: Array, z0: Array | None = None) -> Array:
        """Returns `z*` for `x`, as `equilibrium` does."""
        return self.equilibrium(x, z0)

    def equilibrium(self, x: Array, z0: Array | None = None) -> Array:
        """Returns `z*`, the iteration started at `z0` (default: zeros).

        Raises:
          NotConvergedError: some sample has not converged. A traced call returns NaN for it.
          ValueError: the cell does not keep the shape of `z`.
        """
        return value_or_error(self.solve(x, z0))

    def solve(self, x: Array, z0: Array | None = None) -> SampleSolution:
        """Returns `z*` and how the search for it went, `(value, steps, residual, converged)`.

        Where a sample has not converged its `value` is the best iterate.
        """
        u = self.inject(x)
        graph, state = nnx.split(self.cell)
        return find_equilibrium(
            _Layer(graph),
            jnp.zeros_like(u) if z0 is None else z0,
            (state, u),
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )

    def step(self, z: Array, x: Array) -> Array:
        """Returns `cell(z) + inject(x)`: one layer."""
        return self.cell(z) + self.inject(x)


@dataclass(frozen=True)
class _Layer:
    """`cell(z) + u`; cells of the same structure give equal layers, which are compiled once."""

    graph: Any

    def __call__(self, z: Array, args: tuple[Any, Array]) -> Array:
        state, u = args
        out = nnx.merge(self.graph, state)(z)
        if not out.shape == z.shape == u.shape:
            raise ValueError(
                f"FixedPoint: the cell turns z of shape {z.shape} into {out.shape}, and inject(x) "
                f"has shape {u.shape}: all have to be the same."
            )
        return out + u


class DEQ(FixedPoint):
    """A deep equilibrium layer, `h* = φ(z*)`, dense or convolutional.

    `z* = W_std/√n · φ(z*) W + U_std/√d · x U + b_std · b`, `(batch, d) -> (batch, n)`, or with
    `kernel_size` the same with convolutions for products, `(batch, ..., d) -> (batch, ..., n)`.

    The dense one is the function of `stax.DEQ` with the same arguments; the other is that of
    `serial(FixedPoint(serial(φ, Conv(n, kernel_size)), Conv(n, kernel_size)), φ)`. `hidden` holds
    `W`, `inject` holds `U` and `b`. Gradients are implicit, in forward and reverse mode.

    Args:
      in_features: size `d` of the input.
      width: size `n` of the state `z`.
      W_std: standard deviation of the recurrent weights. In a wide network an equilibrium exists
        for every weight of the layer's class where `2 · W_std · Lip(φ) < 1` (Gao et al. 2023), and
        for random weights where `W_std² E[φ'(z*)²] < 1` (relu: `W_std² < 2`).
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias; `None` for none.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function such as
        `jnp.tanh`, or an `nt_deq.Activation`.
      kernel_size: of the filters, one integer for each of one or two spatial axes, as `(3, 3)`;
        `None` for a dense layer.
      padding: of the convolutions, `'SAME'` (zeros) or `'CIRCULAR'` (a torus).
      parameterization: `'ntk'` or `'standard'`, as of `Dense`.
      solver: what finds `z*`, as of `FixedPoint`.
      adjoint: how it is differentiated, as of `FixedPoint`.
      max_steps: after so many steps a sample has not converged.
      rngs: draws the parameters from its stream `params`.

    Raises:
      NoEquilibriumError: no input has an equilibrium: `W_std` is too large for a homogeneous `φ`.
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        W_std: float,
        U_std: float = 1.0,
        b_std: float | None = None,
        activation: str | Activation | Callable[[Array], Array] = "relu",
        kernel_size: Sequence[int] | None = None,
        padding: str = "SAME",
        parameterization: str = "ntk",
        solver: FixedPointSolver | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int = MAX_STEPS,
        rngs: nnx.Rngs,
    ):
        _checks.count("width", width)
        _checks.standard_deviations(W_std=W_std, U_std=U_std)
        phi = get_activation(activation)
        if not _checks.is_traced(W_std):
            _check_stability(float(W_std), phi)

        def linear(features, W_std, b_std=None):
            common = {"W_std": W_std, "b_std": b_std, "rngs": rngs}
            common["parameterization"] = parameterization
            if kernel_size is None:
                return Dense(features, width, **common)
            return Conv(features, width, kernel_size, padding=padding, **common)

        if kernel_size is not None and padding == "VALID":
            raise ValueError(
                "padding='VALID' changes the shape of z, and the layer reads its own output; use "
                "'SAME' or 'CIRCULAR', or FixedPoint with inject of another padding."
            )
        cell = Hidden(phi, linear(width, W_std))
        inject = linear(in_features, U_std, b_std)
        super().__init__(cell, inject, solver=solver, adjoint=adjoint, max_steps=max_steps)

    @property
    def activation(self) -> Activation:
        """`φ`."""
        return self.cell.activation

    @property
    def hidden(self) -> Dense | Conv:
        """The layer with the recurrent weights `W`."""
        return self.cell.linear

    def __call__(self, x: Array, z0: Array | None = None) -> Array:
        """Returns `h* = φ(z*)` for `x`, the iteration started at `z0` (default: zeros).

        Raises:
          NotConvergedError: some sample has not converged. A traced call returns NaN for it.
        """
        return self.activation.fn(self.equilibrium(x, z0))


class Hidden(nnx.Module):
    """`φ`, then a linear layer: the cell of `DEQ`."""

    def __init__(self, activation: Activation, linear: Dense | Conv):
        self.activation, self.linear = activation, linear

    def __call__(self, z: Array) -> Array:
        """Applies both."""
        return self.linear(self.activation.fn(z))


@lru_cache(maxsize=256)  # said once
def _check_stability(W_std: float, phi: Activation) -> None:
    """Raises where no input has a stable equilibrium, and logs where not every network has one."""
    slope = phi.lipschitz**2  # bounds E[φ'²], which depends on the input
    if phi.homogeneous:  # it does not
        with jax.ensure_compile_time_eval():
            slope = float(phi.dual_diagonal(jnp.ones(()))[1])
        if W_std**2 * slope >= 1:
            raise NoEquilibriumError(
                f"W_std={W_std} has to be below {1 / math.sqrt(slope):.6g} for {phi.name}: a wide "
                "network with these weights has no stable equilibrium for any input "
                f"(W_std² E[φ'²] = {W_std**2 * slope:.4g} >= 1)."
            )
    if 2 * W_std * phi.lipschitz >= 1:
        stable = W_std**2 * slope < 1
        _logger.info(
            "W_std=%g with %s: %s. Every network has a unique one where 2 W_std Lip(φ) < 1 "
            "(W_std < %.4g). A call that finds none raises NotConvergedError.",
            W_std,
            phi.name,
            "wide random networks have a stable equilibrium"
            if stable
            else "an equilibrium is stable for those inputs only where W_std² E[φ'(z*)²] < 1",
            0.5 / phi.lipschitz,
        )
