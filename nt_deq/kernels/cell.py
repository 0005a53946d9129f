"""The kernel of `z* = cell(z*) + inject(x)` for a cell made of stax layers.

The infinite-width kernels solve `K* = C(K*) + S` and `Θ* = A + L Θ*`, where `C` is the cell's NNGP
map, `S` the kernel of `inject(x)`, and `A`, `L` the affine map by which the cell's `ntk` channel
depends on what comes in, at `K*`. `L` is also the derivative of `C` off the diagonal (Price's
theorem). No pair of inputs enters another's equation, so the covariances of the inputs with
themselves are solved first and those of the pairs after them; without spatial axes every entry is a
scalar equation, with them the entries of one pair's spatial block are solved together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array

from nt_deq import _checks
from nt_deq.errors import ArgumentError, NoEquilibriumError, NotConvergedError
from nt_deq.kernels.tiles import by_tiles
from nt_deq.solvers import Anderson, Newton, Solver, implicit, iterate, rounding, solve, spread

KernelMap = Callable[[nt.Kernel], nt.Kernel]
_POWER_STEPS = 30


class Rates(NamedTuple):
    """`(n,)` each, of the inputs' own blocks.

    Attributes:
      injected: the largest variance of `inject(x)`.
      rate: at which the block contracts.
      converged: whether it did.
    """

    injected: Array
    rate: Array
    converged: Array


def solve_fixed_point(
    kernel_map: KernelMap, inject: nt.Kernel, solver: Solver | None
) -> tuple[nt.Kernel, tuple[Rates, Rates], Array]:
    """Solves the kernel of `z* = cell(z*) + inject(x)`.

    Args:
      kernel_map: the cell's `kernel_fn`.
      inject: the kernel `S` of the injection.
      solver: the method; `None` is `Newton` without spatial axes and `Anderson` with them.

    Returns:
      The kernel of `z*`, NaN where there is no equilibrium or the solver failed, the rates of the
      first and of the second inputs, and the solver's steps over the pairs.
    """
    event_dims = inject.nngp.ndim - 2

    def cell(k):  # a convolution leaves the order of the spatial axes reversed
        return unreversed(kernel_map(k))

    if solver is None:
        solver = Anderson() if event_dims else Newton()

    cov1, rates1 = _solve_marginals(cell, inject, solver)
    if inject.cov2 is None:
        cov2, rates2 = None, rates1
    else:
        swapped = inject.replace(
            cov1=inject.cov2, mask1=inject.mask2, shape1=inject.shape2,
            cov2=inject.cov1, mask2=inject.mask1, shape2=inject.shape1,
            nngp=jnp.swapaxes(inject.nngp, 0, 1),
        )  # fmt: skip
        cov2, rates2 = _solve_marginals(cell, swapped, solver)

    k = inject.replace(cov1=cov1, cov2=cov2)
    nngp, steps = _solve_pairs(cell, k, inject, solver)
    k = k.replace(nngp=nngp)
    if inject.ntk is not None:
        k = k.replace(ntk=_solve_ntk(cell, k, inject.ntk, solver))
    return k, (rates1, rates2), steps


def _solve_marginals(cell, inject, solver) -> tuple[Array, Rates]:
    """The covariance of every input with itself, and the rate at which it contracts."""
    event_dims = inject.nngp.ndim - 2
    # The first batch does not see the second, of which one sample is enough.
    slim = inject.slice(slice(None), slice(0, 1)).replace(ntk=None, x1_is_x2=jnp.array(False))

    def covariance(cov, k):
        return cell(k.replace(cov1=cov)).cov1 + k.cov1

    covariance, closed_over = jax.closure_convert(covariance, slim.cov1, slim)
    infinite = jnp.full_like(slim.cov1, jnp.inf)
    root = solve(
        solver,
        partial(_marginal_map, covariance, event_dims),
        (slim, *closed_over),
        slim.cov1,
        -infinite if event_dims else slim.cov1,
        infinite,
        event_dims,
    )

    def rate(cov, mask):
        """Largest eigenvalue of `L` for one input and itself, by power iteration."""
        block = cov[None, None]
        k = slim.slice(slice(0, 1), slice(0, 1)).replace(
            cov1=cov[None], cov2=cov[None], nngp=block, ntk=jnp.zeros_like(block),
            mask1=None if mask is None else mask[None],
            mask2=None if mask is None else mask[None],
        )  # fmt: skip
        linear = jax.linearize(lambda t: cell(k.replace(ntk=t)).ntk, k.ntk)[1]

        def power(_, carry):
            t, _ = carry
            t = linear(t)
            size = jnp.max(jnp.abs(t))
            return t / jnp.where(size > 0, size, 1), size

        steps = _POWER_STEPS if event_dims else 1
        return jax.lax.fori_loop(0, steps, power, (jnp.ones_like(block), jnp.zeros((), cov.dtype)))[
            1
        ]

    rates = jax.vmap(rate, in_axes=(0, None if slim.mask1 is None else 0))(
        jax.lax.stop_gradient(root.value), slim.mask1
    )
    exists = root.converged & (rates < 1 - rounding(rates.dtype))
    injected = jnp.max(slim.cov1, axis=tuple(range(1, slim.cov1.ndim)))
    return _keep(exists, root.value), Rates(injected, rates, root.converged)


def _marginal_map(covariance, event_dims, cov, k, *closed_over):
    def fn(cov):
        return covariance(cov, k, *closed_over)

    if event_dims:
        value = fn(cov)
        size = jnp.max(jnp.abs(value), axis=tuple(range(1, cov.ndim)))
        return value, jnp.zeros((), cov.dtype), size
    value, slope = jax.jvp(fn, (cov,), (jnp.ones_like(cov),))
    return value, slope, cov


def _size(cov: Array) -> Array:
    """Standard deviation of every input, the largest of its block."""
    return jnp.sqrt(jnp.max(cov, axis=tuple(range(1, cov.ndim))))


def _scale(k: nt.Kernel) -> Array:
    """What the entries of a pair's block are small or large against, `(n1, n2)`."""
    return _size(k.cov1)[:, None] * _size(k.cov1 if k.cov2 is None else k.cov2)[None, :]


def _keep(converged: Array, value: Array) -> Array:
    return jnp.where(spread(converged, value.ndim - converged.ndim), value, jnp.nan)


def _solve_pairs(cell, k, inject, solver) -> tuple[Array, Array]:
    k = k.replace(ntk=None)
    if k.nngp.ndim > 2:
        nngp, steps = _solve_blocks(
            lambda nngp, k: cell(k.replace(nngp=nngp)).nngp, k, inject.nngp, solver
        )
    else:
        nngp, steps = _solve_entries(cell, k, inject, solver)
    if k.cov2 is None:  # exact where an input meets itself
        diagonal = jnp.diag_indices(nngp.shape[0])
        nngp = nngp.at[diagonal].set(k.cov1)
    return nngp, steps


def _solve_entries(cell, k, inject, solver) -> tuple[Array, Array]:
    scale = _scale(k)

    def entries(nngp, k, s, scale):
        zero = cell(k.replace(nngp=nngp, ntk=jnp.zeros_like(nngp)))
        one = cell(k.replace(nngp=nngp, ntk=scale))
        return zero.nngp + s, (one.ntk - zero.ntk) / jnp.where(scale == 0, 1, scale)

    entries, closed_over = jax.closure_convert(entries, k.nngp, k, inject.nngp, scale)
    norms = _scale(inject)
    correlation = jnp.where(norms == 0, 0, inject.nngp / jnp.where(norms == 0, 1, norms))
    root = solve(
        solver,
        partial(_entry_map, entries),
        (k, inject.nngp, scale, *closed_over),
        scale * jnp.clip(correlation, -1, 1),
        -scale,
        scale,
    )
    return _keep(root.converged, root.value), root.steps


def _entry_map(entries, nngp, k, s, scale, *closed_over):
    return *entries(nngp, k, s, scale, *closed_over), scale


def _solve_ntk(cell, k, injected, solver) -> Array:
    """`Θ* = A + L Θ*`: divided where the entries are independent, iterated where they are not."""
    k = k.replace(ntk=None)

    def channel(ntk, k):
        return cell(k.replace(ntk=ntk)).ntk

    if injected.ndim > 2:
        return _solve_blocks(channel, k, injected, solver)[0]
    added, linear = jax.linearize(lambda t: channel(t, k), jnp.zeros_like(k.nngp))
    return (added + injected) / (1 - linear(jnp.ones_like(added)))


def _solve_blocks(channel, k, injected, solver) -> tuple[Array, Array]:
    """`y = channel(y, k) + injected` for the spatial blocks of all pairs, and the steps taken.

    Pairs are independent, so that tiles of them are solved one after the other: what a solver keeps
    of its past is then of the size of a tile, not of the kernel.
    """
    event_dims = injected.ndim - 2

    def tile(rows, columns, pairs):
        (number1, cov1, mask1), (number2, cov2, mask2) = rows, columns
        nngp, injected = pairs
        part = k.replace(
            nngp=nngp, cov1=cov1, mask1=mask1, shape1=(len(cov1), *k.shape1[1:]),
            x1_is_x2=k.x1_is_x2 & (number1[0] == number2[0]),
            cov2=cov2, mask2=mask2, shape2=(len(cov2), *k.shape2[1:]),
        )  # fmt: skip
        fn, args = _block_map(channel, part, injected)
        infinity = jnp.array(jnp.inf, injected.dtype)
        args = jax.lax.stop_gradient(args)
        root = iterate(solver, fn, args, injected, -infinity, infinity, event_dims)
        return root.value, root.converged, root.steps

    def side(cov, mask):
        return jnp.arange(len(cov)), cov, mask

    def mirror(a):  # the kernel of (x', x), and the other order of every pair of spatial axes
        axes = np.arange(a.ndim)
        swapped = 2 if k.diagonal_spatial else a.ndim
        axes[:swapped] = axes[:swapped].reshape(-1, 2)[:, ::-1].ravel()
        return jnp.transpose(a, axes)

    rows = side(k.cov1, k.mask1)
    columns = rows if k.cov2 is None else side(k.cov2, k.mask2)
    value, converged, steps = by_tiles(
        tile, *jax.lax.stop_gradient((rows, columns, (k.nngp, injected))),
        mirror if k.cov2 is None else None,
    )  # fmt: skip
    fn, args = _block_map(channel, k, injected)
    return _keep(converged, implicit(fn, event_dims, value, args)), steps


def _block_map(channel, k, injected):
    """The function of `solve`, and its arguments, for `y = channel(y, k) + injected`."""
    channel, closed_over = jax.closure_convert(channel, injected, k)
    return partial(_evaluate_blocks, channel), (k, injected, *closed_over)


def _evaluate_blocks(channel, y, k, injected, *closed_over):
    value = channel(y, k, *closed_over) + injected
    size = jnp.max(jnp.abs(value), axis=tuple(range(2, value.ndim)))
    return value, jnp.zeros((), value.dtype), jnp.maximum(size, _scale(k))


def unreversed(k: nt.Kernel) -> nt.Kernel:
    """The same kernel with its spatial axes in order, so that kernels can be added."""
    return k.reverse() if k.is_reversed else k


def check_shape(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raises unless the cell gives back the shape that it gets."""
    if tuple(found) != tuple(expected):
        raise ArgumentError(
            f"FixedPoint: the cell turns z of shape {tuple(expected)} into {tuple(found)}, "
            "but reads its own output; make it keep the shape (the width of its last "
            "layer that of inject's, padding='SAME' or 'CIRCULAR', no strides)."
        )


def check_cell(cell: tuple, inject: Any) -> None:
    """Raises for a cell whose infinite-width limit is not the fixed point of its kernel map."""
    init_fn, apply_fn, kernel_fn = cell
    if not inject.is_gaussian:
        raise ArgumentError(
            "FixedPoint: inject does not end in a layer with random weights, so that inject(x) is "
            "not Gaussian; end it in one, for example stax.serial(..., stax.Dense(width))."
        )
    out = jax.eval_shape(kernel_fn, inject)
    check_shape(out.shape1, inject.shape1)
    if not out.is_gaussian:
        raise ArgumentError(
            "FixedPoint: the cell's last layer is not linear with random weights, so that z* is "
            "not Gaussian; write FixedPoint(stax.serial(phi, Dense), inject) for "
            "FixedPoint(stax.serial(Dense, phi), inject), and put phi after it."
        )
    if _bypassed(init_fn, apply_fn, inject.shape1):
        raise ArgumentError(
            "FixedPoint: z reaches the cell's output without random weights on the way (a skip "
            "connection such as z + W phi(z)). With tied weights z then is correlated with its own "
            "past, which no kernel of one layer describes; pass that path through a layer of its "
            "own, for example stax.parallel(stax.Dense(width), ...) for "
            "stax.parallel(stax.Identity(), ...)."
        )


def _bypassed(init_fn, apply_fn, shape) -> bool:
    """Whether the output depends on the input when all weights are zero.

    Where the standard deviations are traced the answer cannot be looked at, and is no.
    """

    def output(key):
        params = jax.eval_shape(lambda key: init_fn(key, shape)[1], key)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        out = apply_fn(zeros, jax.random.normal(key, shape), rng=jax.random.key(0))
        return jnp.max(jnp.abs(out - jnp.zeros_like(out).at[:].set(out.ravel()[0])))

    if _checks.is_traced(jax.make_jaxpr(output)(jax.random.key(1)).consts):
        return False
    with jax.ensure_compile_time_eval():
        return float(jax.jit(output)(jax.random.key(1))) > 0


def raise_unless_converged(*inputs: Rates) -> None:
    """Raises where an eager solve found no equilibrium; traced values pass, as NaN."""
    if _checks.is_traced(inputs):
        return
    for side, rates in zip(("x1", "x2"), inputs, strict=True):
        rate, injected = np.asarray(rates.rate), np.asarray(rates.injected)
        missing = np.flatnonzero(np.isnan(injected))
        if missing.size:
            raise ArgumentError(
                f"FixedPoint: there are NaN or infinite values in {_checks.rows(side, missing)}; "
                "drop or impute them."
            )
        large = np.flatnonzero(np.isinf(injected))
        if large.size:
            raise OverflowError(
                f"FixedPoint: the variance of inject of {_checks.rows(side, large)} overflows "
                f"{rate.dtype}; make the inputs or the weights of inject smaller."
            )
        unstable = np.flatnonzero(~(rate < 1 - rounding(rate.dtype)))
        if unstable.size:
            raise NoEquilibriumError(
                f"FixedPoint: the cell's kernel contracts at the rate {rate[unstable[0]]:.6g}, "
                f"which must be below 1, and is not for {_checks.rows(side, unstable)}: the "
                "network has no stable equilibrium there; take a smaller W_std in the cell."
            )
        failed = np.flatnonzero(~np.asarray(rates.converged))
        if failed.size:
            raise NotConvergedError(
                f"FixedPoint: {_checks.rows(side, failed)} did not converge; allow the solver more "
                "max_steps or a larger tol."
            )
