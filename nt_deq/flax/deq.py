"""Deep equilibrium networks as `flax.nnx` modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, PyTree, Shaped

from nt_deq import _checks
from nt_deq.activations import Activation, Phi, get_activation
from nt_deq.errors import ArgumentError, NoEquilibriumError
from nt_deq.fixed_point.adjoints import (
    Adjoint,
    OnFailure,
    PhantomAdjoint,
    check_on_failure,
)
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solve import at_precision, find_equilibrium, outcome
from nt_deq.fixed_point.solver import (
    Solution,
    Solver,
    SteppingSolver,
    check_solver,
)
from nt_deq.flax.layers import Conv, Dense, Keys, Padding, Parameterization
from nt_deq.flax.tied import Tied, check_shapes
from nt_deq.typing import Number

TRAINING_RTOL = 1e-3

_logger = logging.getLogger(__name__)


class FixedPoint(Tied):
    """A network of infinite depth, `z* = cell(z*) + inject(x)`, from any nnx modules.

    The function of `stax.FixedPoint(cell, inject)`. Returns the equilibrium itself: put the
    nonlinearity and the readout after it. The cell is applied with its state as it is at the start
    (running statistics, keys of dropout), the same in every step, and what it changes is dropped.
    Layers of the cell with a `spectral_bound` are scaled once, before the first step. `z` and its
    residual are of at least single precision, also where the cell computes in bfloat16.

    Args:
      cell: what is iterated, `z -> z`, `(batch, ...)`, each sample on its own; for example
        `nnx.Sequential(nnx.relu, Conv(64, 64, (3, 3), W_std=0.9, rngs=rngs))`.
      inject: what the input goes through, once, `x -> u`, of the shape of `z`.
      solver: what finds `z*`: `nt_deq.Picard`, `Anderson` or `Broyden`, with the tolerance and the
        number of steps. `None` is plain iteration of each sample to the last digits.
      adjoint: how `z*` is differentiated: `nt_deq.ImplicitAdjoint(...)`, which is what `None`
        means, `PhantomAdjoint(...)` or `UnrolledAdjoint(...)`.
      on_failure: what becomes of a sample without an equilibrium, `'raise'`, `'nan'`, `'best'` or
        `None`, as of `nt_deq.equilibrium`.
    """

    def __init__(
        self,
        cell: nnx.Module,
        inject: Callable[[Array], Array],
        *,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = None,
    ):
        super().__init__(cell, inject)
        check_on_failure(on_failure)
        check_solver(solver)
        self.solver, self.adjoint = solver, adjoint
        self.on_failure: OnFailure = on_failure

    def __call__(
        self, x: PyTree[Shaped[ArrayLike, "batch ..."]], z0: Float[Array, "batch ..."] | None = None
    ) -> Float[Array, "batch ..."]:
        """Returns what the layer makes of `x`, `output(solve(x, z0))`."""
        return self.output(self.solve(x, z0))

    def equilibrium(
        self, x: PyTree[Shaped[ArrayLike, "batch ..."]], z0: Float[Array, "batch ..."] | None = None
    ) -> Float[Array, "batch ..."]:
        """Returns `z*`, the iteration started at `z0` (default: zeros).

        Raises:
          NotConvergedError: some sample has not converged; `on_failure` says what else may happen.
          ValueError: the cell does not keep the shape of `z`.
        """
        return self._outcome(self.solve(x, z0))

    def solve(
        self, x: PyTree[Shaped[ArrayLike, "batch ..."]], z0: Float[Array, "batch ..."] | None = None
    ) -> Solution:
        """Returns `z*` and how the search for it went, `(value, steps, residual, converged)`.

        Where a sample has not converged its `value` is the best iterate. Log `steps` and `residual`
        during training, give `value` to `output`, and as `z0` to the next call on these inputs.
        """
        layer, u, args = self._problem(x)
        z0 = jnp.zeros_like(u) if z0 is None else z0
        return self._find(layer, z0, args, self._solver, self.adjoint)

    def output(self, solution: Solution) -> Float[Array, "batch ..."]:
        """Returns what the layer makes of a solution: `z*`, or what `on_failure` says."""
        return self._outcome(solution)

    def trajectory(
        self,
        x: PyTree[Shaped[ArrayLike, "batch ..."]],
        steps: Sequence[int],
        z0: Float[Array, "batch ..."] | None = None,
    ) -> tuple[list[Float[Array, "batch ..."]], Solution]:
        """Returns where the solver is after some steps, and the solution, for correction losses.

        A loss on the states on the way makes the solver arrive sooner (Bai et al. 2022, "Deep
        Equilibrium Optical Flow Estimation", section 3.3). A state has the derivative of one step
        of the layer there, and none of what came before it.

        Args:
          x: the inputs.
          steps: after how many steps, increasing and below the solver's `max_steps`. A solver with
            a memory begins it anew there.
          z0: where to start, by default zeros.

        Returns:
          The states `z`, one for each of `steps`, and the solution, found from the last of them.
        """
        solver = self._solver
        counts = [0, *steps, solver.max_steps]
        if any(a >= b for a, b in pairwise(counts)):
            raise ArgumentError(
                f"steps={list(steps)} must increase, from at least 1 to below "
                f"max_steps={solver.max_steps}."
            )
        layer, u, args = self._problem(x)
        z, states = jnp.zeros_like(u) if z0 is None else z0, []
        for before, after in pairwise(counts[:-1]):
            part = replace(solver, max_steps=after - before)
            found = self._find(layer, z, args, part, PhantomAdjoint(1, 0.0))
            states.append(found.value)
            z = lax.stop_gradient(found.value)
        rest = replace(solver, max_steps=solver.max_steps - counts[-2])
        return states, self._find(layer, z, args, rest, self.adjoint)

    def step(
        self, z: Float[Array, "batch ..."], x: PyTree[Shaped[ArrayLike, "batch ..."]]
    ) -> Float[Array, "batch ..."]:
        """Returns `cell(z) + inject(x)`: one layer."""
        layer, _, args = self._problem(x)
        return layer(z, args)

    def _problem(self, x: PyTree) -> tuple[_Layer, Array, tuple[nnx.State, Array]]:
        """The layer, `u = inject(x)`, and the layer's arguments."""
        u, graph, state = self._split(x)
        return _Layer(graph), u, (state, u)

    @property
    def _solver(self) -> SteppingSolver:
        # Or another dataclass, such as Optimistix.
        return Picard() if self.solver is None else cast(SteppingSolver, self.solver)

    def _find(self, layer, z0, args, solver, adjoint) -> Solution:
        computed = jax.eval_shape(layer.cell, z0, args[0])
        return find_equilibrium(
            layer,
            z0,
            args,
            solver=at_precision(solver, computed.dtype),
            adjoint=adjoint,
            on_failure=self.on_failure,
        )

    def _outcome(self, solution: Solution) -> Array:
        parameters = nnx.state(self, nnx.Param)
        return outcome(solution, self.on_failure, {"parameters": nnx.to_pure_dict(parameters)})


@dataclass(frozen=True)
class _Layer:
    """`cell(z) + u`; cells of the same structure give equal layers, which are compiled once."""

    graph: nnx.GraphDef

    def cell(self, z: Array, state: nnx.State) -> Array:
        return nnx.merge(self.graph, state)(z)

    def __call__(self, z: Array, args: tuple[nnx.State, Array]) -> Array:
        state, u = args
        out = self.cell(z, state)
        check_shapes("FixedPoint", z, out, u)
        return out.astype(u.dtype) + u


class DEQ(FixedPoint):
    """A deep equilibrium layer, `h* = φ(z*)`, dense or convolutional.

    `z* = W_std/√n · φ(z*) W + U_std/√d · x U + b_std · b`, `(batch, d) -> (batch, n)`, or with
    `kernel_size` the same with convolutions for products, `(batch, ..., d) -> (batch, ..., n)`.

    The dense one is the function of `stax.DEQ` with the same arguments; the other is that of
    `serial(FixedPoint(serial(φ, Conv(n, kernel_size)), Conv(n, kernel_size)), φ)`. `hidden` holds
    `W`, `inject` holds `U` and `b`. Gradients are implicit, in forward and reverse mode.

    **To train it**, pass `lipschitz=0.9`: training grows `W` until there is no equilibrium, and
    this keeps one. The layer is then `z = c · W φ(z) + ...` with `c <= 1` such that
    `|f(z) - f(z')| <= lipschitz |z - z'|`: every input has exactly one equilibrium, plain iteration
    finds it, and an iterate is within `residual / (1 - lipschitz)` of it. `c = 1` where the weights
    are small enough. A wide random `W` has norm `2 W_std`, so that at initialisation the network
    tends to the Gaussian process of `stax.DEQ` with `min(W_std, lipschitz / (2 Lip(φ)))` for
    `W_std`, and its NTK to the NTK of that.

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
      parameterization: `'ntk'` or `'standard'`, as of `Dense`. `None` is `'ntk'`, that of the
        infinitely wide network, or with `lipschitz` `'standard'`, that of the layers of `nnx`, for
        which the usual learning rates are meant.
      lipschitz: a bound below 1 of the layer's Lipschitz constant in `z`, kept by scaling the
        weights down once a solve where they are too large (their `spectral_bound` is
        `lipschitz / Lip(φ)`, as of `Dense`); `None` leaves them alone.
      dtype: of the products and of what the layer returns, as of `Dense`; `z` itself is of at least
        single precision.
      param_dtype: of the parameters, as of `Dense`.
      solver: what finds `z*`, as of `FixedPoint`. `None` is plain iteration: to the last digits, or
        with `lipschitz` to `rtol=1e-3`, which is what training needs.
      adjoint: how it is differentiated, as of `FixedPoint`.
      on_failure: what becomes of a sample without an equilibrium, as of `FixedPoint`.
      rngs: draws the parameters from its stream `params`.

    Raises:
      NoEquilibriumError: no input has an equilibrium: `W_std` is too large for a homogeneous `φ`.
      ValueError: an argument cannot be right; the message says why.
    """

    cell: Hidden  # pyright: ignore[reportIncompatibleVariableOverride]
    inject: Dense | Conv  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        W_std: Number,
        U_std: Number = 1.0,
        b_std: Number | None = None,
        activation: Phi = "relu",
        kernel_size: Sequence[int] | None = None,
        padding: Padding = "SAME",
        parameterization: Parameterization | None = None,
        lipschitz: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = None,
        rngs: nnx.Rngs | Keys,
    ):
        _checks.count("width", width)
        if _checks.is_traced(W_std, U_std, b_std):
            raise ArgumentError(
                "W_std, U_std or b_std is traced by jax.jit, grad or vmap, and a layer keeps them "
                "as numbers: pass numbers. nt_deq.deq_kernel and stax.DEQ are differentiable in "
                "them."
            )
        _checks.standard_deviations(W_std=W_std, U_std=U_std)
        phi = get_activation(activation)
        spectral_bound = None
        if lipschitz is not None:
            spectral_bound = _spectral_bound(lipschitz, phi)
            solver = Picard(rtol=TRAINING_RTOL) if solver is None else solver
            parameterization = parameterization or "standard"
        else:
            _check_stability(float(W_std), phi)

        def linear(features, W_std, b_std=None, spectral_bound=None):
            common = {
                "W_std": W_std,
                "b_std": b_std,
                "parameterization": parameterization or "ntk",
                "spectral_bound": spectral_bound,
                "dtype": dtype,
                "param_dtype": param_dtype,
                "rngs": rngs,
            }
            if kernel_size is None:
                return Dense(features, width, **common)
            return Conv(features, width, kernel_size, padding=padding, **common)

        if kernel_size is not None and padding == "VALID":
            raise ArgumentError(
                "padding='VALID' changes the shape of z, and the layer reads its own output; use "
                "'SAME' or 'CIRCULAR', or FixedPoint with inject of another padding."
            )
        cell = Hidden(phi, linear(width, W_std, spectral_bound=spectral_bound))
        inject = linear(in_features, U_std, b_std)
        super().__init__(
            cell,
            inject,
            solver=solver,
            adjoint=adjoint,
            on_failure=on_failure,
        )

    @property
    def activation(self) -> Activation:
        """`φ`."""
        return self.cell.activation

    @property
    def hidden(self) -> Dense | Conv:
        """The layer with the recurrent weights `W`."""
        return self.cell.linear

    def output(self, solution: Solution) -> Float[Array, "batch ..."]:
        """Returns `h* = φ(z*)` of a solution, or what `on_failure` says."""
        h = self.activation.fn(self._outcome(solution))
        return h if self.hidden.dtype is None else h.astype(self.hidden.dtype)


class Hidden(nnx.Module):
    """`φ`, then a linear layer: the cell of `DEQ`."""

    def __init__(self, activation: Activation, linear: Dense | Conv):
        self.activation, self.linear = activation, linear

    def __call__(self, z: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Applies both."""
        return self.linear(self.activation.fn(z))


def _spectral_bound(lipschitz: float, phi: Activation) -> float:
    """The norm of the weights with which `φ`, then the weights, has a Lipschitz constant."""
    if not 0 < lipschitz < 1:
        raise ArgumentError(
            f"lipschitz={lipschitz} must lie between 0 and 1, such as 0.9: at 1 the layer is no "
            "contraction any more."
        )
    if not 0 < phi.lipschitz < math.inf:
        raise ArgumentError(
            f"lipschitz={lipschitz} needs an activation with a finite Lipschitz constant, and that "
            f"of {phi.name} is {phi.lipschitz}."
        )
    return lipschitz / phi.lipschitz


@lru_cache(maxsize=256)  # said once
def _check_stability(W_std: float, phi: Activation) -> None:
    """Raises where no input has a stable equilibrium, and logs where not every network has one."""
    slope = phi.lipschitz**2  # bounds E[φ'²], which depends on the input
    if phi.homogeneous:  # it does not
        with jax.ensure_compile_time_eval():
            slope = float(phi.dual_diagonal(jnp.ones(()))[1])
        if W_std**2 * slope >= 1:
            raise NoEquilibriumError(
                f"W_std={W_std} must be below {1 / math.sqrt(slope):.6g} for {phi.name}: a wide "
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
