"""KernelRegression against neural-tangents, scikit-learn and itself, wherever the kernel is."""

# A model does not tell which solver it has.
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import neural_tangents as nt
import numpy as np
import pytest
import tensorstore
from jax.sharding import Mesh
from marks import slow_except
from sklearn.kernel_ridge import KernelRidge

import nt_deq
from nt_deq import KernelClassifier, KernelRegression, stax
from nt_deq._jax import enable_x64
from nt_deq.regression import (
    NotPositiveDefiniteError,
    StoreError,
    cg,
    cholesky,
    kernel_regression,
    layout,
    nystrom,
)
from nt_deq.regression.layout import Layout
from nt_deq.regression.matrix import InMemory, KernelTiles
from nt_deq.regression.nystrom import Nystrom
from nt_deq.regression.plan import make_plan

ROOT = Path(__file__).parents[2]
DEQ_KERNEL_FN = stax.serial(stax.DEQ(1, 0.7, b_std=0.2), stax.Dense(1))[2]


def explicit(W_std):  # compiles in less time
    return stax.serial(stax.Dense(1, W_std, 0.2), stax.Erf(), stax.Dense(1))[2]


KERNEL_FN = explicit(1.5)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(layout, "_SIDE", 48)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(140, 6))
    return x[:120], np.sin(x[:120, :2]), x[120:]


def fit(data, model=KernelRegression, **options):
    options = {"get": "ntk", "relative_noise": 1e-3, "progress": False, **options}
    return model(options.pop("kernel_fn", KERNEL_FN), **options).fit(*data[:2])


NETWORKS = pytest.mark.parametrize(
    ("kernel_fn", "get"),
    [
        pytest.param(KERNEL_FN, "ntk", marks=pytest.mark.smoke),
        pytest.param(DEQ_KERNEL_FN, "ntk", marks=pytest.mark.slow),
        pytest.param(DEQ_KERNEL_FN, "nngp", marks=pytest.mark.slow),
    ],
    ids=["explicit", "deq-ntk", "deq-nngp"],
)


def test_leave_one_out_is_the_prediction_without_it(data, monkeypatch, x64):
    monkeypatch.setattr(cholesky, "_COLUMNS", 7)
    x, y = data[0][:20], data[1][:20]
    found = fit((x, y), method="cholesky")
    wanted = nt_deq.gp.GaussianProcess(KERNEL_FN, x, y, found.noise_, "ntk").leave_one_out()
    np.testing.assert_allclose(found.leave_one_out(), wanted.mean, rtol=1e-8)
    rest = np.arange(20) != 3
    alone = nt_deq.gp.GaussianProcess(KERNEL_FN, x[rest], y[rest], found.noise_, "ntk").posterior(
        x[3:4]
    )
    np.testing.assert_allclose(found.leave_one_out()[3], alone.mean[0], rtol=1e-8)
    flat = fit((x, y[:, 0]), method="cholesky").leave_one_out()
    np.testing.assert_allclose(flat, wanted.mean[:, 0], rtol=1e-8)
    with pytest.raises(ValueError, match="method='cholesky'"):
        fit((x, y), method="cg").leave_one_out()


@NETWORKS
def test_it_is_the_prediction_of_neural_tangents(data, kernel_fn, get, x64):
    x, y, x_test = data
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, y, diag_reg=1e-3)
    mean, covariance = predict_fn(t=None, x_test=x_test, get=get, compute_cov=True)
    std = np.sqrt(np.diagonal(covariance))
    for options in (
        {"method": "cholesky"},
        {"method": "cg", "rank": 20, "relative_residual": 1e-11},
    ):
        found = fit(data, get=get, kernel_fn=kernel_fn, **options)
        found_mean, found_std = found.predict(x_test, return_std=True)
        # Refined: float32 tiles do not show. The condition number is about 1e4.
        np.testing.assert_allclose(found_mean, mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found_std, std, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@NETWORKS
def test_it_does_not_matter_where_the_kernel_is(data, kernel_fn, get, x64, tmp_path):
    network = {"kernel_fn": kernel_fn, "get": get}
    exact = fit(data, method="cholesky", **network).predict(data[2], return_std=True)
    for where in ({"keep": "memory"}, {"keep": "nothing"}, {"store": tmp_path / "k"}):
        found = fit(data, method="cg", rank=20, relative_residual=1e-11, **network, **where)
        mean, std = found.predict(data[2], return_std=True)
        np.testing.assert_allclose(mean, exact[0], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(std, exact[1], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_float32_is_as_exact_as_its_kernel(data):
    x, y, x_test = data
    kernel = np.asarray(KERNEL_FN(x, None, "ntk"), np.float64)
    ridge = 1e-3 * np.trace(kernel) / len(x)
    expected = KernelRidge(alpha=ridge, kernel="precomputed").fit(kernel, y)
    expected = expected.predict(np.asarray(KERNEL_FN(x_test, x, "ntk"), np.float64))
    for method in ("cholesky", "cg"):
        found = fit(data, method=method, relative_residual=1e-9)
        # Entries of float32 on both sides, in tiles on one: 1e-7 of K times ‖K⁻¹‖.
        np.testing.assert_allclose(found.predict(x_test), expected, atol=2e-4)
        assert found.noise_ == pytest.approx(ridge, rel=1e-5)


@pytest.mark.parametrize("keep", ["memory", "nothing"])
def test_the_residual_is_the_true_one(data, keep):
    found = fit(data, method="cg", rank=20, keep=keep, relative_residual=1e-9)
    kernel = np.asarray(found._kernel(next(found._kernel.layout.rounds())))  # a tile
    assert kernel.dtype == np.float32
    tiles = InMemory(found._kernel)
    side = found._kernel.layout.side
    whole = np.zeros((3 * side, 3 * side))
    for round_, tile in tiles.tiles():
        i, j = int(round_.rows[0]) * side, int(round_.columns[0]) * side
        whole[i : i + side, j : j + side] = tile[0]
        whole[j : j + side, i : i + side] = tile[0].T
    whole = whole[:120, :120] + found.noise_ * np.eye(120)
    residual = data[1] - whole @ found.coefficients_
    relative = np.linalg.norm(residual, axis=0) / np.linalg.norm(data[1], axis=0)
    assert relative.max() <= 1e-9
    assert relative.max() == pytest.approx(found.solution_.relative_residual, rel=1e-3)
    residuals = found.solution_.relative_residuals
    assert residuals[-1] < residuals[0]


@pytest.mark.slow
def test_landmarks_save_steps_and_approximate(data):
    plain = fit(data, method="cg", rank=1, relative_residual=1e-7).solution_.steps
    helped = fit(data, method="cg", rank=60, relative_residual=1e-7).solution_.steps
    assert helped < plain / 2
    tiles = KernelTiles(KERNEL_FN, "nngp", Layout(120), data[0].astype(np.float32))
    kernel = np.asarray(KERNEL_FN(data[0], None, "nngp"))
    values = np.linalg.eigvalsh(kernel)[::-1]
    for rank in (10, 60):
        factor = rows_of(Nystrom(tiles, rank, 0.0))[:, :120]
        left = np.trace(kernel - factor.T @ factor)
        assert values[rank:].sum() * 0.99 < left < 3 * values[rank // 2 :].sum()


def test_the_preconditioner_is_right_where_the_kernel_is_largest(data):
    """One eigenvalue of 6000, and δ = 2e-4: products in float32 alone would be off 80-fold."""
    x = np.tile(data[0], (50, 1)).astype(np.float32)

    def kernel_fn(x1, x2, get):
        return 1 + 1e-3 * x1 @ (x1 if x2 is None else x2).T

    layout = Layout(len(x))
    precondition = Nystrom(KernelTiles(kernel_fn, "nngp", layout, x), 4, 1e-6)
    factor, delta = rows_of(precondition)[:, : len(x)], float(precondition.approximation.delta)
    inner = factor @ factor.T + delta * np.eye(4)
    v = factor[:1].T
    exact = (v - factor.T @ np.linalg.solve(inner, factor @ v)) / delta
    found = layout.gather(precondition(layout.vector(v)))[: len(x)]
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("classes", [np.array([3, 7]), np.array(["cat", "dog"]), np.arange(2) > 0])
def test_a_classifier_regresses_centred_targets(data, classes):
    labels = classes[(data[0][:, 0] > 0).astype(int)]
    found = fit((data[0], labels), KernelClassifier, method="cholesky")
    np.testing.assert_array_equal(found.classes_, classes)
    centred = np.where(labels[:, None] == classes, 0.5, -0.5)
    direct = fit((data[0], centred), method="cholesky")
    scores, std = found.decision_function(data[2], return_std=True)
    np.testing.assert_allclose(scores, direct.predict(data[2]), atol=1e-6)
    np.testing.assert_allclose(std, direct.predict(data[2], return_std=True)[1], rtol=1e-4)
    np.testing.assert_array_equal(found.predict(data[2]), classes[scores.argmax(axis=1)])
    np.testing.assert_allclose(found.leave_one_out(), direct.leave_one_out(), atol=1e-6)


def test_integers_are_numbers_to_a_regression(data):
    y = np.arange(120)
    found = fit((data[0], y)).predict(data[2])
    np.testing.assert_allclose(found, fit((data[0], y.astype(float))).predict(data[2]))
    assert found.shape == (20,)


@pytest.mark.usefixtures("unchecked")
def test_labels_that_cannot_be_right(data):
    x, y, _ = data
    for labels, message in (
        (y, r"y has shape \(120, 2\): 120 inputs need labels \(120,\)"),
        (np.where(y[:, 0] > 0, np.nan, 1.0), "y has NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            fit((x, labels), KernelClassifier)


def rows_of(preconditioner):
    """`F (rank, rows)`, of one device."""
    blocks = preconditioner.approximation.blocks
    return np.concatenate([np.asarray(block, np.float64)[0] for block in blocks])


@pytest.mark.parametrize("d", [1, 2])
def test_inputs_of_few_dimensions_have_fewer_landmarks_than_asked_for(d):
    """The kernel of inputs on a line or a plane has a few eigenvalues above rounding in float32."""
    x = np.random.default_rng(0).normal(size=(120, d)).astype(np.float32)
    y = np.sin(x[:, 0])
    found = fit((x, y), method="cg", rank=100, relative_residual=1e-7)
    assert found._solver.precondition.rank < 100
    direct = fit((x, y), method="cholesky")
    np.testing.assert_allclose(found.predict(x[:9]), direct.predict(x[:9]), atol=1e-3)


def test_as_many_landmarks_as_asked_for(data, monkeypatch):
    monkeypatch.setattr(nystrom, "_BLOCK", 20)
    assert fit(data, method="cg", rank=31)._solver.precondition.rank == 31


@pytest.mark.parametrize(
    ("n", "categories", "noise"),
    [
        pytest.param(2400, (3, 4, 5), 1e-4, marks=pytest.mark.slow),
        (500, (2,) * 6, 1e-6),
        pytest.param(8400, (20,), 1e-4, marks=pytest.mark.slow),
    ],
)
def test_inputs_that_are_there_many_times(n, categories, noise, monkeypatch):
    """The same as one input for each of them, with its mean target and so many times less noise."""
    monkeypatch.setattr(layout, "_SIDE", 2048)
    rng = np.random.default_rng(0)
    columns = [np.eye(count, dtype=np.float32)[rng.integers(count, size=n)] for count in categories]
    x, y = np.concatenate(columns, axis=1), rng.normal(size=n)
    model = fit((x, y), kernel_fn=DEQ_KERNEL_FN, method="cg", get="nngp", relative_noise=noise)

    distinct, which, counts = np.unique(x, axis=0, return_inverse=True, return_counts=True)
    kernel = np.asarray(DEQ_KERNEL_FN(distinct, None, "nngp"), np.float64)
    means = np.bincount(which.ravel(), y) / counts
    expected = kernel @ np.linalg.solve(kernel + np.diag(model.noise_ / counts), means)
    assert len(model.solution_.relative_residuals) < 60
    # The residual of one input is at most that of all, and that of a mean less than that.
    atol = model.relative_residual * np.linalg.norm(y) / np.sqrt(counts.min())
    np.testing.assert_allclose(model.predict(distinct), expected, rtol=0, atol=atol)


def test_landmarks_go_on_where_some_are_there_twice(data):
    x = np.repeat(data[0], 3, axis=0).astype(np.float32)
    kernel = KernelTiles(KERNEL_FN, "ntk", Layout(len(x)), x)
    assert Nystrom(kernel, 120, 1e-3).rank == 120


def test_a_fit_that_fails_leaves_none(data):
    found = fit(data, method="cholesky")
    found.kernel_fn = stax.DEQ(1, 1.5)[2]
    with pytest.raises(nt_deq.NoEquilibriumError):
        found.fit(data[0], data[1][:, :1])
    with pytest.raises(ValueError, match="call fit"):
        found.predict(data[2])
    assert not hasattr(found, "plan_")
    found.kernel_fn = KERNEL_FN
    assert found.fit(data[0], data[1][:, 0]).predict(data[2]).shape == (20,)


def counted(monkeypatch):
    """The calls that compute tiles, as `(get, rows, columns)`."""
    computed, call = [], KernelTiles.__call__

    def counting(self, round_):
        computed.append((self.get, *round_.rows.tolist(), *round_.columns.tolist()))
        return call(self, round_)

    monkeypatch.setattr(KernelTiles, "__call__", counting)
    return computed


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_every_tile_is_computed_once(data, monkeypatch, method):
    monkeypatch.setattr(kernel_regression, "_TEST_STD", 4)
    computed = counted(monkeypatch)
    found = fit(data, method=method, rank=60)
    assert len(computed) == len(set(computed)) == 6
    found.predict(data[2], return_std=True)  # five batches, with the NNGP kernel beside the NTK
    found.predict(data[2], return_std=True)
    assert len(computed) == len(set(computed)) == 12


def test_a_program_is_compiled_for_few_numbers_of_inputs(data):
    found = fit(data)
    traced = []

    def kernel_fn(x1, x2, get):
        traced.append(len(x1))
        return KERNEL_FN(x1, x2, get)

    found = fit(data, kernel_fn=kernel_fn)
    found.predict(data[2])
    traced.clear()
    whole = found.predict(data[2])
    for m in range(1, 20):
        np.testing.assert_allclose(found.predict(data[2][:m]), whole[:m], rtol=1e-5, atol=1e-6)
    assert traced == []


@pytest.mark.parametrize(
    ("get", "method"),
    slow_except(
        [("nngp", "cholesky"), ("ntk", "cg")],
        [("nngp", "cholesky"), ("ntk", "cholesky"), ("nngp", "cg"), ("ntk", "cg")],
    ),
)
def test_deviations_are_at_least_what_rounding_leaves(data, get, method):
    """At training inputs with hardly any noise, where float32 knows nothing of the variance."""
    network = {"kernel_fn": DEQ_KERNEL_FN, "get": get, "relative_noise": 1e-7}
    options = {"relative_residual": 1e-5, "rank": 60} if method == "cg" else {}
    found = fit(data, method=method, **network, **options).predict(data[0], return_std=True)[1]
    with enable_x64(True):
        exact = fit(data, method="cholesky", **network).predict(data[0], return_std=True)[1]
    assert (found > exact / 1.5).all()
    assert found.max() < 0.1


@pytest.mark.slow
def test_images_and_any_network():
    rng = np.random.default_rng(0)
    images, y = rng.normal(size=(30, 4, 4, 1)), rng.normal(size=30)
    kernel_fn = stax.serial(stax.Conv(1, (3, 3)), stax.Relu(), stax.Flatten(), stax.Dense(1))[2]
    options = dict(kernel_fn=kernel_fn, get="nngp", relative_noise=1e-2)
    found = fit((images, y), method="cg", relative_residual=1e-8, **options).predict(images[:5])
    np.testing.assert_allclose(
        found, fit((images, y), method="cholesky", **options).predict(images[:5]), atol=1e-4
    )


def test_what_cannot_be_positive_definite_or_converge(data, monkeypatch):
    twice = np.concatenate([data[0][:20]] * 2), data[1][:40]  # no function takes both values
    with pytest.raises(NotPositiveDefiniteError, match="larger relative_noise"):
        fit(twice, method="cholesky", relative_noise=0.0)
    with pytest.raises(
        (NotPositiveDefiniteError, nt_deq.NotConvergedError), match="relative_noise"
    ):
        fit(twice, method="cg", relative_noise=0.0, rank=5, relative_residual=1e-9)
    with pytest.raises(nt_deq.NoEquilibriumError, match=r"W_std=1\.5"):
        fit(data, kernel_fn=stax.DEQ(1, 1.5)[2])
    monkeypatch.setattr(cg, "_MAX_STEPS", 3)
    with pytest.raises(nt_deq.NotConvergedError, match="larger rank"):
        fit(data, method="cg", rank=1, relative_residual=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"get": "cov"}, "get='cov'"),
        ({"method": "lu"}, "method='lu'"),
        ({"relative_noise": -1.0}, "relative_noise=-1"),
        ({"relative_residual": 0.0}, "relative_residual=0"),
        ({"rank": 0}, "rank=0"),
        ({"store": "here", "keep": "memory"}, "leave out"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_cannot_be_right(options, message):
    with pytest.raises(ValueError, match=message):
        KernelRegression(KERNEL_FN, **options)


@pytest.mark.usefixtures("unchecked")
def test_data_that_cannot_be_right(data):
    x, y, _ = data
    for bad, message in (
        ((x, y[:-1]), "120 inputs need targets"),
        ((np.where(x > 2, np.nan, x), y), "NaN or infinite"),
        ((x, np.where(y > 0, np.inf, y)), "y has NaN"),
        ((x[0], y), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(bad)
    with pytest.raises(ValueError, match="call fit"):
        KernelRegression(KERNEL_FN).predict(x)
    with pytest.raises(ValueError, match="fit was to"):
        fit(data).predict(x[:, :3])


def test_the_plan_is_made_before_any_work(data):
    def kernel_fn(*args, **kwargs):
        raise AssertionError("work was done")

    with pytest.raises(MemoryError, match="store=directory"):
        fit(data, kernel_fn=kernel_fn, method="cg", keep="memory", memory=1e6)
    with pytest.raises(MemoryError, match="method='cg'"):
        fit(data, kernel_fn=kernel_fn, method="cholesky", memory=1e6)


def test_the_plan_at_full_size(monkeypatch):
    monkeypatch.setattr(layout, "_SIDE", 2048)
    grid = Layout(60_000)
    assert (grid.side, grid.tiles, grid.rows) == (2000, 30, 60_000)
    common = dict(method="auto", rank=None, outputs=10, inputs_bytes=188e6)
    plenty = make_plan(grid, keep="auto", memory=20e9, **common)
    assert (plenty.method, plenty.keep) == ("cg", "memory")
    assert 7.4e9 < plenty.memory < 10e9
    assert plenty.device_memory == 0  # a CPU's is the host's
    little = make_plan(grid, keep="auto", memory=2e9, **common)
    assert little.keep == "nothing"
    assert little.memory <= 2e9
    stored = make_plan(grid, keep="store", memory=3e9, **common)
    assert stored.disk == pytest.approx(7.44e9)
    assert make_plan(Layout(3000), keep="auto", memory=20e9, **common).method == "cholesky"
    assert "landmarks" in str(little)


@pytest.mark.smoke
def test_a_store_is_a_zarr_array(data, tmp_path):
    found = fit(data, store=tmp_path / "k", get="nngp")
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": f"file://{tmp_path / 'k'}/"}, read=True
    ).result()
    kernel = array.read().result()
    assert array.shape == (120, 120)
    expected = np.asarray(KERNEL_FN(data[0], None, "nngp"))
    lower = np.tril_indices(120)
    np.testing.assert_allclose(kernel[lower], expected[lower], rtol=1e-5, atol=1e-5)
    assert np.isnan(kernel[0, -1])
    description = json.loads((tmp_path / "k" / "zarr.json").read_text())["attributes"]["nt_deq"]
    assert description["get"] == "nngp"
    assert description["shape"] == [120, 6]
    assert found.plan_.keep == "store"


def tiles(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("c/*/*") if p.is_file()}


def test_a_store_goes_on_and_does_not_trust_a_damaged_tile(data, tmp_path, monkeypatch):
    whole = fit(data, store=tmp_path / "k")
    before = tiles(tmp_path / "k")
    assert len(before) == 6
    names = sorted(before)
    (tmp_path / "k" / names[0]).unlink()
    torn = bytearray(before[names[1]])
    torn[100] ^= 1
    (tmp_path / "k" / names[1]).write_bytes(torn)
    (tmp_path / "k" / names[2]).write_bytes(before[names[2]][:50])
    computed = []
    call = KernelTiles.__call__
    monkeypatch.setattr(
        KernelTiles, "__call__", lambda self, r: computed.append(r) or call(self, r)
    )
    again = fit(data, store=tmp_path / "k")
    assert tiles(tmp_path / "k") == before
    assert len(computed) == 3
    np.testing.assert_array_equal(again.coefficients_, whole.coefficients_)


def test_damaged_tiles_at_the_edge_are_computed_anew(data, tmp_path):
    data = data[0][:110], data[1][:110]  # the last tiles have 14 rows of 48
    whole = fit(data, store=tmp_path / "k")
    before = tiles(tmp_path / "k")
    for name, content in before.items():
        (tmp_path / "k" / name).write_bytes(content[:50])
    again = fit(data, store=tmp_path / "k")
    assert tiles(tmp_path / "k") == before
    np.testing.assert_array_equal(again.coefficients_, whole.coefficients_)


def test_a_store_of_another_kernel_says_in_which_setting(data, tmp_path):
    store, key = tmp_path / "k", {"W_std": 1.5, "b_std": 0.2}
    fit(data, store=store, store_key=key)
    other = {"kernel_fn": explicit(1.6), "store_key": {**key, "W_std": 1.6}}
    with pytest.raises(StoreError, match=r"another kernel \(W_std: 1.5 there, 1.6 here\):"):
        fit(data, store=store, **other)
    with pytest.raises(StoreError, match=r"\(W_std: 1.5 there, 1.6 here; shape: "):
        fit((data[0][:100], data[1][:100]), store=store, **other)


def test_a_store_key_tells_kernels_apart_that_agree_where_they_are_looked_at(data, tmp_path):
    store = tmp_path / "k"
    fit(data, store=store, store_key={"version": 1})
    with pytest.raises(StoreError, match="version: 1 there, 2 here"):
        fit(data, store=store, store_key={"version": 2})
    with pytest.raises(StoreError, match="version: 1 there, null here"):
        fit(data, store=store)


def test_a_store_is_gone_on_with_where_rounding_is_another(data, tmp_path):
    """As that of another CPU, or of another version of XLA."""
    store, x = tmp_path / "k", data[0].astype(np.float32)
    fit((x, data[1]), store=store)
    before = tiles(store)

    def kernel_fn(x1, x2, get):
        return KERNEL_FN(x1, x2, get) * (1 + 3e-7)

    fit((np.nextafter(x, np.float32(9)), data[1]), store=store, kernel_fn=kernel_fn)
    assert tiles(store) == before


def test_a_store_of_something_else_is_refused(data, tmp_path):
    fit(data, store=tmp_path / "k")
    before = tiles(tmp_path / "k")
    with pytest.raises(StoreError, match=r"another kernel .*kernel:"):
        fit(data, store=tmp_path / "k", kernel_fn=explicit(1.501))
    with pytest.raises(StoreError, match=r"\(other values in 1[0-9]+ rows of x "):
        fit((data[0][::-1], data[1]), store=tmp_path / "k")
    with pytest.raises(StoreError, match=r"\(shape: \[120, 6\] there, \[100, 6\] here\)"):
        fit((data[0][:100], data[1][:100]), store=tmp_path / "k")
    moved = np.where(np.arange(120)[:, None] == 7, 1.001 * data[0], data[0])
    with pytest.raises(StoreError, match=r"\(other values in row 7 of x\)"):
        fit((moved, data[1]), store=tmp_path / "k")
    with pytest.raises(StoreError, match="get:"):
        fit(data, store=tmp_path / "k", get="nngp")
    assert tiles(tmp_path / "k") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("everything")
    with pytest.raises(StoreError, match="something else"):
        fit(data, store=tmp_path / "mine")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"attributes": []}', '{"attributes": {"nt_deq": 1}}',
     '{"attributes": {"nt_deq": {"key": {}}}}', '{"zarr_format": 3, "node_type": "group"}'],
)  # fmt: skip
def test_a_store_with_another_zarr_json_is_refused(content, data, tmp_path):
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match=r"files of something else \(such as 'zarr.json'\)"):
        fit(data, store=tmp_path)
    assert (tmp_path / "zarr.json").read_text() == content


def test_a_full_disk_keeps_what_is_there(data, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    fit(data, store=tmp_path / "k")
    before = tiles(tmp_path / "k")
    last = sorted(before)[-1]
    (tmp_path / "k" / last).unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # SIGXFSZ is ignored by Python
    try:
        with pytest.raises(StoreError, match="could not be written"):
            fit(data, store=tmp_path / "k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert tiles(tmp_path / "k").items() <= before.items()
    fit(data, store=tmp_path / "k")
    assert tiles(tmp_path / "k") == before


def run(*args, devices=1, **environment):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "regression" / "mesh_process.py"), *map(str, args)],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def output(process, timeout=300):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    code, out = output(run("store", tmp_path / "whole", tmp_path / "whole.npy"))
    assert code == 0, out
    code, out = output(run("killed", tmp_path / "killed", tmp_path / "killed.npy"))
    assert code == -9, out
    assert 0 < len(tiles(tmp_path / "killed")) < len(tiles(tmp_path / "whole"))
    code, out = output(run("store", tmp_path / "killed", tmp_path / "killed.npy"))
    assert code == 0, out
    assert tiles(tmp_path / "killed") == tiles(tmp_path / "whole")
    np.testing.assert_array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))


@pytest.mark.slow
def test_eight_devices_are_one(tmp_path):
    for devices in (1, 8):
        code, out = output(run("mesh", tmp_path / f"{devices}.npy", devices=devices))
        assert code == 0, out
    one, eight = (np.load(tmp_path / f"{devices}.npy") for devices in (1, 8))
    np.testing.assert_allclose(eight, one, atol=1e-5)  # the landmarks are others, tol is 1e-7


@pytest.mark.slow
def test_what_a_step_sends_is_what_its_programs_send():
    code, out = output(run("communication", devices=8))
    assert code == 0, out
    planned, counted = map(float, out.split())
    assert planned == counted > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_are_one_and_a_lost_one_is_reported(count, tmp_path):
    code, out = output(run("mesh", tmp_path / "one.npy"))
    assert code == 0, out

    def all_of(task, port, *args):
        return [
            output(process) for process in [run(task, i, count, port, *args) for i in range(count)]
        ]

    port = 20_000 + os.getpid() % 20_000
    lost = all_of("lost", port, tmp_path / "k", tmp_path / "lost.npy")
    assert lost[-1][0] == -9
    for code, out in lost[:-1]:
        assert code != 0
        assert "lost contact" in out or "distributed service detected fatal errors" in out, out
    kept = tiles(tmp_path / "k")
    again = all_of("processes", port + 1, tmp_path / "k", tmp_path / "all.npy")
    assert [code for code, _ in again] == [0] * count, again
    after = tiles(tmp_path / "k")
    assert kept.items() <= after.items()
    np.testing.assert_allclose(
        np.load(tmp_path / "all.npy"), np.load(tmp_path / "one.npy"), atol=1e-5
    )


@pytest.mark.slow
def test_a_fit_on_local_devices_does_not_wait_for_other_processes(tmp_path):
    port = 40_000 + os.getpid() % 20_000
    processes = [run("local", i, 2, port, tmp_path / "k", tmp_path / "found.npy") for i in range(2)]
    found = [output(process) for process in processes]
    assert [code for code, _ in found] == [0, 0], found
    assert (tmp_path / "found.npy").exists()


def test_a_mesh_of_one_device(data):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    np.testing.assert_array_equal(
        fit(data, method="cg", mesh=mesh).predict(data[2]), fit(data, method="cg").predict(data[2])
    )


def test_what_takes_a_moment_is_silent(data, capsys, monkeypatch):
    monkeypatch.setattr(kernel_regression, "_FEW", 0)
    monkeypatch.setattr(kernel_regression, "QUIET", 60.0)  # on a busy machine too
    fit(data, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(kernel_regression, "QUIET", 0.0)
    fit(data, progress=True)
    assert "120 inputs by" in capsys.readouterr().err
