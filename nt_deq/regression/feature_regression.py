"""Ridge regression on features in one pass over the data: time linear in `n`, memory in `m²`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Real, Shaped
from scipy import linalg

from nt_deq import _checks, _saving
from nt_deq._probe import few, same
from nt_deq.errors import ArgumentError, ModelError
from nt_deq.regression.features import Features


class FeatureRegression:
    """Ridge regression `f(x) = z(x)·w`, that is kernel regression with `k(x, x') = z(x)·z(x')`.

        w = (Σ z zᵀ + λ I)⁻¹ Σ z yᵀ,    λ = relative_noise · mean |z|²,

    sums over all inputs. The sums are kept in float64, whatever the dtype of the features: they
    have the square of the features' condition number, and float64 holds the product of two float32
    exactly, so that nothing of what float32 features say is lost. They are added up on the host,
    where float64 needs no setting of JAX: `n m²` operations in all.

    Attributes:
      weights: `w`, `(m, C)`, float64, once fitted.
    """

    weights: Float[np.ndarray, "m ..."] | None = None
    _probe: Real[np.ndarray, "few ..."] | None = None  # inputs, by which to know the features

    def __init__(self, features: Features, relative_noise: float = 1e-4):
        """Sets what to regress on.

        Args:
          features: `(b, ...) -> (b, m)`, for example `NystromFeatures`.
          relative_noise: variance of the noise of the targets, which is added to the diagonal of
            the kernel of the training inputs, relative to the mean of the diagonal, `>= 0`.
        """
        _checks.variance("relative_noise", relative_noise)
        self.features, self.relative_noise = features, relative_noise

    def fit(
        self, batches: Iterable[tuple[Real[ArrayLike, "b ..."], Real[ArrayLike, "b ..."]]]
    ) -> FeatureRegression:
        """Goes once through the batches, then solves for the weights.

        Args:
          batches: of `(x, y)`, inputs `(b, ...)` and targets `(b, C)` or `(b,)`, of which one at a
            time is in memory: any iterable, or `in_batches(x, y, rows)`. Centre the targets, since
            knowing nothing is predicting 0.

        Returns:
          Itself.

        Raises:
          ValueError: there are no batches, shapes do not match, values are not finite, or the
            normal matrix is singular.
        """
        syrk = cast(Callable, linalg.get_blas_funcs("syrk", dtype=np.float64))
        normal = moments = probe = None
        n = 0
        for number, (x, y) in enumerate(batches):
            z, y = np.asarray(self.features(x), np.float64), np.asarray(y, np.float64)
            if z.ndim != 2 or len(z) == 0 or y.ndim not in (1, 2) or len(y) != len(z):
                raise ArgumentError(
                    f"batch {number} has features of shape {z.shape} and targets of shape "
                    f"{y.shape}; they must be (b, m) and (b, C) or (b,), b >= 1."
                )
            if normal is None or moments is None:
                normal = np.zeros((z.shape[1],) * 2, order="F")
                moments = np.zeros((z.shape[1], *y.shape[1:]))
                probe = few(np.asarray(x))
            if (len(normal), *y.shape[1:]) != (z.shape[1], *moments.shape[1:]):
                raise ArgumentError(
                    f"batch {number} has {z.shape[1]} features and targets of shape {y.shape}; the "
                    f"first had {len(normal)} and (b, {', '.join(map(str, moments.shape[1:]))})."
                )
            if not (np.isfinite(z).all() and np.isfinite(y).all()):
                raise ArgumentError(f"batch {number} has NaN or infinite features or targets.")
            # The lower triangle of normal + zᵀz, in place; z.T is in the order that BLAS wants.
            normal = syrk(1.0, z.T, beta=1.0, c=normal, lower=1, overwrite_c=1)
            moments += z.T @ y
            n += len(z)
        if normal is None or moments is None:
            raise ArgumentError("batches is empty: fit needs at least one batch of (x, y).")
        diagonal = np.einsum("ii->i", normal)
        diagonal += self.relative_noise * diagonal.sum() / n
        try:
            factor = linalg.cho_factor(normal, lower=True, overwrite_a=True)
        except linalg.LinAlgError:
            raise ArgumentError(
                f"relative_noise={self.relative_noise} is too small: the {len(normal)} features of "
                f"{n} inputs are linearly dependent; take a larger one or fewer features."
            ) from None
        self.weights, self._probe = linalg.cho_solve(factor, moments), probe
        return self

    def predict(self, x: Real[ArrayLike, "b ..."]) -> Float[Array, "b ..."]:
        """Predicts the targets of inputs `(b, ...)`: `(b, C)` or `(b,)`, in the features' dtype.

        Raises:
          ValueError: `fit` was not called.
        """
        if self.weights is None:
            raise ArgumentError("there are no weights yet: call fit first.")
        z = self.features(x)
        return jnp.matmul(z, jnp.asarray(self.weights, z.dtype), precision=lax.Precision.HIGHEST)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to a directory, from which `load` has them back with the features.

        A model that is there is replaced, at once and not before the new one is complete. Eight
        inputs of the first batch are written too, by which other features are found out.

        Args:
          path: a directory, which is made if need be.

        Raises:
          ArgumentError: `fit` was not called.
          ModelError: the directory holds something else, or cannot be written.
        """
        if self.weights is None or self._probe is None:
            raise ArgumentError("there are no weights yet: call fit first.")
        z = np.asarray(self.features(self._probe))
        settings = {"relative_noise": float(self.relative_noise)}
        arrays = {"weights": self.weights, "x": self._probe, "features": z}
        _saving.write(path, type(self).__name__, settings, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: Features) -> FeatureRegression:
        """Reads the model that `save` has written; other versions of this package may have.

        Args:
          path: the directory.
          features: those that it was fitted with: `NystromFeatures` that were loaded too, or
            `SketchFeatures` of the same arguments. What the model makes of them is compared, to
            rounding, at a few inputs.

        Raises:
          ModelError: there is no such model, it is of a later version or damaged, of other
            features, or in float64 while JAX is not.
        """
        _, settings, arrays = _saving.read(path, cls.__name__)
        arguments: Any = settings
        model = cls(features, **arguments)
        weights, x, found = (arrays[name] for name in ("weights", "x", "features"))
        _saving.check_precision(path, found.dtype)
        z = np.asarray(features(x))
        if z.shape != found.shape:
            raise ModelError(
                f"path={os.fspath(path)!r} holds a model of other features: {found.shape[1]} of "
                f"them, and not {z.shape[1:]}."
            )
        # As exact as the products are; the features themselves are not where they are many.
        scale = np.linalg.norm(found.astype(float), axis=1).max() * np.linalg.norm(weights, axis=0)
        if not same(z @ weights, found @ weights, scale).all():
            raise ModelError(
                f"path={os.fspath(path)!r} holds a model of other features: what it predicts for "
                "its own inputs is not what it did."
            )
        model.weights, model._probe = weights, x
        return model


def in_batches(
    x: Shaped[np.ndarray | Array, "n ..."], y: Shaped[np.ndarray | Array, "n ..."], rows: int
) -> Iterator[tuple[np.ndarray | Array, np.ndarray | Array]]:
    """Cuts inputs `(n, ...)` and targets `(n, ...)` into batches of `rows`; the last has the rest.

    Raises:
      ValueError: `x` and `y` are not as many, or `rows` is no positive integer.
    """
    _checks.count("rows", rows)
    if len(x) != len(y):
        raise ArgumentError(f"x has {len(x)} rows and y has {len(y)}: they must be as many.")
    return ((x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows))
