"""A step of training of a convolutional DEQ beside the same network with its layers unrolled.

`z* = W ∗ relu(z*) + u`, 3x3, in float32, and the gradient of `½ Σ z*² / batch` in `W` and `u`: the
equilibrium to the last digits and to the tolerance of `lipschitz=0.9`, beside 8 and 24 layers with
tied weights, written out one after the other with `lax.conv_general_dilated`. All take turns in one
process; a ratio is of the least times, to 24 layers.

    python -m benchmarks.training
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nt_deq import Picard, UnrolledAdjoint
from benchmarks import _measure
from experiments.lib.report import table
from nt_deq.flax import Conv, FixedPoint

SIZES = ((64, 8, 32), (32, 16, 32), (128, 7, 48))  # batch, side, channels
W_STD, REFERENCE = 0.7, "24 layers"


def layers(depth: int, W: Array, u: Array) -> Array:
    """`depth` tied layers from 0, with the derivatives that JAX gives a convolution."""
    z = jnp.zeros_like(u)
    numbers = ("NHWC", "HWIO", "NHWC")
    for _ in range(depth):
        z = u + lax.conv_general_dilated(
            jax.nn.relu(z), W, (1, 1), "SAME", dimension_numbers=numbers, precision="highest"
        )
    return z


def programs(batch: int, side: int, channels: int) -> dict[str, _measure.Program]:
    """The compiled gradients."""
    u = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    made = {}

    def gradient(f):
        return jax.value_and_grad(lambda W, u: jnp.sum(f(W, u) ** 2) / (2 * batch), (0, 1))

    def network(spectral_bound=None, **kwargs):
        conv = Conv(
            channels,
            channels,
            (3, 3),
            W_std=W_STD,
            parameterization="standard",
            spectral_bound=spectral_bound,
            rngs=nnx.Rngs(0),
        )
        graph, W = nnx.split(FixedPoint(nnx.Sequential(nnx.relu, conv), lambda u: u, **kwargs))
        return lambda W, u: nnx.merge(graph, W)(u), W

    for name, kwargs in {
        "FixedPoint, to the last digits": {},
        "FixedPoint, as of lipschitz=0.9": {"spectral_bound": 0.9, "solver": Picard(rtol=1e-3)},
        "FixedPoint, UnrolledAdjoint(8)": {"adjoint": UnrolledAdjoint(8)},
    }.items():
        f, W = network(**kwargs)
        made[name] = _measure.build(gradient(f), W, u)
    (W,) = jax.tree.leaves(W)
    for depth in (8, 24):
        fn = gradient(functools.partial(layers, depth))
        made[f"{depth} layers"] = _measure.build(fn, W, u)
    return made


def main() -> None:
    """Prints a table, and writes it."""
    rows = []
    for size in SIZES:
        made = programs(*size)
        _measure.take_turns(made)
        for name, program in made.items():
            ratio = program.run / made[REFERENCE].run
            rows.append(
                {"size": size, "network": name, "seconds": program.run, "ratio": ratio,
                 "compile": program.compile, "megabytes": program.bytes / 1e6}
            )  # fmt: skip
    header = ("batch, side, channels", "network", "ms", f"over {REFERENCE}", "compile s", "MB")
    cells = [
        (
            ", ".join(map(str, row["size"])),
            row["network"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['compile']:.1f}",
            f"{row['megabytes']:.0f}",
        )
        for row in rows
    ]
    print(table(header, cells))
    print(f"\nSee {_measure.write('training', rows)}.")


if __name__ == "__main__":
    main()
