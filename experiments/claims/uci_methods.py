"""The classifiers of `uci`: what each has to choose from, and how it is fitted.

All kernels are in the same support vector machine and as large as those of Arora et al. (2020),
`x·x'` where this package has `x·x'/d`, so that one range of `C` serves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import Chebyshev
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics.pairwise import rbf_kernel

from nt_deq import stax
from experiments.lib import kernels

DEPTH = 5  # the most layers of an explicit network
COSTS = tuple(10.0**power for power in range(-2, 5))
TREES = 500  # of a forest
SERIES_DEGREE = 24  # beyond it float32 has no more to give

Parameters = Mapping[str, Any]
Accuracies = Callable[[int, Sequence[Any], np.ndarray, np.ndarray], list[float]]


class Method(NamedTuple):
    """A classifier and its hyper-parameters; of equally good ones the first is taken.

    Attributes:
      shapes: of the kernel, or whatever else is slow to change.
      costs: to choose from with each of the shapes, increasing; `(None,)` where there are none.
      prepare: gives for `x (n, d)` and `y (n,)` a function of a shape's index, some of the costs,
        training rows and test rows, which returns the accuracy for each of the costs.
    """

    shapes: Sequence[Parameters]
    costs: Sequence[Any]
    prepare: Callable[[np.ndarray, np.ndarray], Accuracies]


def explicit_ntk(x: np.ndarray, depth: int, fixed: int) -> np.ndarray:
    """The NTK of a ReLU network without biases whose first layers are not trained.

    Arora et al. (2020), section 5: `depth` linear layers of standard deviation 1, `ReLU` between
    them, the first `fixed` of them as they were drawn. The kernel is the sum over the others of
    `S_l V̇_l ⋯ V̇_{depth-1}`, with `S_1 = x·x'`, and `S_{l+1} = E[ReLU ReLU]` and
    `V̇_l = E[ReLU' ReLU']` under `S_l`.

    Args:
      x: inputs, `(n, d)`.
      depth: at least 1, which is linear.
      fixed: below `depth`.

    Returns:
      `(n, n)`.
    """
    covariance = x @ x.T
    ntk = np.zeros_like(covariance) if fixed else covariance.copy()
    for layer in range(1, depth):
        std = np.sqrt(np.diag(covariance))
        scale = np.maximum(np.outer(std, std), 1e-9)
        cosine = np.clip(covariance / scale, -1, 1)
        angle = np.arccos(cosine)
        ntk *= (np.pi - angle) / (2 * np.pi)
        covariance = scale * (cosine * (np.pi - angle) + np.sqrt(1 - cosine**2)) / (2 * np.pi)
        if layer >= fixed:
            ntk += covariance
    return ntk


def deq(x: np.ndarray, get: str, **stds: Any) -> np.ndarray:
    """The NTK or the NNGP kernel of a DEQ and a readout, `(n, n)`."""
    return kernels.of_few_sizes(kernels.deq(get, **stds))(x, x) * x.shape[1]


@functools.cache
def ode_series(T: float, **options: Any) -> Chebyshev:
    """The NTK of a ReLU neural ODE with `W_std = 1` and a ReLU readout, as a series in the angle.

    Without biases it is `√(qq') g(angle)` with `q = x·x/d`, so that `g` at a few angles is all.
    Both together, float32 and the degree, cost 2e-5 of `g(0)` at most.

    Args:
      T: where the state is read.
      options: `leak` and `inject_always` of `stax.NeuralODE`.

    Returns:
      `g` on `[0, π]`.
    """
    cell = stax.serial(stax.Relu(), stax.Dense(1))
    ode = stax.NeuralODE(cell, stax.Dense(1), T=T, **options)
    kernel_fn = stax.serial(ode, stax.Relu(), stax.Dense(1))[2]

    def g(angles):
        x = 2**0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        return np.asarray(kernel_fn(np.array([[2**0.5, 0]], np.float32), x, "ntk"))[0]

    return Chebyshev.interpolate(g, SERIES_DEGREE, domain=[0, np.pi])


def ode(x: np.ndarray, **options: Any) -> np.ndarray:
    """The NTK of the network of `ode_series`, `(n, n)`."""
    norm = np.linalg.norm(x, axis=1)
    scale = np.maximum(np.outer(norm, norm), 1e-9)
    cosine = np.clip(x @ x.T / scale, -1, 1)
    np.fill_diagonal(cosine, 1)  # where rounding costs most
    return scale * ode_series(**options)(np.arccos(cosine))


def support_vectors(kernel: Callable[..., np.ndarray], shapes: Sequence[Parameters]) -> Method:
    """Support vector machines with `kernel(x, **shape)` for each of the shapes and `COSTS`."""

    def prepare(x, y):
        matrix = functools.lru_cache(maxsize=1)(lambda shape: kernel(x, **shapes[shape]))

        def accuracies(shape, costs, train, test):
            return kernels.svm_accuracies(matrix(shape), y, train, test, costs)

        return accuracies

    return Method(shapes, COSTS, prepare)


def forest(shapes: Sequence[Parameters]) -> Method:
    """Random forests; a `max_features` above `d` is `d`."""

    def prepare(x, y):
        def accuracies(shape, costs, train, test):
            features = min(shapes[shape]["max_features"], x.shape[1])
            model = RandomForestClassifier(TREES, max_features=features, random_state=0)
            return [float(model.fit(x[train], y[train]).score(x[test], y[test]))] * len(costs)

        return accuracies

    return Method(shapes, (None,), prepare)


DEQS: list[Parameters] = [
    *(
        {"W_std": W_std, "b_std": b_std}
        for b_std in (0.0, 1.0)
        for W_std in (0.3, 0.6, 0.9, 1.15, 1.3)
    ),
    *({"W_std": 0.8, "U_std": U_std, "activation": "erf"} for U_std in (0.25, 0.5, 1.0, 2.0, 4.0)),
]

ODES: list[Parameters] = [
    {"T": T, "leak": leak, "inject_always": always}
    for leak, always in ((0.0, False), (1.0, False), (1.0, True))
    for T in (0.25, 0.5, 1.0, 2.0, 4.0)
]

METHODS: dict[str, Method] = {
    "NTK": support_vectors(
        explicit_ntk,
        [
            {"depth": depth, "fixed": fixed}
            for depth in range(1, DEPTH + 1)
            for fixed in range(depth)
        ],
    ),
    "DEQ-NTK": support_vectors(functools.partial(deq, get="ntk"), DEQS),
    "DEQ-NNGP": support_vectors(functools.partial(deq, get="nngp"), DEQS),
    "RBF": support_vectors(rbf_kernel, [{"gamma": 2.0**power} for power in range(-16, 9, 2)]),
    "random forest": forest([{"max_features": features} for features in (2, 4, 6, 8)]),
    "ODE-NTK": support_vectors(ode, ODES),
}
