"""Minima of a loss in hyper-parameters between bounds, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from scipy import optimize

from nt_deq import _checks
from nt_deq.errors import ArgumentError

_SPREAD = 2.0  # standard deviation of the starts around the first: a factor of 7, up and down
_GRADIENT = 1e-3  # of the loss, in nats, at which a search has ended
_GAIN = 1e-3  # of the last four steps, in nats, likewise
_LEAST_CURVATURE = 1.0  # in nats, that a search begins with: no first step to nowhere
_FLAT = 1e-3  # curvature, in nats, below which the data do not determine a parameter

Interval: TypeAlias = tuple[str, float, float]
"""Name, lower and upper bound of a hyper-parameter."""


class Fit(NamedTuple):
    """Where a search for hyper-parameters ended.

    Attributes:
      parameters: the best that were found, of `gp.fit` with `'noise'` among them.
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


def search(
    loss: Callable[[Array], tuple[Array, Array]],
    intervals: tuple[Interval, ...],
    start: Mapping[str, float],
    size: int,
    dtype: np.dtype,
    *,
    restarts: int,
    seed: int,
    max_steps: int,
) -> Fit | None:
    """BFGS (SciPy's) in unconstrained coordinates `u (p,)`, with the curvature that the loss has.

    Args:
      loss: the loss in nats, and its gradient, at `u`; not finite where there is none.
      intervals: of the hyper-parameters, as `check_start` gives them.
      start: the first.
      size: how many numbers are explained, each by a loss of the order of 1.
      dtype: in which the loss is computed.
      restarts: further starts, at random.
      seed: of these.
      max_steps: from each start.

    Returns:
      `None` where no start has a finite loss.
    """
    first = np.array([_unconstrain(start[name], *interval) for name, *interval in intervals])
    jumps = np.random.default_rng(seed).normal(size=(restarts, len(first)))
    places = np.concatenate([first[None], first + _SPREAD * jumps])

    def evaluate(u):
        """Loss and gradient per number, or infinity."""
        found = loss(jnp.asarray(u, dtype))
        value, gradient = (np.asarray(a, np.float64) / size for a in found)
        finite = np.isfinite(value) and np.isfinite(gradient).all()
        return (float(value), gradient) if finite else (np.inf, np.zeros_like(gradient))

    def descend(place):
        values = []

        def stop(intermediate_result):
            values.append(intermediate_result.fun)
            if len(values) > 4 and values[-5] - values[-1] < _GAIN / size:
                raise StopIteration

        hessian = _hessian(evaluate, place, resolution)
        options = {
            "maxiter": max_steps,
            "gtol": _GRADIENT / size,
            "hess_inv0": _inverse_curvature(hessian, _LEAST_CURVATURE / size),
        }
        return optimize.minimize(
            evaluate, place, jac=True, method="BFGS", callback=stop, options=options
        )

    resolution = float(jnp.finfo(dtype).eps)
    ends = [descend(place) for place in places]
    losses = size * np.array([end.fun for end in ends])
    best = ends[int(losses.argmin())]
    if not np.isfinite(best.fun):
        return None
    found = {name: float(v) for name, v in parameters(intervals, jnp.asarray(best.x)).items()}
    return Fit(
        found,
        float(losses.min()),
        *_curvature(evaluate, best, size, tuple(found), resolution),
        steps=sum(end.nit for end in ends),
        losses=losses,
    )


def check_start(
    start: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]] | None,
    restarts: int,
    max_steps: int,
) -> tuple[Interval, ...]:
    """The intervals that hyper-parameters stay in, or an error where no search can begin."""
    if restarts < 0:
        raise ArgumentError(f"restarts={restarts} must be at least 0.")
    _checks.count("max_steps", max_steps)
    bounds = bounds or {}
    if not start:
        raise ArgumentError("start={} has no hyper-parameters: name those to be found.")
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


def parameters(intervals: tuple[Interval, ...], u: Array) -> dict[str, Array]:
    """The hyper-parameters of unconstrained coordinates."""
    return {name: _constrain(v, *of) for v, (name, *of) in zip(u, intervals, strict=True)}


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


def _constrain(u: Array, lower: float, upper: float) -> Array:
    if np.isinf(upper):
        return lower + jnp.exp(u)
    return lower + (upper - lower) * jax.nn.sigmoid(u)


def _unconstrain(value: float, lower: float, upper: float) -> float:
    if np.isinf(upper):
        return float(np.log(value - lower))
    return float(np.log(value - lower) - np.log(upper - value))
