"""Attacks the error bounds of `deq_kernel` with random problems: `python tests/kernels/attack.py`.

A draw is a network and 12 inputs of any norm, among them duplicates, antipodes, collinear and zero
rows and near-duplicates; every other draw gives the inputs a second time as `x2`. Kernels in
float32 are compared with those in float64, and those in float64 with solutions in 64 bits of
mantissa by bisection (relu, abs, erf). Prints the table of docs/precision.md; `--draws` are per
activation and dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nt_deq import deq_kernel
from nt_deq.activations import ACTIVATIONS, get_activation

ROWS = 12
FEATURES = (1, 3, 100)
FUNCTIONS = {
    **ACTIVATIONS,
    "hard_tanh": jax.nn.hard_tanh,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "squared_relu": lambda z: jax.nn.relu(z) ** 2,
}
SINGLE = (
    *("relu", "leaky_relu", "abs", "identity", "erf", "gelu", "sin", "cos"),
    *("hard_tanh", "elu", "selu", "squared_relu"),
)
DOUBLE = ("relu", "abs", "erf")


class Problem(NamedTuple):
    """Draws of networks and inputs: `x` is `(draws, ROWS, features)`, the others `(draws,)`."""

    x: np.ndarray
    W_std: np.ndarray
    U_std: np.ndarray
    b_std: np.ndarray


class Tally(NamedTuple):
    """What came of it.

    Attributes:
      draws: which had an equilibrium.
      entries: of both kernels.
      violations: how many errors were above their bounds.
      largest: ratio of an error to its bound.
      median: ratio of a bound to its error where 1 - J > .001 and there is an error.
    """

    draws: int
    entries: int
    violations: int
    largest: float
    median: float


def draw(rng: np.random.Generator, name: str, draws: int, features: int) -> Problem:
    """Draws problems of one activation."""

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (draws, *shape))

    x = rng.normal(size=(draws, ROWS, features))
    kind = rng.integers(4, size=draws)
    x[kind == 1] = np.abs(x[kind == 1])
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    near = x[:, :1] + 10 ** uniform(-6, 0, 1, 1) * x
    x[kind == 2] = near[kind == 2]
    x[kind == 3] = rng.integers(0, 256, x[kind == 3].shape)
    wide = np.where(uniform(0, 1, 1, 1) < 0.3, uniform(-8, 8, ROWS, 1), uniform(-8, 8, 1, 1))
    x *= 10 ** np.where(uniform(0, 1, 1, 1) < 0.5, wide, uniform(-1, 2, 1, 1))
    x = x.astype(np.float32)
    x[:, 6], x[:, 7], x[:, 8], x[:, 9] = x[:, 0], -x[:, 1], 3 * x[:, 2], 0
    x[:, 10] = x[:, 3] * (1 + 10 ** uniform(-7, -2, 1))
    x[:, 11] = x[:, 4] + (x[:, 5] - x[:, 4]) * 10 ** uniform(-7, -1, 1)

    activation = get_activation(FUNCTIONS[name])
    W_std = uniform(0.05, 1.2)
    if activation.homogeneous:
        moment = float(activation.dual_diagonal(jnp.ones(()))[1])
        W_std = np.sqrt((1 - 10 ** uniform(-5, 0)) / moment)
    stds = W_std, 10 ** uniform(-1, 1), rng.choice([0.0, 0.1, 1.0], draws)
    return Problem(x, *(std.astype(np.float32) for std in stds))


@partial(jax.jit, static_argnums=(0, 1))
def solve(name: str, given: bool, problem: Problem):
    """The solutions of all draws; `given` says whether the inputs are `x2` too."""

    def one(x, W_std, U_std, b_std):
        stds = {"W_std": W_std, "U_std": U_std, "b_std": b_std}
        return deq_kernel(x, x if given else None, activation=FUNCTIONS[name], **stds)

    return jax.vmap(one)(*problem)


def bisected(name: str, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`K*` and `Θ*` in 64 bits of mantissa; the duals as the literature writes them."""
    wide = Problem(*(np.asarray(a, np.longdouble) for a in problem))
    pi = 4 * np.arctan(np.longdouble(1))
    W_var, U_var, b_var = (std[:, None, None] ** 2 for std in wide[1:])
    x = wide.x
    s = U_var * np.einsum("bid,bjd->bij", x, x) / x.shape[2] + b_var
    own = np.einsum("bii->bi", s)
    # |s|²|s'|² sin², without cancellation near equal rows
    rows = np.concatenate(
        [np.sqrt(U_var / x.shape[2]) * x, np.sqrt(b_var) * np.ones_like(x[..., :1])], 2
    )
    norm = np.where(own > 0, np.sqrt(own), 1)
    unit = rows / norm[:, :, None]
    chord = np.linalg.norm(unit[:, :, None] - unit[:, None], axis=-1)
    opposite = np.linalg.norm(unit[:, :, None] + unit[:, None], axis=-1)

    if name == "erf":
        low, high = own, own + W_var[:, 0]  # V is at most 1, and concave: there is one root
        k = high
        for _ in range(200):  # from a variance that may be much smaller
            k = (low + high) / 2
            above = W_var[:, 0] * (2 / pi * np.arctan2(2 * k, np.sqrt(1 + 4 * k))) + own > k
            low, high = np.where(above, k, low), np.where(above, high, k)
        k = np.where(own == 0, 0, k)
        k1, k2 = k[:, :, None], k[:, None, :]
        scale = np.sqrt(k1 * k2)

        def dual(c):
            root = np.sqrt(1 + 2 * (k1 + k2) + 4 * np.maximum((scale - c) * (scale + c), 0))
            return 2 / pi * np.arctan2(2 * c, root), 4 / pi / root

        c, low, high = scale, -scale, scale
        for _ in range(90):
            c = (low + high) / 2
            above = W_var * dual(c)[0] + s > c
            low, high = np.where(above, c, low), np.where(above, high, c)
        equal = (chord == 0) & (k1 == k2)
        c = np.where(equal, scale, c)  # the last digit of a bisection moves a large V̇
        return c, c / (1 - W_var * dual(c)[1])

    moment, bend = (0.5, 0.5) if name == "relu" else (1, 2)
    a = W_var * moment
    omega = W_var * bend / (1 - a)
    angle = np.arctan2(chord, opposite) * 2
    alpha, low, high = angle, np.zeros_like(angle), angle
    target = chord**2 / 2
    for _ in range(90):
        alpha = (low + high) / 2
        series = np.where(
            alpha < 1e-3, alpha**3 / 3 - alpha**5 / 30, np.sin(alpha) - alpha * np.cos(alpha)
        )
        below = 2 * np.sin(alpha / 2) ** 2 + omega * series / pi < target
        low, high = np.where(below, alpha, low), np.where(below, high, alpha)
    k = own / (1 - a[:, 0])
    c = np.sqrt(k[:, :, None] * k[:, None, :]) * (1 - 2 * np.sin(alpha / 2) ** 2)
    return c, c / (1 - a + W_var * bend * alpha / pi)


def attack(
    name: str, dtype: type, draws: int, seed: int = 0, widths: Sequence[int] = FEATURES
) -> Tally:
    """Solves random problems of so many features and compares errors with bounds."""
    rng = np.random.default_rng(seed)
    found, solved, median = [], 0, []
    for features in widths:
        for given in (False, True):
            problem = draw(rng, name, -(-draws // (2 * len(widths))), features)
            wide = Problem(*(np.asarray(a, np.float64) for a in problem))
            ours = solve(name, given, problem if dtype is np.float32 else wide)
            if dtype is np.float32:
                reference = solve(name, given, wide)
                exact, slack = reference[:2], (reference.nngp_error, reference.ntk_error)
            else:
                exact, slack = bisected(name, wide), (0, 0)
            converged = np.asarray(ours.converged)
            solved += int(converged.all((1, 2)).sum())
            easy = (np.asarray(ours.rate) < 0.999)[:, None, None]
            bounds = ours.nngp_error, ours.ntk_error
            for value, bound, true, more in zip(ours[:2], bounds, exact, slack, strict=True):
                error = np.abs(np.asarray(value, true.dtype) - true).astype(float)
                bound = np.asarray(bound, float) + np.asarray(more, float)
                known = converged & np.isfinite(np.asarray(true, float))
                tiny = np.finfo(float).tiny
                found.append((error / np.maximum(bound, tiny))[known])
                median.append((bound / np.maximum(error, tiny))[known & easy & (error > tiny)])
    ratios = np.concatenate(found)
    assert not np.isnan(ratios).any()
    return Tally(
        solved,
        ratios.size,
        int((ratios > 1).sum()),
        float(ratios.max()),
        float(np.median(np.concatenate(median))),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print("| φ | dtype | draws | entries | above the bound | error/bound | bound/error |")
    print("|---|---|---|---|---|---|---|")
    violations = 0
    for dtype, names in ((np.float32, SINGLE), (np.float64, DOUBLE)):
        for name in names:
            tally = attack(name, dtype, args.draws, args.seed)
            violations += tally.violations
            print(
                f"| {name} | {np.dtype(dtype)} | {tally.draws} | {tally.entries} | "
                f"{tally.violations} | {tally.largest:.2f} | {tally.median:.0f} |",
                flush=True,
            )
    raise SystemExit(violations and f"{violations} errors are above their bounds")


if __name__ == "__main__":
    main()
