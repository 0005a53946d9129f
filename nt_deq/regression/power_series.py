"""The power series of the infinitely deep kernels on a sphere.

For a positively homogeneous φ and inputs of one norm, the NNGP kernel and the NTK of
`f = V_std/√n V φ(z*)` are functions of `t = x·x'/‖x‖²` alone. They are positive definite in every
dimension, so (Schoenberg 1942) `f(t) = Σ cₖ tᵏ` with `cₖ >= 0`. The bias only moves
`r = (U_std² ‖x‖²/d · t + b_std²) / (U_std² ‖x‖²/d + b_std²)`, the correlation of what is injected.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from nt_deq import _checks
from nt_deq.activations import Phi, get_activation
from nt_deq.errors import ArgumentError, NoEquilibriumError
from nt_deq.kernels.equations import multiply
from nt_deq.typing import Get, KernelFn

_NEWTON_STEPS = 64  # the error halves at worst, and is squared where it is below 1 - a


@dataclass(frozen=True)
class Series:
    """A dot-product kernel `f(t) = Σ cₖ tᵏ` on the sphere `‖x‖² = mean_square · d`, cut short.

    Attributes:
      coefficients: `c_0 … c_degree`, float64, none negative.
      total: `f(1)`, the kernel of an input with itself; without the cut, the sum of all `cₖ`.
      mean_square: `‖x‖²/d` of all inputs.
      get: which kernel of the network it is, `'nngp'` or `'ntk'`.
    """

    coefficients: Float[np.ndarray, " terms"]
    total: float
    mean_square: float
    get: Get

    @property
    def tail(self) -> float:
        """What the cut leaves out at `t = 1`; at other `t` it is at most `|t|^(degree+1)` of it."""
        return self.total - float(self.coefficients.sum())

    def kernel(self, x1: Float[Array, "n1 d"], x2: Float[Array, "n2 d"]) -> Float[Array, "n1 n2"]:
        """The series cut short, of inputs `(n1, d)` and `(n2, d)` on the sphere: `(n1, n2)`."""
        t = multiply(x1, x2) / (self.mean_square * x1.shape[1])
        total = jnp.full_like(t, self.coefficients[-1])
        for coefficient in self.coefficients[-2::-1]:
            total = total * t + coefficient
        return total

    def remainder(self, kernel_fn: KernelFn) -> KernelFn:
        """`kernel_fn` less the series cut short: what the cut leaves out, positive definite too.

        Args:
          kernel_fn: `(x1, x2, get) -> (n1, n2)`, that of the network whose series this is.
        """

        def remainder_fn(x1, x2, get):
            if get != self.get:
                raise ArgumentError(
                    f"get={get!r}: this is a series of the {self.get!r}; make one with get={get!r}."
                )
            return kernel_fn(x1, x2, get) - self.kernel(x1, x1 if x2 is None else x2)

        return remainder_fn


def deq_series(
    degree: int,
    *,
    W_std: float,
    U_std: float = 1.0,
    b_std: float = 0.0,
    V_std: float = 1.0,
    activation: Phi = "relu",
    mean_square: float = 1.0,
    get: Get = "nngp",
) -> Series:
    """Expands the kernel of `nt_deq.deq_network(W_std, ...)` on a sphere.

    The `cₖ` are Cauchy's integrals over a circle just inside the unit disc, on which the kernel's
    equation is solved for complex `t`: with the radius `ε^(1/N)` of `N = 64 (degree + 1)` points,
    aliasing is of the size of rounding, which grows by `ε^(-1/64) < 2` at most (Bornemann 2011,
    "Accuracy and stability of computing high-order derivatives of analytic functions").

    The kink of φ shows at `t = 1`: `cₖ` falls like `k^(-5/2)` for the NNGP kernel and like
    `k^(-3/2)` for the NTK, and `tail` like `k^(-3/2)` and `k^(-1/2)`. Away from `t = 1`, that is
    but for an input with itself and its nearest neighbours, a few degrees are enough.

    Args:
      degree: of the last term, at least 1.
      W_std: standard deviation of the recurrent weights.
      U_std: standard deviation of the input weights.
      b_std: standard deviation of the bias.
      V_std: standard deviation of the readout's weights.
      activation: positively homogeneous: relu, leaky_relu, abs, identity, or one's own.
      mean_square: `‖x‖²/d` of all inputs.
      get: `'nngp'` or `'ntk'`.

    Raises:
      NoEquilibriumError: `W_std² E[φ(g)²] >= 1`.
      ValueError: an argument cannot be right; the message says why.
    """
    _checks.count("degree", degree)
    _checks.standard_deviations(W_std=W_std, U_std=U_std, b_std=b_std, V_std=V_std)
    if not (np.isfinite(mean_square) and mean_square > 0):
        raise ArgumentError(f"mean_square={mean_square} must be ‖x‖²/d, finite and above 0.")
    _checks.kernel_name(get)
    phi = get_activation(activation)
    if not phi.homogeneous:
        raise ArgumentError(
            f"activation={phi.name!r} is not positively homogeneous; take relu, leaky_relu, abs or "
            "identity, or NystromFeatures, which are for any kernel."
        )
    up, down = np.asarray(phi.fn(jnp.array([1.0, -1.0])), np.float64)  # two half-lines
    moment, bend = (up**2 + down**2) / 2, (up + down) ** 2 / 2
    rate = W_std**2 * moment
    if rate >= 1:
        raise NoEquilibriumError(
            f"W_std={W_std:.6g} with activation={phi.name!r}: W_std² E[φ'(z*)²] = {rate:.6g} has "
            "to be below 1, so the network has no stable equilibrium; take W_std < "
            f"{moment**-0.5:.6g}."
        )
    U_var = U_std**2 * mean_square
    variance = (U_var + b_std**2) / (1 - rate)  # K*(x, x)

    def duals(rho):
        angle = np.arccos(rho)
        slope = moment - bend / np.pi * angle
        return slope * rho + bend / np.pi * np.sqrt(1 - rho * rho), slope

    def network(rho):
        dual, slope = duals(rho)
        ntk = dual + (slope * rho / (1 - W_std**2 * slope) if get == "ntk" else 0)
        return V_std**2 * variance * ntk

    points = 64 * (degree + 1)
    unit = np.finfo(np.float64).eps
    radius = unit ** (1 / points)
    t = radius * np.exp(2j * np.pi / points * np.arange(points))
    injected = (U_var * t + b_std**2) / variance  # (1 - rate) r
    # As power series in t, Newton's iterates from 0 grow to the solution term by term (Pivoteau,
    # Salvy & Soria 2012), so that nowhere on the circle is one worse than at t = radius, where the
    # equation is convex.
    rho = np.zeros_like(t)
    for _ in range(_NEWTON_STEPS):
        dual, slope = duals(rho)
        rho = rho + (W_std**2 * dual + injected - rho) / (1 - W_std**2 * slope)
    values = network(rho)
    scaled = np.fft.fft(values).real[: degree + 1] / points
    total = float(network(np.float64(1)))
    scaled[np.abs(scaled) <= 64 * unit * total / (1 - rate)] = 0
    return Series(scaled * radius ** -np.arange(degree + 1.0), total, float(mean_square), get)
