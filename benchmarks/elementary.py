"""Elementary functions: nt_deq's beside those of jax.numpy, and which of XLA's own are slow.

Nanoseconds per number, of blocks that stay in the cache, and the largest error in units of the last
place, against mpmath. What takes ten times as long as an addition is, on a CPU, a call of libm per
number. The closed forms that are made of them follow, V and V̇ of a pair. All programs of a dtype
run in turn in one process; times and ratios are medians.

    python -m benchmarks.elementary
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from jax import lax
from jax.scipy.special import erf

from benchmarks import _measure
from nt_deq.activations import ACTIVATIONS, elementary

BLOCKS, SIZE, SEEN, ROUNDS = 64, 2**14, 4000, 15
DUALS = ("relu", "erf", "gelu", "sin")


class Case(NamedTuple):
    """A function in nt_deq, in jax.numpy and in mpmath, of numbers between two ends."""

    ours: Callable[..., Any] | None
    theirs: Callable[..., Any]
    exact: Callable[..., Any]
    ends: tuple[float, float]
    arguments: int = 1


CASES = {
    "arctan2": Case(elementary.arctan2, jnp.arctan2, mpmath.atan2, (-1, 1), arguments=2),
    "sine": Case(elementary.sine, jnp.sin, mpmath.sin, (0, np.pi / 2)),
    "versine": Case(
        elementary.versine, lambda a: 1 - jnp.cos(a), lambda a: 1 - mpmath.cos(a), (0, np.pi)
    ),
    "arc_moment": Case(
        elementary.arc_moment,
        lambda a: (jnp.sin(a) - a * jnp.cos(a)) / np.pi,
        lambda a: (mpmath.sin(a) - a * mpmath.cos(a)) / mpmath.pi,
        (0, np.pi),
    ),
    "x + y": Case(None, jnp.add, lambda x, y: x + y, (0, 1), arguments=2),
    "x / y": Case(None, jnp.divide, lambda x, y: x / y, (0, 1), arguments=2),
    "sqrt": Case(None, jnp.sqrt, mpmath.sqrt, (0, 10)),
    "exp": Case(None, jnp.exp, mpmath.exp, (-10, 10)),
    "expm1": Case(None, jnp.expm1, mpmath.expm1, (-10, 10)),
    "log": Case(None, jnp.log, mpmath.log, (0, 10)),
    "log1p": Case(None, jnp.log1p, mpmath.log1p, (0, 10)),
    "tanh": Case(None, jnp.tanh, mpmath.tanh, (-5, 5)),
    "erf": Case(None, erf, mpmath.erf, (-4, 4)),
    "sin": Case(None, jnp.sin, mpmath.sin, (-10, 10)),
    "cos": Case(None, jnp.cos, mpmath.cos, (-10, 10)),
    "arccos": Case(None, jnp.arccos, mpmath.acos, (-1, 1)),
}


def in_blocks(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one block after the other."""
    return lambda *args: lax.map(lambda block: fn(*block), args)


def arguments(case: Case, dtype: Any) -> list[jax.Array]:
    """Random numbers between its ends, `(BLOCKS, SIZE)` each, in any order of size near 0."""
    rng, found = np.random.default_rng(0), []
    for _ in range(case.arguments):
        x = rng.uniform(*case.ends, (BLOCKS, SIZE))
        x[:, ::4] *= 10 ** rng.uniform(-6, 0, x[:, ::4].shape)
        found.append(jnp.asarray(x, dtype))
    return found


def pairs(dtype: Any) -> list[jax.Array]:
    """Variances and covariances of pairs, `(BLOCKS, SIZE)` each."""
    rng = np.random.default_rng(0)
    k1, k2 = 10 ** rng.uniform(-1, 1, (2, BLOCKS, SIZE))
    c = rng.uniform(-1, 1, k1.shape) * np.sqrt(k1 * k2)
    return [jnp.asarray(a, dtype) for a in (k1, k2, c)]


def units_off(case: Case, found: jax.Array, args: list[jax.Array]) -> float:
    """The largest error of the first numbers, in units of the last place."""
    values, largest = np.ravel(found)[:SEEN], 0.0
    for value, *numbers in zip(values, *(np.ravel(a)[:SEEN] for a in args), strict=True):
        true = case.exact(*(mpmath.mpf(float(number)) for number in numbers))
        unit = float(np.spacing(np.abs(values.dtype.type(true))))
        largest = max(largest, float(abs(mpmath.mpf(float(value)) - true)) / unit)
    return largest


def medians(programs: Mapping[str, _measure.Program]) -> dict[str, float]:
    """Nanoseconds per number."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append((time.perf_counter() - start) * 1e9 / (BLOCKS * SIZE))
    return {name: statistics.median(found) for name, found in times.items()}


def measure(dtype: Any) -> list[dict[str, Any]]:
    """One row per function."""
    jax.config.update("jax_enable_x64", dtype == np.float64)
    programs, errors = {}, {}
    for name, case in CASES.items():
        args = arguments(case, dtype)
        for of, fn in (("nt_deq", case.ours), ("jax.numpy", case.theirs)):
            if fn is not None:
                key = f"{of} {name}"
                programs[key] = _measure.build(in_blocks(fn), *args)
                errors[key] = units_off(case, programs[key](), args)
    for name in DUALS:
        dual = ACTIVATIONS[name].dual
        programs[f"V and V̇ of {name}"] = _measure.build(in_blocks(dual), *pairs(dtype))
    times = medians(programs)
    return [
        {
            "dtype": np.dtype(dtype).name,
            "function": name,
            "ns": ns,
            "to_addition": ns / times["jax.numpy x + y"],
            "units_off": errors.get(name),
        }
        for name, ns in times.items()
    ]


def main() -> None:
    """Measures, prints and writes JSON."""
    rows = []
    with mpmath.workdps(50):
        for dtype in (np.float32, np.float64):
            rows += measure(dtype)
    print(f"{'':8} {'':22} {'ns':>6} {'/ (x + y)':>9} {'units off':>9}")
    for row in rows:
        error = "" if row["units_off"] is None else f"{row['units_off']:9.2f}"
        print(
            f"{row['dtype']:8} {row['function']:22} {row['ns']:6.2f} {row['to_addition']:9.1f} "
            f"{error}"
        )
    print(f"\n{_measure.write('elementary', rows)}")


if __name__ == "__main__":
    main()
