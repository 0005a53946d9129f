"""Infinitely deep convolutional kernels beside unrolled layers of neural-tangents.

NNGP and NTK, float32, of a cell with a 3 × 3 convolution, with and without average pooling in it,
followed by global average pooling: `stax.FixedPoint` with Anderson acceleration and with plain
iteration, and as many explicit layers as plain iteration takes steps. Errors are the largest ones
of NNGP and NTK, relative to the largest entry, to `FixedPoint` by plain iteration.

    python -m benchmarks.convolution           # up to 32 images of 16 × 16
    python -m benchmarks.convolution --small
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import nt_deq  # isort: split

import jax
import jax.numpy as jnp
import numpy as np

from nt_deq import nt, stax
from benchmarks import _measure
from nt_deq.kernels.cell import solve_cell, unreversed

CASES = ((16, 8, False), (16, 8, True), (32, 16, False), (32, 16, True))
SMALL = ((4, 4, False), (4, 4, True))
BUDGET = 60.0  # seconds
SETTING = dict(filter_shape=(3, 3), padding="SAME")


def layers(pool: bool) -> tuple[Any, Any]:
    """The cell and the injection."""
    conv = nt.stax.Conv(1, W_std=1.1, **SETTING)
    average = [nt.stax.AvgPool((3, 3), (1, 1), "SAME")] if pool else []
    cell = nt.stax.serial(stax.Relu(), *average, conv)
    return cell, nt.stax.Conv(1, W_std=1.0, b_std=0.1, **SETTING)


def by_fixed_point(pool: bool, solver: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """`(NNGP, NTK, steps)`."""
    cell, inject = layers(pool)
    s = unreversed(inject[2](x, None))
    k, *_, steps = solve_cell(cell[2], s, solver)
    out = nt.stax.GlobalAvgPool()[2](k)
    return out.nngp, out.ntk, steps


def by_layers(pool: bool, depth: int, x: jax.Array) -> tuple[jax.Array, ...]:
    """`(NNGP, NTK)` of `depth` explicit layers with an injection, in a compiled loop."""
    cell, inject = layers(pool)
    s = unreversed(inject[2](x, None))

    def layer(_, k):
        new = unreversed(cell[2](s.replace(nngp=k[0], ntk=k[1], cov1=k[2])))
        return new.nngp + s.nngp, new.ntk + s.ntk, new.cov1 + s.cov1

    nngp, ntk, cov1 = jax.lax.fori_loop(0, depth, layer, (s.nngp, s.ntk, s.cov1))
    out = nt.stax.GlobalAvgPool()[2](s.replace(nngp=nngp, ntk=ntk, cov1=cov1))
    return out.nngp, out.ntk


def measure(images: int, size: int, pool: bool) -> list[dict[str, Any]]:
    """One row a method."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(images, size, size, 3)), jnp.float32)
    solvers = {"Anderson": nt_deq.Anderson(), "Picard": nt_deq.Picard()}
    programs = {
        name: _measure.build(partial(by_fixed_point, pool, solver), x)
        for name, solver in solvers.items()
    }
    outputs = {name: [np.asarray(a) for a in program()] for name, program in programs.items()}
    steps = {name: int(out[2]) for name, out in outputs.items()}
    unrolled = f"{steps['Picard']} layers"
    programs[unrolled] = _measure.build(partial(by_layers, pool, steps["Picard"]), x)
    outputs[unrolled] = [np.asarray(a) for a in programs[unrolled]()]
    steps[unrolled] = steps["Picard"]
    if sum(program.run for program in programs.values()) < BUDGET:  # a first call counts as well
        _measure.take_turns(programs, budget=BUDGET, most=5)

    def error(kernels):
        pairs = zip(kernels[:2], outputs["Picard"][:2], strict=True)
        return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)

    return [
        {
            "images": images,
            "size": size,
            "pooling": pool,
            "case": name,
            "steps": steps[name],
            "compile_s": program.compile,
            "run_s": program.run,
            "bytes": program.bytes,
            "to_layers": program.run / programs[unrolled].run,
            "error": error(outputs[name]),
        }
        for name, program in programs.items()
    ]


def main() -> None:
    """Measures, prints and writes JSON."""
    rows: list[dict[str, Any]] = []
    print(
        f"{'':26} {'':10} {'steps':>5} {'compile s':>9} {'run s':>8} {'MB':>6} {'/ layers':>8} "
        f"{'error':>8}"
    )
    for images, size, pool in SMALL if "--small" in sys.argv[1:] else CASES:
        for row in measure(images, size, pool):
            rows.append(row)
            case = f"{images} images {size} × {size}{', pooling' * pool}"
            print(
                f"{case:26} {row['case']:10} {row['steps']:5} {row['compile_s']:9.2f} "
                f"{row['run_s']:8.3f} {row['bytes'] / 1e6:6.0f} {row['to_layers']:8.2f} "
                f"{row['error']:8.1e}",
                flush=True,
            )
    print(_measure.write("convolution", rows))


if __name__ == "__main__":
    main()
