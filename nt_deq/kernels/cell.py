"""The kernel of `z* = cell(z*) + inject(x)` for a cell made of stax layers.

The infinite-width kernels solve `K* = C(K*) + S` and `Θ* = A + L Θ*`, where `C` is the cell's NNGP
map, `S` the kernel of `inject(x)`, and `A`, `L` the affine map by which the cell's `ntk` channel
depends on what comes in, at `K*`. `L` is also the derivative of `C` off the diagonal (Price's
theorem). No pair of inputs enters another's equation, so the covariances of the inputs with
themselves are solved first and those of the pairs after them. Without spatial axes every entry is
an equation of its own; with them the spatial block of a pair is one sample, a vector.

An input without an equilibrium is given the covariance of what is injected, and its pairs a
constant map, so that nothing that is not finite meets the derivatives of the others; it is NaN at
the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import neural_tangents as nt
from jax import Array, lax
from jaxtyping import Bool, Float, Int, PyTree

from nt_deq.activations.quotient import over
from nt_deq.fixed_point.anderson import Anderson
from nt_deq.fixed_point.implicit import (
    implicit_entries,
    implicit_vectors,
    keep,
    select,
    solve_linear,
)
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.solver import Bounds, Evaluation, Solver, norm, rounding
from nt_deq.kernels.tiles import by_tiles, mirrored

KernelMap = Callable[[nt.Kernel], nt.Kernel]
_POWER_STEPS = 30


class Rates(NamedTuple):
    """`(n,)` each, of the inputs' own blocks.

    Attributes:
      injected: the largest variance of `inject(x)`.
      rate: at which the block contracts.
      jumps: whether the cell has no derivative there, as with `stax.Sign`.
      converged: whether it did.
      residual: where the solver ended.
      steps: its evaluations, a scalar.
    """

    injected: Float[Array, " n"]
    rate: Float[Array, " n"]
    jumps: Bool[Array, " n"]
    converged: Bool[Array, " n"]
    residual: Float[Array, " n"]
    steps: Int[Array, ""]

    @property
    def stable(self) -> Bool[Array, " n"]:
        """Whether the input has an equilibrium, and the solver found it."""
        return self.converged & (self.rate < 1 - rounding(self.rate.dtype)) & ~self.jumps


class CellSolution(NamedTuple):
    """The kernel of `z*`, NaN where there is none, and how it was found.

    Attributes:
      kernel: of `z*`.
      rates1, rates2: of the first and of the second inputs.
      converged: `(n1, n2)`, whether the equations of a pair were solved.
      steps: evaluations over the pairs.
    """

    kernel: nt.Kernel
    rates1: Rates
    rates2: Rates
    converged: Bool[Array, "n1 n2"]
    steps: Int[Array, ""]


def solve_cell(kernel_map: KernelMap, inject: nt.Kernel, solver: Solver | None) -> CellSolution:
    """Solves the kernel of `z* = cell(z*) + inject(x)`.

    Args:
      kernel_map: the cell's `kernel_fn`.
      inject: the kernel `S` of the injection.
      solver: the method; `None` is `Newton` without spatial axes and `Anderson` with them.
    """
    cell = in_order(kernel_map)
    spatial = inject.nngp.ndim > 2
    if solver is None:
        solver = Anderson(window=3) if spatial else Newton()

    cov1, rates1 = _solve_marginals(cell, inject, solver)
    cov2, rates2 = None, rates1
    if inject.cov2 is not None:
        cov2, rates2 = _solve_marginals(cell, _swapped(inject), solver)

    k = inject.replace(cov1=cov1, cov2=cov2, ntk=None)
    exists = rates1.stable[:, None] & rates2.stable[None, :]
    solve_pairs = _solve_blocks if spatial else _solve_entries
    nngp, converged, steps = solve_pairs(cell, k, inject, exists, solver)
    if cov2 is None:  # exact where an input meets itself
        diagonal = jnp.diag_indices(nngp.shape[0])
        nngp = nngp.at[diagonal].set(cov1)
    k = k.replace(nngp=nngp)
    ntk = inject.ntk
    if ntk is not None:
        solve_ntk = _solve_block_ntk if spatial else _solve_entry_ntk
        ntk, ntk_converged = solve_ntk(cell, k, ntk, exists, solver)
        ntk, converged = keep(exists & ntk_converged, ntk), converged & ntk_converged
    solution = k.replace(
        cov1=keep(rates1.stable, cov1),
        cov2=None if cov2 is None else keep(rates2.stable, cov2),
        nngp=keep(exists & converged, nngp),
        ntk=ntk,
    )
    return CellSolution(solution, rates1, rates2, converged | ~exists, steps)


def in_order(kernel_map: KernelMap) -> KernelMap:
    """The same map; a convolution leaves the order of the spatial axes reversed."""
    return lambda k: unreversed(kernel_map(k))


def _first_inputs(k: nt.Kernel) -> nt.Kernel:
    """What the first inputs' own covariances depend on: of the second one sample is enough."""
    return k.slice(slice(None), slice(0, 1)).replace(ntk=None, x1_is_x2=jnp.array(False))


def _swapped(k: nt.Kernel) -> nt.Kernel:
    """The kernel of the second inputs with the first."""
    return k.replace(
        cov1=k.cov2, mask1=k.mask2, shape1=k.shape2,
        cov2=k.cov1, mask2=k.mask1, shape2=k.shape1,
        nngp=jnp.swapaxes(k.nngp, 0, 1),
    )  # fmt: skip


def _solve_marginals(cell, inject, solver) -> tuple[Array, Rates]:
    """The covariance of every input with itself, and the rate at which it contracts."""
    slim = _first_inputs(inject)

    def covariance(cov, k):
        return cell(k.replace(cov1=cov)).cov1 + k.cov1

    covariance, closed_over = jax.closure_convert(covariance, slim.cov1, slim)
    args = slim, closed_over
    start, known = lax.stop_gradient((slim.cov1, args))
    if start.ndim == 1:
        fn = partial(_marginal_entry, covariance)
        root, _ = solver.solve_entries(
            fn, start, known, Bounds(start, jnp.full_like(start, jnp.inf))
        )
        value = root.value
    else:
        fn = partial(_marginal_block, covariance)
        unit = _block_rounding(start.dtype)
        root = solver.solve_vectors(
            lambda y, args: Evaluation(fn(y, args)), start.reshape(len(start), -1), known, unit
        )
        value = root.value.reshape(start.shape)
    rate, jumps = _rates(cell, slim, value)
    rates = Rates(
        injected=jnp.max(slim.cov1, axis=tuple(range(1, slim.cov1.ndim))),
        rate=rate,
        jumps=jumps,
        converged=root.converged,
        residual=root.residual,
        steps=root.steps,
    )
    value = select(rates.stable, value, start)
    if start.ndim == 1:
        return implicit_entries(fn, value, args), rates
    linear = partial(_solve_linear, solver)
    value = implicit_vectors(fn, linear, value.reshape(len(start), -1), args)
    return value.reshape(start.shape), rates


def _marginal_entry(covariance, cov, args) -> Evaluation:
    k, closed_over = args
    value, slope = jax.jvp(
        lambda cov: covariance(cov, k, *closed_over), (cov,), (jnp.ones_like(cov),)
    )
    return Evaluation(value, cov, slope)


def _marginal_block(covariance, cov, args) -> Array:
    k, closed_over = args
    return covariance(cov.reshape(k.cov1.shape), k, *closed_over).reshape(cov.shape)


def _rates(cell, slim, cov) -> tuple[Array, Array]:
    """Largest eigenvalue of `L` for every input and itself, by power iteration; and where φ jumps.

    There `L` is not the derivative of the NNGP map: neural-tangents says that a φ that jumps has no
    derivative, but what it does to near states has no bound.
    """

    def rate(cov, mask):
        block = cov[None, None]
        k = slim.slice(slice(0, 1), slice(0, 1)).replace(
            cov1=cov[None], cov2=cov[None], nngp=block, ntk=jnp.zeros_like(block),
            x1_is_x2=jnp.array(True),  # Dropout adds to the covariance of an input with itself
            mask1=None if mask is None else mask[None],
            mask2=None if mask is None else mask[None],
        )  # fmt: skip
        linear = jax.linearize(lambda t: cell(k.replace(ntk=t)).ntk, k.ntk)[1]

        def power(_, carry):
            t, _ = carry
            t = linear(t)
            size = jnp.max(jnp.abs(t))
            return t / jnp.where(size > 0, size, 1), size

        steps = _POWER_STEPS if cov.ndim else 1
        start = jnp.ones_like(block), jnp.zeros((), cov.dtype)
        largest = lax.fori_loop(0, steps, power, start)[1]
        near = (1 - 4 * rounding(cov.dtype)) * block
        moved = jax.jvp(lambda c: cell(k.replace(nngp=c, ntk=None)).nngp, (near,), (block,))[1]
        jumps = jnp.max(jnp.abs(moved)) > 1.1 * jnp.max(jnp.abs(linear(block)))
        return largest, jumps

    cov, mask = lax.stop_gradient((cov, slim.mask1))
    return jax.vmap(rate, in_axes=(0, None if mask is None else 0))(cov, mask)


def large_rates(
    kernel_map: KernelMap, inject: nt.Kernel
) -> tuple[Float[Array, " n1"], Float[Array, " n2"]]:
    """The rates of the first and of the second inputs, at 10⁶ times the variances of `inject`.

    Or less, so that products of two of them do not overflow.
    An equilibrium that a solver did not reach does not exist where they are 1 or more.
    """

    def rates(k):
        slim = _first_inputs(k)
        largest = jnp.max(slim.cov1, axis=tuple(range(1, slim.cov1.ndim)), keepdims=True)
        most = 1e-3 * float(jnp.finfo(largest.dtype).max) ** 0.5
        factor = jnp.minimum(1e6, most / jnp.maximum(largest, 1e-6 * most))
        return _rates(in_order(kernel_map), slim, factor * slim.cov1)[0]

    first = rates(inject)
    return first, first if inject.cov2 is None else rates(_swapped(inject))


def _scale(k: nt.Kernel) -> Array:
    """What the norm of a pair's block is small or large against, `(n1, n2)`.

    `√(‖K(x, x)‖ ‖K(x', x')‖)`, which that of `K(x, x')` does not exceed.
    """

    def root(cov):
        return jnp.sqrt(cov if cov.ndim == 1 else norm(cov.reshape(len(cov), -1)))

    return root(k.cov1)[:, None] * root(k.cov1 if k.cov2 is None else k.cov2)[None, :]


def _solve_entries(cell, k, inject, exists, solver) -> tuple[Array, Array, Array]:
    """`K*` where every entry is an equation of its own."""
    scale, injected, norms = _scale(k), inject.nngp, _scale(inject)

    def entries(nngp, k, s, scale):  # the channel of the NTK has the slope of that of the NNGP
        zero = cell(k.replace(nngp=nngp, ntk=jnp.zeros_like(nngp)))
        one = cell(k.replace(nngp=nngp, ntk=scale))
        return zero.nngp + s, over(one.ntk - zero.ntk, scale)

    entries, closed_over = jax.closure_convert(entries, k.nngp, k, injected, scale)
    fn, args = partial(_entry, entries), (k, injected, scale, exists, closed_over)
    start = scale * jnp.clip(over(injected, norms), -1, 1)
    start, known, limit = lax.stop_gradient((start, args, scale))
    root, _ = solver.solve_entries(fn, start, known, Bounds(-limit, limit))
    value = select(root.converged, root.value, start)
    return implicit_entries(fn, value, args), root.converged, root.steps


def _entry(entries, nngp, args) -> Evaluation:
    k, s, scale, exists, closed_over = args
    value, slope = entries(nngp, k, s, scale, *closed_over)
    return Evaluation(jnp.where(exists, value, s), scale, jnp.where(exists, slope, 0))


def _solve_entry_ntk(cell, k, injected, exists, solver) -> tuple[Array, Array]:
    """`Θ* = (A + S)/(1 - L)`, and where it was found: everywhere."""
    del solver
    added, linear = jax.linearize(lambda t: cell(k.replace(ntk=t)).ntk, jnp.zeros_like(k.nngp))
    rest = jnp.where(exists, 1 - linear(jnp.ones_like(added)), 1)
    return (added + injected) / rest, jnp.ones_like(exists)


def _solve_blocks(cell, k, inject, exists, solver) -> tuple[Array, Array, Array]:
    """`K*` of the spatial blocks of all pairs."""

    def channel(nngp, k):
        return cell(k.replace(nngp=nngp)).nngp

    return _solve_channel(channel, k, inject.nngp, exists, solver)


def _solve_block_ntk(cell, k, injected, exists, solver) -> tuple[Array, Array]:
    """`Θ* = A + L Θ* + S`, and where it was found."""

    def channel(ntk, k):
        return cell(k.replace(ntk=ntk)).ntk

    return _solve_channel(channel, k, injected, exists, solver)[:2]


def _solve_channel(channel, k, injected, exists, solver) -> tuple[Array, Array, Array]:
    """`y = channel(y, k) + injected` for the spatial blocks of all pairs.

    Pairs are independent, so that tiles of them are solved one after the other: what a solver keeps
    of its past is then of the size of a tile, not of the kernel.

    Returns:
      `y`, which pairs have converged, and the steps taken.
    """

    def tile(rows, columns, pairs):
        (number1, cov1, mask1), (number2, cov2, mask2) = rows, columns
        nngp, injected, exists = pairs
        part = k.replace(
            nngp=nngp, cov1=cov1, mask1=mask1, shape1=(len(cov1), *k.shape1[1:]),
            x1_is_x2=k.x1_is_x2 & (number1[0] == number2[0]),
            cov2=cov2, mask2=mask2, shape2=(len(cov2), *k.shape2[1:]),
        )  # fmt: skip
        layer, args = _block_layer(channel, part, injected, exists)
        args = lax.stop_gradient(args)

        def fn(y, args):
            return Evaluation(layer(y, args), _scale(part))

        unit = _block_rounding(injected.dtype)
        root = solver.solve_vectors(fn, _flat(injected), args, unit, keep_best=False)
        return root.value.reshape(injected.shape), root.converged, root.steps

    def side(cov, mask):
        return jnp.arange(len(cov)), cov, mask

    rows = side(k.cov1, k.mask1)
    columns = rows if k.cov2 is None else side(k.cov2, k.mask2)
    value, converged, steps = by_tiles(
        tile,
        *lax.stop_gradient((rows, columns, (k.nngp, injected, exists))),
        partial(mirrored, k.diagonal_spatial) if k.cov2 is None else None,
        math.prod(injected.shape[2:]),
    )
    value = select(converged, value, injected)
    layer, args = _block_layer(channel, k, injected, exists)
    value = implicit_vectors(layer, partial(_solve_linear, solver), _flat(value), args)
    return value.reshape(injected.shape), converged, steps


def _flat(blocks: Array) -> Array:
    """`(n1, n2, ...) -> (n1, n2, size)`.

    In a loop a block is one axis, however many it has for the cell. Sums and maps over six axes of
    as many layouts are slow on a CPU, and some of XLA:CPU's programs for them end the process
    (docs/project/xla-cpu-segfault.md).
    """
    return blocks.reshape(*blocks.shape[:2], -1)


def _block_layer(channel, k, injected, exists) -> tuple[Callable[[Array, PyTree], Array], PyTree]:
    """`y = channel(y, k) + injected` of flat blocks, and its arguments."""
    channel, closed_over = jax.closure_convert(channel, injected, k)
    return partial(_apply_to_blocks, channel), (k, injected, exists, closed_over)


def _apply_to_blocks(channel, y, args) -> Array:
    k, injected, exists, closed_over = args
    value = channel(y.reshape(injected.shape), k, *closed_over) + injected
    return jnp.where(exists[..., None], _flat(value), _flat(injected))


def _solve_linear(solver, matvec, b):
    solution = solve_linear(solver, matvec, b, _block_rounding(b.dtype))
    return select(solution.converged, solution.value, jnp.nan)


def _block_rounding(dtype) -> float:
    return 2 * rounding(dtype)


def unreversed(k: nt.Kernel) -> nt.Kernel:
    """The same kernel with its spatial axes in order, so that kernels can be added."""
    return k.reverse() if k.is_reversed else k
