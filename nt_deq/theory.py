"""What the theorems on wide deep equilibrium models say, as functions.

    z^(l+1) = W_std/√n · W φ(z^l) + U_std/√d · U x + b_std · b,     z^0 = 0,

with the same W, U, b in every layer. Gao et al. 2023 (arXiv:2310.10767) show that `z^l` tends to a
Gaussian process as the width grows, that so does its limit `z*` in the depth, that the two limits
may be exchanged, and that the covariance of distinct inputs is strictly positive definite. Feng &
Kolter 2023 (arXiv:2310.14062) show the same of the NTK. The functions give the conditions of these
theorems, the kernel of every depth, how fast it tends to that of `z*`, the infinitely deep network
without injection for which all this fails, and tests of whether a sample is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import special, stats

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.kernel import deq_kernel
from nt_deq.pointwise import marginal_map, multiply
from nt_deq.solvers import Picard

Phi = str | Activation | Callable[[Array], Array]


def global_contraction(W_std: float, activation: Phi = "relu") -> float:
    """Returns `2 · W_std · Lip(φ)`: below 1, every wide network has exactly one equilibrium.

    The spectral norm of `W_std/√n · W` tends to `2 · W_std` (Bai & Yin 1993), so the layer then
    contracts everywhere. It is the condition of the theorems of Gao et al. 2023, sufficient and far
    from necessary: see `local_contraction`.

    Args:
      W_std: standard deviation of the recurrent weights.
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function, or an
        `nt_deq.Activation`.
    """
    _checks.standard_deviation("W_std", W_std)
    return 2 * W_std * get_activation(activation).lipschitz


def local_contraction(
    x: Array,
    *,
    W_std: float,
    U_std: float = 1.0,
    b_std: float = 0.0,
    activation: Phi = "relu",
) -> Array:
    """Returns `J = W_std² E[φ'(z*)²]` of every input: below 1, its equilibrium is stable.

    By the circular law with a variance profile, the Jacobian `W_std/√n · W diag(φ'(z*))` of a wide
    network has spectral radius `√J`. `J` is what `Θ* = K*/(1 - J)` (Feng & Kolter 2023) needs to be
    below 1, and the ratio of `E|z^(l+1) - z^l|²` to that of the layer before.

    Args:
      x: inputs, `(n, d)`.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      activation: as in `global_contraction`.

    Returns:
      `J`, `(n,)`; at 1 and above there is no stable equilibrium. NaN where the variance of `z^l`
      has no limit at which `J` is known, and the network none either.
    """
    phi, x, _ = _arguments(x, None, W_std, U_std, b_std, activation)
    options = {"W_std": W_std, "U_std": U_std, "b_std": b_std, "activation": phi}

    def rate(row):
        stable = deq_kernel(row[None], **options)
        # Newton's method may leave for infinity where J > 1; plain iteration does not.
        iterated = deq_kernel(row[None], **options, solver=Picard(max_steps=10_000)).rate
        unstable = jnp.where(iterated >= 1, iterated, jnp.nan)
        return jnp.where(stable.converged[0, 0], stable.rate, unstable)

    return jax.vmap(rate)(x)


def convergence_rate(
    x: Array,
    *,
    W_std: float,
    U_std: float = 1.0,
    b_std: float = 0.0,
    activation: Phi = "relu",
) -> Array:
    """Returns the factor by which a layer brings `K^l` closer to `K*`, for large `l`.

    The error of the entry `(x, x')` is multiplied by `W_std² E[φ'φ']` (Price's theorem), that of a
    variance by `W_std² E[φ'² + φφ'']`; an entry inherits the errors of its two variances, so its
    rate is the largest of the three.

    Args:
      x: inputs, `(n, d)`.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      activation: as in `global_contraction`.

    Returns:
      `(n, n)`; on the diagonal the rate of the variance.

    Raises:
      NoEquilibriumError, NotConvergedError: there is no `K*`, as in `nt_deq.deq_kernel`.
    """
    phi, x, _ = _arguments(x, None, W_std, U_std, b_std, activation)
    k = deq_kernel(x, W_std=W_std, U_std=U_std, b_std=b_std, activation=phi).nngp
    variance = jnp.diagonal(k)
    W_var = jnp.asarray(W_std, x.dtype) ** 2
    by_covariance = W_var * phi.dual(variance[:, None], variance[None, :], k)[1]
    by_variance = jnp.abs(marginal_map(phi, variance, W_var, jnp.zeros_like(variance))[1])
    inherited = jnp.maximum(by_variance[:, None], by_variance[None, :])
    diagonal = jnp.eye(len(x), dtype=bool)
    return jnp.where(diagonal, inherited, jnp.maximum(jnp.abs(by_covariance), inherited))


def depth_kernels(
    x1: Array,
    x2: Array | None = None,
    *,
    depths: Sequence[int],
    lag: int = 0,
    W_std: float,
    U_std: float = 1.0,
    b_std: float = 0.0,
    activation: Phi = "relu",
) -> Array:
    """Returns the covariance of `z^l(x1)` and `z^(l + lag)(x2)`: of the tied network, cut short.

    At infinite width all layers are jointly Gaussian (Gao et al. 2023, by Yang's tensor programs),

        Cov(z^(l+1)(x), z^(m+1)(x')) = W_std² E[φ(z^l(x)) φ(z^m(x'))] + S(x, x'),    z^0 = 0,

    also for `l != m`: an untied network would have `S(x, x')` alone there. For `lag = 0` these are
    the plain iterates towards `K*`, which is the limit for any `lag` where there is an equilibrium.

    Args:
      x1: inputs, `(n1, d)`.
      x2: other inputs, `(n2, d)`; `None` means `x1`.
      depths: the depths `l` to return, ascending, at least 0.
      lag: how many layers deeper the network of `x2` is, at least 0.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      activation: as in `global_contraction`.

    Returns:
      `(len(depths), n1, n2)`.
    """
    _check_depths(depths, at_least=0)
    if lag < 0:
        raise ValueError(f"lag={lag} has to be at least 0; exchange x1 and x2 instead.")
    phi, x1, x2 = _arguments(x1, x2, W_std, U_std, b_std, activation)
    W_var, U_var, b_var = (jnp.asarray(std, x1.dtype) ** 2 for std in (W_std, U_std, b_std))
    injection = _gram(x1, x2, U_var, b_var)
    zero = jax.tree.map(jnp.zeros_like, injection)
    _, ahead, _ = _advance(phi, lag, W_var, injection, zero)
    state = (zero[0], ahead, zero[2])
    return _at_depths(phi, depths, W_var, injection, state)


def mlp_kernels(
    x1: Array,
    x2: Array | None = None,
    *,
    depths: Sequence[int],
    W_std: float = 2**0.5,
    b_std: float = 0.0,
    activation: Phi = "relu",
) -> Array:
    """Returns the covariance of the layer `z^l` of an untied MLP, where no input is injected.

    `K^1 = W_std² x·x'/d + b_std²` and `K^(l+1) = W_std² E[φφ'] + b_std²` (Lee et al. 2018,
    arXiv:1711.00165). With the defaults variances are kept and all correlations go to 1 (see
    `mlp_correlation_gap`): the kernel of infinite depth is singular.

    Args:
      x1: inputs, `(n1, d)`.
      x2: other inputs, `(n2, d)`; `None` means `x1`.
      depths: the depths `l` to return, ascending, at least 1.
      W_std: standard deviation of the weights.
      b_std: standard deviation of the biases.
      activation: as in `global_contraction`.

    Returns:
      `(len(depths), n1, n2)`.
    """
    _check_depths(depths, at_least=1)
    phi, x1, x2 = _arguments(x1, x2, W_std, 0.0, b_std, activation)
    W_var, b_var = (jnp.asarray(std, x1.dtype) ** 2 for std in (W_std, b_std))
    first = _gram(x1, x2, W_var, b_var)
    injection = jax.tree.map(lambda a: jnp.full_like(a, b_var), first)
    return _at_depths(phi, [depth - 1 for depth in depths], W_var, injection, first)


def mlp_correlation_gap(depth: float | Array) -> Array:
    """Returns `9π²/(2 l²)`, which `1 - ρ_l` of the infinitely wide ReLU MLP tends to.

    From `1 - κ₁(ρ) = (1 - ρ) - (2√2/3π) (1 - ρ)^(3/2) + …` for `W_std² = 2` without bias, whatever
    the inputs (unless they are parallel): at depth 10⁴ it is within 0.3 % of the exact one.

    Args:
      depth: `l`, of any shape.
    """
    return 9 * jnp.pi**2 / (2 * jnp.asarray(depth, jnp.float_) ** 2)


class SmallestEigenvalue(NamedTuple):
    """The smallest eigenvalue of a kernel matrix, and how well it is known.

    Attributes:
      value: computed in float64.
      rounding: bound on what the rounding of the entries, in the matrix's dtype, does to it.
    """

    value: float
    rounding: float

    @property
    def positive(self) -> bool:
        """Whether the matrix is strictly positive definite beyond rounding."""
        return self.value > self.rounding


def smallest_eigenvalue(kernel: Array | np.ndarray) -> SmallestEigenvalue:
    """Computes λ_min, positive for distinct inputs and a φ that is no polynomial (Gao et al. 2023).

    Exceptions, for which 0 is exact: odd φ without bias on `{x, -x}`, homogeneous φ without bias on
    `{x, cx}` with `c > 0`, linear φ on more inputs than features (and a bias).

    Args:
      kernel: `(n, n)`, symmetric.

    Raises:
      ValueError: it is not a symmetric matrix of numbers.
    """
    matrix = np.asarray(kernel)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"kernel has shape {matrix.shape}; pass a square matrix (n, n).")
    if not np.isfinite(matrix).all():
        raise ValueError("kernel has NaN or infinite entries: it is that of no equilibrium.")
    dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.dtype(np.float64)
    unit, matrix = float(np.finfo(dtype).eps), matrix.astype(np.float64)
    largest, skew = np.abs(matrix).max(), np.abs(matrix - matrix.T).max()
    if skew > 64 * unit * largest:
        raise ValueError(
            f"kernel is not symmetric: entries differ by {skew:.2g} from their mirror."
        )
    value = float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
    return SmallestEigenvalue(value, 4 * len(matrix) * unit * float(largest))


class GaussianityTest(NamedTuple):
    """A test of the hypothesis that a sample is Gaussian.

    Attributes:
      statistic: large where the sample is not.
      p_value: the probability of as large a one under the hypothesis.
    """

    statistic: float
    p_value: float


class Lilliefors(NamedTuple):
    """The outcome of `lilliefors`; `statistic` and `p_value` as in `GaussianityTest`.

    Attributes:
      critical: the statistic that 5 % of Gaussian samples exceed.
      null_mean: its mean over Gaussian samples.
    """

    statistic: float
    p_value: float
    critical: float
    null_mean: float


def lilliefors(sample: Array | np.ndarray, *, draws: int = 2000, seed: int = 0) -> Lilliefors:
    """Tests whether a sample is Gaussian, its mean and variance being unknown (Lilliefors 1967).

    The statistic is the Kolmogorov-Smirnov distance to the Gaussian with the sample's own mean and
    variance. It is smaller than that to the true one, so the p-value of the plain test, which would
    be far too large, is replaced by the share of simulated Gaussian samples that are further away.

    Args:
      sample: `(n,)`, `n >= 4`.
      draws: simulated samples; the p-value is at least `1/(draws + 1)`. They are kept for the next
        call with the same `n`.
      seed: of the simulation.
    """
    sample = _sample("sample", sample, 1)
    distance = float(_distance_to_fit(sample[None])[0])
    null = _null_distances(len(sample), draws, seed)
    return Lilliefors(
        distance,
        float((1 + np.sum(null >= distance)) / (draws + 1)),
        float(np.quantile(null, 0.95)),
        float(null.mean()),
    )


class Mardia(NamedTuple):
    """Mardia's two tests, of the third and of the fourth moments."""

    skewness: GaussianityTest
    kurtosis: GaussianityTest


def mardia(sample: Array | np.ndarray) -> Mardia:
    """Tests whether vectors are jointly Gaussian, of any mean and covariance (Mardia 1970).

    p-values are those of large samples: `n b₁/6 ~ χ²(d(d+1)(d+2)/6)`, and `b₂ - d(d+2)` over
    `√(8d(d+2)/n)` standard normal, two-sided.

    Args:
      sample: `(n, d)`, `n > d`.
    """
    sample = _sample("sample", sample, 2)
    n, d = sample.shape
    centred = sample - sample.mean(axis=0)
    # Rows of the left factor are the sample with covariance 1/n.
    z = np.linalg.svd(centred, full_matrices=False)[0] * np.sqrt(n)
    third = (z[:, :, None] * z[:, None, :]).reshape(n, d * d).T @ z / n
    skewness = n * float(np.sum(third**2)) / 6
    kurtosis = (float(np.mean(np.sum(z * z, axis=1) ** 2)) - d * (d + 2)) / np.sqrt(
        8 * d * (d + 2) / n
    )
    return Mardia(
        GaussianityTest(skewness, float(stats.chi2.sf(skewness, d * (d + 1) * (d + 2) / 6))),
        GaussianityTest(kurtosis, float(2 * stats.norm.sf(abs(kurtosis)))),
    )


def covariance_test(sample: Array | np.ndarray, covariance: Array | np.ndarray) -> GaussianityTest:
    """Tests whether Gaussian vectors of mean 0 have a given covariance, by the likelihood ratio.

    `n (tr Σ⁻¹C - ln det Σ⁻¹C - d) ~ χ²(d(d+1)/2)` for large samples, `C` being the sample's second
    moments (Anderson 2003, "An Introduction to Multivariate Statistical Analysis", section 10.8).

    Args:
      sample: `(n, d)`, `n > d`.
      covariance: `Σ`, `(d, d)`, positive definite.
    """
    sample = _sample("sample", sample, 2)
    n, d = sample.shape
    covariance = np.asarray(covariance, np.float64)
    if covariance.shape != (d, d):
        raise ValueError(f"covariance has shape {covariance.shape}; it has to be ({d}, {d}).")
    if not smallest_eigenvalue(covariance).positive:
        raise ValueError("covariance is singular: drop inputs that the others determine.")
    ratio = np.linalg.solve(covariance, sample.T @ sample / n)
    statistic = n * float(np.trace(ratio) - np.linalg.slogdet(ratio)[1] - d)
    return GaussianityTest(statistic, float(stats.chi2.sf(statistic, d * (d + 1) / 2)))


def _arguments(x1, x2, W_std, U_std, b_std, activation) -> tuple[Activation, Array, Array]:
    for name, value in (("W_std", W_std), ("U_std", U_std), ("b_std", b_std)):
        _checks.standard_deviation(name, value)
    x1 = _checks.inputs("x1", x1)
    x2 = x1 if x2 is None else _checks.inputs("x2", x2)
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(
            f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}: both need the same."
        )
    dtype = jnp.promote_types(x1.dtype, x2.dtype)
    return get_activation(activation), x1.astype(dtype), x2.astype(dtype)


def _check_depths(depths: Sequence[int], at_least: int) -> None:
    if len(depths) == 0 or min(depths) < at_least or list(depths) != sorted(depths):
        raise ValueError(
            f"depths={list(depths)} has to be ascending integers of at least {at_least}."
        )


def _gram(x1, x2, scale, shift) -> tuple[Array, Array, Array]:
    """`scale x·x'/d + shift`: the variances of either side, and the covariances."""
    scale = scale / x1.shape[1]
    variance1, variance2 = (scale * jnp.sum(x * x, axis=1) + shift for x in (x1, x2))
    return variance1, variance2, scale * multiply(x1, x2) + shift


@partial(jax.jit, static_argnums=(0, 1))  # a known number of layers has a reverse mode
def _advance(activation, layers, W_var, injection, state):
    """Takes `(variance1, variance2, covariance)` some layers on."""

    def layer(_, state):
        k1, k2, c = state
        moments = (
            activation.dual_diagonal(k1)[0],
            activation.dual_diagonal(k2)[0],
            activation.dual(k1[:, None], k2[None, :], c)[0],
        )
        return tuple(W_var * v + s for v, s in zip(moments, injection, strict=True))

    return lax.fori_loop(0, layers, layer, state)


def _at_depths(activation, depths, W_var, injection, state) -> Array:
    covariances = []
    for layers in np.diff(depths, prepend=0):
        state = _advance(activation, int(layers), W_var, injection, state)
        covariances.append(state[2])
    return jnp.stack(covariances)


def _sample(name: str, sample, ndim: int) -> np.ndarray:
    sample = np.asarray(sample, np.float64)
    least = 4 if ndim == 1 else 1 + sample.shape[-1]
    if sample.ndim != ndim or len(sample) < least:
        shape = "(n,)" if ndim == 1 else "(n, d)"
        raise ValueError(f"{name} has shape {sample.shape}; it has to be {shape}, n >= {least}.")
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} has NaN or infinite values; drop what has no equilibrium.")
    return sample


def _distance_to_fit(samples: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance of every row to the Gaussian fitted to it."""
    n = samples.shape[1]
    scale = samples.std(axis=1, ddof=1, keepdims=True)
    if not scale.all():
        raise ValueError("sample has variance 0: it is constant.")
    z = np.sort((samples - samples.mean(axis=1, keepdims=True)) / scale, axis=1)
    cdf, steps = special.ndtr(z), np.arange(n + 1) / n
    return np.maximum((steps[1:] - cdf).max(axis=1), (cdf - steps[:-1]).max(axis=1))


@lru_cache(maxsize=16)
def _null_distances(n: int, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // n)
    parts = [
        _distance_to_fit(rng.standard_normal((min(rows, draws - start), n)))
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts)
