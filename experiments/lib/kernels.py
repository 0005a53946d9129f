"""Kernel matrices as float64 arrays, regression with them, tuned on a part of the data, and SVMs.

They are computed tile by tile, so that two matrices of `n × n` are all that is held.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from nt_deq import enable_x64, nt
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays
from nt_deq._batches import pad_rows

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

TILE = 512  # inputs: tiles all have this size, so that a kernel is compiled once
NONE = 1e-10  # added to the diagonal, relative to its mean, where nothing should be
REGULARISATION = (NONE, 0.01, 0.1, 0.3, 1.0, 3.0)
SVM_STEPS = 10**6  # of a machine: linear ones of large C need 30 times as many, and change little
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


# Of W_std and U_std: all share a program. ReLU without a bias has a faster one of its own.
@partial(jax.jit, static_argnames=("b_std", "activation", "get"))
def _deq_tile(x1, x2, W_std, U_std, b_std, activation, get):
    return Architecture(W_std, U_std, b_std, activation).kernel_fn(1)(x1, x2, get)


@partial(jax.jit, static_argnames=("depth", "get"))
def _explicit_tile(x1, x2, depth, get):
    layers = [nt.stax.Dense(1, W_std=2**0.5), nt.stax.Relu()] * depth
    return nt.stax.serial(*layers, nt.stax.Dense(1))[2](x1, x2, get)


def deq(
    get: str, W_std: float, U_std: float = 1.0, b_std: float = 0.0, activation: str = "relu"
) -> Kernel:
    """The NNGP kernel or the NTK of an infinitely wide DEQ and its readout."""
    options = {"W_std": W_std, "U_std": U_std, "b_std": b_std, "activation": activation}
    return tiled(partial(_deq_tile, get=get, **options))


def explicit(get: str, depth: float) -> Kernel:
    """The same of a ReLU network with `depth` hidden layers and He's variances."""
    return tiled(partial(_explicit_tile, depth=int(depth), get=get))


def _to_few_sizes(x: np.ndarray) -> np.ndarray:
    """Adds features of zeros, so that programs are compiled for few sizes; keeps `x·x'/d`."""
    d = x.shape[1]
    size = max(8, 1 << (d - 1).bit_length())
    return np.pad(x, ((0, 0), (0, size - d))) * (size / d) ** 0.5


def of_few_sizes(kernel: Kernel) -> Kernel:
    """The same kernel of `x·x'/d`, compiled for few numbers of features."""

    def padded(x1, x2):
        padded1 = _to_few_sizes(x1)
        return kernel(padded1, padded1 if x1 is x2 else _to_few_sizes(x2))

    return padded


def rbf(gamma: float) -> Kernel:
    """`exp(-γ ‖x - x'‖²/d)`."""
    return lambda x1, x2: rbf_kernel(x1, x2, gamma=gamma / x1.shape[1])


def svm_accuracies(
    kernel: np.ndarray, y: np.ndarray, train: Any, test: Any, costs: Sequence[float]
) -> list[float]:
    """Fits support vector machines to some rows and tests them on others.

    One-versus-one where there are several classes; training rows of one class predict that one.

    Args:
      kernel: of all rows, `(n, n)`.
      y: labels, `(n,)`.
      train: rows to fit to, as indices or `(n,)` of bool.
      test: rows to test on.
      costs: values of `C` for the kernel as it is, increasing.

    Returns:
      The accuracy for each of the costs.
    """
    if len(np.unique(y[train])) == 1:
        return [float(np.mean(y[test] == y[train][0]))] * len(costs)
    fitted, to_train = kernel[np.ix_(train, train)], kernel[np.ix_(test, train)]
    found: list[float] = []
    for cost in costs:
        machine: Any = SVC(kernel="precomputed", C=cost, max_iter=SVM_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            machine.fit(fitted, y[train])
        found.append(float(machine.score(to_train, y[test])))
        if np.abs(machine.dual_coef_).max() < cost:  # no bound is reached: a larger one changes
            break  # nothing
    return found + found[-1:] * (len(costs) - len(found))


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
