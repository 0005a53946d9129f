"""The curvature of the posterior of a softmax classifier, by factors of `n × n`.

For `C` functions `f_c ~ GP(0, K)` and an input of class `y`, observed `w` times, `w log π_y` with
`π = softmax(f)` has minus the Hessian `W = w (diag π - π πᵀ)`. All that Laplace's approximation
needs is by `S = (K + W⁻¹)⁻¹`, with `K` once for every class: the posterior covariance is
`(K⁻¹ + W)⁻¹ = K - K S K`, and `S` is defined where `K` and `W` are singular (Rasmussen & Williams
2006, GPML, sec. 3.5). A matrix of `nC × nC` is never made.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Float

_COLUMNS = 256  # that are reduced at once, which bounds the memory


class TwoClasses(NamedTuple):
    """`W = ω v vᵀ` with `v = (1, -1)` and `ω = w π₁ π₂`, so that `S = v (ω⁻¹ + 2K)⁻¹ vᵀ`.

    Logistic regression on `f₁ - f₂`, whose kernel is `2K` (GPML, algorithm 3.1): one factor, and no
    inverse.
    """

    root: Array  # (n,), √ω
    factor: Array  # (n, n), lower, of 1 + 2 √ω K √ω

    def solve(self, v: Float[Array, "n C"]) -> Float[Array, "n C"]:
        """`S v`."""
        difference = self.root * (v[:, 0] - v[:, 1])
        solved = self.root * cho_solve((self.factor, True), difference)
        return jnp.stack([solved, -solved], axis=1)

    def blocks(self) -> Float[Array, "n n"]:
        """`Σ_c S_cc`."""
        half = solve_triangular(self.factor, jnp.diag(self.root), lower=True)
        return 2 * _matmul(half.T, half)

    def reduce(self, k: Float[Array, " n"]) -> Float[Array, "C C"]:
        """`kᵀ S k`, with `k` once for every class."""
        whitened = solve_triangular(self.factor, self.root * k, lower=True)
        return jnp.sum(whitened**2) * jnp.array([[1, -1], [-1, 1]], k.dtype)

    def half_log_determinant(self) -> Float[Array, ""]:
        """`log |1 + K W| / 2`."""
        return jnp.sum(jnp.log(jnp.diagonal(self.factor)))


class ManyClasses(NamedTuple):
    """`S = E - E R (Rᵀ E R)⁻¹ Rᵀ E` with `E_c = (K + (w π_c)⁻¹)⁻¹` and `R` a sum over classes.

    GPML, algorithm 3.3. With `D = w diag π` (over classes and inputs) the determinant is

        |1 + K W| = |1 + K D| |Rᵀ E R| / Π w

    of which the printed algorithm has the first factor only.
    """

    halves: Array  # (C, n, n), lower, X_c with E_c = X_cᵀ X_c
    factor: Array  # (n, n), lower, of Rᵀ E R
    logarithm: Array  # of √|1 + K D|/√Πw

    def solve(self, v: Float[Array, "n C"]) -> Float[Array, "n C"]:
        """`S v`."""
        inner = self._inner(v.T)
        shared = cho_solve((self.factor, True), jnp.sum(inner, axis=0))
        return (inner - self._inner(jnp.broadcast_to(shared[None], inner.shape))).T

    def blocks(self) -> Float[Array, "n n"]:
        """`Σ_c S_cc`."""

        def add(total, half):
            inner = _matmul(half.T, half)
            whitened = solve_triangular(self.factor, inner, lower=True)
            return total + inner - _matmul(whitened.T, whitened), None

        return lax.scan(add, jnp.zeros_like(self.factor), self.halves)[0]

    def reduce(self, k: Float[Array, " n"]) -> Float[Array, "C C"]:
        """`kᵀ S k`, with `k` once for every class."""
        half = jnp.einsum("cij,j->ci", self.halves, k, precision="highest")
        inner = jnp.einsum("cij,ci->jc", self.halves, half, precision="highest")
        whitened = solve_triangular(self.factor, inner, lower=True)
        return jnp.diag(jnp.sum(half**2, axis=1)) - _matmul(whitened.T, whitened)

    def half_log_determinant(self) -> Float[Array, ""]:
        """`log |1 + K W| / 2`."""
        return self.logarithm + jnp.sum(jnp.log(jnp.diagonal(self.factor)))

    def _inner(self, v: Array) -> Array:
        """`E v`, `(C, n)`."""
        half = jnp.einsum("cij,cj->ci", self.halves, v, precision="highest")
        return jnp.einsum("cij,ci->cj", self.halves, half, precision="highest")


Curvature: TypeAlias = TwoClasses | ManyClasses
"""`S`, as what it is multiplied with."""


def curvature(
    kernel: Float[Array, "n n"], f: Float[Array, "n C"], weights: Float[Array, " n"]
) -> Curvature:
    """Factorises `S` at the functions `f`; NaN where `kernel` is not positive semi-definite.

    Args:
      kernel: `K`.
      f: of every input and class.
      weights: how often each input was observed; 0 is an input that is not there.
    """
    if f.shape[1] == 2:
        difference = jax.nn.sigmoid(f[:, 0] - f[:, 1]) * jax.nn.sigmoid(f[:, 1] - f[:, 0])
        root = _root(weights * difference)
        return TwoClasses(root, jnp.linalg.cholesky(_scaled(2 * kernel, root)))

    def half(d):
        root = _root(d)
        factor = jnp.linalg.cholesky(_scaled(kernel, root))
        half = solve_triangular(factor, jnp.diag(root), lower=True)
        return half, _matmul(half.T, half), jnp.sum(jnp.log(jnp.diagonal(factor)))

    def add(total, d):
        found, inner, logarithm = half(d)
        return (total[0] + inner, total[1] + logarithm), found

    absent = jnp.asarray(weights == 0, f.dtype)
    start = jnp.diag(absent), -jnp.sum(jnp.log(weights + absent)) / 2
    diagonals = weights[None, :] * jax.nn.softmax(f, axis=1).T
    (total, logarithm), halves = lax.scan(add, start, diagonals)
    return ManyClasses(halves, jnp.linalg.cholesky(total), logarithm)


def reduce_columns(found: Curvature, cross: Float[Array, "n m"]) -> Float[Array, "m C C"]:
    """`kᵀ S k` for every column `k` of `cross`."""
    return lax.map(found.reduce, cross.T, batch_size=_COLUMNS)


@jax.custom_jvp
def half_log_determinant(
    kernel: Float[Array, "n n"],
    f: Float[Array, "n C"],
    weights: Float[Array, " n"],
    found: Curvature,
) -> Float[Array, ""]:
    """`log |1 + K W| / 2` by its curvature, with its derivative in closed form."""
    del kernel, f, weights
    return found.half_log_determinant()


@half_log_determinant.defjvp
def _half_log_determinant_jvp(primals, tangents):
    """`[tr(S dK) + Σᵢ tr(Vᵢ dWᵢ)]/2`, `Vᵢ` the posterior covariance at input `i` (GPML eq. 5.23).

    With `dW = dw W/w + w (diag dπ - dπ πᵀ - π dπᵀ)`.
    """
    kernel, f, weights, found = primals
    prior = jnp.diagonal(kernel)[:, None, None] * jnp.eye(f.shape[1], dtype=f.dtype)[None]
    covariance = prior - reduce_columns(found, kernel)
    p, d_p = jax.jvp(lambda f: jax.nn.softmax(f, axis=1), (f,), (tangents[1],))
    own = jnp.diagonal(covariance, axis1=1, axis2=2)
    of_mean = jnp.einsum("icd,id->ic", covariance, p, precision="highest")
    of_p = weights * jnp.sum((own - 2 * of_mean) * d_p, axis=1)
    of_weights = tangents[2] * jnp.sum((own - of_mean) * p, axis=1)
    of_kernel = jnp.sum(found.blocks() * tangents[0])
    slope = (of_kernel + jnp.sum(of_p + of_weights)) / 2
    return half_log_determinant(*primals), slope


def _scaled(kernel: Array, root: Array) -> Array:
    """`1 + root K root`."""
    return jnp.eye(len(root), dtype=root.dtype) + root[:, None] * root[None, :] * kernel


def _root(d: Array) -> Array:
    """The square root, whose derivative at 0 is 0: what is 0 there stays it."""
    there = d > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, d, 1)), 0)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
