"""Kernel regression by features: error, accuracy, and time against the number of inputs.

The NTK of the infinitely deep ReLU network (W_std² = U_std² · 2 = b_std² = 1/2) by m features of
each kind: `nystrom`; `sketch` of the power series to degree 8; `both`, the series' terms of degree
0 and 1 exactly and Nyström features of the remainder. Errors are relative Frobenius norms against
the exact kernel of 1000 test images, accuracies those of ridge regression on all training images.

    python -m benchmarks.features                  # scikit-learn's digits
    python -m benchmarks.features --mnist=DIR      # the directory of MNIST's four IDX files
    python -m benchmarks.features --features=1000,4000 --rows=10000,100000,1000000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from nt_deq import deq_network, regression  # isort: split

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _measure
from experiments.lib.data import Dataset, load

SETTING = dict(W_std=0.5**0.5, U_std=0.5, b_std=0.5**0.5)
V_STD, DIAG_REG, BATCH, DEGREE, SAMPLE = 2**0.5, 1e-4, 2000, 8, 1000
KINDS = ("nystrom", "sketch", "both")
KERNEL_FN = deq_network(**SETTING, V_std=V_STD)[2]


def make(kind: str, size: int, x_train: np.ndarray) -> regression.Features:
    """`size` features of a kind; landmarks are the first training inputs, drawn at random."""
    d, key = x_train.shape[1], jax.random.key(0)
    if kind == "nystrom":
        return regression.NystromFeatures(KERNEL_FN, x_train[:size], "ntk")
    series = regression.deq_series(
        1 if kind == "both" else DEGREE, V_std=V_STD, get="ntk", **SETTING
    )
    if kind == "sketch":
        return regression.SketchFeatures(series, d, size, key)
    leading = regression.SketchFeatures(series, d, d + 1, key)
    landmarks = x_train[: size - leading.size]
    return regression.concatenate(
        leading, regression.NystromFeatures(series.remainder(KERNEL_FN), landmarks, "ntk")
    )


def accuracy(kind: str, size: int, data: Dataset) -> dict[str, Any]:
    """Error of the kernel, accuracy on the test images, and what they cost."""
    x_train, x_test = (x.astype(np.float32) for x in (data.x_train, data.x_test))
    start = time.perf_counter()
    features = make(kind, size, x_train)
    made = time.perf_counter() - start
    error = float(
        regression.feature_error(features, KERNEL_FN, jnp.asarray(x_test[:SAMPLE]), "ntk")
    )
    model = regression.FeatureRegression(features, DIAG_REG)
    start = time.perf_counter()
    model.fit(regression.in_batches(x_train, data.targets_train, BATCH))
    fitted = time.perf_counter() - start
    right = [
        np.argmax(model.predict(x), axis=1) == labels
        for x, labels in regression.in_batches(x_test, data.y_test, BATCH)
    ]
    return {
        "kind": kind,
        "features": size,
        "n": len(x_train),
        "error": error,
        "accuracy": float(np.concatenate(right).mean()),
        "make_s": made,
        "fit_s": fitted,
    }


def stream(data: Dataset, n: int) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """`n` rows, made as they are asked for: training images with noise, back on the sphere."""
    rng = np.random.default_rng(0)
    d = data.x_train.shape[1]
    for start in range(0, n, BATCH):
        rows = rng.integers(len(data.x_train), size=min(BATCH, n - start))
        x = data.x_train[rows] + 0.1 * rng.normal(size=(len(rows), d))
        x *= np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True)
        yield jnp.asarray(x, jnp.float32), data.targets_train[rows]


def growth(kind: str, size: int, data: Dataset, rows: list[int]) -> list[dict[str, Any]]:
    """Time of a fit for every number of inputs."""
    features = make(kind, size, data.x_train.astype(np.float32))
    model, found = regression.FeatureRegression(features, DIAG_REG), []
    model.fit(stream(data, BATCH))  # compiles
    for n in rows:
        start = time.perf_counter()
        model.fit(stream(data, n))
        seconds = time.perf_counter() - start
        found.append({"kind": kind, "features": size, "n": n, "fit_s": seconds})
        print(f"{kind:8} {size:6} {n:8} {seconds:9.1f} {1e6 * seconds / n:9.1f}", flush=True)
    return found


def numbers(text: str) -> list[int]:
    """`'1,2'` as `[1, 2]`."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="directory of MNIST's four IDX files")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--features", type=numbers, help="numbers of features")
    parser.add_argument("--rows", type=numbers, default=[10_000, 30_000, 100_000])
    parser.add_argument("--rows-features", type=int, default=1000)
    args = parser.parse_args()
    if args.mnist:
        data = load("mnist", args.mnist, 60_000, 10_000, seed=0)
    else:
        print("no --mnist: scikit-learn's digits take its place")
        data = load("digits", None, 1297, 500, seed=0)
    sizes = args.features or ([1000, 4000] if args.mnist else [100, 300, 1000])
    rows: list[dict[str, Any]] = []
    print(f"{len(data.x_train)} training images of {data.x_train.shape[1]} features")
    print(f"{'':8} {'m':>6} {'error':>8} {'accuracy':>9} {'make s':>8} {'fit s':>8}")
    for size in sizes:
        for kind in args.kinds.split(","):
            row = accuracy(kind, size, data)
            rows.append(row)
            print(
                f"{kind:8} {size:6} {row['error']:8.4f} {row['accuracy']:9.2%} "
                f"{row['make_s']:8.1f} {row['fit_s']:8.1f}",
                flush=True,
            )
    print(f"\n{'':8} {'m':>6} {'n':>8} {'fit s':>9} {'µs a row':>9}")
    for kind in args.kinds.split(","):
        rows += growth(kind, args.rows_features, data, args.rows)
    print(f"\n{_measure.write('features', rows)}")


if __name__ == "__main__":
    main()
