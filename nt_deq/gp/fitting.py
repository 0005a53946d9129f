"""Hyper-parameters of the largest likelihood, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real
from scipy import optimize

from nt_deq import _checks
from nt_deq.activations import Activation, get_activation
from nt_deq.errors import ArgumentError
from nt_deq.gp.matrices import data
from nt_deq.gp.process import GaussianProcess
from nt_deq.typing import Get, MakeKernel

Loss = Literal["marginal_likelihood", "leave_one_out"]

_SPREAD = 2.0  # standard deviation of the starts around the first: a factor of 7, up and down
_GRADIENT = 1e-3  # of the loss, in nats, at which a search has ended
_GAIN = 1e-3  # of the last four steps, in nats, likewise
_LEAST_CURVATURE = 1.0  # in nats, that a search begins with: no first step to nowhere
_FLAT = 1e-3  # curvature, in nats, below which the data do not determine a parameter


class Fit(NamedTuple):
    """Where a search for hyper-parameters ended.

    Attributes:
      parameters: the best that were found, `'noise'` among them.
      loss: minus the log marginal likelihood, or the leave-one-out loss, there.
      hessian: `(p, p)`, of the loss there, by central differences of its gradient in the
        unconstrained coordinates: for a parameter above `lower` the logarithm of `value - lower`,
        between two bounds the logit.
      standard_errors: of the parameters in these coordinates, by the inverse of `hessian`. About 30
        (1/√0.001) is the most: the data do not determine the parameter, which may have gone towards
        one of its bounds.
      distance: of the end from the bottom of the parabola that gradient and Hessian give, in
        standard errors: `√(gᵀ H⁻¹ g)`.
      converged: whether this is a minimum: no direction goes down and `distance < 0.1`.
      steps: of BFGS, from all starts.
      losses: at the end of every start, the user's first; infinite where there is none.
    """

    parameters: dict[str, float]
    loss: float
    hessian: Float[np.ndarray, "p p"]
    standard_errors: dict[str, float]
    distance: float
    converged: bool
    steps: int
    losses: Float[np.ndarray, " starts"]


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
    if restarts < 0:
        raise ArgumentError(f"restarts={restarts} must be at least 0.")
    _checks.count("max_steps", max_steps)
    intervals = _intervals(start, bounds or {})
    x, y = data(x, y)
    weights = jnp.ones(len(x), x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
    first = np.array([_unconstrain(start[name], *interval) for name, *interval in intervals])
    jumps = np.random.default_rng(seed).normal(size=(restarts, len(first)))
    places = np.concatenate([first[None], first + _SPREAD * jumps])

    def evaluate(u):
        """Loss and gradient for one number of `y`, which are of the order of 1; or infinity."""
        u = jnp.asarray(u, x.dtype)
        found = _evaluate(make_kernel, intervals, get, loss, u, x, y, weights)
        value, gradient = (np.asarray(a, np.float64) / y.size for a in found)
        finite = np.isfinite(value) and np.isfinite(gradient).all()
        return (float(value), gradient) if finite else (np.inf, np.zeros_like(gradient))

    def search(place):
        values = []

        def stop(intermediate_result):
            values.append(intermediate_result.fun)
            if len(values) > 4 and values[-5] - values[-1] < _GAIN / y.size:
                raise StopIteration

        hessian = _hessian(evaluate, place, resolution)
        options = {
            "maxiter": max_steps,
            "gtol": _GRADIENT / y.size,
            "hess_inv0": _inverse_curvature(hessian, _LEAST_CURVATURE / y.size),
        }
        return optimize.minimize(
            evaluate, place, jac=True, method="BFGS", callback=stop, options=options
        )

    resolution = float(jnp.finfo(x.dtype).eps)
    ends = [search(place) for place in places]
    losses = y.size * np.array([end.fun for end in ends])
    best = ends[int(losses.argmin())]
    if not np.isfinite(best.fun):
        # Which says what is wrong:
        _LOSSES[loss](GaussianProcess(make_kernel(dict(start)), x, y, start["noise"], get, weights))
        raise ArgumentError(f"loss or gradient is not finite at start={dict(start)}.")
    found = {name: float(v) for name, v in _parameters(intervals, jnp.asarray(best.x)).items()}
    return Fit(
        found,
        float(losses.min()),
        *_curvature(evaluate, best, y.size, tuple(found), resolution),
        steps=sum(end.nit for end in ends),
        losses=losses,
    )


_LOSSES: dict[str, Callable[[GaussianProcess], Array]] = {
    "marginal_likelihood": lambda process: -process.log_marginal_likelihood(),
    "leave_one_out": GaussianProcess.leave_one_out_loss,
}

_Interval = tuple[str, float, float]  # name, lower, upper


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluate(make_kernel, intervals, get, loss, u, x, y, weights):
    """The loss, and its gradient in the unconstrained coordinates `u (p,)`."""

    def objective(u):
        p = _parameters(intervals, u)
        return _LOSSES[loss](GaussianProcess(make_kernel(p), x, y, p["noise"], get, weights))

    return jax.value_and_grad(objective)(u)


def _hessian(evaluate, place, resolution) -> np.ndarray:
    """The second derivatives, by central differences of the gradient."""
    step = (1e4 * resolution) ** (1 / 3)  # where truncation is as small as rounding
    sides = [[evaluate(place + sign * e)[1] for sign in (1, -1)] for e in step * np.eye(len(place))]
    hessian = np.array([(above - below) / (2 * step) for above, below in sides])
    return (hessian + hessian.T) / 2


def _inverse_curvature(hessian, least) -> np.ndarray:
    """A positive definite inverse: a search goes down where the loss bends down, too."""
    curvatures, directions = np.linalg.eigh(hessian)
    inverse = directions / np.maximum(np.abs(curvatures), least) @ directions.T
    return (inverse + inverse.T) / 2


def _curvature(evaluate, end, size, names, resolution):
    """`hessian`, `standard_errors`, `distance` and `converged` of a `Fit`."""
    hessian = size * _hessian(evaluate, end.x, resolution)
    curvatures, directions = np.linalg.eigh(hessian)
    flat = max(_FLAT, resolution**0.5 * curvatures[-1])
    stiffness = np.maximum(curvatures, flat)
    distance = float(np.sqrt(np.sum((directions.T @ (size * end.jac)) ** 2 / stiffness)))
    errors = np.sqrt(directions**2 @ (1 / stiffness))
    converged = bool(curvatures[0] > -flat and distance < 0.1)
    return hessian, dict(zip(names, errors.tolist(), strict=True)), distance, converged


def _parameters(intervals: tuple[_Interval, ...], u: Array) -> dict[str, Array]:
    return {name: _constrain(v, *of) for v, (name, *of) in zip(u, intervals, strict=True)}


def _constrain(u: Array, lower: float, upper: float) -> Array:
    if np.isinf(upper):
        return lower + jnp.exp(u)
    return lower + (upper - lower) * jax.nn.sigmoid(u)


def _unconstrain(value: float, lower: float, upper: float) -> float:
    if np.isinf(upper):
        return float(np.log(value - lower))
    return float(np.log(value - lower) - np.log(upper - value))


def _intervals(
    start: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]
) -> tuple[_Interval, ...]:
    if "noise" not in start:
        raise ArgumentError(
            f"start={dict(start)} has no 'noise': add the variance of the noise to begin with."
        )
    if unknown := sorted(set(bounds) - set(start)):
        raise ArgumentError(
            f"bounds are given for {unknown}, which start={dict(start)} does not have."
        )
    intervals = []
    for name, value in start.items():
        lower, upper = map(float, bounds.get(name, (0.0, np.inf)))
        if not (np.isfinite(lower) and lower < value < upper and np.isfinite(value)):
            raise ArgumentError(
                f"start[{name!r}]={value} must be inside of its bounds ({lower}, {upper}), of "
                "which the lower is finite; for a parameter that is 0, leave it out."
            )
        intervals.append((name, lower, upper))
    return tuple(intervals)
