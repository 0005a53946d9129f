"""Kernel regression on images: ours, neural-tangents' and scikit-learn's.

Each method fits `n` training images and predicts the test images in a process of its own, so that
the most memory it took is its own too. One that fails, or takes longer than the limit, is shown as
such. Growth of time and memory is fitted over the sizes.

    python -m benchmarks.regression --data_dir=MNIST      # 2000, 5000, 10000 images
    python -m benchmarks.regression 500 1000              # scikit-learn's digits
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import nt_deq  # isort: split

import numpy as np

from nt_deq import deq_network, nt
from benchmarks import _measure
from experiments.lib.data import Dataset, load
from experiments.lib.report import fit_power_law

LAYERS, DIAG_REG, LIMIT, TEST = 30, 1e-3, 1800, 500
W_STD, U_STD, B_STD = 0.7, 0.5, 0.7


def _kernel_fn() -> Any:
    return deq_network(W_STD, U_STD, B_STD)[2]


def ours(data: Dataset, method: Any) -> np.ndarray:
    """`KernelRegression` with the NTK."""
    regression = nt_deq.KernelRegression(
        _kernel_fn(), "ntk", DIAG_REG, method=method, progress=False
    )
    return regression.fit(data.x_train, data.targets_train).predict(data.x_test)


def by_layers(data: Dataset) -> np.ndarray:
    """The same of explicit layers, by `nt.batch` and `nt.predict`."""
    cell = nt.stax.serial(nt.stax.Relu(), nt.stax.Dense(1, W_STD))[2]
    inject = nt.stax.Dense(1, U_STD, B_STD)[2]
    readout = nt.stax.serial(nt.stax.Relu(), nt.stax.Dense(1))[2]

    def kernel_fn(x1, x2=None, get=("nngp", "ntk")):
        k = s = inject(x1, x2)
        for _ in range(LAYERS):
            new = cell(k)
            cov2 = None if s.cov2 is None else new.cov2 + s.cov2
            k = s.replace(
                nngp=new.nngp + s.nngp, ntk=new.ntk + s.ntk, cov1=new.cov1 + s.cov1, cov2=cov2
            )
        return readout(k, get=get)

    batched = nt.batch(kernel_fn, batch_size=100, store_on_device=False)
    predict_fn = nt.predict.gradient_descent_mse_ensemble(
        batched, data.x_train, data.targets_train, diag_reg=DIAG_REG
    )
    return np.asarray(predict_fn(t=None, x_test=data.x_test, get="ntk"))


def by_ridge(data: Dataset) -> np.ndarray:
    """scikit-learn's `KernelRidge` with an RBF."""
    from sklearn.kernel_ridge import KernelRidge

    ridge = KernelRidge(alpha=DIAG_REG, kernel="rbf", gamma=0.02)
    return ridge.fit(data.x_train, data.targets_train).predict(data.x_test)


def by_classifier(data: Dataset) -> np.ndarray:
    """scikit-learn's `GaussianProcessClassifier` with an RBF of the same length."""
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.gaussian_process.kernels import RBF

    classifier = GaussianProcessClassifier(10.0 * RBF(5.0), optimizer=None, n_jobs=1)
    return classifier.fit(data.x_train, data.y_train).predict_proba(data.x_test)


METHODS: dict[str, Callable[[Dataset], np.ndarray]] = {
    "ours, Cholesky": lambda data: ours(data, "cholesky"),
    "ours, conjugate gradients": lambda data: ours(data, "cg"),
    f"neural-tangents, {LAYERS} layers": by_layers,
    "scikit-learn, KernelRidge": by_ridge,
    "scikit-learn, GaussianProcessClassifier": by_classifier,
}


def child(method: str, n: int, data_dir: str | None) -> None:
    """Measures one method and prints JSON."""
    name = "mnist" if data_dir else "digits"
    data = load(name, data_dir, n, TEST, 0, centre=False, dtype=np.float32)
    start = time.perf_counter()
    scores = METHODS[method](data)
    seconds = time.perf_counter() - start
    accuracy = float((scores.argmax(1) == data.y_test).mean())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "accuracy": accuracy}))


def measure(method: str, n: int, data_dir: str | None) -> dict[str, Any]:
    """Runs `child` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.regression", "--child", method, str(n)]
    row: dict[str, Any] = {"n": n, "method": method}
    try:
        ended = subprocess.run(
            [*command, data_dir or ""], capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return row | {"failed": f"more than {LIMIT} s"}
    if ended.returncode:
        return row | {"failed": (ended.stderr.strip().splitlines() or ["killed"])[-1]}
    return row | json.loads(ended.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Measures, prints, fits the growth and writes JSON."""
    if arguments[:1] == ["--child"]:
        return child(arguments[1], int(arguments[2]), arguments[3] or None)
    flags = [a.removeprefix("--data_dir=") for a in arguments if a.startswith("--data_dir=")]
    data_dir = flags[0] if flags else None
    numbers = [int(a) for a in arguments if not a.startswith("--")]
    sizes = numbers or ([2000, 5000, 10_000] if data_dir else [300, 600, 1200])
    rows = []
    print(f"{'n':>6}  {'':40} {'seconds':>8} {'GB':>6} {'accuracy':>8}")
    for n in sizes:
        for method in METHODS:
            row = measure(method, n, data_dir)
            rows.append(row)
            found = row.get("failed") or (
                f"{row['seconds']:8.1f} {row['peak_bytes'] / 1e9:6.2f} {row['accuracy']:8.2%}"
            )
            print(f"{n:6}  {method:40} {found}", flush=True)
    for method in METHODS:
        done = [r for r in rows if r["method"] == method and "failed" not in r]
        if len(done) >= 3:
            powers = [
                fit_power_law([r["n"] for r in done], [r[key] for r in done]).exponent
                for key in ("seconds", "peak_bytes")
            ]
            print(f"{method:48} time as n^{powers[0]:.1f}, memory as n^{powers[1]:.1f}")
    print(_measure.write("regression", rows))


if __name__ == "__main__":
    main(sys.argv[1:])
