"""The infinitely deep kernel beside explicit layers of neural-tangents and the bare x·xᵀ.

NNGP and NTK of `n` inputs with 784 features, in float32 and float64: `deq_kernel` by each solver,
`stax.DEQ` (which gets its x·xᵀ from neural-tangents), and 1, 10, 30 and 100 explicit layers
`K ← cell(K) + S`. All programs of one size run in turn in one process; ratios are to one explicit
layer of the same activation.

    python -m benchmarks.kernel            # 500, 2000 and 8000 inputs
    python -m benchmarks.kernel 500 2000
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import nt_deq  # isort: split

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nt_deq import nt, stax
from benchmarks import _measure

FEATURES, DEPTHS, SIZES, LARGE = 784, (1, 10, 30, 100), (500, 2000, 8000), 4000
SETTING = dict(W_std=0.9, U_std=1.0, b_std=0.2)
EXPLICIT = {"relu": nt.stax.Relu, "erf": nt.stax.Erf, "gelu": nt.stax.Gelu}
SOLVERS: dict[str, tuple[Any, ...]] = {
    "relu": (nt_deq.Chebyshev(), nt_deq.Newton(), nt_deq.Picard()),
    "erf": (nt_deq.Newton(), nt_deq.Picard()),
    "gelu": (nt_deq.Newton(), nt_deq.Picard()),
    "tanh": (nt_deq.Newton(), nt_deq.Picard()),
}


def inputs(n: int, dtype: Any) -> jax.Array:
    """`n` inputs of mean square 1 that are not all orthogonal, `(n, FEATURES)`."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(n, 20)) @ rng.normal(size=(20, FEATURES)) / np.sqrt(20)
    return jnp.asarray(mixed, dtype)


def by_deq_kernel(activation: str, solver: Any) -> Callable[[jax.Array], Any]:
    """`(K*, Θ*)`."""

    def fn(x):
        return nt_deq.deq_kernel(x, activation=activation, solver=solver, **SETTING)[:2]

    return fn


def by_stax(activation: str) -> Callable[[jax.Array], Any]:
    """The kernels of `h*`."""
    layer = stax.DEQ(1, activation=activation, **SETTING)
    return lambda x: tuple(layer[2](x, None, ("nngp", "ntk")))


def by_layers(activation: str, depth: int) -> Callable[[jax.Array], Any]:
    """The kernels of `z` after `depth` explicit layers with an injection."""
    cell = nt.stax.serial(EXPLICIT[activation](), nt.stax.Dense(1, SETTING["W_std"]))[2]
    inject = nt.stax.Dense(1, SETTING["U_std"], SETTING["b_std"])[2]

    def fn(x):
        k = s = inject(x)
        for _ in range(depth):
            new = cell(k)
            k = s.replace(nngp=new.nngp + s.nngp, ntk=new.ntk + s.ntk, cov1=new.cov1 + s.cov1)
        return k.nngp, k.ntk

    return fn


def cases(n: int) -> dict[str, Callable[[jax.Array], Any]]:
    """What is measured, by name."""
    found: dict[str, Callable[[jax.Array], Any]] = {
        "x·xᵀ": lambda x: jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    }
    for activation, solvers in SOLVERS.items():
        if n > LARGE and activation != "relu":  # an hour of explicit layers, which scale like n²
            continue
        for solver in solvers:
            name = f"{activation}, {type(solver).__name__}"
            found[name] = by_deq_kernel(activation, solver)
        found[f"{activation}, stax.DEQ"] = by_stax(activation)
        for depth in DEPTHS if activation in EXPLICIT else ():
            found[f"{activation}, {depth} layer{'s' * (depth > 1)}"] = by_layers(activation, depth)
    return found


def measure(n: int, dtype: Any) -> list[dict[str, Any]]:
    """One row a case."""
    jax.config.update("jax_enable_x64", dtype == np.float64)
    x = inputs(n, dtype)
    with warnings.catch_warnings(action="ignore"):
        programs = {name: _measure.build(fn, x) for name, fn in cases(n).items()}
    _measure.take_turns(programs)
    rows = []
    for name, program in programs.items():
        one = programs.get(f"{name.split(',')[0]}, 1 layer")
        rows.append(
            {
                "n": n,
                "dtype": np.dtype(dtype).name,
                "case": name,
                "compile_s": program.compile,
                "run_s": program.run if program.run < math.inf else None,  # too large to run
                "bytes": program.bytes,
                "to_one_layer": program.run / one.run if one and program.run < math.inf else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one size as a table."""
    print(f"\nn = {rows[0]['n']}, {rows[0]['dtype']}, NNGP and NTK")
    print(f"{'':22} {'compile s':>9} {'MB':>7} {'run s':>9} {'/ x·xᵀ':>7} {'/ 1 layer':>9}")
    for row in rows:
        times = "   does not fit into memory"
        if row["run_s"]:
            layers = f"{row['to_one_layer']:9.2f}" if row["to_one_layer"] else ""
            times = f"{row['run_s']:9.4f} {row['run_s'] / rows[0]['run_s']:7.1f} {layers}"
        print(
            f"{row['case']:22} {row['compile_s']:9.2f} {row['bytes'] / 1e6:7.0f} {times}",
            flush=True,
        )


def draw(rows: list[dict[str, Any]]) -> None:
    """Time against the number of inputs, one panel a dtype, into docs/."""
    from experiments.lib.report import BLACK, BLUE, GREEN, ORANGE, RED, SKY, figure_style

    lines = {
        "relu, 100 layers": ("100 explicit layers", RED, ":"),
        "relu, 30 layers": ("30 explicit layers", RED, "--"),
        "relu, 10 layers": ("10 explicit layers", ORANGE, "-."),
        "relu, 1 layer": ("one explicit layer", ORANGE, "-"),
        "relu, Picard": ("infinite depth, plain iteration", SKY, "--"),
        "relu, Newton": ("infinite depth, Newton", BLUE, "--"),
        "relu, Chebyshev": ("infinite depth, Chebyshev (default)", GREEN, "-"),
        "x·xᵀ": ("the bare x·xᵀ", BLACK, ":"),
    }
    with figure_style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
        for axis, dtype in zip(axes, ("float32", "float64"), strict=True):
            for case, (label, color, style) in lines.items():
                points = [
                    (r["n"], r["run_s"])
                    for r in rows
                    if (r["case"], r["dtype"]) == (case, dtype) and r["run_s"]
                ]
                axis.loglog(
                    *zip(*points, strict=True), style, marker="o", ms=4, color=color, label=label
                )
            axis.set(title=dtype, xlabel="inputs n")
            axis.set_xticks(
                sorted({r["n"] for r in rows}), sorted({r["n"] for r in rows}), minor=False
            )
            axis.minorticks_off()
        axes[0].set_ylabel("seconds for NNGP and NTK")
        figure.suptitle(
            "ReLU kernels of n inputs: infinitely deep (nt_deq) and explicit (neural-tangents)\n"
            "Where a point is missing, the program does not fit into memory"
        )
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.savefig(_measure.ROOT / "docs" / "benchmark_kernel.png", dpi=120)


def main() -> None:
    """Measures, prints, writes JSON and, of three sizes, the figure."""
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    rows: list[dict[str, Any]] = []
    for n in sizes:
        for dtype in (np.float32, np.float64):
            rows += measure(n, dtype)
            show([r for r in rows if (r["n"], r["dtype"]) == (n, np.dtype(dtype).name)])
    print(f"\n{_measure.write('kernel', rows)}")
    if sizes == SIZES:
        draw(rows)


if __name__ == "__main__":
    main()
