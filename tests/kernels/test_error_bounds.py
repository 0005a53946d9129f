"""The bounds of errors hold and are not a matter of course; float32 is left where it fails."""

import attack
import jax
import numpy as np
import pytest

from nt_deq import Chebyshev, deq_kernel, enable_x64


@pytest.mark.parametrize(
    ("name", "dtype"), [("relu", np.float32), ("relu", np.float64), ("erf", np.float32)]
)
def test_they_hold(x64, name, dtype):
    tally = attack.attack(name, dtype, draws=200, widths=(3,))
    assert tally.violations == 0
    assert tally.draws > 100
    assert tally.median < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["leaky_relu", "abs", "gelu", "cos", "identity", "hard_tanh", "elu", "selu", "squared_relu"],
)
def test_they_hold_for_the_others(x64, name):
    assert attack.attack(name, np.float32, draws=600).violations == 0


def exact(x, **arguments):
    """In float64, of the same float32 numbers."""
    with enable_x64(True):
        return np.asarray(deq_kernel(x.astype(np.float64), **arguments).ntk)


def test_near_duplicates_beside_criticality_have_their_digits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 10)).astype(np.float32)
    x = np.concatenate([x, x * (1 + 1e-3 * rng.normal(size=x.shape)), x]).astype(np.float32)
    W_std = float(np.float32(np.sqrt(2 * (1 - 2e-5))))
    stds = (np.array([std]) for std in (W_std, 1.0, 0.0))
    wide = np.asarray(attack.bisected("relu", attack.Problem(x[None], *stds))[1][0], float)
    for others in (None, x):
        ours = deq_kernel(x, others, W_std=W_std)
        assert ours.ntk.dtype == np.float32
        np.testing.assert_allclose(ours.ntk, wide, rtol=1e-6)
        traced = jax.jit(lambda x, y: deq_kernel(x, y, W_std=W_std))(x, others)
        assert (np.abs(np.asarray(traced.ntk) - wide) <= traced.ntk_error).all()


def test_equal_rows_given_twice_are_equal():
    x = np.random.default_rng(0).integers(0, 256, (5, 12288)).astype(np.float32)
    once, twice = (deq_kernel(x, others, W_std=1.4) for others in (None, x))
    np.testing.assert_allclose(once.ntk, twice.ntk, rtol=1e-6)


def test_features_near_1000_under_sin():
    x = 1000 * np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    ours = deq_kernel(x, x, W_std=0.8, activation="sin")
    wide = exact(x, W_std=0.8, activation="sin")
    np.testing.assert_allclose(ours.ntk, wide, rtol=1e-6)
    traced = jax.jit(lambda x: deq_kernel(x, x, W_std=0.8, activation="sin"))(x)
    assert (traced.ntk_error > 0.1 * np.abs(wide)).any()  # it says so
    assert (np.abs(np.asarray(traced.ntk) - wide) <= traced.ntk_error).all()


def test_the_kernel_of_a_line_is_positive_definite():
    x = np.linspace(-1, 1, 200)[:, None].astype(np.float32)
    ntk = np.asarray(deq_kernel(x, W_std=1.0, b_std=0.3).ntk, float)
    assert np.linalg.eigvalsh(ntk).min() > 0


def test_who_asks_for_less_gets_less():
    x = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    rough = deq_kernel(x, W_std=1.0, solver=Chebyshev(rtol=0.1))
    assert (rough.ntk_error > 0.01 * np.abs(rough.ntk)).any()


def test_bounds_of_float64_are_asked_for_later():
    x = np.random.default_rng(0).normal(size=(4, 3))
    with enable_x64(True):
        solution = deq_kernel(x, W_std=1.0)
        now = np.asarray(solution.ntk_error)
    np.testing.assert_array_equal(solution.ntk_error, now)
    assert now.max() < 1e-12
