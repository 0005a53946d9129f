"""neural-tangents computes under the bridges what it should."""

# neural-tangents types a kernel as any tree of kernels.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import nt_deq  # noqa: F401  (makes neural-tangents importable: first)

# isort: split
import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
import stax_layers
from marks import slow_except
from neural_tangents import stax

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("x64")]


def data(n=6, n_test=3, d=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(n, 2)), rng.normal(size=(n_test, d))


MLP = stax.serial(stax.Dense(256, 1.3, 0.1), stax.Erf(), stax.Dense(2, 1.1, 0.2))


def gradient_flow(k_tt, k_st, y, t):
    """Mean predictions on the training and the test set after time t, from zero."""
    value, vector = np.linalg.eigh(k_tt)
    decay = (vector * np.expm1(-value * t / y.size)) @ vector.T
    return -decay @ y, -k_st @ np.linalg.solve(k_tt, decay @ y)


@pytest.mark.parametrize("traced", [False, True])
def test_gradient_descent_mse(traced):
    x, y, x_test = data()
    k_tt, k_st = MLP[2](x, None, "ntk"), MLP[2](x_test, x, "ntk")

    def predict(k_tt, k_st, t):
        return nt.predict.gradient_descent_mse(k_tt, y)(t, 0.0, 0.0, k_st)

    if traced:
        predict = jax.jit(predict)
    for t, limit in ((3.0, 3.0), (None, np.inf)):
        for found, expected in zip(
            predict(k_tt, k_st, t), gradient_flow(k_tt, k_st, y, limit), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=1e-9)


def test_gradient_descent_mse_under_two_transformations():
    x, y, _ = data()
    k = MLP[2](x, None, "ntk")

    def loss(scale, t):
        fx = nt.predict.gradient_descent_mse(scale * k, y)(t, 0.0)
        return ((fx - y) ** 2).sum()

    times = jnp.array([0.5, 2.0])
    slope = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(1.0, times)
    step = 1e-5
    expected = [(loss(1 + step, t) - loss(1 - step, t)) / (2 * step) for t in times]
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_gradient_descent_mse_ensemble():
    x, y, x_test = data()
    predict = nt.predict.gradient_descent_mse_ensemble(MLP[2], x, y)
    both = predict(t=None, x_test=x_test, get=("nngp", "ntk"), compute_cov=True)
    kernel = {
        get: [np.asarray(MLP[2](*pair, get)) for pair in ((x, None), (x_test, x), (x_test, None))]
        for get in ("nngp", "ntk")
    }
    for get, posterior in (("nngp", both.nngp), ("ntk", both.ntk)):
        k_tt, k_st, _ = kernel[get]
        np.testing.assert_allclose(posterior.mean, k_st @ np.linalg.solve(k_tt, y), atol=1e-7)
    n_tt, n_st, n_ss = kernel["nngp"]
    a = kernel["ntk"][1] @ np.linalg.inv(kernel["ntk"][0])
    np.testing.assert_allclose(
        both.nngp.covariance, n_ss - n_st @ np.linalg.solve(n_tt, n_st.T), atol=1e-7
    )
    np.testing.assert_allclose(
        both.ntk.covariance, n_ss + a @ n_tt @ a.T - a @ n_st.T - n_st @ a.T, atol=1e-7
    )
    finite = predict(t=3.0, x_test=x_test, get="ntk")
    expected = gradient_flow(*kernel["ntk"][:2], y, 3.0)[1]
    np.testing.assert_allclose(finite, expected, atol=1e-9)


def test_gp_inference():
    x, y, x_test = data()
    k_tt, k_st = MLP[2](x, None), MLP[2](x_test, x)
    predict = nt.predict.gp_inference(k_tt, y, diag_reg=0.1, diag_reg_absolute_scale=True)
    posterior = predict("nngp", k_st, MLP[2](x_test, None, "nngp"))
    regular = np.asarray(k_tt.nngp) + 0.1 * np.eye(len(x))
    np.testing.assert_allclose(
        posterior.mean, np.asarray(k_st.nngp) @ np.linalg.solve(regular, y), atol=1e-9
    )
    assert (np.linalg.eigvalsh(posterior.covariance) > 0).all()


def test_max_learning_rate():
    x, y, _ = data()
    k = MLP[2](x, None, "ntk")
    expected = 2 * y.size / np.linalg.eigvalsh(k)[-1]
    found = nt.predict.max_learning_rate(k, y_train_size=y.size)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("store_on_device", [True, False])
def test_batch(store_on_device):
    x, _, x_test = data(n=6, n_test=4)
    batched = nt.batch(MLP[2], batch_size=2, store_on_device=store_on_device)
    for pair in ((x, None), (x_test, x)):
        for get in ("nngp", "ntk"):
            np.testing.assert_allclose(batched(*pair, get), MLP[2](*pair, get), rtol=1e-12)


def test_monte_carlo_kernel_fn():
    x, _, x_test = data()
    init_fn, apply_fn, kernel_fn = MLP
    sampled = nt.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.PRNGKey(0), 200)
    for get in ("nngp", "ntk"):
        expected = kernel_fn(x_test, x, get)
        error = np.abs(sampled(x_test, x, get) - expected).max() / np.abs(expected).max()
        assert error < 0.2, get  # 400 outputs: a standard deviation is at most 0.07


def convolutional():
    init_fn, apply_fn, _ = stax.serial(
        stax.Conv(4, (3, 3), padding="SAME"),
        stax.Relu(),
        stax.AvgPool((2, 2), (2, 2)),
        stax.Conv(3, (2, 2), padding="CIRCULAR", b_std=0.1),
        stax.Gelu(),
        stax.Flatten(),
        stax.Dense(2, b_std=0.1),
    )
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2))
    return apply_fn, init_fn(jax.random.PRNGKey(0), x.shape)[1], x


def slicing():
    """Slices, concatenation and products: what newer JAX keeps the transposes of to itself."""

    def apply_fn(params, x):
        w, b = params
        h = jnp.tanh(x @ w)[:, 1:]
        h = jnp.concatenate([h, h[:, :2] * b], axis=1)
        return h @ h.T[:, :2] + x @ jax.lax.dynamic_slice(w, (0, 1), (4, 2)) + w[:, 0].sum()

    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=2))
    return apply_fn, params, rng.normal(size=(3, 4))


NETWORKS = pytest.mark.parametrize(
    "network", [pytest.param(convolutional, marks=pytest.mark.slow), slicing]
)


@pytest.mark.usefixtures("promotion")  # slicing, by neural-tangents
@pytest.mark.parametrize(
    "implementation",
    slow_except(set(nt.NtkImplementation) - {nt.NtkImplementation.AUTO}, nt.NtkImplementation),
)
@NETWORKS
def test_empirical_ntk_fn(network, implementation):
    apply_fn, params, x = network()
    jacobian = jax.jacobian(lambda p: apply_fn(p, x))(params)
    rows = [np.asarray(leaf).reshape(6, -1) for leaf in jax.tree_util.tree_leaves(jacobian)]
    expected = sum(row @ row.T for row in rows).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3)
    ntk_fn = nt.empirical_ntk_fn(
        apply_fn, trace_axes=(), vmap_axes=None, implementation=implementation
    )
    np.testing.assert_allclose(ntk_fn(x, None, params), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("promotion")  # slicing, by neural-tangents
@NETWORKS
def test_empirical_kernels(network):
    apply_fn, params, x = network()
    kernel = nt.empirical_kernel_fn(apply_fn, trace_axes=())(x, None, ("nngp", "ntk"), params)
    fx = apply_fn(params, x)
    np.testing.assert_allclose(kernel.nngp, np.einsum("ia,jb->ijab", fx, fx), rtol=1e-12)
    vector = np.random.default_rng(0).normal(size=fx.shape)
    product = nt.empirical_ntk_vp_fn(apply_fn, x, None, params)(vector)
    expected = np.einsum("ijab,jb->ia", kernel.ntk, vector)
    np.testing.assert_allclose(product, expected, rtol=1e-9)


def test_linearize_and_taylor_expand():
    def quadratic(w, x):
        return x @ w**2

    x, w, dw = np.arange(6.0).reshape(2, 3), jnp.array([1.0, -2.0, 0.5]), jnp.array([0.1, 0.2, 0.3])
    linear = x @ (w**2 + 2 * w * dw)
    np.testing.assert_allclose(nt.linearize(quadratic, w)(w + dw, x), linear, rtol=1e-12)
    np.testing.assert_allclose(
        nt.taylor_expand(quadratic, w, 2)(w + dw, x), quadratic(w + dw, x), rtol=1e-12
    )


QUICK = ("gelu", "residual", "layer_norm")


@pytest.mark.parametrize(
    "name",
    slow_except(QUICK, stax_layers.networks(stax)),
)
def test_kernels_are_those_of_unpatched_neural_tangents(name):
    network, shape = stax_layers.networks(stax)[name]
    found = stax_layers.kernels(name, network, shape)
    with np.load(stax_layers.REFERENCE) as reference:
        for key, kernel in found.items():
            scale = np.abs(reference[key]).max()
            np.testing.assert_allclose(kernel, reference[key], atol=1e-7 * scale, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_valid", "avg_pool", "attention", "masked_conv", "residual"])
def test_finite_networks_follow_their_kernels(name):
    (init_fn, apply_fn, kernel_fn), shape = stax_layers.networks(stax)[name]
    pair, kwargs = stax_layers.arguments(name, shape, x2_given=True)
    unmasked = stax.unmask_fn(apply_fn)
    sampled = nt.monte_carlo_kernel_fn(init_fn, unmasked, jax.random.PRNGKey(1), 400)
    expected = np.asarray(kernel_fn(*pair, "nngp", **kwargs))
    found = np.asarray(sampled(*pair, "nngp", **kwargs))
    assert np.abs(found - expected).max() < 0.25 * np.abs(expected).max()
