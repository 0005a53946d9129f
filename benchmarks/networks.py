"""Explicit networks of `nt_deq.stax` beside the same ones of neural-tangents.

NNGP and NTK of fully-connected networks, `n` inputs with 784 features, beside the bare x·xᵀ, and of
convolutional ones on images of 16 × 16. Networks of one size run in turn in one process. The error
is the largest one of both kernels relative to the largest entry, to neural-tangents' in float64.
Then how the times grow with the depth, the number of inputs and the side of images, and the figure
of docs/speed.md.

    python -m benchmarks.networks              # 2000 inputs, 8 images
    python -m benchmarks.networks --small      # 300, 4, and no growth
    python -m benchmarks.networks --growth     # nothing else
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nt_deq  # noqa: F401  # isort: split
from nt_deq import nt, stax
from benchmarks import _measure
from benchmarks.kernel import inputs

DEPTHS, IMAGE_LAYERS = (1, 10, 30), 5
GROWTH = {"layers": (1, 3, 10, 30), "inputs": (250, 500, 1000, 2000), "side": (8, 12, 16)}
NAMES = ("neural-tangents", "nt_deq", "infinite depth", "x·xᵀ")
Kernel = Callable[[jax.Array], Any]


def both(network: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(NNGP, NTK)`."""
    return tuple(network[2](x, None, ("nngp", "ntk")))


def dense(module: Any, activation: str, depth: int, repeated: bool = False) -> Kernel:
    """A fully-connected network of so many layers, in a compiled loop if repeated."""
    layer = module.serial(module.Dense(1, 1.4, 0.1), getattr(module, activation)())
    rest = [module.repeat(layer, depth - 1)] if repeated else [layer] * (depth - 1)
    return partial(both, module.serial(layer, *rest, module.Dense(1)))


def convolutional(module: Any, *tail: Any) -> Kernel:
    """A convolutional ReLU network."""
    layer = module.Conv(1, (3, 3), W_std=1.4, padding="SAME"), module.Relu()
    return partial(both, module.serial(*layer * IMAGE_LAYERS, *tail, module.Dense(1)))


def cases() -> dict[str, Kernel]:
    """Networks of vectors, by name."""
    found: dict[str, Kernel] = {
        "x·xᵀ": lambda x: jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    }
    for activation, depths in (("Relu", DEPTHS), ("Erf", DEPTHS[:2]), ("Gelu", DEPTHS[:1])):
        for depth in depths:
            for name, module in (("neural-tangents", nt.stax), ("nt_deq", stax)):
                found[f"{depth} {activation}, {name}"] = dense(module, activation, depth)
    found[f"{DEPTHS[-1]} Relu repeated, nt_deq"] = dense(stax, "Relu", DEPTHS[-1], repeated=True)
    return found


def image_cases() -> dict[str, Kernel]:
    """Networks of images, by name."""
    found = {}
    for name, module in (("neural-tangents", nt.stax), ("nt_deq", stax)):
        found[f"CNN, pooled, {name}"] = convolutional(module, module.GlobalAvgPool())
        found[f"CNN, flattened, {name}"] = convolutional(module, module.Flatten())
    return found


def exact(programs: dict[str, Kernel], x: np.ndarray) -> dict[str, Any]:
    """The kernels of neural-tangents in float64."""
    jax.config.update("jax_enable_x64", True)
    return {name: jax.jit(fn)(jnp.asarray(x)) for name, fn in programs.items() if "neural" in name}


def measure(
    kind: str, programs: dict[str, Kernel], references: dict[str, Any], x: np.ndarray, dtype: Any
) -> list[dict[str, Any]]:
    """One row a network."""
    jax.config.update("jax_enable_x64", dtype == np.float64)
    built = {name: _measure.build(fn, jnp.asarray(x, dtype)) for name, fn in programs.items()}
    _measure.take_turns(built, budget=40)
    rows = []
    for name, program in built.items():
        theirs = name.replace(" repeated", "").replace("nt_deq", "neural-tangents")
        error = ratio = None
        if theirs in references:
            ratio = program.run / built[theirs].run
            pairs = zip(program(), references[theirs], strict=True)
            error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        rows.append(
            {
                "kind": kind,
                "n": len(x),
                "dtype": np.dtype(dtype).name,
                "case": name,
                "compile_s": program.compile,
                "run_s": program.run,
                "bytes": program.bytes,
                "to_neural_tangents": ratio,
                "error": error,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one size as a table; ratios are to the first row, and to neural-tangents."""
    print(f"\n{rows[0]['kind']}, n = {rows[0]['n']}, {rows[0]['dtype']}, NNGP and NTK")
    print(
        f"{'':32} {'compile s':>9} {'MB':>6} {'run s':>8} {'/ first':>7} {'/ nt':>5} {'error':>8}"
    )
    for row in rows:
        ratio = row["run_s"] / rows[0]["run_s"]
        theirs = ""
        if row["error"] is not None:
            theirs = f"{row['to_neural_tangents']:5.2f} {row['error']:8.1e}"
        print(
            f"{row['case']:32} {row['compile_s']:9.2f} {row['bytes'] / 1e6:6.0f} "
            f"{row['run_s']:8.4f} {ratio:7.2f} {theirs}",
            flush=True,
        )


def growing(axis: str, size: int) -> tuple[dict[str, Kernel], np.ndarray]:
    """ReLU networks by name, and inputs, of a size: 1000 of vectors, 10 layers, 4 images else."""
    modules = {"neural-tangents": nt.stax, "nt_deq": stax}
    if axis == "side":
        x = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
        return {
            name: convolutional(module, module.GlobalAvgPool()) for name, module in modules.items()
        }, x
    n, depth = (1000, size) if axis == "layers" else (size, 10)
    found = {name: dense(module, "Relu", depth) for name, module in modules.items()}
    found["infinite depth"] = partial(both, stax.serial(stax.DEQ(1, 0.9, b_std=0.1), stax.Dense(1)))
    found["x·xᵀ"] = cases()["x·xᵀ"]
    return found, np.asarray(inputs(n, np.float32))


def growth() -> list[dict[str, Any]]:
    """One row a size and program, in float32."""
    jax.config.update("jax_enable_x64", False)
    rows = []
    for axis, sizes in GROWTH.items():
        for size in sizes:
            programs, x = growing(axis, size)
            built = {name: _measure.build(fn, jnp.asarray(x)) for name, fn in programs.items()}
            _measure.take_turns(built, budget=10)
            rows += [
                {"axis": axis, "size": size, "case": name, "run_s": program.run}
                for name, program in built.items()
            ]
        print(f"\nby {axis}: {', '.join(map(str, sizes))}; seconds, and the power of the last two")
        for name in built:
            runs = times(rows, axis, name)
            power = np.log(runs[-1] / runs[-2]) / np.log(sizes[-1] / sizes[-2])
            print(f"{name:16}", *(f"{run:9.4f}" for run in runs), f"{power:6.2f}", flush=True)
    return rows


def times(rows: list[dict[str, Any]], axis: str, name: str) -> list[float]:
    """Of a program, in the order of sizes."""
    return [row["run_s"] for row in rows if (row["axis"], row["case"]) == (axis, name)]


def draw(rows: list[dict[str, Any]]) -> None:
    """One panel for each of what grows, into docs/."""
    from experiments.lib.report import BLACK, BLUE, GREEN, ORANGE, figure_style

    panels = {
        "layers": ("layers", "1000 vectors"),
        "inputs": ("inputs", "10 layers"),
        "side": ("pixels on a side", "4 images, 5 convolutions, pooled"),
    }
    styles = dict(
        zip(NAMES, ((ORANGE, "-"), (BLUE, "-"), (GREEN, "--"), (BLACK, ":")), strict=True)
    )
    with figure_style() as plt:
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.8))
        for panel, (axis, (label, title)) in zip(axes, panels.items(), strict=True):
            for name, (color, style) in styles.items():
                if runs := times(rows, axis, name):
                    panel.loglog(
                        GROWTH[axis], runs, style, marker="o", ms=4, color=color, label=name
                    )
            panel.set(title=title, xlabel=label)
            panel.set_xticks(GROWTH[axis], [str(size) for size in GROWTH[axis]], minor=False)
            panel.minorticks_off()
        axes[0].set_ylabel("seconds for NNGP and NTK")
        figure.suptitle("Explicit ReLU networks of nt_deq and of neural-tangents, float32, 2 cores")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        figure.savefig(_measure.ROOT / "docs" / "benchmark_networks.png", dpi=120)


def main() -> None:
    """Measures, prints, writes JSON and the figure."""
    if "--small" not in sys.argv[1:]:
        rows = growth()
        print(f"\n{_measure.write('growth', rows)}")
        draw(rows)
    if "--growth" not in sys.argv[1:]:
        compare()


def compare() -> None:
    """Networks of one size."""
    n, images = (300, 4) if "--small" in sys.argv[1:] else (2000, 8)
    pixels = np.random.default_rng(0).normal(size=(images, 16, 16, 3))
    rows: list[dict[str, Any]] = []
    vectors = np.asarray(inputs(n, np.float32), np.float64)
    for kind, programs, x in (("vectors", cases(), vectors), ("images", image_cases(), pixels)):
        references = exact(programs, x)
        for dtype in (np.float32, np.float64):
            found = measure(kind, programs, references, x, dtype)
            show(found)
            rows += found
    print(f"\n{_measure.write('networks', rows)}")


if __name__ == "__main__":
    main()
