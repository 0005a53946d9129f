"""Shows for which W_std a network has an equilibrium.

For every W_std the kernel's rate J = W_std² E[φ'(z*)²], the largest of all inputs: below 1 the wide
network has a stable equilibrium and its kernels exist, and J is what an iteration of the covariance
contracts by. Beside it the bound of the theorem, 2 W_std Lip(φ): below 1 there is one equilibrium
whatever the inputs, and it is far from necessary (Gao et al. 2023, arXiv:2310.10767).

Without X.npy (or X.csv) the input is one of unit variance a feature, x·x/d = 1.

Examples:
  nt-deq phase
  nt-deq phase --activation tanh --b-std 0.1
  nt-deq phase X.npy --activation gelu --W-stds 0.8,0.9,1.0,1.1
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from nt_deq.cli import arrays, network, table

W_STDS = "0.2,0.4,0.6,0.8,1.0,1.2,1.4,1.6,1.8,2.0"


def _numbers(text: str) -> list[float]:
    numbers = [float(number) for number in text.split(",")]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError
    return numbers


_numbers.__name__ = "list of standard deviations"  # as argparse's message calls it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x", nargs="?", metavar="X.npy", help="inputs, (n, d)")
    parser.add_argument(
        "--W-stds", type=_numbers, default=_numbers(W_STDS), metavar="S,S,...",
        help=f"of the recurrent weights (default {W_STDS})",
    )  # fmt: skip
    network.add_input_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    x = arrays.read_inputs(args.x) if args.x else np.ones((1, 1))

    import jax.numpy as jnp

    from nt_deq import gp, theory
    from nt_deq.activations import get_activation

    rows = []
    with network.precision(args) as dtype:
        x = jnp.asarray(x, dtype)
        for W_std in args.W_stds:
            options = network.options(argparse.Namespace(**{**vars(args), "W_std": W_std}))
            rates = np.asarray(theory.local_contraction(x, **options))
            rate = float(np.max(rates))  # NaN if one is
            theorem = theory.global_contraction(W_std, args.activation)
            rows.append(
                [
                    f"{W_std:g}",
                    "none" if math.isnan(rate) else f"{rate:.4f}",
                    f"{theorem:.4f}",
                    "yes" if theorem < 1 else "no",
                    "yes" if rate < 1 else "no",
                ]
            )
        largest = gp.largest_W_std(args.activation)
        phi = get_activation(args.activation)
    table.show(
        ("W_std", "J = W_std² E[φ'²]", "2 W_std Lip(φ)", "theorem applies", "equilibrium"), rows
    )
    beyond = "at and beyond it none has" if phi.homogeneous else "beyond it some have"
    print(
        f"\n{args.activation}: whatever the inputs, there is an equilibrium for W_std < "
        f"{largest:.4g}; {beyond}. The theorem asks for W_std < {0.5 / phi.lipschitz:.4g}."
    )
