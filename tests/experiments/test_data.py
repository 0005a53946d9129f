"""Images and tables: what is read, how it is split and standardised, what is refused."""

import gzip
import os
import struct

import numpy as np
import pytest

from experiments.lib.data import load
from nt_deq.errors import InputError

MNIST = os.environ.get("NT_DEQ_MNIST")


def test_digits_are_standardised_and_split():
    data = load("digits", None, 300, 200, seed=0)
    assert data.x_train.shape == (300, 64)
    assert data.images_test.shape == (200, 8, 8)
    np.testing.assert_allclose(np.linalg.norm(data.x_train, axis=1), 8)
    np.testing.assert_allclose(np.linalg.norm(data.x_test, axis=1), 8)
    assert not {x.tobytes() for x in data.x_train} & {x.tobytes() for x in data.x_test}
    assert data.classes == tuple(range(10))
    np.testing.assert_allclose(data.targets_train.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(data.targets_train.max(axis=1), 0.9)
    np.testing.assert_array_equal(data.targets_test.argmax(axis=1), data.y_test)
    nearest = (data.x_test @ data.x_train.T).argmax(axis=1)  # labels follow their images
    assert (data.y_train[nearest] == data.y_test).mean() > 0.9
    same, other = (load("digits", None, 300, 200, seed) for seed in (0, 1))
    np.testing.assert_array_equal(data.x_train, same.x_train)
    assert not np.array_equal(data.x_train, other.x_train)


def write_idx(path, array, compress):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data += array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


def write_mnist(directory, compress=False):
    rng = np.random.default_rng(0)
    suffix = ".gz" if compress else ""
    for stem, n in (("train", 30), ("t10k", 20)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 200, (n, 6, 6))
        images[np.arange(n), 0, 0] = labels  # so that an image tells its label
        write_idx(directory / f"{stem}-images-idx3-ubyte{suffix}", images, compress)
        write_idx(directory / f"{stem}-labels-idx1-ubyte{suffix}", labels, compress)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_files_are_read_gzipped_or_not(tmp_path, compress):
    write_mnist(tmp_path, compress)
    data = load("mnist", str(tmp_path), 25, 20, seed=0)
    assert data.x_train.shape == (25, 36)
    np.testing.assert_array_equal(data.images_test[:, 0, 0], data.y_test)


@pytest.mark.skipif(MNIST is None, reason="NT_DEQ_MNIST does not name a directory of MNIST")
def test_the_real_mnist():
    data = load("mnist", MNIST, 1000, 200, seed=0)
    assert data.x_train.shape == (1000, 784)
    assert data.classes == tuple(range(10))
    nearest = (data.x_test @ data.x_train.T).argmax(axis=1)
    assert (data.y_train[nearest] == data.y_test).mean() > 0.8


def arrays(**changes):
    x, y = np.random.default_rng(0).normal(size=(12, 5)), np.arange(12) % 3
    return {"x_train": x, "y_train": y + 7, "x_test": x[:6], "y_test": y[:6] + 7} | changes


def test_an_npz_file_is_read(tmp_path):
    file = tmp_path / "own.npz"
    np.savez(file, **arrays())
    data = load(str(file), None, 10, 5, seed=0)
    assert data.classes == (7, 8, 9)
    assert data.targets_train.shape == (10, 3)
    assert load(str(file), None, None, None, seed=0).x_test.shape == (6, 5)


def test_a_table_is_standardised_by_its_training_rows(tmp_path):
    file = tmp_path / "own.npz"
    own = arrays()
    units = np.array([1e6, 1.0, 1e-6, 0.0, 1.0])
    np.savez(file, **own | {"x_train": own["x_train"] * units + 3, "x_test": own["x_test"] * units})
    data = load(str(file), None, 12, 6, seed=0)
    np.testing.assert_allclose(data.x_train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.x_train.std(axis=0), [1, 1, 1, 0, 1], rtol=1e-6)
    moved = load(str(file), None, 12, 3, seed=0)
    np.testing.assert_array_equal(moved.x_train, data.x_train)
    assert data.images_test is None
    assert data.name_of_inputs == "rows"


def test_images_of_ones_own_stay_images(tmp_path):
    file = tmp_path / "own.npz"
    np.savez(
        file,
        **arrays(
            x_train=np.arange(108.0).reshape(12, 3, 3), x_test=np.arange(54.0).reshape(6, 3, 3)
        ),
    )
    data = load(str(file), None, 12, 6, seed=0)
    np.testing.assert_allclose(np.linalg.norm(data.x_train, axis=1), 3)
    assert data.images_test.shape == (6, 3, 3)


@pytest.mark.parametrize("outputs", [(), (2,)])
def test_real_targets_are_standardised_and_must_be_asked_for(tmp_path, outputs):
    file = tmp_path / "own.npz"
    rng = np.random.default_rng(0)
    y_train, y_test = 100 + 50 * rng.normal(size=(12, *outputs)), rng.normal(size=(6, *outputs))
    np.savez(file, **arrays(y_train=y_train, y_test=y_test))
    data = load(str(file), None, None, None, seed=0, regression=True)
    np.testing.assert_allclose(data.targets_train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(data.targets_train.std(axis=0), 1)
    assert data.targets_test.shape == (6, *(outputs or (1,)))
    assert data.classes == ()
    with pytest.raises(InputError, match="this launcher classifies"):
        load(str(file), None, None, None, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": np.ones((6, 4))}, "must have the same"),
        ({"y_train": np.ones(12)}, "y_train is float64 .* and y_test int64"),
        ({"y_train": np.arange(12.0), "y_test": np.full(6, np.nan)}, "y_test has NaN"),
        ({"y_train": np.ones(12), "y_test": np.arange(6.0)}, "y_train is constant"),
        ({"y_train": np.ones((12, 2)), "y_test": np.arange(6.0)}, "in as many columns"),
        ({"y_train": np.arange(12), "y_test": np.arange(20, 26)}, "15 different integers in y"),
        ({"y_test": np.arange(5)}, r"shape \(5,\)"),
        ({"x_train": np.full((12, 5), np.nan)}, "x_train has NaN"),
        ({"x_train": np.array(["a"] * 12)}, "x_train is <U1"),
    ],
)
def test_an_npz_file_that_cannot_be_right(tmp_path, changes, message):
    file = tmp_path / "own.npz"
    np.savez(file, **arrays(**changes))
    with pytest.raises(InputError, match=message):
        load(str(file), None, 10, 5, seed=0, regression=True)


def test_an_npz_file_that_lacks_arrays(tmp_path):
    file = tmp_path / "own.npz"
    np.savez(file, x_train=np.ones((3, 2)))
    with pytest.raises(InputError, match="has no y_train, x_test, y_test"):
        load(str(file), None, 2, 2, seed=0)


def test_files_that_are_not_what_they_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz does not exist"):
        load(str(tmp_path / "none.npz"), None, 2, 2, seed=0)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(InputError, match="cannot be read as arrays"):
        load(str(tmp_path / "text.npz"), None, 2, 2, seed=0)
    with pytest.raises(InputError, match="has neither train-images-idx3-ubyte nor"):
        load("mnist", str(tmp_path), 2, 2, seed=0)
    write_mnist(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"1079 bytes of data for its shape \(30, 6, 6\)"):
        load("mnist", str(tmp_path), 2, 2, seed=0)
    images.write_text("text")
    with pytest.raises(InputError, match="is not an IDX file"):
        load("mnist", str(tmp_path), 2, 2, seed=0)


@pytest.mark.parametrize(
    ("name", "n_train", "message"),
    [
        ("digit", 10, "--data=digit is unknown"),
        ("mnist", 10, "needs --data_dir"),
        ("digits", 1790, "--n_train=1790 and --n_test=20 are too large"),
    ],
)
def test_what_there_is_not(name, n_train, message):
    with pytest.raises(InputError, match=message):
        load(name, None, n_train, 20, seed=0)
