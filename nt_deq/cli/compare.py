"""Compares finite networks, trained by gradient descent, with the infinitely wide one.

Networks of several widths are trained on ½ mean (f - y)² by full-batch gradient descent. Beside
each is what the infinitely wide network would have come to in the same time from the same start,
by its NTK (neural_tangents.predict.gradient_descent_mse): the distance between the two is the root
mean square over the outputs for the test inputs, and falls like 1/√width.

Without files the data are 20 + 20 points on a circle, embedded, with y = sin 3α. With X.npy and
y.npy (or tables, .csv) the last fifth of the rows is for testing. Integers in y.npy are labels.

Examples:
  nt-deq compare
  nt-deq compare --widths 64,256,1024 --W-std 0.9 --activation gelu
  nt-deq compare X.npy y.npy --steps 500
"""

from __future__ import annotations

import argparse

import numpy as np

from nt_deq.cli import arrays, network, table
from nt_deq.errors import InputError

FRACTION = 1 / 8  # of the largest learning rate that converges: gradient descent is then its flow


def _widths(text: str) -> list[int]:
    widths = sorted({int(width) for width in text.split(",")})
    if widths[0] < 1:
        raise ValueError
    return widths


_widths.__name__ = "list of widths"  # as argparse's message calls it


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive integer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x", nargs="?", metavar="X.npy", help="inputs, (n, d)")
    parser.add_argument("y", nargs="?", metavar="y.npy", help="targets, (n,) or (n, C), or labels")
    parser.add_argument(
        "--widths", type=_widths, default=[32, 128, 512], metavar="N,N,...",
        help="of the finite networks (default 32,128,512)",
    )  # fmt: skip
    parser.add_argument(
        "--networks", type=_positive, default=3, metavar="N",
        help="of each width (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_positive, default=200, metavar="N",
        help="of gradient descent (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default %(default)s)")
    arrays.add_task_argument(parser)
    network.add_arguments(parser, W_std=0.6)  # narrow networks may have no equilibrium far above


def _data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, int]:
    """Inputs, targets `(n, C)`, and how many are for training."""
    if args.x is None:
        angle = 2 * np.pi * np.arange(40) / 40
        angle = np.concatenate([angle[::2], angle[1::2]])
        x = np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return x, np.sin(3 * angle)[:, None], 20
    if args.y is None:
        raise InputError(f"{args.x} has no targets beside it: name y.npy too.")
    x = arrays.read_inputs(args.x)
    y = arrays.read_targets(args.y, len(x), args.task)
    if len(x) < 5:
        raise InputError(f"{args.x} has {len(x)} rows; 5 or more are needed.")
    if y.dtype.kind != "f":
        classes, labels = np.unique(y, return_inverse=True)
        y = np.eye(len(classes))[labels] - 1 / len(classes)
    return x, y.reshape(len(x), -1), len(x) - len(x) // 5


def run(args: argparse.Namespace) -> None:
    """Trains the networks and prints the table."""
    x, y, n = _data(args)

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from nt_deq import deq_network, nt
    from nt_deq._progress import progress_bar
    from nt_deq.flax import DEQ, Dense, functional

    options = network.options(args)
    kernel_fn = deq_network(**options)[2]
    with network.precision(args) as dtype:
        x, y_train = jnp.asarray(x, dtype), jnp.asarray(y[:n], dtype)
        ntk = kernel_fn(x, x[:n], "ntk")
        predict_fn = nt.predict.gradient_descent_mse(
            ntk[:n], y_train, diag_reg=10 * np.finfo(dtype).eps
        )
        rate = FRACTION * float(nt.predict.max_learning_rate(ntk[:n], y_train_size=y_train.size))
        optimizer = optax.sgd(rate)

        class Network(nnx.Module):
            def __init__(self, width, rngs):
                stds = {**options, "b_std": args.b_std or None}
                self.deq = DEQ(x.shape[1], width, **stds, rngs=rngs)
                self.readout = Dense(width, y.shape[1], rngs=rngs)

            def __call__(self, x):
                return self.readout(self.deq(x))

        def train(width, bar):
            """Outputs before and after, and those of the infinite network, of each network."""
            seeds = range(args.seed, args.seed + args.networks)
            draws = [functional(Network(width, nnx.Rngs(seed))) for seed in seeds]
            apply_fn = draws[0][0]  # the same function for all

            @jax.jit
            def step(params, state):
                def loss_fn(params):
                    return 0.5 * ((apply_fn(params, x[:n]) - y_train) ** 2).mean()

                updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
                return optax.apply_updates(params, updates), state

            for _, params in draws:
                start, state = jnp.asarray(apply_fn(params, x)), optimizer.init(params)
                for _ in range(args.steps):
                    params, state = step(params, state)
                    bar.update()
                end = np.asarray(apply_fn(params, x))
                limit = predict_fn(rate * args.steps, start[:n], start[n:], ntk[n:])
                yield np.asarray(start), end, np.concatenate(limit)

        def loss(f):
            return 0.5 * np.mean((f[:n] - y[:n]) ** 2)

        rows = []
        total = len(args.widths) * args.networks * args.steps
        with progress_bar(total=total, desc="training", unit="step") as bar:
            for width in args.widths:
                runs = list(train(width, bar))
                losses = np.mean([[loss(f) for f in run] for run in runs], axis=0)
                distances = [np.sqrt(np.mean((end[n:] - limit[n:]) ** 2)) for _, end, limit in runs]
                rows.append(
                    [str(width), *(f"{value:.5f}" for value in (*losses, np.mean(distances)))]
                )
    table.show(("width", "loss before", "after", "infinitely wide", "distance on test"), rows)
    print(
        f"\nMeans over {args.networks} networks of each width; {args.steps} steps of learning rate "
        f"{rate:.4g} on {n} inputs, {len(x) - n} for testing."
    )
