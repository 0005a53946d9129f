"""Networks over the layers of neural-tangents, and what their kernels are without any bridge.

`stax_reference.npz` holds the kernels that neural-tangents 0.6.5 computes by itself, in float64, on
JAX 0.5.3, the last that it imports on. It is written there by `python tests/stax_layers.py`.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

REFERENCE = Path(__file__).with_name("stax_reference.npz")
MASK = 100.0


def inputs(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two batches, of three and of two, of inputs of one shape."""
    x = np.random.default_rng(0).normal(size=(5, *shape))
    return x[:3], x[3:]


def arguments(name: str, shape: tuple[int, ...], x2_given: bool) -> tuple[tuple, dict]:
    """What a kernel function is called with: `(x1, x2), kwargs`."""
    x1, x2 = inputs(shape)
    kwargs = {}
    if name.startswith("masked"):
        kwargs["mask_constant"] = MASK
        x1[0, -1], x1[2, -2:], x2[1, -1] = MASK, MASK, MASK
    if name == "aggregate":
        edges = np.random.default_rng(1).uniform(size=(5, shape[0], shape[0]))
        kwargs["pattern"] = (edges[:3], edges[3:] if x2_given else edges[:3])
    return (x1, x2 if x2_given else None), kwargs


def networks(stax) -> dict[str, tuple]:
    """Name -> (network, shape of one input); `stax` is `neural_tangents.stax`."""
    vector, sequence, image = (6,), (5, 4), (6, 5, 3)

    def dense(*layers):
        return stax.serial(
            stax.Dense(64, 1.2, 0.1), *layers, stax.Dense(64, 1.1, 0.2), *layers, stax.Dense(2)
        )

    def conv(*layers, head=None):
        body = stax.serial(stax.Conv(16, (3, 3), padding="SAME", W_std=1.3, b_std=0.1), stax.Relu())
        return stax.serial(body, *layers, head or stax.Flatten(), stax.Dense(2))

    def attention(**kwargs):
        return stax.serial(
            stax.Dense(32),
            stax.Relu(),
            stax.GlobalSelfAttention(32, n_chan_key=32, n_chan_val=32, n_heads=8, **kwargs),
            stax.GlobalAvgPool(),
            stax.Dense(2),
        )

    elementwise = {
        "relu": stax.Relu(),
        "leaky_relu": stax.LeakyRelu(0.2),
        "abs": stax.Abs(),
        "ab_relu": stax.ABRelu(0.3, 1.1),
        "erf": stax.Erf(),
        "gelu": stax.Gelu(),
        "sigmoid_like": stax.Sigmoid_like(),
        "sin": stax.Sin(),
        "cos": stax.Cos(b=0.4),
        "rbf": stax.Rbf(1.2),
        "gaussian": stax.Gaussian(),
        "exp_normalized": stax.ExpNormalized(),
        "gabor": stax.Gabor(),
        "sign": stax.Sign(),
        "hermite": stax.Hermite(3),
        "monomial": stax.Monomial(2),
        "polynomial": stax.Polynomial([0.1, 0.5, 0.2]),
        "numerical": stax.ElementwiseNumerical(jnp.tanh, 25),
    }
    found = {name: (dense(layer), vector) for name, layer in elementwise.items()}
    found |= {
        "standard": (
            stax.serial(stax.Dense(64, parameterization="standard"), stax.Relu(), stax.Dense(2)),
            vector,
        ),
        "dropout": (dense(stax.Relu(), stax.Dropout(0.8, mode="train")), vector),
        "layer_norm": (dense(stax.LayerNorm(), stax.Relu()), vector),
        "residual": (
            dense(
                stax.FanOut(2),
                stax.parallel(stax.Identity(), stax.serial(stax.Relu(), stax.Dense(64))),
                stax.FanInSum(),
            ),
            vector,
        ),
        "concat": (
            stax.serial(
                stax.FanOut(2),
                stax.parallel(stax.Dense(32), stax.serial(stax.Dense(32), stax.Dense(32))),
                stax.FanInConcat(-1),
                stax.Dense(16),
                stax.Relu(),
                stax.Dense(2),
            ),
            vector,
        ),
        "product": (
            stax.serial(
                stax.FanOut(2), stax.parallel(stax.Dense(32), stax.Dense(32)), stax.FanInProd()
            ),
            vector,
        ),
        "repeat": (stax.repeat(stax.serial(stax.Dense(6), stax.Erf()), 3), vector),
        "conv": (conv(), image),
        "conv_valid": (conv(stax.Conv(16, (2, 2), (2, 1), "VALID")), image),
        "conv_circular": (conv(stax.Conv(16, (2, 2), padding="CIRCULAR")), image),
        "conv_transpose": (conv(stax.ConvTranspose(16, (2, 2), (2, 2), "SAME")), image),
        "conv_local": (conv(stax.ConvLocal(16, (2, 2), padding="SAME")), image),
        "avg_pool": (conv(stax.AvgPool((2, 2), (2, 2), "SAME")), image),
        "sum_pool": (conv(stax.SumPool((2, 2), padding="VALID")), image),
        "global_avg_pool": (conv(head=stax.GlobalAvgPool()), image),
        "global_sum_pool": (conv(head=stax.GlobalSumPool()), image),
        "conv_layer_norm": (conv(stax.Conv(16, (2, 2)), stax.LayerNorm((1, 2, 3))), image),
        "index": (conv(stax.Index(stax.Slice[:, 1:4, ::2])), image),
        "image_resize": (conv(stax.ImageResize((-1, 3, 4, -1), "bilinear")), image),
        "attention": (attention(), sequence),
        "attention_positional": (
            attention(
                linear_scaling=False,
                attention_mechanism="IDENTITY",
                pos_emb_type="CONCAT",
                pos_emb_decay_fn=lambda d: 1 / (1 + d**2),
                n_chan_pos_emb=8,
            ),
            sequence,
        ),
        "dot_general": (
            stax.serial(
                stax.Dense(16),
                stax.DotGeneral(
                    rhs=np.linspace(-1.0, 1.0, 10).reshape(5, 2),
                    dimension_numbers=(((1,), (0,)), ((), ())),
                ),
                stax.Flatten(),
                stax.Dense(2),
            ),
            sequence,
        ),
        "masked_conv": (conv(head=stax.GlobalAvgPool()), image),
        "masked_attention": (attention(), sequence),
        "aggregate": (
            stax.serial(stax.Dense(16), stax.Aggregate(1), stax.Relu(), stax.GlobalSumPool()),
            sequence,
        ),
    }
    return found


def kernels(name: str, network: tuple, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A network's kernels, of the first batch with itself and with the second."""
    found = {}
    for suffix in ("xx", "xy"):
        pair, kwargs = arguments(name, shape, x2_given=suffix == "xy")
        kernel = network[2](*pair, ("nngp", "ntk"), **kwargs)
        found[f"{name}/nngp/{suffix}"] = np.asarray(kernel.nngp)
        found[f"{name}/ntk/{suffix}"] = np.asarray(kernel.ntk)
    return found


if __name__ == "__main__":
    assert jax.__version__ == "0.5.3", f"the reference is for JAX 0.5.3, not {jax.__version__}"
    jax.config.update("jax_enable_x64", True)
    # The one part of neural-tangents that wants TensorFlow.
    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
    from neural_tangents import stax

    reference = {}
    for name, (network, shape) in networks(stax).items():
        reference |= kernels(name, network, shape)
    np.savez_compressed(REFERENCE, **reference)
