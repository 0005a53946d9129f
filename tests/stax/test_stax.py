"""`stax.DEQ` as a neural-tangents layer: its kernels, its finite network, and what composes."""

# neural-tangents types a kernel as any tree of kernels.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from jax import random
from marks import slow_except

import nt_deq
from nt_deq import Newton, NoEquilibriumError, NotConvergedError, Picard, stax

X = np.array([[1, 2, -1], [0.5, -1, 2], [2, 0, 1]])
# Σ_f(0,1), Θ_f(0,1) with V_std = 1, from independent quadrature.
READOUT = {
    ("relu", 0.6, 1.0, None): (0.1276975745, -0.0730514147),
    ("relu", 1.2, 1.0, 0.3): (1.3337502022, 1.7048130293),
    ("erf", 0.8, 1.0, 0.1): (-0.3280281036, -0.7617709144),
    ("gelu", 0.9, 1.0, 0.1): (0.1394898933, -0.0876655950),
    ("sin", 0.7, 1.0, None): (-0.1958808095, -0.5231168171),
}

FLOAT32_IS_SLOW = pytest.mark.parametrize(
    "dtype", slow_except(["float64"], ["float32", "float64"]), indirect=True
)


def network(width=64, out=1, activation="relu", W_std=0.6, U_std=1.0, b_std=0.1, **kwargs):
    return stax.serial(
        stax.DEQ(width, W_std, U_std, b_std, activation=activation, **kwargs), stax.Dense(out)
    )


def inputs(n=4, d=5, seed=0):
    return random.normal(random.key(seed), (n, d))


@pytest.mark.smoke
@pytest.mark.parametrize("setting", READOUT, ids=str)
def test_the_table(dtype, setting):
    activation, W_std, U_std, b_std = setting
    _, _, kernel_fn = network(1, 1, activation, W_std, U_std, b_std)
    kernels = kernel_fn(jnp.asarray(X, dtype), None, ("nngp", "ntk"))
    ours = np.array([kernels.nngp[0, 1], kernels.ntk[0, 1]])
    rtol = 1e-9 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(ours, READOUT[setting], rtol=rtol)


@pytest.mark.smoke
@FLOAT32_IS_SLOW
def test_every_form_of_get_and_of_x2_agrees(dtype):
    _, _, kernel_fn = network(activation="gelu")
    x1, x2 = inputs(), inputs(3, seed=1)
    for args in ((x1,), (x1, x2)):
        full = kernel_fn(*args)
        assert isinstance(full, nt.Kernel)
        assert (full.cov2 is None) == (len(args) == 1)
        both = kernel_fn(*args, get=("ntk", "nngp", "cov1"))
        jitted = jax.jit(lambda *a: kernel_fn(*a, get=("nngp", "ntk")))(*args)
        tight = dict(rtol=50 * jnp.finfo(dtype).eps, atol=50 * jnp.finfo(dtype).eps)
        for name in ("nngp", "ntk"):
            np.testing.assert_array_equal(kernel_fn(*args, get=name), getattr(full, name))
            np.testing.assert_array_equal(getattr(both, name), getattr(full, name))
            np.testing.assert_allclose(getattr(jitted, name), getattr(full, name), **tight)
    whole = kernel_fn(jnp.concatenate([x1, x2]))
    np.testing.assert_allclose(full.ntk, whole.ntk[:4, 4:], **tight)
    np.testing.assert_allclose(full.cov1, jnp.diag(whole.nngp)[:4], **tight)
    np.testing.assert_allclose(full.cov2, jnp.diag(whole.nngp)[4:], **tight)
    assert kernel_fn(x1, x2, "nngp").dtype == dtype


def test_it_is_deq_kernel(x64):
    x1, x2 = inputs(), inputs(3, seed=1)
    ours = nt_deq.deq_kernel(x1, x2, W_std=0.8, U_std=1.1, b_std=0.2, activation="erf")
    kernels = stax.DEQ(1, 0.8, 1.1, 0.2, activation="erf")[2](x1, x2)
    dual, dual_slope = nt_deq.activations.ACTIVATIONS["erf"].dual(
        *(jnp.diag(nt_deq.deq_kernel(x, W_std=0.8, U_std=1.1, b_std=0.2, activation="erf").nngp)
          for x in (x1[:3], x2)),
        jnp.diag(ours.nngp),
    )  # fmt: skip
    np.testing.assert_allclose(jnp.diag(kernels.nngp), dual, rtol=1e-14)
    np.testing.assert_allclose(jnp.diag(kernels.ntk), dual_slope * jnp.diag(ours.ntk), rtol=1e-13)


@pytest.mark.parametrize("solver", [Newton(), Picard()], ids=repr)
def test_solvers_agree(x64, solver):
    x = inputs()
    kernels = network(activation="sin", W_std=0.9, solver=solver)[2](x)
    reference = network(activation="sin", W_std=0.9)[2](x)
    np.testing.assert_allclose(kernels.ntk, reference.ntk, rtol=1e-12)


def unrolled_standard(x, width, W_std, U_std, b_std, layers=200):
    """Explicit layers in standard parameterisation."""
    inject = stax.Dense(width, U_std, b_std, parameterization="standard")[2]
    cell = stax.serial(stax.Relu(), stax.Dense(width, W_std, parameterization="standard"))[2]
    s = inject(x)
    k = s
    for _ in range(layers):
        new = cell(k)
        k = new.replace(nngp=new.nngp + s.nngp, ntk=new.ntk + s.ntk, cov1=new.cov1 + s.cov1)
    return stax.Relu()[2](k)


@pytest.mark.slow
def test_standard_parameterisation(x64):
    x = inputs()
    ours = stax.DEQ(32, 0.8, 1.2, 0.3, parameterization="standard")[2](x)
    explicit = unrolled_standard(x, 32, 0.8, 1.2, 0.3, layers=100)
    np.testing.assert_allclose(ours.nngp, explicit.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, explicit.ntk, rtol=1e-12)
    init_fn, apply_fn, _ = stax.DEQ(600, 0.6, 1.2, 0.3, parameterization="standard")
    standard = apply_fn(init_fn(random.key(0), x.shape)[1], x)
    init_fn, apply_fn, _ = stax.DEQ(600, 0.6, 1.2, 0.3)
    ntk = apply_fn(init_fn(random.key(0), x.shape)[1], x)
    np.testing.assert_allclose(standard, ntk, rtol=1e-10)  # the same function at initialisation


@pytest.mark.slow
def test_it_composes(x64):
    """Deeper in a network, in parallel, and after images are flattened."""
    x = random.normal(random.key(0), (3, 4, 4, 2))
    branch = stax.serial(stax.Flatten(), stax.DEQ(64, 0.8), stax.Dense(64))
    init_fn, apply_fn, kernel_fn = stax.serial(
        stax.FanOut(2),
        stax.parallel(branch, stax.serial(stax.Flatten(), stax.Dense(64))),
        stax.FanInSum(),
        stax.Relu(),
        stax.DEQ(64, 0.5, activation="erf"),
        stax.Dense(2),
    )
    kernels = kernel_fn(x)
    shape, params = init_fn(random.key(1), x.shape)
    assert shape == apply_fn(params, x).shape == (3, 2)
    assert kernels.shape1 == (3, 2)
    assert np.isfinite(kernels.ntk).all()
    assert (np.linalg.eigvalsh(kernels.ntk) > 0).all()
    np.testing.assert_allclose(kernel_fn(x, x[:2]).ntk, kernels.ntk[:, :2], rtol=1e-7)


@pytest.mark.slow
def test_on_images_every_pixel_is_a_vector(x64):
    x = random.normal(random.key(0), (2, 3, 2, 5))
    init_fn, apply_fn, kernel_fn = stax.DEQ(16, 0.8, 1.0, 0.2)
    kernel = kernel_fn(x, diagonal_spatial=False)
    pixels = kernel_fn(x.reshape(-1, 5))
    order = (0, 3, 1, 4, 2, 5)
    for get in ("nngp", "ntk"):
        expected = getattr(pixels, get).reshape(2, 3, 2, 2, 3, 2).transpose(order)
        np.testing.assert_allclose(getattr(kernel, get), expected, atol=1e-11)
    params = init_fn(random.key(1), x.shape)[1]
    flat = apply_fn(params, x.reshape(-1, 5))
    np.testing.assert_allclose(apply_fn(params, x), flat.reshape(2, 3, 2, 16), atol=1e-13)


@pytest.mark.slow
def test_a_stack_is_what_its_parts_say(x64):
    """The NTK of a DEQ on top of a layer: Θ* = (W² V + Θ_inject) / (1 - J), unrolled."""
    x = inputs()
    below = stax.serial(stax.Dense(1, 1.3, 0.2), stax.Erf())
    ours = stax.serial(below, stax.DEQ(1, 0.9, 1.1, 0.1))[2](x)
    s = stax.serial(below, stax.Dense(1, 1.1, 0.1))[2](x)
    cell = stax.serial(stax.Relu(), stax.Dense(1, 0.9))[2]
    k = s
    for _ in range(120):
        new = cell(k)
        k = new.replace(nngp=new.nngp + s.nngp, ntk=new.ntk + s.ntk, cov1=new.cov1 + s.cov1)
    explicit = stax.Relu()[2](k)
    np.testing.assert_allclose(ours.nngp, explicit.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, explicit.ntk, rtol=1e-12)


@pytest.mark.smoke
@FLOAT32_IS_SLOW
def test_batching(dtype):
    _, _, kernel_fn = network()
    x1, x2 = inputs(6), inputs(4, seed=1)
    batched = nt.batch(kernel_fn, batch_size=2)
    for args in ((x1, None), (x1, x2)):
        for get in ("nngp", "ntk"):
            whole = kernel_fn(*args, get)
            np.testing.assert_allclose(
                batched(*args, get), whole, atol=20 * jnp.finfo(dtype).eps * np.abs(whole).max()
            )


@pytest.mark.slow
def test_prediction_ensembles(x64):
    """Gradient descent to t = ∞ interpolates, and a short time is the linearised flow."""
    x, x_test = inputs(8), inputs(3, seed=1)
    y = jnp.sin(x[:, :1])
    kernel_fn = network(W_std=0.8)[2]
    predict = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, y, diag_reg=0.0)
    np.testing.assert_allclose(predict(t=None, x_test=x, get="ntk"), y, atol=1e-8)
    mean, cov = predict(t=None, x_test=x_test, get="nngp", compute_cov=True)
    k = kernel_fn(jnp.concatenate([x, x_test]), None, "nngp")
    solve = np.linalg.solve(k[:8, :8], k[:8, 8:])
    np.testing.assert_allclose(mean, solve.T @ y, atol=1e-8)
    np.testing.assert_allclose(cov, k[8:, 8:] - k[8:, :8] @ solve, atol=1e-8)
    t = 1e-4
    theta = kernel_fn(x_test, x, "ntk")
    np.testing.assert_allclose(
        predict(t=t, x_test=x_test, get="ntk"), t / y.size * theta @ y, rtol=1e-3
    )


@pytest.mark.parametrize("activation", slow_except(["gelu"], ["relu", "gelu"]))
def test_finite_networks_converge_to_the_kernels(activation):
    """Both kernels of tied-weight networks, within the spread of their seeds."""
    x, width = inputs(3, 4), 400
    init_fn, apply_fn, kernel_fn = network(width, 1, activation, b_std=0.2)
    exact = kernel_fn(x)
    _, deq_fn, deq_kernel_fn = stax.DEQ(width, 0.6, 1.0, 0.2, activation=activation)

    def draw(key):
        params = init_fn(key, x.shape)[1]
        h = deq_fn(params[0], x)
        return h @ h.T / width, nt.empirical_ntk_fn(apply_fn, vmap_axes=0)(x, None, params)

    draws = jax.jit(jax.vmap(draw))(random.split(random.key(1), 24))
    for ours, limit in zip(draws, (deq_kernel_fn(x).nngp, exact.ntk), strict=True):
        error = np.abs(np.mean(ours, axis=0) - limit)
        spread = np.std(ours, axis=0, ddof=1) / 24**0.5
        # 4 standard errors of the mean, and a bias of order 1/width
        assert (error < 4 * spread + 5 / width * np.abs(limit).max()).all()


@pytest.mark.slow
def test_monte_carlo_and_empirical_kernels(x64):
    x1, x2 = inputs(3, 4), inputs(2, 4, seed=1)
    init_fn, apply_fn, kernel_fn = network(256, 1)
    sampled = nt.monte_carlo_kernel_fn(init_fn, apply_fn, random.key(0), 3, vmap_axes=0)
    assert sampled(x1, x2, "ntk").shape == (3, 2)
    params = init_fn(random.key(1), x1.shape)[1]
    jacobians = [jax.jacrev(lambda p, x=x: apply_fn(p, x)[:, 0])(params) for x in (x1, x2)]
    expected = sum(
        jnp.einsum("i...,j...->ij", a, b)
        for a, b in zip(*map(jax.tree.leaves, jacobians), strict=True)
    )
    for implementation in (
        nt.NtkImplementation.JACOBIAN_CONTRACTION,
        nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    ):
        ntk_fn = nt.empirical_ntk_fn(apply_fn, vmap_axes=0, implementation=implementation)
        np.testing.assert_allclose(ntk_fn(x1, x2, params), expected, rtol=1e-10)
    exact = kernel_fn(x1, x2, "ntk")
    assert np.abs(expected - exact).max() < 0.3 * np.abs(exact).max()  # the same quantity


@pytest.mark.smoke
def test_the_finite_network_is_at_its_equilibrium(dtype):
    x = inputs(5, 3)
    init_fn, apply_fn, _ = stax.DEQ(50, 0.6, 1.2, 0.4, activation="gelu")
    _, ((W, _), (U, b)) = init_fn(random.key(0), x.shape)
    h = apply_fn(((W, None), (U, b)), x)
    z = 0.6 / 50**0.5 * h @ W + 1.2 / 3**0.5 * x @ U + 0.4 * b
    assert h.dtype == dtype
    residual = jnp.linalg.norm(jax.nn.gelu(z, approximate=False) - h, axis=1)
    assert (residual < 32 * jnp.finfo(dtype).eps * 1.13 * jnp.linalg.norm(z, axis=1)).all()


@pytest.mark.slow
def test_hyperparameters_may_be_traced(x64):
    x = inputs(3, 4)
    params = stax.DEQ(30, 0.5)[0](random.key(0), x.shape)[1]

    def finite(w):
        return jnp.sum(stax.DEQ(30, w, activation="erf")[1](params, x) ** 2)

    def infinite(w):
        return jnp.sum(network(activation="erf", W_std=w)[2](x).ntk)

    for fn in (finite, infinite):
        difference = (fn(0.5 + 1e-5) - fn(0.5 - 1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(fn)(0.5), difference, rtol=1e-7)
        np.testing.assert_allclose(jax.jit(jax.jacfwd(fn))(0.5), difference, rtol=1e-7)


def test_no_equilibrium():
    x = inputs()
    kernel_fn = network(W_std=1.5)[2]
    with pytest.raises(NoEquilibriumError, match=r"W_std=1\.5.*= 1\.125 must be below 1"):
        kernel_fn(x)
    traced = jax.jit(lambda x: kernel_fn(x, None, ("nngp", "ntk")))(x)
    assert np.isnan(traced.nngp).all()
    assert np.isnan(traced.ntk).all()
    init_fn, apply_fn, _ = stax.DEQ(200, 3.0)
    params = init_fn(random.key(0), x.shape)[1]
    with pytest.raises(NotConvergedError, match="equilibrium was not reached"):
        apply_fn(params, x)
    assert np.isnan(jax.jit(apply_fn)(params, x)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stax.DEQ(0, 0.5), "width=0 must be an integer of at least 1"),
        (lambda: stax.DEQ(2.5, 0.5), r"width=2\.5 must be"),
        (lambda: stax.DEQ(8, -0.5), r"W_std=-0\.5 must be"),
        (lambda: stax.DEQ(8, 0.5, U_std=-1), "U_std=-1 must be"),
        (lambda: stax.DEQ(8, 0.5, b_std=float("nan")), "b_std=nan must be"),
        (lambda: stax.DEQ(8, 0.5, activation="swish"), "activation='swish' is unknown"),
        (lambda: stax.DEQ(8, 0.5, parameterization="mup"), "mup"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_module_is_stax_and_more():
    from neural_tangents import stax as original

    exact = {"ABRelu", "Abs", "Conv", "Cos", "Erf", "Gelu", "LeakyRelu", "Rbf", "Relu", "Sin"}
    for name in dir(original):
        if not name.startswith("_"):
            ours = getattr(getattr(stax, name), "__wrapped__", getattr(stax, name))
            theirs = getattr(original, name)
            same = ours in (theirs, getattr(theirs, "__wrapped__", None))
            assert same != (name in exact), name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make",
    [
        lambda stax: stax.Erf(1.3, 0.7, 0.4),
        lambda stax: stax.Gelu(),
        lambda stax: stax.Sin(1.3, 0.7, 0.4),
        lambda stax: stax.Cos(1.3, 0.7, 0.4),
        lambda stax: stax.Rbf(0.6),
    ],
    ids=["Erf", "Gelu", "Sin", "Cos", "Rbf"],
)
def test_layers_of_neural_tangents(make):
    """The same networks, finite and infinite."""
    x1, x2 = np.random.default_rng(0).normal(size=(2, 5, 3))
    ours, theirs = (
        module.serial(module.Dense(7, 1.4, 0.2), make(module), module.Dense(2))
        for module in (stax, nt.stax)
    )
    for x in (None, x2):
        for found, expected in zip(
            *(net[2](x1, x, ("nngp", "ntk")) for net in (ours, theirs)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)
    params = theirs[0](jax.random.key(0), x1.shape)[1]
    np.testing.assert_allclose(ours[1](params, x1), theirs[1](params, x1), rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_parameter_of_a_nonlinearity_may_be_traced():
    x = np.random.default_rng(0).normal(size=(4, 3))

    def kernel(gamma):
        return stax.serial(stax.Dense(1), stax.Rbf(gamma), stax.Dense(1))[2](x, None, "nngp")[0, 1]

    slope = (kernel(0.6 + 1e-5) - kernel(0.6 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(kernel)(0.6), slope, rtol=1e-8)
