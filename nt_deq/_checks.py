"""Checks of arguments: an error names the argument, its value, the bound and the remedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from nt_deq.errors import ArgumentError


def is_traced(*values) -> bool:
    """Whether any value is abstract, so that it can be computed with but not looked at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def rows(name: str, indices) -> str:
    """Says which rows of `name` a message is about."""
    if len(indices) == 1:
        return f"row {indices[0]} of {name}"
    return f"{len(indices)} rows of {name} (the first is row {indices[0]})"


def standard_deviations(**values) -> None:
    """Raises unless every value is a finite scalar of at least 0 (a traced one: a scalar)."""
    for name, value in values.items():
        if not _is_real(_dtype(value)):
            raise TypeError(
                f"{name}={value!r} is not a real number; pass a standard deviation as a float, 0.0 "
                "for none."
            )
        if np.ndim(value) != 0:
            raise ArgumentError(
                f"{name} has shape {np.shape(value)}; it is one standard deviation: pass a scalar "
                "(jax.vmap maps over several)."
            )
        if not is_traced(value) and not (np.isfinite(value) and value >= 0):
            raise ArgumentError(
                f"{name}={value} must be a finite standard deviation of at least 0 (not a "
                "variance)."
            )


def time(name: str, value, positive: bool = True) -> None:
    """Raises unless `value` is a finite scalar above 0, or of at least 0 (a traced one: a scalar).

    Args:
      name: of the argument.
      value: a time, or a rate.
      positive: whether 0 is an error too.
    """
    known = _is_real(_dtype(value)) and np.ndim(value) == 0
    if not known or not (is_traced(value) or _within(value, positive)):
        bound = "above 0" if positive else "of at least 0"
        raise ArgumentError(f"{name}={value!r} must be one finite number {bound}.")


def _within(value, positive: bool) -> bool:
    return bool((value > 0 if positive else value >= 0) and value < np.inf)


def variance(name: str, value) -> None:
    """Raises unless `value` is a finite scalar of at least 0 (a traced one: a scalar)."""
    known = _is_real(_dtype(value)) and np.ndim(value) == 0
    if not known or not (is_traced(value) or 0 <= value < np.inf):
        raise ArgumentError(
            f"{name}={value!r} must be a variance: one finite number of at least 0."
        )


def _dtype(x):
    """That of an array, or of the array that is made of `x`."""
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _is_real(dtype) -> bool:
    """Whether a dtype is of real numbers, or Booleans."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def real_numbers(name: str, x) -> None:
    """Raises unless `x`, an array or what is made into one, is made of real numbers."""
    dtype = _dtype(x)
    if not _is_real(dtype):
        raise TypeError(
            f"{name} is made of {dtype}; pass real numbers, as floats, and categories as a column "
            "of 0 and 1 for each."
        )


def inputs(name: str, x) -> Array:
    """Returns `x` as a floating array of shape `(n, d)`, or raises.

    Numbers of half precision become float32: sums of their products and fixed points of those need
    more digits than they have.
    """
    real_numbers(name, x)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.zeros(()).dtype)
    if jnp.finfo(x.dtype).bits < 32:
        x = x.astype(jnp.float32)
    if x.ndim != 2 or 0 in x.shape:
        raise ArgumentError(
            f"{name} has shape {x.shape}; pass inputs of shape (n, d) with n, d >= 1"
            + (" (reshape images to vectors)." if x.ndim > 2 else ".")
        )
    if not is_traced(x):
        bad = np.flatnonzero(~np.isfinite(np.asarray(x)).all(axis=1))
        if bad.size:
            raise ArgumentError(
                f"there are NaN or infinite values in {rows(name, bad)}; drop or impute them."
            )
    return x


def input_pair(x1, x2) -> tuple[Array, Array | None]:
    """Returns `x1 (n1, d)` and `x2 (n2, d)` or `None` as `inputs` does, of one dtype, or raises."""
    x1 = inputs("x1", x1)
    if x2 is None:
        return x1, None
    x2 = inputs("x2", x2)
    if x1.shape[1] != x2.shape[1]:
        raise ArgumentError(
            f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}: both need the same."
        )
    dtype = jnp.promote_types(x1.dtype, x2.dtype)
    return x1.astype(dtype), x2.astype(dtype)


def examples(name: str, x) -> None:
    """Raises unless `x` has shape `(n, ...)` with `n >= 1` and is finite (if it is not traced)."""
    if np.ndim(x) < 2 or 0 in np.shape(x):
        raise ArgumentError(
            f"{name} has shape {np.shape(x)}; pass inputs of shape (n, ...), n >= 1."
        )
    if not is_traced(x):
        bad = np.flatnonzero(~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(axis=1))
        if bad.size:
            raise ArgumentError(
                f"there are NaN or infinite values in {rows(name, bad)}; drop or impute them."
            )


def targets(name: str, y, n: int) -> None:
    """Raises unless `y` has shape `(n,)` or `(n, C)` and is made of finite real numbers."""
    real_numbers(name, y)
    if np.ndim(y) not in (1, 2) or len(y) != n:
        raise ArgumentError(
            f"{name} has shape {np.shape(y)}: {n} inputs need targets ({n},) or ({n}, C)."
        )
    if is_traced(y) or not jnp.issubdtype(y.dtype, jnp.floating):
        return
    if not np.isfinite(np.asarray(y)).all():
        raise ArgumentError(f"{name} has NaN or infinite values; drop or impute them.")


def batches(k) -> None:
    """Raises unless a stax kernel is of one input or more on either side."""
    for name, shape in (("x1", k.shape1), ("x2", k.shape2)):
        if 0 in shape:
            raise ArgumentError(f"{name} has shape {shape}; pass one input or more.")


def layer(name: str, layer) -> None:
    """Raises unless `layer` is what the functions of stax return."""
    if not (isinstance(layer, tuple) and len(layer) == 3 and all(map(callable, layer))):
        raise TypeError(
            f"{name}={layer!r} is not a layer (init_fn, apply_fn, kernel_fn); pass what a function "
            "of nt_deq.stax returns, such as stax.Dense(64)."
        )


def kernel_function(kernel_fn) -> None:
    """Raises unless `kernel_fn` can be called."""
    if isinstance(kernel_fn, tuple):
        raise TypeError(
            "kernel_fn is a tuple, such as a whole network (init_fn, apply_fn, kernel_fn); pass "
            "its last element, network[2]."
        )
    if not callable(kernel_fn):
        raise TypeError(f"kernel_fn={kernel_fn!r} is not a function (x1, x2, get) -> kernel.")


def kernel_name(get) -> None:
    """Raises unless `get` names one kernel."""
    if get not in ("nngp", "ntk"):
        raise ArgumentError(f"get={get!r} must be 'nngp' or 'ntk'.")


def count(name: str, value) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ArgumentError(f"{name}={value!r} must be an integer of at least 1.")


def features(name: str, x, expected: int) -> None:
    """Raises unless the last axis of `x` has the size that the layer was made for."""
    if np.ndim(x) < 1 or np.shape(x)[-1] != expected:
        raise ArgumentError(
            f"{name} has shape {np.shape(x)}; this layer was made for {expected} features on the "
            "last axis."
        )
