"""The classifiers of `tabular`: everything that is chosen is chosen inside the training data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, ParameterGrid, StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from experiments.lib import kernels
from experiments.lib.kernels import Kernel

INNER_FOLDS = 3  # of the training data, by which hyper-parameters are chosen
COSTS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # C of a support vector machine, for a mean k(x, x) of 1
W_STDS = (0.3, 0.6, 0.9, 1.15, 1.3)  # of infinitely deep kernels; an equilibrium needs < √2
DEPTHS = (1, 2, 3, 4, 5)  # hidden layers of explicit kernels
SHAPES = (0.01, 0.05, 0.2, 1.0, 5.0)  # γ d of the RBF kernel; ‖x - x'‖² is about 2 d

Grid = Mapping[str, Sequence[Any]]


class Outcome(NamedTuple):
    """What became of one classifier on one split.

    Attributes:
      accuracy: of the test data.
      validation: mean accuracy of the inner folds, for the hyper-parameters chosen.
      chosen: the hyper-parameters.
    """

    accuracy: float
    validation: float
    chosen: str


def deep(get: str, W_std: float) -> Kernel:
    """The NNGP kernel or the NTK of an infinitely deep ReLU network."""
    return kernels.of_few_sizes(kernels.deq(get, W_std))


def explicit(depth: int) -> Kernel:
    """The NTK of a ReLU network with `depth` hidden layers and He's variances."""
    return kernels.of_few_sizes(kernels.explicit("ntk", depth))


def inner_folds(y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The split of training data by which hyper-parameters are chosen, the same for all methods."""
    folds = StratifiedKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(len(y)), y))


def support_vectors(
    family: Callable[[Any], Kernel], grid: Grid, x, y, train, test, seed: int
) -> Outcome:
    """A support vector machine, its kernel and `C` chosen; of equally good ones the first."""
    folds = [(train[a], train[b]) for a, b in inner_folds(y[train], seed)]
    (parameter, values), (_, costs) = grid.items()
    best: Any = (-1.0,)
    for value in values:
        kernel = family(value)(x, x)
        kernel /= np.mean(np.diag(kernel)[train])
        paths = [kernels.svm_accuracies(kernel, y, a, b, costs) for a, b in folds]
        for cost, validation in zip(costs, np.mean(paths, axis=0), strict=True):
            if validation > best[0]:
                best = float(validation), kernel, cost, _shown(grid, {parameter: value, "C": cost})
    validation, kernel, cost, chosen = best
    (accuracy,) = kernels.svm_accuracies(kernel, y, train, test, [cost])
    return Outcome(accuracy, validation, chosen)


def forest(grid: Grid, x, y, train, test, seed: int) -> Outcome:
    """A random forest, chosen by its accuracy on what each tree was not fitted to."""
    best: Any = (-1.0,)
    for values in ParameterGrid(dict(grid)):
        model: Any = RandomForestClassifier(oob_score=True, random_state=seed, **values)
        model.fit(x[train], y[train])
        if model.oob_score_ > best[0]:
            best = float(model.oob_score_), model, _shown(grid, values)
    validation, model, chosen = best
    return Outcome(float(model.score(x[test], y[test])), validation, chosen)


def mlp(grid: Grid, x, y, train, test, seed: int) -> Outcome:
    """A multi-layer perceptron, trained by Adam; of equally good ones the first."""
    model = MLPClassifier(random_state=seed)
    search: Any = GridSearchCV(model, dict(grid), cv=inner_folds(y[train], seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is a part of the method
        search.fit(x[train], y[train])
    accuracy = float(search.score(x[test], y[test]))
    return Outcome(accuracy, float(search.best_score_), _shown(grid, search.best_params_))


def _shown(grid: Grid, values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items() if len(grid[name]) > 1)


METHODS: dict[str, tuple[Callable[..., Outcome], Grid]] = {
    "DEQ-NTK": (partial(support_vectors, partial(deep, "ntk")), {"W_std": W_STDS, "C": COSTS}),
    "DEQ-NNGP": (partial(support_vectors, partial(deep, "nngp")), {"W_std": W_STDS, "C": COSTS}),
    "NTK, depth 1–5": (partial(support_vectors, explicit), {"depth": DEPTHS, "C": COSTS}),
    "RBF SVM": (partial(support_vectors, kernels.rbf), {"γd": SHAPES, "C": COSTS}),
    "random forest": (
        forest,
        {"n_estimators": (200,), "max_features": ("sqrt", 0.5), "min_samples_leaf": (1, 4)},
    ),
    "MLP": (
        mlp,
        {
            "hidden_layer_sizes": ((100,), (100, 100)),
            "alpha": (1e-3, 1.0),
            "learning_rate_init": (3e-3,),
            "max_iter": (200,),
        },
    ),
}


def classify(method: str, x, y, train, test, seed: int) -> Outcome:
    """Fits a method of `METHODS` to rows `train` of `x (n, d)` and `y (n,)`; tests it on `test`.

    Features are given the mean 0 and the variance 1 of the training rows.
    """
    x = StandardScaler().fit(x[train]).transform(x)
    fit, grid = METHODS[method]
    return fit(grid, x, y, train, test, seed)
