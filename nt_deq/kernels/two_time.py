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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import neural_tangents as nt
from jax import Array, lax
from jaxtyping import Bool, Float

from nt_deq.fixed_point.implicit import implicit_vectors, keep, select, solve_linear
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solver import Evaluation, Solver, norm, rounding
from nt_deq.kernels.cell import KernelMap, in_order, mirrored, swapped
from nt_deq.kernels.tiles import by_tiles
from nt_deq.kernels.time_grids import Euler, Grid, Square, Triangles, answer
from nt_deq.typing import Number

_CLOCK = 48  # nodes of the variance as a function of time


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
      tolerance: what an error must not exceed.
    """

    kernel: nt.Kernel
    injected: tuple[Float[Array, " n1"], Float[Array, " n2"]]
    own1: Ends
    own2: Ends
    pairs: Ends
    tolerance: float


def tolerance(dtype) -> float:
    """The largest relative error that the choice of nodes may leave."""
    return 1e-6 if jnp.finfo(dtype).bits < 64 else 1e-9


class Prepared(NamedTuple):
    """A grid for given `T` and `leak`.

    Attributes:
      integral: what its integration needs.
      answer: to what is injected.
    """

    integral: Array
    answer: Float[Array, " nodes"]


def _grids(dtype, steps: int | None) -> tuple[Grid, ...]:
    """From the cheapest on: smooth functions, kinks where the times meet, long times."""
    if steps is not None:
        return (Euler(steps),)
    single = jnp.finfo(dtype).bits < 64
    square, along, across, large = (8, 8, 14, 32) if single else (12, 18, 28, 48)
    triangles = Triangles(along, across, _CLOCK)
    return Square(square, 1, _CLOCK), triangles, Square(large, 2, _CLOCK)


def solve_two_time(kernel_map: KernelMap, inject: nt.Kernel, dynamics: Dynamics) -> TwoTimeSolution:
    """Solves the kernel of `z(T)`.

    Args:
      kernel_map: the cell's `kernel_fn`.
      inject: the kernel of `inject(x)`.
      dynamics: the rest of the equation.
    """
    cell, dtype = in_order(kernel_map), inject.nngp.dtype
    tol, (T, leak, inject_always, steps, solver) = tolerance(dtype), dynamics
    grids = [
        (grid, Prepared(grid.integral(T, leak, inject.nngp),
                        answer(grid, T, leak, inject_always, inject.nngp)))
        for grid in _grids(dtype, steps)
    ]  # fmt: skip
    symmetric = inject.cov2 is None
    ntk = None
    if inject.ntk is not None and symmetric:
        ntk = inject.ntk[jnp.diag_indices(len(inject.cov1))]
    own1, variance1 = _solve_own(cell, inject, ntk, solver, grids, tol)
    own2, variance2 = own1, variance1
    if not symmetric:
        own2, variance2 = _solve_own(cell, swapped(inject), None, solver, grids, tol)
    exists1, exists2 = (_found(own, tol) for own in (own1, own2))
    exists = exists1[:, None] & exists2[None, :]
    pairs = _solve_pairs(cell, inject, variance1, variance2, exists, solver, grids, tol)
    if symmetric:
        diagonal = jnp.diag_indices(len(inject.cov1))
        pairs = jax.tree.map(lambda whole, own: whole.at[diagonal].set(own), pairs, own1)
    found = exists & _found(pairs, tol)
    kernel = inject.replace(
        cov1=keep(exists1, own1.nngp),
        cov2=None if symmetric else keep(exists2, own2.nngp),
        nngp=keep(found, pairs.nngp),
        ntk=None if pairs.ntk is None else keep(found, pairs.ntk),
    )
    pairs = pairs._replace(converged=pairs.converged | ~exists)
    largest = _largest(inject.cov1, exists1.shape)
    injected = largest, largest if inject.cov2 is None else _largest(inject.cov2, exists2.shape)
    return TwoTimeSolution(kernel, injected, own1, own2, pairs, tol)


def _found(ends: Ends, tol: float) -> Bool[Array, "*batch"]:
    return ends.converged & (ends.error <= tol)


def _first_found(
    solve: Callable, grids: Sequence[tuple[Grid, Prepared]], ends: Callable, tol: float, exists=True
):
    """The results of the first grid that is good enough, sample by sample; else of the best.

    At a kink the last degrees are a fraction of the error: the first grid must reach a quarter.
    """
    result, bound = solve(*grids[0]), tol / 4
    for grid, prepared in grids[1:]:

        def improve(result, grid=grid, prepared=prepared, bound=bound):
            better = solve(grid, prepared)
            worse = ends(better).converged & ~(ends(result).error <= ends(better).error)
            take = worse & ~_found(ends(result), bound)
            return jax.tree.map(lambda a, b: jnp.where(_over(take, a), b, a), result, better)

        settled = _found(ends(result), bound) | ~jnp.asarray(exists)
        result = lax.cond(jnp.all(settled), lambda result: result, improve, result)
        bound = tol
    return result


def _solve_own(cell, inject, ntk, solver, grids, tol) -> tuple[Ends, Array]:
    """Every input with itself; and its variance on the clock, `(n, ..., clock)`."""
    one = inject.slice(slice(0, 1), slice(0, 1))
    injected, mask = inject.cov1, inject.mask1

    def channels(k1, k2, nngp, ntk):  # of one input at one pair of times
        def at(k1, k2, nngp, ntk, mask):
            k = one.replace(
                cov1=k1[None], cov2=k2[None], nngp=nngp[None, None],
                ntk=None if ntk is None else ntk[None, None],
                x1_is_x2=jnp.array(True),  # Dropout adds to the covariance of an input with itself
                mask1=None if mask is None else mask[None],
                mask2=None if mask is None else mask[None],
            )  # fmt: skip
            k = cell(k)
            return k.nngp[0, 0], None if ntk is None else k.ntk[0, 0]

        over_times = jax.vmap(at, (-1, -1, -1, -1, None), -1)
        return jax.vmap(over_times)(k1, k2, nngp, ntk, mask)

    usable = jnp.all(jnp.isfinite(injected), axis=tuple(range(1, injected.ndim)))
    safe = select(usable, injected, jnp.ones_like(injected))
    ntk = None if ntk is None else select(usable, ntk, jnp.ones_like(ntk))

    def solve(grid, prepared):
        def variances(nngp):
            return grid.at_nodes(grid.at_equal_times(nngp))

        nngp, ends = _solve_on(grid, prepared, channels, variances, safe, ntk, usable, solver)
        clock = grid.at_equal_times(nngp)
        start = jnp.broadcast_to(safe[..., None], clock.shape)
        ends = ends._replace(converged=ends.converged & usable)
        return ends, select(ends.converged, clock, start)

    return _first_found(solve, grids, lambda result: result[0], tol)


def _solve_pairs(cell, k, variance1, variance2, exists, solver, grids, tol) -> Ends:
    """All pairs, tile by tile."""

    def tile(rows, columns, pairs):
        (variance1, mask1), (variance2, mask2) = rows, columns
        injected, ntk, exists = pairs

        def channels(k1, k2, nngp, ntk):
            def at(k1, k2, nngp, ntk):
                out = cell(k.replace(
                    cov1=k1, cov2=k2, nngp=nngp, ntk=ntk, x1_is_x2=jnp.array(False),
                    mask1=mask1, shape1=(len(k1), *k.shape1[1:]),
                    mask2=mask2, shape2=(len(k2), *k.shape2[1:]),
                ))  # fmt: skip
                return out.nngp, out.ntk

            return jax.vmap(at, -1, -1)(k1, k2, nngp, ntk)

        def solve(grid, prepared):
            variances = grid.at_nodes(variance1)[0], grid.at_nodes(variance2)[1]
            return _solve_on(grid, prepared, channels, variances, injected, ntk, exists, solver)[1]

        return _first_found(solve, grids, lambda ends: ends, tol, exists)

    rows = variance1, k.mask1
    columns = rows if k.cov2 is None else (variance2, k.mask2)
    mirror = partial(mirrored, k.diagonal_spatial) if k.cov2 is None else None
    nodes = len(grids[len(grids) // 2][0].mirror)  # few tiles take the largest one
    pairs = k.nngp, k.ntk, exists
    return by_tiles(jax.checkpoint(tile), rows, columns, pairs, mirror, nodes)


def _solve_on(
    grid: Grid,
    prepared: Prepared,
    channels: Callable,
    variances: Any,
    injected,
    ntk,
    exists,
    solver,
) -> tuple[Array, Ends]:
    """`C`, and `Ξ` where it is asked for, on the nodes of a grid.

    Both are one vector per sample: neither costs more than the other at the same `C`.

    Args:
      grid: the nodes.
      prepared: for these `T` and `leak`.
      channels: `(k1, k2, nngp, ntk)` at the nodes, along the last axis, to what the cell makes.
      variances: those of the first and second inputs at the nodes, or the function that makes them
        of `C`, where the inputs are the same.
      injected: the covariance of `inject(x)`, `(*batch, *block)`.
      ntk: likewise, or `None`.
      exists: `(*batch,)`; where false, `C` and `Ξ` are what is injected.
      solver: of the integral equation.

    Returns:
      `C` at the nodes, and the ends.
    """
    batch = exists.shape
    given = () if callable(variances) else variances
    shape = (*injected.shape, len(grid.mirror))

    def cell(nngp, ntk, given):
        k1, k2 = variances(nngp) if callable(variances) else given
        return channels(k1, k2, nngp, ntk)

    nodes = jnp.zeros(shape, injected.dtype)
    converted, closed_over = jax.closure_convert(cell, nodes, None if ntk is None else nodes, given)
    sources = (injected, ntk)

    def split(y):  # one axis of numbers per sample into C and Ξ
        y = y.reshape(*batch, -1, math.prod(shape[len(batch) :]))
        parts = [part.reshape(shape) for part in jnp.moveaxis(y, len(batch), 0)]
        return tuple(parts) if ntk is not None else (*parts, None)

    def join(parts):
        return jnp.concatenate([a.reshape(*batch, -1) for a in parts if a is not None], axis=-1)

    def base(sources, prepared):
        answer = jnp.broadcast_to(prepared.answer, shape)
        return [None if a is None else a[..., None] * answer for a in sources]

    def layer(y, args):
        sources, prepared, given, exists, closed_over = args
        start = join(base(sources, prepared))
        made = converted(*split(y), given, *closed_over)
        made = [None if a is None else grid.integrate(prepared.integral, a) for a in made]
        return jnp.where(exists[..., None], start + join(made), start)

    unit = 2 * rounding(injected.dtype)
    args = sources, prepared, given, exists, closed_over
    known = lax.stop_gradient(args)
    scale = None if callable(variances) else _scale(*lax.stop_gradient(variances))
    start = join(base(*known[:2]))
    root = solver.solve_vectors(
        lambda y, args: Evaluation(layer(y, args), scale), start, known, unit, keep_best=False
    )
    value = select(root.converged, root.value, start)
    nngp, theta = split(implicit_vectors(layer, partial(_solve_linear, solver, unit), value, args))

    found = lax.stop_gradient(variances(nngp) if callable(variances) else variances)
    error, most = jnp.zeros(batch, injected.dtype), _largest_variance(found, batch)
    for each in lax.stop_gradient((nngp, theta)):
        if each is not None:
            most = jnp.maximum(most, _largest(each, batch))
            missing = _largest(each - grid.rough(each), batch)
            error = jnp.maximum(error, missing / jnp.where(most == 0, 1, most))
    end = None if theta is None else grid.at_end(theta)
    return nngp, Ends(grid.at_end(nngp), end, error, root.residual, root.converged)


def _over(good: Array, y: Array) -> Array:
    """A Boolean of samples with an axis for every one of `y`."""
    return good.reshape(good.shape + (1,) * (y.ndim - good.ndim))


def _largest(y: Array, batch: tuple[int, ...]) -> Array:
    return jnp.max(jnp.abs(y.reshape(*batch, -1)), axis=-1)


def _largest_variance(variances: tuple[Array, Array], batch: tuple[int, ...]) -> Array:
    """`√(k k')` with the largest of each."""
    first, second = (_largest(k, k.shape[:1]) for k in variances)
    if len(batch) == 1:
        return first
    return jnp.sqrt(first)[:, None] * jnp.sqrt(second)[None, :]


def _scale(k1: Array, k2: Array) -> Array:
    """`√(‖K(x, x)‖ ‖K(x', x')‖)` over the nodes, `(n1, n2)`."""
    first, second = (jnp.sqrt(norm(k.reshape(len(k), -1))) for k in (k1, k2))
    return first[:, None] * second[None, :]


def _solve_linear(solver, unit, matvec, b):
    solution = solve_linear(solver, matvec, b, unit)
    return select(solution.converged, solution.value, jnp.nan)
