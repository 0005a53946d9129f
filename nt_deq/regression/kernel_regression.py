"""Kernel regression with any stax kernel, as large as time allows."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, TypeVar, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from nt_deq import _checks, _saving
from nt_deq._batches import by_batches
from nt_deq._probe import probe
from nt_deq._progress import QUIET
from nt_deq.errors import ArgumentError
from nt_deq.gp.matrices import variance_rounding
from nt_deq.regression.cg import ConjugateGradients, Solution
from nt_deq.regression.cholesky import Cholesky
from nt_deq.regression.layout import Layout, lost_process
from nt_deq.regression.matrix import InMemory, KernelTiles, Recomputed, Stored, time_tile
from nt_deq.regression.nystrom import Nystrom
from nt_deq.regression.plan import Plan, make_plan, room_for_tiles, with_seconds
from nt_deq.regression.store import Store
from nt_deq.typing import JSON, Get, KernelFn

_TEST = 1024  # inputs predicted at once
_TEST_STD = 128  # likewise with variances, each of which is a right-hand side
_FEW = 10  # tiles, which take no time that must be told before

Regression = TypeVar("Regression", bound="KernelRegression")

Method = Literal["auto", "cholesky", "cg"]
Predicted = Float[np.ndarray, "m ..."] | tuple[Float[np.ndarray, "m ..."], Float[np.ndarray, " m"]]
"""The mean, or the mean and the standard deviation."""


class KernelRegression:
    """Kernel (ridge) regression: the mean of a Gaussian process, or gradient descent for ever.

    With `get='nngp'` the prediction is the posterior of the infinitely wide network; with
    `get='ntk'` it is what training all of its parameters by gradient descent on the squared error
    tends to (Jacot et al. 2018; Lee et al. 2019, arXiv:1902.06720, eq. 14-16), its standard
    deviation being that over initialisations.

    Args:
      kernel_fn: of any stax network, ours or not, with one output or several.
      get: 'nngp' or 'ntk'.
      relative_noise: variance of the noise of the targets, which is added to the kernel's diagonal,
        relative to the mean of the diagonal, `>= 0`: `diag_reg` of `nt.predict`.
      method: 'cholesky' holds the kernel matrix once, in float64, and factorises it; 'cg' is
        conjugate gradients with a Nyström preconditioner, on float32 tiles of one triangle, to the
        accuracy of float64; 'auto' chooses by size and by the memory there is.
      store: a directory, or a URL such as `gs://bucket/path`, to keep the tiles in. A run that was
        killed goes on from there. `None`: in memory.
      mesh: devices to compute on, of one process or, by `jax.distributed`, of several, which then
        make the same calls; `None` is the default device of this process.
      keep: 'memory', or 'nothing' to compute the tiles anew for every product; 'auto' is memory
        where they fit. Not with `store`.
      rank: landmarks of the preconditioner, at most; `None` chooses by the memory there is. More of
        them are fewer steps.
      relative_residual: `‖y - (K + noise) α‖/‖y‖` that 'cg' reaches, of every output.
      memory: bytes that the fit may take of the host's memory, and of the devices'; `None` is what
        is available of each. On a CPU they are one.
      seed: of the landmarks.
      progress: whether to say, on stderr, what is going on, of fits that take longer than a
        moment.
      store_key: what `kernel_fn` was made of, such as `{'W_std': 0.8}`, as JSON has it. A store
        with another key is refused, with what differs. Without, a store is known by its inputs and
        by the kernel of eight of them.

    Attributes:
      plan_: the `Plan` of the fit; of a model that was loaded, that of its solver on this machine,
        which is made when a standard deviation or leave-one-out is first asked for.
      noise_: variance that was added to the diagonal.
      solution_: the `Solution` of conjugate gradients, else `None`.
      coefficients_: `(n, C)`, `(K + noise)⁻¹ y`, float64.

    Raises:
      ArgumentError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        kernel_fn: KernelFn,
        get: Get = "nngp",
        relative_noise: float = 1e-4,
        method: Method = "auto",
        store: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        *,
        keep: Literal["auto", "memory", "nothing"] = "auto",
        rank: int | None = None,
        relative_residual: float = 1e-5,
        memory: float | None = None,
        seed: int = 0,
        progress: bool = True,
        store_key: Mapping[str, JSON] | None = None,
    ):
        _checks.kernel_function(kernel_fn)
        choices = {
            "get": (get, ("nngp", "ntk")),
            "method": (method, ("auto", "cholesky", "cg")),
            "keep": (keep, ("auto", "memory", "nothing")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ArgumentError(
                    f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}."
                )
        _checks.variance("relative_noise", relative_noise)
        if not 1e-12 <= relative_residual < 1:
            raise ArgumentError(f"relative_residual={relative_residual} must be from 1e-12 to 1.")
        if rank is not None:
            _checks.count("rank", rank)
        if store is not None and not os.fspath(store):
            raise ArgumentError("store='' names no directory; pass one, or None.")
        if store is not None and (keep != "auto" or method == "cholesky"):
            raise ArgumentError(
                f"store={os.fspath(store)!r} is for method='cg', and keeps the kernel; leave out "
                f"keep={keep!r} and method={method!r}."
            )
        self.kernel_fn, self.relative_noise = kernel_fn, relative_noise
        self.get: Get = get
        self.method: Method = "cg" if store is not None else method
        self.store, self.mesh, self.keep = store, mesh, keep
        self.rank, self.relative_residual, self.memory = rank, relative_residual, memory
        self.seed, self.progress, self.store_key = seed, progress, dict(store_key or {})

    def fit(self, x: Real[ArrayLike, "n ..."], y: Real[ArrayLike, "n ..."]) -> KernelRegression:
        """Fits to inputs `x (n, ...)` and targets `y`. A fit that fails leaves none.

        Args:
          x: inputs, float32 or float64. Of float64 inputs (with JAX's x64 mode) the residual that
            decides is that of the kernel computed in float64.
          y: real numbers, `(n,)` or `(n, C)`: integers are numbers too, and `KernelClassifier` is
            for labels.

        Returns:
          Itself.

        Raises:
          ArgumentError: `x` or `y` cannot be right.
          MemoryError: it will not fit; nothing was computed.
          NoEquilibriumError, NotConvergedError: of the kernel, or of conjugate gradients.
          NotPositiveDefiniteError: the kernel matrix is not; `relative_noise` is too small.
          StoreError: the store is another kernel's, or cannot be written.
          LostProcessError: another process of the mesh was lost.
        """
        x, y = inputs(x), np.asarray(y)
        _checks.targets("y", y, len(x))
        self._fit(x, y.astype(np.float64))
        return self

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        layout, targets = Layout(len(x), self.mesh), y.reshape(len(y), -1)
        plan = self._make_plan(layout, targets.shape[1], x.nbytes)
        self._forget()  # so that its memory is free
        with lost_process(layout):
            kernel = KernelTiles(self.kernel_fn, self.get, layout, x)
            noise = self.relative_noise * float(kernel.diagonal.mean())  # it meets every input
            if layout.triangle > _FEW:
                seconds = time_tile(kernel, targets.shape[1])
                plan = with_seconds(plan, layout, targets.shape[1], *seconds)
            tells = self.progress and layout.leads and (plan.seconds or 0) > QUIET
            if tells:
                print(f"{len(x)} inputs by {plan}", file=sys.stderr, flush=True)
            solver = self._make_solver(plan, kernel, noise)
            if isinstance(solver, Cholesky):
                solution, coefficients = None, solver.solve(targets)
            else:
                solution = solver.iterate(targets, self.progress)
                coefficients = solution.value
                if tells:
                    print(solution, file=sys.stderr, flush=True)
        self._kernel, self._solver, self._targets = kernel, solver, y
        self.plan_, self.noise_, self.solution_ = plan, noise, solution
        self.coefficients_ = coefficients

    def _make_plan(self, layout: Layout, outputs: int, inputs_bytes: float) -> Plan:
        return make_plan(
            layout,
            method=self.method,
            keep="store" if self.store is not None else self.keep,
            rank=self.rank,
            memory=self.memory,
            outputs=outputs,
            inputs_bytes=inputs_bytes,
        )

    @cached_property
    def plan_(self) -> Plan:
        if not hasattr(self, "_kernel"):
            raise AttributeError("there is no plan before a fit: call fit(x, y).")
        kernel = self._kernel
        return self._make_plan(kernel.layout, self.coefficients_.shape[1], kernel.x.nbytes)

    @cached_property
    def _solver(self) -> Cholesky | ConjugateGradients:
        return self._make_solver(self.plan_, self._kernel, self.noise_)

    def _forget(self) -> None:
        """Leaves what the arguments say, as before any fit."""
        for name in [*vars(self)]:
            if name.endswith("_") or name in ("_kernel", "_solver", "_targets", "_nngp"):
                del vars(self)[name]

    def _make_solver(
        self, plan: Plan, kernel: KernelTiles, noise: float
    ) -> Cholesky | ConjugateGradients:
        """Builds what `plan` says: the factor, or the kernel matrix and its preconditioner."""
        if plan.method == "cholesky":
            return Cholesky(kernel, noise, self.progress)
        if self.store is not None:
            matrix = Stored(kernel, Store(self.store, kernel, self.store_key), self.progress)
        elif plan.keep == "memory":
            matrix = InMemory(kernel, self.progress)
        else:
            matrix = Recomputed(kernel)
        precondition = Nystrom(kernel, plan.rank, noise, self.seed)
        # The tiles that are kept are of float32.
        exact = Recomputed(kernel) if kernel.x.dtype == np.float64 else None
        return ConjugateGradients(matrix, precondition, noise, self.relative_residual, exact)

    @overload
    def predict(
        self, x: Real[ArrayLike, "m ..."], return_std: Literal[False] = False
    ) -> Float[np.ndarray, "m ..."]: ...

    @overload
    def predict(
        self, x: Real[ArrayLike, "m ..."], return_std: Literal[True]
    ) -> tuple[Float[np.ndarray, "m ..."], Float[np.ndarray, " m"]]: ...

    @overload
    def predict(self, x: Real[ArrayLike, "m ..."], return_std: bool) -> Predicted: ...

    def predict(self, x: Real[ArrayLike, "m ..."], return_std: bool = False) -> Predicted:
        """Predicts.

        Args:
          x: inputs, `(m, ...)`.
          return_std: whether to give the standard deviation too: of the posterior for
            `get='nngp'`, over initialisations for `get='ntk'`. By 'cg' every input is then a
            right-hand side of its own to solve for. What is below the rounding of its variance is
            given as that, and never as 0.

        Returns:
          `(m,)` or `(m, C)` like the targets, and with `return_std` the standard deviation of each
          output, `(m,)`; it is the same for all.
        """
        mean, std = self._predict(x, return_std)
        return mean if std is None else (mean, std)

    def _predict(self, x: ArrayLike, return_std: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if not hasattr(self, "coefficients_"):
            raise ArgumentError("predict needs a fit: call fit(x, y) first.")
        kernel = self._kernel
        x = inputs(x, kernel.x.dtype)
        if x.shape[1:] != kernel.x.shape[1:]:
            raise ArgumentError(
                f"x has inputs of shape {x.shape[1:]}, and the fit was to {kernel.x.shape[1:]}."
            )
        with lost_process(kernel.layout):
            coefficients = kernel.layout.vector(self.coefficients_)
            mean = by_batches(lambda part: kernel.product(part, coefficients), x, _TEST)
            std = np.sqrt(by_batches(self._variance, x, _TEST_STD)) if return_std else None
        return mean.reshape(len(x), *self._targets.shape[1:]), std

    def _variance(self, x: np.ndarray) -> np.ndarray:
        """Variances of the outputs for `x`, `(m,)`, at least what their rounding is."""
        covariance = self._kernel.rows(x)
        solved = self._solver.solve(covariance.T)
        if self.get == "nngp":
            prior = self._kernel.variances(x)
            variance = prior - np.sum(covariance * solved.T, axis=1)
        else:
            nngp = self._nngp_matrix().kernel
            prior = nngp.variances(x)
            layout = nngp.layout
            spread = layout.gather(self._nngp_matrix().multiply(layout.vector(solved)))
            variance = prior - 2 * np.sum(nngp.rows(x) * solved.T, axis=1)
            variance += np.sum(solved * spread[: layout.n], axis=0)
        squares = np.sum(solved**2, axis=0)
        largest = float(self._kernel.diagonal.max())
        rounding = variance_rounding(self._kernel.x.dtype, prior, largest, squares)
        if isinstance(self._solver, ConjugateGradients):
            rounding += self.relative_residual * np.sqrt(np.sum(covariance**2, axis=1) * squares)
        return np.maximum(variance, rounding)

    def _nngp_matrix(self) -> Recomputed:
        """Of the training inputs; computed once, and kept where there is room for it."""
        if not hasattr(self, "_nngp"):
            kernel, plan = self._kernel, self.plan_
            nngp = KernelTiles(self.kernel_fn, "nngp", kernel.layout, kernel.x)
            dtype = kernel.x.dtype
            keeps = plan.keep == "memory" and room_for_tiles(plan, kernel.layout, dtype.itemsize)
            self._nngp = InMemory(nngp, dtype=dtype) if keeps else Recomputed(nngp)
        return self._nngp

    def leave_one_out(self) -> Float[np.ndarray, "n ..."]:
        """Predicts every training target from all the others, at the price of another fit.

        GPML eq. 5.12, with the same `noise_` throughout.

        Returns:
          `(n,)` or `(n, C)`, like the targets.

        Raises:
          ArgumentError: there was no fit, or one by conjugate gradients, which do not have it.
        """
        fitted = hasattr(self, "_kernel") and self.plan_.method == "cholesky"
        if not (fitted and isinstance(solver := self._solver, Cholesky)):
            raise ArgumentError("leave_one_out needs a fit with method='cholesky'.")
        inverse = solver.inverse_diagonal()[:, None]
        return self._targets - (self.coefficients_ / inverse).reshape(self._targets.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fitted model to a directory, from which `load` has it back.

        A model that is there is replaced, at once and not before the new one is complete, so that
        one or the other is there whenever the program is killed. The kernel itself is not in it:
        `load` is given it again. Of the processes of a mesh the first one writes.

        Args:
          path: a directory, which is made if need be.

        Raises:
          ArgumentError: there was no fit.
          ModelError: the directory holds something else, or cannot be written.
        """
        self._save(path, {})

    def _save(self, path: str | os.PathLike[str], notes: Mapping[str, JSON]) -> None:
        """`save`, with notes of the command line's."""
        if not hasattr(self, "coefficients_"):
            raise ArgumentError("save needs a fit: call fit(x, y) first.")
        kernel, solution = self._kernel, self.solution_
        if not kernel.layout.leads:
            return
        settings = {
            "get": self.get,
            "relative_noise": float(self.relative_noise),
            "method": self.method,
            "store": _absolute(self.store),
            "keep": self.keep,
            "rank": None if self.rank is None else int(self.rank),
            "relative_residual": float(self.relative_residual),
            "seed": int(self.seed),
            "progress": self.progress,
            "store_key": self.store_key,
        }
        fitted = {
            "noise": self.noise_,
            "solution": None if solution is None else solution._replace(value=None)._asdict(),
        }
        arrays = {
            "x": kernel.x,
            "targets": self._targets,
            "coefficients": self.coefficients_,
            "probe": probe(self.kernel_fn, self.get, kernel.x),
        }
        description = {"arguments": settings, "fitted": fitted, "notes": dict(notes)}
        _saving.write(path, type(self).__name__, description, arrays | self._own_arrays())

    def _own_arrays(self) -> dict[str, np.ndarray]:
        """What else to save, for `_restore`."""
        return {}

    @classmethod
    def load(
        cls: type[Regression],
        path: str | os.PathLike[str],
        kernel_fn: KernelFn,
        mesh: Mesh | None = None,
    ) -> Regression:
        """Reads the model that `save` has written; other versions of this package may have.

        It predicts at once what it did. For a standard deviation or leave-one-out there must be a
        factor, or what conjugate gradients need, which is not saved: it is made when one is first
        asked for, in the time of a fit, by a plan for the memory that there is now. `store`,
        `keep`, `rank`, `memory` and `method` may be set before, as attributes.

        Args:
          path: the directory.
          kernel_fn: the kernel that the model was fitted with. It is compared, to rounding, between
            eight of the inputs.
          mesh: devices to compute on, as of `KernelRegression`.

        Raises:
          ModelError: there is no such model, it is of a later version or damaged, another kernel's,
            or in float64 while JAX is not.
        """
        _checks.kernel_function(kernel_fn)
        _, settings, arrays = _saving.read(path, cls.__name__)
        description: Any = settings
        model = cls(kernel_fn, mesh=mesh, **description["arguments"])
        x = arrays["x"]
        _saving.check_precision(path, x.dtype)
        _saving.check_kernel(path, arrays["probe"], kernel_fn, model.get, x, model.store_key)
        model._restore(description["fitted"], arrays)
        return model

    def _restore(self, fitted: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        layout = Layout(len(arrays["x"]), self.mesh)
        self._kernel = KernelTiles(self.kernel_fn, self.get, layout, arrays["x"])
        self._targets, self.coefficients_ = arrays["targets"], arrays["coefficients"]
        self.noise_, solution = fitted["noise"], fitted["solution"]
        if solution is not None:
            solution = Solution(**solution | {"value": self.coefficients_})
        self.solution_ = solution


def _absolute(store: str | os.PathLike[str] | None) -> str | None:
    """A store by a name that it has from every directory."""
    if store is None or "://" in os.fspath(store):
        return None if store is None else os.fspath(store)
    return os.path.abspath(store)


def inputs(x: ArrayLike, dtype: np.dtype | None = None) -> np.ndarray:
    """Inputs in the dtype of everything: float64 of float64 inputs in JAX's x64 mode.

    Args:
      x: inputs.
      dtype: of the fit, which its test inputs must have.
    """
    _checks.real_numbers("x", x)
    x = np.asarray(x)
    x64 = jnp.zeros(()).dtype == np.float64
    if dtype is None:
        dtype = np.dtype(np.float64 if x.dtype == np.float64 and x64 else np.float32)
    elif dtype == np.float64 and not x64:
        raise ArgumentError(
            "the fit was in float64, and JAX is in float32: predict in x64 mode too, "
            "jax.config.update('jax_enable_x64', True)."
        )
    x = x.astype(dtype, copy=False)
    _checks.examples("x", x)
    return x
