"""Layers that neural-tangents has too, with kernels that are exact, differentiable and fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import neural_tangents as nt
from jaxtyping import PyTree
from neural_tangents import stax as _nt_stax

from nt_deq import _checks
from nt_deq.activations import Phi, get_activation, piecewise_linear
from nt_deq.activations.activation import affine_erf, sinusoid
from nt_deq.kernels.convolution import convolution
from nt_deq.kernels.nonlinearity import apply_dual
from nt_deq.stax._layer import layer, requires, with_exact_kernel
from nt_deq.typing import Layer, Number


@layer
@_nt_stax.supports_masking(remask_kernel=True)
def Nonlinearity(activation: Phi) -> Layer:
    """An elementwise nonlinearity `φ` with its exact kernel.

    Args:
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function such as
        `jnp.tanh`, or an `nt_deq.Activation`.

    Returns:
      `(init_fn, apply_fn, kernel_fn)`.
    """
    phi = get_activation(activation)

    def init_fn(rng, input_shape, **kwargs):
        del rng, kwargs
        return input_shape, ()

    def apply_fn(params: PyTree, inputs: PyTree, **kwargs: PyTree) -> PyTree:
        del params, kwargs
        return phi.fn(inputs)

    @requires(diagonal_spatial=_nt_stax.Diagonal())
    def kernel_fn(k: nt.Kernel, **kwargs: PyTree) -> nt.Kernel:
        del kwargs
        return apply_dual(phi, k)

    return init_fn, apply_fn, kernel_fn


def ABRelu(a: float, b: float, do_stabilize: bool = False) -> Layer:
    """`a · min(z, 0) + b · max(z, 0)`, as `neural_tangents.stax.ABRelu`.

    That one's NTK has an error of `√ε` where an input meets itself, and its derivatives there are
    wrong or NaN; these are not. `do_stabilize` is for very deep explicit networks, and left to it.
    """
    if do_stabilize:
        return cast(Layer, _nt_stax.ABRelu(a, b, do_stabilize))
    return Nonlinearity(piecewise_linear(f"ABRelu({a}, {b})", a, b))


def Relu(do_stabilize: bool = False) -> Layer:
    """`max(z, 0)`: see `ABRelu`."""
    return ABRelu(0.0, 1.0, do_stabilize)


def LeakyRelu(alpha: float, do_stabilize: bool = False) -> Layer:
    """`alpha · min(z, 0) + max(z, 0)`: see `ABRelu`."""
    return ABRelu(alpha, 1.0, do_stabilize)


def Abs(do_stabilize: bool = False) -> Layer:
    """`|z|`: see `ABRelu`."""
    return ABRelu(-1.0, 1.0, do_stabilize)


def Erf(a: Number = 1.0, b: Number = 1.0, c: Number = 0.0) -> Layer:
    """`a erf(b z) + c`, as `neural_tangents.stax.Erf`.

    Its arctangents vectorise on a CPU, and derivatives are right where an input meets itself. So it
    is of the layers below. One whose parameters are traced is neural-tangents' own.
    """
    if _checks.is_traced(a, b, c):
        return with_exact_kernel(_nt_stax.Erf)(a, b, c)
    return Nonlinearity(affine_erf(f"Erf({a}, {b}, {c})", float(a), float(b), float(c)))


def Gelu(approximate: bool = False) -> Layer:
    """`z Φ(z)`, as `neural_tangents.stax.Gelu`: see `Erf`.

    `approximate` is of finite networks, whose kernel is taken to be the same; it is left to
    neural-tangents.
    """
    return with_exact_kernel(_nt_stax.Gelu)(True) if approximate else Nonlinearity("gelu")


def Sin(a: Number = 1.0, b: Number = 1.0, c: Number = 0.0) -> Layer:
    """`a sin(b z + c)`, as `neural_tangents.stax.Sin`: see `Erf`."""
    if _checks.is_traced(a, b, c):
        return with_exact_kernel(_nt_stax.Sin)(a, b, c)
    return Nonlinearity(sinusoid(f"Sin({a}, {b}, {c})", float(a), float(b), float(c)))


def Cos(a: Number = 1.0, b: Number = 1.0, c: Number = 0.0) -> Layer:
    """`a cos(b z + c)`, as `neural_tangents.stax.Cos`: see `Erf`."""
    return Sin(a, b, c + math.pi / 2)


def Rbf(gamma: Number = 1.0) -> Layer:
    """`√2 sin(√(2γ) z + π/4)`, whose kernel is `exp(-γ (k + k' - 2c))`: see `Erf`."""
    if _checks.is_traced(gamma):
        return with_exact_kernel(_nt_stax.Rbf)(gamma)
    return Sin(math.sqrt(2), math.sqrt(2 * float(gamma)), math.pi / 4)


@layer
@_nt_stax.supports_masking(remask_kernel=True)
def Conv(
    out_chan: int,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str = "VALID",
    W_std: Number = 1.0,
    b_std: Number | None = None,
    dimension_numbers: tuple[str, str, str] | None = None,
    parameterization: str = "ntk",
    s: tuple[int, int] = (1, 1),
) -> Any:  # with a mask_fn, for the decorator
    """A convolution, as `neural_tangents.stax.Conv`, whose kernel is a sum of shifts."""
    size, scale = (out_chan, filter_shape, strides, padding), (W_std, b_std)
    return convolution(*size, *scale, dimension_numbers, parameterization, s)
