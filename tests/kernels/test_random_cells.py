"""What holds of `stax.FixedPoint` for every cell: small ones, of random weights, on random inputs.

The standard deviations are traced, so that a cell is one program for all examples.
"""

# neural-tangents types a kernel as any tree of kernels.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from functools import cache

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from nt_deq import stax
from nt_deq.kernels.cell import unreversed

ROWS, LAYERS = 4, 300
ORDER = jnp.array([2, 0, 3, 1])
EXAMPLES = settings(deadline=None, max_examples=15, derandomize=True)
pytestmark = pytest.mark.usefixtures("x64_module")


def network(stax, name, stds):
    """Cell, injection and what follows them, from ours or from the original `stax`."""
    W_std, W_std_2, U_std, b_std = stds
    serial, phi = stax.serial, {"erf": stax.Erf(), "relu": stax.Relu(), "gelu": stax.Gelu()}
    kind, *names = name.split()
    first, last = phi[names[0]], phi[names[-1]]
    if kind == "conv":
        conv = dict(filter_shape=(3,), padding="CIRCULAR")
        cell = serial(first, stax.Conv(1, W_std=W_std, **conv))
        inject = stax.Conv(1, W_std=U_std, b_std=b_std, **conv)
        return cell, inject, serial(last, stax.GlobalAvgPool(), stax.Dense(1))
    dense = stax.Dense(1, W_std)
    cell = {
        "dense": serial(first, dense),
        "layers": serial(first, stax.Dense(1, W_std_2, b_std), last, dense),
        "normed": serial(stax.LayerNorm(), first, dense),
        "branches": serial(
            stax.FanOut(2),
            stax.parallel(serial(first, dense), serial(last, stax.Dense(1, W_std_2 / 2))),
            stax.FanInSum(),
        ),
    }[kind]
    return cell, stax.Dense(1, U_std, b_std), serial(last, stax.Dense(1))


CELLS = (
    "dense erf",
    "dense relu",
    "dense gelu",
    "layers erf relu",
    "normed gelu",
    "branches relu erf",
    "conv erf",
    "conv relu",
)


@cache
def kernels(name):
    """A program: kernels of batches, those of explicit layers for the first, and its last step."""

    def ours(x, stds):
        cell, inject, head = network(stax, name, stds)
        k = unreversed(stax.FixedPoint(cell, inject)[2](x))
        return jnp.stack([(out := head[2](k)).nngp, out.ntk])

    def layers(x, stds):
        cell, inject, head = network(nt.stax, name, stds)
        s = unreversed(inject[2](x, None))

        def step(_, k):
            old = s.replace(cov1=k[0], nngp=k[1], ntk=k[2])
            new = unreversed(cell[2](old))
            assert new.cov1 is not None
            assert s.cov1 is not None
            return new.cov1 + s.cov1, new.nngp + s.nngp, new.ntk + s.ntk

        k = lax.fori_loop(0, LAYERS, step, (s.cov1, s.nngp, s.ntk))
        moved = [
            jnp.max(jnp.abs(b - a)) / jnp.max(jnp.abs(b))
            for a, b in zip(k, step(0, k), strict=True)
        ]
        out = head[2](s.replace(cov1=k[0], nngp=k[1], ntk=k[2]))
        return jnp.stack([out.nngp, out.ntk]), jnp.max(jnp.stack(moved))

    return jax.jit(lambda x, stds: (jax.vmap(ours, (0, None))(x, stds), layers(x[0], stds)))


@pytest.mark.parametrize("name", CELLS)
@EXAMPLES
@given(
    seed=st.integers(0, 2**32 - 1),
    W_std=st.floats(0.1, 1.3),
    W_std_2=st.floats(0.1, 1.3),
    U_std=st.floats(0.3, 3.0),
    b_std=st.sampled_from([0.0, 0.5]),
)
def test_a_kernel_is_that_of_explicit_layers_pair_by_pair(name, seed, W_std, W_std_2, U_std, b_std):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 3, 2) if name.startswith("conv") else (ROWS, 3))
    x *= 10 ** rng.uniform(-1, 1, ROWS).reshape(-1, *[1] * (x.ndim - 1))
    beside = np.concatenate([x[:2], -x[:1], 100 * x[1:2]])  # other neighbours of the first two
    batches = jnp.stack([x, x[ORDER], beside])
    found, (explicit, moved) = kernels(name)(batches, jnp.array([W_std, W_std_2, U_std, b_std]))
    assume(moved < 1e-14)  # else there is no equilibrium, or 300 layers are too few to know it
    for kernel, *others in zip(*np.asarray(found), np.asarray(explicit), strict=True):
        size = np.sqrt(np.outer(np.diag(kernel), np.diag(kernel)))
        permuted, part, layers = others[0] / size[np.ix_(ORDER, ORDER)], others[1], others[2] / size
        correlation = kernel / size
        same = dict(rtol=0, atol=1e-12)
        np.testing.assert_allclose(correlation, correlation.T, **same)
        np.testing.assert_allclose(permuted, correlation[np.ix_(ORDER, ORDER)], **same)
        np.testing.assert_allclose(part[:2, :2] / size[:2, :2], correlation[:2, :2], **same)
        assert np.linalg.eigvalsh(correlation)[0] > -1e-13
        # The original's κ₀(ρ) is off by √ε where an input meets itself.
        np.testing.assert_allclose(np.diag(layers), 1, rtol=1e-6)
        off = ~np.eye(ROWS, dtype=bool)
        np.testing.assert_allclose(layers[off], correlation[off], rtol=0, atol=1e-11)
