"""The comparison of finite and infinite width: its numbers and files, and the training beneath."""

import dataclasses

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from launching import launch, part
from sklearn.datasets import load_diabetes, load_wine

from experiments.claims import compare
from experiments.claims.compare import Settings
from experiments.lib import infinite, training
from experiments.lib.data import load
from experiments.lib.networks import Architecture, draw
from experiments.lib.training import TrainingError
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

TINY = Settings(n_train=16, n_test=20, widths=(16, 32), seeds=3, steps=4)
RELU = Architecture(W_std=0.6, U_std=1.0, b_std=0.0, activation="relu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    return launch(compare, TINY, path), path


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, width, **kwargs):
        raise AssertionError(f"width {width} was trained again")

    monkeypatch.setattr(training, "train", train)


def without_seconds(numbers):
    if isinstance(numbers, dict):
        return {k: without_seconds(v) for k, v in numbers.items() if k != "seconds"}
    return [without_seconds(v) for v in numbers] if isinstance(numbers, list) else numbers


def test_the_numbers_that_it_writes(run):
    numbers, path = run
    assert numbers["settings"]["widths"] == [16, 32]
    assert numbers["steps"] == [0, 1, 2, 4]
    np.testing.assert_allclose(
        numbers["times"], np.multiply(numbers["steps"], numbers["learning_rate"])
    )
    assert numbers["learning_rate"] == pytest.approx(numbers["max_learning_rate"] / 8)
    assert [e["width"] for e in numbers["finite"]] == [16, 32]

    distances = np.array([e["distances"] for e in numbers["finite"]])  # (widths, steps, seeds)
    assert distances.shape == (2, 4, 3)
    np.testing.assert_allclose(distances[:, 0], 0, atol=1e-12)
    assert (distances[:, 1:] > 0).all()
    fit = numbers["slope"]
    slope = np.polyfit(np.repeat(np.log([16, 32]), 3), np.log(distances[:, -1].ravel()), 1)[0]
    assert fit["exponent"] == pytest.approx(slope)
    assert fit["low"] < slope < fit["high"]
    leading = numbers["leading"]
    assert numbers["at_steps"][-1] == {"steps": 4, "slope": fit, "leading": leading}
    assert leading["exponent"] == pytest.approx(slope, abs=0.1)  # of two widths, the same but for
    assert leading["orders"] == 0  # the scatter
    within = leading["low"] <= -0.5 <= leading["high"]
    assert numbers["claims"][0]["holds"] is (None if within and leading["high"] >= 0 else within)
    assert [local["exponent"] for local in numbers["local_slopes"]] == [pytest.approx(slope)]
    assert f"{slope:.3f}".replace("-", "−") in (path / "report.md").read_text()

    for kind in ("train_mse", "test_mse"):
        assert (np.diff(numbers["infinite"][kind]) < 0).all()
        finite_mse = np.mean([e[kind] for e in numbers["finite"]], axis=(0, 2))
        np.testing.assert_allclose(finite_mse, numbers["infinite"][kind], rtol=0.5)
    assert {f.name for f in path.iterdir()} == {
        "results.json", "compare.png", "report.md", "parts",
    }  # fmt: skip


def test_the_infinite_network_before_training_and_after(run):
    numbers, limit = run[0]["infinite"], part(run[1], "infinite")
    data = load("digits", None, 16, 20, seed=0)
    # Every input has norm √d, so that S = 1, K* = 1 / (1 - W_std²/2), and E[f²] = K*/2.
    variance = 0.5 / (1 - 0.36 / 2)
    before = np.mean(data.targets_train**2) + variance
    assert numbers["train_mse"][0] == pytest.approx(before, rel=1e-4)
    assert numbers["ntk_inf"]["train_mse"] == pytest.approx(0, abs=1e-4)
    assert numbers["nngp"]["train_mse"] == pytest.approx(0, abs=1e-4)
    assert (limit["nngp_var"] < variance).all()
    kernel_fn = RELU.kernel_fn(10)
    x_train, x_test = jnp.asarray(data.x_train), jnp.asarray(data.x_test)
    mean = kernel_fn(x_test, x_train, "nngp") @ jnp.linalg.solve(
        kernel_fn(x_train, None, "nngp"), data.targets_train
    )
    np.testing.assert_allclose(limit["nngp_mean"][16:], mean, atol=2e-3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    again = launch(compare, TINY, tmp_path)
    assert without_seconds(again) == without_seconds(run[0])


def test_what_is_finished_is_not_computed_again(run, no_training):
    assert launch(compare, TINY, run[1]) == run[0]
    wider = dataclasses.replace(TINY, widths=(16, 24, 32))
    with pytest.raises(AssertionError, match="width 24 was trained again"):
        compare.main(wider, Workdir(run[1]))
    for change in ({"seed": 1}, {"W_std": 0.5}, {"learning_rate": 0.1}, {"steps": 3}):
        with pytest.raises(AssertionError, match="width 16 was trained again"):
            compare.main(dataclasses.replace(TINY, **change), Workdir(run[1]))


def test_flags_that_only_the_kernel_can_refuse(tmp_path):
    with pytest.raises(InputError, match=r"^--W_std=1\.5 .* take W_std < 1\.41421"):
        compare.main(dataclasses.replace(TINY, W_std=1.5), Workdir(tmp_path))
    with pytest.raises(InputError, match=r"--learning_rate=1000\.0 is too large: .* from \d+"):
        compare.main(dataclasses.replace(TINY, learning_rate=1000.0), Workdir(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["regression", "labels"])
def test_a_table_of_ones_own_that_nobody_scaled(table, tmp_path, capsys):
    n, (x, y) = {
        "regression": (120, load_diabetes(return_X_y=True, scaled=False)),
        "labels": (118, load_wine(return_X_y=True)),
    }[table]
    rows = np.random.default_rng(0).permutation(len(x))
    x, y, file = x[rows], y[rows], tmp_path / "own.npz"
    np.savez(file, x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])
    tiny = Settings(data=str(file), widths=(32, 64), seeds=2, steps=2, W_std=0.3)
    numbers = launch(compare, tiny, tmp_path / "out")
    ntk, page = numbers["infinite"]["ntk_inf"], (tmp_path / "out" / "report.md").read_text()
    assert f"{n} training and {len(x) - n} held-out rows of `{file}`" in page
    assert "Every feature was made to have mean 0 and variance 1" in page
    assert "image" not in page.replace(str(file), "")
    if table == "regression":
        assert "with 10 features and real targets" in page
        assert "R²: of one" in capsys.readouterr().out
        assert numbers["score"] == "R²"
        assert 0.1 < ntk["one_test_score"] < ntk["test_score"] < 0.6
    else:
        assert "13 features and 3 classes" in page
        assert "accuracy: of one" in capsys.readouterr().out
        assert ntk["test_score"] > 0.9
        for limit in ("nngp", "ntk", "ntk_inf"):
            of = numbers["infinite"][limit]
            assert 0 < of["one_test_score"] <= of["test_score"] + 0.05
        assert [len(e["test_scores"]) for e in numbers["finite"]] == [2, 2]


@pytest.mark.slow
def test_float32_and_float64_agree_at_infinite_width(run, tmp_path):
    launch(compare, dataclasses.replace(TINY, float64=True), tmp_path)
    single, exact = part(run[1], "infinite"), part(tmp_path, "infinite")
    assert exact["ntk_mean"].dtype == np.float64
    for name in ("nngp_mean", "nngp_var", "ntk_mean", "ntk_var", "ntk_mean_inf", "ntk_var_inf"):
        np.testing.assert_allclose(single[name], exact[name], atol=1e-3)


@pytest.mark.slow
def test_the_distance_falls_as_one_over_the_square_root_of_width(tmp_path):
    settings = Settings(n_train=16, n_test=50, widths=(128, 512), seeds=32, steps=4)
    fit = launch(compare, settings, tmp_path)["slope"]
    assert fit["low"] < -0.5 < fit["high"]
    assert fit["standard_error"] < 0.05


def linear(params, x, z0):
    return jnp.matmul(x, params, precision="highest"), z0


def test_time_is_learning_rate_times_steps_as_in_neural_tangents(x64):
    # A linear model's kernel x·x' does not change: its gradient descent is what nt.predict solves.
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, 9))), jnp.asarray(rng.normal(size=(6, 2)))
    params = jnp.asarray(rng.normal(size=(3, 9, 2)))
    kernel = x @ x.T
    learning_rate = float(nt.predict.max_learning_rate(kernel, y.size)) / 2000
    steps = 1500
    targets = jnp.broadcast_to(y, (3, *y.shape))
    trained = training.gradient_descent(
        linear, training.start(params, 1, targets), x, targets, learning_rate, steps
    ).params
    for before, after in zip(params, trained, strict=True):
        flow = nt.predict.gradient_descent_mse(kernel, y, learning_rate)(steps, x @ before)
        np.testing.assert_allclose(x @ after, flow, atol=2e-3)
        decay = np.linalg.matrix_power(np.eye(6) - learning_rate / y.size * kernel, steps)
        np.testing.assert_allclose(x @ after, y + decay @ (x @ before - y), atol=1e-10)


def test_training_is_gradient_descent_from_a_fresh_equilibrium(x64):
    data = load("digits", None, 8, 5, seed=0)
    x, y, x_test = data.x_train, data.targets_train, data.x_test
    trained = training.train(
        RELU, 12, x, y, x_test, learning_rate=5.0, steps=[0, 3, 9], seeds=2, seed=0,
        progress=lambda steps: None,
    )  # fmt: skip
    networks, params = draw(RELU, 64, 12, y.shape[1], seeds=2, seed=0)
    params = jax.tree.map(lambda leaf: leaf[1], params)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean((networks.one(params)(x)[0] - y) ** 2) / 2

    for _ in range(9):
        params = jax.tree.map(lambda p, g: p - 5.0 * g, params, gradient(params))
    outputs = networks.one(params)(np.concatenate([x, x_test]))[0]
    np.testing.assert_allclose(trained["outputs"][-1, 1], outputs, atol=1e-9)
    assert (trained["equilibrium_steps"] > 10).all()


@pytest.mark.slow
def test_discretisation_is_far_below_the_distance_at_width_1024():
    # The default settings, with which that distance is about 0.045.
    settings = Settings()
    n, steps = settings.n_train or 256, settings.recorded_steps
    data = load("digits", None, n, 50, seed=0)
    arrays = (data.x_train, data.targets_train, data.x_test)
    limit = infinite.predict(
        RELU, *(a.astype(np.float32) for a in arrays), learning_rate=None, steps=steps
    )
    start = np.random.default_rng(0).normal(size=(4, n + 50, 10)) * 0.78
    stepped = infinite.from_start(limit, data.targets_train, start, steps)[-1, :, n:]
    train_train, test_train = (jnp.asarray(limit[f"ntk_{of}_train"]) for of in ("train", "test"))
    flow = nt.predict.gradient_descent_mse(
        train_train, jnp.asarray(data.targets_train, jnp.float32), float(limit["learning_rate"])
    )
    for before, after in zip(start, stepped, strict=True):
        _, expected = flow(steps[-1], jnp.asarray(before[:n]), jnp.asarray(before[n:]), test_train)
        assert np.sqrt(np.mean((after - expected) ** 2)) < 0.004


def test_divergence_is_an_error():
    data = load("digits", None, 8, 5, seed=0)
    with pytest.raises(TrainingError, match=r"width 8, step \d+: .* take --learning_rate below"):
        training.train(
            RELU, 8, data.x_train, data.targets_train, data.x_test, learning_rate=1e5,
            steps=[0, 40], seeds=2, seed=0, progress=lambda steps: None,
        )  # fmt: skip
