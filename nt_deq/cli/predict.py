"""Predicts by regression with the kernel of an infinitely deep and wide network.

With the NNGP kernel it is the posterior mean of the network with random weights, with the NTK
(--get ntk) what training the infinitely wide network by gradient descent tends to. Real numbers in
y.npy, (n,) or (n, C), are regressed; integers or words, (n,), are labels, and labels are
predicted. Files are .npy, or tables with or without a line of names, .csv or .tsv.

Up to a few thousand inputs it is a Cholesky factorisation, which also gives leave-one-out: how well
every training target is predicted from all the others. Beyond that it is conjugate gradients; what
it will do and need is said before it starts.

Examples:
  nt-deq predict X.npy y.npy X_test.npy --out prediction.npy
  nt-deq predict X.npy y.npy X_test.npy --out mean.npy --std std.npy --relative-noise 0.01
  nt-deq predict X.csv species.csv X_test.csv --out found.csv --probabilities p.csv --y-test s.csv
  nt-deq predict X.npy labels.npy X_test.npy --out labels_test.npy --store kernel-tiles
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from jaxtyping import Real, Shaped

from nt_deq.cli import arrays, network, quality
from nt_deq.cli.files import check_outputs
from nt_deq.errors import InputError


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
        "--probabilities", metavar="FILE",
        help="for the probability of every label, in their order, (m, C): Φ of the scores, scaled "
        "so that leave-one-out makes the training labels the most probable",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite these files")
    parser.add_argument(
        "--y-test", metavar="FILE", help="true targets of X_test.npy: says how good predictions are"
    )
    arrays.add_task_argument(parser)
    parser.add_argument(
        "--get", choices=("nngp", "ntk"), default="nngp", help="which kernel (default %(default)s)"
    )
    parser.add_argument(
        "--relative-noise", type=float, default=1e-4, metavar="V",
        help="variance of the noise of the targets, relative to the mean of the kernel's diagonal "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--store", metavar="DIR",
        help="directory to keep the kernel in, from which a killed run goes on",
    )  # fmt: skip
    network.add_arguments(parser)


class Problem(NamedTuple):
    """What is to be predicted.

    Attributes:
      y: numbers, `(n,)` or `(n, C)`; or the indices of labels in `classes`, `(n,)`.
      classes: the labels, sorted; `None` of numbers.
      y_test: those of the test inputs, -1 for a label not in `classes`; `None` if not known.
    """

    y: Real[np.ndarray, "n ..."]
    classes: Shaped[np.ndarray, " C"] | None
    y_test: Real[np.ndarray, "m ..."] | None


def run(args: argparse.Namespace) -> None:
    """Predicts."""
    outputs = {"--out": args.out, "--std": args.std, "--probabilities": args.probabilities}
    inputs = {"X": args.x_train, "y": args.y_train, "X_test": args.x_test, "--y-test": args.y_test}
    check_outputs(outputs, inputs, args.force)
    if args.probabilities and args.store:
        raise InputError(
            f"--probabilities={args.probabilities} needs leave-one-out, which there is not with "
            f"--store={args.store}: leave out one of them."
        )
    x, x_test = arrays.read_input_pair(args.x_train, args.x_test)
    problem = _read(args, len(x), len(x_test))

    import nt_deq

    options = network.options(args)
    made_of = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    method = "cholesky" if args.probabilities else "auto"
    kernel_fn = nt_deq.deq_network(**options)[2]
    given = kernel_fn, args.get, args.relative_noise, method, args.store
    if problem.classes is None:
        model = nt_deq.KernelRegression(*given, store_key=made_of)
        outputs_of, what = model.predict, "values"
    else:
        model = nt_deq.KernelClassifier(*given, store_key=made_of)
        outputs_of, what = model.decision_function, f"labels of {len(problem.classes)}"
    with network.precision(args) as dtype:
        model.fit(x.astype(dtype), problem.y)
        found = outputs_of(x_test.astype(dtype), return_std=args.std is not None)
    mean, std = found if args.std else (found, None)
    left_out = model.leave_one_out() if model.plan_.method == "cholesky" else None

    write = _write_numbers if problem.classes is None else _write_labels
    measures = write(args, problem, mean, left_out)
    if std is not None:
        arrays.write(args.std, std, ["standard deviation"])
    written = ", ".join(filter(None, outputs.values()))
    print(f"{written}: {what} for {len(x_test)} inputs, learned from {len(x)}.")
    for name, measure in measures.items():
        print(f"{name}: {measure}.")
    if not measures:
        print("How good they are: conjugate gradients do not tell; --y-test FILE does.")


def _read(args: argparse.Namespace, n: int, m: int) -> Problem:
    y = arrays.read_targets(args.y_train, n, args.task)
    is_labels = y.dtype.kind != "f"
    y_test = None
    if args.y_test:
        y_test = arrays.read_targets(args.y_test, m, "classify" if is_labels else "regress")
        if y_test.shape[1:] != y.shape[1:]:
            raise InputError(
                f"--y-test={args.y_test} has shape {y_test.shape}, and {args.y_train} {y.shape}."
            )
    if not is_labels:
        if args.probabilities:
            raise InputError(
                f"--probabilities={args.probabilities} is for labels, and {args.y_train} has "
                f"{y.dtype}; if these are labels: --task=classify."
            )
        return Problem(y, None, y_test)
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{args.y_train} has one label, {classes[0]}; two or more are needed.")
    if y_test is not None:
        index = {label: i for i, label in enumerate(classes.tolist())}
        y_test = np.array([index.get(label, -1) for label in y_test.tolist()])
        if (y_test < 0).all():
            raise InputError(
                f"--y-test={args.y_test} has none of the labels of {args.y_train}, such as "
                f"{classes[0]}."
            )
    return Problem(indices, classes, y_test)


def _write_numbers(args, problem: Problem, mean, left_out) -> dict[str, str]:
    """Writes predicted numbers; returns how good they are."""
    count = mean.shape[1] if mean.ndim == 2 else 1
    names = ["prediction"] if count == 1 else [f"prediction {i}" for i in range(count)]
    arrays.write(args.out, mean, names)
    measures = {}
    if left_out is not None:
        measures["leave-one-out"] = quality.of_numbers(left_out, problem.y)
    if problem.y_test is not None:
        measures[args.y_test] = quality.of_numbers(mean, problem.y_test)
    return measures


def _write_labels(args, problem: Problem, scores, left_out) -> dict[str, str]:
    """Writes predicted labels, and probabilities if need be; returns how good they are."""
    from nt_deq.gp.calibration import calibrate, log_probabilities

    assert problem.classes is not None
    arrays.write(args.out, problem.classes[scores.argmax(axis=1)], ["label"])
    measures, log_p = {}, None
    if left_out is not None:
        # Of two labels one score is minus the other.
        two = slice(1, None) if len(problem.classes) == 2 else slice(None)
        fitted = calibrate(left_out[:, two], np.zeros(len(left_out)), problem.y)
        log_p, log_p_left_out = (
            log_probabilities(found[:, two], np.zeros(len(found)), *fitted)
            for found in (scores, left_out)
        )
        measures["leave-one-out"] = quality.of_labels(
            left_out.argmax(axis=1), problem.y, log_p_left_out
        )
        if args.probabilities:
            names = [str(label) for label in problem.classes]
            arrays.write(args.probabilities, np.exp(log_p), names)
    if problem.y_test is not None:
        measures[args.y_test] = quality.of_labels(scores.argmax(axis=1), problem.y_test, log_p)
    return measures
