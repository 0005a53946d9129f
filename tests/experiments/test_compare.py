"""The comparison of finite and infinite width: its numbers, its files, how it stops and goes on."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest

from experiments.claims.compare import Settings, compare
from experiments.lib import infinite, training
from experiments.lib.data import load
from experiments.lib.networks import Architecture, draw
from experiments.lib.report import fit_power_law, table
from experiments.lib.training import TrainingError
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

ROOT = Path(__file__).parents[2]
TINY = Settings(n_train=16, n_test=20, widths=(16, 32), seeds=3, steps=4)
FLAGS = ("--n_train=16", "--n_test=20", "--widths=16,32", "--seeds=3", "--steps=4")
RELU = Architecture(W_std=0.6, U_std=1.0, b_std=0.0, activation="relu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    return compare(TINY, Workdir(path)), path


def results(path):
    return json.loads((path / "results.json").read_text())


def without_seconds(numbers):
    if isinstance(numbers, dict):
        return {k: without_seconds(v) for k, v in numbers.items() if k != "seconds"}
    return [without_seconds(v) for v in numbers] if isinstance(numbers, list) else numbers


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, width, **kwargs):
        raise AssertionError(f"width {width} was trained again")

    monkeypatch.setattr(training, "train", train)


def test_the_numbers_that_it_writes(run):
    numbers = results(run[1])
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
    slope = np.polyfit(np.repeat(np.log([16, 32]), 3), np.log(distances[:, -1].ravel()), 1)[0]
    assert numbers["slope"]["exponent"] == pytest.approx(slope)
    assert numbers["slope"]["low"] < slope < numbers["slope"]["high"]

    for kind in ("train_mse", "test_mse"):
        assert (np.diff(numbers["infinite"][kind]) < 0).all()
        finite_mse = np.mean([e[kind] for e in numbers["finite"]], axis=(0, 2))
        np.testing.assert_allclose(finite_mse, numbers["infinite"][kind], rtol=0.5)


def test_the_infinite_network_before_training_and_after(run):
    comparison, _ = run
    data = load("digits", None, 16, 20, seed=0)
    # Every input has norm √d, so that S = 1, K* = 1 / (1 - W_std²/2), and E[f²] = K*/2.
    variance = 0.5 / (1 - 0.36 / 2)
    before = np.mean(data.targets_train**2) + variance
    assert comparison.limit_train_mse[0] == pytest.approx(before, rel=1e-4)
    assert comparison.ntk_inf.train_mse == pytest.approx(0, abs=1e-4)
    assert comparison.nngp.train_mse == pytest.approx(0, abs=1e-4)
    assert (comparison.nngp.std**2 < variance).all()
    kernel_fn = RELU.kernel_fn(10)
    x_train, x_test = jnp.asarray(data.x_train), jnp.asarray(data.x_test)
    mean = kernel_fn(x_test, x_train, "nngp") @ jnp.linalg.solve(
        kernel_fn(x_train, None, "nngp"), data.targets_train
    )
    np.testing.assert_allclose(comparison.nngp.mean, mean, atol=2e-3)


def test_every_file_is_written(run):
    _, path = run
    assert {f.name for f in path.iterdir()} == {
        "results.json",
        "compare.png",
        "report.md",
        "parts",
    }
    assert (path / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = (path / "report.md").read_text()
    assert "![figure](compare.png)" in page
    assert f"{results(path)['slope']['exponent']:.3f}".replace("-", "−") in page
    assert "nan" not in page
    claims = results(path)["claims"]
    assert [claim["claim"] in page for claim in claims] == [True, True]
    fit = results(path)["slope"]
    assert claims[0]["holds"] == (fit["low"] <= -0.5 <= fit["high"])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    compare(TINY, Workdir(tmp_path))
    again, before = (without_seconds(results(path)) for path in (tmp_path, run[1]))
    for numbers in (again, before):
        (table, *_) = numbers["tables"]
        assert table["header"][-1] == "seconds"
        table["rows"] = [row[:-1] for row in table["rows"]]
    assert again == before


def test_what_is_finished_is_not_computed_again(run, no_training):
    before = results(run[1])
    workdir = Workdir(run[1])
    compare(TINY, workdir)
    assert results(run[1]) == before
    assert workdir.kept == ["infinite", "width-16", "width-32"]


def test_another_width_leaves_the_others_and_other_flags_do_not(run, no_training):
    wider = dataclasses.replace(TINY, widths=(16, 24, 32))
    with pytest.raises(AssertionError, match="width 24 was trained again"):
        compare(wider, Workdir(run[1]))
    for change in ({"seed": 1}, {"W_std": 0.5}, {"learning_rate": 0.1}, {"steps": 3}):
        with pytest.raises(AssertionError, match="width 16 was trained again"):
            compare(dataclasses.replace(TINY, **change), Workdir(run[1]))


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
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 12), 2)
    call, params = draw(RELU, 64, 12, y.shape[1], keys)
    params = jax.tree.map(lambda leaf: leaf[1], params)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean((call(params, lambda network: network(x)[0]) - y) ** 2) / 2

    for _ in range(9):
        params = jax.tree.map(lambda p, g: p - 5.0 * g, params, gradient(params))
    outputs = call(params, lambda network: network(np.concatenate([x, x_test]))[0])
    np.testing.assert_allclose(trained["outputs"][-1, 1], outputs, atol=1e-9)
    assert (trained["equilibrium_steps"] > 10).all()


@pytest.mark.slow
def test_discretisation_is_far_below_the_distance_at_width_1024():
    # The default settings, with which that distance is about 0.045.
    settings = Settings()
    n, steps = settings.n_train, settings.recorded_steps
    data = load("digits", None, n, 50, seed=0)
    limit = infinite.predict(
        RELU,
        data.x_train.astype(np.float32),
        data.targets_train.astype(np.float32),
        data.x_test.astype(np.float32),
        learning_rate=None,
        steps=steps,
    )
    start = np.random.default_rng(0).normal(size=(4, n + 50, 10)) * 0.78
    stepped = infinite.from_start(limit, data.targets_train, start, steps)[-1, :, n:]
    flow = nt.predict.gradient_descent_mse(
        jnp.asarray(limit["ntk_train_train"]),
        jnp.asarray(data.targets_train, jnp.float32),
        float(limit["learning_rate"]),
    )
    for before, after in zip(start, stepped, strict=True):
        _, expected = flow(
            steps[-1],
            jnp.asarray(before[:n]),
            jnp.asarray(before[n:]),
            jnp.asarray(limit["ntk_test_train"]),
        )
        assert np.sqrt(np.mean((after - expected) ** 2)) < 0.004


def test_divergence_is_an_error(run):
    data = load("digits", None, 8, 5, seed=0)
    with pytest.raises(TrainingError, match=r"width 8, step \d+: .* take --learning_rate below"):
        training.train(
            RELU, 8, data.x_train, data.targets_train, data.x_test, learning_rate=1e5,
            steps=[0, 40], seeds=2, seed=0, progress=lambda steps: None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 1}, "--n_train=1 is too small: it has to be at least 2"),
        ({"steps": 0}, "--steps=0 is too small"),
        ({"seeds": 1}, "--seeds=1 is too small"),
        ({"widths": (64, 0)}, "--widths=64,0 is too small"),
        ({"widths": (64,)}, "--widths=64 has to be at least two"),
        ({"widths": (64, 64)}, "--widths=64,64 has to be at least two"),
        ({"W_std": -0.1}, "--W_std=-0.1 is too small"),
        ({"W_std": float("nan")}, "--W_std=nan is not a finite number"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0 is too small: it has to be above 0"),
        ({"activation": "swish"}, "--activation=swish is unknown: use one of relu"),
        ({"data_dir": "x"}, "--data_dir=x is for --data=mnist alone"),
    ],
)
def test_settings_that_cannot_be_right(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


def test_flags_that_only_the_kernel_can_refuse(tmp_path):
    with pytest.raises(InputError, match=r"^--W_std=1\.5 .* take W_std < 1\.41421"):
        compare(dataclasses.replace(TINY, W_std=1.5), Workdir(tmp_path))
    with pytest.raises(InputError, match=r"--learning_rate=1000\.0 is too large: .* from \d+"):
        compare(dataclasses.replace(TINY, learning_rate=1000.0), Workdir(tmp_path))


def launch(*flags):
    command = [sys.executable, "-m", "experiments.claims.compare", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(("--n_train=many",), "--n_train=many", marks=pytest.mark.slow),
        (("--workdir=out/unused", "--widths=64,wide"), "--widths=64,wide has to be integers"),
    ],
)
def test_bad_flags_end_it_with_one_line(flags, message):
    process = launch(*flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_what_is_finished(tmp_path, run, number):
    process = launch(f"--workdir={tmp_path}", *FLAGS, "--steps=1000000")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("parts/infinite.*.npz")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"Interrupted. Kept in {tmp_path}: infinite; the same command" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("parts/.*"))


def test_parts_are_kept_by_all_that_they_depend_on(tmp_path):
    calls = []

    def part(**inputs):
        def compute():
            calls.append(inputs)
            return {"a": np.arange(3.0)}

        return Workdir(tmp_path).part("part", inputs, compute)

    array = np.ones((2, 3))
    assert part(x=array, n=1)[1] is False
    arrays, found = part(n=1, x=array.copy())
    assert found
    np.testing.assert_array_equal(arrays["a"], [0, 1, 2])
    for other in ({"x": array, "n": 2}, {"x": array.T, "n": 1}, {"x": array.astype("f4"), "n": 1}):
        assert not part(**other)[1]
    assert len(calls) == 4


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def compute():
        raise KeyboardInterrupt

    workdir = Workdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        workdir.part("part", {}, compute)
    assert workdir.kept == []
    assert not list(tmp_path.glob("parts/*"))


def test_a_power_law_is_fitted_with_its_error():
    x = np.repeat([10.0, 100.0, 1000.0], 20)
    noise = np.random.default_rng(0).normal(size=x.size) * 0.1
    fit = fit_power_law(x, 3 * x**-0.5 * np.exp(noise))
    assert fit.low < -0.5 < fit.high
    # The textbook's standard error of a slope: σ / √Σ (x - mean)².
    assert fit.standard_error == pytest.approx(0.1 / (np.log(x).std() * np.sqrt(x.size)), rel=0.3)
    np.testing.assert_allclose(fit(100), 0.3, rtol=0.1)
    assert str(fit).startswith("−0.")


def test_tables():
    header, rows = ("a", "bb"), [["long", "1"], ["x", "22"]]
    assert table(header, rows).splitlines() == [
        "| a    |  bb |",
        "| ---- | --: |",
        "| long |   1 |",
        "| x    |  22 |",
    ]


@pytest.mark.slow
def test_float32_and_float64_agree_at_infinite_width(run, tmp_path):
    double = compare(dataclasses.replace(TINY, float64=True), Workdir(tmp_path))
    for name in ("nngp", "ntk", "ntk_inf"):
        single, exact = getattr(run[0], name), getattr(double, name)
        np.testing.assert_allclose(single.mean, exact.mean, atol=1e-3)
        np.testing.assert_allclose(single.std, exact.std, atol=1e-3)
    assert without_seconds(results(tmp_path))["settings"]["float64"]


@pytest.mark.slow
def test_the_distance_falls_as_one_over_the_square_root_of_width(tmp_path):
    settings = Settings(n_train=16, n_test=50, widths=(128, 512), seeds=32, steps=4)
    fit = compare(settings, Workdir(tmp_path)).fits[-1]
    assert fit.low < -0.5 < fit.high
    assert fit.standard_error < 0.05
