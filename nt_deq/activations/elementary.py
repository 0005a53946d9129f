"""Elementary functions that XLA vectorises on a CPU, with their exact derivatives of every order.

XLA calls libm one number at a time for `arctan2`, `arcsin`, `arccos`, `sin` and `cos` on a CPU, for
7 to 30 ns each; a polynomial of the same accuracy takes 1 (float32) or 2 ns (float64), and fuses
with what stands around it (`benchmarks/elementary.py`). They are within 4 units of the last place
of the true values; numbers below the least normal one are 0, as they are to XLA.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import erf
from jaxtyping import Float

Batch = Float[Array, "*#batch"]  # elementwise: shapes that broadcast

# By the bits of the dtype, the polynomials that interpolate at the Chebyshev points of the interval
# (in 60 digits), from the constant term upwards: at most .3 units of the last place off.
# fmt: off
# (arctan(t)/t - 1)/t² in t², for t in [0, 1]
_ARCTAN = {
    32: (
        -0.333333317, 0.199997393, -0.142785687, 0.110337641, -0.0865688043, 0.0625016944,
        -0.035871539, 0.0135077714, -2.38699732e-3,
    ),
    64: (
        -0.3333333333333333, 0.19999999999997532, -0.14285714285384132, 0.11111111093490828,
        -0.090909085908919342, 0.076922989710332169, -0.066665646992891042, 0.058815068777936561,
        -0.052579733342841108, 0.04737749579527779, -0.042603566326016521, 0.037494868125352471,
        -0.031277189066996385, 0.023696731580048622, -0.015535152475414176, 8.3689311784501621e-3,
        -3.4958859739163095e-3, 1.0496035084968515e-3, -1.9996189377901382e-4,
        1.8061954618612152e-5,
    ),
}
# (sin(α)/α - 1)/α² in α², for α in [0, π/2]
_SINE = {
    32: (
        -0.166666667, 8.33333277e-3, -1.98410866e-4, 2.75364636e-6, -2.40801904e-8,
    ),
    64: (
        -0.16666666666666667, 8.3333333333333159e-3, -1.9841269841254974e-4,
        2.7557319219163233e-6, -2.5052107616996183e-8, 1.6058977312464088e-10,
        -7.6439702967985721e-13, 2.7314447669863993e-15,
    ),
}
# M(α)/α³ in α² - _CENTRE, for α in [0, π]
_CENTRE = 5.0
_ARC_MOMENT = {
    32: (
        0.0616959543, -7.30921506e-3, 2.84904903e-4, -5.56767859e-6, 6.56251909e-8,
        -5.18906207e-10, 2.94589308e-12,
    ),
    64: (
        0.061695954325936368, -7.3092150397549044e-3, 2.849049017903169e-4,
        -5.5676850864497054e-6, 6.5625386991534959e-8, -5.1837242202165225e-10,
        2.938379784131128e-12, -1.2542783876366556e-14, 4.1788331223675478e-17,
        -1.1174787293166246e-19, 2.4538038454410601e-22,
    ),
}
# arccos(x)/(π√(1-x)) in x, for x in [0, 1]
_ANGLE = {
    32: (
        0.499999991, -0.0683087145, 0.0283196655, -0.0159518781, 0.00977915529, -0.00536067348,
        0.00206631545, -0.000385708112,
    ),
    64: (
        0.49999999999999999, -0.068309886183783477, 0.028345056907235874, -0.01616785497439062,
        0.010721085649171534, -0.0077585770642507463, 0.0059434582884418385,
        -0.0047376342361449236, 0.0038847246929972682, -0.0032401599258976976,
        0.0027020123666689562, -0.0021875340112401634, 0.0016468789333313239,
        -0.0010938835217706684, 0.00060523034858273507, -0.00026181549055231586,
        8.1755800598838751e-5, -1.6226605184888968e-5, 1.527104740182858e-6,
    ),
}
# κ1(-x)/(1-x)^(3/2) in x, likewise
_BEND = {
    32: (
        0.31830988, -0.0225346076, 0.00597665332, -0.00240475365, 0.00107535606, -0.000391721009,
        7.4634554e-5,
    ),
    64: (
        0.31830988618379067, -0.022535170724312469, 0.0059859796863377394, -0.0024647093279865692,
        0.0012691655888037858, -0.00074813272682917179, 0.00048259794872714034,
        -0.00033185703130211696, 0.00023893512264966457, -0.00017700272388117007,
        0.00013149330196400181, -9.4053496198395362e-5, 6.1272373358155531e-5,
        -3.4074269037372498e-5, 1.5058914821246523e-5, -4.8506077953335613e-6,
        9.9809651149363307e-7, -9.7590585943071682e-8,
    ),
}
# (1 + 2x) erfcx(x) in t = (x - _PIVOT)/(x + _PIVOT), for x >= 0
_PIVOT = 3.75
_ERFCX = {
    32: (
        1.23751263, -0.140240659, 0.00358543802, 0.0822784339, -0.108804565, 0.0922906917,
        -0.058688252, 0.0284094304, -0.0097646905, 0.00167573425, 0.000325388465, -0.00022405205,
        2.36348201e-5,
    ),
    64: (
        1.2375126308378276, -0.14024059858554702, 0.0035854154854644585, 0.082276738490151086,
        -0.10880393014175024, 0.09230432116019638, -0.05869339858961116, 0.028362277421543979,
        -0.0097465795582751514, 0.0017556258321915356, 0.00029371366698461307,
        -0.00029015397813783839, 5.1649093885821706e-5, 2.2383908276600381e-5,
        -1.1444134389658475e-5, -9.7284134518150776e-7, 1.7516189406943677e-6,
        -5.8275018627686912e-8, -2.5864899107183222e-7, 2.4301839484503084e-8,
        3.866242066283792e-8, -4.3969219167629056e-9, -5.1690806448159312e-9,
        5.4850845200836254e-10, 4.2433038251096758e-10, -3.7980647235900286e-11,
    ),
}
# (1 + 2x + 2x²)(1 - √π x erfcx(x)), likewise
_ERFCX_SLOPE = {
    32: (
        1.18329944, -0.20347248, -0.0752307745, 0.214476127, -0.191149446, 0.0807410771,
        0.0205512308, -0.0632393099, 0.0557885486, -0.0296130437, 0.00772142813, 0.00110759677,
        -0.000980443643,
    ),
    64: (
        1.1832994361043351, -0.20347192601319186, -0.075230500495969384, 0.21446046300554726,
        -0.19115712874184603, 0.080869348084030216, 0.020612919764819914, -0.063698495517156912,
        0.055575635755248951, -0.028785291570142477, 0.0080804500381428253,
        0.00033220829639027126, -0.0012741368246145535, 0.00036004740128988591,
        9.5412528997393046e-5, -7.7477219701564403e-5, -1.1110891139609527e-6,
        1.2941950642724423e-5, -1.2484746646071107e-6, -2.1229000078150615e-6,
        3.1700810736247404e-7, 3.5083455820133886e-7, -4.9781965503128374e-8,
        -5.0737808335195071e-8, 4.2085225423214486e-9, 4.3855504295570568e-9,
    ),
}
# fmt: on


def _polynomial(table: dict[int, tuple[float, ...]], x: Batch) -> Batch:
    """The polynomial of the dtype of `x`, by Horner's rule."""
    *terms, total = table[max(jnp.finfo(x.dtype).bits, 32)]
    total = jnp.full_like(x, total)
    for term in reversed(terms):
        total = total * x + term
    return total


@jax.custom_jvp
def arctan(tangent: Batch) -> Batch:
    """The angle in [-π/4, π/4] of a `tangent` in [-1, 1]."""
    square = tangent * tangent
    return tangent + tangent * (square * _polynomial(_ARCTAN, square))


@arctan.defjvp
def _arctan_jvp(primals, tangents):
    (tangent,), (d_tangent,) = primals, tangents
    return arctan(tangent), d_tangent / (1 + tangent * tangent)


@jax.custom_jvp
def arctan2(y: Batch, x: Batch) -> Batch:
    """The angle of the point `(x, y)`, in [-π, π]; signs of 0 and infinities as in IEEE 754."""
    abs_x, abs_y = jnp.abs(x), jnp.abs(y)
    smaller, larger = jnp.minimum(abs_x, abs_y), jnp.maximum(abs_x, abs_y)
    # Of two equal ones it is 1, also of infinities; of two zeros 0; NaN stays NaN.
    tangent = jnp.where(smaller < larger, smaller / larger, jnp.sign(larger))
    angle = arctan(tangent)
    angle = jnp.where(abs_y > abs_x, jnp.pi / 2 - angle, angle)
    angle = jnp.where(jnp.signbit(x), jnp.pi - angle, angle)
    return jnp.copysign(angle, y)


@arctan2.defjvp
def _arctan2_jvp(primals, tangents):
    """`(x dy - y dx)/(x² + y²)`, in units in which the squares neither overflow nor underflow."""
    (y, x), (dy, dx) = primals, tangents
    unit = lax.stop_gradient(jnp.maximum(jnp.abs(x), jnp.abs(y)))
    sine, cosine = y / unit, x / unit
    slope = (cosine * (dy / unit) - sine * (dx / unit)) / (cosine * cosine + sine * sine)
    return arctan2(y, x), slope


@jax.custom_jvp
def sine(angle: Batch) -> Batch:
    """`sin α` for `α` in [0, π/2]."""
    square = angle * angle
    return angle + angle * (square * _polynomial(_SINE, square))


@sine.defjvp
def _sine_jvp(primals, tangents):
    (angle,), (d_angle,) = primals, tangents
    return sine(angle), sine(jnp.pi / 2 - angle) * d_angle


def versine(angle: Batch) -> Batch:
    """`1 - cos α` for `α` in [0, π], without its cancellation near 0."""
    return 2 * sine(angle / 2) ** 2


@jax.custom_jvp
def arc_moment(angle: Batch) -> Batch:
    """`M(α) = (sin α - α cos α)/π` for `α` in [0, π], without its cancellation near 0."""
    square = angle * angle
    return angle * square * _polynomial(_ARC_MOMENT, square - _CENTRE)


@arc_moment.defjvp
def _arc_moment_jvp(primals, tangents):
    """`α sin α/π`."""
    (angle,), (d_angle,) = primals, tangents
    half = angle / 2
    slope = 2 / jnp.pi * angle * sine(half) * sine(jnp.pi / 2 - half)
    return arc_moment(angle), slope * d_angle


@jax.custom_jvp
def arc_cosine(rho: Batch) -> tuple[Batch, Batch]:
    """The arc-cosine kernels `κ0, κ1` of degree 0 and 1 (Cho & Saul 2009) of a `ρ` in [-1, 1].

    `κ0 = (π - arccos ρ)/π` and `κ1 = √(1-ρ²)/π + κ0 ρ`. Both are those of `-|ρ|` and what is exact:
    `κ0(ρ) = 1 - κ0(-ρ)` and `κ1(ρ) = ρ + κ1(-ρ)`. A `ρ` that a Gram matrix of this dtype does not
    tell from ±1 is taken for it.
    """
    size = jnp.abs(rho)
    gap, root = _gap(rho)
    angle, bend = root * _polynomial(_ANGLE, size), gap * root * _polynomial(_BEND, size)
    return jnp.where(rho < 0, angle, 1 - angle), jnp.maximum(rho, 0) + bend


@arc_cosine.defjvp
def _arc_cosine_jvp(primals, tangents):
    """`κ1' = κ0`, `κ0' = 1/(π√(1-ρ²))`, infinite at ±1: a kink is there, and 0 a subgradient."""
    (rho,), (d_rho,) = primals, tangents
    k0, k1 = arc_cosine(rho)
    gap, root = _gap(rho)
    sine = root * jnp.sqrt(2 - gap)
    slope = jnp.where(sine == 0, 0, 1 / (jnp.pi * jnp.where(sine == 0, 1, sine)))
    return (k0, k1), (slope * d_rho, k0 * d_rho)


def _gap(rho: Batch) -> tuple[Batch, Batch]:
    """`1 - |ρ|` and its square root, 0 within 8 units of rounding of `|ρ| = 1`."""
    gap = 1 - jnp.abs(rho)
    none = gap <= 8 * jnp.finfo(rho.dtype).eps  # written so that NaN stays NaN
    return gap, jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, gap)))


@jax.custom_jvp
def erfcx(x: Batch) -> Batch:
    """`exp(x²) erfc(x)` for `x >= 0`."""
    return _polynomial(_ERFCX, (x - _PIVOT) / (x + _PIVOT)) / (1 + 2 * x)


@erfcx.defjvp
def _erfcx_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erfcx(x), erfcx_slope(x) * dx


@jax.custom_jvp
def erfcx_slope(x: Batch) -> Batch:
    """`2x erfcx(x) - 2/√π` for `x >= 0`, without its cancellation where `x` is large."""
    value = _polynomial(_ERFCX_SLOPE, (x - _PIVOT) / (x + _PIVOT)) / (1 + 2 * x * (1 + x))
    return -2 / math.pi**0.5 * value


@erfcx_slope.defjvp
def _erfcx_slope_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erfcx_slope(x), (2 * erfcx(x) + 2 * x * erfcx_slope(x)) * dx


def erfcx_beyond_one(x: Batch) -> Batch:
    """`erfcx(x) - 1` for `x >= 0`, without its cancellation near 0."""
    near = jnp.minimum(x, 0.5)
    series = jnp.expm1(near * near) - jnp.exp(near * near) * erf(near)
    return jnp.where(x < 0.5, series, erfcx(x) - 1)
