"""What the infinitely wide network predicts, by neural-tangents.

At infinite width the outputs before training are a Gaussian process (NNGP), and gradient descent on
`½ mean (f - y)²`, in continuous time `t = learning_rate · steps`, is linear in function space:
`df/dt = -Θ (f - y) / (n C)` with the NTK `Θ`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

import nt_deq
from nt_deq import nt
from experiments.lib.networks import Architecture
from experiments.lib.workdir import Arrays

LEARNING_RATE_FRACTION = 1 / 8  # of the largest that converges: SGD then stays near its flow
ROWS = 1000  # inputs predicted at once: their covariance is held for every time


def diag_reg(dtype) -> float:
    """What is added to a kernel's diagonal, relative to its mean: ten of its rounding errors."""
    return 10 * float(jnp.finfo(dtype).eps)


def predict(
    architecture: Architecture,
    x_train: Any,
    y_train: Any,
    x_test: Any,
    *,
    learning_rate: float | None,
    steps: Sequence[int],
) -> Arrays:
    """Computes the NNGP posterior and gradient descent with the NTK.

    Args:
      architecture: what the network is.
      x_train: inputs, `(n, d)`.
      y_train: targets, `(n, C)`.
      x_test: inputs, `(m, d)`.
      learning_rate: `None` is an eighth of the largest with which gradient descent converges.
      steps: at which steps to predict.

    Returns:
      `nngp_mean (n+m, C)`, `nngp_var (n+m,)`: the posterior of every output, for the training and
      test inputs, in this order;
      `ntk_mean (steps, n+m, C)`, `ntk_var (steps, n+m)`: over initialisations, during training;
      `ntk_mean_inf`, `ntk_var_inf`: the same at `t = ∞`;
      `ntk_train_train (n, n)`, `ntk_test_train (m, n)`: the NTK;
      `learning_rate`, and `max_learning_rate` with which gradient descent still converges;
      `equilibrium_steps` of the kernel's solver; `nngp_seconds`, `ntk_seconds`.
    """
    x_train, y_train, x_test = map(jnp.asarray, (x_train, y_train, x_test))
    x_all = jnp.concatenate([x_train, x_test])
    kernel_fn = architecture.kernel_fn(y_train.shape[1])
    predict_fn = nt.predict.gradient_descent_mse_ensemble(
        kernel_fn, x_train, y_train, diag_reg=diag_reg(x_train.dtype)
    )

    def moments(t, get):
        means, variances = [], []
        for row in range(0, len(x_all), ROWS):
            x = x_all[row : row + ROWS]
            mean, covariance = cast(Any, predict_fn(t=t, x_test=x, get=get, compute_cov=True))
            means.append(mean)
            variances.append(jnp.maximum(jnp.diagonal(covariance, axis1=-2, axis2=-1), 0))
        return np.concatenate(means, -2), np.concatenate(variances, -1)

    start = time.perf_counter()
    solution = nt_deq.deq_kernel(x_train, **vars(architecture))
    nngp_mean, nngp_var = moments(None, "nngp")
    nngp_seconds = time.perf_counter() - start

    start = time.perf_counter()
    ntk = kernel_fn(x_train, None, "ntk")
    max_learning_rate = float(nt.predict.max_learning_rate(ntk, y_train_size=y_train.size))
    if learning_rate is None:
        learning_rate = LEARNING_RATE_FRACTION * max_learning_rate
    ntk_mean, ntk_var = moments(learning_rate * np.asarray(steps), "ntk")
    ntk_mean_inf, ntk_var_inf = moments(None, "ntk")
    ntk_seconds = time.perf_counter() - start
    return {
        "nngp_mean": nngp_mean,
        "nngp_var": nngp_var,
        "ntk_mean": ntk_mean,
        "ntk_var": ntk_var,
        "ntk_mean_inf": ntk_mean_inf,
        "ntk_var_inf": ntk_var_inf,
        "ntk_train_train": np.asarray(ntk),
        "ntk_test_train": np.asarray(kernel_fn(x_test, x_train, "ntk")),
        "learning_rate": np.asarray(learning_rate),
        "max_learning_rate": np.asarray(max_learning_rate),
        "equilibrium_steps": np.asarray(solution.steps),
        "nngp_seconds": np.asarray(nngp_seconds),
        "ntk_seconds": np.asarray(ntk_seconds),
    }


def from_start(
    infinite: Arrays, y_train: np.ndarray, start: np.ndarray, steps: Sequence[int]
) -> np.ndarray:
    """Predicts gradient descent with the NTK from given networks' own outputs before training.

    A single wide network follows this: at infinite width its randomness is all in its start. It is
    `nt.predict.gradient_descent_mse` but for one thing, steps instead of a flow (a mode of
    eigenvalue `λ` decays by `1 - η λ / (n C)` a step), so that what is left of the distance to a
    network trained by as many steps is due to its width alone.

    Args:
      infinite: what `predict` returned.
      y_train: targets, `(n, C)`.
      start: outputs before training, `(seeds, n+m, C)`.
      steps: at which steps to predict.

    Returns:
      Outputs for the training and test inputs, float64, `(steps, seeds, n+m, C)`.
    """
    n = len(y_train)
    start = np.asarray(start, np.float64)
    values, vectors = np.linalg.eigh(infinite["ntk_train_train"].astype(np.float64))
    decay = 1 - float(infinite["learning_rate"]) / y_train.size * values
    residual = np.einsum("ki,skc->sic", vectors, y_train - start[:, :n])
    to_train = np.concatenate([infinite["ntk_train_train"], infinite["ntk_test_train"]])
    modes = to_train.astype(np.float64) @ vectors
    powers = (1 - decay ** np.asarray(steps)[:, None]) / values
    return start + np.einsum("mi,ti,sic->tsmc", modes, powers, residual, optimize=True)
