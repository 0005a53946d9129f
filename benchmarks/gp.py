"""Fitting hyper-parameters by gradients beside a grid search, on scikit-learn's diabetes data.

The marginal likelihood of the infinitely deep ReLU network with its NNGP kernel, over W_std, b_std
and the noise. The grid has 5³ points, and one compiled program for all of them; `gp.fit` starts at
its middle, once and with three restarts. Times are with compilation and, of a second call, without;
ratios are grid over fit, so that more than 1 is for the fit. Likelihoods are in nats.

    python -m benchmarks.gp                # 100, 200 and 442 inputs
    python -m benchmarks.gp 100
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

from nt_deq import deq_network, gp  # isort: split

import jax
import numpy as np
from sklearn.datasets import load_diabetes

from benchmarks import _measure

SIZES = (100, 200, 442)
GRID = {
    "W_std": np.linspace(0.2, 1.3, 5),
    "b_std": np.geomspace(0.03, 3.0, 5),
    "noise": np.geomspace(0.03, 3.0, 5),
}
START = {name: float(values[2]) for name, values in GRID.items()}


def make_kernel(p: dict[str, Any]) -> Callable[..., Any]:
    """The network of hyper-parameters."""
    return deq_network(p["W_std"], b_std=p["b_std"])[2]


def data(n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` patients, in random order, with features and target of mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:n]
    x, y = x[order], y[order]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def by_grid() -> Callable[..., float]:
    """The best log marginal likelihood of the grid."""

    @jax.jit
    def likelihood(p, x, y):
        return gp.GaussianProcess(make_kernel(p), x, y, p["noise"]).log_marginal_likelihood()

    def search(x, y):
        points = (
            dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())
        )
        return max(float(likelihood(p, x, y)) for p in points)

    return search


def by_fit(restarts: int) -> Callable[..., float]:
    """The log marginal likelihood at the end of `gp.fit`."""

    def make(p):  # a function of its own, so that it is compiled anew
        return make_kernel(p)

    def search(x, y):
        bounds = {"W_std": (0.0, gp.largest_W_std("relu"))}
        found = gp.fit(make, x, y, START, bounds=bounds, restarts=restarts)
        if not found.converged:
            raise RuntimeError(f"gp.fit has not converged: {found}")
        return -found.loss

    return search


def measure(n: int) -> list[dict[str, Any]]:
    """One row a method, all of them in turn."""
    x, y = data(n)
    methods = {"grid of 125": by_grid(), "fit": by_fit(0), "fit, 3 restarts": by_fit(3)}
    rows: dict[str, dict[str, Any]] = {
        name: {"n": n, "method": name, "seconds": []} for name in methods
    }
    for _ in range(3):
        for name, search in methods.items():
            start = time.perf_counter()
            rows[name]["log_likelihood"] = search(x, y)
            rows[name]["seconds"].append(time.perf_counter() - start)
    grid = rows["grid of 125"]
    for row in rows.values():
        row["to_grid"] = grid["seconds"][0] / row["seconds"][0]
        row["to_grid_compiled"] = min(grid["seconds"][1:]) / min(row["seconds"][1:])
        row["gain"] = row["log_likelihood"] - grid["log_likelihood"]
    return list(rows.values())


def main() -> None:
    """Measures, prints and writes JSON."""
    jax.config.update("jax_enable_x64", True)
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    print(
        f"{'n':>4}  {'':16} {'likelihood':>10} {'gain':>7} {'first s':>8} {'ratio':>6} "
        f"{'again s':>8} {'ratio':>6}"
    )
    rows = []
    for n in sizes:
        for row in measure(n):
            rows.append(row)
            print(
                f"{n:4}  {row['method']:16} {row['log_likelihood']:10.3f} {row['gain']:7.3f} "
                f"{row['seconds'][0]:8.2f} {row['to_grid']:6.2f} "
                f"{min(row['seconds'][1:]):8.3f} {row['to_grid_compiled']:6.2f}",
                flush=True,
            )
    print(f"\n{_measure.write('gp', rows)}")


if __name__ == "__main__":
    main()
