"""The kernel of `ż = -λ z + cell(z) (+ inject(x))`, with one set of weights for all times.

The state meets the same weights again, so that the covariances of *different* times enter. With
`C(t, s) = Cov(z_t(x), z_s(x'))`, `𝒞` the cell's NNGP map at the variances `C_xx(t, t)` and
`C_x'x'(s, s)`, and `A`, `L` the affine map by which the cell's `ntk` depends on what comes in,

    (∂ₜ + λ)(∂ₛ + λ) C = 𝒞(C)          (∂ₜ + λ)(∂ₛ + λ) Ξ = A + L Ξ

(Gao, Sun, Liu & Gao, arXiv 2509.22436; the second is Price's theorem). In integral form these are
fixed-point equations of Volterra's kind, on nodes in both times (`nt_deq.kernels.time_grids`), and
a residual network of `L` Euler steps is the same on other nodes. No pair of inputs enters another's
equation: those of the inputs with themselves are solved first, those of the pairs after them. Every
sample takes the first of a few grids whose estimate of its own error is within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from nt_deq import _checks
from nt_deq.fixed_point.implicit import implicit_vectors, keep, select, solve_linear
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import Evaluation, Solver, norm, rounding
from nt_deq.kernels.cell import KernelMap, in_order
from nt_deq.kernels.pair_batches import Batches, batches, gather
from nt_deq.kernels.tiles import batch_size
from nt_deq.kernels.time_grids import Euler, Grid, Square, Triangles, answer
from nt_deq.typing import Number


class Dynamics(NamedTuple):
    """`ż = -leak z + cell(z)`, with `inject(x)` for `z(0)` or always, until `T`.

    Attributes:
      T: the end.
      leak: the rate at which the state decays; `None` is 0, and cheaper.
      inject_always: whether `inject(x)` is added all the time, and `z(0) = 0`.
      steps: of Euler's rule; `None` is the differential equation.
      solver: of the integral equation.
    """

    T: Number
    leak: Number | None
    inject_always: bool = False
    steps: int | None = None
    solver: Solver = Picard()


class Ends(NamedTuple):
    """What is known at the end, a sample each.

    Attributes:
      nngp, ntk: `C(T, T)` and `Ξ(T, T)`, the latter where it is asked for.
      error: the estimate of what the nodes leave, relative to the largest variances.
      residual: where the solver ended.
      converged: whether the fixed point was found.
    """

    nngp: Float[Array, "*shape"]
    ntk: Float[Array, "*shape"] | None
    error: Float[Array, "*batch"]
    residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class TwoTimeSolution(NamedTuple):
    """The kernel of `z(T)`, NaN where there is none, and how it was found.

    Attributes:
      kernel: of `z(T)`.
      injected: the largest variances of `inject(x)`, of the first and of the second inputs.
      own1, own2: of the first and of the second inputs with themselves.
      pairs: of the pairs.
    """

    kernel: nt.Kernel
    injected: tuple[Float[Array, " n1"], Float[Array, " n2"]]
    own1: Ends
    own2: Ends
    pairs: Ends

    @property
    def tolerance(self) -> float:
        """What an error must not exceed."""
        return tolerance(self.pairs.error.dtype)


def tolerance(dtype: DTypeLike) -> float:
    """The largest relative error that the choice of nodes may leave, as it is estimated."""
    return 1e-6 if jnp.finfo(dtype).bits < 64 else 1e-9


class Prepared(NamedTuple):
    """A grid for given `T` and `leak`.

    Attributes:
      grid: the nodes.
      integral: what its integration needs.
      answer: to what is injected.
    """

    grid: Grid
    integral: Array
    answer: Float[Array, " nodes"]


def grids_for(dtype: DTypeLike, steps: int | None) -> tuple[Grid, ...]:
    """From the cheapest on: smooth functions, kinks where the times meet, long times."""
    if steps is not None:
        return (Euler(steps),)
    if jnp.finfo(dtype).bits < 64:
        return Square(9, 1, 32), Triangles(9, 15, 32), Square(32, 2, 32)
    return Square(13, 1, 48), Triangles(18, 28, 48), Square(48, 2, 48)


class Known(NamedTuple):
    """What is known of the inputs with themselves, so far.

    Attributes:
      variances: on the clock.
      exists: whether they are found.
    """

    variances: Float[Array, "inputs *block clock"]
    exists: Bool[Array, " inputs"]


def solve_two_time(
    kernel_map: KernelMap, inject: nt.Kernel, dynamics: Dynamics, grids: Sequence[Grid]
) -> TwoTimeSolution:
    """Solves the kernel of `z(T)`.

    Args:
      kernel_map: the cell's `kernel_fn`.
      inject: the kernel of `inject(x)`.
      dynamics: the rest of the equation.
      grids: to try, from the cheapest on.
    """
    (T, leak, inject_always, _, solver), like = dynamics, inject.nngp
    prepared = [
        Prepared(g, g.integral(T, leak, like), answer(g, T, leak, inject_always, like))
        for g in grids
    ]
    tol, channels = tolerance(like.dtype), partial(_channels, in_order(kernel_map), inject)
    nodes = len(grids[len(grids) // 2].mirror)  # few batches take the largest grid
    covariances, jobs = batches(inject, batch_size(nodes * math.prod(like.shape[2:])))

    def step(known: Known, job: Batches) -> tuple[Known, Ends]:
        of_two = ~job.same & known.exists[job.first] & known.exists[job.second]
        exists = job.usable & (job.own | of_two)
        given = known.variances[job.first], known.variances[job.second]

        def solve(prepared):
            return _solve_on(prepared, channels, job, given, exists, solver)

        variances, ends = _first_found(solve, prepared, exists, tol)
        found = exists & _found(ends, tol)
        # What is written past the end is left out.
        numbers = jnp.where(job.own & found, job.first, len(known.exists))
        known = Known(
            known.variances.at[numbers].set(variances, mode="drop"),
            known.exists.at[numbers].set(True, mode="drop"),
        )
        return known, ends._replace(converged=exists & ends.converged)

    clock = jnp.repeat(covariances[..., None], grids[0].clock, axis=-1)
    known = Known(clock, jnp.zeros(len(covariances), bool))
    known, ends = lax.scan(jax.checkpoint(step, prevent_cse=False), known, jobs)
    return _solution(inject, known.exists, ends, tol)


def solve_with_fewest(
    solve: Callable[[tuple[Grid, ...]], TwoTimeSolution], grids: tuple[Grid, ...], traced: bool
) -> TwoTimeSolution:
    """By the first two grids, and by all of them where those are not enough: each is compiled.

    Args:
      solve: by given grids.
      grids: all.
      traced: whether nobody will know if they are enough, so that all are needed.
    """
    if not traced:
        found = solve(grids[:2])
        if not _checks.is_traced(found) and _all_found(found):
            return found
    return solve(grids)


def _all_found(solution: TwoTimeSolution) -> bool:
    ends = solution.own1, solution.own2, solution.pairs
    return all(np.all(_found(each, solution.tolerance)) for each in ends)


def _solution(inject: nt.Kernel, exists: Array, ends: Ends, tol: float) -> TwoTimeSolution:
    """The kernel, of what is known of all pairs."""
    n1, n2 = inject.nngp.shape[:2]
    own1, own2, pairs = (
        jax.tree.unflatten(jax.tree.structure(ends), part)
        for part in zip(*(gather(inject, a) for a in jax.tree.leaves(ends)), strict=True)
    )
    exists1, exists2 = exists[:n1], exists[-n2:]
    both = exists1[:, None] & exists2[None, :]
    found = both & _found(pairs, tol)
    kernel = inject.replace(
        cov1=keep(exists1, own1.nngp),
        cov2=None if inject.cov2 is None else keep(exists2, own2.nngp),
        nngp=keep(found, pairs.nngp),
        ntk=None if pairs.ntk is None else keep(found, pairs.ntk),
    )
    pairs = pairs._replace(converged=pairs.converged | ~both)
    injected = other = _largest(inject.cov1, exists1.shape)
    if inject.cov2 is not None:
        other = _largest(inject.cov2, exists2.shape)
    return TwoTimeSolution(kernel, (injected, other), own1, own2, pairs)


def _found(ends: Ends, tol: float) -> Bool[Array, "*batch"]:
    return ends.converged & (ends.error <= tol)


def _first_found(
    solve: Callable[[Prepared], tuple[Array, Ends]],
    grids: Sequence[Prepared],
    exists: Bool[Array, "*batch"],
    tol: float,
) -> tuple[Array, Ends]:
    """The results of the first grid that is good enough, pair by pair; else of the best.

    At a kink the last degrees are a fraction of the error: the first grid must reach a 16th.
    """
    result, bound = solve(grids[0]), tol / 16
    for prepared in grids[1:]:

        def improve(result, prepared=prepared, bound=bound):
            better = solve(prepared)
            take = better[1].converged & ~(result[1].error <= better[1].error)
            take &= ~_found(result[1], bound)
            return jax.tree.map(partial(_where, take), better, result)

        settled = _found(result[1], bound) | ~exists
        result = lax.cond(jnp.all(settled), lambda result: result, improve, result)
        bound = tol
    return result


def _where(take: Bool[Array, "*batch"], a: Array, b: Array) -> Array:
    return jnp.where(take.reshape(take.shape + (1,) * (a.ndim - take.ndim)), a, b)


def _channels(cell, inject, k1, k2, nngp, ntk, same, mask1, mask2) -> tuple[Array, Array | None]:
    """What the cell makes of pairs at their nodes, `(size, *block, nodes)`."""
    one = inject.slice(slice(0, 1), slice(0, 1))

    def at(k1, k2, nngp, ntk, same, mask1, mask2):  # of one pair at one node
        out = cell(one.replace(
            cov1=k1[None], cov2=k2[None], nngp=nngp[None, None],
            ntk=None if ntk is None else ntk[None, None], x1_is_x2=same,
            mask1=None if mask1 is None else mask1[None],
            mask2=None if mask2 is None else mask2[None],
        ))  # fmt: skip
        return out.nngp[0, 0], None if ntk is None else out.ntk[0, 0]

    over_nodes = jax.vmap(at, (-1, -1, -1, -1, None, None, None), -1)
    return jax.vmap(over_nodes)(k1, k2, nngp, ntk, same, mask1, mask2)


def _solve_on(
    prepared: Prepared,
    channels: Callable,
    job: Batches,
    given: tuple[Array, Array],
    exists: Bool[Array, " size"],
    solver: Solver,
) -> tuple[Array, Ends]:
    """`C(t, t)` on the clock, and the ends, by one grid.

    `C` and, where it is asked for, `Ξ` are one vector per pair: neither costs more than the other
    at the same `C`.

    Args:
      prepared: the grid.
      channels: what the cell makes of pairs at nodes.
      job: the pairs.
      given: the variances of both inputs on the clock, of pairs of two.
      exists: where false, `C` and `Ξ` are what is injected.
      solver: of the integral equation.
    """
    grid, dtype = prepared.grid, job.nngp.dtype
    k1, k2 = (grid.at_nodes(grid.from_clock(k))[side] for side, k in enumerate(given))
    given = k1, k2
    shape = (*job.nngp.shape, len(grid.mirror))
    sources = (job.nngp,) if job.ntk is None else (job.nngp, job.ntk)
    pairs = job.own, job.same, job.mask1, job.mask2

    def variances(nngp, own, given):
        itself = grid.at_nodes(grid.at_equal_times(nngp))
        return [jnp.where(own, a, b) for a, b in zip(itself, given, strict=True)]

    def cell(integrals, given, pairs):
        own, *rest = pairs
        nngp, *ntk = integrals
        made = channels(*variances(nngp, own, given), nngp, *(ntk or [None]), *rest)
        return made[: len(integrals)]

    nodes = (jnp.zeros(shape, dtype),) * len(sources)
    converted, closed_over = jax.closure_convert(cell, nodes, given, pairs)

    def split(y):
        return tuple(part.reshape(shape) / weights for part in jnp.split(y, len(sources), axis=-1))

    def join(parts):
        return jnp.concatenate([(a * weights).reshape(len(a), -1) for a in parts], axis=-1)

    def layer(y, args):
        base, integral, given, pairs, exists, closed_over = args
        made = converted(split(y), given, pairs, *closed_over)
        made = [a + grid.integrate(integral, b) for a, b in zip(base, made, strict=True)]
        return jnp.where(exists[:, None], join(made), join(base))

    weights = _weights(grid, dtype, len(shape))
    answered = prepared.answer.reshape(weights.shape)
    base = tuple(a[..., None] * answered for a in sources)
    args = base, prepared.integral, given, pairs, exists, closed_over
    known = lax.stop_gradient(args)
    scale = jnp.where(job.own, 0, _scale(*(k * weights for k in known[2])))
    start = join(known[0])
    root = solver.solve_vectors(
        lambda y, args: Evaluation(layer(y, args), scale), start, known, rounding(dtype), False
    )
    # One step more: what the solver leaves is averaged by the integral.
    y = select(root.converged, layer(root.value, known), start)
    nngp, *ntk = split(implicit_vectors(layer, partial(_solve_linear, solver), y, args))

    batch, found = exists.shape, lax.stop_gradient([nngp, *ntk])
    first, second = (_largest(k, batch) for k in variances(found[0], job.own, known[2]))
    most = jnp.sqrt(first) * jnp.sqrt(second)
    for each in found:
        most = jnp.maximum(most, _largest(each, batch))
    missing = sum(_spread(each - grid.rough(each)) for each in found)
    error = missing / jnp.where(most == 0, 1, most)
    ends = [each[..., grid.end] for each in (nngp, *ntk)]
    ends = Ends(ends[0], ends[1] if ntk else None, error, root.residual, root.converged)
    return grid.to_clock(grid.at_equal_times(nngp)), ends


def _weights(grid: Grid, dtype: DTypeLike, ndim: int) -> np.ndarray:
    """By which the nodes count in the norm of a residual: the end as much as all others.

    They are the last of so many axes.
    """
    count = len(grid.mirror)
    weights = np.where(np.arange(count) == grid.end, 1, count**-0.5)
    return weights.reshape((1,) * (ndim - 1) + (count,)).astype(dtype)


def _largest(y: Array, batch: tuple[int, ...]) -> Array:
    return jnp.max(jnp.abs(y.reshape(*batch, -1)), axis=-1)


def _spread(y: Float[Array, "size *block nodes"]) -> Float[Array, " size"]:
    """The largest quadratic mean over the nodes: rounding is less of it than of the largest."""
    mean = jnp.sqrt(jnp.mean(jnp.square(y), axis=-1))
    return _largest(mean, mean.shape[:1])


def _scale(k1: Array, k2: Array) -> Array:
    """`√(‖K(x, x)‖ ‖K(x', x')‖)` over the nodes, one number per pair."""
    first, second = (jnp.sqrt(norm(k.reshape(len(k), -1))) for k in (k1, k2))
    return first * second


def _solve_linear(solver, matvec, b):
    solution = solve_linear(solver, matvec, b, rounding(b.dtype))
    return select(solution.converged, solution.value, jnp.nan)
