"""tanh: the infinitely deep kernel by Hermite expansion beside 30 layers of neural-tangents' own.

`stax.ElementwiseNumerical` takes 25 × 25 evaluations of the activation a pair and layer. Both run
on the same inputs, float32, compiled; errors are the largest ones of NNGP and NTK, relative to the
largest entry, from a float64 reference.

    python -m benchmarks.hermite           # 500, 1000 and 2000 inputs: minutes
    python -m benchmarks.hermite 500
"""

from __future__ import annotations

import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nt_deq
from nt_deq import stax

SETTING = dict(W_std=0.6, U_std=1.0, b_std=0.2)
LAYERS, DEGREE, FEATURES, BLOCK, SIZES = 30, 25, 784, 100, (500, 1000, 2000)


def inputs(n: int, dtype: type = np.float32) -> jax.Array:
    """`n` inputs of mean square 1 that are not all orthogonal, `(n, FEATURES)`."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(n, 20)) @ rng.normal(size=(20, FEATURES)) / np.sqrt(20)
    return jnp.asarray(mixed, dtype)


@jax.jit
def by_hermite(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K* and Θ*, `(n, n)` each."""
    solution = nt_deq.deq_kernel(x, activation="tanh", **SETTING)
    return solution.nngp, solution.ntk


def by_layers(x1: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of `LAYERS` explicit layers, `(n1, n2)` each."""
    with warnings.catch_warnings(action="ignore"):
        phi = stax.ElementwiseNumerical(jnp.tanh, deg=DEGREE)
    cell = stax.serial(phi, stax.Dense(1, SETTING["W_std"]))[2]
    s = stax.Dense(1, SETTING["U_std"], SETTING["b_std"])[2](x1, x2)

    def layer(_, k):
        new = cell(s.replace(nngp=k[0], ntk=k[1], cov1=k[2], cov2=k[3]))
        return new.nngp + s.nngp, new.ntk + s.ntk, new.cov1 + s.cov1, new.cov2 + s.cov2

    return lax.fori_loop(0, LAYERS, layer, (s.nngp, s.ntk, s.cov1, s.cov2))[:2]


@jax.jit
def by_block(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`by_layers` of the first `BLOCK` rows: all at once would take 2.5 kB a pair."""
    return by_layers(x[:BLOCK], x)


def run(compiled, x: jax.Array, rounds: int) -> tuple[list[np.ndarray], float]:
    """The kernels, and the least wall time of `rounds` calls of what is compiled already."""
    times, kernels = [], ()
    for _ in range(rounds):
        start = time.perf_counter()
        kernels = jax.block_until_ready(compiled(x))
        times.append(time.perf_counter() - start)
    return [np.asarray(k, np.float64) for k in kernels], min(times)


def error(kernels, exact) -> float:
    """The largest error, relative to the largest entry of its kernel."""
    pairs = zip(kernels, exact, strict=True)
    return max(float(np.max(np.abs(k - e)) / np.max(np.abs(e))) for k, e in pairs)


def main() -> None:
    """Prints error and time of both, and their ratio."""
    print(f"{'n':>5}  {'':34} {'compile s':>9} {'run s':>8} {'error':>8}")
    for n in tuple(map(int, sys.argv[1:])) or SIZES:
        x = inputs(n)
        jax.config.update("jax_enable_x64", True)
        exact = [np.asarray(k) for k in by_hermite(inputs(n, np.float64))]
        jax.config.update("jax_enable_x64", False)
        times = []
        layers = f"{LAYERS} × ElementwiseNumerical(deg={DEGREE})"
        # All blocks are alike, so that one of them tells the time of them all.
        methods = (("Hermite, Newton", by_hermite, 5, 1), (layers, by_block, 2, n // BLOCK))
        for name, fn, rounds, blocks in methods:
            start = time.perf_counter()
            compiled = fn.lower(x).compile()
            compile_time = time.perf_counter() - start
            kernels, seconds = run(compiled, x, rounds)
            times.append(seconds * blocks)
            off = error(kernels, [k[: len(kernels[0])] for k in exact])
            print(f"{n:5}  {name:34} {compile_time:9.2f} {times[-1]:8.3f} {off:8.1e}", flush=True)
        print(f"{n:5}  ratio {times[1] / times[0]:.0f}")


if __name__ == "__main__":
    main()
