"""The protocol of Arora et al., its kernel, and the launcher on a small file of the same layout."""

import csv
import json
import os
from typing import Any

import numpy as np
import pytest
from launching import launch
from marks import slow_except
from sklearn.svm import SVC

from nt_deq import enable_x64, nt, stax
from experiments.claims import uci, uci_methods
from experiments.claims.uci_methods import METHODS, Method
from experiments.lib import kernels
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

UCI = os.environ.get("NT_DEQ_UCI")


@pytest.fixture
def uci_report():
    pytest.importorskip("scikit_posthocs")
    from experiments.claims import uci_report

    return uci_report


def table(n=40, classes=3, seed=0):
    """Two features, of which the first tells the classes apart but for some noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, 2)) + np.stack([1.5 * y, 0 * y], 1)
    validation = rng.permutation(n) < n // 2
    test = np.stack([rng.permutation(n) < n // 4 for _ in range(uci.SPLITS)])
    return uci.Table(f"table-{n}", (x - x.mean(0)) / x.std(0), y, validation, test)


@pytest.fixture
def data_file(tmp_path):
    arrays = {}
    for of in (table(40), table(30, 2, 1), table(36, 3, 2)):
        for kind, array in zip(uci.LAYOUT, (of.x, of.y, of.validation, of.test), strict=True):
            arrays[f"{of.name}/{kind}"] = array
    np.savez(tmp_path / "tables.npz", **arrays)
    return tmp_path / "tables.npz"


@pytest.fixture
def small(monkeypatch):
    """Less to choose from; infinitely deep kernels have tests of their own."""
    few = uci_methods.support_vectors(uci_methods.explicit_ntk, METHODS["NTK"].shapes[:3])
    for name in ("NTK", "DEQ-NTK", "DEQ-NNGP", "ODE-NTK"):
        monkeypatch.setitem(METHODS, name, few)
    rbf = uci_methods.support_vectors(uci_methods.rbf_kernel, [{"gamma": 0.1}, {"gamma": 10.0}])
    monkeypatch.setitem(METHODS, "RBF", rbf)
    monkeypatch.setattr(uci_methods, "TREES", 5)


@pytest.mark.parametrize(("depth", "fixed"), [(1, 0), (2, 1), (4, 0), (4, 2), (5, 4)])
def test_the_explicit_kernel_is_that_of_neural_tangents(depth, fixed):
    x = np.random.default_rng(0).standard_normal((6, 3))
    dense, relu = nt.stax.Dense(1), nt.stax.Relu()
    layers: Any = [dense, *[relu, dense] * (depth - 1)]
    with enable_x64(True):
        kernel: Any = nt.stax.serial(*layers[: 2 * fixed + 1])[2](x, None)
        if fixed:  # the network so far is given, and its last layer the first that is trained
            below: Any = nt.stax.serial(*layers[: 2 * fixed])[2](x, None)
            kernel = dense[2](below.replace(ntk=0 * below.ntk))
        if rest := layers[2 * fixed + 1 :]:
            kernel = nt.stax.serial(*rest)[2](kernel)
        wanted = np.asarray(kernel.ntk)
    # The arc cosine of neural-tangents loses half of the digits where an input meets itself.
    found = uci_methods.explicit_ntk(x, depth, fixed)
    np.testing.assert_allclose(found, 3 * wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_a_deep_kernel_is_as_large_as_an_explicit_one(get):
    x = np.random.default_rng(0).standard_normal((5, 3))
    nngp, ntk = Architecture(0.9, 1.0, 0.0, "relu").kernels(x)
    found = uci_methods.deq(x, get, W_std=0.9, b_std=0.0)
    np.testing.assert_allclose(found, 3 * (ntk if get == "ntk" else nngp), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", slow_except([{}], [{}, {"leak": 1.0, "inject_always": True}]))
def test_the_series_of_the_neural_ode(options):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    x[5] = -2 * x[4]
    cell = stax.serial(stax.Relu(), stax.Dense(1, 1.0))
    ode = stax.NeuralODE(cell, stax.Dense(1), T=2.0, **options)
    wanted = stax.serial(ode, stax.Relu(), stax.Dense(1))[2](x, None, "ntk")
    found = uci_methods.ode(x.astype(np.float64), T=2.0, **options)
    largest = np.diag(found).max()
    np.testing.assert_allclose(found / 3, wanted, rtol=0, atol=2e-5 * largest / 3)


def test_what_there_is_to_choose_from():
    shapes = {name: len(method.shapes) for name, method in METHODS.items()}
    assert shapes["NTK"] == shapes["DEQ-NTK"] == shapes["DEQ-NNGP"] == shapes["ODE-NTK"] == 15
    for name, method in METHODS.items():
        assert len({str(shape) for shape in method.shapes}) == shapes[name]
    assert METHODS["NTK"].costs == (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


def test_machines_are_those_of_scikit_learn():
    of = table()
    gram = of.x @ of.x.T + np.eye(len(of.y))  # separable: the larger costs change nothing
    train, test = ~of.test[0], of.test[0]
    costs = (1e-3, 0.1, 1.0, 30.0, 1e3, 1e5)
    found = kernels.svm_accuracies(gram, of.y, train, test, costs)
    wanted, bounded = [], []
    for cost in costs:
        machine = SVC(kernel="precomputed", C=cost).fit(gram[np.ix_(train, train)], of.y[train])
        wanted.append(machine.score(gram[np.ix_(test, train)], of.y[test]))
        bounded.append(np.abs(machine.dual_coef_).max() == cost)
    assert found == wanted
    assert bounded[0]
    assert not any(bounded[-2:])
    assert len(set(found)) > 2
    one = np.flatnonzero(of.y == 1)
    rest = np.flatnonzero(of.test[0])
    alone = kernels.svm_accuracies(gram, of.y, one, rest, (1.0, 2.0))
    assert alone == [np.mean(of.y[rest] == 1)] * 2


def test_how_hyper_parameters_are_chosen():
    of, calls = table(), []
    # Two shapes of two costs. As published the first of the two best is taken, which is 1; inside,
    # each split takes what is best on its own rows.
    inside = [3, 0, 2, 1]

    def prepare(x, y):
        def accuracies(shape, costs, train, test):
            assert not (train & test).any()
            calls.append((shape, costs, train, test))
            if len(costs) == 1:
                return [0.1 * (2 * shape + costs[0]) + 0.01 * train[of.test[0]].sum()]
            if (train | test).all():
                return [[0.5, 0.9], [0.9, 0.2]][shape]
            (split,) = [s for s in range(4) if ((train | test) == ~of.test[s]).all()]
            return [float(2 * shape + cost == inside[split]) for cost in costs]

        return accuracies

    found = uci.measure(Method([{}, {}], (0, 1), prepare), of)
    assert found["chosen"].tolist() == [[1] * 4, inside]
    overlap = [(of.test[0] & ~of.test[s]).sum() for s in range(4)]
    wanted = 0.1 * found["chosen"] + 0.01 * np.array(overlap)
    np.testing.assert_allclose(found["accuracy"], wanted)
    for _, costs, train, test in calls:
        if len(costs) == 1:
            assert (train ^ test).all()
            assert any((test == rows).all() for rows in of.test)
        else:
            assert not train[of.validation].any()
            assert of.validation[test].all()


def test_inside_nothing_is_chosen_by_test_rows(small):
    of = table()
    labels = of.y.copy()
    labels[of.test[2]] = (labels[of.test[2]] + 1) % 3
    other = uci.Table(of.name, of.x, labels, of.validation, of.test)
    before, after = (uci.measure(METHODS["RBF"], each) for each in (of, other))
    assert before["chosen"][1, 2] == after["chosen"][1, 2]
    assert after["accuracy"][1, 2] <= 1 - before["accuracy"][1, 2]


def test_the_launcher(small, uci_report, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(uci_report, "COUNT", 3)
    monkeypatch.setattr(uci, "REPORT_EVERY", 0.0)
    settings = uci.Settings(data_file=str(data_file))
    calls = []

    def counted(method, of, measure=uci.measure):
        if len(calls) == 14:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(of.name)
        return measure(method, of)

    monkeypatch.setattr(uci, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        launch(uci, settings, tmp_path / "out")
    # What was finished is reported: two data sets are, and the third is not.
    assert list(json.loads((tmp_path / "out/results.json").read_text())["sizes"]) == [
        "table-30", "table-36",
    ]  # fmt: skip
    monkeypatch.setattr(uci, "REPORT_EVERY", 300.0)
    numbers = launch(uci, settings, tmp_path / "out")
    assert calls == [*["table-30"] * 6, *["table-36"] * 6, *["table-40"] * 2, "killed",
                     *["table-40"] * 4]  # fmt: skip
    assert numbers["sizes"]["table-36"] == [36, 2, 3]
    assert len(numbers["claims"]) == 3 + 2 * 5
    page = (tmp_path / "out/report.md").read_text()
    assert "3 of the 3 data sets of at most 250 rows are finished." in page
    with open(tmp_path / "out/results.csv", newline="") as stream:
        rows = {row["data set"]: row for row in csv.DictReader(stream)}
    for name, of in numbers["measured"].items():
        for method, measured in of.items():
            shown = [float(rows[name][f"{method}, {way}"]) for way in uci_report.WAYS]
            np.testing.assert_allclose(shown, np.mean(measured["accuracy"], 1), atol=1e-6)
    measured = [of["NTK"]["accuracy"][0] for of in numbers["measured"].values()]
    mean = numbers["summary"]["as published"]["NTK"]["mean_accuracy"]
    assert mean == pytest.approx(np.mean(measured))
    assert f"Ours is {mean:.2%}" in numbers["claims"][0]["measured"]


def test_fewer_methods_and_data_sets(small, uci_report, data_file, tmp_path):
    settings = uci.Settings(
        data_file=str(data_file), methods="RBF,NTK", datasets="table-40,table-30"
    )
    numbers = launch(uci, settings, tmp_path / "out")
    assert list(numbers["sizes"]) == ["table-30", "table-40"]
    assert list(numbers["summary"]["chosen inside"]) == ["RBF", "NTK"]
    assert numbers["claims"] == []


def test_errors(data_file, tmp_path):
    with pytest.raises(InputError, match="--data_file is missing"):
        uci.main(uci.Settings(), Workdir(tmp_path / "out"))
    with pytest.raises(InputError, match="'SVM' is unknown: use some of NTK,DEQ-NTK"):
        uci.Settings(methods="NTK,SVM")
    with pytest.raises(InputError, match="--methods=NTK must be at least 2 different"):
        uci.Settings(methods="NTK")
    with pytest.raises(InputError, match="--max_n=30: 1 data sets have so few rows"):
        uci.load(str(data_file), 30, None)
    with pytest.raises(InputError, match=r"'iris' is not in .*, which has table-40, table-30"):
        uci.load(str(data_file), 50, "iris,table-40")
    with pytest.raises(InputError, match=r"--max_n=39 is too small for .* 'table-40' has 40 rows"):
        uci.load(str(data_file), 39, "table-30,table-40")
    with pytest.raises(InputError, match=r"nowhere\.npz cannot be read"):
        uci.load(str(tmp_path / "nowhere.npz"), 50, None)
    with np.load(data_file) as file:
        arrays = dict(file)

    def wrong(**changed):
        names = {f"table-40/{kind}": array for kind, array in changed.items()}
        left = {k: v for k, v in (arrays | names).items() if v is not None}
        np.savez(tmp_path / "wrong.npz", **left)
        return uci.load(str(tmp_path / "wrong.npz"), 50, None)

    with pytest.raises(InputError, match="no array table-40/test, which it must have"):
        wrong(test=None)
    with pytest.raises(InputError, match=r"40/test has shape \(3, 40\) .* must be bool \(4, n\)"):
        wrong(test=arrays["table-40/test"][:3])
    with pytest.raises(InputError, match=r"40/y has shape \(40,\) and dtype float64; it must be i"):
        wrong(y=arrays["table-40/y"] + 0.5)
    with pytest.raises(InputError, match=r"table-40/X has .*must be finite numbers \(n, d\)"):
        wrong(X=arrays["table-40/X"] * np.nan)
    with pytest.raises(InputError, match="table-40 has a split without test rows, or one outside"):
        wrong(test=arrays["table-40/test"] | arrays["table-40/validation"])
    with pytest.raises(InputError, match="table-40 has a split without test rows, or one outside"):
        wrong(test=np.zeros((4, 40), bool))


@pytest.mark.skipif(UCI is None, reason="NT_DEQ_UCI does not name a file of the 90 data sets")
def test_the_published_data_sets():
    tables = uci.load(UCI, 5000, None)
    assert len(tables) == 90
    assert sum(len(of.y) for of in tables) == 86_838
    (iris,) = [of for of in tables if of.name == "iris"]
    assert iris.size == {"rows": 150, "features": 4, "classes": 3}
    found = uci.measure(METHODS["NTK"], iris)["accuracy"]
    np.testing.assert_allclose(found.mean(1), 36 / 37, rtol=1e-12)
