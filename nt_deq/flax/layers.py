"""Dense and convolutional layers in NTK and in standard parameterisation.

In NTK parameterisation parameters are iid `N(0, 1)` and the standard deviations scale them in the
forward pass, so that a step of gradient descent moves the function by the same amount at every
width. In standard parameterisation they are drawn with those deviations, and not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Num, PRNGKeyArray

from nt_deq import _checks
from nt_deq.convolution import convolve
from nt_deq.errors import ArgumentError
from nt_deq.fixed_point.solver import at_least_single
from nt_deq.flax.spectral_norm import convolution_norm, dense_norm
from nt_deq.typing import Batch, Number

Parameterization: TypeAlias = Literal["ntk", "standard"]
Padding: TypeAlias = Literal["SAME", "CIRCULAR", "VALID"]


@runtime_checkable
class Keys(Protocol):
    """What parameters are drawn with, if not `nnx.Rngs`: a key at every call of `params`."""

    params: Callable[[], PRNGKeyArray]


class _Linear(nnx.Module):
    """`W_std/√fan_in · (x ∗ W) + b_std · b`, for a product `∗` that a layer defines."""

    def __init__(
        self, shape, W_std, b_std, parameterization, spectral_bound, dtype, param_dtype, rngs
    ):
        _checks.standard_deviations(W_std=W_std, b_std=0.0 if b_std is None else b_std)
        if parameterization not in get_args(Parameterization):
            raise ArgumentError(
                f"parameterization={parameterization!r} must be 'ntk' or 'standard'."
            )
        if spectral_bound is not None and not 0 < spectral_bound < math.inf:
            raise ArgumentError(
                f"spectral_bound={spectral_bound} must be a positive number, or None for weights "
                "of any norm."
            )
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if value is not None and not jnp.issubdtype(value, jnp.floating):
                raise ArgumentError(f"{name}={value} must be a floating-point dtype, or None.")
        self.W_std, self.b_std, self.parameterization = W_std, b_std, parameterization
        self.spectral_bound, self.dtype = spectral_bound, dtype
        self.scaled_for: tuple[int, ...] | None = None  # set by normalize
        standard = parameterization == "standard"
        fan_in = math.prod(shape[:-1])
        param_dtype = jnp.zeros(()).dtype if param_dtype is None else param_dtype
        W = jax.random.normal(rngs.params(), shape, param_dtype)
        self.W = nnx.Param(W * (W_std / fan_in**0.5) if standard else W)
        if b_std is not None:
            b = jax.random.normal(rngs.params(), shape[-1:], param_dtype)
            self.b = nnx.Param(b * b_std if standard else b)

    @property
    def scale(self) -> Number:
        """What the parameter `W` is multiplied by in the forward pass."""
        if self.parameterization == "standard":
            return 1.0
        return self.W_std / math.prod(self.W.shape[:-1]) ** 0.5

    def _norm(self, W: Array, space: tuple[int, ...]) -> Float[Array, ""]:
        """An upper bound of the norm of `x -> x ∗ W`."""
        raise NotImplementedError

    def bounded(self, space: tuple[int, ...]) -> Float[Array, "*space in_features out_features"]:
        """`W`, scaled down so that the layer's linear map has a norm of at most `spectral_bound`.

        Args:
          space: size of the spatial axes, which the norm of a convolution depends on.
        """
        W = self.W[...]
        if self.spectral_bound is None:
            return W
        norm = self.scale * self._norm(W.astype(at_least_single(W.dtype)), space)
        small = norm <= self.spectral_bound
        factor = jnp.where(small, 1, self.spectral_bound / jnp.where(small, 1, norm))
        return W * factor.astype(W.dtype)

    def _operands(self, x: Batch, space: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """`x` and `W` in the dtype of the product."""
        W = self.bounded(space)
        dtype = jnp.promote_types(x.dtype, W.dtype) if self.dtype is None else self.dtype
        return jnp.asarray(x, dtype), W.astype(dtype)

    def _affine(self, product: Array) -> Array:
        """Scales `x ∗ W` and adds the bias."""
        y = product
        if self.parameterization == "ntk":
            y = y * jnp.asarray(self.scale, y.dtype)
        if self.b_std is None:
            return y
        b = self.b[...] if self.parameterization == "standard" else self.b_std * self.b[...]
        return y + jnp.broadcast_to(b.astype(y.dtype), y.shape)


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
      spectral_bound: the weights are scaled down, in every forward pass, to a linear map of at most
        this norm; smaller ones are left as they are. `None` bounds nothing. The norm is known from
        above, a few per cent high (Delattre et al. 2023), and the factor is differentiated.
      dtype: of the product; `None` is that of `x` and the parameters.
      param_dtype: of the parameters; `None` is JAX's default, float32 or float64.
      rngs: draws `W` and `b` from its stream `params`.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        W_std: Number = 1.0,
        b_std: Number | None = None,
        parameterization: Parameterization = "ntk",
        spectral_bound: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | Keys,
    ):
        _checks.count("in_features", in_features)
        _checks.count("out_features", out_features)
        super().__init__(
            (in_features, out_features),
            *(W_std, b_std, parameterization, spectral_bound, dtype, param_dtype, rngs),
        )

    def _norm(self, W: Array, space: tuple[int, ...]) -> Float[Array, ""]:
        del space
        return dense_norm(W)

    def __call__(self, x: Num[Batch, "*batch in_features"]) -> Float[Array, "*batch out_features"]:
        """Applies the layer to `x`, `(..., in_features)`."""
        _checks.features("x", x, self.W.shape[0])
        return self._affine(jnp.matmul(*self._operands(x), precision="highest"))


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
      spectral_bound: a bound of the norm, as of `Dense`, of the map of images.
      dtype: of the product, as of `Dense`.
      param_dtype: of the parameters, as of `Dense`.
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
        padding: Padding = "SAME",
        W_std: Number = 1.0,
        b_std: Number | None = None,
        parameterization: Parameterization = "ntk",
        spectral_bound: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | Keys,
    ):
        _checks.count("in_features", in_features)
        _checks.count("out_features", out_features)
        if not (isinstance(kernel_size, Sequence) and len(kernel_size) in (1, 2)):
            raise ArgumentError(
                f"kernel_size={kernel_size!r} must be one or two integers, as (3,) or (3, 3)."
            )
        for size in kernel_size:
            _checks.count("kernel_size", size)
        if padding not in get_args(Padding):
            known = ", ".join(get_args(Padding))
            raise ArgumentError(f"padding={padding!r} must be one of {known}.")
        self.padding = padding
        shape = (*kernel_size, in_features, out_features)
        super().__init__(
            shape, W_std, b_std, parameterization, spectral_bound, dtype, param_dtype, rngs
        )

    def _norm(self, W: Array, space: tuple[int, ...]) -> Float[Array, ""]:
        return convolution_norm(W, space, self.padding)

    def __call__(
        self, x: Num[Batch, "batch ... in_features"]
    ) -> Float[Array, "batch ... out_features"]:
        """Applies the layer to `x`, `(batch, ..., in_features)`."""
        sizes = self.W.shape[:-2]
        _checks.features("x", x, self.W.shape[-2])
        if x.ndim != len(sizes) + 2:
            raise ArgumentError(
                f"x has shape {x.shape}; this layer was made for {len(sizes)} spatial axes between "
                "the batch and the features."
            )
        if self.scaled_for not in (None, x.shape[1:-1]):
            raise ArgumentError(
                f"x has shape {x.shape}, and spectral_bound was applied for the spatial axes "
                f"{self.scaled_for} of z: a convolution of a cell with other axes can have no "
                "spectral_bound."
            )
        x, W = self._operands(x, x.shape[1:-1])
        around = [((size - 1) // 2, size // 2) for size in sizes]
        none = [(0, 0)] * len(sizes)
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode="wrap")
        return self._affine(convolve(x, W, around if self.padding == "SAME" else none))


def normalize(module: nnx.Module, space: tuple[int, ...]) -> nnx.Module:
    """A copy in which the layers with a `spectral_bound` have their weights scaled, once for all.

    Args:
      module: is not changed.
      space: size of the spatial axes of what its convolutions are applied to.
    """
    graph, state = nnx.split(module)
    copy = nnx.merge(graph, state)
    for _, layer in nnx.iter_graph(copy):
        if isinstance(layer, _Linear) and layer.spectral_bound is not None:
            layer.W = nnx.Param(layer.bounded(space))
            layer.spectral_bound = None
            layer.scaled_for = space if isinstance(layer, Conv) else None
    return copy
