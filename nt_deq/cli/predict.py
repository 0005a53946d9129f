"""Predicts by regression with the kernel of an infinitely deep and wide network.

With the NNGP kernel it is the posterior mean of the network with random weights, with the NTK
(--get ntk) what training the infinitely wide network by gradient descent tends to. Real numbers in
y.npy, (n,) or (n, C), are regressed; integers or words, (n,), are labels, and labels are
predicted. Files are .npy, or tables with or without a line of names, .csv or .tsv.

Up to a few thousand inputs it is a Cholesky factorisation, which also gives leave-one-out: how well
every training target is predicted from all the others. Beyond that it is conjugate gradients; what
it will do and need is said before it starts.

With --model DIR the fitted model is kept in a directory, and predicts again from X_test.npy alone.

Examples:
  nt-deq predict X.npy y.npy X_test.npy --out prediction.npy
  nt-deq predict X.npy y.npy X_test.npy --out mean.npy --std std.npy --relative-noise 0.01
  nt-deq predict X.csv species.csv X_test.csv --out found.csv --probabilities p.csv --y-test s.csv
  nt-deq predict X.npy labels.npy X_test.npy --out labels_test.npy --store kernel-tiles
  nt-deq predict X.npy y.npy X_test.npy --out prediction.npy --model DIR
  nt-deq predict X_more.npy --out more.npy --model DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Real, Shaped

from nt_deq.cli import arrays, csv_files, network, quality
from nt_deq.cli.files import check_outputs
from nt_deq.errors import InputError

if TYPE_CHECKING:
    from nt_deq import KernelRegression

_MODELS = "KernelRegression", "KernelClassifier"  # of numbers, of labels
_OPTIONS = "get", "relative_noise"  # of a model, besides those of the network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("x_train", metavar="X.npy", help="training inputs, (n, d)")
    parser.add_argument(
        "y_train", metavar="y.npy", nargs="?", help="targets, (n,) or (n, C), or labels"
    )
    parser.add_argument(
        "x_test", metavar="X_test.npy", nargs="?",
        help="inputs to predict for, (m, d); alone where --model has learned",
    )  # fmt: skip
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
    parser.add_argument(
        "--model", metavar="DIR",
        help="directory to keep the fitted model in; with X_test.npy alone, the one to predict by",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite these files, and the model")
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
    learned = args.y_train is None
    if learned:
        args.x_train, args.x_test = None, args.x_train
    if args.x_test is None or (learned and not args.model):
        raise InputError(
            "predict takes X.npy y.npy X_test.npy, or X_test.npy alone and --model DIR."
        )
    outputs = {"--out": args.out, "--std": args.std, "--probabilities": args.probabilities}
    inputs = {"X": args.x_train, "y": args.y_train, "X_test": args.x_test, "--y-test": args.y_test}
    check_outputs(outputs, inputs, args.force)
    if args.probabilities and args.store:
        raise InputError(
            f"--probabilities={args.probabilities} needs leave-one-out, which there is not with "
            f"--store={args.store}: leave out one of them."
        )
    model, problem, x_test, source = _load(args) if learned else _fit(args)
    with network.precision(args) as dtype:
        from nt_deq import KernelClassifier

        x_test = x_test.astype(dtype)
        if isinstance(model, KernelClassifier):
            found = model.decision_function(x_test, return_std=args.std is not None)
            what = f"labels of {len(model.classes_)}"
        else:
            found = model.predict(x_test, return_std=args.std is not None)
            what = "values"
        mean, std = found if args.std else (found, None)
        # Of a model that was loaded it takes the time of another fit.
        wanted = args.probabilities if learned else model.plan_.method == "cholesky"
        left_out = model.leave_one_out() if wanted else None

    write = _write_numbers if problem.classes is None else _write_labels
    measures = write(args, problem, mean, left_out)
    if std is not None:
        arrays.write(args.std, std, ["standard deviation"])
    written = ", ".join(filter(None, outputs.values()))
    print(f"{written}: {what} for {len(x_test)} inputs, learned from {len(problem.y)}{source}.")
    for name, measure in measures.items():
        print(f"{name}: {measure}.")
    if not measures:
        why = "" if learned else "conjugate gradients do not tell; "
        print(f"How good they are: {why}--y-test FILE does.")
    if args.model and not learned:
        print(f"{args.model}: the model, for nt-deq predict X_test.npy --model {args.model}.")


def _fit(args: argparse.Namespace) -> tuple[KernelRegression, Problem, np.ndarray, str]:
    """The model of the training files, which is kept if that is asked for, and the test inputs.

    Returns:
      The model; what is predicted; the test inputs; what to tell of where the model is from.
    """
    x, x_test = arrays.read_input_pair(args.x_train, args.x_test)
    y = arrays.read_targets(args.y_train, len(x), args.task)
    problem = _read(args, y, len(x_test))

    import nt_deq
    from nt_deq import _saving

    if args.model:
        _saving.check_writable(args.model)
        if _saving.read_settings(args.model) and not args.force:
            raise InputError(
                f"--model={args.model} holds a model already: leave out {args.x_train} and "
                f"{args.y_train} to predict by it, or --force replaces it."
            )
    options = network.options(args)
    made_of = {_flag(name): value for name, value in options.items()}
    method = "cholesky" if args.probabilities else "auto"
    kernel_fn = nt_deq.deq_network(**options)[2]
    kind = getattr(nt_deq, _MODELS[problem.classes is not None])
    model = kind(kernel_fn, args.get, args.relative_noise, method, args.store, store_key=made_of)
    with network.precision(args) as dtype:
        model.fit(x.astype(dtype), y)
        if args.model:
            columns = csv_files.read_names(args.x_train) if csv_files.is_csv(args.x_train) else None
            model._save(args.model, {"network": options, "columns": columns, "x64": args.x64})
    return model, problem, x_test, ""


def _load(args: argparse.Namespace) -> tuple[KernelRegression, Problem, np.ndarray, str]:
    """The model that was kept, what it has learned, and the test inputs; as `_fit`."""
    x_test = arrays.read_inputs(args.x_test)

    import nt_deq
    from nt_deq import _saving

    found = _saving.read_settings(args.model)
    if found is None:
        raise InputError(f"--model={args.model} holds no model: X.npy y.npy X_test.npy make one.")
    kind, settings = found
    saved: Any = settings
    if kind not in _MODELS or not saved["notes"]:
        raise InputError(
            f"--model={args.model} holds a {kind} of Python's: load it there, by {kind}.load."
        )
    notes, arguments = saved["notes"], saved["arguments"]
    known = notes["network"] | {name: arguments[name] for name in _OPTIONS}
    task = "regress" if kind == _MODELS[0] else "classify"
    known |= {"x64": notes["x64"], "store": arguments["store"], "task": task}
    _check_flags(args, known)
    told = ", ".join(f"{_flag(name)} {value}" for name, value in known.items())
    args.x64 = notes["x64"]
    if notes["columns"] and csv_files.is_csv(args.x_test):
        arrays.check_columns(args.x_test, args.model, notes["columns"])
    with network.precision(args):
        kernel_fn = nt_deq.deq_network(**notes["network"])[2]
        model = getattr(nt_deq, kind).load(args.model, kernel_fn)
    if args.probabilities:
        if model.store is not None:
            raise InputError(
                f"--probabilities={args.probabilities} needs leave-one-out, which --model="
                f"{args.model} has not: it was fitted with --store."
            )
        model.method = "cholesky"
    classes = getattr(model, "classes_", None)
    y = model._targets if classes is None else model._targets.argmax(axis=1)
    problem = _problem(args, y, classes, len(x_test), args.model)
    return model, problem, x_test, f" by the model in {args.model} ({told})"


def _check_flags(args: argparse.Namespace, known: Mapping[str, Any]) -> None:
    """Raises where a flag says otherwise than the model, and does not just say nothing."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in known.items():
        given = getattr(args, name)
        if given not in (parser.get_default(name), value):
            raise InputError(
                f"{_flag(name)}={given}, and --model={args.model} was made with {value}: leave the "
                "flag out."
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(args: argparse.Namespace, y: np.ndarray, m: int) -> Problem:
    """What the targets `y` of the training file are."""
    if y.dtype.kind == "f":
        return _problem(args, y, None, m, args.y_train)
    classes, indices = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{args.y_train} has one label, {classes[0]}; two or more are needed.")
    return _problem(args, indices, classes, m, args.y_train)


def _problem(
    args: argparse.Namespace,
    y: Real[np.ndarray, "n ..."],
    classes: Shaped[np.ndarray, " C"] | None,
    m: int,
    source: str,
) -> Problem:
    """Adds what the `m` test targets are; `source` is where `y` is from."""
    y_test = None
    if args.y_test:
        y_test = arrays.read_targets(args.y_test, m, "regress" if classes is None else "classify")
        if y_test.shape[1:] != y.shape[1:]:
            raise InputError(
                f"--y-test={args.y_test} has shape {y_test.shape}, and {source} {y.shape}."
            )
    if classes is None:
        if args.probabilities:
            raise InputError(
                f"--probabilities={args.probabilities} is for labels, and {source} has "
                f"{y.dtype}; if these are labels: --task=classify."
            )
    elif y_test is not None:
        index = {label: i for i, label in enumerate(classes.tolist())}
        y_test = np.array([index.get(label, -1) for label in y_test.tolist()])
        if (y_test < 0).all():
            raise InputError(
                f"--y-test={args.y_test} has none of the labels of {source}, such as {classes[0]}."
            )
    return Problem(y, classes, y_test)


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
