"""Fixtures shared by the tests."""

import jax
import numpy as np
import pytest

import nt_deq  # noqa: F401  # before any test imports neural_tangents


@pytest.fixture
def x64():
    """Runs the test in float64."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs the test in float32 and in float64."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield np.dtype(request.param)
    jax.config.update("jax_enable_x64", before)
