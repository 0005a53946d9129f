"""Networks by tiles of pairs against themselves as a whole, and against neural-tangents."""

from __future__ import annotations

import nt_deq  # isort: split

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from conftest import float64
from marks import slow_except

from nt_deq import NoEquilibriumError, stax
from nt_deq.kernels import tiles

N1, N2 = 340, 330  # more than a tile of 320, and no multiple of it


def inputs(n, *shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(dtype)


def explicit(stax):
    layers = stax.Dense(1, 1.3, 0.1), stax.Relu(), stax.Dense(1, 1.1, 0.2), stax.Erf()
    return stax.serial(*layers, stax.Dense(1))[2]


def images(stax, *tail):
    layers = stax.Conv(1, (3, 3), padding="SAME"), stax.Relu(), stax.Conv(1, (3, 3), W_std=0.9)
    return stax.serial(*layers, stax.Relu(), *tail)[2]


def untiled(kernel_fn):
    return vars(kernel_fn)["__wrapped__"]


def close(found, expected, tolerance):
    """Relative to the largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(b))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("two", [False, True])
def test_it_is_neural_tangents_kernel(two):
    x1, x2 = inputs(N1, 5), inputs(N2, 5, seed=1) if two else None
    reference = explicit(nt.stax)
    for get in ("nngp", "ntk", ("ntk", "nngp")):
        expected = reference(x1, x2, get)
        for kernel_fn in (explicit(stax), nt_deq.tiled(reference)):
            found = kernel_fn(x1, x2, get)
            assert type(found) is type(expected)
            # Where an input meets itself neural-tangents' NTK is off by the root of rounding.
            close(found, expected, 1e-14 if two else 3e-8)


@pytest.mark.usefixtures("x64")
def test_what_is_the_same_input_is_one():
    x = jnp.asarray(inputs(N1, 5))
    kernel_fn = explicit(stax)
    np.testing.assert_array_equal(kernel_fn(x, x, "ntk"), kernel_fn(x, None, "ntk"))


def test_the_diagonal_is_exact_in_float32():
    x = inputs(N1, 40, dtype=np.float32)
    found = explicit(stax)(x, None, "ntk")
    with float64():
        exact = untiled(explicit(stax))(x.astype(np.float64), None, "ntk")
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(np.diag(found), np.diag(exact), rtol=32 * eps)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layers", slow_except(["pool", "spatial"], ["pool", "flatten", "spatial"]))
def test_images(layers, monkeypatch):
    monkeypatch.setattr(tiles, "_SIDE_ON_CPU", 64)  # 8 images whose blocks are diagonals
    tail = {
        "pool": lambda stax: (stax.GlobalAvgPool(), stax.Dense(1)),
        "flatten": lambda stax: (stax.Flatten(), stax.Dense(1)),
        "spatial": lambda stax: (),
    }[layers]
    x1, x2 = inputs(10, 8, 8, 3), inputs(9, 8, 8, 3, seed=1)
    for x in (None, x2):
        expected = images(nt.stax, *tail(nt.stax))(x1, x, ("nngp", "ntk"))
        close(images(stax, *tail(stax))(x1, x, ("nngp", "ntk")), expected, 1e-7)


@pytest.mark.usefixtures("x64")
def test_infinitely_deep_networks():
    x1, x2 = inputs(N1, 5), inputs(N2, 5, seed=1)
    cell = stax.serial(stax.Erf(), stax.Dense(1, 0.8))
    for layer in (
        stax.DEQ(1, 0.9, b_std=0.2, activation="gelu"),
        stax.FixedPoint(cell, stax.Dense(1)),
    ):
        kernel_fn = stax.serial(layer, stax.Dense(1))[2]
        for x in (None, x2):
            whole = untiled(kernel_fn)(x1, x, ("nngp", "ntk"))
            close(kernel_fn(x1, x, ("nngp", "ntk")), whole, 1e-14)


@pytest.mark.usefixtures("x64")
def test_derivatives():
    x = jnp.asarray(inputs(N1, 3))
    weights = jnp.asarray(inputs(N1, N1, seed=2))

    def loss(whole, W_std, x):
        layers = stax.Dense(1, W_std, 0.1), stax.Relu(), stax.DEQ(1, 0.8 * W_std, activation="erf")
        kernel_fn = stax.serial(*layers, stax.Dense(1))[2]
        kernel_fn = untiled(kernel_fn) if whole else kernel_fn
        return jnp.sum(weights * kernel_fn(x, None, "ntk"))

    found, expected = (jax.grad(loss, (1, 2))(whole, 1.1, x) for whole in (False, True))
    close(found, expected, 1e-12)
    _, slope = jax.jvp(lambda W_std: loss(False, W_std, x), (1.1,), (1.0,))
    np.testing.assert_allclose(slope, expected[0], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_under_jit_vmap_and_batches():
    x1, x2 = inputs(N1, 5), inputs(N2, 5, seed=1)
    kernel_fn = explicit(stax)
    expected = kernel_fn(x1, x2, "ntk")
    close(jax.jit(lambda a, b: kernel_fn(a, b, "ntk"))(x1, x2), expected, 1e-14)
    mapped = jax.vmap(lambda a: kernel_fn(a, jnp.asarray(x2), "ntk"))(jnp.stack([x1, 2 * x1]))
    close(mapped[0], expected, 1e-14)
    close(nt.batch(kernel_fn, batch_size=30)(x1, x2, "ntk"), expected, 1e-14)


def test_what_fails_is_named():
    """By the layer, as of a kernel that is small; the numbers are those of the whole batch."""
    x = inputs(N1, 5, dtype=np.float32)
    broken = x.copy()
    broken[280, 0] = np.nan
    kernel_fn = stax.serial(stax.DEQ(1, 0.9, activation="erf"), stax.Dense(1))[2]
    for args, said in (
        ((broken, None), "row 280 of x1"),
        ((broken, x), "row 280 of x1"),
        ((x, broken), "row 280 of x2"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel_fn(*args, "ntk")
    with pytest.raises(NoEquilibriumError, match=r"W_std=1\.5"):
        stax.DEQ(1, 1.5)[2](x, None, "nngp")
    # A kernel that a layer has no objection to is returned, in just the entries concerned.
    lost = np.isnan(explicit(stax)(broken, x, "ntk"))
    assert lost[280].all()
    assert lost.sum() == N1


@pytest.mark.usefixtures("x64")
def test_what_goes_whole():
    x1, x2 = inputs(N1, 5), inputs(N2, 5, seed=1)
    kernel_fn, whole = explicit(stax), untiled(explicit(stax))
    assert kernel_fn(x1, x2).nngp.shape == (N1, N2)
    close(kernel_fn(x1, x2, ("nngp", "cov1")), whole(x1, x2, ("nngp", "cov1")), 1e-14)
    inputs_kernel = stax.Identity()[2](x1, x2)
    close(kernel_fn(inputs_kernel).nngp, whole(x1, x2, "nngp"), 1e-14)
    x1[0] = 7.0
    masked = kernel_fn(x1, x2, "nngp", mask_constant=7.0)
    close(masked, whole(x1, x2, "nngp", mask_constant=7.0), 1e-14)
    assert nt_deq.tiled(kernel_fn) is kernel_fn


def test_memory_is_the_results_and_one_program_serves_every_size():
    kernel_fn = stax.serial(*[stax.serial(stax.Dense(1), stax.Relu())] * 6, stax.Dense(1))[2]

    def compiled(n):
        x = jax.ShapeDtypeStruct((n, 10), np.float32)
        both = jax.jit(lambda x: tuple(kernel_fn(x, None, ("nngp", "ntk")))).lower(x).compile()
        return both.memory_analysis().temp_size_in_bytes, len(both.as_text())

    (_, size), (memory, more_size) = compiled(1000), compiled(2000)
    results = 2 * 4 * 2000**2
    assert memory < results + 8e6  # the loop's copy of them, and tiles
    assert more_size < 1.2 * size
