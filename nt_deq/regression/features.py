"""Feature maps `z` with `z(x)·z(x') ≈ k(x, x')`: kernel methods at a cost linear in the inputs.

`NystromFeatures` are for any kernel, and adapt to the inputs by their landmarks. `SketchFeatures`
are for the homogeneous DEQ on a sphere, see no data, and are unbiased. Joined by `concatenate`,
the latter can carry the leading terms of the kernel's power series and the former the remainder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.typing import ArrayLike
from jaxtyping import Float, PRNGKeyArray, Real
from scipy import linalg

from nt_deq import _checks, _saving
from nt_deq._probe import probe
from nt_deq.errors import ArgumentError
from nt_deq.regression.pivoted import inverse_factor, rounding_norm
from nt_deq.regression.power_series import Series
from nt_deq.typing import Get, KernelFn

Features = Callable[[Float[ArrayLike, "b ..."]], Float[Array, "b m"]]

_ON_SPHERE = 1e-4  # how far a norm may be off: more than rounding, less than any other scaling
_BUTTERFLY = 64  # side of the Hadamard matrices that are multiplied with as such


class NystromFeatures:
    """`z(x) = R⁻¹ k(L, x)` for landmarks `L` with `k(L, L) = R Rᵀ` (Williams & Seeger 2001).

    `z(x)·z(x')` is the part of `k` in the span of the landmarks: exact where `x` or `x'` is one of
    them, and below `k` otherwise, in the sense that the difference is positive semi-definite. A
    uniform draw from the training inputs is a good choice of landmarks. Landmarks that the others
    determine to rounding are left out, by a pivoted Cholesky factorisation in float64. It takes
    `m³` operations; then `b` inputs take `b m` entries of the kernel and `2 b m²` operations.

    Attributes:
      landmarks: those that were kept, `(size, ...)`.
      size: number of features.
    """

    def __init__(self, kernel_fn: KernelFn, landmarks: Real[ArrayLike, "m ..."], get: Get = "nngp"):
        """Factorises the kernel of the landmarks.

        Args:
          kernel_fn: `(x1, x2, get) -> (n1, n2)`, that of any stax network.
          landmarks: inputs, `(m, ...)`.
          get: `'ntk'` or `'nngp'`.

        Raises:
          ValueError: the kernel of the landmarks is not finite, or not positive semi-definite.
          NoEquilibriumError: by `kernel_fn`, here and in calls.
        """
        _checks.real_numbers("landmarks", landmarks)
        landmarks = jnp.asarray(landmarks)
        if not jnp.issubdtype(landmarks.dtype, jnp.floating):
            landmarks = landmarks.astype(jnp.zeros(()).dtype)
        kernel = np.asarray(kernel_fn(landmarks, None, get))
        if not np.isfinite(kernel).all():
            raise ArgumentError(
                "the kernel of the landmarks has NaN or infinite entries: drop those."
            )
        tolerance = rounding_norm(len(kernel), float(np.abs(kernel).max()), kernel.dtype)
        kept, inverse = inverse_factor(kernel, tolerance)
        self.kernel_fn, self.landmarks = kernel_fn, landmarks[kept]
        self.get: Get = get
        self._projection = jnp.asarray(inverse.T, kernel.dtype)
        self.size = len(kept)

    def __call__(self, x: Real[ArrayLike, "b ..."]) -> Float[Array, "b size"]:
        """Maps inputs `(b, ...)` to features `(b, size)`."""
        if jnp.shape(x)[1:] != self.landmarks.shape[1:]:
            raise ArgumentError(
                f"x has shape {jnp.shape(x)}; the landmarks have shape {self.landmarks.shape}, and "
                "all axes but the first must be the same."
            )
        x = jnp.asarray(x, self.landmarks.dtype)
        kernel = self.kernel_fn(x, self.landmarks, self.get)
        return jnp.matmul(kernel, self._projection, precision=lax.Precision.HIGHEST)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the landmarks and their factor to a directory, from which `load` has them back.

        Args:
          path: a directory, which is made if need be. Features that are there are replaced.

        Raises:
          ModelError: the directory holds something else, or cannot be written.
        """
        landmarks = np.asarray(self.landmarks)
        arrays = {
            "landmarks": landmarks,
            "projection": np.asarray(self._projection),
            "probe": probe(self.kernel_fn, self.get, landmarks),
        }
        _saving.write(path, type(self).__name__, {"get": self.get}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], kernel_fn: KernelFn) -> NystromFeatures:
        """Reads the features that `save` has written; other versions of this package may have.

        Args:
          path: the directory.
          kernel_fn: the kernel that they were made with. It is compared, to rounding, between eight
            of the landmarks.

        Raises:
          ModelError: there are no such features, they are of a later version or damaged, another
            kernel's, or in float64 while JAX is not.
        """
        _checks.kernel_function(kernel_fn)
        _, settings, arrays = _saving.read(path, cls.__name__)
        get: Any = settings["get"]
        landmarks = arrays["landmarks"]
        _saving.check_precision(path, landmarks.dtype)
        _saving.check_kernel(path, arrays["probe"], kernel_fn, get, landmarks)
        features = object.__new__(cls)
        features.kernel_fn, features.get = kernel_fn, get
        features.landmarks = jnp.asarray(landmarks)
        features._projection = jnp.asarray(arrays["projection"])
        features.size = features._projection.shape[1]
        return features


class SketchFeatures:
    """Features of a dot-product kernel on the sphere, from its power series `Σ cₖ tᵏ`.

    `c₀` takes one feature and `c₁ t` takes `d`, both exact. For every further degree the tensor
    power `x^⊗k` is sketched from that of the degree before by a TensorSRHT (Ahle et al. 2020,
    "Oblivious sketching of high-degree polynomial kernels"; used for the NTK by Zandieh et al.
    2021, "Scaling neural tangent kernels via sketching and random features"),

        z_(k+1) = (H D z_k)[rows] ⊙ (H D' x)[rows'] / √m_(k+1),

    with random signs `D` and rows of Hadamard matrices `H`. Mixing `z_k` anew at every degree makes
    the variance grow like `k`; products of `k` random projections (Kar & Karnick 2012) have `3ᵏ`.
    Features are shared out in proportion to `cₖ`, so that the standard deviation of `z(x)·z(x')`
    is about `Σ_(k>=2) cₖ / √(size - d - 1)`. Up to what the series leaves out, it is unbiased.

    `b` inputs take `b m log m` operations. The features do not adapt to the data: where inputs lie
    near a surface of few dimensions, as images do, `NystromFeatures` do better with as many.

    Attributes:
      size: number of features.
    """

    def __init__(self, series: Series, d: int, size: int, key: PRNGKeyArray):
        """Draws the signs and rows.

        Args:
          series: of the kernel, by `deq_series`.
          d: features of the inputs, all of norm `√(series.mean_square · d)`.
          size: how many features to make, `> d + 1`; a series of degree 1 needs `d + 1`.
          key: a JAX random key; the same gives the same features.

        Raises:
          ValueError: `size` is too small for the exact terms and one feature a further degree.
        """
        _checks.count("d", d)
        _checks.count("size", size)
        sizes = _share_out(series.coefficients, d, size)
        self.size, self._d, self._series, self._sizes = sum(sizes), d, series, tuple(sizes)
        self._weights = tuple(map(float, np.sqrt(series.coefficients)))
        rng = np.random.default_rng(np.asarray(random.key_data(key)))  # nothing to compile
        self._signs = _signs(rng, d)
        self._levels, width = [], d
        for degree in range(2, len(sizes)):
            # A degree that has few features itself is as wide as those that are made from it.
            new = max(sizes[degree:])
            if new == 0:
                break
            self._levels.append((_signs(rng, width), _rows(rng, width, new), _rows(rng, d, new)))
            width = new

    def __call__(self, x: Real[ArrayLike, "b d"]) -> Float[Array, "b size"]:
        """Maps inputs `(b, d)` to features `(b, size)`.

        Raises:
          ValueError: an input is not on the sphere (a traced call instead gives NaN in its row).
        """
        x = _checks.inputs("x", x)
        _checks.features("x", x, self._d)
        norm = (self._series.mean_square * self._d) ** 0.5
        norms = jnp.linalg.norm(x, axis=1) / norm
        off = jnp.abs(norms - 1) > _ON_SPHERE
        if not _checks.is_traced(off) and bool(off.any()):
            row = int(jnp.argmax(off))
            raise ArgumentError(
                f"x has {int(off.sum())} of {len(x)} rows off the sphere (the first is row {row}, "
                f"of norm {float(norms[row]) * norm:.6g}): scale every input to the norm "
                f"{norm:.6g}."
            )
        z = _sketch(self._sizes, self._weights, self._signs, self._levels, x / norm)
        return jnp.where(off[:, None], jnp.nan, z)


def concatenate(*features: Features) -> Features:
    """The features of a sum of kernels, from those of its terms."""
    return lambda x: jnp.concatenate([fn(x) for fn in features], axis=1)


def feature_error(
    features: Features, kernel_fn: KernelFn, x: Real[ArrayLike, "n ..."], get: Get = "nngp"
) -> Float[Array, ""]:
    """Measures `‖Z Zᵀ - K‖ / ‖K‖`, Frobenius norms, on a sample.

    Args:
      features: `(n, ...) -> (n, m)`.
      kernel_fn: the exact `(x1, x2, get) -> (n, n)`.
      x: inputs, `(n, ...)`.
      get: `'ntk'` or `'nngp'`.
    """
    x = jnp.asarray(x)
    kernel, z = kernel_fn(x, None, get), features(x)
    approximation = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST)
    return jnp.linalg.norm(approximation - kernel) / jnp.linalg.norm(kernel)


def _share_out(coefficients: np.ndarray, d: int, size: int) -> list[int]:
    """How many features every degree gets."""
    sizes = np.where(coefficients > 0, 1, 0)
    sizes[1] *= d
    left = size - sizes.sum()
    if left < 0:
        raise ArgumentError(
            f"size={size} must be at least {sizes.sum()}: one for the constant, d={d} for the "
            "linear term and one for every further degree of the series."
        )
    shares = coefficients[2:] / max(coefficients[2:].sum(), np.finfo(float).tiny)
    sizes[2:] += np.floor(left * shares).astype(int)
    if shares.any():
        sizes[2 + np.argmax(shares)] += size - sizes.sum()
    return sizes.tolist()


def _signs(rng: np.random.Generator, width: int) -> Array:
    return jnp.asarray(rng.choice([-1, 1], width), jnp.int8)


def _rows(rng: np.random.Generator, width: int, number: int) -> Array:
    """Rows of the Hadamard matrix for `width` columns, each as often as any other (up to 1)."""
    order = _order(width)
    every = np.tile(np.arange(order), (-(-number // order), 1))
    return jnp.asarray(rng.permuted(every, axis=1).ravel()[:number], jnp.int32)


def _order(width: int) -> int:
    return 1 << (width - 1).bit_length()


@partial(jax.jit, static_argnums=(0, 1))
def _sketch(sizes, weights, signs, levels, x) -> Array:
    def mix(z, signs):
        z = z * signs.astype(z.dtype)[None]
        return _hadamard(jnp.pad(z, ((0, 0), (0, _order(z.shape[1]) - z.shape[1]))))

    mixed, power = mix(x, signs), x
    parts = [weights[0] * jnp.ones_like(x[:, : sizes[0]]), weights[1] * x[:, : sizes[1]]]
    for degree, (signs, rows, others) in enumerate(levels, start=2):
        power = mix(power, signs)[:, rows] * mixed[:, others] / len(rows) ** 0.5
        size = sizes[degree]
        parts.append(weights[degree] * (len(rows) / max(size, 1)) ** 0.5 * power[:, :size])
    return jnp.concatenate(parts, axis=1)


def _hadamard(z: Array) -> Array:
    """`z H` for the Hadamard matrix `H` of ±1, `(b, 2^q)`."""
    side = min(z.shape[-1], _BUTTERFLY)
    blocks = z.reshape(*z.shape[:-1], -1, side)
    matrix = jnp.asarray(linalg.hadamard(side), z.dtype)
    blocks = jnp.matmul(blocks, matrix, precision=lax.Precision.HIGHEST)
    if blocks.shape[-2] > 1:
        blocks = jnp.swapaxes(_hadamard(jnp.swapaxes(blocks, -1, -2)), -1, -2)
    return blocks.reshape(z.shape)
