"""Images and labels for the experiments, split, standardised and with targets.

Inputs: the mean training image is subtracted from every image, which is then scaled to norm `√d`
(`centre=False`: only scaled). So every input has unit variance a feature, as the kernels'
`U_std² x·x'/d` supposes, and contrast does not count. Targets: one-hot less their mean, `1 - 1/C`
for the class and `-1/C` for the others, so that knowing nothing is predicting 0, which is the mean
of the network before training.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import launch
from experiments.errors import InputError
from experiments.launch import flag

NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class DataSettings(launch.Settings):
    """The flags that launchers on images share."""

    data: str = flag(
        "digits",
        "digits (scikit-learn's), mnist (IDX files in --data_dir, gzipped or not), or a .npz file "
        "with arrays x_train, x_test (n, ...) and integer labels y_train, y_test (n,)",
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
    """A classification problem with `C` classes; inputs are float64 where not asked otherwise.

    Attributes:
      x_train, x_test: standardised inputs, `(n, d)`.
      y_train, y_test: indices into `classes`, `(n,)`.
      classes: the labels, sorted.
      images_test: the test inputs as they were, `(n, ...)`, for pictures.
      mean: what was subtracted from every input, `(d,)`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[int, ...]
    images_test: np.ndarray
    mean: np.ndarray

    @property
    def targets_train(self) -> np.ndarray:
        """Centred one-hot targets, `(n_train, C)`."""
        return self._targets(self.y_train)

    @property
    def targets_test(self) -> np.ndarray:
        """Centred one-hot targets, `(n_test, C)`."""
        return self._targets(self.y_test)

    def _targets(self, y: np.ndarray) -> np.ndarray:
        return np.eye(len(self.classes))[y] - 1 / len(self.classes)


def load(
    name: str,
    data_dir: str | None,
    n_train: int,
    n_test: int,
    seed: int,
    centre: bool = True,
    dtype: type[np.floating] = np.float64,
) -> Dataset:
    """Loads a random subset.

    Args:
      name: `digits` (scikit-learn's, 1797 images of 8 × 8), `mnist` (IDX files in `data_dir`), or
        an npz file with `x_train`, `x_test` of shape `(n, ...)` and integer `y_train`, `y_test`.
      data_dir: where MNIST's four files are, gzipped or not.
      n_train: how many training images to draw.
      n_test: how many test images to draw.
      seed: of the draw.
      centre: whether to subtract the mean training image.
      dtype: of the inputs.

    Raises:
      InputError: there is no such data, or not enough of it, or it cannot be right.
    """
    if name == "digits":
        (x_train, y_train), (x_test, y_test) = _digits(n_train, n_test, seed)
    elif name == "mnist":
        (x_train, y_train), (x_test, y_test) = _mnist(data_dir)
    elif name.endswith(".npz"):
        (x_train, y_train), (x_test, y_test) = _npz(name)
    else:
        raise InputError(
            f"--data={name} is unknown: use digits, mnist, or the name of a .npz file."
        )
    rng = np.random.default_rng(seed)
    x_train, y_train = _draw(rng, x_train, y_train, "n_train", n_train, name)
    x_test, y_test = _draw(rng, x_test, y_test, "n_test", n_test, name)
    classes, labels = np.unique(np.concatenate([y_train, y_test]), return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"--data={name} has one class only among the images drawn: draw more.")
    flat_train, flat_test = (x.reshape(len(x), -1).astype(dtype) for x in (x_train, x_test))
    mean = flat_train.mean(axis=0) if centre else np.zeros(flat_train.shape[1], dtype)
    return Dataset(
        x_train=standardise(flat_train, mean),
        y_train=labels[:n_train],
        x_test=standardise(flat_test, mean),
        y_test=labels[n_train:],
        classes=tuple(map(int, classes)),
        images_test=x_test,
        mean=mean,
    )


def standardise(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Standardises inputs `x`, `(n, d)`, in place (MNIST is large), and returns them."""
    x -= mean
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x *= x.shape[1] ** 0.5
    x /= np.where(norms > 0, norms, 1)
    return x


Labelled = tuple[np.ndarray, np.ndarray]


def _draw(rng, x: np.ndarray, y: np.ndarray, flag: str, n: int, name: str) -> Labelled:
    if n > len(x):
        raise InputError(f"--{flag}={n} is too large: --data={name} has {len(x)} such images.")
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
        directory = Path(data_dir)
        images = _idx(directory, f"{stem}-images-idx3-ubyte", 3)
        labels = _idx(directory, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise InputError(
                f"--data_dir={data_dir}: {stem} has {len(images)} images and {len(labels)} labels; "
                "they have to be as many: copy the files again."
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
    try:
        with np.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in NPZ_ARRAYS if key in file}
    except FileNotFoundError:
        raise InputError(f"--data={name} does not exist: name a .npz file that does.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"--data={name} cannot be read as arrays ({error}).") from error
    missing = [key for key in NPZ_ARRAYS if key not in arrays]
    if missing:
        raise InputError(
            f"--data={name} has no {', '.join(missing)}: it needs {', '.join(NPZ_ARRAYS)}."
        )
    x_train, y_train, x_test, y_test = (arrays[key] for key in NPZ_ARRAYS)
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim < 2 or x.size == 0 or x.dtype.kind not in "biuf":
            raise InputError(
                f"--data={name}: x_{part} is {x.dtype} of shape {x.shape}; it has to be numbers of "
                "shape (n, ...), one input a row."
            )
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise InputError(
                f"--data={name}: y_{part} is {y.dtype} of shape {y.shape}; it has to be integer "
                f"labels of shape {x.shape[:1]}, one an input."
            )
        if not np.isfinite(x).all():
            raise InputError(
                f"--data={name}: x_{part} has NaN or infinite values: drop or impute them."
            )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"--data={name}: one x_train has shape {x_train.shape[1:]} and one x_test "
            f"{x_test.shape[1:]}; they have to be the same."
        )
    return (x_train, y_train), (x_test, y_test)
