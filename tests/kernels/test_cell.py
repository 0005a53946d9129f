"""`stax.FixedPoint` for any cell, against explicit layers and finite networks with tied weights."""

from itertools import product

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from jax import lax, random
from marks import slow_except

from nt_deq import Anderson, Newton, NoEquilibriumError, NotConvergedError, Picard, stax
from nt_deq.kernels import tiles
from nt_deq.kernels.cell import solve_cell, unreversed

WIDTH = 32


VECTORS, IMAGES, SEQUENCES = (4, 6), (3, 4, 4, 2), (3, 5, 2)


def cases(stax):
    """Cell, injection and shape of the inputs, from ours or from the original `stax`."""
    serial, relu, erf = stax.serial, stax.Relu(), stax.Erf()

    def dense(W_std=0.8, b_std=0.1):
        return stax.Dense(WIDTH, W_std, b_std)

    def conv(filter_shape=(3, 3), padding="SAME"):
        return stax.Conv(WIDTH, filter_shape, padding=padding, W_std=0.9, b_std=0.1)

    attention = stax.GlobalSelfAttention(
        WIDTH, n_chan_key=WIDTH, n_chan_val=WIDTH, n_heads=2, linear_scaling=True, W_value_std=0.7
    )
    branches = stax.parallel(serial(relu, dense(1.0)), serial(erf, stax.Dense(WIDTH, 0.5)))
    pool = stax.AvgPool((3, 3), (1, 1), "SAME")
    circular, line = conv(padding="CIRCULAR"), conv((3,))
    return {
        "dense": (serial(relu, dense(1.1)), dense(), VECTORS),
        "leaky": (serial(stax.LeakyRelu(0.2), dense(1.1)), dense(), VECTORS),
        "two_hidden": (serial(relu, dense(1.0), erf, dense()), dense(), VECTORS),
        "dropout": (serial(relu, stax.Dropout(0.9), dense()), dense(), VECTORS),
        "layer_norm": (serial(stax.LayerNorm(), relu, dense()), dense(), VECTORS),
        "branches": (serial(stax.FanOut(2), branches, stax.FanInSum()), dense(), VECTORS),
        "conv": (serial(relu, conv()), conv(), IMAGES),
        "conv_circular": (serial(erf, circular), circular, IMAGES),
        "conv_1d": (serial(stax.Abs(), line), line, SEQUENCES),
        "conv_pool": (serial(relu, conv(), pool), conv(), IMAGES),
        "attention": (serial(relu, attention), conv((1, 1)), IMAGES),
        "dense_on_images": (serial(relu, dense(1.1)), dense(), IMAGES),
    }


CASES, ORIGINAL = cases(stax), cases(nt.stax)
DENSE = stax.Dense(WIDTH)


@pytest.fixture(autouse=True)
def pooling(request):
    """The pooling of neural-tangents divides by an integer."""
    if "pool" in request.node.name:
        request.getfixturevalue("promotion")


def pair(shape):
    return random.normal(random.key(0), shape), random.normal(random.key(1), (2, *shape[1:]))


def unrolled(cell, inject, x1, x2, layers=300):
    """`layers` explicit layers of neural-tangents."""
    names = ("cov1", "cov2", "nngp", "ntk")

    @jax.jit
    def run(x1, x2):
        u = unreversed(inject[2](x1, x2))
        s = tuple(getattr(u, name) for name in names)

        def step(_, k):
            out = unreversed(cell[2](u.replace(**dict(zip(names, k, strict=True)))))
            new = (getattr(out, name) for name in names)
            return tuple(None if a is None else a + b for a, b in zip(new, s, strict=True))

        return u.replace(**dict(zip(names, lax.fori_loop(0, layers, step, s), strict=True)))

    return run(x1, x2)


def compiled(cell, inject):
    """The kernel function of `FixedPoint` as one program, where eagerly it is a hundred."""
    kernel_fn = stax.FixedPoint(cell, inject)[2]
    return jax.jit(lambda x1, x2=None: unreversed(kernel_fn(x1, x2)))


@pytest.mark.parametrize("others", slow_except(["given"], ["none", "given"]))
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_limit_of_explicit_layers(x64, name, others):
    cell, inject, shape = CASES[name]
    x1, x2 = pair(shape)
    other = x2 if others == "given" else None
    ours = compiled(cell, inject)(x1, other)
    explicit = unrolled(*ORIGINAL[name][:2], x1, other)
    for get in ("cov1", "nngp", "ntk"):
        a, b = getattr(ours, get), getattr(explicit, get)
        # Where x meets itself the original's κ₀(ρ) is off by √ε, since ρ = 1 - ε.
        # Anderson stops at 8 ε over one less the rate.
        atol = {"ntk": 1e-8 if other is None else 1e-12}.get(get, 1e-13)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max(), err_msg=get)
    assert ours.is_gaussian
    assert (ours.cov2 is None) == (other is None)
    assert ours.shape1 == (*shape[:-1], WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "conv_pool", "attention"])
def test_solvers_agree_and_anderson_is_faster(x64, name):
    cell, inject, shape = CASES[name]
    x, _ = pair(shape)
    steps = [
        int(solve_cell(cell[2], unreversed(inject[2](x)), solver).steps)
        for solver in (Anderson(), Picard())
    ]
    assert 1 < steps[0] < 0.65 * steps[1]
    anderson = stax.FixedPoint(cell, inject, Anderson())[2](x)
    picard = stax.FixedPoint(cell, inject, Picard())[2](x)
    np.testing.assert_allclose(anderson.nngp, picard.nngp, atol=1e-12)
    np.testing.assert_allclose(anderson.ntk, picard.ntk, atol=1e-11 * picard.ntk.max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "pool"])
def test_tiles_of_pairs_do_not_show(x64, monkeypatch, name):
    """Small tiles, of which the last overlap the ones before; where an input meets itself too."""
    conv = stax.Conv(WIDTH, (3,), padding="SAME", W_std=0.7)
    middle = {"dropout": stax.Dropout(0.9), "pool": stax.AvgPool((3,), (1,), "SAME")}[name]
    kernel_fn = stax.FixedPoint(stax.serial(stax.Erf(), middle, conv), conv)[2]
    x1 = random.normal(random.key(0), (5, 3, 2))
    x2 = x1 if name == "dropout" else random.normal(random.key(1), (3, 3, 2))

    def fn(s):
        kernels = [unreversed(kernel_fn(s * x1, x)) for x in (None, s * x2)]
        return [(k.nngp, k.ntk) for k in kernels]

    def evaluate():
        return jax.tree.leaves(jax.jit(lambda s: jax.jvp(fn, (s,), (1.0,)))(1.0))

    whole = evaluate()
    monkeypatch.setattr(tiles, "_SIDE_ON_CPU", 6)  # 2 × 2 pairs of 9 entries
    for a, b in zip(evaluate(), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max(), rtol=0)


def test_anderson_remembers_a_tile_and_not_the_kernel():
    x = jnp.ones((64, 16, 2))
    cell, inject, _ = CASES["conv_1d"]
    fn = stax.FixedPoint(cell, inject, Anderson(window=5))[2]
    memory = jax.jit(lambda x: fn(x, None, ("nngp", "ntk"))).lower(x).compile().memory_analysis()
    # S, K* and Θ*, and the terms of the last two
    assert memory.temp_size_in_bytes < 5 * 64**2 * 16**2 * 4


@pytest.mark.slow
def test_deq_is_a_special_case(x64):
    x1, x2 = pair(VECTORS)
    composed = stax.serial(
        stax.FixedPoint(stax.serial(stax.Gelu(), stax.Dense(40, 0.9)), stax.Dense(40, 1.1, 0.2)),
        stax.Gelu(),
    )
    deq = stax.DEQ(40, 0.9, 1.1, 0.2, activation="gelu")
    ours, theirs = deq[2](x1, x2), composed[2](x1, x2)
    np.testing.assert_allclose(ours.nngp, theirs.nngp, rtol=1e-12)
    np.testing.assert_allclose(ours.ntk, theirs.ntk, rtol=1e-12)
    _, params = deq[0](random.key(0), x1.shape)
    hidden, inject = params
    z = composed[1](((((), hidden), inject), ()), x1)
    np.testing.assert_allclose(deq[1](params, x1), z, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    slow_except(
        ("branches",),
        ("two_hidden", "branches", "conv", "layer_norm", "dropout", "conv_pool", "attention"),
    ),
)
def test_finite_networks_with_tied_weights_approach_it(name):
    """The covariance of z*, averaged over the channels of 20 networks of width 256."""
    width, draws = 256, 20
    wide = {
        "two_hidden": (
            stax.serial(stax.Relu(), stax.Dense(width, 0.8), stax.Erf(), stax.Dense(width, 0.5)),
            stax.Dense(width), (3, 6),
        ),
        "branches": (
            stax.serial(
                stax.FanOut(2),
                stax.parallel(
                    stax.serial(stax.Relu(), stax.Dense(width, 0.5)),
                    stax.serial(stax.Erf(), stax.Dense(width, 0.4)),
                ),
                stax.FanInSum(),
            ),
            stax.Dense(width), (3, 6),
        ),
        "conv": (
            stax.serial(stax.Relu(), stax.Conv(width, (3, 3), padding="SAME", W_std=0.6)),
            stax.Conv(width, (3, 3), padding="SAME"), (2, 3, 3, 2),
        ),
        "layer_norm": (
            stax.serial(stax.LayerNorm(), stax.Relu(), stax.Dense(width, 0.5)),
            stax.Dense(width), (3, 6),
        ),
        "dropout": (
            stax.serial(stax.Relu(), stax.Dropout(0.8), stax.Dense(width, 0.5)),
            stax.Dense(width), (3, 6),
        ),
        "conv_pool": (
            stax.serial(
                stax.Relu(),
                stax.AvgPool((3, 3), (1, 1), "CIRCULAR"),
                stax.Conv(width, (3, 3), padding="CIRCULAR", W_std=0.6),
            ),
            stax.Conv(width, (3, 3), padding="CIRCULAR"), (2, 3, 3, 2),
        ),
        "attention": (
            stax.serial(
                stax.Relu(),
                stax.GlobalSelfAttention(
                    width, n_chan_key=width, n_chan_val=width, n_heads=4, linear_scaling=True,
                    W_value_std=0.6,
                ),
            ),
            stax.Dense(width), (2, 4, 3),
        ),
    }  # fmt: skip
    cell, inject, shape = wide[name]
    init_fn, apply_fn, _ = stax.FixedPoint(cell, inject)
    x = random.normal(random.key(0), shape)
    exact = compiled(cell, inject)(x).nngp

    @jax.jit
    @jax.vmap
    def covariance(key):
        z = apply_fn(init_fn(key, shape)[1], x, rng=key)
        flat = z.reshape(-1, width)
        gram = (flat @ flat.T / width).reshape(z.shape[:-1] * 2)
        n = len(shape) - 2  # to the kernel's order of axes: batch, batch, H, H, W, W
        order = [0, n + 1] + [axis for i in range(1, n + 1) for axis in (i, n + 1 + i)]
        return jnp.transpose(gram, order)

    sample = np.asarray(covariance(random.split(random.key(1), draws)))
    error = np.abs(sample.mean(0) - exact)
    spread = sample.std(0, ddof=1) / draws**0.5
    assert (error < 5 * spread + 5 / width * np.abs(exact).max()).all()


@pytest.mark.slow
def test_it_composes(x64):
    x1, x2 = pair(IMAGES)
    for after in ((stax.Flatten(),), (stax.GlobalAvgPool(),)):
        first = stax.FixedPoint(*CASES["conv"][:2])
        second = stax.FixedPoint(stax.serial(stax.Erf(), stax.Dense(WIDTH, 0.5)), stax.Dense(WIDTH))
        init_fn, apply_fn, kernel_fn = stax.serial(
            first, *after, stax.Dense(WIDTH), stax.Relu(), second, stax.Erf(), stax.Dense(2)
        )
        kernel = kernel_fn(x1, x2)
        whole = kernel_fn(jnp.concatenate([x1, x2]), None, "ntk")
        np.testing.assert_allclose(kernel.ntk, whole[:3, 3:], rtol=1e-10)
        batched = nt.batch(kernel_fn, batch_size=1)(x1, x2, ("nngp", "ntk"))
        np.testing.assert_allclose(batched.ntk, kernel.ntk, rtol=1e-10)
        jitted = jax.jit(lambda a, b, f=kernel_fn: f(a, b, "nngp"))(x1, x2)
        np.testing.assert_allclose(jitted, kernel_fn(x1, x2, "nngp"), rtol=1e-12)
        assert apply_fn(init_fn(random.key(0), x1.shape)[1], x1).shape == (3, 2)


@pytest.mark.slow
def test_diagonal_spatial_is_used_where_it_is_enough():
    x, _ = pair(IMAGES)
    flat = stax.serial(stax.FixedPoint(*CASES["conv"][:2]), stax.Flatten())
    assert stax.FixedPoint(*CASES["conv"][:2])[2](x).nngp.ndim == 6
    diagonal = stax.FixedPoint(*CASES["conv"][:2])[2](x, diagonal_spatial=True)
    assert diagonal.nngp.shape == (3, 3, 4, 4)
    full = flat[2](x, diagonal_spatial=False).nngp
    np.testing.assert_allclose(flat[2](x).nngp, full, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("channel_axis", [1, 2])
def test_other_axes(x64, channel_axis):
    x, _ = pair((3, 5, 4))
    moved = jnp.moveaxis(x, -1, channel_axis)
    kernels = [
        stax.serial(
            stax.FixedPoint(
                stax.serial(stax.Relu(), stax.Dense(WIDTH, 0.9, channel_axis=axis)),
                stax.Dense(WIDTH, channel_axis=axis),
            )
        )[2](inputs)
        for inputs, axis in ((x, 2), (moved, channel_axis))
    ]
    np.testing.assert_allclose(kernels[0].ntk, kernels[1].ntk, atol=1e-12)


@pytest.mark.slow
def test_masks(x64):
    """A masked time step is as if it were not there."""
    short = random.normal(random.key(0), (2, 3, 2))
    padded = jnp.concatenate([short, jnp.full((2, 2, 2), 100.0)], axis=1)
    layer = stax.serial(
        stax.FixedPoint(stax.serial(stax.Relu(), stax.Dense(WIDTH, 0.9)), stax.Dense(WIDTH)),
        stax.GlobalAvgPool(),
        stax.Dense(1),
    )
    masked = layer[2](padded, mask_constant=100.0)
    np.testing.assert_allclose(masked.ntk, layer[2](short).ntk, rtol=1e-9)
    params = layer[0](random.key(1), padded.shape)[1]
    np.testing.assert_allclose(
        stax.unmask_fn(layer[1])(params, padded, mask_constant=100.0),
        layer[1](params, short),
        rtol=1e-9,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("name", slow_except(["erf_dense"], ["erf_dense", "erf_conv"]))
def test_derivatives(x64, name):
    """ImplicitAdjoint, in the input and in a traced parameter of the cell, to second order."""
    x = random.normal(random.key(0), (2, 4) if name == "erf_dense" else (2, 3, 2))
    make = {
        "erf_dense": lambda w: (stax.serial(stax.Erf(), stax.Dense(1, w)), stax.Dense(1)),
        "erf_conv": lambda w: (
            stax.serial(stax.Erf(), stax.Conv(1, (3,), padding="SAME", W_std=w)),
            stax.Conv(1, (3,), padding="SAME"),
        ),
    }[name]

    def fn(p):
        kernel = stax.FixedPoint(*make(p[0]))[2](p[1] * x, p[1] * x[:1] + p[2])
        return jnp.sum(kernel.ntk**2) + jnp.sum(jnp.cos(kernel.nngp))

    p, step = jnp.array([0.7, 1.1, 0.3]), 1e-5
    gradient = jax.jit(jax.grad(fn))
    value = jax.jit(fn)
    finite = [(value(p + step * e) - value(p - step * e)) / (2 * step) for e in jnp.eye(3)]
    np.testing.assert_allclose(gradient(p), finite, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(fn)(p), gradient(p), rtol=1e-8)
    second = [(gradient(p + step * e) - gradient(p - step * e)) / (2 * step) for e in jnp.eye(3)]
    hessian = jax.jit(jax.jacfwd(jax.grad(fn)))(p)
    np.testing.assert_allclose(hessian, second, rtol=1e-5, atol=1e-6)


def test_derivatives_where_an_input_meets_itself(dtype):
    """The ReLU network is homogeneous: dΘ(s x, s x')/ds = 2 Θ(x, x') at s = 1, duplicates too."""
    x = random.normal(random.key(0), (3, 4))
    x = jnp.concatenate([x, x[:1], -x[:1]])
    kernel_fn = stax.FixedPoint(stax.serial(stax.Relu(), stax.Dense(1, 1.2)), stax.Dense(1))[2]
    kernel, derivative = jax.jvp(lambda s: kernel_fn(s * x, None, "ntk"), (1.0,), (1.0,))
    eps = jnp.finfo(dtype).eps
    scale = 100 * eps * np.abs(kernel).max()
    np.testing.assert_allclose(derivative, 2 * kernel, rtol=0, atol=scale)
    diagonal = np.sum(np.asarray(x) ** 2, axis=1) / 4 / (1 - 0.72) ** 2
    np.testing.assert_allclose(np.diag(kernel), diagonal, rtol=100 * eps)


@pytest.mark.parametrize(
    ("name", "diagonal_spatial"),
    [
        case if case == ("erf", True) else pytest.param(*case, marks=pytest.mark.slow)
        for case in product(["relu", "leaky_relu", "abs", "erf", "gelu", "sin"], [True, False])
    ],
)
def test_nonlinearities_have_the_kernels_of_the_original(x64, name, diagonal_spatial):
    x1, x2 = pair(IMAGES)
    original = {
        "relu": nt.stax.Relu(),
        "leaky_relu": nt.stax.LeakyRelu(0.01),
        "abs": nt.stax.Abs(),
        "erf": nt.stax.Erf(),
        "gelu": nt.stax.Gelu(),
        "sin": nt.stax.Sin(),
    }[name]
    for layer in (stax.Dense(WIDTH), stax.Conv(WIDTH, (3, 2), padding="SAME")):
        ours = stax.serial(layer, stax.Nonlinearity(name))
        theirs = stax.serial(layer, original)
        np.testing.assert_allclose(
            ours[1](ours[0](random.key(0), x1.shape)[1], x1),
            theirs[1](theirs[0](random.key(0), x1.shape)[1], x1),
            atol=1e-12,
        )
        for other in (None, x2):
            a, b = (f[2](x1, other, diagonal_spatial=diagonal_spatial) for f in (ours, theirs))
            for get in ("cov1", "cov2", "nngp", "ntk"):
                if getattr(a, get) is None:
                    assert getattr(b, get) is None
                    continue
                atol = 1e-7 if get == "ntk" else 1e-12
                np.testing.assert_allclose(getattr(a, get), getattr(b, get), atol=atol)


def test_the_program_does_not_grow_with_the_steps():
    x, _ = pair(SEQUENCES)
    cell, inject, _ = CASES["conv_1d"]

    def size(steps):
        kernel_fn = stax.FixedPoint(cell, inject, Anderson(max_steps=steps))[2]
        return len(jax.jit(lambda x: kernel_fn(x, None, "ntk")).lower(x).as_text())

    assert abs(size(10) - size(1000)) < 100


@pytest.mark.smoke
@pytest.mark.parametrize("name", slow_except(["dense"], ["dense", "conv_1d"]))
def test_no_equilibrium(name):
    x, _ = pair(CASES[name][2])
    cell = {
        "dense": stax.serial(stax.Relu(), stax.Dense(WIDTH, 1.5)),
        "conv_1d": stax.serial(stax.Relu(), stax.Conv(WIDTH, (3,), padding="CIRCULAR", W_std=1.6)),
    }[name]
    kernel_fn = stax.FixedPoint(cell, CASES[name][1])[2]
    with pytest.raises(
        NoEquilibriumError,
        match=r"which must be below 1, and is not for [234] rows of x1 \(the first is row 0\)",
    ):
        kernel_fn(x)
    traced = jax.jit(lambda x: kernel_fn(x, None, ("nngp", "ntk")))(x)
    assert np.isnan(traced.nngp).all()
    assert np.isnan(traced.ntk).all()


def test_dropout_counts_for_the_existence_of_an_equilibrium():
    """At W_std 1.05 the rate W_std² E[φ'²]/keep is 1.2, though W_std² E[φ'²] is .6."""
    x = 0.3 * random.normal(random.key(0), (3, 10))

    def solve(W_std, x2=None):
        cell = stax.serial(stax.Erf(), stax.Dropout(0.5), stax.Dense(WIDTH, W_std))
        return stax.FixedPoint(cell, DENSE)[2](x, x2, ("nngp", "ntk"))

    for x2 in (None, x[:2]):
        with pytest.raises(
            NoEquilibriumError, match="must be below 1, and is not for 3 rows of x1"
        ):
            solve(1.05, x2)
    assert (jnp.diag(solve(0.6).ntk) > jnp.diag(solve(0.6).nngp)).all()


@pytest.mark.parametrize("W_std", [0.1, 0.9])
def test_a_cell_that_jumps_has_no_equilibrium(W_std):
    """Also where it is one of two branches, and with space."""
    x = random.normal(random.key(0), SEQUENCES)
    conv = stax.Conv(WIDTH, (3,), padding="SAME", W_std=W_std)
    both = stax.parallel(stax.serial(stax.Sign(), conv), stax.serial(stax.Erf(), conv))
    cells = (
        stax.serial(stax.Sign(), conv),
        stax.serial(stax.FanOut(2), both, stax.FanInSum()),
    )
    for cell in cells:
        with pytest.raises(NoEquilibriumError, match="a nonlinearity of the cell jumps"):
            stax.FixedPoint(cell, conv)[2](x)


def test_numbers_that_are_none_or_too_large_are_called_so():
    kernel_fn = stax.FixedPoint(stax.serial(stax.Relu(), stax.Dense(1, 0.8)), stax.Dense(1))[2]
    x = jnp.ones((3, 2))
    with pytest.raises(OverflowError, match="inject of row 1 of x1 overflows float32"):
        kernel_fn(x.at[1].set(1e30))
    with pytest.raises(OverflowError, match=r"2 rows of x2 \(the first is row 0\) overflows"):
        kernel_fn(x, x.at[:2].set(1e30))
    wider_fn = stax.FixedPoint(stax.serial(stax.Relu(), stax.Dense(1, 1.2)), stax.Dense(1))[2]
    with pytest.raises(OverflowError, match="the variance of row 1 of x1 overflows float32"):
        wider_fn(x.at[1, 0].set(1.8e19))  # K*, not S
    with pytest.raises(ValueError, match="infinite values in row 2 of x1;"):
        kernel_fn(x.at[2].set(jnp.nan))


def test_what_is_beyond_the_range_of_a_nonlinearity_is_called_so():
    cell = stax.serial(stax.Nonlinearity(jax.nn.mish), stax.Dense(1, 0.8))
    kernel_fn = stax.FixedPoint(cell, stax.Dense(1))[2]
    x = jnp.ones((3, 2))
    with pytest.raises(
        NotConvergedError, match=r"expectations.* not known in float32.* row 1 of x1"
    ):
        kernel_fn(x.at[1].set(1e3))


def test_too_few_steps():
    x, _ = pair(SEQUENCES)
    with pytest.raises(NotConvergedError, match=r"rows of x1 .* did not converge"):
        stax.FixedPoint(*CASES["conv_1d"][:2], Picard(max_steps=2))[2](x)


@pytest.mark.parametrize(
    ("cell", "inject", "message"),
    [
        (stax.serial(DENSE, stax.Relu()), DENSE, "last layer is not linear.*put phi after it"),
        (
            stax.serial(stax.Relu(), stax.Dense(8)),
            DENSE,
            r"turns z of shape \(4, 32\) into \(4, 8",
        ),
        (
            CASES["dense"][0],
            stax.serial(DENSE, stax.Relu()),
            "inject does not end in a layer with random",
        ),
        (
            stax.serial(
                stax.FanOut(2), stax.parallel(stax.Identity(), CASES["dense"][0]), stax.FanInSum()
            ),
            DENSE,
            "without random weights on the way",
        ),
    ],
)
def test_cells_without_a_kernel_are_refused(cell, inject, message):
    x, _ = pair(VECTORS)
    kernel_fn = stax.FixedPoint(cell, inject)[2]
    with pytest.raises(ValueError, match=message):
        kernel_fn(x)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: kernel_fn(x, None, "nngp"))(x)


@pytest.mark.usefixtures("unchecked")
def test_solvers_that_do_not_fit_are_refused():
    x, _ = pair(SEQUENCES)
    with pytest.raises(ValueError, match="which the layer couples"):
        stax.FixedPoint(*CASES["conv_1d"][:2], Newton())[2](x)
    with pytest.raises(TypeError, match="solver=3 is not a solver"):
        stax.FixedPoint(CASES["dense"][0], DENSE, 3)
    with pytest.raises(ValueError, match="window=0"):
        Anderson(window=0)
    with pytest.raises(ValueError, match="angle=2"):
        Anderson(angle=2)
