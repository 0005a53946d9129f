"""Everything differentiable under everything at once: jit, vmap, jvp, vjp and both twice.

One program per function: it is mapped over three parameters, whose values also give differences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow_except

from nt_deq import Anderson, deq_kernel, equilibrium, stax
from nt_deq.flax import DEQ

STEP = 1e-4
RNG = np.random.default_rng(0)
X, IMAGES, W = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 4, 2)), RNG.normal(size=(3, 3)) / 4


def of_deq_kernel(w):
    solution = deq_kernel(X, W_std=w, b_std=w / 2, activation="erf")
    return solution.nngp + solution.ntk


def of_layer(w):
    return stax.DEQ(1, w, b_std=0.1)[2](X, None, "ntk")


def of_cell(w):
    cell = stax.serial(stax.Erf(), stax.Dense(1, w))
    return stax.FixedPoint(cell, stax.Dense(1))[2](X, None, "ntk")


def of_convolution(w):
    conv = dict(filter_shape=(3,), padding="CIRCULAR")
    cell = stax.serial(stax.Erf(), stax.Conv(1, W_std=w, **conv))
    return stax.FixedPoint(cell, stax.Conv(1, **conv))[2](IMAGES, None, "ntk")


def of_attention(w):
    attention = stax.GlobalSelfAttention(
        4, n_chan_key=4, n_chan_val=4, n_heads=2, linear_scaling=True, W_value_std=w
    )
    cell = stax.serial(stax.Erf(), attention)
    return stax.FixedPoint(cell, stax.Conv(4, (1,)))[2](IMAGES, None, "ntk")


def of_equilibrium(w):
    return equilibrium(
        lambda z, w: jnp.tanh(w * z @ W) + X, jnp.zeros_like(X), w, solver=Anderson()
    )


def of_module(w):
    graph, params = nnx.split(DEQ(3, 3, W_std=0.4, activation="erf", rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda p: w * p, params))(X)


FUNCTIONS = {
    fn.__name__.removeprefix("of_"): fn
    for fn in (
        of_deq_kernel, of_layer, of_cell, of_convolution, of_attention, of_equilibrium, of_module,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", slow_except(FUNCTIONS.keys() - {"attention"}, FUNCTIONS))
def test_derivatives_agree_with_each_other_and_with_differences(x64, name):
    def fn(w):
        return jnp.sum(jnp.sin(FUNCTIONS[name](w)))

    def everything(w):
        one = jnp.ones_like(w)
        gradient = jax.grad(fn)
        value, forward = jax.jvp(fn, (w,), (one,))
        reverse, forward_over_reverse = jax.jvp(gradient, (w,), (one,))
        return {
            "value": value,
            "forward": forward,
            "reverse": reverse,
            "forward over reverse": forward_over_reverse,
            "reverse over reverse": jax.grad(gradient)(w),
        }

    at = 0.7
    found = jax.jit(jax.vmap(everything))(at + STEP * jnp.array([-1.0, 0.0, 1.0]))

    def difference(of):
        return (found[of][2] - found[of][0]) / (2 * STEP)

    # Differences have an error of STEP² times a third derivative; derivatives that of their solves.
    np.testing.assert_allclose(found["forward"][1], difference("value"), rtol=1e-5)
    np.testing.assert_allclose(found["reverse"], found["forward"], rtol=1e-9)
    np.testing.assert_allclose(found["forward over reverse"][1], difference("reverse"), rtol=1e-5)
    np.testing.assert_allclose(
        found["reverse over reverse"], found["forward over reverse"], rtol=1e-8
    )
    np.testing.assert_allclose(found["value"][1], fn(jnp.asarray(at)), rtol=1e-12)


@pytest.mark.parametrize("name", ["cell", "convolution", "attention"])
def test_pairs_do_not_see_each_other(x64, name):
    """Another order of the inputs is another order of the kernel, which is positive definite."""
    x = RNG.normal(size=(4, *{"cell": X}.get(name, IMAGES).shape[1:]))
    conv = dict(filter_shape=(3,), padding="CIRCULAR")
    attention = stax.GlobalSelfAttention(
        4, n_chan_key=4, n_chan_val=4, n_heads=2, linear_scaling=True, W_value_std=0.7
    )
    cell, inject = {
        "cell": (stax.Dense(4, 0.9), stax.Dense(4, 1.0, 0.1)),
        "convolution": (stax.Conv(4, W_std=0.9, **conv), stax.Conv(4, b_std=0.1, **conv)),
        "attention": (attention, stax.Conv(4, (1,), b_std=0.1)),
    }[name]
    layer = stax.FixedPoint(stax.serial(stax.Erf(), cell), inject)
    pooled = [] if name == "cell" else [stax.GlobalAvgPool()]
    kernel_fn = stax.serial(layer, stax.Erf(), *pooled, stax.Dense(1))[2]
    order = jnp.array([2, 0, 3, 1])
    both = jax.jit(jax.vmap(lambda x: tuple(kernel_fn(x, None, ("nngp", "ntk")))))
    for kernel, other in both(jnp.stack([x, x[order]])):
        np.testing.assert_allclose(other, kernel[order][:, order], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-12, atol=1e-14)
        assert np.linalg.eigvalsh(kernel)[0] > 0
