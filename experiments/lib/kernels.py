"""Kernel matrices as float64 arrays, and regression with them, tuned on a part of the data.

They are computed tile by tile, so that two matrices of `n × n` are all that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from nt_deq import enable_x64, nt
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays
from nt_deq._batches import pad_rows

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
                rows = x1[i : i + TILE]
                # A kernel is symmetric: of inputs with themselves, tiles above the diagonal do.
                for j in range(i if x1 is x2 else 0, len(x2), TILE):
                    columns = x2[j : j + TILE]
                    whole = tile(*(pad_rows(x.astype(np.float64), TILE) for x in (rows, columns)))
                    block = np.asarray(whole)[: len(rows), : len(columns)]
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


def rbf(gamma: float) -> Kernel:
    """`exp(-γ ‖x - x'‖²/d)`."""
    return lambda x1, x2: rbf_kernel(x1, x2, gamma=gamma / x1.shape[1])


def fit(kernel: np.ndarray, y: np.ndarray, regularisation: float) -> KernelRidge:
    """Regression with a kernel matrix, `(n, n)`, on targets `(n, C)`.

    `regularisation` is added to the diagonal, relative to its mean. Of a matrix that is singular to
    rounding it is least squares, and scikit-learn warns.
    """
    alpha: Any = regularisation * np.mean(np.diag(kernel))
    return KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, y)


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
      y: targets of several problems, `(problems, n, C)`.
      x_test: inputs, `(m, d)`.
      progress: called after every regression on the validation split.

    Returns:
      Over `MODES` and problems: `shape` and `regularisation` that were chosen, and the predictions
      `train (modes, problems, n, C)` and `test (modes, problems, m, C)`.
    """
    fitted = len(x) - max(1, round(VALIDATION * len(x)))
    flat = y.swapaxes(0, 1).reshape(len(x), -1)
    errors = np.empty((len(shapes), len(REGULARISATION), len(y)))
    for i, shape in enumerate(shapes):
        kernel = family(shape)(x, x)
        for j, regularisation in enumerate(REGULARISATION):
            ridge = fit(kernel[:fitted, :fitted], flat[:fitted], regularisation)
            squares = np.square(ridge.predict(kernel[fitted:, :fitted]) - flat[fitted:])
            errors[i, j] = squares.reshape(len(squares), len(y), -1).mean((0, 2))
            progress()
    best = [
        np.unravel_index(of.reshape(-1, len(y)).argmin(0), of.shape[:2])
        for of in (errors, errors[:, :1])  # as of MODES
    ]
    i, j = np.swapaxes(best, 0, 1)
    found = {
        "shape": np.array(shapes)[i],
        "regularisation": np.array(REGULARISATION)[j],
        "train": np.empty((*i.shape, len(x), y.shape[2])),
        "test": np.empty((*i.shape, len(x_test), y.shape[2])),
    }
    for index in np.unique(i):
        kernel_fn = family(shapes[index])
        kernel = kernel_fn(x, x)
        places = list(zip(*np.nonzero(i == index), strict=True))
        ridges = {at: fit(kernel, y[at[1]], found["regularisation"][at]) for at in places}
        for at, ridge in ridges.items():
            found["train"][at] = ridge.predict(kernel)
        del kernel
        for row in range(0, len(x_test), TILE):
            to_train = kernel_fn(x_test[row : row + TILE], x)
            for at, ridge in ridges.items():
                found["test"][at][row : row + TILE] = ridge.predict(to_train)
    return found
