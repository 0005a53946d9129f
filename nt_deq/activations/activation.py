"""Activation functions with their exact Gaussian expectations.

For `(u, u') ~ N(0, [[k1, c], [c, k2]])` the infinite-width kernels need the *dual* of an activation
`φ` and that of its derivative (Daniely et al. 2016; Lee et al. 2019, appendix C),

    V = E[φ(u) φ(u')],     V̇ = E[φ'(u) φ'(u')] = ∂V/∂c   (Price's theorem).

The formulas here are closed forms, evaluated through `arctan2` of a shared square root instead of
`arccos` or `arcsin`: near `u = u'` the rounding errors of their terms then cancel instead of adding
up, and their derivatives are finite there. A function without a closed form is expanded in Hermite
polynomials (`nt_deq.activations.hermite`).

A function is known by its values: `jax.nn.relu` and `lambda z: jnp.maximum(z, 0)` are `"relu"`. But
`jax.nn.gelu` is not `"gelu"`: by default it is an approximation by tanh, off by up to 5e-4, whose
kernels differ from those of `"gelu"` by 1e-4 to 1e-3. It is expanded, and takes the same time.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import erf

from nt_deq._bridges import enable_x64
from nt_deq.activations import hermite
from nt_deq.errors import ArgumentError

Moments = tuple[Array, Array]
_MODULES = ("jax.nn", "jax.numpy", "jax.scipy.special", "jax.lax")  # where JAX has its functions


@dataclass(frozen=True)
class Activation:
    """An activation function and what the infinite-width limit needs to know of it.

    Attributes:
      name: how it is called in messages, tables and `nt_deq.activations`.
      fn: `φ`, an elementwise JAX function.
      dual: `(k1, k2, c) -> (V, V̇)`, elementwise on arrays that broadcast; `k1`, `k2` are variances
        and `c` is a covariance, clipped by the callee to `|c| <= √(k1 k2)`.
      dual_diagonal: `k -> (E[φ(u)²], E[φ'(u)²])` for `u ~ N(0, k)`, elementwise.
      lipschitz: the Lipschitz constant of `φ`.
      homogeneous: whether `φ(t z) = t φ(z)` for every `t >= 0`.
    """

    name: str
    fn: Callable[[Array], Array]
    dual: Callable[[Array, Array, Array], Moments]
    dual_diagonal: Callable[[Array], Moments]
    lipschitz: float
    homogeneous: bool = False

    def __reduce__(self):
        """Pickles what has a name by its name: functions of JAX and those within do not pickle."""
        if ACTIVATIONS.get(self.name) is self:
            return get_activation, (self.name,)
        for module in _MODULES:
            named = getattr(importlib.import_module(module), self.name, None)
            if named is not None and inspect.unwrap(named) is inspect.unwrap(self.fn):
                return _from_module, (module, self.name)
        if isinstance(self.dual, partial) and self.dual.func is hermite.dual:
            return get_activation, (self.fn,)
        return Activation, tuple(getattr(self, field.name) for field in fields(self))


def get_activation(activation: str | Activation | Callable[[Array], Array]) -> Activation:
    """Returns the `Activation` that a name, an `Activation` or a function stands for.

    An elementwise JAX function that has the values of one of `nt_deq.activations`, as `jax.nn.relu`
    has, is that one; one with a kink at 0 and linear on both sides is `piecewise_linear`. Any other
    is expanded in Hermite polynomials (`nt_deq.activations.hermite`). The same function object
    gives the same `Activation`.

    Raises:
      ValueError: the name is not in `nt_deq.activations`, or the function has no usable expansion:
        it is not elementwise, real, finite and smooth.
      TypeError: it is neither a name nor an `Activation` nor a function.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ArgumentError(
                f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}, an "
                "elementwise JAX function, or an nt_deq.Activation of your own."
            )
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(
            f"activation={activation!r} is neither a name nor an nt_deq.Activation nor an "
            "elementwise JAX function."
        )
    return _from_function(activation)


@lru_cache(maxsize=1024)
def _from_function(fn: Callable[[Array], Array]) -> Activation:
    for known in ACTIVATIONS.values():
        if known.fn is fn:
            return known
    # It may be seen first under a transformation; in a thread of its own none is under way.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_examine, fn).result()


def _examine(fn: Callable[[Array], Array]) -> Activation:
    name = getattr(fn.func if isinstance(fn, partial) else fn, "__name__", repr(fn))
    hermite.check_elementwise(name, fn)
    return _recognise(fn) or smooth(name, fn, hermite.check(name, fn))


def _recognise(fn: Callable[[Array], Array]) -> Activation | None:
    """The closed form that an elementwise function has, by its values and slopes on [-1e6, 1e6]."""

    def sample(fn, z):
        return np.stack(jax.jvp(fn, (z,), (jnp.ones_like(z),)))

    with enable_x64(True):
        z = jnp.sinh(jnp.linspace(-14.5, 14.5, 400))  # without 0, where there may be a kink
        x, values = np.asarray(z), sample(fn, z)
        for known in ACTIVATIONS.values():
            bound = 1e-14 * np.abs(values) if known.homogeneous else 1e-12 * (1 + np.abs(x))
            if (np.abs(values - sample(known.fn, z)) <= bound).all():
                return known
    negative, positive = (float(slope) for slope in values[1, [0, -1]])
    lines = np.array([x, np.ones_like(x)]) * np.where(x > 0, positive, negative)
    if lines.any() and np.allclose(values, lines, rtol=1e-14, atol=0):
        return piecewise_linear(f"piecewise_linear({negative:g}, {positive:g})", negative, positive)
    return None


def _from_module(module: str, name: str) -> Activation:
    return get_activation(getattr(importlib.import_module(module), name))


def _clip(x: Array, lower: float | None, upper: float | None) -> Array:
    """Clips a value that leaves its range by rounding alone; the derivative stays that of `x`."""
    return x + lax.stop_gradient(jnp.clip(x, lower, upper) - x)


def _sqrt(x: Array) -> Array:
    """√x with derivative 0 at 0, where the true one is infinite."""
    zero = x <= 0  # written so that NaN stays NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _determinant(k1: Array, k2: Array, c: Array) -> Array:
    return _clip(k1 * k2 - c * c, 0, None)


def _sine(rho: Array) -> Array:
    """√(1-ρ²), and 0 where a Gram matrix of this dtype does not tell ρ from ±1."""
    square = (1 - rho) * (1 + rho)
    return _sqrt(jnp.where(square <= 16 * jnp.finfo(rho.dtype).eps, 0, square))


@jax.custom_jvp
def _arc_cosine(rho: Array) -> Moments:
    """The arc-cosine kernels `κ0, κ1` of degree 0 and 1 (Cho & Saul 2009)."""
    sine = _sine(rho)
    angle = jnp.arctan2(sine, -rho) / jnp.pi  # (π - arccos ρ)/π
    return angle, sine / jnp.pi + angle * rho


@_arc_cosine.defjvp
def _arc_cosine_jvp(primals, tangents):
    (rho,), (d_rho,) = primals, tangents
    k0, k1 = _arc_cosine(rho)
    # κ1' = κ0 and κ0' = 1/(π√(1-ρ²)), infinite at ρ = ±1: there it is a kink, and 0 a subgradient.
    sine = _sine(rho)
    slope = jnp.where(sine == 0, 0, 1 / (jnp.pi * jnp.where(sine == 0, 1, sine)))
    return (k0, k1), (slope * d_rho, k0 * d_rho)


def piecewise_linear(name: str, negative: float, positive: float) -> Activation:
    """`φ(z) = positive · max(z, 0) + negative · min(z, 0)`; ReLU is (0, 1), Abs (-1, 1)."""
    fn = partial(_piecewise_linear, negative, positive)
    dual = partial(_piecewise_linear_dual, negative, positive)
    dual_diagonal = partial(_piecewise_linear_dual_diagonal, negative, positive)
    lipschitz = max(abs(negative), abs(positive))
    return Activation(name, fn, dual, dual_diagonal, lipschitz, homogeneous=True)


def _piecewise_linear(negative, positive, z):
    return positive * jnp.maximum(z, 0) + negative * jnp.minimum(z, 0)


def _piecewise_linear_dual(negative, positive, k1, k2, c):
    bend, product = (positive - negative) ** 2 / 2, positive * negative
    scale = _sqrt(k1) * _sqrt(k2)
    zero = scale == 0
    rho = _clip(jnp.where(zero, 0, c / jnp.where(zero, 1, scale)), -1, 1)
    k0, k1_ = _arc_cosine(rho)
    return scale * (bend * k1_ + product * rho), bend * k0 + product


def _piecewise_linear_dual_diagonal(negative, positive, k):
    mean_square = (positive**2 + negative**2) / 2
    return mean_square * k, jnp.full_like(k, mean_square)


def smooth(name: str, fn: Callable[[Array], Array], lipschitz: float) -> Activation:
    """An elementwise smooth `φ` whose expectations are known by its Hermite expansion alone."""
    return Activation(
        name, fn, partial(hermite.dual, fn, fn), partial(hermite.dual_diagonal, fn), lipschitz
    )


def _erf_dual(k1, k2, c):
    root = jnp.sqrt(1 + 2 * (k1 + k2) + 4 * _determinant(k1, k2, c))
    return 2 / jnp.pi * jnp.arctan2(2 * c, root), 4 / jnp.pi / root


def _erf_dual_diagonal(k):
    root = jnp.sqrt(1 + 4 * k)
    return 2 / jnp.pi * jnp.arctan2(2 * k, root), 4 / jnp.pi / root


def _gelu(z):
    return z * (1 + erf(z / jnp.sqrt(2).astype(z.dtype))) / 2


def _gelu_moments(k1, k2, c, det):
    # By Stein's lemma from E[Φ(u)Φ(u')] = 1/4 + arcsin(c/√p)/2π, with p = (1+k1)(1+k2) and
    # root² = p - c² (Tsuchida et al. 2021, "Avoiding kernel fixed points"); V̇ is ∂V/∂c. Written
    # without p, whose square in their derivatives would overflow.
    inverse1, inverse2 = 1 / (1 + k1), 1 / (1 + k2)
    root = 2 * jnp.sqrt(0.25 + (k1 / 4 + k2 / 4) + det / 4)
    root = jnp.where(jnp.isfinite(root), root, jnp.nan)
    tangent = c / root
    angle = jnp.arctan2(c, root)
    saturation = (k1 * inverse1) * (k2 * inverse2)
    correlation = (c * inverse1) * (c * inverse2)
    v = c / 4 + (c * angle + saturation * root + correlation / root) / (2 * jnp.pi)
    both = inverse1 * inverse2
    rest = inverse1 + inverse2 + both + (tangent * inverse1) * (tangent * inverse2)
    return v, 0.25 + (angle + tangent * rest) / (2 * jnp.pi)


def _gelu_dual(k1, k2, c):
    return _gelu_moments(k1, k2, c, _determinant(k1, k2, c))


def _gelu_dual_diagonal(k):
    return _gelu_moments(k, k, k, jnp.zeros_like(k))


def _damped_hyperbolic(k1, k2, c):
    """`exp(-(k1+k2)/2) · (sinh c, cosh c)` without overflow, and exact for small `c`."""

    def half_exp(c):
        # Not k1 + k2 - 2c: a difference of near numbers is exact. Negative only by rounding.
        distance = (k1 - c) + (k2 - c)
        return jnp.exp(-jnp.where(distance < 0, 0, distance) / 2) / 2

    up, down = half_exp(c), half_exp(-c)
    small = jnp.exp(-(k1 + k2) / 2) * jnp.sinh(jnp.clip(c, -1, 1))
    return jnp.where(jnp.abs(c) < 1, small, up - down), up + down


def _cos_dual(k1, k2, c):
    sinh, cosh = _damped_hyperbolic(k1, k2, c)
    return cosh, sinh


def _sin_dual_diagonal(k):
    return -jnp.expm1(-2 * k) / 2, (1 + jnp.exp(-2 * k)) / 2


def _cos_dual_diagonal(k):
    moment, slope_moment = _sin_dual_diagonal(k)
    return slope_moment, moment


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        activation.name: activation
        for activation in (
            piecewise_linear("relu", 0.0, 1.0),
            piecewise_linear("leaky_relu", 0.01, 1.0),
            piecewise_linear("abs", -1.0, 1.0),
            piecewise_linear("identity", 1.0, 1.0),
            Activation("erf", erf, _erf_dual, _erf_dual_diagonal, lipschitz=1.1283791670955126),
            Activation(
                "gelu", _gelu, _gelu_dual, _gelu_dual_diagonal, lipschitz=1.1289041451851549
            ),
            Activation("sin", jnp.sin, _damped_hyperbolic, _sin_dual_diagonal, lipschitz=1.0),
            Activation("cos", jnp.cos, _cos_dual, _cos_dual_diagonal, lipschitz=1.0),
            smooth("tanh", jnp.tanh, lipschitz=1.0),
            smooth("sigmoid", jax.nn.sigmoid, lipschitz=0.25),
            smooth("softplus", jax.nn.softplus, lipschitz=1.0),
            smooth("silu", jax.nn.silu, lipschitz=1.0998393201288643),
        )
    }
)
