"""The infinitely wide network that flags describe."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np

ACTIVATIONS = "relu, leaky_relu, abs, erf, gelu, sin, cos, identity, tanh, sigmoid, softplus, silu"


class Options(TypedDict):
    """The arguments of `nt_deq.deq_kernel` and `nt_deq.deq_network`."""

    W_std: float
    U_std: float
    b_std: float
    activation: str


def add_arguments(parser: argparse.ArgumentParser, W_std: float = 0.8) -> None:
    """Adds the flags of the network and of precision; `W_std` is its default."""
    group = parser.add_argument_group("the network (standard deviations, not variances)")
    group.add_argument(
        "--W-std", type=float, default=W_std, metavar="S",
        help="of the recurrent weights (default %(default)s; relu needs less than 1.414)",
    )  # fmt: skip
    add_input_arguments(group)


def add_input_arguments(group: argparse._ActionsContainer) -> None:
    """Adds all of these flags but `--W-std`."""
    group.add_argument(
        "--U-std", type=float, default=1.0, metavar="S",
        help="of the input weights (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--b-std", type=float, default=0.0, metavar="S", help="of the bias (default: no bias)"
    )
    group.add_argument(
        "--activation", default="relu", metavar="PHI",
        help=f"φ (default %(default)s): {ACTIVATIONS}",
    )  # fmt: skip
    group.add_argument("--x64", action="store_true", help="compute in float64 (default float32)")


def options(args: argparse.Namespace) -> Options:
    """The arguments of `nt_deq.deq_kernel`, checked."""
    from nt_deq import _checks
    from nt_deq.activations import get_activation

    get_activation(args.activation)
    _checks.standard_deviations(
        **{"--W-std": args.W_std, "--U-std": args.U_std, "--b-std": args.b_std}
    )
    return Options(W_std=args.W_std, U_std=args.U_std, b_std=args.b_std, activation=args.activation)


@contextlib.contextmanager
def precision(args: argparse.Namespace) -> Iterator[np.dtype]:
    """Computes in the precision asked for, and gives its NumPy dtype."""
    import numpy as np

    from nt_deq import _jax

    with _jax.enable_x64(args.x64):
        yield np.dtype(np.float64 if args.x64 else np.float32)
