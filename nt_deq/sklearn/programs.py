"""Compiled functions of the process, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree
from threadpoolctl import threadpool_limits

from nt_deq import gp
from nt_deq._jax import enable_x64
from nt_deq.activations import Activation
from nt_deq.gp.classifier import of_targets
from nt_deq.networks import deq_network
from nt_deq.typing import MakeKernel, Number

Hyperparameters: TypeAlias = dict[str, PyTree[float | Float[np.ndarray, " d"]]]
"""By their names; the length scale may be one for each feature."""

LENGTH_SCALE = "length_scale_{}"  # of feature number {}, where each has its own


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Computes in float64, and with one thread of OpenBLAS.

    So few rows need no more. OpenBLAS' threads wait for each other in a loop, which on a busy
    machine takes a hundred times as long as what they compute.
    """
    with enable_x64(True), threadpool_limits(1, user_api="blas"):
        yield


def flat(hyperparameters: Hyperparameters) -> dict[str, float]:
    """Hyper-parameters one by one: length scales of their own are `length_scale_0` and so on."""
    found = dict(hyperparameters)
    if np.ndim(found["length_scale"]):
        found |= {LENGTH_SCALE.format(i): v for i, v in enumerate(found.pop("length_scale"))}
    return {name: float(value) for name, value in found.items()}


def nested(values: Mapping[str, float]) -> Hyperparameters:
    """The inverse of `flat`."""
    if "length_scale" in values:
        return dict(values)
    own = [name for name in values if name.startswith("length_scale_")]
    found = {name: value for name, value in values.items() if name not in own}
    scales = [values[LENGTH_SCALE.format(i)] for i in range(len(own))]
    return found | {"length_scale": np.array(scales)}


def length_scales(p: Mapping[str, Number], features: int) -> Number | Float[Array, " features"]:
    """The length scale of each of so many features, 1 of filling ones, or the one of all."""
    if "length_scale" in p:
        return p["length_scale"]
    names = map(LENGTH_SCALE.format, range(features))
    return jnp.stack([jnp.asarray(p.get(name, 1.0), float) for name in names])


@lru_cache(maxsize=128)  # the same function again is a program that is compiled already
def make_kernel(activation: Activation, fixed: tuple[tuple[str, float], ...] = ()) -> MakeKernel:
    """Makes a `kernel_fn` of flat hyper-parameters, besides those that are fixed."""

    def make(p):
        p = {**p, **dict(fixed)}
        stds = p["W_std"], p["U_std"], p["b_std"]
        kernel_fn = deq_network(*stds, activation, p["V_std"])[2]

        def scaled(x1, x2, get):
            scale = length_scales(p, x1.shape[1])
            return kernel_fn(x1 / scale, None if x2 is None else x2 / scale, get)

        return scaled

    return make


@partial(jax.jit, static_argnums=(0, 1))
def likelihood(make, get, p, problem):
    """The log marginal likelihood of a problem."""
    x, y, weights = problem
    return gp.GaussianProcess(make(p), x, y, p["noise"], get, weights).log_marginal_likelihood()


@partial(jax.jit, static_argnums=(0, 1))
def leave_one_out(make, get, p, problem):
    """Leave-one-out predictions of a problem."""
    x, y, weights = problem
    return gp.GaussianProcess(make(p), x, y, p["noise"], get, weights).leave_one_out()


@partial(jax.jit, static_argnums=(0, 1))
def posterior(make, get, p, problem, x_test):
    """The posterior at padded inputs."""
    x, y, weights = problem
    return gp.GaussianProcess(make(p), x, y, p["noise"], get, weights).posterior(x_test)


@partial(jax.jit, static_argnums=(0, 1))
def evidence(make, get, p, problem):
    """Laplace's approximation of the log marginal likelihood of a problem of classes."""
    x, y, weights = problem
    return of_targets(make(p), x, y, weights, get).log_marginal_likelihood()


@partial(jax.jit, static_argnums=(0, 1))
def class_probabilities(make, get, p, problem, x_test):
    """Logarithms of the probabilities of classes at padded inputs."""
    x, y, weights = problem
    return of_targets(make(p), x, y, weights, get).predict_log_proba(x_test)
