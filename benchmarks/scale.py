"""What a regression on 10⁵ and 10⁶ inputs would take on TPUs: a projection, not a measurement.

Flops and bytes of a tile are those that XLA counts in the program compiled here; what devices send
each other is what the compiled programs send (tests/regression/test_kernel_regression.py); a
product reads its tile. Chips are taken at their published figures, of
which a real run reaches a part.

    python -m benchmarks.scale
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from nt_deq import deq_network
from benchmarks import _measure
from nt_deq.regression.plan import bytes_per_step

SIDE, FEATURES, OUTPUTS, RANK = 2048, 784, 10, 4000
STEPS = 31  # that all of MNIST took, with as many landmarks
TILE = 4.0 * SIDE**2  # bytes
SPARE = 1e9  # bytes of a chip's memory for all else


@dataclass(frozen=True)
class Chip:
    """A slice of one kind of chips; cloud.google.com/tpu/docs/v5e and /v5p, 2026-11.

    Attributes:
      name: of the slice.
      count: chips.
      flops: at peak, bfloat16, a second; a product in full float32 is six of them.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      links: between chips, bytes a second in one direction.
    """

    name: str
    count: int
    flops: float
    memory: float
    bandwidth: float
    links: float


CHIPS = (
    Chip("TPU v5e-8", 8, 197e12, 16e9, 819e9, 200e9),
    Chip("TPU v5p-128", 64, 459e12, 95e9, 2765e9, 600e9),
)


def cost(fn: Any, *shapes: tuple[int, ...]) -> dict[str, float]:
    """Flops and bytes of a compiled program."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arguments).compile().cost_analysis()


def project(chip: Chip, n: int, tile: dict[str, float]) -> dict[str, Any]:
    """The memory and time of one regression.

    Where the kernel fits into the chips' memory a step reads it once, else it computes all of it.
    """
    tiles = math.ceil(n / SIDE)
    share = tiles * (tiles + 1) / 2 / chip.count  # tiles of a chip
    rank_bytes = 4.0 * RANK * n / chip.count
    in_memory = share * TILE + rank_bytes + SPARE < chip.memory
    memory = rank_bytes + in_memory * share * TILE
    build = share * max(6 * tile["flops"] / chip.flops, tile["bytes accessed"] / chip.bandwidth)
    layout: Any = SimpleNamespace(devices=chip.count, rows=tiles * SIDE)
    sent = bytes_per_step(layout, OUTPUTS, RANK)
    step = 2 * rank_bytes / chip.bandwidth + sent / chip.links
    step += share * TILE / chip.bandwidth if in_memory else build
    landmarks = 6 * 4.0 * n * RANK**2 / chip.count / chip.flops
    return {
        "chips": chip.name,
        "n": n,
        "kernel": "in memory" if in_memory else "computed anew",
        "bytes a chip": memory,
        "fits": memory + SPARE < chip.memory,
        "bytes sent a step": sent,
        "build seconds": build,
        "step seconds": step,
        "total seconds": (build if in_memory else 0.0) + landmarks + STEPS * step,
    }


def main() -> None:
    """Counts, prints a Markdown table and writes JSON."""
    kernel_fn = deq_network(0.7, 0.5, 0.7)[2]
    tile = cost(lambda x1, x2: kernel_fn(x1, x2, "ntk"), (SIDE, FEATURES), (SIDE, FEATURES))
    print(
        f"a tile of {SIDE} x {SIDE}, d = {FEATURES}: {tile['flops']:.2e} flops, of which "
        f"{2 * SIDE**2 * FEATURES:.2e} in x x', and {tile['bytes accessed']:.2e} bytes"
    )
    rows = [project(chip, n, tile) for chip in CHIPS for n in (10**5, 10**6)]
    print("| chips | n | kernel | GB a chip | MB sent a step | kernel, s | step, s | total, s |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['chips']} | {row['n']:.0e} | {row['kernel']}"
            f"{'' if row['fits'] else ', does not fit'} | {row['bytes a chip'] / 1e9:.1f} "
            f"| {row['bytes sent a step'] / 1e6:.1f} | {row['build seconds']:.2g} "
            f"| {row['step seconds']:.2g} | {row['total seconds']:.2g} |"
        )
    print(_measure.write("scale", rows))


if __name__ == "__main__":
    main()
