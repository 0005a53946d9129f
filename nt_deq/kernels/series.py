"""One Chebyshev series for all the pairs, where the activation is positively homogeneous."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from nt_deq.activations import Activation
from nt_deq.activations.elementary import arc_moment, arctan2, versine
from nt_deq.fixed_point.newton import Newton
from nt_deq.fixed_point.solver import rounding

# Two inputs are near whose chord squared is at most so many eps: it is computed from their
# differences, since the rounding of `1 - x·x'` would be a percent of it and more.
NEAR = 2.0**13


def homogeneous(
    activation: Activation, W_var: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`E[φ(g)²]` of a homogeneous `φ`, and how much it bends: `V̇ = moment - bend · angle/π`."""
    one = jnp.ones_like(W_var)
    moment = activation.dual_diagonal(one)[1]
    return moment, 2 * (moment - activation.dual(one, one, 0 * one)[1])


class Series(NamedTuple):
    """`α/x = Σ cₖ Tₖ((t - centre)/half)`, `t = log((x + left)/(2 - x + right))`, of one `ω`."""

    omega: Float[Array, ""]
    left: Float[Array, ""]
    right: Float[Array, ""]
    centre: Float[Array, ""]
    half: Float[Array, ""]
    coefficients: Float[Array, " degree"]
    accurate: Bool[Array, ""]


@dataclass(frozen=True)
class Chebyshev(Newton):
    """The pairs of a homogeneous activation (ReLU, LeakyReLU, Abs) by one series in one variable.

    For `φ(t z) = t φ(z)` the equation of a pair depends on nothing but the correlation `r` of the
    inputs. With `cos α` the correlation of `z*`, `x = √(2(1 - r))` the chord between the inputs,
    `a = W_std² E[φ(g)²]` and `β` how much `φ` bends (ReLU 1, Abs 2, identity 0), it is

        1 - cos α + ω M(α) = x²/2,   M(α) = (sin α - α cos α)/π,   ω = a β / (1 - a),

    and `J = a (1 - β α/π)`. So `α/x` is a function of `x` in [0, 2]. Its nearest singularities lie
    on the real line, at about `-π/(√3 ω)` where `1 + ω α/π` is 0 and at `√(4 + 2ω)` where `α` is π;
    in `t = log((x + ε)/(2 + δ - x))`, which sends these two points to infinity, 10 terms give 7
    digits and 25 give 14 for every `a` from .001 to .9999.

    The coefficients come from Newton's method at a few dozen points within the same program, so
    `W_std` may be traced. If what they leave out is larger than `rtol` (`a` near 0 or 1), the
    series is the start of Newton's method for every pair. The variances are solved by Newton's
    method. Not for other activations, nor for other layers than `stax.DEQ`.
    """

    def series(self, omega: Float[Array, ""]) -> Series:
        """Expands `α/x`, as a function of `x`, for `ω >= 0`, a scalar."""
        dtype = omega.dtype
        floor = rounding(dtype)
        tol = 2 * floor if self.rtol is None else max(self.rtol, floor)
        degree = math.ceil(2 * math.log10(1 / tol))
        left = jnp.minimum(math.pi / math.sqrt(3) / omega, 2)
        right = jnp.maximum(2 * omega / (jnp.sqrt(4 + 2 * omega) + 2), 1e-3)
        low, high = jnp.log(left / (2 + right)), jnp.log((2 + left) / right)
        centre, half = (high + low) / 2, (high - low) / 2

        size = degree + 4
        # cos(kθ) at θ = π (2j + 1)/(2 size), reduced before it is rounded
        wave = np.outer(np.arange(size), 2 * np.arange(size) + 1) % (4 * size)
        wave = np.cos(math.pi / (2 * size) * wave)
        power = jnp.exp(centre + half * jnp.asarray(wave[1], dtype))
        points = jnp.minimum(((2 + right) * power - left) / (1 + power), 2)
        values = self._newton(omega, points, points, 0)[0] / points
        wave[0] /= 2
        coefficients = jnp.matmul(
            jnp.asarray(2 / size * wave, dtype), values, precision=lax.Precision.HIGHEST
        )
        tail = jnp.sum(jnp.abs(coefficients[degree:])) / jnp.min(values)
        return Series(omega, left, right, centre, half, coefficients[:degree], tail <= tol)

    def angles(
        self, series: Series, chord: Float[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Int[Array, ""]]:
        """Solves `1 - cos α + ω M(α) = x²/2` for `α` in [0, π].

        Args:
          series: for `ω`.
          chord: `x` in [0, 2], any shape.

        Returns:
          `α`, shaped like `chord`, to `rtol` relative to itself, and the number of Newton's steps
          taken after the series: 0 unless its tail was too large.
        """
        t = jnp.log((chord + series.left) / (2 - chord + series.right))
        angle = chord * _chebyshev_sum(series.coefficients, (t - series.centre) / series.half)
        step = jnp.where(series.accurate, self.max_steps, 0)
        return self._newton(series.omega, chord, angle, step)

    def _newton(self, omega, chord, angle, step) -> tuple[Array, Array]:
        """Newton's method in `1 - cos α`, in which the equation is convex, and steps taken."""
        target = chord * chord / 2
        enough = float(jnp.finfo(chord.dtype).eps) ** 0.5  # of the last step: it is quadratic

        def unfinished(carry):
            step, _, change = carry
            return (step < self.max_steps) & (change > enough)

        def advance(carry):
            step, angle, _ = carry
            old = versine(angle)
            value, slope = omega * arc_moment(angle), omega * angle / math.pi
            new = jnp.clip(old - (old + value - target) / (1 + slope), 0, target)
            # 1 + cos α as a sum of positive terms, so that α has all its digits near π too.
            rest = (2 - chord) * (2 + chord) / 2 + jnp.maximum(value + slope * (new - old), 0)
            angle = 2 * arctan2(jnp.sqrt(new), jnp.sqrt(rest))
            return step + 1, angle, jnp.max(jnp.abs(new - old) / jnp.where(new > 0, new, 1))

        first = jnp.asarray(step, jnp.int32)
        last, angle, _ = lax.while_loop(
            unfinished, advance, (first, angle, jnp.array(jnp.inf, chord.dtype))
        )
        return angle, last - first


def _chebyshev_sum(series, t):
    """`Σ cₖ Tₖ(t)` by Clenshaw's recurrence, written out so that it fuses."""
    b1 = b2 = jnp.zeros_like(t)
    for k in range(series.shape[0] - 1, 0, -1):
        b1, b2 = 2 * t * b1 - b2 + series[k], b1
    return t * b1 - b2 + series[0]
