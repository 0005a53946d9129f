"""Kernel regression with any stax kernel, as large as time allows."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nt_deq import _checks
from nt_deq._progress import QUIET
from nt_deq.errors import ArgumentError
from nt_deq.regression import cg
from nt_deq.regression.cholesky import Cholesky
from nt_deq.regression.layout import Layout, in_float64, lost_process
from nt_deq.regression.matrix import InMemory, KernelTiles, Recomputed, Stored, time_tile
from nt_deq.regression.nystrom import Nystrom
from nt_deq.regression.plan import estimate_seconds, make_plan
from nt_deq.regression.store import Store, describe
from nt_deq.typing import Get

_TEST = 1000  # inputs predicted at once
_TEST_STD = 128  # likewise with variances, each of which is a right-hand side

Method = Literal["auto", "cholesky", "cg"]


class KernelRegression:
    """Kernel (ridge) regression: the mean of a Gaussian process, or gradient descent for ever.

    With `get='nngp'` the prediction is the posterior of the infinitely wide network, with noise of
    variance `ridge`; with `get='ntk'` it is what training all of its parameters by gradient descent
    on the squared error tends to (Jacot et al. 2018; Lee et al. 2019, arXiv:1902.06720, eq. 14-16),
    its standard deviation being that over initialisations.

    Args:
      kernel_fn: of any stax network, ours or not, with one output or several.
      get: 'nngp' or 'ntk'.
      diag_reg: what is added to the kernel's diagonal, relative to its mean (a variance), `>= 0`:
        `ridge = diag_reg · mean K(x, x)`, as in `nt.predict`.
      method: 'cholesky' holds the kernel matrix once, in float64, and factorises it; 'cg' is
        conjugate gradients with a Nyström preconditioner, on float32 tiles of one triangle, to the
        accuracy of float64; 'auto' chooses by size and by the memory there is.
      store: a directory, or a URL such as `gs://bucket/path`, to keep the tiles in. A run that was
        killed goes on from there. `None`: in memory.
      mesh: devices to compute on, of one process or, by `jax.distributed`, of several, which then
        make the same calls; `None` is the default device.
      keep: 'memory', or 'nothing' to compute the tiles anew for every product; 'auto' is memory
        where they fit. Not with `store`.
      rank: landmarks of the preconditioner; `None` chooses by the memory there is. More of them
        are fewer steps.
      tol: relative residual of 'cg', of every output.
      memory: bytes that the fit may take; `None` is what is available.
      seed: of the landmarks.
      progress: whether to say, on stderr, what is going on, of fits that take longer than a
        moment.
      settings: what `kernel_fn` was made of, such as `{'W_std': 0.8}`, as JSON has it: an error
        about a store with another kernel then says which of them differ.

    Attributes:
      plan_: the `Plan` of the fit.
      classes_: sorted labels, where the targets were labels.
      ridge_: what was added to the diagonal.
      solution_: the `Solution` of conjugate gradients, else `None`.
      coefficients_: `(n, C)`, `(K + ridge)⁻¹ y`, float64.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        kernel_fn: Callable[..., Any],
        get: Get = "ntk",
        diag_reg: float = 1e-4,
        method: Method = "auto",
        store: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        *,
        keep: Literal["auto", "memory", "nothing"] = "auto",
        rank: int | None = None,
        tol: float = 1e-5,
        memory: float | None = None,
        seed: int = 0,
        progress: bool = True,
        settings: Mapping[str, Any] | None = None,
    ):
        choices = {
            "get": (get, ("nngp", "ntk")),
            "method": (method, ("auto", "cholesky", "cg")),
            "keep": (keep, ("auto", "memory", "nothing")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ArgumentError(
                    f"{name}={value!r} has to be one of {', '.join(map(repr, allowed))}."
                )
        if not (np.isfinite(diag_reg) and diag_reg >= 0):
            raise ArgumentError(f"diag_reg={diag_reg} has to be a finite number of at least 0.")
        if not 1e-12 <= tol < 1:
            raise ArgumentError(f"tol={tol} has to be a relative residual from 1e-12 to 1.")
        if rank is not None and rank < 1:
            raise ArgumentError(f"rank={rank} has to be at least 1; None chooses.")
        if store is not None and (keep != "auto" or method == "cholesky"):
            raise ArgumentError(
                f"store={os.fspath(store)!r} is for method='cg', and keeps the kernel; leave out "
                f"keep={keep!r} and method={method!r}."
            )
        self.kernel_fn, self.get, self.diag_reg = kernel_fn, get, diag_reg
        self.method: Method = "cg" if store is not None else method
        self.store, self.mesh, self.keep = store, mesh, keep
        self.rank, self.tol, self.memory = rank, tol, memory
        self.seed, self.progress, self.settings = seed, progress, dict(settings or {})

    def fit(self, x: Any, y: Any) -> KernelRegression:
        """Fits to inputs `x (n, ...)` and targets `y`.

        Args:
          x: inputs, float32 or float64. Of float64 inputs (with JAX's x64 mode) the residual that
            decides is that of the kernel computed in float64.
          y: real numbers, `(n,)` or `(n, C)`; or integer labels `(n,)`, which become one-hot
            targets less their mean over classes, `1 - 1/C` and `-1/C`.

        Returns:
          Itself.

        Raises:
          ValueError: `x` or `y` cannot be right.
          MemoryError: it will not fit; nothing was computed.
          NoEquilibriumError, NotConvergedError: of the kernel, or of conjugate gradients.
          NotPositiveDefiniteError: the kernel matrix is not; `diag_reg` is too small.
          StoreError: the store is another kernel's, or cannot be written.
          RuntimeError: another process of the mesh was lost.
        """
        x, targets = self._check(x, y)
        layout = Layout(len(x), self.mesh)
        self.plan_ = make_plan(
            layout,
            method=self.method,
            keep="store" if self.store is not None else self.keep,
            rank=self.rank,
            memory=self.memory,
            outputs=targets.shape[1],
            inputs_bytes=x.nbytes,
        )
        with lost_process():
            self._compute = compute = KernelTiles(self.kernel_fn, self.get, layout, x)
            of_nngp = (self.kernel_fn, "nngp", layout, x)
            self._nngp = compute if self.get == "nngp" else KernelTiles(*of_nngp)
            # Before all else: it meets every input.
            diagonal = np.concatenate([compute.variances(part) for part in _parts(x, _TEST_STD)])
            self.ridge_ = self.diag_reg * float(diagonal.mean())
            store = None
            if self.store is not None:
                description = describe(self.kernel_fn, self.get, layout, x, self.settings)
                store = Store(self.store, layout, description)
            seconds = time_tile(compute, targets.shape[1])
            total = estimate_seconds(self.plan_, layout, targets.shape[1], *seconds)
            self.plan_ = dataclasses.replace(self.plan_, seconds=total)
            if total > QUIET:
                self._tell(f"{len(x)} inputs by {self.plan_}")

            self.solution_, self._factor, self._targets = None, None, targets
            if self.plan_.method == "cholesky":
                factor = Cholesky(compute, self.ridge_, self.progress)
                self._solve, self._factor = factor.solve, factor
                self.coefficients_ = factor.solve(targets)
            else:
                self._prepare(compute, diagonal, store)
                self.solution_ = self._solve_cg(targets, self.progress)
                self.coefficients_ = layout.gather(self.solution_.value)[: layout.n]
                if total > QUIET:
                    self._tell(
                        f"{self.solution_.steps} steps, relative residual "
                        f"{self.solution_.residual:.1e}"
                    )
        return self

    def predict(self, x: Any, return_std: bool = False) -> Any:
        """Predicts.

        Args:
          x: inputs, `(m, ...)`.
          return_std: whether to give the standard deviation too: of the posterior for
            `get='nngp'`, over initialisations for `get='ntk'`. By 'cg' every input is then a
            right-hand side of its own to solve for.

        Returns:
          `(m,)` or `(m, C)` like the targets (of labels, a score for each of `classes_`), and
          with `return_std` the standard deviation of each output, `(m,)`; it is the same for all.
        """
        if not hasattr(self, "coefficients_"):
            raise ArgumentError("predict needs a fit: call fit(x, y) first.")
        x = self._check_inputs("x", x)
        if x.shape[1:] != self._compute.x.shape[1:]:
            raise ArgumentError(
                f"x has inputs of shape {x.shape[1:]}, and the fit was to "
                f"{self._compute.x.shape[1:]}."
            )
        with lost_process():
            mean = np.concatenate([self._mean(part) for part in _parts(x, _TEST)])
            mean = mean[:, 0] if self._flat else mean
            if not return_std:
                return mean
            std = [self._std(part) for part in _parts(x, _TEST_STD)]
        return mean, np.concatenate(std)

    def leave_one_out(self) -> np.ndarray:
        """Predicts every training target from all the others, at the price of another fit.

        GPML eq. 5.12, with the same `ridge_` throughout.

        Returns:
          `(n,)` or `(n, C)`, like those of `predict`.

        Raises:
          ValueError: there was no fit, or it was one of conjugate gradients, which do not have it.
        """
        factor = getattr(self, "_factor", None)
        if factor is None:
            raise ArgumentError("leave_one_out needs a fit with method='cholesky'.")
        mean = self._targets - self.coefficients_ / factor.inverse_diagonal()[:, None]
        return mean[:, 0] if self._flat else mean

    def _check(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        x, y = self._check_inputs("x", x), np.asarray(y)
        _checks.targets("y", y, len(x))
        self.classes_ = None
        if np.issubdtype(y.dtype, np.floating):
            self._flat = y.ndim == 1
            return x, y.reshape(len(y), -1).astype(np.float64)
        if y.ndim != 1:
            raise ArgumentError(f"y is of {y.dtype} and shape {y.shape}: labels are ({len(x)},).")
        self.classes_, labels = np.unique(y, return_inverse=True)
        self._flat = False
        return x, np.eye(len(self.classes_))[labels] - 1 / len(self.classes_)

    def _check_inputs(self, name, x) -> np.ndarray:
        x = np.asarray(x)
        is_double = x.dtype == np.float64 and jnp.zeros(()).dtype == np.float64
        x = x.astype(np.float64 if is_double else np.float32, copy=False)
        _checks.examples(name, x)
        return x

    def _prepare(self, compute: KernelTiles, diagonal: np.ndarray, store: Store | None) -> None:
        """Builds the kernel matrix and its preconditioner."""
        if store is not None:
            matrix = Stored(compute, store)
        else:
            matrix = (InMemory if self.plan_.keep == "memory" else Recomputed)(compute)
        matrix.build(self.progress)
        precondition = Nystrom(compute, diagonal, self.plan_.rank, self.ridge_, self.seed)

        x64 = compute.x.dtype == np.float64  # the tiles that are kept are of float32

        def solve_cg(b, progress=False):
            return cg.solve(
                matrix.multiply,
                precondition,
                compute.layout.vector(b),
                ridge=self.ridge_,
                tol=self.tol,
                gather=compute.layout.gather,
                multiply_exactly=Recomputed(compute).multiply if x64 else None,
                progress=progress and jax.process_index() == 0,
            )

        def solve(b):
            return compute.layout.gather(solve_cg(b).value)[: len(b)]

        self._solve_cg, self._solve = solve_cg, solve

    def _mean(self, x: np.ndarray) -> np.ndarray:
        layout = self._compute.layout
        coefficients = layout.vector(self.coefficients_)
        parts = [
            layout.gather(_product(kernel, coefficients, part.start))
            for part, kernel in self._compute.against(x)
        ]
        return np.sum(parts, axis=0)

    def _std(self, x: np.ndarray) -> np.ndarray:
        """Standard deviations of the outputs for `x`."""
        layout = self._compute.layout
        own = self._rows(self._compute, x)
        solved = self._solve(own.T)
        prior = self._nngp.variances(x)
        if self.get == "nngp":
            variance = prior - np.sum(own * solved.T, axis=1)
        else:
            spread = layout.gather(Recomputed(self._nngp).multiply(layout.vector(solved)))
            spread = spread[: layout.n]
            variance = prior - 2 * np.sum(self._rows(self._nngp, x) * solved.T, axis=1)
            variance += np.sum(solved * spread, axis=0)
        return np.sqrt(np.maximum(variance, 0))

    def _rows(self, compute: KernelTiles, x: np.ndarray) -> np.ndarray:
        """The kernel of `x` with the training inputs, `(m, n)`, float64."""
        layout = compute.layout
        parts = [layout.gather(kernel) for _, kernel in compute.against(x)]
        joined = np.concatenate(parts, axis=2).swapaxes(0, 1)
        return joined.reshape(len(x), layout.rows)[:, : layout.n].astype(np.float64)

    def _tell(self, line: str) -> None:
        if self.progress and jax.process_index() == 0:
            print(line, file=sys.stderr, flush=True)


def _parts(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`x` in parts of one size, that programs are compiled for once, and a smaller last one."""
    for start in range(0, len(x), size):
        yield x[start : start + size]


@in_float64
@jax.jit
def _product(kernel, coefficients, start):
    """Adds up what a part of each device's training inputs contributes, in float64."""
    devices, _, size = kernel.shape
    coefficients = coefficients.reshape(devices, -1, coefficients.shape[1])
    part = jax.lax.dynamic_slice_in_dim(coefficients, start, size, axis=1)
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("dmr,drc->mc", kernel.astype(part.dtype), part, precision=precision)
