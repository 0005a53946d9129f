"""Functions of two times on [0, 1]², known at nodes, and their integrals over both.

A covariance of two times solves `(∂ₜ + λ)(∂ₛ + λ) C = F`, so `C = base + A F` with `A` the integral
`∫₀ᵗ∫₀ˢ e^{-λ(t-a) - λ(s-b)} F(a, b) db da`. A grid has the matrix of `A` on its nodes: spectral on
the square for what is smooth, and on the two triangles `s <= t` and `t <= s` for what has a kink
where the times meet, as ReLU's `V̇` has where an input meets itself. Euler's rule on the square is
the residual network of so many layers, exactly.

The nodes of one time are Radau's, which have the end of the time among them: what is asked for is
the value at a node, not an extrapolation, which would enlarge the rounding. So is the diagonal,
where the times are equal: it is among the nodes across a triangle.

A function of one time is known by its values on a *clock*: some nodes that all grids share, which
are Radau's in `√t`: over a long time most happens at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.polynomial import legendre

from nt_deq.typing import Number


def _nodes(count: int) -> np.ndarray:
    """Radau's nodes on (0, 1], the end included."""
    series = np.zeros(count + 1)
    series[-2:] = 1  # its roots, of which -1 is one, are those from the start
    x = np.sort(legendre.legroots(series).real)
    slope = legendre.legval(x, legendre.legder(series))
    x = x - legendre.legval(x, series) / slope
    x[0] = -1
    return (1 - x[::-1]) / 2


def _quadrature(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss's nodes and weights on [0, 1]."""
    x, w = legendre.leggauss(count)
    return (x + 1) / 2, w / 2


def _basis(x: np.ndarray, count: int) -> np.ndarray:
    """Legendre's polynomials on [0, 1] of degrees below `count`, along a new last axis."""
    return legendre.legvander(2 * x - 1, count - 1)


@lru_cache(maxsize=32)
def _interpolation(count: int) -> np.ndarray:
    """From values at the nodes to coefficients in Legendre's polynomials."""
    return np.linalg.inv(_basis(_nodes(count), count))


def _evaluation(count: int, x: np.ndarray) -> np.ndarray:
    """From values at so many nodes to values at `x`."""
    return _basis(x, count) @ _interpolation(count)


@lru_cache(maxsize=32)
def _integration(count: int, power: int) -> np.ndarray:
    """From values at `t = x^power`, of the nodes `x`, to the integral from 0 to every such `t`."""
    x = _nodes(count)
    z, w = _quadrature(count + power)
    inner = x[:, None] * z
    values = _basis(inner, count) @ _interpolation(count)
    return np.einsum("tq,tqi->ti", power * inner ** (power - 1) * x[:, None] * w, values)


@lru_cache(maxsize=32)
def _rough(count: int) -> np.ndarray:
    """Values at the nodes without the two highest degrees."""
    kept = np.arange(count) < count - 2
    return _basis(_nodes(count), count) * kept @ _interpolation(count)


def _apply(matrix: np.ndarray | Array, f: Array) -> Array:
    """A matrix on the last axis."""
    return jnp.einsum("...p,qp->...q", f, jnp.asarray(matrix, f.dtype))


def _apply_both(first: np.ndarray | Array, second: np.ndarray | Array, f: Array) -> Array:
    """A matrix on either coordinate of a last axis that is a product of two."""
    first, second = jnp.asarray(first, f.dtype), jnp.asarray(second, f.dtype)
    both = f.reshape(*f.shape[:-1], first.shape[1], second.shape[1])
    both = jnp.einsum("...ab,ta,sb->...ts", both, first, second)
    return both.reshape(*f.shape[:-1], -1)


class _Product:
    """Products of nodes: a function of both times is `(..., nodes, nodes)`, flat."""

    @property
    def nodes(self) -> np.ndarray:
        """Of one time."""
        raise NotImplementedError

    @property
    def times(self) -> tuple[np.ndarray, np.ndarray]:
        """Both times of every node."""
        return np.repeat(self.nodes, len(self.nodes)), np.tile(self.nodes, len(self.nodes))

    @property
    def mirror(self) -> np.ndarray:
        """The number of the node whose times are exchanged."""
        count = len(self.nodes)
        return np.arange(count**2).reshape(count, count).T.ravel()

    def integrate(self, integral: Array, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ nodes"]:
        """`A f`."""
        return _apply_both(integral, integral, f)

    def at_equal_times(self, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ times"]:
        """`f(t, t)` at the nodes of one time."""
        count = len(self.nodes)
        return f[..., :: count + 1]

    def at_nodes(self, k: Float[Array, "*_ times"]) -> tuple[Array, Array]:
        """A function of one time at the first and at the second times of the nodes."""
        both = (*k.shape, k.shape[-1])
        first = jnp.broadcast_to(k[..., :, None], both)
        second = jnp.broadcast_to(k[..., None, :], both)
        return first.reshape(*k.shape[:-1], -1), second.reshape(*k.shape[:-1], -1)

    @property
    def end(self) -> int:
        """The number of the node `(1, 1)`."""
        return len(self.nodes) ** 2 - 1


@dataclass(frozen=True)
class Square(_Product):
    """The products of nodes: spectral where the function is smooth on the whole square.

    Attributes:
      count: nodes per time.
      power: they are Radau's to the power of this: 2 is for long times.
      clock: nodes of a function of one time.
    """

    count: int
    power: int
    clock: int

    @property
    def nodes(self) -> np.ndarray:
        """Radau's to the power."""
        return _nodes(self.count) ** self.power

    def from_clock(self, k: Float[Array, "*_ clock"]) -> Float[Array, "*_ times"]:
        """A function of one time at the nodes of one time."""
        return _apply(_evaluation(self.clock, np.sqrt(self.nodes)), k)

    def to_clock(self, k: Float[Array, "*_ times"]) -> Float[Array, "*_ clock"]:
        """The reverse."""
        return _apply(_evaluation(self.count, _nodes(self.clock) ** (2 / self.power)), k)

    def integral(self, T: Number, leak: Number | None, like: Array) -> Array:
        """What `integrate` needs: `(I + λ Q)⁻¹ Q` of one time."""
        Q = jnp.asarray(T, like.dtype) * jnp.asarray(
            _integration(self.count, self.power), like.dtype
        )
        if leak is None:
            return Q
        return jnp.linalg.solve(jnp.eye(self.count, dtype=like.dtype) + leak * Q, Q)

    def rough(self, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ nodes"]:
        """`f` without its highest degrees: what it changes is what the next ones would."""
        rough = _rough(self.count)
        return _apply_both(rough, rough, f)


@dataclass(frozen=True)
class Triangles:
    """Products of nodes in `t` and `w = √(1 - s/t)` where `s < t`, and those mirrored.

    Spectral too where the function has a kink at `t = s`. Where two inputs are near the kink is
    round, over a time as short as their distance: in `w` so many nodes resolve much shorter times
    than in `s/t`.

    Attributes:
      count: nodes in `t`.
      across: nodes in `w`, so that there are `2 count across` in all.
      clock: nodes of a function of one time.
    """

    count: int
    across: int
    clock: int

    @cached_property
    def times(self) -> tuple[np.ndarray, np.ndarray]:
        """Both times of every node, `(2 count across,)` each."""
        late, early = _triangle(self.count, self.across)[:2]
        return np.concatenate([late, early]), np.concatenate([early, late])

    @property
    def mirror(self) -> np.ndarray:
        """The number of the node whose times are exchanged."""
        half = self.count * self.across
        return np.roll(np.arange(2 * half), half)

    def integral(self, T: Number, leak: Number | None, like: Array) -> Array:
        """What `integrate` needs: the matrix of `A`."""
        first = _integration_over_first(self.count, self.across)
        half = self.count * self.across
        second = np.roll(first, (half, half), (0, 1))
        T = jnp.asarray(T, like.dtype)
        both = T**2 * jnp.asarray(first @ second, like.dtype)
        if leak is None:
            return both
        once = T * jnp.asarray(first + second, like.dtype)
        return jnp.linalg.solve(
            jnp.eye(2 * half, dtype=like.dtype) + leak * once + leak**2 * both, both
        )

    def integrate(self, integral: Array, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ nodes"]:
        """`A f`."""
        return _apply(integral, f)

    def at_equal_times(self, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ times"]:
        """`f(t, t)` at the nodes of one time."""
        return f[..., : self.count * self.across : self.across]

    def at_nodes(self, k: Float[Array, "*_ times"]) -> tuple[Array, Array]:
        """A function of one time at the first and at the second times of the nodes."""
        late, early = (_apply(_evaluation(self.count, t), k) for t in self._halves())
        return jnp.concatenate([late, early], -1), jnp.concatenate([early, late], -1)

    def from_clock(self, k: Float[Array, "*_ clock"]) -> Float[Array, "*_ times"]:
        """A function of one time at the nodes of one time."""
        return _apply(_evaluation(self.clock, np.sqrt(_nodes(self.count))), k)

    def to_clock(self, k: Float[Array, "*_ times"]) -> Float[Array, "*_ clock"]:
        """The reverse."""
        return _apply(_evaluation(self.count, _nodes(self.clock) ** 2), k)

    @property
    def end(self) -> int:
        """The number of the node `(1, 1)`, or of one of the two."""
        return (self.count - 1) * self.across

    def rough(self, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ nodes"]:
        """`f` without its highest degrees: what it changes is what the next ones would."""
        sides = f.reshape(*f.shape[:-1], 2, self.count * self.across)
        across = _rough(self.across)[::-1, ::-1]  # they begin where the nodes of a time end
        return _apply_both(_rough(self.count), across, sides).reshape(f.shape)

    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        return _triangle(self.count, self.across)[:2]


def _triangle(count: int, across: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The later and the earlier time, and `w`, of the nodes of one triangle."""
    x, w = _nodes(count), 1 - _nodes(across)[::-1]
    late, w = np.repeat(x, across), np.tile(w, count)
    return late, late * (1 - w) * (1 + w), w


@lru_cache(maxsize=8)
def _integration_over_first(count: int, across: int) -> np.ndarray:
    """`∫₀ᵗ f(a, s) da` at the nodes of the triangles, from values there.

    Where `s < t` the path crosses from one triangle into the other at `a = s`, where `w = 0`. On it
    `a` grows by a factor that may be large, `e^x`: with Gauss's nodes in `√x`, like `w` at first.
    """
    late, early, end = (each[:, None] for each in _triangle(count, across))
    half = count * across
    mirrored = _interpolation(across)[:, ::-1] * (-1.0) ** np.arange(across)[:, None]
    to_coefficients = np.kron(_interpolation(count), mirrored)

    def along(first, second, weights):  # integrals of the products of polynomials
        values = np.einsum(
            "pqi,pqj,pq->pij", _basis(first, count), _basis(second, across), weights, optimize=True
        )
        return values.reshape(half, half) @ to_coefficients

    z, weight = _quadrature(across + 1)
    # In the triangle t <= s the first coordinate is s: a = s (1 - w²) with w from 1 downwards.
    w = end + (1 - end) * z
    whole = along(late + 0 * w, w, late * 2 * w * (1 - end) * weight)
    w = z + 0 * end
    before = along(early + 0 * w, w, early * 2 * w * weight)
    z, weight = _quadrature(across + 30)
    log = np.log(late / early)
    a, w = early * np.exp(log * z**2), np.sqrt(-np.expm1(-log * z**2))
    after = along(a, w, a * 2 * log * z * weight)
    return np.block([[after, before], [np.zeros((half, half)), whole]])


@dataclass(frozen=True)
class Euler(_Product):
    """The states of a residual network of `count` layers, before each of them and at the end.

    Attributes:
      count: layers.
    """

    count: int

    @property
    def nodes(self) -> np.ndarray:
        """Equidistant."""
        return np.arange(self.count + 1) / self.count

    def integral(self, T: Number, leak: Number | None, like: Array) -> Array:
        """What `integrate` needs: `β (1 - βλ)^(i - 1 - k)` for `k < i`, with `β = T/count`."""
        step = jnp.asarray(T, like.dtype) / self.count
        lag = np.arange(self.count + 1)[:, None] - np.arange(self.count + 1) - 1
        powers = _powers(_kept(step, leak), self.count)
        return step * jnp.where(lag >= 0, powers[np.maximum(lag, 0)], 0)

    @property
    def clock(self) -> int:
        """The nodes of one time."""
        return self.count + 1

    def from_clock(self, k: Float[Array, "*_ clock"]) -> Float[Array, "*_ times"]:
        """The same."""
        return k

    to_clock = from_clock

    def rough(self, f: Float[Array, "*_ nodes"]) -> Float[Array, "*_ nodes"]:
        """`f` itself: the sum of the layers is not an approximation."""
        return f


def _kept(step: Array, leak: Number | None) -> Array:
    return jnp.ones_like(step) if leak is None else 1 - step * leak


def _powers(a: Array, most: int) -> Array:
    """`a⁰ ... a^most`, differentiable at `a = 0`."""
    return jnp.concatenate([jnp.ones(1, a.dtype), jnp.cumprod(jnp.broadcast_to(a, (most,)))])


Grid = Square | Triangles | Euler


def answer(
    grid: Grid, T: Number, leak: Number | None, inject_always: bool, like: Array
) -> Float[Array, " nodes"]:
    """The answers, at both times of the nodes, to what is injected, multiplied.

    `e^{-λt}` to what is injected at the start, `∫₀ᵗ e^{-λa} da` to what is injected always.
    """
    dtype = like.dtype
    if isinstance(grid, Euler):
        powers = _powers(_kept(jnp.asarray(T, dtype) / grid.count, leak), grid.count)
        if inject_always:
            zero = jnp.zeros(1, dtype)
            powers = jnp.concatenate([zero, jnp.cumsum(powers[:-1])]) * (
                jnp.asarray(T, dtype) / grid.count
            )
        first = jnp.repeat(powers, grid.count + 1)
    else:
        t = jnp.asarray(T, dtype) * jnp.asarray(grid.times[0], dtype)
        x = jnp.zeros_like(t) if leak is None else jnp.asarray(leak, dtype) * t
        first = t * _decayed(x) if inject_always else jnp.exp(-x)
    return first * first[grid.mirror]


def _decayed(x: Array) -> Array:
    """`(1 - e^{-x})/x`."""
    small = jnp.abs(x) < 1e-2  # where the quotient would lose digits, and at 0 everything
    safe = jnp.where(small, 1, x)
    series = 1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7)))))
    return jnp.where(small, series, -jnp.expm1(-safe) / safe)
