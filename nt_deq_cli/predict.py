"""Predicts by regression with the kernel of an infinitely deep and wide network.

With the NTK it is what training the infinitely wide network by gradient descent tends to, with the
NNGP kernel the posterior mean of the network with random weights (nt_deq.KernelRegression). Real
numbers in y.npy, (n,) or (n, C), are regressed; integers, (n,), are labels, and labels are
predicted. Up to a few thousand inputs it is a Cholesky factorisation, beyond that conjugate
gradients; what it will do and need is said before it starts.

Examples:
  nt-deq predict X.npy y.npy X_test.npy --out prediction.npy
  nt-deq predict X.npy y.npy X_test.npy --out mean.npy --std std.npy --get nngp --diag-reg 0.01
  nt-deq predict X.npy labels.npy X_test.npy --out labels_test.npy --store kernel-tiles
"""

from __future__ import annotations

import argparse

import numpy as np

from nt_deq_cli import arrays, network
from nt_deq_cli.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x_train", metavar="X.npy", help="training inputs, (n, d)")
    parser.add_argument("y_train", metavar="y.npy", help="targets, (n,) or (n, C), or labels")
    parser.add_argument("x_test", metavar="X_test.npy", help="inputs to predict for, (m, d)")
    parser.add_argument("--out", required=True, metavar="FILE", help="for the predictions")
    parser.add_argument(
        "--std", metavar="FILE",
        help="for their standard deviations, (m,); of labels: those of the scores",
    )  # fmt: skip
    parser.add_argument(
        "--get", choices=("ntk", "nngp"), default="ntk", help="which kernel (default %(default)s)"
    )
    parser.add_argument(
        "--diag-reg", type=float, default=1e-4, metavar="R",
        help="variance of the noise, relative to the mean of the kernel's diagonal (default "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--store", metavar="DIR",
        help="directory to keep the kernel in, from which a killed run goes on",
    )  # fmt: skip
    network.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Predicts."""
    files = [args.out] + ([args.std] if args.std else [])
    for file in files:
        arrays.check_writable(file)
    if args.std == args.out:
        raise InputError(f"--std={args.std} is --out too: name two files.")
    x = arrays.read_inputs(args.x_train)
    y = arrays.read_targets(args.y_train, len(x))
    x_test = arrays.read_inputs(args.x_test, x.shape[1])

    import nt_deq

    kernel_fn = network.kernel_fn(**network.options(args))
    regression = nt_deq.KernelRegression(kernel_fn, args.get, args.diag_reg, store=args.store)
    with network.precision(args) as dtype:
        regression.fit(x.astype(dtype), y if y.dtype.kind in "iu" else y.astype(dtype))
        found = regression.predict(x_test.astype(dtype), return_std=args.std is not None)
    mean, std = found if args.std else (found, None)
    if regression.classes_ is not None:
        mean = regression.classes_[np.argmax(mean, axis=1)]
    arrays.write(args.out, mean)
    if std is not None:
        arrays.write(args.std, std)
    what = "values" if regression.classes_ is None else f"labels of {len(regression.classes_)}"
    print(f"{', '.join(files)}: {what} for {len(x_test)} inputs, learned from {len(x)}.")
