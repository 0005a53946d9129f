"""Images and tables for the experiments, split, standardised and with targets.

Images: the mean training image is subtracted from every image, which is then scaled to norm `√d`
(`centre=False`: only scaled), so that contrast does not count. Rows of a table: every feature has
mean 0 and variance 1 over the training rows. So `x·x/d` is about 1, as the kernels'
`U_std² x·x'/d` supposes.

Targets of labels: one-hot less their mean, `1 - 1/C` for the class and `-1/C` for the others. Real
targets: each has mean 0 and variance 1 over the training rows. So knowing nothing is predicting 0,
which is the mean of the network before training.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib import launch
from experiments.lib.launch import flag
from nt_deq.errors import InputError

N_TRAIN, N_TEST = 256, 500  # that are drawn at most, where nobody says how many
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class DataSettings(launch.Settings):
    """The flags that launchers on images and tables share."""

    data: str = flag(
        "digits",
        "digits (scikit-learn's), mnist (IDX files in --data_dir, gzipped or not), or a .npz file "
        "with arrays x_train, x_test: rows of a table (n, d) or images (n, height, width, ...); "
        "and y_train, y_test: integer labels (n,), or real numbers (n,) or (n, C) to regress on",
    )
    data_dir: str | None = flag(None, "directory of MNIST's four IDX files, for --data=mnist")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is not None and self.data != "mnist":
            raise InputError(
                f"--data_dir={self.data_dir} is for --data=mnist alone, and --data={self.data}."
            )


@dataclass(frozen=True)
class Dataset:
    """A problem with `C` classes or real targets; inputs are float64 where not asked otherwise.

    Attributes:
      x_train, x_test: standardised inputs, `(n, d)`.
      y_train, y_test: indices into `classes`, `(n,)`; or real targets as they were, `(n, C)`.
      classes: the labels, sorted; none of real targets.
      targets_train, targets_test: what networks are trained on, `(n, C)`.
      images_test: the test inputs as they were, `(n, ...)`, for pictures; `None` for a table.
      shape: of an input as it was, without its batch axis.
      mean: what was subtracted from every input, `(d,)`.
      scale: what its features were divided by, `(d,)`; `None` of images, which have norm `√d`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[int, ...]
    targets_train: np.ndarray
    targets_test: np.ndarray
    images_test: np.ndarray | None
    shape: tuple[int, ...]
    mean: np.ndarray
    scale: np.ndarray | None

    @property
    def name_of_inputs(self) -> str:
        """What one calls them."""
        return "rows" if self.images_test is None else "images"

    @property
    def preparation(self) -> str:
        """What was done to inputs and targets, in two sentences."""
        inputs = (
            "Every feature was made to have mean 0 and variance 1 over the training rows."
            if self.images_test is None
            else "The mean training image was subtracted, and every image scaled to norm "
            f"√{self.x_train.shape[1]}."
        )
        targets = (
            "Targets are one-hot less their mean."
            if self.classes
            else "Targets were made to have mean 0 and variance 1 over the training rows."
        )
        return f"{inputs} {targets}"


def load(
    name: str,
    data_dir: str | None,
    n_train: int | None,
    n_test: int | None,
    seed: int,
    centre: bool = True,
    dtype: type[np.floating] = np.float64,
    regression: bool = False,
) -> Dataset:
    """Loads a random subset.

    Args:
      name: `digits` (scikit-learn's, 1797 images of 8 × 8), `mnist` (IDX files in `data_dir`), or
        an npz file with `x_train`, `x_test` of shape `(n, d)`, a table, or `(n, height, width,
        ...)`, images, and `y_train`, `y_test`: integer labels, or real targets.
      data_dir: where MNIST's four files are, gzipped or not.
      n_train: how many training inputs to draw; `None` is all, but 256 at most.
      n_test: how many test inputs to draw; `None` is all, but 500 at most.
      seed: of the draw.
      centre: whether to subtract the mean training image.
      dtype: of the inputs.
      regression: whether real targets are taken, or labels alone.

    Raises:
      InputError: there is no such data, or not enough of it, or it cannot be right.
    """
    if name == "digits":
        (x_train, y_train), (x_test, y_test) = _digits(n_train or N_TRAIN, n_test or N_TEST, seed)
    elif name == "mnist":
        (x_train, y_train), (x_test, y_test) = _mnist(data_dir)
    elif name.endswith(".npz"):
        (x_train, y_train), (x_test, y_test) = _npz(name)
    else:
        raise InputError(
            f"--data={name} is unknown: use digits, mnist, or the name of a .npz file."
        )
    is_table = x_train.ndim == 2
    noun = "rows" if is_table else "images"
    rng = np.random.default_rng(seed)
    x_train, y_train = _draw(rng, x_train, y_train, "n_train", n_train, N_TRAIN, name, noun)
    x_test, y_test = _draw(rng, x_test, y_test, "n_test", n_test, N_TEST, name, noun)
    if y_train.dtype.kind == "f" and not regression:
        raise InputError(
            f"--data={name}: y_train has real numbers ({y_train.dtype}), and this launcher "
            "classifies: pass integer labels, or regress by experiments.claims.compare."
        )
    make_targets = _real if y_train.dtype.kind == "f" else _one_hot
    flat_train, flat_test = (x.reshape(len(x), -1).astype(dtype) for x in (x_train, x_test))
    if is_table:
        mean, scale = _moments(flat_train)
    else:
        mean, scale = flat_train.mean(axis=0) if centre else np.zeros_like(flat_train[0]), None
    return Dataset(
        x_train=standardise(flat_train, mean, scale),
        x_test=standardise(flat_test, mean, scale),
        images_test=None if is_table else x_test,
        shape=x_test.shape[1:],
        mean=mean,
        scale=scale,
        **make_targets(y_train, y_test, name),
    )


def standardise(x: np.ndarray, mean: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Standardises inputs `x`, `(n, d)`, in place (MNIST is large), and returns them."""
    x -= mean
    if scale is not None:
        x /= scale
        return x
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x *= x.shape[1] ** 0.5
    x /= np.where(norms > 0, norms, 1)
    return x


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every column, 1 where it is constant."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    rounding = 10 * np.finfo(x.dtype).eps * np.abs(mean)
    return mean, np.where(deviation <= rounding, 1, deviation).astype(x.dtype)


def _one_hot(y_train: np.ndarray, y_test: np.ndarray, name: str) -> dict[str, Any]:
    """The parts of a `Dataset` that labels make."""
    n = len(y_train)
    classes, labels = np.unique(np.concatenate([y_train, y_test]), return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"--data={name} has one class only among the inputs drawn: draw more.")
    if len(classes) > max(n // 2, 10):
        raise InputError(
            f"--data={name} has {len(classes)} different integers in y for {n} training inputs: "
            "integers are labels; save numbers to regress on as floats."
        )
    targets = np.eye(len(classes))[labels] - 1 / len(classes)
    return {
        "y_train": labels[:n],
        "y_test": labels[n:],
        "classes": tuple(map(int, classes)),
        "targets_train": targets[:n],
        "targets_test": targets[n:],
    }


def _real(y_train: np.ndarray, y_test: np.ndarray, name: str) -> dict[str, Any]:
    """The parts of a `Dataset` that real targets make."""
    y_train, y_test = (y.reshape(len(y), -1).astype(np.float64) for y in (y_train, y_test))
    for part, y in (("train", y_train), ("test", y_test)):
        if (y == y[0]).all(axis=0).any():
            raise InputError(
                f"--data={name}: y_{part} is constant in the {len(y)} inputs drawn: draw more."
            )
    mean, scale = _moments(y_train)
    return {
        "y_train": y_train,
        "y_test": y_test,
        "classes": (),
        "targets_train": (y_train - mean) / scale,
        "targets_test": (y_test - mean) / scale,
    }


Labelled = tuple[np.ndarray, np.ndarray]


def _draw(rng, x: np.ndarray, y: np.ndarray, flag: str, n, most: int, name: str, noun) -> Labelled:
    n = min(most, len(x)) if n is None else n
    if n > len(x):
        raise InputError(f"--{flag}={n} is too large: --data={name} has {len(x)} such {noun}.")
    rows = rng.permutation(len(x))[:n]
    return x[rows], y[rows]


def _digits(n_train: int, n_test: int, seed: int) -> tuple[Labelled, Labelled]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue]
    if n_train + n_test > len(images):
        raise InputError(
            f"--n_train={n_train} and --n_test={n_test} are too large together: --data=digits has "
            f"{len(images)} images."
        )
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:n_train], order[n_train:]
    return (images[train], labels[train]), (images[test], labels[test])


def _mnist(data_dir: str | None) -> tuple[Labelled, Labelled]:
    if data_dir is None:
        raise InputError("--data=mnist needs --data_dir: the directory of MNIST's four IDX files.")

    def part(stem: str) -> Labelled:
        images = _idx(Path(data_dir), f"{stem}-images-idx3-ubyte", 3)
        labels = _idx(Path(data_dir), f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise InputError(
                f"--data_dir={data_dir}: {stem} has {len(images)} images and {len(labels)} labels, "
                "and needs one for each: copy the files again."
            )
        return images, labels.astype(np.int64)

    return part("train"), part("t10k")


def _idx(directory: Path, name: str, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes: two zeros, type, ndim; big-endian sizes; the data."""
    plain, zipped = directory / name, directory / f"{name}.gz"
    file = plain if plain.is_file() else zipped
    if not file.is_file():
        raise InputError(
            f"--data_dir={directory} has neither {name} nor {name}.gz: name the directory of "
            "MNIST's four IDX files."
        )
    try:
        raw = gzip.decompress(file.read_bytes()) if file is zipped else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}): copy it again.") from error
    header = 4 + 4 * ndim
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) < header:
        raise InputError(f"{file} is not an IDX file of bytes in {ndim} dimensions: copy it again.")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], ">u4"))
    if len(raw) - header != np.prod(shape):
        raise InputError(
            f"{file} has {len(raw) - header} bytes of data for its shape {shape}, which needs "
            f"{np.prod(shape)}: copy it again."
        )
    return np.frombuffer(raw[header:], np.uint8).reshape(shape)


def _npz(name: str) -> tuple[Labelled, Labelled]:
    def check(right: Any, message: str) -> None:
        if not right:
            raise InputError(f"--data={name}{message}.")

    try:
        with np.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in NPZ_ARRAYS if key in file}
    except FileNotFoundError:
        raise InputError(f"--data={name} does not exist: name a .npz file that does.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"--data={name} cannot be read as arrays ({error}).") from error
    missing = [key for key in NPZ_ARRAYS if key not in arrays]
    check(not missing, f" has no {', '.join(missing)}: it needs {', '.join(NPZ_ARRAYS)}")
    train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    for part, (x, y) in (("train", train), ("test", test)):
        check(
            x.ndim > 1 and x.size and x.dtype.kind in "biuf",
            f": x_{part} is {x.dtype} of shape {x.shape}; it must be numbers of shape (n, ...), "
            "one input per row",
        )
        labels = y.dtype.kind in "iu" and y.ndim == 1
        check(
            (labels or (y.dtype.kind == "f" and y.ndim in (1, 2))) and len(y) == len(x),
            f": y_{part} is {y.dtype} of shape {y.shape}; it must be integer labels of shape "
            f"{x.shape[:1]}, one for each input, or real numbers of shape {x.shape[:1]} or "
            f"({len(x)}, C)",
        )
        for array, values in ((f"x_{part}", x), (f"y_{part}", y)):
            check(
                np.isfinite(values).all(),
                f": {array} has NaN or infinite values: drop or impute them",
            )
    (x_train, y_train), (x_test, y_test) = train, test
    check(
        x_train.shape[1:] == x_test.shape[1:],
        f": one x_train has shape {x_train.shape[1:]} and one x_test {x_test.shape[1:]}; both must "
        "have the same",
    )
    kinds = [(y.dtype.kind == "f", y.shape[1:]) for y in (y_train, y_test)]
    check(
        kinds[0] == kinds[1],
        f": y_train is {y_train.dtype} of shape {y_train.shape} and y_test {y_test.dtype} of shape "
        f"{y_test.shape}; both must be labels, or real numbers in as many columns",
    )
    return train, test
