"""Dense and convolutional layers in NTK and in standard parameterisation.

In NTK parameterisation parameters are iid `N(0, 1)` and the standard deviations scale them in the
forward pass, so that a step of gradient descent moves the function by the same amount at every
width. In standard parameterisation they are drawn with those deviations, and not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nt_deq import _checks

PADDINGS = ("SAME", "CIRCULAR", "VALID")


class _Linear(nnx.Module):
    """`W_std/√fan_in · (x ∗ W) + b_std · b`, for a product `∗` that a layer defines."""

    def __init__(self, shape, W_std, b_std, parameterization, rngs):
        _checks.standard_deviations(W_std=W_std, b_std=0.0 if b_std is None else b_std)
        if parameterization not in ("ntk", "standard"):
            raise ValueError(
                f"parameterization={parameterization!r} has to be 'ntk' or 'standard'."
            )
        self.W_std, self.b_std, self.parameterization = W_std, b_std, parameterization
        standard = parameterization == "standard"
        fan_in = math.prod(shape[:-1])
        W = jax.random.normal(rngs.params(), shape)
        self.W = nnx.Param(W * (W_std / fan_in**0.5) if standard else W)
        if b_std is not None:
            b = jax.random.normal(rngs.params(), shape[-1:])
            self.b = nnx.Param(b * b_std if standard else b)

    def _affine(self, product: Array) -> Array:
        """Scales `x ∗ W` and adds the bias."""
        if self.parameterization == "standard":
            return product if self.b_std is None else product + self.b[...]
        fan_in = math.prod(self.W.shape[:-1])
        y = product * jnp.asarray(self.W_std / fan_in**0.5, product.dtype)
        return y if self.b_std is None else y + self.b_std * self.b[...]


class Dense(_Linear):
    """`W_std/√in · x W + b_std · b`, `(..., in_features) -> (..., out_features)`.

    The same function of the same parameters as `stax.Dense(out_features, W_std, b_std,
    parameterization=...)`.

    Args:
      in_features: size of the input.
      out_features: size of the output.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; `None` for none.
      parameterization: `'ntk'` or `'standard'`: whether the deviations scale the parameters in
        every forward pass, or once, when they are drawn.
      rngs: draws `W` and `b` from its stream `params`.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        W_std: float = 1.0,
        b_std: float | None = None,
        parameterization: str = "ntk",
        rngs: nnx.Rngs,
    ):
        _checks.count("in_features", in_features)
        _checks.count("out_features", out_features)
        super().__init__((in_features, out_features), W_std, b_std, parameterization, rngs)

    def __call__(self, x: Array) -> Array:
        """Applies the layer to `x`, `(..., in_features)`."""
        _checks.features("x", x, self.W.shape[0])
        return self._affine(jnp.matmul(x, self.W[...], precision="highest"))


class Conv(_Linear):
    """A convolution, `(batch, ..., in_features) -> (batch, ..., out_features)`.

    The same function of the same parameters as `stax.Conv(out_features, kernel_size,
    padding=padding, W_std=W_std, b_std=b_std, parameterization=...)`: `fan_in` is `in_features`
    times the size of the kernel.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: of the filter, one integer for each of one or two spatial axes, as `(3, 3)`.
      padding: `'SAME'` (zeros), `'CIRCULAR'` (a torus), which keep the shape, or `'VALID'`.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; `None` for none.
      parameterization: `'ntk'` or `'standard'`, as of `Dense`.
      rngs: draws `W` and `b` from its stream `params`.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        padding: str = "SAME",
        W_std: float = 1.0,
        b_std: float | None = None,
        parameterization: str = "ntk",
        rngs: nnx.Rngs,
    ):
        _checks.count("in_features", in_features)
        _checks.count("out_features", out_features)
        if not (isinstance(kernel_size, Sequence) and len(kernel_size) in (1, 2)):
            raise ValueError(
                f"kernel_size={kernel_size!r} has to be one or two integers, as (3,) or (3, 3)."
            )
        for size in kernel_size:
            _checks.count("kernel_size", size)
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} has to be one of {', '.join(PADDINGS)}.")
        self.padding = padding
        shape = (*kernel_size, in_features, out_features)
        super().__init__(shape, W_std, b_std, parameterization, rngs)

    def __call__(self, x: Array) -> Array:
        """Applies the layer to `x`, `(batch, ..., in_features)`."""
        W = self.W[...]
        _checks.features("x", x, W.shape[-2])
        if x.ndim != W.ndim:
            raise ValueError(
                f"x has shape {x.shape}; this layer was made for {W.ndim - 2} spatial axes between "
                "the batch and the features."
            )
        padding = self.padding
        if padding == "CIRCULAR":
            around = [((size - 1) // 2, size // 2) for size in W.shape[:-2]]
            x, padding = jnp.pad(x, [(0, 0), *around, (0, 0)], mode="wrap"), "VALID"
        space = "HW"[: W.ndim - 2]
        product = lax.conv_general_dilated(
            x,
            W,
            window_strides=(1,) * len(space),
            padding=padding,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
            precision="highest",
        )
        return self._affine(product)
