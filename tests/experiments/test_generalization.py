"""Noisy labels, kernel regression and networks that interpolate."""

import jax
import neural_tangents as nt
import numpy as np
import pytest
from launching import launch, part
from neural_tangents import stax
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from experiments.claims import generalization, generalization_report
from experiments.lib import kernels, training
from experiments.lib.data import load
from experiments.lib.kernels import REGULARISATION, regress
from experiments.lib.networks import Architecture

TINY = generalization.Settings(
    counts=(20, 60), n_test=80, network_counts=(20,), widths=(16, 64), seeds=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("generalization")
    return launch(generalization, TINY, path), path


def problem(count=60, noise=0.2):
    data = load("digits", None, 60, 80, seed=0)
    settings = generalization.Settings(label_noise=noise)
    return data, generalization.Problem(settings, data, count)


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.5])
def test_as_many_labels_are_wrong_as_said(noise):
    labels = np.arange(200) % 7
    noisy = generalization.noisy_labels(labels, 7, noise, seed=3)
    assert (noisy != labels).mean() == noise
    assert set(noisy) <= set(range(7))
    moved = (noisy - labels)[noisy != labels] % 7
    assert set(moved) == set(range(1, 7))  # any other class
    np.testing.assert_array_equal(generalization.noisy_labels(labels, 7, noise, seed=3), noisy)
    assert (generalization.noisy_labels(labels, 7, noise, seed=4) != noisy).any()
    np.testing.assert_array_equal(generalization.noisy_labels(labels, 7, 0.0, seed=3), labels)


def test_targets_are_those_of_the_labels():
    data, found = problem()
    np.testing.assert_array_equal(found.labels[0], data.y_train)
    np.testing.assert_allclose(found.targets[0], data.targets_train)
    assert (found.labels[1] != data.y_train).sum() == 12
    np.testing.assert_array_equal(found.targets.argmax(-1), found.labels)


@pytest.mark.slow
def test_a_tiled_kernel_is_the_kernel(monkeypatch, x64):
    monkeypatch.setattr(kernels, "TILE", 7)
    x = np.random.default_rng(0).standard_normal((16, 5))
    x *= 5**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    arch = Architecture(1.2, 1.0, 0.0, "relu")
    for get in ("nngp", "ntk"):
        ours = generalization.deq(get, 1.2)
        np.testing.assert_allclose(ours(x, x), arch.kernel_fn(1)(x, None, get), rtol=1e-10)
        np.testing.assert_allclose(
            ours(x[:3], x[3:]), arch.kernel_fn(1)(x[:3], x[3:], get), rtol=1e-10
        )
        layers = [stax.Dense(1, W_std=2**0.5), stax.Relu()] * 3
        deep = stax.serial(*layers, stax.Dense(1))[2]
        # The diagonal of its tiles is that of two inputs which happen to be equal: arccos of 1.
        np.testing.assert_allclose(
            generalization.explicit(get, 3)(x, x), deep(x, None, get), atol=1e-6
        )


def test_regression_is_that_of_scikit_learn():
    data, found = problem()
    family, shapes = generalization.FAMILIES["RBF"]
    ours = regress(family, shapes, found.x, found.targets, data.x_test, lambda: None)
    y = found.targets.swapaxes(0, 1)
    for i, allowed in enumerate((REGULARISATION, REGULARISATION[:1])):
        for noise in (0, 1):
            errors = {}
            for length in shapes:
                for alpha in allowed:
                    gp = GaussianProcessRegressor(RBF(length * 8), alpha=alpha, optimizer=None)
                    gp.fit(found.x[:48], y[:48, noise])
                    error = np.square(gp.predict(found.x[48:]) - y[48:, noise]).mean()
                    errors[length, alpha] = error
            length, alpha = min(errors, key=errors.get)
            assert ours["shape"][i, noise] == length
            assert ours["regularisation"][i, noise] == alpha
            gp = GaussianProcessRegressor(RBF(length * 8), alpha=alpha, optimizer=None)
            gp.fit(found.x, y[:, noise])
            for name, x in (("train", found.x), ("test", data.x_test)):
                np.testing.assert_allclose(ours[name][i, noise], gp.predict(x), atol=1e-6)


@pytest.mark.slow
def test_interpolation_is_gradient_descent_for_ever(x64):
    data, found = problem()
    family, shapes = generalization.FAMILIES["DEQ, NTK"]
    ours = regress(family, shapes, found.x, found.targets, data.x_test, lambda: None)
    np.testing.assert_array_equal(ours["train"][1].argmax(-1), found.labels)
    for noise in (0, 1):
        kernel_fn = Architecture(float(ours["shape"][1, noise]), 1.0, 0.0, "relu").kernel_fn(1)
        forever = nt.predict.gradient_descent_mse_ensemble(
            kernel_fn, found.x, found.targets[noise]
        )(t=None, x_test=data.x_test, get="ntk")
        np.testing.assert_allclose(ours["test"][1, noise], forever, atol=1e-7)


@pytest.mark.slow
def test_the_numbers_that_it_writes(run):
    results, path = run
    assert results["noises"] == [0.0, 0.2]
    data, _ = problem()
    for count in (20, 60):
        summary = results["measured"][str(count)]
        assert list(summary["kernels"]) == list(generalization.FAMILIES)
        for by_mode in summary["kernels"].values():
            # It interpolates: every label is fitted, the wrong ones too.
            assert by_mode["interpolating"]["train_error"] == [0, 0]
            assert by_mode["interpolating"]["regularisation"] == [REGULARISATION[0]] * 2
        wrong = part(path, f"DEQ-NTK-{count}")["test"].argmax(-1) != data.y_test
        for i, mode in enumerate(("tuned", "interpolating")):
            np.testing.assert_allclose(
                summary["kernels"]["DEQ, NTK"][mode]["test_error"], wrong[i].mean(-1)
            )
        comparison = summary["comparison"][1]
        assert comparison["deq"].startswith("DEQ")
        tuned = {k: v["tuned"]["test_error"][1] for k, v in summary["kernels"].items()}
        ours, other = tuned[comparison["deq"]], tuned[comparison["other"]]
        assert comparison["difference"] == pytest.approx(ours - other)
        assert ours == min(v for k, v in tuned.items() if k.startswith("DEQ"))
        assert other == min(v for k, v in tuned.items() if not k.startswith("DEQ"))
    assert results["claims"][0]["holds"]
    networks = results["measured"]["20"]["networks"]
    assert results["measured"]["60"]["networks"] == {}
    assert list(networks) == ["16", "64"]
    for i in (0, 1):
        narrow, wide = (np.mean(networks[w]["distance"][i]) for w in ("16", "64"))
        assert wide < narrow
        # What they tend to is the kernel's interpolation, with the networks' W_std.
        data, found = problem(20)
        with jax.enable_x64(True):
            forever = nt.predict.gradient_descent_mse_ensemble(
                Architecture(0.6, 1.0, 0.0, "relu").kernel_fn(1), found.x, found.targets[i]
            )(t=None, x_test=data.x_test, get="ntk")
        for w in ("16", "64"):
            off = part(path, f"width-{w}-20")["learned"][i, :, 20:] - np.asarray(forever)
            distance = np.sqrt(np.square(off).mean((1, 2)))
            np.testing.assert_allclose(networks[w]["distance"][i], distance, rtol=1e-4)
        assert networks["64"]["fits"][i] == [True, True]
        assert networks["64"]["train_error"][i] == [0, 0]
        assert max(networks["64"]["train_mse"][i]) <= 0.01 * 0.09


@pytest.mark.slow
def test_what_is_finished_is_not_computed_again(run, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("it was computed again")

    monkeypatch.setattr(generalization, "regress", fail)
    monkeypatch.setattr(training, "interpolate", fail)
    assert launch(generalization, TINY, run[1]) == run[0]


@pytest.mark.slow
def test_a_network_that_does_not_fit_is_said_not_to():
    data, found = problem(20)
    trained = training.interpolate(
        Architecture(0.6, 1.0, 0.0, "relu"), 16, found.x, found.targets, data.x_test,
        learning_rate=1e-3, max_steps=10, enough=0.0009, seeds=2, seed=0, progress=lambda _: None,
    )  # fmt: skip
    assert trained["steps"] == 10
    assert trained["learning_rate"] == 1e-3
    assert trained["learned"].shape == (2, 2, 100, 10)
    mse = np.square(trained["learned"][:, :, :20] - found.targets[:, None]).mean((2, 3))
    np.testing.assert_allclose(trained["train_mse"], mse, rtol=1e-5)
    assert (mse > 0.0009).all()
    limit = {"limit": np.zeros((2, 80, 10))}
    kernel = regress(
        *generalization.FAMILIES["RBF"], found.x, found.targets, data.x_test,
        lambda: None,
    )  # fmt: skip
    summary = generalization.summarise(
        data, found, {"DEQ, NTK": kernel, "RBF": kernel}, {16: trained | limit}
    )
    assert not summary["networks"][16]["fits"].any()
    assert summary["comparison"][0]["difference"] == 0
    claim = generalization_report._network_claim((0.0, 0.2), {20: summary})
    assert not claim.holds
    assert "Did not fit: width 16 on 20 images, right labels; width 16" in claim.measured
