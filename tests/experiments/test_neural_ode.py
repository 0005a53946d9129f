"""Neural ODEs against their limit: the numbers that are written, at tiny sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from launching import launch

from experiments.claims import neural_ode
from experiments.lib import odes
from experiments.lib.odes import Ode
from nt_deq.flax import to_stax

TINY = neural_ode.Settings(
    activation="erf", inputs_count=3, widths=(16, 128), seeds=4, mean_width=64, networks=240,
    ntk_widths=(16, 128), trained_widths=(16, 128), trained_seeds=3, steps=3, fitted=8,
    kernel_layers=(4, 8, 16), counts=(3, 6), n_train=40, n_test=30,
)  # fmt: skip


def euler(ode, layers, network, x):
    """The state of a finite network after so many layers, in NumPy."""
    ((_, (W, _)), (U, _)), _, (V, _) = to_stax(network)
    W, U, V = (np.asarray(a, np.float64) for a in (W, U, V))
    z = x @ U / x.shape[1] ** 0.5
    for _ in range(layers):
        z = z + ode.T / layers * (np.tanh(z) @ W * ode.W_std / len(W) ** 0.5 - ode.leak * z)
    return z, V


def test_the_networks_that_are_drawn(promotion):
    """Outputs, covariances, NTKs and errors of residual networks, from the parameters alone."""
    ode, width, x = Ode(0.9, "tanh", T=0.8, leak=0.2, steps=3), 12, np.ones((2, 5), np.float32)
    x[1] = [1, -2, 0, 1, 3]
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = odes.sample(keys, x=x, ode=ode, width=width, outputs=2)
    ntks = odes.empirical_ntks(keys, x=x, ode=ode, width=width)["ntk"]
    errors = odes.residual_errors(keys, x=x, ode=Ode(0.9, "tanh"), width=width, steps=(2, 4))
    for i, key in enumerate(keys):
        z, V = euler(ode, 3, ode.network(5, width, 2, nnx.Rngs(params=key)), x)
        h = np.tanh(z)
        np.testing.assert_allclose(drawn["outputs"][i], h @ V / width**0.5, atol=1e-5)
        np.testing.assert_allclose(drawn["covariances"][i], h @ h.T / width, atol=1e-5)
        network = ode.network(5, width, 1, nnx.Rngs(params=key))
        graph, params = nnx.split(network)
        jacobian = jax.jacfwd(lambda p, g=graph: nnx.merge(g, p)(jnp.asarray(x))[:, 0])(params)
        flat = np.concatenate([a.reshape(2, -1) for a in jax.tree.leaves(jacobian)], axis=1)
        np.testing.assert_allclose(ntks[i], flat @ flat.T, rtol=1e-4)
        plain = Ode(0.9, "tanh")
        network = plain.network(5, width, 1, nnx.Rngs(params=key))
        limit = euler(plain, 20_000, network, x)[0]
        for j, layers in enumerate((2, 4)):
            off = np.linalg.norm(euler(plain, layers, network, x)[0] - limit)
            # 20,000 layers are 1e-4 of what 2 are from the ODE.
            assert errors["errors"][i, j] == pytest.approx(off / np.linalg.norm(limit), rel=1e-3)


def test_the_exponent_that_errors_tend_to():
    """To a multiple of 1/L², where exponents between two L are a few per cent off."""
    errors = {L: 3 / L * (1 + 0.7 / L) for L in (1, 4, 8, 16)}
    assert neural_ode.limiting_exponent(errors) == pytest.approx(-1, abs=0.01)
    squares = {L: 3 / L**2 * (1 + 0.7 / L) for L in (4, 8, 16)}
    assert neural_ode.limiting_exponent(squares) == pytest.approx(-2, abs=0.01)


@pytest.mark.slow
def test_the_numbers_that_it_writes(tmp_path):
    found = launch(neural_ode, TINY, tmp_path)["measured"]
    process, layers = found["process"], found["layers"]
    for name in ("covariance_errors", "ntk_errors"):
        assert np.mean(process[name]["16"]) > 1.5 * np.mean(process[name]["128"])  # theory: 2.8
    assert process["mean_error"] < 4 * process["chance_error"] + 15 / 64**2
    assert process["covariance_test"]["p_value"] > 1e-3
    distances = found["training"]["distances"]
    assert np.mean(distances["16"]) > 1.5 * np.mean(distances["128"])
    for of in found["training"]["losses"].values():
        np.testing.assert_allclose(of["network"][0], of["closed_form"][0], rtol=1e-6)
        assert np.mean(of["network"][1]) < np.mean(of["network"][0])
    for exponent in layers["kernel_exponents"].values():
        assert exponent == pytest.approx(-1, abs=0.05)
    assert layers["network_slope"]["exponent"] == pytest.approx(-1, abs=0.05)
    exceptions = [case["positive"] for case in found["definiteness"]["exceptions"].values()]
    assert exceptions == [False, False, True, True]
    assert found["ties"]["error_to_untied"] > 3 * found["ties"]["error_to_tied"]
    errors = np.array(list(found["equilibrium"]["errors"].values()))
    assert (errors[-1] < 1e-2 * errors[0]).all()
    assert all(0 <= of["error"] < 0.8 for of in found["images"].values())
