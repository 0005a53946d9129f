"""Convolutions of covariances against neural-tangents', which are XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except
from neural_tangents import stax as nt_stax
from neural_tangents._src.stax import linear

from nt_deq import stax
from nt_deq.kernels.convolution import diagonal_spatial, full_spatial

PADDINGS = tuple(linear.Padding)
SHAPES = {  # sides of the image, filter, strides
    "1-D": ((7,), (3,), (1,)),
    "an even filter, and strides": ((7, 6), (2, 4), (2, 3)),
    "a filter of 1": ((4, 5), (1, 3), (1, 2)),
    "3-D": ((4, 3, 5), (3, 2, 3), (1, 1, 2)),
    "a filter as large as the image": ((3, 4), (3, 4), (1, 1)),
}


@pytest.mark.parametrize(("sides", "filter_shape", "strides"), SHAPES.values(), ids=SHAPES)
def test_they_are_those_of_neural_tangents(dtype, sides, filter_shape, strides):
    """Each is a mean of numbers of order 1, and sums of up to 36 are rounded."""
    rng = np.random.default_rng(0)
    for padding, batch in zip(PADDINGS, ((2,), (2, 3), (1, 2)), strict=True):
        at_two = jnp.asarray(rng.normal(size=(*batch, *np.repeat(sides, 2))), dtype)
        at_one = jnp.asarray(rng.normal(size=(*batch, *sides)), dtype)
        args = filter_shape, strides, padding, len(batch)
        for a, ours, theirs in (
            (at_two, full_spatial, linear._conv_kernel_full_spatial_shared),
            (at_one, diagonal_spatial, linear._conv_kernel_diagonal_spatial),
        ):
            found, expected = ours(a, *args), theirs(a, *args)
            assert expected is not None
            if ours is full_spatial:  # whose axes are the other way around
                pairs = range(expected.ndim - 2, len(batch) - 1, -2)
                order = *range(len(batch)), *(i + j for i in pairs for j in (0, 1))
                expected = jnp.transpose(expected, order)
            np.testing.assert_allclose(found, expected, atol=8 * np.finfo(dtype).eps)


def test_scalars_and_nothing_stay():
    for kernel in (full_spatial, diagonal_spatial):
        assert kernel(None, (3,), (1,), linear.Padding.SAME, 2) is None
        assert kernel(jnp.asarray(2.0), (3,), (1,), linear.Padding.SAME, 2) == 2


def network(module, *tail, **kwargs):
    conv = module.Conv(5, (3, 2), (1, 2), "CIRCULAR", 1.3, 0.2, **kwargs)
    return module.serial(conv, module.Relu(), module.Conv(4, (2, 3), padding="SAME"), *tail)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("parameterization", slow_except(["ntk"], ["ntk", "standard"]))
@pytest.mark.parametrize("tail", slow_except(["GlobalAvgPool"], ["Flatten", "GlobalAvgPool"]))
def test_networks_are_those_of_neural_tangents(x64, tail, parameterization):
    """With masked pixels, derivatives, and another order of the axes."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    masked = x.at[0, 1, 2].set(-7.0)
    ours, theirs = (
        network(module, getattr(module, tail)(), parameterization=parameterization)
        for module in (stax, nt_stax)
    )
    for options in ({}, {"mask_constant": -7.0}):
        found, expected = (net[2](masked, x, ("nngp", "ntk"), **options) for net in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    slopes = [
        jax.jvp(lambda x, net=net: net[2](x, None, "ntk")[0, 1], (x,), (jnp.sin(x),))[1]
        for net in (ours, theirs)
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-11)


@pytest.mark.usefixtures("promotion")
def test_finite_layers_are_those_of_neural_tangents():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    layers = [
        module.Conv(5, (3, 2), dimension_numbers=("NCHW", "OIHW", "NHWC"))
        for module in (stax, nt_stax)
    ]
    (shape, params), expected = (layer[0](jax.random.key(1), x.shape) for layer in layers)
    assert shape == expected[0]
    np.testing.assert_array_equal(layers[0][1](params, x), layers[1][1](expected[1], x))
    np.testing.assert_allclose(*(layer[2](x, None, "nngp") for layer in layers), rtol=1e-5)
