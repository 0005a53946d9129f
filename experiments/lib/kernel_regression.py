"""Kernel regression, interpolating or regularised, tuned on a part of the training data.

Kernels are float64 and computed tile by tile, so that two matrices of `n × n` are all that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from nt_deq import nt
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays
from nt_deq._bridges import enable_x64
from nt_deq.errors import NotPositiveDefiniteError

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

TILE = 512  # inputs: tiles all have this size, so that a kernel is compiled once
NONE = 1e-10  # added to the diagonal, relative to its mean, where nothing should be
REGULARISATION = (NONE, 0.01, 0.1, 0.3, 1.0, 3.0)
VALIDATION = 0.2  # of the training data, its last rows
MODES = ("tuned", "interpolating")


def tiled(tile: Callable[[Any, Any], Any]) -> Kernel:
    """Makes a kernel of any inputs out of one of `TILE` inputs and as many others."""

    def kernel(x1, x2):
        out = np.empty((len(x1), len(x2)))
        with enable_x64(True):
            for i in range(0, len(x1), TILE):
                rows, real_rows = _padded(x1[i : i + TILE])
                # A kernel is symmetric: of inputs with themselves, tiles above the diagonal do.
                for j in range(i if x1 is x2 else 0, len(x2), TILE):
                    columns, real_columns = _padded(x2[j : j + TILE])
                    block = np.asarray(tile(rows, columns))[:real_rows, :real_columns]
                    out[i : i + TILE, j : j + TILE] = block
                    if x1 is x2:
                        out[j : j + TILE, i : i + TILE] = block.T
        return out

    return kernel


@partial(jax.jit, static_argnames="get")  # of W_std: all share a program
def _deq_tile(x1, x2, W_std, get):
    return Architecture(W_std, 1.0, 0.0, "relu").kernel_fn(1)(x1, x2, get)


@partial(jax.jit, static_argnames=("depth", "get"))
def _explicit_tile(x1, x2, depth, get):
    layers = [nt.stax.Dense(1, W_std=2**0.5), nt.stax.Relu()] * depth
    return nt.stax.serial(*layers, nt.stax.Dense(1))[2](x1, x2, get)


def deq(get: str, W_std: float) -> Kernel:
    """The NNGP kernel or the NTK of an infinitely wide ReLU DEQ."""
    return tiled(partial(_deq_tile, W_std=W_std, get=get))


def explicit(get: str, depth: float) -> Kernel:
    """The same of a ReLU network with `depth` hidden layers and He's variances."""
    return tiled(partial(_explicit_tile, depth=int(depth), get=get))


def _padded(x: np.ndarray) -> tuple[Any, int]:
    repeats = np.pad(x, ((0, TILE - len(x)), (0, 0)), mode="edge")
    return jnp.asarray(repeats, jnp.float64), len(x)


def solve(kernel: np.ndarray, y: np.ndarray, regularisation: float) -> np.ndarray:
    """Returns `α` with `(K + regularisation · mean(diag K) · 1) α = y`, by Cholesky.

    Args:
      kernel: `K`, `(n, n)`.
      y: `(n, ...)`.
      regularisation: relative to the mean of K's diagonal.

    Raises:
      numpy.linalg.LinAlgError: the matrix is not positive definite to rounding.
    """
    matrix = kernel.copy().T  # the same, in the order that LAPACK works in
    matrix[np.diag_indices(len(matrix))] += regularisation * np.mean(np.diag(kernel))
    factor = linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    flat = linalg.cho_solve(factor, y.reshape(len(y), -1), check_finite=False)
    return flat.reshape(y.shape)


def regress(
    family: Callable[[float], Kernel],
    shapes: Sequence[float],
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray,
    progress: Callable[[], Any],
) -> Arrays:
    """Chooses a kernel and its regularisation by validation error, and regresses with them.

    They are chosen by the mean squared error of the last fifth of the training data, after
    regression on the others; then regression is on all. Interpolation (`tuned` is the other mode)
    chooses the kernel alone.

    Args:
      family: the kernel of a shape parameter.
      shapes: values to choose from.
      x: inputs, `(n, d)`.
      y: targets of several problems, `(n, problems, C)`.
      x_test: inputs, `(m, d)`.
      progress: called after every regression on the validation split.

    Returns:
      Over `MODES` and problems: `shape` and `regularisation` that were chosen, and the predictions
      `train (modes, problems, n, C)` and `test (modes, problems, m, C)`.

    Raises:
      NotPositiveDefiniteError: the chosen kernel is not positive definite to rounding.
    """
    fitted = len(x) - max(1, round(VALIDATION * len(x)))
    errors = np.full((len(shapes), len(REGULARISATION), y.shape[1]), np.inf)
    for i, shape in enumerate(shapes):
        kernel = family(shape)(x, x)
        for j, regularisation in enumerate(REGULARISATION):
            try:
                alpha = solve(kernel[:fitted, :fitted], y[:fitted], regularisation)
            except np.linalg.LinAlgError:
                continue
            prediction = np.tensordot(kernel[fitted:, :fitted], alpha, 1)
            errors[i, j] = np.square(prediction - y[fitted:]).mean((0, 2))
            progress()
    chosen = {}
    for mode, allowed in zip(MODES, (len(REGULARISATION), 1), strict=True):
        for problem in range(y.shape[1]):
            of_problem = errors[:, :allowed, problem]
            chosen[mode, problem] = np.unravel_index(of_problem.argmin(), of_problem.shape)
    size = (len(MODES), y.shape[1])
    found = {
        "shape": np.empty(size),
        "regularisation": np.empty(size),
        "train": np.empty((*size, len(x), y.shape[2])),
        "test": np.empty((*size, len(x_test), y.shape[2])),
    }
    for i in {int(i) for i, _ in chosen.values()}:
        to = family(shapes[i])
        kernel = to(x, x)
        alphas = {}
        for (mode, problem), (chosen_i, j) in chosen.items():
            if chosen_i != i:
                continue
            try:
                alpha = solve(kernel, y[:, problem], REGULARISATION[j])
            except np.linalg.LinAlgError:
                raise NotPositiveDefiniteError(
                    f"a kernel of shape {shapes[i]:.4g} on {len(x)} inputs is singular to "
                    "rounding: inputs are equal or nearly; leave out --counts as large."
                ) from None
            at = MODES.index(mode), problem
            alphas[at] = alpha
            found["shape"][at], found["regularisation"][at] = shapes[i], REGULARISATION[j]
            found["train"][at] = kernel @ alpha
        del kernel
        for row in range(0, len(x_test), TILE):
            to_train = to(x_test[row : row + TILE], x)
            for at, alpha in alphas.items():
                found["test"][at][row : row + TILE] = to_train @ alpha
    return found
