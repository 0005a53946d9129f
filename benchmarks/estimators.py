"""What `optimize=True` brings the estimators of `nt_deq.sklearn`, and what it costs.

scikit-learn's data sets, 5 folds. Score: accuracy, or R² of real targets. Loss: minus the mean
logarithm of the probability (density) of a held-out target, noise included, in nats. Seconds: of
one core, for one fit, programs compiled.

    python -m benchmarks.estimators
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold

from experiments.lib.report import table
from nt_deq.sklearn import DEQClassifier, DEQRegressor

FOLDS, MOST = 5, 600  # rows
LOADERS = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as given": {"optimize": False},
    "optimize": {},
    "optimize, no standardize": {"standardize": False},
}


def measure(x: np.ndarray, y: np.ndarray, arguments: dict[str, Any]) -> tuple[float, ...]:
    """Score, loss and seconds, means over folds; of seconds the median."""
    regresses = y.dtype.kind == "f"
    folds = (KFold if regresses else StratifiedKFold)(FOLDS, shuffle=True, random_state=0)
    found = []
    for train, test in folds.split(x, y):
        model = (DEQRegressor if regresses else DEQClassifier)(**arguments)
        start = time.process_time()
        model.fit(x[train], y[train])
        seconds = time.process_time() - start
        if isinstance(model, DEQRegressor):
            mean, std = model.predict(x[test], return_std=True, include_noise=True)
            losses = ((y[test] - mean) / std) ** 2 / 2 + np.log(std) + np.log(2 * np.pi) / 2
        else:
            log_p = model.predict_log_proba(x[test])
            losses = -log_p[np.arange(len(test)), np.searchsorted(model.classes_, y[test])]
        found.append((model.score(x[test], y[test]), losses.mean(), seconds))
    scores, losses, seconds = zip(*found, strict=True)
    return float(np.mean(scores)), float(np.mean(losses)), float(np.median(seconds))


def main() -> None:
    """Prints a line for each data set and variant."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    rows = []
    for name, load in LOADERS.items():
        x, y = load(return_X_y=True)
        few = np.random.default_rng(0).permutation(len(x))[:MOST]
        for variant, arguments in VARIANTS.items():
            score, loss, seconds = measure(x[few], y[few], arguments)
            rows.append([f"{name}, {variant}", f"{score:.3f}", f"{loss:.3f}", f"{seconds:.2f}"])
            print(rows[-1], flush=True)
    print(table(("", "score", "loss", "seconds"), rows))


if __name__ == "__main__":
    main()
