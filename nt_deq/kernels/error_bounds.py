"""How far the dense kernels may be from the truth: the bounds of a `KernelSolution`.

A computed `K*` solves its equation but for the residual, the rounding of that, and the errors of
what enters it: `S` and the two variances. With `ρ = c/√(k k')` the equation of a pair is

    g(ρ; k, k') = (W_var V(k, k', ρ√(k k')) + S)/√(k k') - ρ = 0,     -∂g/∂ρ = 1 - J(ρ),

so the error of `ρ` is at most `ν/(1 - max J)`, where `ν` is how far from 0 `g` may be, and the
maximum is taken between the computed `ρ` and the true one. By Cauchy-Schwarz `J` is at most
`√(J(x, x) J(x', x'))` everywhere, which gives a first bound `δ`, and the `J` at `ρ ± δ` a sharper
one. The variances are bounded likewise. From `Θ* = K*/(1 - J)` follows

    |Θ - Θ*| <= (|K - K*| + |Θ| |J - J*|)/(1 - J*).

The rounding errors of the terms of `x·x'` are taken for independent, so that they add up to `√d` of
them (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from nt_deq.activations import Activation
from nt_deq.activations.elementary import arc_moment, versine
from nt_deq.activations.quotient import over
from nt_deq.kernels.equations import Marginals, marginal_map
from nt_deq.kernels.series import NEAR, Chebyshev, homogeneous
from nt_deq.kernels.tiles import by_tiles

ENOUGH = 0.01  # of the scale of `Θ*`: what float32 must give
_UNITS = 2.0  # rounding errors of an equation that is evaluated once, in eps


class Errors(NamedTuple):
    """Bounds of the errors of `nngp` and of `ntk`, `(n1, n2)` each, NaN where these are."""

    nngp: Float[Array, "n1 n2"]
    ntk: Float[Array, "n1 n2"]


class Known(NamedTuple):
    """What was computed of a kernel besides itself.

    Attributes:
      W_var: `W_std²`.
      injected1, injected2: `S(x, x)` of the first and of the second inputs, `(n,)`; `injected2` is
        `None` where these are the first.
      marginals1, marginals2: their equilibria.
      dual: `V(K*)`, `(n1, n2)`; `None` of the series, which does without.
      dual_slope: `V̇(K*)`, likewise.
    """

    W_var: Float[Array, ""]
    injected1: Float[Array, " n1"]
    injected2: Float[Array, " n2"] | None
    marginals1: Marginals
    marginals2: Marginals
    dual: Float[Array, "n1 n2"] | None
    dual_slope: Float[Array, "n1 n2"]


@jax.tree_util.register_pytree_node_class
class ErrorBounds:
    """What the bounds are computed of, where they are asked for: they cost several solutions.

    Attributes:
      activation, solver, features: of the kernel, `features` a number.
      known: what was computed of it, `Known`.
    """

    def __init__(self, activation, solver, features, known):
        self.activation, self.solver, self.features = activation, solver, features
        self.known = known

    def tree_flatten(self):
        """As JAX asks for it."""
        return (self.known,), (self.activation, self.solver, self.features)

    @classmethod
    def tree_unflatten(cls, static, children):
        """As JAX asks for it."""
        return cls(*static, *children)

    @jax.jit
    def evaluate(self, nngp: Array, residual: Array, solved: Array) -> Errors:
        """Computes them, given what a `KernelSolution` has, `(n1, n2)` each."""
        known, symmetric = self.known, self.known.injected2 is None
        rows, columns = self._inputs()
        series = isinstance(self.solver, Chebyshev)
        rtol = (self.solver.rtol or 0.0) if series else None
        pair = partial(_tile, self.activation, rtol, self._gram_error(), known.W_var)

        def tile(rows, columns, pairs):
            found = pair(rows, columns, pairs)
            if not symmetric:
                return found
            same = rows.number[:, None] == columns.number[None, :]
            own = _own(rows)
            return tuple(jnp.where(same, s[:, None], f) for s, f in zip(own, found, strict=True))

        pairs = jnp.where(solved, nngp, 0), known.dual, known.dual_slope, residual
        mirror = jnp.transpose if symmetric else None
        bounds = by_tiles(tile, rows, columns, pairs, mirror)
        return Errors(*(jnp.where(solved, bound, jnp.nan) for bound in bounds))

    @jax.jit
    def are_small(self) -> Array:
        """Whether `Θ*` is known to a percent of `scale`, even of the most sensitive of pairs.

        `J` changes most with `ρ` where `ρ` is 1. Takes no time, where most kernels need no more.
        """
        known, eps = self.known, float(jnp.finfo(self.known.W_var.dtype).eps)
        both = known.marginals1, known.marginals2
        found = []
        for x, marginals in zip(self._inputs(), both, strict=True):
            k = x.variance
            off = 2 * (self._gram_error() + x.variance_error) + 16 * eps
            delta = jnp.minimum(_divided(off, 1 - x.rate - x.rate_error), 1)
            beside = self.activation.dual(k, k, k * (1 - jnp.maximum(delta, 64 * eps)))[1]
            rate_error = x.rate_error + known.W_var * jnp.abs(marginals.dual_slope - beside)
            gap = 1 - x.rate - rate_error
            error = _divided(delta + x.variance_error + rate_error, gap)
            found.append(jnp.all((error < ENOUGH) | ~marginals.exists | (k == 0)))
        return found[0] & found[1]

    @jax.jit
    def scale(self) -> Array:
        """`√(Θ*(x, x) Θ*(x', x'))`, `(n1, n2)`."""
        both = self.known.marginals1, self.known.marginals2
        root1, root2 = (jnp.sqrt(each.variance / (1 - each.rate)) for each in both)
        return root1[:, None] * root2[None, :]

    def _gram_error(self) -> float:
        """Bound of the error of `S(x, x')`, relative to `√(S(x, x) S(x', x'))`."""
        return (2 + self.features**0.5) * float(jnp.finfo(self.known.W_var.dtype).eps)

    def _inputs(self) -> tuple[_Inputs, _Inputs]:
        """The first and the second inputs with what is not known of them."""
        W_var, s1, s2, marginals1, marginals2, _, _ = self.known

        def side(s, marginals):
            return _bound_inputs(self.activation, self._gram_error(), W_var, s, marginals)

        first = side(s1, marginals1)
        return first, first if s2 is None else side(s2, marginals2)


class _Inputs(NamedTuple):
    """The equilibria of inputs with themselves, and what is not known of them, `(n,)` each.

    Attributes:
      number: which input it is.
      injected: `S(x, x)`.
      variance: `K*(x, x)`.
      variance_error: bound of its error, relative to itself.
      rate: `J`.
      rate_error: bound of its error.
    """

    number: Array
    injected: Array
    variance: Array
    variance_error: Array
    rate: Array
    rate_error: Array


def _bound_inputs(activation, gram_error, W_var, injected, marginals) -> _Inputs:
    """The equilibria of inputs with themselves, with what is not known of them."""
    variance = marginals.variance
    rounding = _rounding(activation, variance)
    off = marginals.root.residual + rounding * variance + gram_error * injected

    def largest(fn, relative):
        ends = (variance * (1 + relative), variance / (1 + relative))
        return jnp.maximum(*map(fn, ends))

    def slope(k):
        slope = marginal_map(activation, k, (W_var, injected)).slope
        assert slope is not None
        return slope + rounding

    def rate_at(k):
        return W_var * activation.dual_diagonal(k)[1]

    first = jnp.minimum(over(_divided(off, 1 - slope(variance)), variance), 1)
    error = over(_divided(off, 1 - largest(slope, first)), variance)
    rate = rate_at(variance)
    moved = largest(lambda k: jnp.abs(rate_at(k) - rate), jnp.minimum(error, 1))
    number = jnp.arange(len(variance))
    return _Inputs(number, injected, variance, error, rate, moved + rounding * rate)


def _rounding(activation: Activation, *variances: Array) -> Array | float:
    """Of an equation that is evaluated once; a dual of several functions rounds once more.

    With what a rule of quadrature misses at these variances.
    """
    units = _UNITS if activation.homogeneous else _UNITS + 1
    rounding = units * float(jnp.finfo(variances[0].dtype).eps)
    if activation.missed is None:
        return rounding
    return rounding + reduce(jnp.maximum, map(activation.missed, variances))


def _divided(a: Array, gap: Array) -> Array:
    """`a/gap`, and infinity where `gap` is not positive."""
    return jnp.where(gap > 0, a / jnp.where(gap > 0, gap, 1), jnp.inf)


def _own(x: _Inputs) -> tuple[Array, Array]:
    """The bounds where an input meets itself."""
    nngp_error, gap = x.variance * x.variance_error, 1 - x.rate - x.rate_error
    return nngp_error, _ntk_error(x.variance, x.rate, nngp_error, x.rate_error, gap)


def _ntk_error(covariance, rate, nngp_error, rate_error, gap) -> Array:
    """The last formula of the module's docstring; `gap` is what `1 - J*` is at least."""
    ntk = jnp.abs(covariance) / (1 - rate)
    rounding = _UNITS * float(jnp.finfo(covariance.dtype).eps)
    return _divided(nngp_error + ntk * rate_error, gap) + rounding * ntk


class _Sensitivity(NamedTuple):
    """What the bounds of a tile of pairs are made of.

    Attributes:
      off: `ν`, how far from 0 the equation may be.
      cosine: how far `ρ` may be from what solves the equation as computed.
      moved_rate: how far `J` may be off because of the variances.
      spread: `δ ->` how far `J` may be elsewhere in `ρ ± δ`.
    """

    off: Array
    cosine: Array | float
    moved_rate: Array | float
    spread: Callable[[Array], Array]


def _tile(activation, series_rtol, gram_error, W_var, rows, columns, pairs) -> tuple[Array, Array]:
    """The bounds of pairs of different inputs."""
    covariance, dual, dual_slope, residual = pairs
    s1, k1, error1, rate1, rate_error1 = (a[:, None] for a in rows[1:])
    s2, k2, error2, rate2, rate_error2 = (a[None, :] for a in columns[1:])
    rounding = _rounding(activation, k1, k2)
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    rho, rate = over(covariance, scale), W_var * dual_slope
    largest = jnp.sqrt((rate1 + rate_error1) * (rate2 + rate_error2))
    errors = error1, error2
    if series_rtol is not None:
        assert isinstance(rounding, float)  # of a homogeneous activation
        rtol = max(series_rtol, rounding)
        found = _of_series(activation, gram_error, rounding, rtol, W_var, rho, dual_slope)
    else:
        gram = gram_error * jnp.sqrt(s1) * jnp.sqrt(s2)
        off = rounding + over(gram + residual, scale)
        injected = over(covariance - W_var * dual, scale)
        if activation.homogeneous:
            found = _of_angle(activation, off, W_var, dual_slope, injected, errors)
        else:
            variances = k1, k2
            found = _of_any(activation, off, W_var, rho, rate, injected, variances, errors, largest)

    least = jnp.maximum(1 - largest, 0)
    delta = jnp.minimum(_divided(found.off, least), 2)
    gap = jnp.maximum(1 - rate - rounding - found.moved_rate - found.spread(delta), least)
    delta = jnp.minimum(_divided(found.off, gap), delta)
    of_scale = scale * jnp.abs(rho) * (error1 + error2) / 2
    largest_scale = scale * jnp.sqrt(1 + error1) * jnp.sqrt(1 + error2)
    nngp_error = largest_scale * jnp.minimum(delta + found.cosine, 2) + of_scale
    rate_error = rounding + found.moved_rate + found.spread(delta)
    gap = jnp.maximum(1 - rate - rate_error, least)
    return nngp_error, _ntk_error(covariance, rate, nngp_error, rate_error, gap)


def _of_angle(activation, off, W_var, dual_slope, injected, errors) -> _Sensitivity:
    """Of a homogeneous `φ`, where `g` depends on the variances by `S/√(k k')` alone."""
    _, bend = homogeneous(activation, W_var)
    y = versine(_angle(activation, W_var, dual_slope))
    spread = partial(_angle_spread, W_var * bend / jnp.pi, y)
    return _Sensitivity(off + jnp.abs(injected) * sum(errors) / 2, 0.0, 0.0, spread)


def _of_series(activation, gram_error, rounding, rtol, W_var, rho, dual_slope) -> _Sensitivity:
    """Of the series, which solves `y + ω M(α) = 1 - r` with `y = 1 - ρ` without the variances.

    `r` is the correlation of the inputs. `1 - a` times this equation is `g = 0`.
    """
    moment, bend = homogeneous(activation, W_var)
    angle = _angle(activation, W_var, dual_slope)
    y = jnp.where(bend == 0, 1 - rho, versine(angle))
    gap = 1 - W_var * moment
    bent = W_var * bend * arc_moment(angle)
    chord = jnp.sqrt(2 * (y + bent / gap))
    near = chord * chord <= NEAR * float(jnp.finfo(chord.dtype).eps)
    of_correlation = jnp.where(near, chord * (gram_error + rounding), 2 * gram_error + rounding)
    per_radian = W_var * bend / jnp.pi  # how much J falls with the angle
    off = gap * of_correlation + bent * rounding / gap
    cosine, moved_rate = rounding + 2 * rtol * y, per_radian * angle * rtol
    return _Sensitivity(off, cosine, moved_rate, partial(_angle_spread, per_radian, y))


def _angle(activation, W_var, dual_slope) -> Array:
    """The angle `α` between two states, of which `V̇` is a linear function."""
    moment, bend = homogeneous(activation, W_var)
    angle = (moment - dual_slope) * (jnp.pi / jnp.where(bend == 0, 1, bend))
    return jnp.clip(angle, 0, jnp.pi)


def _angle_spread(per_radian: Array, y: Array, delta: Array) -> Array:
    """How far `J` may move where `y = 1 - cos α` moves by `delta`, if it moves so with the angle.

    `dα/dy = 1/√(y(2 - y))`; and `α` is concave up to its middle, so that it moves by no more than
    from 0.
    """
    anywhere = jnp.sqrt(delta) * float(jnp.pi / 2**0.5)
    side = jnp.minimum(y, 2 - y) - delta
    beside = delta / jnp.sqrt(jnp.where(side > 0, side * (2 - side), 1))
    return per_radian * jnp.where(side > 0, jnp.minimum(anywhere, beside), anywhere)


def _of_any(
    activation, off, W_var, rho, rate, injected, variances, errors, largest
) -> _Sensitivity:
    """Of any `φ`, by moving what is not known to the ends of its range."""
    k1, k2 = variances
    scale = jnp.sqrt(k1) * jnp.sqrt(k2)
    up1, up2 = (1 + jnp.minimum(error, 1) for error in errors)

    def move(up2):  # at the same ρ
        factor = jnp.sqrt(up1) * jnp.sqrt(up2)
        dual, slope = activation.dual(k1 * up1, k2 * up2, rho * scale * factor)
        equation = (W_var * over(dual, scale) + injected) / factor - rho
        return jnp.abs(equation), jnp.abs(W_var * slope - rate)

    moved_off, moved_rate = (
        jnp.maximum(*ends) for ends in zip(move(up2), move(1 / up2), strict=True)
    )

    def spread(delta):
        # An evaluation rounds ρ itself and, beside ±1, where J may bend sharply, beyond them.
        delta = jnp.maximum(delta, 4 * _UNITS * float(jnp.finfo(rho.dtype).eps))
        ends = (jnp.clip(rho + way * delta, -1, 1) * scale for way in (1, -1))
        moved = jnp.maximum(*(jnp.abs(W_var * activation.dual(k1, k2, c)[1] - rate) for c in ends))
        return jnp.where(jnp.abs(rho) + delta >= 1, jnp.maximum(moved, largest - rate), moved)

    return _Sensitivity(off + moved_off, 0.0, moved_rate, spread)
