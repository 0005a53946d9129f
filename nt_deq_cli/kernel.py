"""Computes a kernel matrix of an infinitely deep and wide network.

By default it is the kernel of the network with its linear readout, f(x) = V φ(z*)/√n, the one to
do regression with: its NTK, or its NNGP kernel, the covariance of f. With --of state it is that of
the equilibrium z* itself (nt_deq.deq_kernel).

X.npy has one input a row, (n, d); the kernel's entries depend on x·x'/d, so features of variance 1
(standardised ones) suit the default standard deviations. The matrix is computed tile by tile into
a file beside --out that takes its place when it is complete, so it may be larger than the memory.

Examples:
  nt-deq kernel X.npy --out K.npy
  nt-deq kernel X.npy --x2 X_test.npy --out K.npy --get nngp --W-std 1.2 --b-std 0.1
  nt-deq kernel X.npy --out K.npy --activation tanh --W-std 0.9 --x64
"""

from __future__ import annotations

import argparse
import sys

from nt_deq_cli import arrays, network

TILE = 1024  # inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x", metavar="X.npy", help="inputs, (n, d)")
    parser.add_argument("--x2", metavar="X2.npy", help="other inputs, (m, d) (default: X.npy)")
    parser.add_argument("--out", required=True, metavar="K.npy", help="for the kernel, (n, n or m)")
    parser.add_argument(
        "--get", choices=("ntk", "nngp"), default="ntk", help="which kernel (default %(default)s)"
    )
    parser.add_argument(
        "--of", choices=("network", "state"), default="network",
        help="network: of f; state: of z* (default %(default)s)",
    )  # fmt: skip
    network.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Computes it."""
    arrays.check_writable(args.out)
    x1 = arrays.read_inputs(args.x)
    x2 = arrays.read_inputs(args.x2, x1.shape[1]) if args.x2 else None

    import jax.numpy as jnp
    from tqdm import tqdm

    import nt_deq

    options = network.options(args)
    kernel_fn = network.kernel_fn(**options)
    with network.precision(args) as dtype:
        others = x1 if x2 is None else x2
        corners = [
            (i, j)
            for i in range(0, len(x1), TILE)
            for j in range(0, i + 1 if x2 is None else len(others), TILE)
        ]
        steps, bound = 0, 0.0
        with (
            arrays.new(args.out, (len(x1), len(others)), dtype) as out,
            tqdm(corners, "kernel", unit="tile", file=sys.stderr) as bar,
        ):
            for i, j in bar:
                rows, columns = slice(i, i + TILE), slice(j, j + TILE)
                same = x2 is None and i == j
                pair = (
                    jnp.asarray(x1[rows], dtype),
                    None if same else jnp.asarray(others[columns], dtype),
                )
                solution = nt_deq.deq_kernel(*pair, **options)
                if args.of == "state":
                    tile = getattr(solution, args.get)
                else:
                    tile = kernel_fn(*pair, args.get)
                out[rows, columns] = tile
                if x2 is None:
                    out[columns, rows] = out[rows, columns].T
                steps = max(steps, int(solution.steps))
                bound = max(bound, float(solution.error_bound.max()))
    of = "f" if args.of == "network" else "z*"
    print(
        f"{args.out}: {args.get.upper()} of {of}, {len(x1)} × {len(others)}, {dtype}. The "
        f"equilibrium took {steps} steps; the covariance of z* has an error of at most {bound:.1e}."
    )
