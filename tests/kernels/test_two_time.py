"""`stax.NeuralODE`, against closed forms, explicit sums over layers and finite networks."""

import math

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from conftest import float64
from jax import lax, random
from scipy.special import iv

from nt_deq import Anderson, Newton, NotConvergedError, deq_kernel, stax
from nt_deq.kernels import tiles
from nt_deq.kernels.cell import unreversed
from nt_deq.kernels.time_grids import Square, Triangles
from nt_deq.stax import infinite

X = np.array([[1.0, 2, -1], [0.5, -1, 2], [2, 0, 1]])


def ode(activation="erf", W_std=0.8, width=1, **kwargs):
    cell = stax.serial(stax.Nonlinearity(activation), stax.Dense(width, W_std))
    return stax.NeuralODE(cell, stax.Dense(width), **kwargs)


@pytest.mark.parametrize("solver", [None, Anderson(window=3)])
def test_it_is_a_bessel_function_where_the_network_is_linear(dtype, solver):
    """`C = S I₀(2 W_std √(ts))`, and `Ξ` is `C` and its derivative in `log W_std`, halved."""
    x, z = jnp.asarray(X, dtype), 2 * 0.8 * 3.0
    kernel = ode("identity", T=3.0, solver=solver)[2](x)
    S, eps = X @ X.T / 3, float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(kernel.nngp, S * iv(0, z), rtol=60 * eps)
    np.testing.assert_allclose(kernel.ntk, S * (iv(0, z) + z / 2 * iv(1, z)), rtol=60 * eps)


def euler_reference(W_std, leak, inject_always, T, steps):
    """Both kernels of a ReLU residual network by the recursion of its layers, square by square."""
    S, h = X @ X.T / 3, T / steps
    a, n = 1 - h * leak, steps + 1
    start = np.zeros(n) if inject_always else a ** np.arange(n)
    C, theta, F, G = (np.zeros((3, 3, n, n)) for _ in range(4))
    C[:, :, :, 0] = theta[:, :, :, 0] = S[..., None] * start * start[0]
    C[:, :, 0, :] = theta[:, :, 0, :] = S[..., None] * start * start[0]

    def cell(i, j):
        scale = np.sqrt(np.outer(np.diag(C[:, :, i, i]), np.diag(C[:, :, j, j])))
        cosine = np.clip(C[:, :, i, j] / np.where(scale == 0, 1, scale), -1, 1)
        angle = np.arccos(cosine)
        V = scale * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
        slope = (np.pi - angle) / (2 * np.pi)
        F[:, :, i, j] = W_std**2 * V + inject_always * S
        G[:, :, i, j] = W_std**2 * (V + slope * theta[:, :, i, j]) + inject_always * S

    def step(y, f, i, j):
        y[:, :, i, j] = (
            a * (y[:, :, i - 1, j] + y[:, :, i, j - 1])
            - a * a * y[:, :, i - 1, j - 1] + h * h * f[:, :, i - 1, j - 1]
        )  # fmt: skip

    cell(0, 0)
    for m in range(1, n):  # the row and the column that make the square one larger
        for j in range(1, m):
            for at in ((m, j), (j, m)):
                step(C, F, *at)
                step(theta, G, *at)
        step(C, F, m, m)
        step(theta, G, m, m)
        for j in range(m + 1):
            cell(m, j)
            cell(j, m)
    return C[:, :, -1, -1], theta[:, :, -1, -1]


@pytest.mark.parametrize(("leak", "inject_always"), [(0.0, False), (0.7, True)])
def test_residual_networks_are_exact(x64, leak, inject_always):
    kernel = ode("relu", 0.9, T=1.5, leak=leak, steps=6, inject_always=inject_always)[2](X)
    nngp, ntk = euler_reference(0.9, leak, inject_always, 1.5, 6)
    np.testing.assert_allclose(kernel.nngp, nngp, rtol=1e-13)
    # arccos of a cosine next to 1 is off by √ε in the reference.
    np.testing.assert_allclose(kernel.ntk, ntk, rtol=1e-7)


def test_residual_networks_approach_it(x64):
    """Euler's rule has an expansion in 1/L, across the kink too: two of its terms cancel here."""
    exact = ode("relu", T=1.0, leak=0.7)[2](X)
    one, two, four = (ode("relu", T=1.0, leak=0.7, steps=n)[2](X) for n in (8, 16, 32))
    for get in ("nngp", "ntk"):
        a, b, c, limit = (np.asarray(getattr(k, get)) for k in (one, two, four, exact))
        errors = [np.abs(y - limit).max() for y in (a, b, c)]
        assert 1.7 < errors[0] / errors[1] < 2.3
        once = 2 * b - a, 2 * c - b
        np.testing.assert_allclose((4 * once[1] - once[0]) / 3, limit, atol=0.02 * errors[0])


def test_long_times_with_a_leak_are_the_equilibrium(x64):
    """`J = W_std² V̇ < .3`; what is left decays like `e^{-(1 - √J) T}`."""
    kernel = ode("erf", 0.5, T=30.0, leak=1.0, inject_always=True)[2](X)
    deq = deq_kernel(X, W_std=0.5, activation="erf")
    np.testing.assert_allclose(kernel.nngp, deq.nngp, rtol=1e-6)
    np.testing.assert_allclose(kernel.ntk, deq.ntk, rtol=1e-6)


def test_near_inputs_are_as_exact_as_others(x64, monkeypatch):
    """ReLU's kink is round where inputs are near: against four times the nodes."""
    x, aside = X[0], np.array([0, 0, 1.0])
    x2 = np.stack([x, x + 1e-6 * aside, x + 1e-3 * aside, 2 * x, X[1]])
    kernel = ode("relu")[2](X[:1], x2)
    monkeypatch.setattr(infinite, "grids_for", lambda *_: (Triangles(18, 44, 48),))
    finer = ode("relu")[2](X[:1], x2)
    np.testing.assert_allclose(kernel.nngp, finer.nngp, rtol=1e-10)
    np.testing.assert_allclose(kernel.ntk, finer.ntk, rtol=1e-9)


def test_single_precision():
    with float64():
        exact = ode("relu")[2](X)
    single = ode("relu")[2](jnp.asarray(X, jnp.float32))
    for get in ("cov1", "nngp", "ntk"):
        a, b = getattr(single, get), getattr(exact, get)
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.smoke
def test_derivatives(x64, monkeypatch):
    monkeypatch.setattr(infinite, "grids_for", lambda *_: (Square(13, 1, 48),))

    def fn(p):
        W_std, T, leak, scale = p
        layer = ode("erf", W_std, T=T, leak=leak)
        kernel = layer[2](scale * jnp.asarray(X[:2]))
        return jnp.sum(kernel.ntk**2) + jnp.sum(jnp.cos(kernel.nngp))

    p, step = jnp.array([0.9, 1.1, 0.4, 1.2]), 1e-5
    value, gradient = jax.jit(fn), jax.jit(jax.grad(fn))(p)
    finite = [(value(p + step * e) - value(p - step * e)) / (2 * step) for e in jnp.eye(4)]
    np.testing.assert_allclose(gradient, finite, rtol=1e-7)


def test_it_composes(x64, monkeypatch):
    """Inputs given twice, in batches and as one program; a network that goes on."""
    layer = stax.serial(ode("relu"), stax.Relu(), stax.Dense(1))[2]
    whole = layer(X, None, ("nngp", "ntk"))
    others = [jax.jit(layer)(X)]
    monkeypatch.setattr(infinite, "grids_for", lambda *_: (Triangles(18, 28, 48),))
    others += [layer(X, X), nt.batch(layer, batch_size=1)(X, X)]
    for other in others:
        np.testing.assert_allclose(other.nngp, whole.nngp, rtol=1e-9)
        np.testing.assert_allclose(other.ntk, whole.ntk, rtol=1e-9)


@pytest.mark.slow
def test_tiles_of_pairs_do_not_show(x64, monkeypatch):
    """Neither those of the whole network nor the batches within them, with their derivatives."""
    x, layer = random.normal(random.key(0), (5, 3)), stax.serial(ode("erf"), stax.Erf())[2]

    def evaluate():
        def fn(scale):
            return layer(scale * x, None, ("nngp", "ntk"))

        def loss(scale):
            return sum(jnp.sum(a**2) for a in fn(scale))

        return *jax.jit(fn)(0.8), jax.jit(jax.grad(loss))(0.8)

    whole = evaluate()
    monkeypatch.setattr(tiles, "_SIDE_ON_CPU", 4)
    for a, b in zip(evaluate(), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_an_input_that_overflows_leaves_the_others_alone(x64, monkeypatch):
    monkeypatch.setattr(infinite, "grids_for", lambda *_: (Triangles(18, 28, 48),))
    x = np.concatenate([X, [[1.3e154, 0, 0]]])
    layer = ode("relu", 1.0, T=2.0)[2]
    with pytest.raises(OverflowError, match=r"row 3 of x1 overflows float64 until T=2"):
        layer(x)

    def fn(scale, x):
        return layer(scale * x, None, "ntk")

    kernel, slope = jax.jit(lambda x: jax.jvp(lambda s: fn(s, x), (1.0,), (1.0,)))(x)
    assert np.isnan(kernel[3]).all()
    assert np.isnan(kernel[:, 3]).all()
    alone = layer(X, None, "ntk")
    np.testing.assert_allclose(kernel[:3, :3], alone, rtol=1e-12)
    np.testing.assert_allclose(slope[:3, :3], 2 * alone, rtol=1e-11)  # ReLU is homogeneous


def test_too_few_nodes_are_an_error(x64, monkeypatch):
    monkeypatch.setattr(infinite, "grids_for", lambda *_: (Square(5, 1, 48),))
    layer = ode("erf", 1.5, T=2.0)[2]
    with pytest.raises(NotConvergedError, match=r"nodes in time are too few .* until T=2"):
        layer(X)
    assert np.isnan(jax.jit(lambda x: layer(x, None, "ntk"))(X)).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 0.0}, "T=0.0 must be one finite number above 0"),
        ({"T": np.inf}, "T=inf must be"),
        ({"T": np.ones(2)}, "T=array"),
        ({"leak": -1.0}, "leak=-1.0 must be one finite number of at least 0"),
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"solver": Newton()}, "solver=Newton"),
    ],
)
def test_bad_arguments_name_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        ode(**changes)


def test_bad_cells_name_themselves():
    narrow = stax.NeuralODE(stax.serial(stax.Erf(), stax.Dense(3)), stax.Dense(4))
    with pytest.raises(ValueError, match="NeuralODE: the cell turns z of shape"):
        narrow[0](random.key(0), (2, 3))
    skip = stax.serial(
        stax.FanOut(2),
        stax.parallel(stax.Identity(), stax.serial(stax.Erf(), stax.Dense(4))),
        stax.FanInSum(),
    )
    with pytest.raises(ValueError, match="NeuralODE: z reaches the cell's output without"):
        stax.NeuralODE(skip, stax.Dense(4))[2](jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="write NeuralODE"):
        stax.NeuralODE(stax.serial(stax.Dense(4), stax.Erf()), stax.Dense(4))[2](jnp.ones((2, 3)))


def runge_kutta(velocity, z, T, steps=40):
    """By hand."""
    h = T / steps

    def step(_, z):
        a = velocity(z)
        b = velocity(z + h / 2 * a)
        c = velocity(z + h / 2 * b)
        return z + h / 6 * (a + 2 * b + 2 * c + velocity(z + h * c))

    return lax.fori_loop(0, steps, step, z)


@pytest.mark.parametrize("steps", [None, 3])
def test_the_finite_network(dtype, steps, promotion):
    """Against Runge and Kutta's rule, or three layers."""
    x = jnp.asarray(X, dtype)
    init_fn, apply_fn, _ = ode("erf", width=5, T=1.5, leak=0.3, steps=steps)
    shape, params = init_fn(random.key(0), x.shape)
    assert shape == (3, 5)

    def velocity(z):
        return 0.8 / 5**0.5 * lax.erf(z) @ params[0][1][0] - 0.3 * z

    z = x @ params[1][0] / 3**0.5
    if steps is None:
        expected = runge_kutta(velocity, z, 1.5, 400)
    else:
        expected = z
        for _ in range(steps):
            expected = expected + 0.5 * velocity(expected)
    eps = jnp.finfo(dtype).eps
    atol = max(1e-10, 40 * eps)
    np.testing.assert_allclose(apply_fn(params, x), expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "leak", "inject_always"),
    [("relu", 0.0, False), ("erf", 1.0, True), ("tanh", 0.0, True), ("gelu", 0.5, False)],
)
def test_finite_networks_approach_it(activation, leak, inject_always, promotion):
    """NNGP and empirical NTK of networks of width 512, integrated by Runge and Kutta's rule."""
    width, draws, W_std = 512, 24, 0.8
    phi = stax.Nonlinearity(activation)[1]
    x = jnp.asarray(X, jnp.float32)

    def network(params, x):
        W, U, v = params
        u = x @ U / 3**0.5

        def velocity(z):
            return W_std / width**0.5 * phi((), z) @ W - leak * z + inject_always * u

        z = runge_kutta(velocity, 0 * u if inject_always else u, 1.0, 16)
        return z @ v / width**0.5

    @jax.jit
    def sample(key):
        keys = random.split(key, 3)
        shapes = (width, width), (3, width), (width, 1)
        params = [random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
        ntk = nt.empirical_ntk_fn(lambda p, x: network(p, x), vmap_axes=0)
        # The readout's part of the NTK is the empirical NNGP of z(T).
        z = ntk(x, None, params)
        readout = jax.jacrev(lambda v: network((*params[:2], v), x)[:, 0])(params[2])[..., 0]
        return readout @ readout.T, z

    nngp, ntk = (np.stack(a) for a in zip(*map(sample, random.split(random.key(0), draws)),
                                          strict=True))  # fmt: skip
    layer = ode(activation, W_std, T=1.0, leak=leak, inject_always=inject_always)
    exact = stax.serial(layer, stax.Dense(1))[2](x)
    for found, limit in ((nngp, exact.nngp), (ntk, exact.ntk)):
        error = np.abs(found.mean(0) - limit)
        spread = found.std(0, ddof=1) / draws**0.5
        assert (error < 3 * spread + 3 / width * np.abs(limit).max()).all()


def test_linear_convolutions_have_a_closed_form(x64):
    """`C(T, T) = Σ T²ʲ/j!² 𝒞ʲ S`, and `Ξ` has `j + 1` of every term: the axes are in order."""
    T, x, x2 = 1.3, random.normal(random.key(0), (2, 3, 2)), random.normal(random.key(1), (1, 3, 2))
    conv = stax.Conv(1, (3,), padding="SAME", W_std=0.8)
    layer = stax.NeuralODE(stax.serial(stax.Nonlinearity("identity"), conv), conv, T=T)
    k, found = conv[2](x, x2), layer[2](x, x2)
    nngp = ntk = 0
    for j in range(14):
        ordered, weight = unreversed(k).nngp, T ** (2 * j) / math.factorial(j) ** 2
        nngp, ntk = nngp + weight * ordered, ntk + (j + 1) * weight * ordered
        k = conv[2](k)
    np.testing.assert_allclose(found.nngp, nngp, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.ntk, ntk, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_finite_convolutions_approach_it(promotion):
    """Deviations of 200 networks are as large as chance makes them, and the other order's are not.

    The width adds an error of `O(1/width)` to the mean, a third of a standard error here.
    """
    width, draws, x = 256, 200, random.normal(random.key(0), (2, 4, 2))
    conv = stax.Conv(width, (3,), padding="SAME", W_std=0.8)
    inject = stax.Conv(width, (3,), padding="SAME")
    init_fn, _, kernel_fn = stax.NeuralODE(stax.serial(stax.Relu(), conv), inject)
    exact = np.asarray(kernel_fn(x).nngp)

    @jax.jit
    def sample(key):
        cell, u = init_fn(key, x.shape)[1]
        z = runge_kutta(lambda z: conv[1](cell[1], jax.nn.relu(z)), inject[1](u, x), 1.0, 16)
        return jnp.einsum("ahc,bgc->abhg", z, z) / width

    found = np.stack([sample(key) for key in random.split(random.key(1), draws)])
    spread = found.std(0, ddof=1) / draws**0.5
    right, wrong = (
        np.sqrt(np.mean(((found.mean(0) - k) / spread) ** 2)) for k in (exact, exact.swapaxes(2, 3))
    )
    assert right < 2 < 20 < wrong
