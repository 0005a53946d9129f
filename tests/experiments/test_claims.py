"""The launchers that measure the theorems' claims: the numbers that they write, at tiny sizes."""

import numpy as np
import pytest
from launching import launch

import nt_deq
from experiments.claims import covariance, gaussianity, limits, phase, spectrum
from experiments.lib import random_networks
from experiments.lib.workdir import Workdir


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_random_network_is_at_its_equilibrium(activation, tmp_path):
    settings = random_networks.Settings()
    x = settings.inputs(4)
    drawn = random_networks.sample(
        settings, Workdir(tmp_path), x, activation=activation, width=40, count=5
    )
    by_depth = random_networks.sample(
        settings, Workdir(tmp_path), x, activation=activation, width=40, count=5, depths=(1, 2)
    )
    assert drawn["outputs"].shape == (5, 4, 2)
    assert drawn["covariances"].shape == (5, 4, 4)
    assert by_depth["covariances"].shape == (5, 2, 4, 4)
    assert np.linalg.eigvalsh(drawn["covariances"]).min() > -1e-5
    # At depth 1 it is a network of one layer, whose inputs have S as covariance.
    phi = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[activation]
    z = np.random.default_rng(0).multivariate_normal(np.zeros(4), x @ x.T / 10, 100_000)
    one_layer = phi(z).T @ phi(z) / 100_000
    spread = by_depth["covariances"][:, 0].std(axis=0, ddof=1) / np.sqrt(5)
    off = np.abs(by_depth["covariances"][:, 0].mean(axis=0) - one_layer)
    assert np.median(off / spread) < 2


def test_the_edge_is_found_between_the_points_that_were_tried():
    """Of relu `W_std² E[φ'²]` is `W_std²/2` and known or not beyond 1: the edge is √2."""
    points = [{"W_std": 1.0, "local": [0.5, 0.5]}, {"W_std": 1.25, "local": [1.25**2 / 2]}]
    for beyond in (1.5**2 / 2, None):
        found = phase._crossing([*points, {"W_std": 1.5, "local": [beyond]}])
        assert found == pytest.approx(2**0.5, rel=1e-6)
    assert phase._crossing(points) is None


def test_blocks_of_networks_are_kept_and_independent_of_their_size(tmp_path, monkeypatch):
    def draw(path):
        settings = random_networks.Settings()
        x = settings.inputs(2)
        return random_networks.sample(
            settings, Workdir(path), x, activation="relu", width=8, count=7
        )["outputs"]

    whole = draw(tmp_path / "whole")
    assert len(np.unique(whole[:, 0, 0])) == 7
    monkeypatch.setattr(random_networks, "BLOCK", 3 * 8**2)
    np.testing.assert_allclose(draw(tmp_path / "blocks"), whole, rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "blocks" / "parts").iterdir())) == 3

    def fail(*args, **kwargs):
        raise AssertionError("networks were drawn again")

    monkeypatch.setattr(random_networks, "_draw", fail)
    np.testing.assert_allclose(draw(tmp_path / "blocks"), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_covariance(tmp_path):
    settings = covariance.Settings(
        inputs_count=4, mean_width=64, networks=300, widths=(16, 64, 256), repeats=8,
        samples=1000, limits=8,
    )  # fmt: skip
    numbers = launch(covariance, settings, tmp_path)
    found = numbers["measured"]
    # An estimate of Σ* by so many draws is as far off as a network of that width.
    expected = found["tanh"]["error_times_width"] / settings.samples + found["tanh"]["mean_error"]
    assert np.mean(numbers["errors_to_sampled_limits"]) == pytest.approx(expected, rel=0.7)
    x = np.random.default_rng(0).standard_normal((4, 10))
    for activation in ("tanh", "relu"):
        f = found[activation]
        limit, mean = np.array(f["limit"]), np.array(f["mean_covariance"])
        k = np.asarray(nt_deq.deq_kernel(x, W_std=0.6, activation=activation).nngp)
        if activation == "relu":
            np.testing.assert_allclose(np.diag(limit), np.diag(k) / 2, rtol=1e-5)
        np.testing.assert_allclose(0.36 * limit + x @ x.T / 10, k, atol=1e-5)
        error = np.sum((mean - limit) ** 2) / np.sum(limit**2)
        assert f["mean_error"] == pytest.approx(error)
        assert error < 4 * f["chance_error"] + 15 / 64**2
        assert f["chance_error"] < np.mean(f["single_errors"][1]) / 200
        assert f["slope"]["exponent"] == pytest.approx(-1, abs=0.25)


@pytest.mark.slow
def test_gaussianity(tmp_path):
    settings = gaussianity.Settings(inputs_count=2, widths=(4, 150), networks=400)
    found = launch(gaussianity, settings, tmp_path)["measured"]
    for activation in ("tanh", "relu"):
        narrow, wide = found[activation]["4"], found[activation]["150"]
        assert wide["lilliefors"]["p_value"] > 1e-3
        assert wide["covariance_test"]["p_value"] > 1e-3
        assert wide["lilliefors"]["critical"] == pytest.approx(0.886 / 20, rel=0.05)
        assert wide["plain_ks_p_value"] > wide["lilliefors"]["p_value"]
        assert abs(wide["correlation_of_squares"]) < 4 / np.sqrt(400)
    narrow = found["relu"]["4"]  # one of sixteen has no active neuron, others a few
    assert narrow["lilliefors"]["p_value"] < 0.01
    assert narrow["mardia_kurtosis"]["p_value"] < 1e-6
    assert narrow["independence_p_value"] < 1e-3


@pytest.mark.slow
def test_limits(tmp_path):
    settings = limits.Settings(inputs_count=3, widths=(16, 128), mlp_widths=(8, 64), networks=40)
    found = launch(limits, settings, tmp_path)["measured"]
    for activation in ("tanh", "relu"):
        f = found[activation]
        assert f["measured_rate"] == pytest.approx(f["rate"], rel=0.1)
        ratios = np.divide(f["kernel_errors"][5:9], f["kernel_errors"][4:8])
        assert (ratios < 1.3 * f["rate"] ** 2).all()
        for width, scale in (("16", 16), ("128", 128)):
            own, equilibrium = (
                f["grid"][width][k] for k in ("of_this_depth", "of_the_equilibrium")
            )
            np.testing.assert_allclose(  # depth 30 is the equilibrium
                own["mean_error"][-1], equilibrium["mean_error"][-1], rtol=1e-5
            )
            assert 1 < scale * equilibrium["median_single_error"][-1] < 12
            assert own["mean_error"][-1] < 6 * own["chance_error"][-1] + 15 / scale**2
    assert found["relu"]["rate"] == pytest.approx(0.18)
    mlp = found["mlp"]
    np.testing.assert_allclose(mlp["correlation_gap"][-1], 4.43e-7, rtol=3e-3)
    assert mlp["smallest_eigenvalue"][-1] < 1e-5
    narrow, wide = (mlp["grid"][w]["median_single_error"] for w in ("8", "64"))
    assert narrow[0] > 3 * wide[0]
    assert narrow[-1] > 0.6  # almost all of it: narrow and deep, a network goes to 0
    assert wide[-1] > 3 * wide[0]


@pytest.mark.slow
def test_spectrum(tmp_path):
    settings = spectrum.Settings(inputs_count=4, counts=(4, 12), widths=(16, 256), repeats=4)
    found = launch(spectrum, settings, tmp_path)["measured"]
    x = np.random.default_rng(0).standard_normal((14, 10))
    for activation in ("tanh", "relu"):
        f = found[activation]
        solution = nt_deq.deq_kernel(x[:4], W_std=0.6, activation=activation)
        covariance_limit = (np.asarray(solution.nngp) - x[:4] @ x[:4].T / 10) / 0.36
        smallest = np.linalg.eigvalsh(covariance_limit)[0]
        assert f["by_W_std"]["0.6"]["nngp"]["value"] == pytest.approx(smallest, abs=1e-5)
        assert f["limit"] == pytest.approx(smallest, abs=1e-5)
        for case in (*f["by_W_std"].values(), *f["by_count"].values()):
            assert case["nngp"]["positive"]
            assert case["ntk"]["value"] > case["nngp"]["value"]
        assert np.mean(f["finite"]["16"]) < np.mean(f["finite"]["256"])
        assert np.mean(f["finite"]["256"]) == pytest.approx(smallest, rel=0.3)
    assert [case["positive"] for case in found["exceptions"].values()] == [False] * 3 + [True] * 3
    mlp = [case["value"] for case in found["mlp"]]
    assert mlp[-1] < 1e-3 * max(mlp)


@pytest.mark.slow
def test_phase(tmp_path):
    settings = phase.Settings(inputs_count=2, points=5, width=150, networks=2)
    found = launch(phase, settings, tmp_path)["measured"]
    for points in found.values():
        assert [p["W_std"] for p in points] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
        np.testing.assert_allclose([p["global"] for p in points], [0.8, 1.6, 2.4, 3.2, 4.0])
        for p in points[:2]:
            assert p["converged"] == 1
            np.testing.assert_allclose(p["spectral_radii"], p["local"][0] ** 0.5, rtol=0.25)
    relu = found["relu"]
    np.testing.assert_allclose(
        [p["local"] for p in relu], [[p["W_std"] ** 2 / 2] * 2 for p in relu]
    )
    np.testing.assert_allclose([p["kernel_rate"] for p in relu[:3]], [0.08, 0.32, 0.72])
    assert [p["kernel_rate"] for p in relu[3:]] == [None, None]
    assert [p["converged"] for p in relu[3:]] == [0, 0]
    tanh = [max(p["local"]) for p in found["tanh"]]
    assert (np.diff(tanh) > 0).all()
    assert tanh[0] < 0.16 / 1.5  # tanh' is below 1
