"""The end of `ż = velocity(z)`: of all samples together, or of each on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, PyTree

from nt_deq import _checks
from nt_deq.errors import ArgumentError, NotConvergedError
from nt_deq.fixed_point.implicit import keep
from nt_deq.fixed_point.solve import not_finite

if TYPE_CHECKING:
    from diffrax import AbstractAdjoint, AbstractSolver, AbstractStepSizeController

MAX_STEPS = 4096

OnFailure = Literal["raise", "nan"] | None
"""What becomes of a sample that was not integrated to the end."""

Velocity: TypeAlias = Callable[[Array, PyTree, PyTree], Array]
"""Of one sample, `(z, shared, own) -> ż`: of arguments of all samples, and of its own."""


class Trajectory(NamedTuple):
    """Where samples are at the end, and how they got there.

    Attributes:
      value: the state of every sample at the end.
      accepted: how many steps were taken.
      rejected: how many were tried and found too large.
      reached: whether the sample was integrated to the end, and is finite there.
    """

    value: Float[Array, "batch ..."]
    accepted: Int[Array, " batch"]
    rejected: Int[Array, " batch"]
    reached: Bool[Array, " batch"]


@dataclass(frozen=True)
class Residual:
    """So many layers of the residual network `z ← z + T/steps · velocity(z)`: Euler's rule."""

    steps: int

    def each(self, velocity: Velocity, z: Array, T: Array, shared: PyTree, own: PyTree):
        """The trajectories of all samples."""
        value, _ = self.together(_of_all(velocity), z, T, (shared, own))
        steps = jnp.full(len(z), self.steps)
        return Trajectory(value, steps, jnp.zeros_like(steps), _finite(value))

    def together(self, velocity: Callable[[Array, PyTree], Array], z: Array, T: Array, args):
        """The end, and that it was reached."""
        return euler(lambda z: velocity(z, args), z, T, self.steps), jnp.array(True)


@dataclass(frozen=True)
class Integration:
    """An integration by diffrax, whose names these are.

    Attributes:
      solver: `None` is `diffrax.Dopri8()`.
      stepsize_controller: `None` is a `diffrax.PIDController` to the accuracy of the dtype.
      adjoint: of all samples together. `None` is `diffrax.DirectAdjoint()`.
      dt0: the first step; `None` leaves it to the controller.
      max_steps: per sample.
    """

    solver: AbstractSolver | None = None
    stepsize_controller: AbstractStepSizeController | None = None
    adjoint: AbstractAdjoint | None = None
    dt0: float | None = None
    max_steps: int = MAX_STEPS

    def __hash__(self) -> int:  # what diffrax makes need not have one
        kinds = type(self.solver), type(self.stepsize_controller), type(self.adjoint)
        return hash((*kinds, self.dt0, self.max_steps))

    def each(self, velocity: Velocity, z: Array, T: Array, shared: PyTree, own: PyTree):
        """The trajectories of all samples, with steps of their own."""
        import diffrax

        def one(z, own):
            return self._solve(
                lambda z, args: velocity(z, *args), z, T, (shared, own), diffrax.ForwardMode()
            )

        found, reached = jax.vmap(one)(z, own)
        assert found.ys is not None
        value, stats = found.ys[:, 0], found.stats
        accepted, rejected = stats["num_accepted_steps"], stats["num_rejected_steps"]
        return Trajectory(value, accepted, rejected, reached & _finite(value))

    def together(self, velocity: Callable[[Array, PyTree], Array], z: Array, T: Array, args):
        """The end of all samples by the same steps, and whether it was reached."""
        import diffrax

        adjoint = diffrax.DirectAdjoint() if self.adjoint is None else self.adjoint
        found, reached = self._solve(velocity, z, T, args, adjoint)
        assert found.ys is not None
        return found.ys[0], reached

    def _solve(self, velocity, z, T, args, adjoint):
        import diffrax

        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, z, args: velocity(z, args)),
            diffrax.Dopri8() if self.solver is None else self.solver,
            t0=jnp.zeros_like(T),
            t1=T,
            dt0=self.dt0,
            y0=z,
            args=args,
            stepsize_controller=self.stepsize_controller or _accurate(z.dtype, T),
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=False,
        )
        return found, found.result == diffrax.RESULTS.successful


def _accurate(dtype, T: Array):
    """Control to the accuracy of the dtype, that gives up where a step is nothing beside `T`."""
    import diffrax
    import optimistix

    def largest(y):
        norm = optimistix.max_norm(y)
        return jnp.where(jnp.isnan(norm), jnp.inf, norm)  # a smaller step, not one of NaN

    eps = float(jnp.finfo(dtype).eps)
    return diffrax.PIDController(
        rtol=16 * eps,
        atol=16 * eps,
        norm=largest,
        dtmin=eps * lax.stop_gradient(T),
        force_dtmin=False,
    )


def euler(
    velocity: Callable[[Array], Array],
    z: Float[Array, "*shape"],
    T: Float[Array, ""],
    steps: int,
) -> Float[Array, "*shape"]:
    """So many layers of the residual network `z ← z + T/steps · velocity(z)`."""
    return lax.fori_loop(0, steps, lambda _, z: z + T / steps * velocity(z), z)


def integrate(
    velocity: Callable[[Array], Array], z: Float[Array, "*shape"], T: Float[Array, ""]
) -> tuple[Float[Array, "*shape"], Bool[Array, ""]]:
    """`z(T)` to the accuracy of the dtype, by diffrax's `Dopri8`, and whether it got there.

    The step is that of the entry that needs the smallest. Differentiable in both modes.
    """
    return Integration().together(lambda z, args: velocity(z), z, T, None)


def trajectories(
    method: Residual | Integration,
    velocity: Velocity,
    z: Float[Array, "batch ..."],
    T: Float[Array, ""],
    shared: PyTree,
    own: PyTree,
) -> Trajectory:
    """The ends of the samples of a finite network, each on its own, differentiable.

    A sample that does not reach the end takes no part in the derivative, which is that of the
    others together, by the steps of the one that needs the smallest: so its infinities do not enter
    what they share.

    Args:
      method: how to get there.
      velocity: of one sample; the same object, or an equal one, is compiled once.
      z: where the samples start.
      T: the end.
      shared: arguments of the velocity of all samples.
      own: those of each sample, along the first axis.
    """
    import equinox

    first_z, first_own = jax.tree.map(lambda a: a[0], (z, own))
    # What the velocity closes over and is traced becomes an argument, to be differentiated too.
    converted, closed_over = jax.closure_convert(velocity, first_z, shared, first_own)

    def with_closed_over(z, shared, own):
        return converted(z, shared[0], own, *shared[1])

    if closed_over:
        velocity, shared = with_closed_over, (shared, closed_over)
    return equinox.filter_jit(_trajectories)(method, velocity, z, T, shared, own)


def _trajectories(method, velocity, z, T, shared, own) -> Trajectory:
    import equinox

    @equinox.filter_custom_jvp
    def solve(z, T, shared, own):
        return tuple(method.each(velocity, z, T, shared, own))

    @solve.def_jvp
    def _(primals, tangents):
        found = Trajectory(*solve(*primals))

        def end(z, T, shared, own):
            masked_z, masked_own = (_where(found.reached, a) for a in (z, own))
            args = shared, masked_own, found.reached
            value, reached = method.together(_of_those(velocity), masked_z, T, args)
            # Of the others, something that depends on everything: NaN where it is asked for.
            other = _of_all(velocity)(masked_z, (shared, masked_own))
            other = other + _of_size(T + _sums((z, own)), other.ndim)
            every = jnp.broadcast_to(reached, found.reached.shape)
            return keep(every, jnp.where(_of_size(found.reached, value.ndim), value, other))

        _, tangent = equinox.filter_jvp(end, primals, tangents)
        return tuple(found), (tangent, None, None, None)

    return Trajectory(*solve(z, T, shared, own))


def _of_all(velocity: Velocity) -> Callable[[Array, PyTree], Array]:
    return lambda z, args: jax.vmap(velocity, (0, None, 0))(z, *args)


def _of_those(velocity: Velocity) -> Callable[[Array, PyTree], Array]:
    """The velocity of the samples that take part, and 0 of the others."""

    def masked(z, args):
        shared, own, taking_part = args
        rate = _of_all(velocity)(z, (shared, own))
        return jnp.where(_of_size(taking_part, rate.ndim), rate, jnp.zeros_like(rate))

    return masked


def _where(samples: Bool[Array, " batch"], tree: PyTree) -> PyTree:
    """A tree whose floating arrays are 0 in the samples that are left out."""

    def select(a):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return jnp.where(_of_size(samples, a.ndim), a, jnp.zeros_like(a))

    return jax.tree.map(select, tree)


def _sums(tree: PyTree) -> Float[Array, " batch"]:
    """The sum of the floating arrays of a tree, sample by sample."""
    floating = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    sums = [jnp.sum(a, axis=tuple(range(1, a.ndim))) for a in floating]
    return jnp.sum(jnp.stack(sums), axis=0)


def _of_size(samples: Array, ndim: int) -> Array:
    return samples.reshape(samples.shape + (1,) * (ndim - 1))


def _finite(z: Float[Array, "batch ..."]) -> Bool[Array, " batch"]:
    return jnp.all(jnp.isfinite(z), axis=tuple(range(1, z.ndim)))


def check_on_failure(on_failure: OnFailure) -> None:
    """Raises unless it is one of the known."""
    known = get_args(get_args(OnFailure)[0])
    if on_failure is not None and on_failure not in known:
        raise ArgumentError(f"on_failure={on_failure!r} must be one of {known}, or None.")


def trajectory_end(
    found: Trajectory, on_failure: OnFailure, given: dict[str, PyTree]
) -> Float[Array, "batch ..."]:
    """The value of trajectories, and what `on_failure` says where a sample did not get to the end.

    Args:
      found: the trajectories.
      on_failure: `'raise'`: an error, also where the call is traced, by `equinox.error_if`.
        `'nan'`: the sample is NaN. `None`: an error, and where the call is traced NaN.
      given: what the velocity computed with, by name; an error says what of it is not finite.

    Raises:
      NotConvergedError: some sample did not get to the end.
    """
    value, reached, traced = found.value, found.reached, _checks.is_traced(found, given)
    if on_failure == "nan" or (on_failure is None and traced):
        return keep(reached, value)
    if traced:
        import equinox

        value = equinox.error_if(value, ~jnp.all(reached), _NOT_REACHED + _REMEDY)
    elif not np.all(reached):
        raise NotConvergedError(_message(found, not_finite(given)))
    return keep(reached, value)


_NOT_REACHED = "the finite network was not integrated to its end T"
_REMEDY = (
    "make T or the weights of the cell smaller, its leak larger, or max_steps or the tolerance."
)


def _message(found: Trajectory, broken: list[str]) -> str:
    failed = np.flatnonzero(~np.asarray(found.reached))
    who = f"{_NOT_REACHED} for {_checks.rows('x', failed)}"
    if broken:
        return (
            f"{who}, because {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} NaN or "
            "infinite: if these are parameters, training diverged before this call."
        )
    first = failed[0]
    return (
        f"{who}: after {found.accepted[first]} steps, and {found.rejected[first]} that were too "
        f"large, its state grew beyond {found.value.dtype} or the steps were used up; {_REMEDY}"
    )
