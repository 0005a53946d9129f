"""Computes a kernel matrix of an infinitely deep and wide network.

By default it is the kernel of the network with its linear readout, f(x) = V φ(z*)/√n, the one to
do regression with: its NNGP kernel, the covariance of f, or its NTK. With --of state it is that of
the equilibrium z* itself (nt_deq.deq_kernel), with a bound on the error of its covariance.

X.npy, or a table X.csv, has one input per row, (n, d); the kernel's entries depend on x·x'/d, so
features of variance 1 (standardised ones) suit the default standard deviations. The matrix is
computed tile by tile into a file beside --out that takes its place when it is complete, so it may
be larger than the memory.

Examples:
  nt-deq kernel X.npy --out K.npy
  nt-deq kernel X.npy --x2 X_test.npy --out K.npy --get ntk --W-std 1.2 --b-std 0.1
  nt-deq kernel X.npy --out K.npy --activation tanh --W-std 0.9 --x64
"""

from __future__ import annotations

import argparse

import numpy as np

from nt_deq.cli import arrays, csv_files, network
from nt_deq.cli.files import check_outputs
from nt_deq.errors import InputError

TILE = 1024  # inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x", metavar="X.npy", help="inputs, (n, d)")
    parser.add_argument("--x2", metavar="X2.npy", help="other inputs, (m, d) (default: X.npy)")
    parser.add_argument("--out", required=True, metavar="K.npy", help="for the kernel, (n, n or m)")
    parser.add_argument(
        "--get", choices=("nngp", "ntk"), default="nngp", help="which kernel (default %(default)s)"
    )
    parser.add_argument(
        "--of", choices=("network", "state"), default="network",
        help="network: of f; state: of z* (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite K.npy")
    network.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Computes it."""
    if csv_files.is_csv(args.out):
        raise InputError(f"--out={args.out}: a kernel is written as .npy, and not as a table.")
    check_outputs({"--out": args.out}, {"X.npy": args.x, "--x2": args.x2}, args.force)
    if args.x2 is None:
        x1 = x2 = arrays.read_inputs(args.x)
    else:
        x1, x2 = arrays.read_input_pair(args.x, args.x2)

    import jax
    import jax.numpy as jnp

    import nt_deq
    from nt_deq._progress import progress_bar

    options = network.options(args)
    kernel_fn = nt_deq.deq_network(**options)[2]
    compiled = jax.jit(kernel_fn, static_argnums=2)
    symmetric = args.x2 is None
    corners = [
        (i, j)
        for i in range(0, len(x1), TILE)
        for j in range(0, i + 1 if symmetric else len(x2), TILE)
    ]
    steps, bound = 0, 0.0
    with (
        network.precision(args) as dtype,
        arrays.new(args.out, (len(x1), len(x2)), dtype) as out,
        progress_bar(corners, "kernel", unit="tile") as bar,
    ):
        for i, j in bar:
            rows, columns = slice(i, i + TILE), slice(j, j + TILE)
            tile_x1 = jnp.asarray(x1[rows], dtype)
            tile_x2 = None if symmetric and i == j else jnp.asarray(x2[columns], dtype)
            if args.of == "state":
                solution = nt_deq.deq_kernel(tile_x1, tile_x2, **options)
                out[rows, columns] = getattr(solution, args.get)
                steps = max(steps, int(solution.steps))
                bound = max(bound, float(solution.nngp_error.max()))
            else:
                tile = np.asarray(compiled(tile_x1, tile_x2, args.get))
                if not np.isfinite(tile).all():
                    kernel_fn(tile_x1, tile_x2, args.get)  # outside of jit it says what is wrong
                out[rows, columns] = tile
            if symmetric:
                out[columns, rows] = out[rows, columns].T
    of = "f" if args.of == "network" else "z*"
    print(f"{args.out}: {args.get.upper()} of {of}, {len(x1)} × {len(x2)}, {dtype}.")
    if args.of == "state":
        print(
            f"The equilibrium took {steps} steps; the covariance of z* has an error of at most "
            f"{bound:.1e}."
        )
