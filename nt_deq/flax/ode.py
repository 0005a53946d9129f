"""Neural ODEs and tied residual networks as `flax.nnx` modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, random
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree, Shaped

from nt_deq import _checks
from nt_deq.errors import ArgumentError
from nt_deq.flax.tied import Tied, check_shapes
from nt_deq.trajectory import (
    MAX_STEPS,
    Integration,
    OnFailure,
    Residual,
    Trajectory,
    check_on_failure,
    trajectories,
    trajectory_end,
)

if TYPE_CHECKING:
    from diffrax import AbstractAdjoint, AbstractSolver, AbstractStepSizeController


class NeuralODE(Tied):
    """A neural ODE, `ż = -leak · z + cell(z)` from `z(0) = inject(x)`, with tied weights: `z(T)`.

    The function of `stax.NeuralODE(cell, inject, ...)`, from any nnx modules. Returns the state
    itself: put the nonlinearity and the readout after it. The cell is applied with its state as it
    is at the start (running statistics, keys of dropout, of which every sample has its own), the
    same at all times, and what it changes is dropped. Layers of the cell with a `spectral_bound`
    are scaled once, before the first step. `z` is of at least single precision, also where the cell
    computes in bfloat16.

    `solver`, `stepsize_controller`, `adjoint`, `dt0` and `max_steps` are those of
    `diffrax.diffeqsolve`. Every sample has steps of its own, and its value does not depend on the
    others; the derivative is that of all samples together, by the steps of the one that needs the
    smallest. A sample that does not reach the end takes no part in it.

    Args:
      cell: what moves the state, `z -> z`, `(batch, ...)`, each sample on its own; for example
        `nnx.Sequential(nnx.relu, Dense(64, 64, rngs=rngs))`.
      inject: what the input goes through, once, `x -> u`, of the shape of `z`.
      T: the time at which the state is read, above 0.
      leak: the rate at which the state decays, at least 0.
      steps: of Euler's rule, `z ← z + T/steps · ż`: the residual network of so many layers. `None`
        is the differential equation. With it, the arguments of diffrax have no meaning, and are
        refused.
      inject_always: whether `inject(x)` is added at all times, with `z(0) = 0`, instead of being
        the first state.
      solver: `None` is `diffrax.Dopri8()`; where a few digits do, `diffrax.Tsit5()` takes less
        time.
      stepsize_controller: `None` asks for the accuracy of the dtype. For training
        `diffrax.PIDController(rtol=1e-3, atol=1e-3)` is usual.
      adjoint: how the solution is differentiated. `None` is `diffrax.DirectAdjoint()`, which has
        forward and reverse mode; `diffrax.RecursiveCheckpointAdjoint()`, reverse mode alone, takes
        less time and memory; `diffrax.BacksolveAdjoint()` integrates backwards in time, in constant
        memory, with an error of the tolerance; `diffrax.ForwardMode()` has forward mode alone.
      dt0: the first step; `None` leaves it to the controller, `diffrax.ConstantStepSize()` needs
        it.
      max_steps: how many steps a sample may take, those that were too large included.
      on_failure: what becomes of a sample that does not reach `T`. `'raise'`: an error, also where
        the call is traced, by `equinox.error_if`. `'nan'`: it is NaN, as is a derivative that goes
        through it. `None`: an error, and where the call is traced NaN.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        cell: nnx.Module,
        inject: Callable[[Array], Array],
        *,
        T: float = 1.0,
        leak: float = 0.0,
        steps: int | None = None,
        inject_always: bool = False,
        solver: AbstractSolver | None = None,
        stepsize_controller: AbstractStepSizeController | None = None,
        adjoint: AbstractAdjoint | None = None,
        dt0: float | None = None,
        max_steps: int = MAX_STEPS,
        on_failure: OnFailure = None,
    ):
        super().__init__(cell, inject)
        if _checks.is_traced(T, leak, dt0):
            raise ArgumentError(
                "T, leak or dt0 is traced by jax.jit, grad or vmap, and a layer keeps them as "
                "numbers: pass numbers. stax.NeuralODE is differentiable in T and leak."
            )
        _checks.time("T", T)
        _checks.time("leak", leak, positive=False)
        check_on_failure(on_failure)
        _checks.count("max_steps", max_steps)
        given = {
            "solver": solver,
            "stepsize_controller": stepsize_controller,
            "adjoint": adjoint,
            "dt0": dt0,
        }
        if steps is None:
            _check_kinds(given)
            self.method = Integration(**given, max_steps=max_steps)
        else:
            _checks.count("steps", steps)
            _check_none(given, steps)
            self.method = Residual(steps)
        self.T, self.leak, self.inject_always = float(T), float(leak), inject_always
        self.on_failure: OnFailure = on_failure

    def __call__(self, x: PyTree[Shaped[ArrayLike, "batch ..."]]) -> Float[Array, "batch ..."]:
        """Returns `z(T)`, `output(solve(x))`.

        Raises:
          NotConvergedError: some sample does not reach `T`; `on_failure` says what else may happen.
          ValueError: the cell does not keep the shape of `z`.
        """
        return self.output(self.solve(x))

    def solve(self, x: PyTree[Shaped[ArrayLike, "batch ..."]]) -> Trajectory:
        """Returns `z(T)` and how every sample got there, `(value, accepted, rejected, reached)`.

        `accepted` steps were taken and `rejected` were too large; where `reached` is false, `value`
        is where the sample was given up. Give the trajectory to `output`.
        """
        u, graph, state = self._split(x)
        keys, state = nnx.split_state(state, nnx.RngKey, ...)
        keys = jax.tree.map(lambda key: random.split(key, len(u)), keys)
        start = jnp.zeros_like(u) if self.inject_always else u
        T, leak = (jnp.asarray(value, u.dtype) for value in (self.T, self.leak))
        velocity = _Velocity(graph, self.inject_always)
        return trajectories(self.method, velocity, start, T, (state, leak), (u, keys))

    def output(self, trajectory: Trajectory) -> Float[Array, "batch ..."]:
        """Returns `z(T)` of a trajectory, or what `on_failure` says."""
        parameters = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        return trajectory_end(trajectory, self.on_failure, {"parameters": parameters})


@dataclass(frozen=True)
class _Velocity:
    """`ż` of one sample; cells of the same structure give equal ones, which are compiled once."""

    graph: nnx.GraphDef
    inject_always: bool

    def __call__(
        self, z: Array, shared: tuple[nnx.State, Array], own: tuple[Array, nnx.State]
    ) -> Array:
        (state, leak), (u, keys) = shared, own
        keys, state = jax.tree.map(lambda a: a, (keys, state))  # variables of this trace
        out = nnx.merge(self.graph, keys, state)(z[None])
        check_shapes("NeuralODE", z[None], out, u[None])
        out = out[0].astype(z.dtype) - leak * z
        return out + u if self.inject_always else out


def _check_kinds(given: dict[str, object]) -> None:
    """Raises unless the arguments of diffrax are of its kinds."""
    import diffrax

    kinds = {
        "solver": diffrax.AbstractSolver,
        "stepsize_controller": diffrax.AbstractStepSizeController,
        "adjoint": diffrax.AbstractAdjoint,
    }
    for name, kind in kinds.items():
        value = given[name]
        if value is not None and not isinstance(value, kind):
            raise ArgumentError(f"{name}={value!r} must be a diffrax.{kind.__name__}, or None.")
        leaves = jax.tree.leaves(value)
        if any(isinstance(leaf, Array | np.ndarray) for leaf in leaves):
            raise ArgumentError(
                f"{name}={value!r} holds arrays, and a layer keeps it as it is: pass numbers."
            )
    if given["dt0"] is not None:
        _checks.time("dt0", given["dt0"])
    if isinstance(given["stepsize_controller"], diffrax.ConstantStepSize) and given["dt0"] is None:
        raise ArgumentError("stepsize_controller=ConstantStepSize() needs dt0: pass the step.")


def _check_none(given: dict[str, object], steps: int) -> None:
    """Raises unless none of the arguments of diffrax is given."""
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(
                f"{name}={value!r} is of the differential equation, and steps={steps} is a "
                "residual network: leave one of them out."
            )
