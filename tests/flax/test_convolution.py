"""The convolution of the Flax layers and its derivatives, and the norms of linear layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax, random

from nt_deq.convolution import convolve, with_fast_transposes
from nt_deq.flax import Conv, Dense
from nt_deq.flax.spectral_norm import convolution_norm, dense_norm


def lax_convolve(x, W, padding):
    space = "HW"[: W.ndim - 2]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    strides = (1,) * len(space)
    return lax.conv_general_dilated(x, W, strides, padding, dimension_numbers=numbers)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("sizes", "padding"), [((3, 2), ((1, 1), (0, 1))), ((4,), ((0, 0),))], ids=["2d", "1d"]
)
def test_it_is_the_convolution_of_lax(x64, sizes, padding):
    """Values, derivatives of both orders in both modes, and vectorised over either operand."""
    keys = random.split(random.key(0), 3)
    x = random.normal(keys[0], (2, *(5, 6)[: len(sizes)], 3))
    W = random.normal(keys[1], (*sizes, 3, 2))
    v = random.normal(keys[2], lax_convolve(x, W, padding).shape)

    def checks(x, W, v, conv):
        def loss(x, W):
            return jnp.sum(v * jnp.sin(conv(x, W, padding)))

        tangents = jax.tree.map(jnp.cos, (x, W))
        along = lambda x, W: jax.jvp(loss, (x, W), tangents)[1]  # noqa: E731
        return (
            conv(x, W, padding),
            along(x, W),
            jax.grad(loss, (0, 1))(x, W),
            jax.grad(along, (0, 1))(x, W),
            jax.vmap(lambda x: conv(x[None], W, padding)[0])(x),
            jax.vmap(lambda s: conv(x, s * W, padding))(jnp.arange(2.0)),
            jax.vmap(
                jax.grad(lambda W, x, v: jnp.sum(v * conv(x[None], W, padding)[0])), (None, 0, 0)
            )(W, x, v),
        )

    # As arguments: XLA of JAX 0.5.3 folds constant convolutions of lax to something else.
    both = [jax.jit(checks, static_argnums=3)(x, W, v, f) for f in (convolve, lax_convolve)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *both)


@pytest.mark.parametrize("shape", [(40, 40), (7, 30), (30, 7), (1, 5)])
def test_the_norm_of_a_matrix_is_bounded_closely_from_above(dtype, shape):
    W = random.normal(random.key(0), shape)
    exact = np.linalg.norm(W, 2)
    bound = dense_norm(W)
    assert bound.dtype == dtype
    assert exact * (1 - 1e-6) <= bound <= exact * min(shape) ** (1 / 64)
    for scale in (1e-12, 1e12):
        np.testing.assert_allclose(dense_norm(scale * W), scale * bound, rtol=1e-5)


def test_the_norm_of_nothing_is_nothing(x64):
    value, gradient = jax.value_and_grad(dense_norm)(jnp.zeros((3, 3)))
    assert value < 1e-100
    assert np.isfinite(gradient).all()
    W, direction = random.normal(random.key(0), (2, 6, 6))
    along = lambda s: dense_norm(W + s * direction)  # noqa: E731
    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(along)(0.0), slope, rtol=1e-7)


@pytest.mark.parametrize(
    ("padding", "space", "sizes"),
    [
        ("SAME", (5, 6), (3, 3)),
        ("SAME", (5,), (4,)),
        ("VALID", (5, 6), (3, 2)),
        ("CIRCULAR", (5, 6), (3, 3)),
        ("CIRCULAR", (2, 3), (5, 3)),
        ("CIRCULAR", (5,), (4,)),
    ],
)
def test_the_norm_of_a_convolution_is_bounded_closely_from_above(x64, padding, space, sizes):
    """On a torus it is the norm of the matrix; with zeros around, a little more."""
    layer = Conv(3, 3, sizes, padding=padding, rngs=nnx.Rngs(0))
    layer.parameterization = "standard"
    flat = lambda v: layer(v.reshape(1, *space, 3)).ravel()  # noqa: E731
    matrix = jax.jacobian(flat)(jnp.zeros(3 * np.prod(space)))
    exact, bound = np.linalg.norm(matrix, 2), convolution_norm(layer.W[...], space, padding)
    assert exact * (1 - 1e-9) <= bound <= exact * (1.05 if padding == "CIRCULAR" else 1.2)


@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
def test_a_spectral_bound_scales_down_what_is_too_large(x64, parameterization):
    large, small = (
        Dense(
            20,
            20,
            W_std=W_std,
            spectral_bound=0.9,
            parameterization=parameterization,
            rngs=nnx.Rngs(0),
        )
        for W_std in (2.0, 0.2)
    )
    norm = lambda layer: np.linalg.norm(layer(jnp.eye(20)), 2)  # noqa: E731
    assert 0.85 < norm(large) <= 0.9
    free = Dense(20, 20, W_std=0.2, parameterization=parameterization, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(small(jnp.eye(20)), free(jnp.eye(20)))


@pytest.mark.smoke
def test_convolutions_of_any_function_are_replaced(x64):
    """Of a module of nnx, in another layout, within jit; one with strides stays as it is."""
    rngs, x = nnx.Rngs(0), random.normal(random.key(0), (2, 6, 6, 4))
    conv = nnx.Conv(4, 4, (3, 3), rngs=rngs, param_dtype=jnp.float64)
    strided = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs, param_dtype=jnp.float64)
    odd = random.normal(random.key(1), (4, 4, 2, 3))

    def f(x, scale):
        x = jax.nn.relu(conv(x)) + scale * jax.jit(conv)(jnp.tanh(x))
        x = lax.conv_general_dilated(
            x, odd, (1, 1), ((1, 0), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NWHC")
        )
        return {"out": strided(x)}

    both = [f, with_fast_transposes(f)]
    names = [str(jax.make_jaxpr(g)(x, 2.0)).count("nt_deq_convolve") for g in both]
    assert names == [0, 3]

    def checks(x, f):
        loss = lambda x: jnp.sum(jnp.sin(f(x, 2.0)["out"]))  # noqa: E731
        return f(x, 2.0), jax.grad(loss)(x), jax.jvp(jax.grad(loss), (x,), (x,))[1]

    values = [jax.jit(checks, static_argnums=1)(x, g) for g in both]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *values)
