"""Fixtures shared by the tests, and the types of what they call, which are checked."""

import contextlib
import gc

import jax
import jaxtyping
import numpy as np
import pytest

import nt_deq  # noqa: F401  # before any test imports neural_tangents

# Shapes and types of the arguments and results of every call.
jaxtyping.install_import_hook("nt_deq", "typecheck.checked")

# Programs are many objects that stay; looking through all of them took a tenth of the time.
gc.set_threshold(100_000, 50, 1000)

STRICT = (
    "activations", "cli", "experiments", "fixed_point", "flax", "gp", "kernels", "regression",
    "sklearn", "stax", "theory",
)  # fmt: skip


@contextlib.contextmanager
def float64(enabled=True):
    """The mode of JAX's dtypes, and afterwards what it was."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with float64():
        yield


@pytest.fixture(scope="module")
def x64_module():
    """Runs all tests of a module in float64; examples of Hypothesis share a fixture anyway."""
    with float64():
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs the test in float32 and in float64."""
    with float64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def unchecked():
    """Arguments of wrong shapes and types reach the function, for the error that it raises."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def no_promotion(request):
    """In tests of what computes, no arrays of different ranks or dtypes meet by accident."""
    if request.path.parent.name not in STRICT:
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def promotion(no_promotion):
    """Ranks and dtypes are promoted: by neural-tangents, by optax, or by the test itself."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
