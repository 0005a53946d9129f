"""Gradient descent against the NTK's closed form: the numbers that are written, at tiny sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch, part

from experiments.claims import dynamics
from experiments.lib import training
from experiments.lib.data import load
from experiments.lib.networks import Architecture, draw
from experiments.lib.workdir import Workdir

TINY = dynamics.Settings(
    n_train=8, n_test=10, widths=(16, 256), seeds=4, steps=4, ntk_inputs=3, float64=True
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamics")
    found = launch(dynamics, TINY, path)["measured"]

    return found, part(path, "infinite"), {w: part(path, f"width-{w}") for w in TINY.widths}


def check_closed_form(found, limit, networks, targets):
    """Against the same by powers of a matrix; `found` as in results.json."""
    theta, to_test = limit["ntk_train_train"], limit["ntk_test_train"]
    step, n = limit["learning_rate"] / targets.size, len(targets)
    for width, trained in networks.items():
        e = found["ensembles"][str(width)]
        for i, k in enumerate(found["steps"]):
            decays = [np.linalg.matrix_power(np.eye(n) - step * theta, j) for j in range(k + 1)]
            for s in range(trained["outputs"].shape[1]):
                start, after = trained["outputs"][0, s], trained["outputs"][i, s]
                residuals = [decay @ (start[:n] - targets) for decay in decays]
                expected = start[n:] - step * to_test @ sum(residuals[:k], 0 * residuals[0])
                loss = np.mean((after[:n] - targets) ** 2) / 2
                closed = np.mean(residuals[k] ** 2) / 2
                assert e["loss"][i][s] == pytest.approx(loss, rel=1e-12)
                assert e["closed_form_loss"][i][s] == pytest.approx(closed, rel=1e-10)
                assert e["loss_deviation"][i][s] == pytest.approx(abs(loss / closed - 1), abs=1e-9)
                distance = np.sqrt(np.mean((after[n:] - expected) ** 2))
                assert e["distance"][i][s] == pytest.approx(distance, abs=1e-10)


def test_the_closed_form_is_a_power_of_a_matrix(tmp_path):
    data, rng = load("digits", None, 5, 4, seed=0), np.random.default_rng(0)
    features = rng.normal(size=(9, 30)) / 30**0.5
    theta = features @ features[:5].T
    shape = (3, 2, 9, len(data.classes))
    networks = {
        width: {"outputs": rng.normal(size=shape), "ntk": rng.normal(size=(3, 2, 2, 2))}
        for width in (10, 20)
    }
    limit = {"ntk_train_train": theta[:5], "ntk_test_train": theta[5:]}
    limit["learning_rate"] = 0.3 * data.targets_train.size / np.linalg.norm(theta[:5], 2)
    Workdir(tmp_path).write_json("found.json", dynamics.measure(data, [0, 1, 5], limit, networks))
    found = json.loads((tmp_path / "found.json").read_text())
    check_closed_form(found, limit, networks, data.targets_train)
    for width in ("10", "20"):
        assert found["ensembles"][width]["distance"][0] == pytest.approx([0, 0], abs=1e-12)
        assert min(found["ensembles"][width]["distance"][1]) > 0.5


@pytest.mark.slow
def test_the_numbers_that_it_writes(run):
    found, limit, networks = run
    assert found["steps"] == [0, 1, 2, 4]
    np.testing.assert_allclose(found["times"], np.multiply(found["steps"], limit["learning_rate"]))
    check_closed_form(found, limit, networks, load("digits", None, 8, 10, seed=0).targets_train)
    for width, trained in networks.items():
        e, ntk = found["ensembles"][str(width)], trained["ntk"]
        assert ntk.shape == (4, TINY.seeds, 3, 3)
        assert e["ntk_drift"][0] == [0] * TINY.seeds
        assert (np.array(e["ntk_drift"])[1:] > 0).all()
        drift = np.linalg.norm(ntk[-1] - ntk[0], axis=(1, 2)) / np.linalg.norm(ntk[0], axis=(1, 2))
        np.testing.assert_allclose(e["ntk_drift"][-1], drift, rtol=1e-12)
        theta = limit["ntk_train_train"][:3, :3]
        error = [np.linalg.norm(a - theta) / np.linalg.norm(theta) for a in ntk[0]]
        np.testing.assert_allclose(e["ntk_error"], error, rtol=1e-12)


@pytest.mark.slow
def test_all_distances_fall_with_width(run):
    found, _, _ = run
    narrow, wide = (found["ensembles"][width] for width in ("16", "256"))
    for name in ("distance", "ntk_drift", "loss_deviation"):
        assert np.mean(narrow[name][-1]) > 2 * np.mean(wide[name][-1])  # theory: 4 and more
    assert np.mean(narrow["ntk_error"]) > 2 * np.mean(wide["ntk_error"])
    x, y = np.repeat(np.log([16, 256]), 4), np.log([narrow["distance"][-1], wide["distance"][-1]])
    slope = np.polyfit(x, y.ravel(), 1)[0]
    assert found["distance_fits"][-1]["exponent"] == pytest.approx(slope)
    assert found["local_slopes"] == [found["distance_fits"][-1]]  # there are two widths
    assert found["distance_leading"][-1]["exponent"] == pytest.approx(slope, abs=0.1)
    assert found["ntk_leading"]["orders"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [Architecture(0.6, 1.0, 0.0, "relu"), Architecture(0.7, 1.3, 0.4, "tanh")]
)
def test_the_empirical_ntk_is_that_of_500_layers(architecture, x64):
    data = load("digits", None, 4, 1, seed=0)
    x, y, width = data.x_train, data.targets_train, 10
    trained = training.train(
        architecture, width, x, y, data.x_test, learning_rate=1.0, steps=[0], seeds=2, seed=3,
        progress=lambda steps: None, ntk_inputs=3,
    )  # fmt: skip
    phi = {"relu": jax.nn.relu, "tanh": jnp.tanh}[architecture.activation]

    def unrolled(weights):
        W, U, V, b = weights
        injected = architecture.U_std * x[:3] @ U / 8 + architecture.b_std * b

        def layer(_, z):
            return architecture.W_std / width**0.5 * phi(z) @ W + injected

        z = jax.lax.fori_loop(0, 500, layer, jnp.zeros((3, width)))
        return phi(z) @ V / width**0.5

    networks, params = draw(architecture, 64, width, y.shape[1], seeds=2, seed=3)

    def weights(network):
        inject = network.deq.inject
        b = inject.b[...] if architecture.b_std else jnp.zeros(width)
        return network.deq.hidden.W[...], inject.W[...], network.readout.W[...], b

    for seed in range(2):
        drawn = weights(networks.one(jax.tree.map(lambda leaf, s=seed: leaf[s], params)))
        ntk = jnp.zeros((3, 3))
        for jacobian in jax.jacfwd(unrolled)(drawn):
            flat = jacobian.reshape(3, y.shape[1], -1)
            ntk += jnp.einsum("icp,jcp->ij", flat, flat) / y.shape[1]
        np.testing.assert_allclose(trained["ntk"][0, seed], ntk, rtol=1e-11)
