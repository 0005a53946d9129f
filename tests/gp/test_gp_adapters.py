"""The kernel in tinygp and GPJax does what `nt_deq.gp` does."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nt_deq import gp, stax

NOISE = 0.2


def make_kernel(p):
    return stax.serial(stax.DEQ(1, p["W_std"], b_std=p["b_std"]), stax.Dense(1))[2]


def data():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((12, 3), (12,), (4, 3)))


def reference(p, x, y, get):
    return gp.GaussianProcess(make_kernel(p), x, y, NOISE, get).log_marginal_likelihood()


@pytest.mark.slow
@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_tinygp(x64, get):
    tinygp = pytest.importorskip("tinygp")
    from nt_deq.tinygp import StaxKernel

    x, y, x_test = data()
    p = {"W_std": 0.9, "b_std": 0.4}

    def process(p):
        return tinygp.GaussianProcess(StaxKernel(make_kernel, p, get), x, diag=NOISE)

    found, gradient = jax.value_and_grad(lambda p: process(p).log_probability(y))(p)
    expected, expected_gradient = jax.value_and_grad(reference)(p, x, y, get)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for name in p:
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-9)

    conditioned = process(p).condition(y, x_test).gp
    mean, variance = gp.GaussianProcess(make_kernel(p), x, y, NOISE, get).posterior(x_test)
    np.testing.assert_allclose(conditioned.mean, mean, rtol=1e-10)
    # tinygp adds √ε to the diagonal of what it conditions.
    np.testing.assert_allclose(conditioned.variance, variance, atol=2e-8)

    kernel = StaxKernel(make_kernel, p, get)
    np.testing.assert_allclose((2.0 * kernel)(x, x_test), 2 * kernel(x, x_test), rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_gpjax(x64, promotion, get):
    gpjax = pytest.importorskip("gpjax")
    from gpjax.parameters import PositiveReal, SigmoidBounded, val

    from nt_deq.gpjax import StaxKernel

    x, y, x_test = data()
    W_std = SigmoidBounded(jnp.array(0.9), high=gp.largest_W_std("relu"))
    kernel = StaxKernel(make_kernel, {"W_std": W_std, "b_std": PositiveReal(jnp.array(0.4))}, get)
    prior = gpjax.gps.Prior(kernel, gpjax.mean_functions.Zero(), jitter=0.0)
    model = prior * gpjax.likelihoods.Gaussian(NOISE**0.5)
    observed = gpjax.Dataset(x, y[:, None])
    p = {"W_std": 0.9, "b_std": 0.4}
    args = (make_kernel(p), x, y, NOISE, get)

    found = gpjax.objectives.conjugate_mll(model, observed)
    np.testing.assert_allclose(
        found, gp.GaussianProcess(*args).log_marginal_likelihood(), rtol=1e-10
    )
    left_out = gpjax.objectives.conjugate_loocv(model, observed)
    np.testing.assert_allclose(
        left_out, -gp.GaussianProcess(*args).leave_one_out_loss(), rtol=1e-10
    )

    predicted = model.predict(x_test, observed)
    mean, variance = gp.GaussianProcess(*args[:-1], get).posterior(x_test)
    np.testing.assert_allclose(predicted.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(predicted.variance, variance, rtol=1e-8)
    np.testing.assert_allclose(
        kernel.diagonal(x).as_matrix(), np.diag(np.diag(kernel.gram(x).as_matrix())), rtol=1e-12
    )

    def minus(model, observed):
        return -gpjax.objectives.conjugate_mll(model, observed)

    trained, _ = gpjax.fit_lbfgs(model=model, objective=minus, train_data=observed)
    best = {name: float(val(v)) for name, v in trained.prior.kernel.parameters.items()}
    noise = float(val(trained.likelihood.obs_stddev)) ** 2
    bounds = {"W_std": (0, gp.largest_W_std("relu"))}
    fitted = gp.fit(make_kernel, x, y, {**p, "noise": NOISE}, bounds=bounds, get=get, restarts=0)
    found = gp.GaussianProcess(make_kernel(best), x, y, noise, get).log_marginal_likelihood()
    np.testing.assert_allclose(-found, fitted.loss, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "missing"), [("sklearn", "sklearn"), ("tinygp", "tinygp"), ("gpjax", "gpjax")]
)
def test_a_missing_library_is_named_with_how_to_install_it(tmp_path, module, missing):
    """As a user meets it, who has the package without its extras."""
    program = f"""
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
import nt_deq.{module}
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: nt_deq.{module} needs {missing}")
    assert last.endswith(f'python -m pip install ".[{module}]"')
