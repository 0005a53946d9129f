"""The leading exponent of a distance: which data have it, and which refute it."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import infinite, training
from experiments.lib.data import load
from experiments.lib.leading_order import LeadingPower, fit_leading_power, local_slopes, tell
from experiments.lib.networks import Architecture, draw
from experiments.lib.report import all_hold

DEMO, FULL = (64, 256, 1024), tuple(2**i for i in range(6, 12))
RELU = Architecture(W_std=0.6, U_std=1.0, b_std=0.0, activation="relu")


def distances(square, widths, rng, networks=8):
    """Of networks with `E[D²] = square(n)`, a quadratic form of 70 Gaussians, as digits give."""
    return {n: np.sqrt(square(n) * rng.chisquare(70, networks) / 70) for n in widths}


def exact(square, widths):
    """The same with next to no scatter."""
    return {n: np.sqrt(square(n) * np.array([1 - 1e-6, 1 + 1e-6])) for n in widths}


@pytest.mark.parametrize("s", [-0.5, -0.3, -1.0])
def test_exact_numbers_have_their_exponent(s):
    fit = fit_leading_power(exact(lambda n: 2 * n ** (2 * s) * (1 - 2.3 / n**0.5 + 9 / n), FULL))
    assert fit.exponent == pytest.approx(s, abs=1e-4)
    assert (fit.a, fit.b, fit.c) == pytest.approx((2, -2.3, 9), rel=0.02)
    assert fit.low < s < fit.high < s + 0.001
    n = np.array([64.0, 4096.0])
    np.testing.assert_allclose(
        fit(n) ** 2, 2 * n ** (2 * s) * (1 - 2.3 / n**0.5 + 9 / n), rtol=1e-3
    )
    b_alone = fit_leading_power(exact(lambda n: 2 * n ** (2 * s) * (1 - 2.3 / n**0.5), DEMO))
    assert (b_alone.exponent, b_alone.b, b_alone.c) == pytest.approx((s, -2.3, 0), abs=0.01)
    line = fit_leading_power(exact(lambda n: 2 * n ** (2 * s), DEMO[:2]))
    assert (line.exponent, line.b, line.orders) == pytest.approx((s, 0, 0), abs=1e-5)


def test_a_correction_is_not_taken_for_the_leading_order():
    # With a → 0 the data of s = -1/2 would have s = -1/4 too, of which b/√n is the whole.
    fit = fit_leading_power(exact(lambda n: 1 / n, DEMO))
    assert fit.low == pytest.approx(-0.5, abs=0.001)
    assert fit.high == pytest.approx(-0.5, abs=0.001)
    assert fit.is_root


ROOTS = {
    "pure": lambda n: 2.1 / n,
    "1/√n": lambda n: 2.1 / n * (1 - 2.3 / n**0.5),
    "1/n": lambda n: 2.1 / n * (1 - 16 / n),
    "saturating": lambda n: 2.1 / (n + 16),  # all orders
    "both": lambda n: 2.1 / n * (1 + 3 / n**0.5 - 20 / n),
}
OTHERS = {
    "a floor": lambda n: 2.1 / n + 0.05**2,
    "none": lambda n: 0.03 + 0 * n,
    "-1": lambda n: 100 / n**2,
    "-3/4": lambda n: 10 / n**1.5,
    "-1/4": lambda n: 0.3 / n**0.5,
}


@pytest.mark.parametrize("widths", [DEMO, FULL], ids=["demo", "full"])
def test_intervals_cover(widths):
    rng = np.random.default_rng(0)
    for name, square in ROOTS.items():
        fits = [fit_leading_power(distances(square, widths, rng)) for _ in range(40)]
        # 95 % of 40 is 38, its standard deviation 1.4.
        assert [fit.is_root for fit in fits].count(True) >= 34, name
        assert np.mean([fit.high - fit.low for fit in fits]) < 0.25, name
    for name, square in OTHERS.items():
        fits = [fit_leading_power(distances(square, widths, rng)) for _ in range(20)]
        assert not any(fit.is_root for fit in fits), name


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.6, -0.4, True),
        (-0.4, -0.1, False),
        (-0.9, -0.6, False),
        (-0.6, 0.1, None),
        (-0.4, 0.1, False),
    ],
)
def test_data_that_cannot_tell_are_no_verdict(low, high, verdict):
    fit = LeadingPower((low + high) / 2, low, high, a=1, b=0, c=0, orders=2)
    assert fit.is_root is verdict
    assert ("decides nothing" in tell(fit, [])) == (verdict is None)
    assert all_hold([True, verdict]) is verdict
    assert all_hold([False, verdict]) is False


def test_a_line_would_not_do():
    # What the demonstration measures: the line excludes -1/2, which the leading order has.
    found = exact(ROOTS["1/√n"], DEMO)
    slopes = [slope.exponent for slope in local_slopes(found)]
    assert np.all(np.diff(slopes) < 0)  # they tend to -1/2, from above
    assert -0.5 < slopes[-1] < slopes[0] < -0.42
    assert fit_leading_power(found).exponent == pytest.approx(-0.5, abs=0.01)


def test_what_is_told():
    rng = np.random.default_rng(1)
    for name, square, widths, message in (
        ("root", ROOTS["pure"], DEMO, "it agrees with theory's −1/2"),
        ("floor", OTHERS["a floor"], FULL, "theory's −1/2 is outside"),
        ("none", OTHERS["none"], FULL, "theory's −1/2 is outside"),
        ("two", ROOTS["pure"], DEMO[:2], "take three --widths"),
    ):
        found = distances(square, widths, rng)
        fit = fit_leading_power(found)
        text = tell(fit, local_slopes(found))
        assert message in text, name
        assert fit.interval in text


@pytest.mark.slow
def test_networks_that_break_the_theory_are_told():
    # In mean-field scaling the output is divided by another √n and the step multiplied by n:
    # features are learned whatever the width, and the distance to the NTK's prediction stays.
    data = load("digits", None, 32, 50, seed=0)
    x, y, x_test = (
        jnp.asarray(a, jnp.float32) for a in (data.x_train, data.targets_train, data.x_test)
    )
    limit = infinite.predict(RELU, x, y, x_test, learning_rate=None, steps=[0, 16])
    x_all, targets = jnp.concatenate([x, x_test]), jnp.broadcast_to(y, (8, *y.shape))

    def trained(width, scale):
        networks, params = draw(RELU, x.shape[1], width, y.shape[1], 8, 0)

        def forward(params, x, z0):
            f, z = networks.forward(params, x, z0)
            return scale * f, z

        outputs = networks.of_each(lambda network: scale * network(x_all)[0])
        start, rate = training.start(params, width, targets), limit["learning_rate"] / scale**2
        after = training.gradient_descent(forward, start, x, targets, float(rate), 16).params
        begun, ended = (np.asarray(outputs(params), float) for params in (params, after))
        expected = infinite.from_start(limit, np.asarray(y), begun, [16])[0]
        return np.sqrt(np.square(ended - expected)[:, len(y) :].mean((1, 2)))

    fits = {
        scaling: fit_leading_power({width: trained(width, width**power) for width in DEMO})
        for scaling, power in (("NTK", 0.0), ("mean field", -0.5))
    }
    assert fits["NTK"].is_root
    assert fits["mean field"].low > -0.25
    assert not fits["mean field"].is_root
