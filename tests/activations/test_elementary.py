"""The elementary functions against mpmath, in units of the last place, and their derivatives."""

import itertools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from nt_deq.activations import elementary

EXACT = {
    "arctan": mpmath.atan,
    "sine": mpmath.sin,
    "versine": lambda a: 2 * mpmath.sin(a / 2) ** 2,
    "arc_moment": lambda a: (mpmath.sin(a) - a * mpmath.cos(a)) / mpmath.pi,
}
ENDS = {"arctan": 1.0, "sine": np.pi / 2, "versine": np.pi, "arc_moment": np.pi}  # of the range


def units_off(found, exact):
    """The largest error in units of the last place; what is below the least normal number is 0."""
    found = np.asarray(found)
    errors = []
    for value, true in zip(found.ravel(), exact, strict=True):
        unit = np.spacing(max(abs(found.dtype.type(true)), np.finfo(found.dtype).tiny))
        if value != 0 or abs(true) > np.finfo(found.dtype).tiny:
            errors.append(abs(mpmath.mpf(float(value)) - true) / mpmath.mpf(float(unit)))
    return float(max(errors))


def wide(*arrays):
    """The numbers of arrays for mpmath."""
    return zip(*([mpmath.mpf(float(x)) for x in a] for a in arrays), strict=True)


@pytest.fixture(autouse=True)
def digits():
    """Enough for the cancellation of `sin α - α cos α` at the smallest angles."""
    with mpmath.workdps(60):
        yield


def sizes(dtype):
    """Numbers of all sizes that are not subnormal."""
    info = np.finfo(dtype)
    ends = np.log10(float(info.tiny)), np.log10(float(info.max))
    rng = np.random.default_rng(0)
    numbers = np.concatenate([[info.tiny, info.max], 10 ** rng.uniform(*ends, 200)[1:]])
    return numbers.astype(dtype)


def test_arctan2_is_exact_to_4_units(dtype):
    rng = np.random.default_rng(1)
    angles = rng.uniform(-np.pi, np.pi, 1500)
    small = np.array([-1, 1] * 500) * 10 ** rng.uniform(-12, 0, 1000)  # beside each axis
    angles = np.concatenate([angles, *(small + quarter * np.pi / 4 for quarter in range(-4, 5))])
    radii = 10 ** rng.uniform(-15, 15, angles.size)
    y, x = (radii * np.sin(angles)).astype(dtype), (radii * np.cos(angles)).astype(dtype)
    anywhere = [rng.choice(sizes(dtype), 2000) * rng.choice([-1, 1], 2000) for _ in range(2)]
    y, x = (np.concatenate(pair).astype(dtype) for pair in zip((y, x), anywhere, strict=True))
    found = jax.jit(elementary.arctan2)(y, x)
    assert found.dtype == dtype
    assert units_off(found, [mpmath.atan2(*point) for point in wide(y, x)]) < 2


def test_arctan2_at_zeros_infinities_and_nan(dtype):
    ends = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]
    y, x = (np.array(a, dtype) for a in zip(*itertools.product(ends, ends), strict=True))
    found, exact = np.asarray(jax.jit(elementary.arctan2)(y, x)), np.arctan2(y, x)
    np.testing.assert_allclose(found, exact, rtol=np.finfo(dtype).eps)
    np.testing.assert_array_equal(np.signbit(found[exact == 0]), np.signbit(exact[exact == 0]))


def test_subnormal_numbers_are_zeros(dtype):
    """As they are to XLA on a CPU, whatever is done with them; the sign remains."""
    tiny = np.finfo(dtype).tiny / 4
    y, x = np.array([[tiny, -tiny, 1, tiny, -tiny], [1, 1, tiny, tiny, -1]], dtype)
    found = jax.jit(elementary.arctan2)(y, x)
    np.testing.assert_allclose(found, np.arctan2([0.0, -0.0, 1, 0.0, -0.0], [1, 1, 0, 0, -1]))
    for name in EXACT:
        assert jax.jit(getattr(elementary, name))(dtype.type(tiny)) <= tiny, name


@pytest.mark.parametrize("name", EXACT)
def test_functions_of_one_number_are_exact_to_4_units(dtype, name):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(0, 1, 2000), 10 ** rng.uniform(-10, 0, 1000), [0]])
    x = np.concatenate([x, 1 - x]) * ENDS[name]
    x = np.minimum(x, ENDS[name] * (1 - np.finfo(dtype).eps)).astype(dtype)
    found = jax.jit(getattr(elementary, name))(x)
    assert found.dtype == dtype
    assert units_off(found, [EXACT[name](*number) for number in wide(x)]) < 4


def test_arc_cosine_kernels_are_exact_to_4_units(dtype):
    """Beside both ends too; where ρ is taken for ±1 `κ0` is off by the root of 8 units at most."""
    rng = np.random.default_rng(3)
    near = 1 - 10 ** rng.uniform(np.log10(32 * np.finfo(dtype).eps), 0, 2000)
    rho = np.concatenate([near, -near, rng.uniform(-1, 1, 2000), [-1, 0, 1]]).astype(dtype)
    k0, k1 = jax.jit(elementary.arc_cosine)(rho)
    assert k0.dtype == k1.dtype == dtype
    exact0 = [1 - mpmath.acos(r) / mpmath.pi for (r,) in wide(rho)]
    assert units_off(k0, exact0) < 4
    exact1 = [
        mpmath.sqrt(1 - r * r) / mpmath.pi + k * r
        for (r,), k in zip(wide(rho), exact0, strict=True)
    ]
    assert units_off(k1, exact1) < 4
    taken = jnp.asarray([1 - 4 * np.finfo(dtype).eps, 1, -1], dtype)
    np.testing.assert_array_equal(elementary.arc_cosine(taken)[0], [1, 1, 0])


def test_derivatives_of_arc_cosine_kernels(x64):
    """Of every order inside; at the ends the kink's is 0."""
    rho = jnp.asarray([-0.999, -0.3, 0.0, 0.6, 0.9999])
    k1 = jax.vmap(lambda r: elementary.arc_cosine(r)[1])
    first, second, third = (
        forward(k1)(rho),
        forward(forward(k1))(rho),
        forward(forward(forward(k1)))(rho),
    )
    np.testing.assert_array_equal(first, elementary.arc_cosine(rho)[0])
    sine = np.sqrt((1 - rho) * (1 + rho))
    np.testing.assert_allclose(second, 1 / (np.pi * sine), rtol=1e-14)
    np.testing.assert_allclose(third, rho / (np.pi * sine**3), rtol=1e-13)
    for end, slope in ((1.0, 1.0), (-1.0, 0.0)):
        assert jax.grad(lambda r: elementary.arc_cosine(r)[1])(jnp.asarray(end)) == slope
        assert jax.grad(lambda r: elementary.arc_cosine(r)[0])(jnp.asarray(end)) == 0


@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_nan(dtype, name):
    assert np.isnan(getattr(elementary, name)(jnp.asarray(np.nan, dtype)))
    assert np.isnan(elementary.arc_cosine(jnp.asarray(np.nan, dtype))).all()


def forward(fn):
    return lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]


MODES = [jax.grad, forward]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_every_order(x64, mode, name):
    """Against the numerical derivatives of mpmath."""
    points = np.array([0.01, 0.3, 0.77, 0.98]) * ENDS[name]
    derivative = getattr(elementary, name)
    for order in (1, 2, 3):
        derivative = mode(derivative)
        found = jax.vmap(derivative)(points)
        exact = [float(mpmath.diff(EXACT[name], *x, order)) for x in wide(points)]
        np.testing.assert_allclose(found, exact, rtol=1e-13, atol=1e-14)


def test_derivatives_of_arctan2(x64):
    def of_x(y, x):
        return jax.jvp(lambda x: elementary.arctan2(y, x), (x,), (jnp.ones_like(x),))[1]

    for y, x in jnp.asarray([(1.0, 2.0), (-0.3, 1e-3), (2.0, -5.0), (1e-9, -1.0)]):
        found = [jax.grad(fn, (0, 1))(y, x) for fn in (elementary.arctan2, of_x)]
        square = x * x + y * y
        exact = [(x / square, -y / square), ((y * y - x * x) / square**2, 2 * x * y / square**2)]
        np.testing.assert_allclose(found, exact, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_do_not_overflow_in_derivatives_of_arctan2(scale):
    found = jax.grad(elementary.arctan2, (0, 1))(3 * jnp.float32(scale), -4 * jnp.float32(scale))
    np.testing.assert_allclose(found, [-0.16 / scale, -0.12 / scale], rtol=1e-6)


def test_xla_calls_no_library_for_them(dtype):
    """It calls libm for these operations, number by number, on a CPU."""
    x = jnp.linspace(0, 1, 64, dtype=dtype)
    call = re.compile(r"\b(atan2|atan|asin|acos|sine|cosine)\(")
    for name in ("arctan2", "arc_cosine", *EXACT):
        args = (x, x) if name == "arctan2" else (x,)
        program = jax.jit(getattr(elementary, name)).lower(*args).compile().as_text()
        assert not call.search(program), name
    assert call.search(jax.jit(jnp.arctan2).lower(x, x).compile().as_text())


def test_scaled_complements_of_erf(dtype):
    """`erfcx`, its slope, and its distance from 1 keep their digits at both ends."""
    x = np.concatenate([[0.0], np.logspace(-9, 4, 60)]).astype(dtype)
    large = [mpmath.mpf(float(a)) for a in x]
    with mpmath.workdps(40):
        erfcx = [mpmath.hyperu(0.5, 0.5, a * a) / mpmath.sqrt(mpmath.pi) for a in large]
        exact = {
            "erfcx": erfcx,
            "erfcx_slope": [
                2 * a * b - 2 / mpmath.sqrt(mpmath.pi) for a, b in zip(large, erfcx, strict=True)
            ],
            "erfcx_beyond_one": [b - 1 for b in erfcx],
        }
    for name, expected in exact.items():
        assert units_off(jax.jit(getattr(elementary, name))(x), expected) < 6, name
    second = jax.vmap(jax.grad(jax.grad(elementary.erfcx)))(x[x < 3])
    expected = [
        2 * b + 2 * a * s for a, b, s in zip(large, erfcx, exact["erfcx_slope"], strict=True)
    ]
    np.testing.assert_allclose(
        second, np.array(expected, float)[: len(second)], rtol=64 * np.finfo(dtype).eps
    )
