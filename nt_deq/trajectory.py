"""The end of `ż = velocity(z)`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from nt_deq import _checks
from nt_deq.errors import NotConvergedError
from nt_deq.fixed_point.implicit import keep

_MAX_STEPS = 4096


def euler(
    velocity: Callable[[Array], Array],
    z: Float[Array, "*_ features"],
    T: Float[Array, ""],
    steps: int,
) -> Float[Array, "*_ features"]:
    """So many layers of the residual network `z ← z + T/steps · velocity(z)`."""
    return lax.fori_loop(0, steps, lambda _, z: z + T / steps * velocity(z), z)


def integrate(
    velocity: Callable[[Array], Array], z: Float[Array, "*shape"], T: Float[Array, ""]
) -> tuple[Float[Array, "*shape"], Bool[Array, ""]]:
    """`z(T)` to the accuracy of the dtype, by diffrax's `Dopri8`, and whether it got there.

    The step is that of the entry that needs the smallest. Differentiable in both modes.
    """
    import diffrax

    rtol = 16 * float(jnp.finfo(z.dtype).eps)
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, args: velocity(z)),
        diffrax.Dopri8(),
        t0=jnp.zeros_like(T),
        t1=T,
        dt0=None,
        y0=z,
        stepsize_controller=diffrax.PIDController(
            rtol=rtol, atol=rtol, norm=lambda y: jnp.max(jnp.abs(y))
        ),
        adjoint=diffrax.DirectAdjoint(),
        max_steps=_MAX_STEPS,
        throw=False,
    )
    assert found.ys is not None
    return found.ys[0], found.result == diffrax.RESULTS.successful


def trajectory_end(
    velocity: Callable[[Array], Array],
    z: Float[Array, "*_ features"],
    T: Float[Array, ""],
    batch_axis: int,
) -> Float[Array, "*_ features"]:
    """`z(T)` of a finite network, by `integrate`.

    Args:
      velocity: of all samples.
      z: where they start.
      T: the end.
      batch_axis: of the samples, to say which are not finite.

    Returns:
      The state at the end, where a sample is NaN that the integration did not get to the end of.

    Raises:
      NotConvergedError: likewise, in an eager call.
    """
    end, reached = integrate(velocity, z, T)
    end = jnp.moveaxis(end, batch_axis, 0)
    solved = reached & jnp.all(jnp.isfinite(end), axis=tuple(range(1, end.ndim)))
    if not _checks.is_traced(solved, z) and not np.all(solved):
        missing = np.flatnonzero(~np.asarray(solved))
        raise NotConvergedError(
            f"the finite network was not integrated until T={float(T):.6g} for "
            f"{_checks.rows('x', missing)}: {_MAX_STEPS} steps were too few, or its state grows "
            "beyond the dtype; make T or the weights of the cell smaller, or its leak larger."
        )
    return jnp.moveaxis(keep(solved, end), 0, batch_axis)
