"""The launcher of kernel regression on all images, at a tiny size."""

import numpy as np
import pytest
from launching import launch

from experiments.lib.data import load
from experiments.train import mnist
from nt_deq.errors import InputError, NoEquilibriumError

TINY = dict(data="digits", n_train=150, n_test=40, relative_noise=1e-3)


def run(path, **options):
    return launch(mnist, mnist.Settings(**TINY | options), path)


@pytest.mark.slow
def test_it_writes_what_it_found(tmp_path):
    found = run(tmp_path, method="cg", rank=30)
    data = load("digits", None, 150, 40, 0, centre=False)
    np.testing.assert_allclose(np.square(data.x_train).mean(1), 1)  # of norm √d, as published
    kernel_fn = mnist.Settings().kernel_fn(mnist.Settings().W_std)
    kernel = np.asarray(kernel_fn(data.x_train, None, "ntk"), np.float64)
    nngp = np.asarray(kernel_fn(data.x_train, None, "nngp"))
    np.testing.assert_allclose(np.diag(nngp), 1, rtol=1e-5)  # V_std² E[φ²] = K*(x, x) = 1
    kernel[np.diag_indices(150)] += 1e-3 * np.trace(kernel) / 150
    alpha = np.linalg.solve(kernel, data.targets_train)
    scores = np.asarray(kernel_fn(data.x_test, data.x_train, "ntk")) @ alpha
    measured = found["measured"]
    assert measured["accuracy"] == np.mean(scores.argmax(1) == data.y_test)
    assert measured["residual"] <= 1e-5
    assert len(measured["residuals"]) == measured["steps"]
    assert [claim["holds"] for claim in found["claims"]] == [True]
    assert measured["peak_bytes"] > 1e8


@pytest.mark.slow
def test_it_tunes_and_keeps_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "TUNED_W_STD", (0.5, 0.9))
    monkeypatch.setattr(mnist, "TUNED_NOISE", (1e-3, 10.0))
    found = run(tmp_path, tune=True, store=str(tmp_path / "kernel"))
    tuned = found["measured"]["tuned"]
    assert len(tuned) == 4
    assert tuned[0]["accuracy"] == max(row["accuracy"] for row in tuned)
    assert found["measured"]["W_std"] == tuned[0]["W_std"]
    assert found["measured"]["plan"]["keep"] == "store"
    with pytest.raises(InputError, match="another kernel"):
        run(tmp_path, store=str(tmp_path / "kernel"), b_std=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"get": "cov"}, "get='cov'"),
        ({"data": "mnist", "data_dir": "nowhere"}, "--data_dir=nowhere has neither"),
        ({"n_train": 60_000}, "--n_train=60000"),
        ({"W_std": 2.0}, "W_std=2"),
    ],
)
def test_settings_that_cannot_be_right(unchecked, options, message, tmp_path):
    with pytest.raises((InputError, NoEquilibriumError), match=message):
        run(tmp_path, **options)


def test_memory_that_there_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("nt_deq.regression.plan.host_memory", lambda: 1e6)
    with pytest.raises(MemoryError, match="needs"):
        run(tmp_path, method="cg", keep="memory")
