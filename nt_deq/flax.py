"""The finite deep equilibrium network as `flax.nnx` modules, in NTK parameterisation.

Parameters are iid `N(0, 1)`; the standard deviations scale them in the forward pass, so that a step
of gradient descent moves the function by the same amount at every width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optimistix
from flax import nnx
from jax import Array

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.equilibrium import equilibrium


class Dense(nnx.Module):
    """`W_std/√in · x W + b_std · b`, `(..., in_features) -> (..., out_features)`.

    The same function of the same parameters as `stax.Dense(out_features, W_std, b_std)`.

    Args:
      in_features: size of the input.
      out_features: size of the output.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases; `None` for none.
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
        rngs: nnx.Rngs,
    ):
        _checks.width("in_features", in_features)
        _checks.width("out_features", out_features)
        _checks.standard_deviation("W_std", W_std)
        self.W_std, self.b_std = W_std, b_std
        self.W = nnx.Param(jax.random.normal(rngs.params(), (in_features, out_features)))
        if b_std is not None:
            _checks.standard_deviation("b_std", b_std)
            self.b = nnx.Param(jax.random.normal(rngs.params(), (out_features,)))

    def weight(self) -> Array:
        """Returns the matrix that multiplies the input, `W_std/√in · W`."""
        W = self.W[...]
        return W * jnp.asarray(self.W_std / W.shape[0] ** 0.5, W.dtype)

    def __call__(self, x: Array) -> Array:
        """Applies the layer to `x`, `(..., in_features)`."""
        _checks.features("x", x, self.W.shape[0])
        y = jnp.matmul(x, self.weight(), precision="highest")
        return y if self.b_std is None else y + self.b_std * self.b[...]


class DEQ(nnx.Module):
    """A deep equilibrium layer, `h* = φ(z*)`.

    `z* = W_std/√n · φ(z*) W + U_std/√d · x U + b_std · b`.

    The same function of the same parameters as `stax.DEQ` with the same arguments: `hidden` holds
    `W`, `inject` holds `U` and `b`. Gradients are implicit, in forward and reverse mode.

    Args:
      in_features: size `d` of the input.
      width: size `n` of the state `z`.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias; `None` for none.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function such as
        `jnp.tanh`, or an `nt_deq.Activation`.
      solver: what finds `z*`: an optimistix fixed-point solver or root finder, `None` for plain
        iteration of each sample to the last digits (`nt_deq.equilibrium`).
      rngs: draws the parameters from its stream `params`.

    Raises:
      ValueError: an argument cannot be right; the message says why.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        W_std: float,
        U_std: float = 1.0,
        b_std: float | None = None,
        activation: str | Activation | Callable[[Array], Array] = "relu",
        solver: optimistix.AbstractFixedPointSolver | optimistix.AbstractRootFinder | None = None,
        rngs: nnx.Rngs,
    ):
        _checks.width("width", width)
        _checks.standard_deviation("U_std", U_std)
        self.activation = get_activation(activation)
        self.solver = solver
        self.hidden = Dense(width, width, W_std=W_std, rngs=rngs)
        self.inject = Dense(in_features, width, W_std=U_std, b_std=b_std, rngs=rngs)

    def __call__(self, x: Array, z0: Array | None = None) -> Array:
        """Returns `h*`, `(batch, width)`, for `x`, `(batch, in_features)`.

        Raises:
          NotConvergedError: no equilibrium was reached (traced: NaN instead).
        """
        return self.activation.fn(self.equilibrium(x, z0))

    def equilibrium(self, x: Array, z0: Array | None = None) -> Array:
        """Returns `z*`, `(batch, width)`, the iteration started at `z0` (default: zeros)."""
        u = self.inject(x)
        z0 = jnp.zeros_like(u) if z0 is None else z0
        layer = _Layer(self.activation)
        return equilibrium(layer, z0, (self.hidden.weight(), u), solver=self.solver)


@dataclass(frozen=True)
class _Layer:
    """`φ(z) A + u`; equal activations give equal layers, which are compiled once."""

    activation: Activation

    def __call__(self, z: Array, args: tuple[Array, Array]) -> Array:
        A, u = args
        return jnp.matmul(self.activation.fn(z), A, precision="highest") + u


def functional(module: nnx.Module) -> tuple[Callable[..., Array], Any]:
    """Turns a module into a function of its parameters, as neural-tangents takes it.

    `apply_fn` works with `nt.empirical_ntk_fn`, `nt.empirical_nngp_fn`, `nt.linearize` and every
    JAX transformation.

    Args:
      module: any `nnx.Module`; it is not changed.

    Returns:
      `(apply_fn, params)` with `apply_fn(params, x) == module(x)`. Keyword arguments of `apply_fn`
      that neural-tangents passes on (`rng`) are not for the module and are dropped.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply_fn(params: Any, x: Array, **kwargs: Any) -> Array:
        del kwargs
        return nnx.merge(graphdef, params, rest)(x)

    return apply_fn, params
