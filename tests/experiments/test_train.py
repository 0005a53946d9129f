"""Training by minibatches: its steps, what it writes, how a killed run goes on."""

import dataclasses
import functools
import json
import os
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from launching import start
from marks import slow_except

from nt_deq import Picard
from experiments.lib import minibatch
from experiments.lib.data import load
from experiments.lib.minibatch import Classifier, make_optimizer, make_schedule, shifted
from experiments.lib.networks import Architecture, dense
from experiments.lib.training import TrainingError
from experiments.lib.workdir import Workdir
from experiments.train import classifier as train
from experiments.train import trained
from experiments.train.classifier import Settings
from nt_deq.errors import InputError

pytestmark = pytest.mark.usefixtures("promotion")  # by Adam of optax

MNIST = os.environ.get("NT_DEQ_MNIST")
TINY = Settings(
    n_train=50, n_test=20, width=12, batch_size=16, epochs=2, learning_rate=0.05, log_every=4
)
CONV = Settings(
    network="conv", n_train=50, n_test=20, width=8, batch_size=16, epochs=2, shift=1, W_std=0.8,
    log_every=4,
)  # fmt: skip
RELU = Architecture(W_std=0.6, U_std=1.0, b_std=0.1, activation="relu")


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_seconds(metrics):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def last_checkpoint(path):
    with np.load(path / "checkpoint.npz") as file:
        return {name: file[name] for name in file if name not in ("seconds", "metrics")}


def assert_identical(a, b):
    """The bits of the last checkpoints' states, and all metrics but the time."""
    assert without_seconds(lines(a)) == without_seconds(lines(b))
    one, other = last_checkpoint(a), last_checkpoint(b)
    assert len(one) > 12  # parameters, both moments of adam, counters
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_classifier", functools.cache(train.make_classifier))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    train.train(TINY, Workdir(path))
    return path


@pytest.fixture(scope="module")
def conv_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("conv")
    train.train(CONV, Workdir(path))
    return path


def deep_outputs(params, x, layers=60):
    """The network as explicit layers."""
    W, U, b, V = jax.tree.leaves(params)
    u = x @ U / np.sqrt(x.shape[1]) + 0.1 * b
    z, scale = jnp.zeros_like(u), np.sqrt(u.shape[1])

    def layer(z, _):
        return 0.6 / scale * jax.nn.relu(z) @ W + u, None

    z, _ = lax.scan(layer, z, length=layers)
    return jax.nn.relu(z) @ V / scale


@functools.partial(jax.jit, static_argnames="loss")
def deep_loss(params, x, labels, loss):
    f = deep_outputs(params, x)
    if loss == "cross_entropy":
        return -jnp.mean(jax.nn.log_softmax(f)[jnp.arange(len(x)), labels])
    return jnp.mean((f - (jnp.eye(10)[labels] - 0.1)) ** 2) / 2


@pytest.mark.parametrize("loss", slow_except(["cross_entropy"], ["cross_entropy", "mse"]))
def test_steps_are_those_of_the_explicit_deep_network(loss):
    data = load("digits", None, 50, 20, seed=0)
    x, labels = jnp.asarray(data.x_train, jnp.float32), jnp.asarray(data.y_train)
    batches = jnp.asarray(np.random.default_rng(1).permutation(50)[:48].reshape(3, 16))
    network = dense(RELU, 64, 32, 10, nnx.Rngs(0), solver=Picard(4e-6))
    optimizer = make_optimizer("sgd", make_schedule("constant", 0.3, 2, 3), 0.01)
    trainer = Classifier(network, optimizer, loss)
    trained = trainer.take_steps(trainer.init(), x, labels, batches, 3)

    params = nnx.split(network, nnx.Param)[1]
    losses, correct = [], 0
    for rows, rate in zip(batches, (0.1, 0.2, 0.3), strict=True):
        losses.append(deep_loss(params, x[rows], labels[rows], loss))
        correct += int((deep_outputs(params, x[rows]).argmax(1) == labels[rows]).sum())
        gradient = jax.grad(deep_loss)(params, x[rows], labels[rows], loss)
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * (g + 0.01 * p), params, gradient)
    for one, other in zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(trained.loss) == pytest.approx(float(sum(losses)), rel=1e-5)
    assert int(trained.correct) == correct
    assert int(trained.step) == 3
    assert trained.finite

    measured = trainer.evaluate(trained.params, *data_of(data))
    f = deep_outputs(params, data_of(data)[0])
    assert measured["test_accuracy"] == pytest.approx(float((f.argmax(1) == data.y_test).mean()))
    expected = deep_loss(params, data_of(data)[0], data.y_test, loss)
    assert measured["test_loss"] == pytest.approx(float(expected), rel=1e-5)


def data_of(data):
    return jnp.asarray(data.x_test, jnp.float32), jnp.asarray(data.y_test)


def test_evaluation_in_parts(monkeypatch):
    data = load("digits", None, 50, 20, seed=0)
    network = dense(RELU, 64, 12, 10, nnx.Rngs(0))
    one = Classifier(network, make_optimizer("sgd", lambda step: 0.1, 0.0), "cross_entropy")
    params = one.init().params
    whole = one.evaluate(params, *data_of(data))
    monkeypatch.setattr(minibatch, "EVALUATION_BATCH", 7)
    parts = one.evaluate(params, *data_of(data))
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-3)


def test_the_learning_rate_rises_and_falls():
    cosine = make_schedule("cosine", 0.4, 3, 11)
    np.testing.assert_allclose([cosine(s) for s in range(4)], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    for step in (3, 5, 10):
        expected = 0.2 * (1 + np.cos(np.pi * (step - 3) / 8))
        assert float(cosine(step)) == pytest.approx(expected, rel=1e-5)
    constant = make_schedule("constant", 0.4, 0, 11)
    assert [float(constant(s)) for s in (0, 10)] == pytest.approx([0.4, 0.4])


def test_the_order_of_the_images_is_of_the_seed_and_the_epoch():
    epochs = [np.asarray(train._batches(TINY, epoch)) for epoch in range(3)]
    for batches in epochs:
        assert batches.shape == (3, 16)
        assert len(np.unique(batches)) == 48
        assert batches.max() < 50
    assert len({e.tobytes() for e in epochs}) == 3
    np.testing.assert_array_equal(epochs[1], train._batches(TINY, 1))
    other = dataclasses.replace(TINY, seed=1)
    assert (epochs[1] != train._batches(other, 1)).any()


def test_the_metrics_that_it_writes(run):
    metrics = lines(run)
    assert [line["step"] for line in metrics] == [4, 6]  # and the last, which is no fourth
    np.testing.assert_allclose([line["epoch"] for line in metrics], [4 / 3, 2])
    schedule = make_schedule("cosine", 0.05, 0, 6)
    for line in metrics:
        assert line["learning_rate"] == pytest.approx(float(schedule(line["step"] - 1)))
        assert 5 < line["equilibrium_steps"] < 100
        assert line["test_accuracy"] * 20 == pytest.approx(round(line["test_accuracy"] * 20))
    seen = [4 * 16, 2 * 16]
    for line, images in zip(metrics, seen, strict=True):
        assert line["train_accuracy"] * images == pytest.approx(
            round(line["train_accuracy"] * images)
        )
    assert metrics[0]["train_loss"] > metrics[1]["train_loss"] > 0
    assert 0 < metrics[0]["seconds"] < metrics[1]["seconds"]
    assert last_checkpoint(run)["step"] == 6


def test_it_prints_and_draws_them(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    train.main(TINY, Workdir(tmp_path))
    last = lines(run)[-1]
    assert f"{last['test_accuracy']:.2%}" in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_how_often_it_writes_changes_no_step(run, tmp_path):
    often = dataclasses.replace(TINY, log_every=1, checkpoint_every=1)
    losses = [line["train_loss"] for line in train.train(often, Workdir(tmp_path))]
    expected = [line["train_loss"] for line in lines(run)]
    assert [np.mean(losses[:4]), np.mean(losses[4:])] == pytest.approx(expected, rel=1e-6)
    ours, theirs = last_checkpoint(tmp_path), last_checkpoint(run)
    for name in [name for name in ours if name.startswith(".params")]:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_it_learns_the_digits(tmp_path):
    settings = Settings(width=64, epochs=6, learning_rate=0.03, warmup_steps=10)
    metrics = train.train(settings, Workdir(tmp_path))
    assert metrics[-1]["test_accuracy"] > 0.95
    assert metrics[-1]["train_accuracy"] > 0.97


KILLED = Settings(
    n_train=100, n_test=50, width=16, batch_size=10, epochs=9, log_every=4, checkpoint_every=11
)


def kill_when(condition, path, delay):
    """Runs the launcher, and ends it by SIGKILL `delay` seconds after `condition(path)`."""
    flags = [f"--{k}={v}" for k, v in vars(KILLED).items() if v is not None]
    process = start("train.classifier", f"--workdir={path}", *flags)
    deadline = time.monotonic() + 120
    while not condition(path):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)


def lines_written(path):
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    rng = np.random.default_rng(0)
    for n in (0, 3, 8, 13, 18):
        kill_when(lambda path, n=n: lines_written(path) >= n, killed, delay=rng.uniform(0, 0.1))
    train.train(KILLED, Workdir(killed))
    train.train(KILLED, Workdir(whole))
    assert_identical(killed, whole)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "network"), [("in a line", "dense"), ("before a checkpoint", "conv")]
)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(
    where, network, run, conv_run, tmp_path, monkeypatch
):
    settings, whole = {"dense": (TINY, run), "conv": (CONV, conv_run)}[network]
    workdir = Workdir(tmp_path)

    def stop(run, *args):
        if where == "in a line":
            with open(run._metrics, "a") as file:
                file.write('{"step": 6, "epo')
        raise StoppedError

    method = "save" if where == "before a checkpoint" else "log"
    original = getattr(train.Run, method)
    calls = []

    def second_time(run, *args):
        calls.append(args)
        return stop(run) if len(calls) == 2 else original(run, *args)

    monkeypatch.setattr(train.Run, method, second_time)
    with pytest.raises(StoppedError):
        train.train(settings, workdir)
    assert workdir.kept == ["the checkpoint of step 3"]
    monkeypatch.undo()
    train.train(settings, Workdir(tmp_path))
    assert_identical(whole, tmp_path)


def test_more_epochs_extend_a_run(run, tmp_path, capsys):
    longer = dataclasses.replace(TINY, epochs=3)
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    metrics = train.train(longer, Workdir(tmp_path))
    assert re.search(
        r"Goes on after 6 steps of a run that was to have 2 epochs; the cosine step size is "
        r"from here on that of 3\.\n",
        capsys.readouterr().err,
    )
    assert metrics[:2] == lines(run)
    assert [line["step"] for line in metrics] == [4, 6, 8, 9]
    of_two, of_three = (make_schedule("cosine", 0.05, 0, steps) for steps in (6, 9))
    expected = [of_two(3), of_two(5), of_three(7), of_three(8)]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(list(map(float, expected)))
    for line, images in zip(metrics[2:], (2 * 16, 16), strict=True):  # since the line before
        seen = line["train_accuracy"] * images
        assert seen == pytest.approx(round(seen))
    assert json.loads((tmp_path / "run.json").read_text())["epochs"] == [
        {"from_step": 0, "epochs": 2},
        {"from_step": 6, "epochs": 3},
    ]
    again = (tmp_path / "metrics.jsonl").read_bytes()
    train.train(longer, Workdir(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == again
    with pytest.raises(InputError, match=r"^--epochs=2 is too small: the run has taken 9 steps"):
        train.train(TINY, Workdir(tmp_path))


@pytest.mark.parametrize("network", ["dense", "conv"])
def test_a_checkpoint_predicts(network, run, conv_run):
    settings, path = {"dense": (TINY, run), "conv": (CONV, conv_run)}[network]
    data = load("digits", None, settings.n_train, settings.n_test, settings.seed)
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*")}
    network = trained.load(path)
    predicted = network.predict(data.images_test)
    assert (predicted == data.y_test).mean() == lines(path)[-1]["test_accuracy"]
    assert network(data.images_test[:3]).shape == (3, 10)
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*")} == before
    with pytest.raises(InputError, match=r"shape \(3, 7, 8\); .* trained on \(n, 8, 8\)"):
        network.predict(data.images_test[:3, 1:])


def test_nothing_to_predict_with(tmp_path):
    with pytest.raises(InputError, match=r"is no --workdir of experiments\.train"):
        trained.load(tmp_path)


def test_the_metrics_of_a_convolutional_network(conv_run):
    for line in lines(conv_run):
        assert line["spectral_radius"] < 0.9
        assert 0 < line["residual"] < 2 * CONV.rtol
        assert 3 < line["equilibrium_steps"] < 60


def test_images_are_moved_by_whole_pixels():
    images = jax.random.normal(jax.random.key(0), (40, 5, 6, 2))
    moved = shifted(images, 1, jax.random.key(1))
    around = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    crops = np.stack([around[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    found = (crops == np.asarray(moved)).all(axis=(2, 3, 4))
    assert (found.sum(axis=0) == 1).all()
    assert found.any(axis=1).sum() > 5  # of the nine


def test_a_convolutional_network_is_for_images(tmp_path):
    rows = np.arange(24.0).reshape(8, 3)
    np.savez(
        tmp_path / "rows.npz", x_train=rows, y_train=[0, 1] * 4, x_test=rows, y_test=[0, 1] * 4
    )
    settings = Settings(
        data=str(tmp_path / "rows.npz"), n_train=8, n_test=8, batch_size=4, network="conv"
    )
    with pytest.raises(InputError, match=r"^--network=conv is for images, .* has shape \(3,\)"):
        train.train(settings, Workdir(tmp_path / "run"))


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    def no_steps(*args):
        raise AssertionError

    monkeypatch.setattr(train, "_batches", no_steps)
    before = (run / "metrics.jsonl").read_bytes()
    for left in (before, before[:-30], b""):  # metrics that were cut come back
        (run / "metrics.jsonl").write_bytes(left)
        train.train(TINY, Workdir(run))
        assert (run / "metrics.jsonl").read_bytes() == before


def test_a_directory_with_another_run(run, tmp_path, monkeypatch):
    before = (run / "metrics.jsonl").read_bytes()
    wider = dataclasses.replace(TINY, width=13)
    with pytest.raises(InputError, match=r"holds a run with other settings: width was 12, now 13"):
        train.train(wider, Workdir(run))
    monkeypatch.setattr(train, "versions", lambda: {"jax": "0.1"})
    with pytest.raises(InputError, match=r"other versions: jax was [\d.]+, now 0\.1"):
        train.train(TINY, Workdir(run))
    monkeypatch.undo()
    monkeypatch.setattr(train.joblib, "hash", lambda arrays: "other")
    with pytest.raises(InputError, match="holds a run with other data"):
        train.train(TINY, Workdir(run))
    assert (run / "metrics.jsonl").read_bytes() == before
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match=r"and no run\.json that says which"):
        train.train(TINY, Workdir(tmp_path))


def test_divergence_names_the_step_and_what_to_change(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"^step [2-9] of 6: .* take --lipschitz=0.9, --learning_rate below 500, more",
    ):
        train.train(dataclasses.replace(TINY, learning_rate=500.0), Workdir(tmp_path / "a"))
    chaotic = dataclasses.replace(TINY, W_std=4.0, activation="sin")
    with pytest.raises(TrainingError, match=r"^step 1 of 6: .* take --W_std below 4, and another"):
        train.train(chaotic, Workdir(tmp_path / "b"))
    with pytest.raises(InputError, match=r"^--W_std=4\.0 must be below 1\.41421"):
        train.train(dataclasses.replace(TINY, W_std=4.0), Workdir(tmp_path / "c"))


@pytest.mark.slow
@pytest.mark.skipif(MNIST is None, reason="NT_DEQ_MNIST does not name a directory of MNIST")
def test_it_learns_mnist(tmp_path):
    settings = Settings(
        data="mnist", data_dir=MNIST, n_train=10000, n_test=2000, batch_size=256, epochs=4,
        learning_rate=0.03,
    )  # fmt: skip
    assert train.train(settings, Workdir(tmp_path))[-1]["test_accuracy"] > 0.94


@pytest.mark.slow
def test_a_convolutional_network_learns_the_digits(tmp_path):
    settings = Settings(network="conv", epochs=12, warmup_steps=20)
    assert train.train(settings, Workdir(tmp_path))[-1]["test_accuracy"] > 0.97
