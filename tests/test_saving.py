"""Models on disk: what is loaded is what was saved, and a kill, damage or another kernel shows."""

# A model does not tell which kind it is.
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import float64

from nt_deq import KernelClassifier, KernelRegression, ModelError, _files, _saving, gp, stax
from nt_deq.errors import ArgumentError
from nt_deq.gp import matrices
from nt_deq.regression import FeatureRegression, NystromFeatures, in_batches

ROOT = Path(__file__).parents[1]
FORMAT_1 = ROOT / "tests/saved_format_1"


def explicit(W_std):  # compiles in less time
    return stax.serial(stax.Dense(1, W_std, 0.2), stax.Erf(), stax.Dense(1))[2]


KERNEL_FN = explicit(1.5)
RNG = np.random.default_rng(0)
X, X_TEST = RNG.normal(size=(20, 3)), RNG.normal(size=(4, 3))
Y = np.sin(X[:, :2])
WORDS = np.where(Y[:, 0] > 0, "high", "low")


def fit(model=KernelRegression, y=Y, x=X, **options):
    return model(KERNEL_FN, "ntk", 1e-3, progress=False, **options).fit(x, y)


@pytest.fixture
def saved(tmp_path):
    """A model in a directory, and what it predicts."""
    model = fit()
    model.save(tmp_path / "model")
    return tmp_path / "model", model.predict(X_TEST)


def described(path):
    return json.loads((path / "model.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cholesky"},
        {"method": "cg", "rank": 10, "relative_residual": 1e-6, "seed": 3},
        {"store": "kernel", "store_key": {"W_std": 1.5}},
    ],
    ids=["cholesky", "cg", "store"],
)
def test_a_regression_predicts_what_it_did(options, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fit(**options)
    model.save("model")
    monkeypatch.chdir("/")  # the store has an absolute name
    again = KernelRegression.load(tmp_path / "model", KERNEL_FN)
    np.testing.assert_array_equal(again.predict(X_TEST), model.predict(X_TEST))
    assert again.coefficients_.dtype == np.float64
    for name in ("get", "relative_noise", "method", "rank", "relative_residual", "seed"):
        assert getattr(again, name) == getattr(model, name), name
    assert (again.noise_, again.store_key) == (model.noise_, model.store_key)
    assert repr(again.solution_) == repr(model.solution_)
    for found, wanted in zip(
        again.predict(X_TEST, return_std=True), model.predict(X_TEST, return_std=True), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)  # the same steps in the same order
    assert again.plan_.method == model.plan_.method
    if model.plan_.method == "cholesky":
        np.testing.assert_array_equal(again.leave_one_out(), model.leave_one_out())
    else:
        with pytest.raises(ArgumentError, match="method='cholesky'"):
            again.leave_one_out()


def test_the_solver_of_a_loaded_model_is_planned_for_this_machine(saved):
    model = KernelRegression.load(saved[0], KERNEL_FN)
    model.memory = 1e6
    np.testing.assert_array_equal(model.predict(X_TEST), saved[1])  # which needs no plan
    with pytest.raises(MemoryError, match="needs"):
        model.predict(X_TEST, return_std=True)
    model.memory = 4e9
    assert model.predict(X_TEST, return_std=True)[1].shape == (4,)
    assert model.plan_.available == 4e9
    model.fit(X, Y[:, 0])  # and a fit is a fit
    assert model.predict(X_TEST).shape == (4,)
    assert not hasattr(KernelRegression(KERNEL_FN), "plan_")


@pytest.mark.parametrize(
    "labels",
    [WORDS, WORDS.astype(object), WORDS == "low", np.where(WORDS == "low", -3, 10**12)],
    ids=["words", "objects", "Booleans", "integers"],
)
def test_a_classifier_has_its_labels(labels, tmp_path):
    model = fit(KernelClassifier, labels)
    model.save(tmp_path)
    again = KernelClassifier.load(tmp_path, KERNEL_FN)
    assert again.predict(X_TEST).tolist() == model.predict(X_TEST).tolist()
    assert again.classes_.tolist() == model.classes_.tolist()
    assert again.classes_.dtype.kind == np.array(labels.tolist()).dtype.kind
    np.testing.assert_array_equal(again.decision_function(X_TEST), model.decision_function(X_TEST))
    with pytest.raises(ModelError, match="holds a KernelClassifier, and not a KernelRegression"):
        KernelRegression.load(tmp_path, KERNEL_FN)


@pytest.mark.parametrize("weights", [None, np.arange(20) % 3], ids=["unweighted", "weighted"])
def test_a_process_has_its_factor(weights, dtype, tmp_path, monkeypatch):
    process = gp.GaussianProcess(KERNEL_FN, X, Y, 0.1, weights=weights)
    process.save(tmp_path)
    monkeypatch.setattr(jax.numpy.linalg, "cholesky", None)
    again = gp.GaussianProcess.load(tmp_path, KERNEL_FN)
    for ask in (
        lambda p: p.log_marginal_likelihood(),
        lambda p: p.leave_one_out(),
        lambda p: p.posterior(X_TEST),
    ):
        for found, wanted in zip(
            jax.tree.leaves(ask(again)), jax.tree.leaves(ask(process)), strict=True
        ):
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, wanted)
    monkeypatch.undo()
    found, wanted = (p.condition(X_TEST, Y[:4]).posterior(X[:2]).mean for p in (again, process))
    np.testing.assert_array_equal(found, wanted)


def test_a_process_in_float64_is_loaded_where_it_can_be(x64, tmp_path, monkeypatch):
    process = gp.GaussianProcess(KERNEL_FN, X, Y, 0.1)
    process.save(tmp_path)
    wanted = process.posterior(X_TEST).mean
    with float64(False):
        found = gp.GaussianProcess.load(tmp_path, KERNEL_FN).posterior(X_TEST).mean
        assert found.dtype == np.float32
        # The test inputs too are of float64 there, and the result alone is rounded.
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
        monkeypatch.setattr(matrices, "SMALL", 19)  # too many
        with pytest.raises(ModelError, match="model in float64, and JAX is in float32"):
            gp.GaussianProcess.load(tmp_path, KERNEL_FN)


def test_a_regression_in_float64_is_not_loaded_in_float32(x64, saved):
    path, predicted = saved
    with float64(False):
        with pytest.raises(ModelError, match="model in float64, and JAX is in float32"):
            KernelRegression.load(path, KERNEL_FN)
        single = fit()
        assert single.coefficients_.dtype == np.float64
        single.save(path.parent / "single")
    found = KernelRegression.load(path.parent / "single", KERNEL_FN)  # as it was, in float32
    np.testing.assert_array_equal(found.predict(X_TEST), single.predict(X_TEST))
    assert 0 < np.abs(found.predict(X_TEST) - predicted).max() < 1e-3


def test_a_traced_process_is_not_saved(tmp_path):
    def value(noise):
        process = gp.GaussianProcess(KERNEL_FN, X, Y, noise)
        process.save(tmp_path / "traced")
        return process.log_marginal_likelihood()

    with pytest.raises(ArgumentError, match="the process is traced"):
        jax.grad(value)(0.1)
    assert not (tmp_path / "traced").exists()


def test_features_and_what_was_fitted_to_them(dtype, tmp_path):
    features = NystromFeatures(KERNEL_FN, X[:12].astype(dtype))
    model = FeatureRegression(features, 1e-3).fit(in_batches(X.astype(dtype), Y, 8))
    features.save(tmp_path / "features")
    model.save(tmp_path / "model")
    again = NystromFeatures.load(tmp_path / "features", KERNEL_FN)
    found = FeatureRegression.load(tmp_path / "model", again)
    x = X_TEST.astype(dtype)
    np.testing.assert_array_equal(found.predict(x), model.predict(x))
    assert (found.relative_noise, again.size) == (1e-3, features.size)
    with pytest.raises(ModelError, match="model of another kernel"):
        NystromFeatures.load(tmp_path / "features", explicit(1.6))
    with pytest.raises(ModelError, match=r"of other features: 12 of them, and not \(11,\)"):
        FeatureRegression.load(tmp_path / "model", NystromFeatures(KERNEL_FN, x_of(dtype, 11)))
    # The same kernel, by the same landmarks: their order makes other features.
    turned = NystromFeatures(KERNEL_FN, x_of(dtype, 12)[::-1])
    turned._projection = turned._projection[:, ::-1]
    with pytest.raises(ModelError, match="of other features: what it predicts"):
        FeatureRegression.load(tmp_path / "model", turned)
    with pytest.raises(ArgumentError, match="no weights yet"):
        FeatureRegression(features).save(tmp_path / "none")


def x_of(dtype, n):
    return X[:n].astype(dtype)


def test_another_kernel_is_refused(saved):
    path, predicted = saved
    with pytest.raises(ModelError, match="model of another kernel: get='ntk' of its inputs is"):
        KernelRegression.load(path, explicit(1.5001))
    with pytest.raises(ModelError, match=r"has shape \(8, 8\) in it, and \(8, 8, 3\) by kernel_fn"):
        KernelRegression.load(path, lambda x1, x2, get: jax.numpy.ones((8, 8, 3)))
    near = KernelRegression.load(path, explicit(1.500001))  # to rounding
    np.testing.assert_allclose(near.predict(X_TEST), predicted, atol=1e-3)
    fit(store_key={"W_std": 1.5}).save(path)
    with pytest.raises(ModelError, match=r'made of {"W_std": 1\.5}: get'):
        KernelRegression.load(path, explicit(1.6))


PROGRAM = """
import sys, numpy as np, nt_deq
from nt_deq import stax
kernel_fn = stax.serial(stax.Dense(1, 1.5, 0.2), stax.Erf(), stax.Dense(1))[2]
path, x, out = sys.argv[1:]
np.save(out, nt_deq.KernelRegression.load(path, kernel_fn).predict(np.load(x)))
"""


def test_another_process_predicts_the_same(saved, tmp_path):
    path, predicted = saved
    np.save(tmp_path / "x.npy", X_TEST)
    out = tmp_path / "out.npy"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, path, tmp_path / "x.npy", out],
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    np.testing.assert_array_equal(np.load(out), predicted)


KILLED = """
import os, pathlib, sys
from nt_deq import _saving
import numpy as np
left, replace = [int(sys.argv[2])], pathlib.Path.replace
def kill(self, target):
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    replace(self, target)
pathlib.Path.replace = kill
unlink = pathlib.Path.unlink
def kill_unlink(self, missing_ok=False):
    if left[0] == 0 and self.name.startswith("arrays"):
        os.kill(os.getpid(), 9)
    unlink(self, missing_ok)
pathlib.Path.unlink = kill_unlink
_saving.write(sys.argv[1], "New", {}, {"x": np.ones(3)})
"""


@pytest.mark.parametrize("renames", [0, 1, 2], ids=["arrays", "description", "removal"])
def test_a_killed_writer_leaves_the_old_model_or_the_new_one(renames, tmp_path):
    for path, first in ((tmp_path / "old", True), (tmp_path / "none", False)):
        if first:
            _saving.write(path, "Old", {}, {"x": np.zeros(3)})
        done = subprocess.run(
            [sys.executable, "-c", KILLED, path, str(renames)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        killed = done.returncode == -9
        assert killed == (first or renames < 2)  # the first one has nothing to remove
        if renames < 2 and not first:
            with pytest.raises(ModelError, match=r"holds no model: it has no model\.json"):
                _saving.read(path, "Old", "New")
        else:
            kind, value = ("Old", 0) if renames < 2 else ("New", 1)
            found = _saving.read(path, "Old", "New")
            assert found.kind == kind
            np.testing.assert_array_equal(found.arrays["x"], np.full(3, value))
        assert len(list(path.iterdir())) > 2 or not first
        _saving.write(path, "Next", {}, {})  # which takes away what was left
        assert _saving.read(path, "Next").arrays == {}
        assert len(list(path.iterdir())) == 2


def test_damage_is_told_by_name(saved):
    path, _ = saved
    (file,) = path.glob("arrays-*.npz")
    intact = file.read_bytes()
    for damaged in (
        bytes([*intact[:900], intact[900] ^ 1, *intact[901:]]),
        intact[: len(intact) // 2],
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"{file.name} is damaged: its checksum"):
            KernelRegression.load(path, KERNEL_FN)
    file.unlink()
    with pytest.raises(ModelError, match=rf"{file.name} cannot be read: .*No such file"):
        KernelRegression.load(path, KERNEL_FN)
    text = (path / "model.json").read_text()
    noise = str(described(path)["model"]["settings"]["fitted"]["noise"])
    (path / "model.json").write_text(text.replace(noise, "0.1"))
    with pytest.raises(ModelError, match=r"model\.json is damaged: its checksum"):
        KernelRegression.load(path, KERNEL_FN)
    (path / "model.json").write_text(text[:100])
    with pytest.raises(ModelError, match=r"model\.json is damaged, or not of nt_deq"):
        KernelRegression.load(path, KERNEL_FN)


def test_a_later_format_is_refused_and_an_earlier_one_is_read(saved):
    path, _ = saved
    content = described(path)
    (path / "model.json").write_text(json.dumps(content | {"format": _saving.FORMAT + 1}))
    with pytest.raises(ModelError, match=r"of format 2, written by a later nt_deq: .* up to 1"):
        KernelRegression.load(path, KERNEL_FN)
    with pytest.raises(ModelError, match="of format 2"):
        _saving.check_writable(path)
    (path / "model.json").write_text(json.dumps(content | {"format": "1"}))
    with pytest.raises(ModelError, match="damaged: its format is '1'"):
        KernelRegression.load(path, KERNEL_FN)
    # Written by version 0.1 and kept in the checkout: never to be written anew.
    model = KernelClassifier.load(FORMAT_1, KERNEL_FN)
    assert described(FORMAT_1)["format"] == 1
    assert model.predict(X_TEST).tolist() == ["high", "low", "high", "low"]


def test_what_is_of_something_else_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds something else \(such as 'notes.txt'\)"):
        fit().save(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for content in ("{}", "[1]", "not JSON"):
        (other / "model.json").write_text(content)
        with pytest.raises(ModelError, match="not of nt_deq"):
            fit().save(other)
        assert (other / "model.json").read_text() == content
    with pytest.raises(ModelError, match=r"cannot be written: .*File exists"):
        fit().save(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="holds no model: Not a directory"):
        KernelRegression.load(tmp_path / "notes.txt", KERNEL_FN)
    with pytest.raises(ModelError, match="holds no model: No such file"):
        KernelRegression.load(tmp_path / "nowhere", KERNEL_FN)
    with pytest.raises(ArgumentError, match="must name a directory of this machine"):
        fit().save("gs://bucket/model")
    with pytest.raises(ArgumentError, match="save needs a fit"):
        KernelRegression(KERNEL_FN).save(tmp_path / "unfitted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "other"]


def test_a_model_is_replaced_and_others_files_stay(saved):
    path, _ = saved
    (path / "README").write_text("mine")
    model = fit(y=Y[:, 0])
    model.save(path)
    again = KernelRegression.load(path, KERNEL_FN)
    np.testing.assert_array_equal(again.predict(X_TEST), model.predict(X_TEST))
    assert sorted(p.suffix for p in path.iterdir()) == ["", ".json", ".npz"]
    assert {"jax", "nt-deq", "numpy"} < described(path)["model"]["versions"].keys()


def test_nothing_is_written_where_it_cannot_be(saved, monkeypatch, tmp_path, unchecked):
    path, predicted = saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ModelError, match=r"cannot be written: .*No space left"):
        fit().save(path)
    monkeypatch.undo()
    found = KernelRegression.load(path, KERNEL_FN).predict(X_TEST)
    np.testing.assert_array_equal(found, predicted)
    assert len(list(path.iterdir())) == 2
    with pytest.raises(ArgumentError, match="settings of the model are not JSON"):
        fit(store_key={"kernel": KERNEL_FN}).save(tmp_path / "new")
    with pytest.raises(ArgumentError, match="classes is an array of objects"):
        fit(KernelClassifier, np.array([(1,), (2,)] * 10 + [None], object)[:20]).save(
            tmp_path / "n"
        )
    assert _files.is_unfinished(Path(".nt-deq-model.json.abc.part"))


def test_test_inputs_have_the_dtype_of_the_fit(x64):
    single, double = fit(x=X.astype(np.float32)), fit()
    rounded = X_TEST.astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        for model, same in (
            (single, (X_TEST, rounded)),
            (double, (rounded.astype(float), rounded)),
        ):
            first, second = (model.predict(x, return_std=True) for x in same)
            for a, b in zip(first, second, strict=True):
                np.testing.assert_array_equal(a, b)
    features = NystromFeatures(KERNEL_FN, X[:5].astype(np.float32))
    np.testing.assert_array_equal(features(X_TEST), features(rounded))
    with float64(False):
        assert single.predict(X_TEST).shape == (4, 2)
        with pytest.raises(ArgumentError, match="fit was in float64, and JAX is in float32"):
            double.predict(X_TEST)
