"""Activation functions with their exact Gaussian expectations.

For `(u, u') ~ N(0, [[k1, c], [c, k2]])` the infinite-width kernels need the *dual* of an activation
`φ` and that of its derivative (Daniely et al. 2016; Lee et al. 2019, appendix C),

    V = E[φ(u) φ(u')],     V̇ = E[φ'(u) φ'(u')] = ∂V/∂c   (Price's theorem).

Closed forms are in `nt_deq.activations.closed_forms`, and mixtures of them, as tanh, in
`nt_deq.activations.mixtures`, those of functions with kinks in `nt_deq.activations.kinks`, those of
elu and its kin in `nt_deq.activations.exponential`; any other function is expanded in Hermite
polynomials (`nt_deq.activations.hermite`), or integrated (`nt_deq.activations.nested`).

A function is known by its values: `jax.nn.relu` and `lambda z: jnp.maximum(z, 0)` are `"relu"`. But
`jax.nn.gelu` is not `"gelu"`: by default it is an approximation by tanh, off by up to 5e-4, whose
kernels differ from those of `"gelu"` by 1e-4 to 1e-3. It is expanded, and takes the same time.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import erf

from nt_deq._checks import is_traced
from nt_deq._jax import enable_x64
from nt_deq.activations import closed_forms, exponential, hermite, kinks, mixtures, nested
from nt_deq.activations.closed_forms import Moments
from nt_deq.activations.expansion import sample
from nt_deq.errors import ArgumentError

T = TypeVar("T")

_KEPT = 64  # functions, with what was found out about them
_MODULES = ("jax.nn", "jax.numpy", "jax.scipy.special", "jax.lax")  # where JAX has its functions


@dataclass(frozen=True)
class Activation:
    """An activation function and what the infinite-width limit needs to know of it.

    Two are equal whose functions are equal, whatever they are called: they share compiled programs.

    Attributes:
      name: how it is called in messages, tables and `nt_deq.activations`.
      fn: `φ`, an elementwise JAX function.
      dual: `(k1, k2, c) -> (V, V̇)`, elementwise on arrays that broadcast; `k1`, `k2` are variances
        and `c` is a covariance, clipped by the callee to `|c| <= √(k1 k2)`.
      dual_diagonal: `k -> (E[φ(u)²], E[φ'(u)²])` for `u ~ N(0, k)`, elementwise.
      lipschitz: the Lipschitz constant of `φ`.
      homogeneous: whether `φ(t z) = t φ(z)` for every `t >= 0`.
      missed: `k -> error`: how far the expectations may be off beside rounding at a variance,
        relative to the mean squares of `φ` and of `φ'`; `None` where they are exact.
    """

    name: str = field(compare=False)
    fn: Callable[[Array], Array]
    dual: Callable[[Array, Array, Array], Moments]
    dual_diagonal: Callable[[Array], Moments]
    lipschitz: float
    homogeneous: bool = False
    missed: Callable[[Array], Array] | None = None

    def between(self, k1: Array, k2: Array) -> Callable[[Array], Moments]:
        """`dual(k1, k2, c)` as a function of `c`: what the variances alone decide is computed here.

        For many `c` at the same variances, of which it has no derivatives.
        """
        if isinstance(self.dual, Formula) and self.dual.function in _BETWEEN:
            return _BETWEEN[self.dual.function](*self.dual.parameters, k1, k2)
        return partial(self.dual, k1, k2)

    def __reduce__(self):
        """Pickles what has a name by its name: functions of JAX and those within do not pickle."""
        if ACTIVATIONS.get(self.name) is self:
            return get_activation, (self.name,)
        for module in _MODULES:
            named = getattr(importlib.import_module(module), self.name, None)
            if named is not None and inspect.unwrap(named) is inspect.unwrap(self.fn):
                return _from_module, (module, self.name)
        if isinstance(self.dual, Formula) and self.dual.function in (hermite.dual, nested.dual):
            return get_activation, (self.fn,)
        for module, make in ((kinks, _kinked), (exponential, _exponential)):
            if isinstance(self.dual, Formula) and self.dual.function is module.dual:
                return make, (self.name, *self.dual.parameters)
        return Activation, tuple(getattr(self, each.name) for each in fields(self))


Phi = str | Activation | Callable[[Array], Array]
"""What `get_activation` takes: a name, an `Activation`, or an elementwise function."""


@dataclass(frozen=True)
class Formula(Generic[T]):
    """A function with its first arguments given, equal to another one of the same."""

    function: Callable[..., T]
    parameters: tuple[Hashable, ...]

    def __call__(self, *args: Array) -> T:
        """Evaluates it."""
        return self.function(*self.parameters, *args)


_BETWEEN = {hermite.dual: hermite.between, mixtures.dual: mixtures.between}


def piecewise_linear(name: str, negative: float, positive: float) -> Activation:
    """`φ(z) = positive · max(z, 0) + negative · min(z, 0)`; ReLU is (0, 1), Abs (-1, 1).

    Raises:
      ValueError: a slope is traced.
    """
    if is_traced(negative, positive):
        raise ArgumentError(
            f"{name}: a slope is traced by jax.jit, grad or vmap, and nothing is differentiated in "
            "it: pass numbers, and those that vary as static arguments."
        )
    slopes = float(negative), float(positive)
    return _family("piecewise_linear", name, slopes, max(map(abs, slopes)), homogeneous=True)


def piecewise_square(name: str, negative: float, positive: float) -> Activation:
    """`φ(z) = positive · max(z, 0)² + negative · min(z, 0)²`; no Lipschitz constant bounds it."""
    return _family("piecewise_square", name, (negative, positive), math.inf)


def affine_erf(name: str, a: float, b: float, c: float) -> Activation:
    """`φ(z) = a erf(b z) + c`."""
    return _family("affine_erf", name, (a, b, c), abs(a * b) * 2 / math.sqrt(math.pi))


def sinusoid(name: str, a: float, b: float, c: float) -> Activation:
    """`φ(z) = a sin(b z + c)`."""
    return _family("sinusoid", name, (a, b, c), abs(a * b))


def _family(
    formula: str,
    name: str,
    parameters: tuple[float, ...],
    lipschitz: float,
    homogeneous: bool = False,
) -> Activation:
    """One of a family of `nt_deq.activations.closed_forms`."""
    kinds = ("", "_dual", "_dual_diagonal")
    fn, dual, diagonal = (
        Formula(getattr(closed_forms, formula + kind), parameters) for kind in kinds
    )
    return Activation(name, fn, dual, diagonal, lipschitz, homogeneous)


def smooth(name: str, fn: Callable[[Array], Array], lipschitz: float) -> Activation:
    """An elementwise smooth `φ` whose expectations are known by its Hermite expansion alone."""
    dual = Formula(hermite.dual, (fn, fn))
    return Activation(name, fn, dual, Formula(hermite.dual_diagonal, (fn,)), lipschitz)


def _integrated(name: str, fn: Callable[[Array], Array], reach: nested.Reach) -> Activation:
    dual, diagonal = (Formula(of, (fn, reach)) for of in (nested.dual, nested.dual_diagonal))
    missed = Formula(nested.missed, (fn,))
    return Activation(name, fn, dual, diagonal, hermite.largest_slope(fn), missed=missed)


def _mixture(name: str, fn: Callable[[Array], Array], lipschitz: float) -> Activation:
    components = getattr(mixtures, name.upper())
    dual = Formula(mixtures.dual, (components, fn))
    return Activation(name, fn, dual, Formula(mixtures.dual_diagonal, (components,)), lipschitz)


def _kinked(name: str, of: kinks.Kinks) -> Activation:
    return Activation(
        name,
        Formula(kinks.evaluate, (of,)),
        Formula(kinks.dual, (of,)),
        Formula(kinks.dual_diagonal, (of,)),
        lipschitz=max(map(abs, of.slopes)),
    )


def _exponential(name: str, of: exponential.Exponential) -> Activation:
    return Activation(
        name,
        Formula(exponential.evaluate, (of,)),
        Formula(exponential.dual, (of,)),
        Formula(exponential.dual_diagonal, (of,)),
        lipschitz=max(abs(of.positive), abs(of.scale)),
    )


def _closed_form(name: str, fn: Callable[[Array], Array], lipschitz: float) -> Activation:
    dual, diagonal = (getattr(closed_forms, f"{name}_{kind}") for kind in ("dual", "dual_diagonal"))
    return Activation(name, fn, dual, diagonal, lipschitz)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        activation.name: activation
        for activation in (
            piecewise_linear("relu", 0.0, 1.0),
            piecewise_linear("leaky_relu", 0.01, 1.0),
            piecewise_linear("abs", -1.0, 1.0),
            piecewise_linear("identity", 1.0, 1.0),
            _closed_form("erf", erf, lipschitz=1.1283791670955126),
            _closed_form("gelu", closed_forms.gelu, lipschitz=1.1289041451851549),
            _closed_form("sin", jnp.sin, lipschitz=1.0),
            _closed_form("cos", jnp.cos, lipschitz=1.0),
            _mixture("tanh", jnp.tanh, lipschitz=1.0),
            _mixture("sigmoid", jax.nn.sigmoid, lipschitz=0.25),
            _mixture("softplus", jax.nn.softplus, lipschitz=1.0),
            _mixture("silu", jax.nn.silu, lipschitz=1.0998393201288643),
        )
    }
)


def get_activation(activation: Phi) -> Activation:
    """Returns the `Activation` that a name, an `Activation` or a function stands for.

    An elementwise JAX function that has the values of one of `nt_deq.activations`, as `jax.nn.relu`
    has, is that one; one with a kink at 0 and linear on both sides is `piecewise_linear`, and one
    that is quadratic on both, as `jax.nn.relu(z)**2`, has a closed form too. One that is continuous
    and linear between up to 8 kinks, as `jax.nn.relu6`, `hard_tanh`, `hard_sigmoid`
    and a `jnp.clip` are, has its exact expectations too (`nt_deq.activations.kinks`), and so has
    one that is linear right of 0 and falls exponentially left of it, as `jax.nn.elu`, `celu` and
    `selu` do (`nt_deq.activations.exponential`). Any other is expanded in Hermite polynomials
    (`nt_deq.activations.hermite`), or integrated where that series does not reach far, as
    `jax.nn.soft_sign` and `jnp.arctan` are (`nt_deq.activations.nested`). The same function object
    gives the same `Activation`, and so do two that are equal, as instances of a frozen dataclass
    with a `__call__` are.

    A function that is made anew, such as a `lambda` in a loop, is another one every time: a kernel
    of it takes seconds to examine and compile, and 20 to 30 MB for its programs, which JAX keeps
    until `jax.clear_caches()`. What is kept here is bounded, to the last 64 functions. Make it once
    outside of the loop, or let what varies be a field of a frozen dataclass.

    Raises:
      ValueError: the name is not in `nt_deq.activations`, or the function has no usable expansion:
        it is not elementwise, real, finite and smooth. Or it closes over a traced value, or is not
        hashable.
      TypeError: it is neither a name nor an `Activation` nor a function.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ArgumentError(
                f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}, an "
                "elementwise JAX function, or an nt_deq.Activation of your own."
            )
        return ACTIVATIONS[activation]
    if not isinstance(activation, Activation) and not callable(activation):
        raise TypeError(
            f"activation={activation!r} is neither a name nor an nt_deq.Activation nor an "
            "elementwise JAX function."
        )
    try:
        hash(activation)
    except TypeError as error:
        raise ArgumentError(
            f"activation={activation!r}: {error}, and compiled programs are kept by it; pass a "
            "function, or an instance of a class that is @dataclass(frozen=True)."
        ) from error
    return activation if isinstance(activation, Activation) else _from_function(activation)


@lru_cache(maxsize=_KEPT)
def _from_function(fn: Callable[[Array], Array]) -> Activation:
    for known in ACTIVATIONS.values():
        if known.fn is fn:
            return known
    # It may be seen first under a transformation; in a thread of its own none is under way.
    name = getattr(fn.func if isinstance(fn, partial) else fn, "__name__", repr(fn))
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(_examine, name, fn).result()
        except jax.errors.UnexpectedTracerError as error:
            raise ArgumentError(
                f"activation={name}: it closes over a value that is traced by jax.jit, grad or "
                "vmap, and its expectations are computed once, for a function of numbers: close "
                "over numbers, or give the expectations in an nt_deq.Activation of your own."
            ) from error


def _examine(name: str, fn: Callable[[Array], Array]) -> Activation:
    hermite.check_elementwise(name, fn)
    known = _recognise(name, fn)
    if known is not None:
        return known
    with enable_x64(True):
        if nested.series_reach(fn, np.dtype(np.float64)) < nested.LITTLE:
            reach = nested.measure(fn)
            if min(reach) >= nested.ENOUGH:
                return _integrated(name, fn, reach)
    return smooth(name, fn, hermite.check(name, fn))


def _recognise(name: str, fn: Callable[[Array], Array]) -> Activation | None:
    """The closed form that an elementwise function has, by its values and slopes on [-1e6, 1e6]."""
    with enable_x64(True):
        z = jnp.sinh(jnp.linspace(-14.5, 14.5, 400))  # without 0, where there may be a kink
        near = 10.0 ** jnp.linspace(-14, 0, 57)  # or a corner that is rounded
        z = jnp.sort(jnp.concatenate([z, near, -near]))
        x, values = np.asarray(z), sample(fn, z)
        for known in ACTIVATIONS.values():
            bound = 1e-14 * np.abs(values) if known.homogeneous else 1e-12 * (1 + np.abs(x))
            if (np.abs(values - sample(known.fn, z)) <= bound).all():
                return known
        negative, positive = (float(slope) for slope in values[1, [0, -1]])
        sides = np.array([x, np.ones_like(x)]) * np.where(x > 0, positive, negative)
        if sides.any() and np.allclose(values, sides, rtol=1e-14, atol=0):
            name = f"piecewise_linear({negative:g}, {positive:g})"
            return piecewise_linear(name, negative, positive)
        negative, positive = (
            a / (2 * end) + 0.0
            for a, end in zip(values[1, [0, -1]].tolist(), x[[0, -1]].tolist(), strict=True)
        )
        sides = np.array([x * x, 2 * x]) * np.where(x > 0, positive, negative)
        if sides.any() and np.allclose(values, sides, rtol=1e-14, atol=0):
            return piecewise_square(
                f"piecewise_square({negative:g}, {positive:g})", negative, positive
            )
        found = kinks.recognise(fn)
        if found is not None:
            return _kinked(name, found)
        falling = exponential.recognise(fn)
    return None if falling is None else _exponential(name, falling)


def _from_module(module: str, name: str) -> Activation:
    return get_activation(getattr(importlib.import_module(module), name))
