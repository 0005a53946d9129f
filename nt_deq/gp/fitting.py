"""Hyper-parameters of the largest likelihood, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Real, Shaped

from nt_deq.activations import Activation, get_activation
from nt_deq.errors import ArgumentError
from nt_deq.gp.classifier import LaplaceClassifier
from nt_deq.gp.labels import classes_of, labelled
from nt_deq.gp.laplace import find_mode, log_evidence
from nt_deq.gp.matrices import data, in_float64, kernel_matrix, mode, rows
from nt_deq.gp.process import GaussianProcess
from nt_deq.gp.search import Fit, check_start, parameters, search
from nt_deq.typing import Get, MakeKernel

Loss = Literal["marginal_likelihood", "leave_one_out"]


def largest_W_std(activation: str | Activation | Callable[[Array], Array] = "relu") -> float:
    """Returns the `W_std` below which a deep equilibrium model has a kernel, whatever the inputs.

    From `W_std² E[φ'(z*)²] < 1`: for a homogeneous `φ` that is one number (relu: √2), and equality
    the end. For others it is implied by `W_std · Lip(φ) < 1`, and inputs may have a kernel beyond.

    Args:
      activation: `φ`: a name from `nt_deq.activations`, a smooth elementwise function, or an
        `nt_deq.Activation`.
    """
    phi = get_activation(activation)
    if phi.homogeneous:
        return float(phi.dual_diagonal(jnp.ones(()))[1]) ** -0.5
    return 1 / phi.lipschitz


def fit(
    make_kernel: MakeKernel,
    x: Real[ArrayLike, "n ..."],
    y: Real[ArrayLike, "n ..."],
    start: Mapping[str, float],
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    get: Get = "nngp",
    loss: Loss = "marginal_likelihood",
    weights: Real[ArrayLike, " n"] | None = None,
    restarts: int = 3,
    seed: int = 0,
    max_steps: int = 200,
) -> Fit:
    """Finds the hyper-parameters of a kernel, and the noise, that explain the data best.

    BFGS (SciPy's) in unconstrained coordinates, from `start` and from `restarts` random places
    around it, with the curvature that the loss has there. Loss and gradient are one program,
    compiled once for a `make_kernel` and a shape of the data: pass the same function again to use
    it again. A place without an equilibrium, or where `K + noise` is not positive definite, is none
    that a step goes to.

        def make_kernel(p):
            return nt_deq.deq_network(p["W_std"], b_std=p["b_std"])[2]

        start = {"W_std": 0.8, "b_std": 0.3, "noise": 0.1}
        found = gp.fit(make_kernel, x, y, start, bounds={"W_std": (0, gp.largest_W_std("relu"))})

    Args:
      make_kernel: makes a stax `kernel_fn` of hyper-parameters, which are traced.
      x: inputs, `(n, ...)`.
      y: targets with mean zero, `(n,)` or `(n, C)`.
      start: hyper-parameters to begin with; `'noise'` is the variance of the observation noise.
      bounds: open intervals that they stay in, `(lower, upper)`, `upper` possibly infinite; where
        there is none, the positive numbers.
      get: which kernel is the covariance, `'nngp'` or `'ntk'`.
      loss: what is minimised: `'marginal_likelihood'` (minus its logarithm), or `'leave_one_out'`.
      weights: how many observations each target stands for, `(n,)`; `None` is one each.
      restarts: further starts, at least 0. A likelihood may have several maxima.
      seed: of the starts.
      max_steps: of BFGS, from each start, at least 1.

    Returns:
      A `Fit`; look at its `converged`.

    Raises:
      NotPositiveDefiniteError, NoEquilibriumError, NotConvergedError: at `start`, and no other
        start fares better.
      ValueError: an argument cannot be right; the message says why.
    """
    if loss not in _LOSSES:
        raise ArgumentError(f"loss={loss!r} must be one of {', '.join(map(repr, _LOSSES))}.")
    intervals = check_start(start, bounds, restarts, max_steps)
    if "noise" not in start:
        raise ArgumentError(
            f"start={dict(start)} has no 'noise': add the variance of the noise to begin with."
        )
    x, y = data(x, y)
    weights = jnp.ones(len(x), x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
    found = search(
        lambda u: _evaluate(make_kernel, intervals, get, loss, u, x, y, weights),
        intervals,
        start,
        y.size,
        x.dtype,
        restarts=restarts,
        seed=seed,
        max_steps=max_steps,
    )
    if found is None:
        # Which says what is wrong:
        _LOSSES[loss](GaussianProcess(make_kernel(dict(start)), x, y, start["noise"], get, weights))
        raise ArgumentError(f"loss or gradient is not finite at start={dict(start)}.")
    return found


def fit_classifier(
    make_kernel: MakeKernel,
    x: Real[ArrayLike, "n ..."],
    y: Shaped[ArrayLike, " n"],
    start: Mapping[str, float],
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    get: Get = "nngp",
    weights: Real[ArrayLike, " n"] | None = None,
    restarts: int = 3,
    seed: int = 0,
    max_steps: int = 200,
) -> Fit:
    """Finds the hyper-parameters of a kernel that explain classes best.

    By the evidence of `gp.LaplaceClassifier`, as `fit` does by the likelihood of
    `gp.GaussianProcess`; there is no noise. The scale of the kernel (`V_std`) is a parameter, too.
    Up to 2000 inputs are computed in float64 also where JAX's x64 mode is off.

        def make_kernel(p):
            return nt_deq.deq_network(p["W_std"], b_std=p["b_std"], V_std=p["V_std"])[2]

        start = {"W_std": 0.8, "b_std": 0.3, "V_std": 3.0}
        found = gp.fit_classifier(make_kernel, x, labels, start, bounds={"W_std": (0, 2**0.5)})
        model = gp.LaplaceClassifier(make_kernel(found.parameters), x, labels)

    Args:
      make_kernel: makes a stax `kernel_fn` of hyper-parameters, which are traced.
      x: inputs, `(n, ...)`.
      y: labels of two classes or more, `(n,)`.
      start: hyper-parameters to begin with.
      bounds: as of `fit`.
      get: which kernel is the covariance, `'nngp'` or `'ntk'`.
      weights: how many observations each label stands for, `(n,)`; `None` is one each.
      restarts: further starts, at least 0.
      seed: of the starts.
      max_steps: of BFGS, from each start, at least 1.

    Returns:
      A `Fit`, with minus the evidence for `loss`; look at its `converged`.

    Raises:
      NoEquilibriumError, NotConvergedError: at `start`, and no other start fares better.
      ValueError: an argument cannot be right; the message says why.
    """
    intervals = check_start(start, bounds, restarts, max_steps)
    classes = classes_of(y, rows(x))
    with mode(in_float64(rows(x), x, weights)):
        problem = labelled(x, y, classes, weights)
        found = search(
            lambda u: _evaluate_evidence(make_kernel, intervals, get, u, *problem),
            intervals,
            start,
            rows(x),
            problem[0].dtype,
            restarts=restarts,
            seed=seed,
            max_steps=max_steps,
        )
    if found is None:
        LaplaceClassifier(make_kernel(dict(start)), x, y, get, weights)  # which says what is wrong
        raise ArgumentError(f"evidence or gradient is not finite at start={dict(start)}.")
    return found


_LOSSES: dict[str, Callable[[GaussianProcess], Array]] = {
    "marginal_likelihood": lambda process: -process.log_marginal_likelihood(),
    "leave_one_out": GaussianProcess.leave_one_out_loss,
}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluate(make_kernel, intervals, get, loss, u, x, y, weights):
    """The loss, and its gradient in the unconstrained coordinates `u (p,)`."""

    def objective(u):
        p = parameters(intervals, u)
        return _LOSSES[loss](GaussianProcess(make_kernel(p), x, y, p["noise"], get, weights))

    return jax.value_and_grad(objective)(u)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate_evidence(make_kernel, intervals, get, u, x, targets, weights):
    """Minus the evidence, and its gradient in the unconstrained coordinates `u (p,)`."""

    def objective(u):
        kernel = kernel_matrix(make_kernel(parameters(intervals, u)), x, None, get)
        found = find_mode(kernel, targets, weights)
        return -log_evidence(kernel, targets, weights, found.coefficients, found.curvature)

    return jax.value_and_grad(objective)(u)
