"""Layers of infinite depth: equilibria and neural ODEs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
import neural_tangents as nt
from jaxtyping import PyTree
from neural_tangents import stax as _nt_stax

from nt_deq import _checks
from nt_deq.activations import Phi, get_activation
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.implicit import keep
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.picard import Picard
from nt_deq.fixed_point.solve import equilibrium
from nt_deq.fixed_point.solver import Solver, check_solver
from nt_deq.kernels.cell import large_rates, solve_cell
from nt_deq.kernels.diagnosis import (
    raise_unless_cell_solved,
    raise_unless_solved,
    raise_unless_two_time_solved,
)
from nt_deq.kernels.equations import Injection, dense_solver, solve_equilibrium
from nt_deq.kernels.series import Chebyshev
from nt_deq.kernels.tied_cell import TiedCell, masked
from nt_deq.kernels.two_time import Dynamics, grids_for, solve_two_time, solve_with_fewest
from nt_deq.stax._layer import full_precision, requires, solving_layer
from nt_deq.stax.explicit import Nonlinearity
from nt_deq.trajectory import Integration, Residual, trajectories, trajectory_end
from nt_deq.typing import AnyLayer, Layer, Number


@solving_layer
def FixedPoint(cell: AnyLayer, inject: AnyLayer, solver: Solver | None = None) -> Layer:
    """A layer of infinite depth, `z* = cell(z*) + inject(x)`, from any stax layers.

    Returns the equilibrium itself: put the nonlinearity and the readout after it. The cell reads
    its own output, so it keeps the shape, and it ends in a layer with random weights. They are
    tied: the same in every iteration, and so is a dropout mask.
    `stax.DEQ` is `stax.serial(FixedPoint(stax.serial(phi, Dense), Dense), phi)`.

    Args:
      cell: `(init_fn, apply_fn, kernel_fn)` of what is iterated, for example
        `stax.serial(stax.Relu(), stax.Conv(64, (3, 3), padding='SAME'))`.
      inject: likewise of what the input goes through, once, for example
        `stax.Conv(64, (3, 3), padding='SAME')`.
      solver: of the kernel. `None` is `nt_deq.Newton()` where the inputs are vectors, so that every
        entry is an equation of its own, and `nt_deq.Anderson(window=3)` where they have spatial
        axes, whose entries the cell may couple; `nt_deq.Picard()` is the plain iteration.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`. The parameters are `(cell, inject)`.

    Raises:
      NoEquilibriumError: by `kernel_fn`, where some input has no stable equilibrium; under a
        transformation its row and column are NaN instead.
      NotConvergedError: by `kernel_fn` and `apply_fn`, where the solver gave up (likewise).
      ValueError: by `kernel_fn`, for a cell that changes the shape, does not end in a layer with
        random weights, or adds its input to its output past them.
    """
    _checks.layer("cell", cell)
    _checks.layer("inject", inject)
    check_solver(solver)
    if isinstance(solver, Chebyshev):
        raise ArgumentError(
            f"solver={solver!r} is the series of stax.DEQ; pass None, nt_deq.Newton() for vectors, "
            "or nt_deq.Anderson()."
        )
    tied, cell_kernel = TiedCell("FixedPoint", cell, inject), cell[2]
    solve = jax.jit(partial(solve_cell, cell_kernel, solver=solver))

    def equation(z, args):
        params, u, mask, kwargs = args
        out = tied.apply(params, jnp.moveaxis(z, 0, tied.batch_axis), mask, **kwargs)
        return jnp.moveaxis(out, tied.batch_axis, 0) + u

    def init_fn(rng, input_shape, **kwargs):
        return tied.init(rng, input_shape, **kwargs)

    @full_precision
    def apply_fn(params: PyTree, inputs: PyTree, **kwargs: PyTree) -> PyTree:
        u, mask, kwargs = tied.injected(params, inputs, kwargs)
        u = jnp.moveaxis(u, tied.batch_axis, 0)  # the equilibrium is solved sample by sample
        z = equilibrium(equation, jnp.zeros_like(u), (params[0], u, mask, kwargs))
        return masked(jnp.moveaxis(z, 0, tied.batch_axis), mask)

    @requires(**tied.requirements)
    def kernel_fn(k: nt.Kernel, **kwargs: PyTree) -> nt.Kernel:
        u = tied.injected_kernel(k, **kwargs)
        found = solve(u)
        raise_unless_cell_solved(found, lambda: large_rates(cell_kernel, u))
        return found.kernel

    return init_fn, apply_fn, kernel_fn


@solving_layer
def NeuralODE(
    cell: AnyLayer,
    inject: AnyLayer,
    T: Number = 1.0,
    leak: Number = 0.0,
    steps: int | None = None,
    inject_always: bool = False,
    solver: Solver | None = None,
) -> Layer:
    """A neural ODE, `ż = -leak · z + cell(z)` from `z(0) = inject(x)`, with tied weights: `z(T)`.

    Returns the state itself: put the nonlinearity and the readout after it. The cell reads its own
    output, so it keeps the shape, and it ends in a layer with random weights, which are the same at
    all times (Gao, Sun, Liu & Gao, arXiv 2509.22436). With `leak=1` and `inject_always` the
    equilibrium of the ODE is that of `FixedPoint(cell, inject)`, which it approaches as `T` grows.

    The kernel is that of a spectral method in both times, whose nodes are as many as an estimate of
    its own error asks for: at most 1e-6 of `√(k k')` in float32 and 1e-9 in float64, or no number
    at all. The estimate is what the highest two degrees of the solution change, not a bound. That
    of the residual network is exact. In float32 rounding adds up to 1e-6.

    Args:
      cell: `(init_fn, apply_fn, kernel_fn)` of what moves the state, for example
        `stax.serial(stax.Relu(), stax.Dense(64))`.
      inject: likewise of what the input goes through, once, for example `stax.Dense(64)`.
      T: the time at which the state is read, above 0; it may be traced.
      leak: the rate at which the state decays, at least 0; it may be traced.
      steps: of Euler's rule, `z ← z + T/steps · ż`: the residual network of so many layers. `None`
        is the differential equation.
      inject_always: whether `inject(x)` is added at all times, with `z(0) = 0`, instead of being
        the first state.
      solver: of the kernel's integral equation. `None` is `nt_deq.Picard()`, whose iteration
        converges at any `W_std`; `nt_deq.Anderson()` may take fewer steps where `T` is large.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`. The parameters are `(cell, inject)`.

    Raises:
      OverflowError: by `kernel_fn`, where the variance of some input leaves the dtype before `T`;
        under a transformation its row and column are NaN instead.
      NotConvergedError: by `kernel_fn`, where the solver gave up or its nodes were too few, and by
        `apply_fn`, where the integration of the finite network did (likewise).
      ValueError, TypeError: an argument cannot be right; the message says why.
    """
    _checks.layer("cell", cell)
    _checks.layer("inject", inject)
    _checks.time("T", T)
    _checks.time("leak", leak, positive=False)
    if steps is not None:
        _checks.count("steps", steps)
    check_solver(solver)
    if isinstance(solver, Chebyshev | Newton):
        raise ArgumentError(
            f"solver={solver!r} is for equations of one number each, and the times of a pair are "
            "coupled; pass None, nt_deq.Picard() or nt_deq.Anderson()."
        )
    tied, cell_kernel = TiedCell("NeuralODE", cell, inject), cell[2]
    method = Picard() if solver is None else solver

    @partial(jax.jit, static_argnums=3)
    def solve(u, T, leak, grids):
        dynamics = Dynamics(T, leak, inject_always, steps, method)
        return solve_two_time(cell_kernel, u, dynamics, grids)

    def init_fn(rng, input_shape, **kwargs):
        return tied.init(rng, input_shape, **kwargs)

    def velocity(z, shared, own):  # of one sample
        params, leak, kwargs = shared
        u, mask, rng = own
        z, u, mask = tied.as_batch((z, u, mask))
        out = tied.apply(params, z, mask, **kwargs, **rng) - leak * z
        return jnp.squeeze(out + u if inject_always else out, tied.batch_axis)

    @full_precision
    def apply_fn(params: PyTree, inputs: PyTree, **kwargs: PyTree) -> PyTree:
        u, mask, kwargs = tied.injected(params, inputs, kwargs)
        kwargs, own = tied.by_samples(u, mask, kwargs)
        start = jnp.zeros_like(own[0]) if inject_always else own[0]
        end, rate = (jnp.asarray(value, u.dtype) for value in (T, leak))
        method = Integration() if steps is None else Residual(steps)
        found = trajectories(method, velocity, start, end, (params[0], rate, kwargs), own)
        z = trajectory_end(found, None, {"params": params, "inputs": inputs})
        return masked(jnp.moveaxis(z, 0, tied.batch_axis), mask)

    @requires(**tied.requirements)
    def kernel_fn(k: nt.Kernel, **kwargs: PyTree) -> nt.Kernel:
        u = tied.injected_kernel(k, **kwargs)
        dtype = u.nngp.dtype
        none = not _checks.is_traced(leak) and leak == 0
        arguments = u, jnp.asarray(T, dtype), None if none else jnp.asarray(leak, dtype)
        found = solve_with_fewest(
            lambda grids: solve(*arguments, grids),
            grids_for(dtype, steps),
            _checks.is_traced(*arguments),
        )
        raise_unless_two_time_solved(found, T)
        return found.kernel

    return init_fn, apply_fn, kernel_fn


@solving_layer
def DEQ(
    width: int,
    W_std: Number,
    U_std: Number = 1.0,
    b_std: Number | None = None,
    activation: Phi = "relu",
    solver: Solver | None = None,
    parameterization: Literal["ntk", "standard"] = "ntk",
) -> Layer:
    """A deep equilibrium layer, a fully-connected network of infinite depth with tied weights.

    `h* = φ(z*)` with `z* = W_std/√width · φ(z*) W + U_std/√d · x U + b_std · b`: the special case
    `serial(FixedPoint(serial(φ, Dense), Dense), φ)`, whose kernel has faster solvers
    (`nt_deq.kernels.dense`) for inputs `(batch, d)`. On images it acts on every pixel by itself. A
    readout `stax.Dense(out)` makes it a network.

    Args:
      width: size of the state `z` of the finite network.
      W_std: standard deviation of the recurrent weights; the equilibrium exists where
        `W_std² E[φ'(z*)²] < 1` (relu: `W_std² < 2`).
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias; `None` for none.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function such as
        `jnp.tanh`, or an `nt_deq.Activation`.
      solver: of the kernel of vectors. `None` is `nt_deq.Chebyshev()` for a homogeneous activation
        (relu, leaky_relu, abs, identity) and `nt_deq.Newton()` for the others; `nt_deq.Picard()` is
        the plain iteration.
      parameterization: `'ntk'` or `'standard'`, as of `stax.Dense`.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`. The parameters are `(hidden, inject)`, those of the two
      `stax.Dense` layers that `z*` is made of.

    Raises:
      NoEquilibriumError: by `kernel_fn`, where some input has no stable equilibrium; under a
        transformation its row and column are NaN instead.
      NotConvergedError: by `kernel_fn` and `apply_fn`, where the solver gave up (likewise).
      ValueError, TypeError: an argument cannot be right; the message says why.
    """
    _checks.count("width", width)
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=0.0 if b_std is None else b_std)
    phi = get_activation(activation)
    method = dense_solver(solver, phi)
    # neural-tangents types a kernel as any tree of kernels.
    dense = cast(
        Callable[..., AnyLayer],
        partial(_nt_stax.Dense, width, parameterization=parameterization),
    )
    hidden, inject, nonlinearity = dense(W_std), dense(U_std, b_std), Nonlinearity(phi)
    # On images and masks, where entries may be coupled.
    elsewhere = None if isinstance(method, Newton) else solver
    fixed_point = FixedPoint(_nt_stax.serial(nonlinearity, hidden), inject, elsewhere)
    composed = cast(AnyLayer, _nt_stax.serial(fixed_point, nonlinearity))
    composed_init, composed_apply, composed_kernel = composed

    def init_fn(rng, input_shape, **kwargs):
        shape, (((_, hidden), inject), _) = composed_init(rng, input_shape, **kwargs)
        return shape, (hidden, inject)

    def apply_fn(params: PyTree, inputs: PyTree, **kwargs: PyTree) -> PyTree:
        hidden, inject = params
        return composed_apply(((((), hidden), inject), ()), inputs, **kwargs)

    @requires(batch_axis=0, channel_axis=-1, diagonal_spatial=_nt_stax.Diagonal())
    def kernel_fn(k: nt.Kernel, **kwargs: PyTree) -> nt.Kernel:
        _checks.batches(k)
        if k.nngp.ndim != 2 or k.mask1 is not None or k.mask2 is not None:
            return composed_kernel(k, **kwargs)
        u = inject[2](k, **kwargs)
        W_var = jnp.square(jnp.asarray(W_std, u.nngp.dtype))
        solution = solve_equilibrium(phi, method, W_var, Injection(u.cov1, u.cov2, u.nngp))
        first, second, solved = solution.marginals1, solution.marginals2, solution.solved
        raise_unless_solved(phi, method, W_std, solved, first, second)
        out = u.replace(nngp=solution.dual, ntk=None, is_gaussian=False)
        if u.ntk is not None:
            # What the weights of one layer add to the NTK; the rest comes back through z*.
            added = hidden[2](out.replace(ntk=jnp.zeros_like(u.ntk)), **kwargs).ntk + u.ntk
            added, slope = jnp.where(solved, added, 0), solution.dual_slope
            out = out.replace(ntk=keep(solved, slope * added / (1 - W_var * slope)))
        return out.replace(
            cov1=keep(first.exists, first.dual),
            cov2=None if u.cov2 is None else keep(second.exists, second.dual),
            nngp=keep(solved, solution.dual),
        )

    return init_fn, apply_fn, kernel_fn
