"""A kernel function cannot be looked into: its values between a few inputs stand for it."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Bool, Float, Real

from nt_deq.typing import Get, KernelFn

_COUNT = 8
_ROUNDING = 1e-5  # by which another machine's float32 may differ, relative to the largest


def few(x: Real[np.ndarray, "n ..."]) -> Real[np.ndarray, "few ..."]:
    """Some of the inputs, from the first to the last."""
    return x[np.linspace(0, len(x) - 1, min(len(x), _COUNT)).astype(int)]


def probe(
    kernel_fn: KernelFn, get: Get, x: Float[np.ndarray, "n ..."]
) -> Float[np.ndarray, "few few ..."]:
    """The kernel between a few of the inputs."""
    return np.asarray(jax.jit(lambda x: kernel_fn(x, None, get))(few(x)))


def same(
    a: Float[np.ndarray, "*shape"],
    b: Float[np.ndarray, "*shape"],
    scale: float | Float[np.ndarray, "*#shape"] | None = None,
) -> Bool[np.ndarray, "*shape"]:
    """Where two arrays are the same to rounding, which is relative to the largest, or `scale`."""
    return np.abs(a - b) <= _ROUNDING * (np.abs(b).max() if scale is None else scale)
