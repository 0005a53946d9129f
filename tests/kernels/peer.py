"""Errors of `V` and `V̇` of tanh, ours and neural-tangents': `python tests/kernels/peer.py`.

neural-tangents' is `stax.ElementwiseNumerical`, by Gauss-Hermite quadrature in two dimensions, of
degree 25. The reference is the trapezoidal rule, which converges geometrically. Prints the table of
docs/precision.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nt_deq import stax

VARIANCES = (0.1, 1.0, 5.0, 25.0)
CORRELATIONS = np.array([-0.9, 0.5, 0.9, 0.99, 0.999])
DEGREE = 25


def expectation(fn, k: float) -> np.ndarray:
    """`E[fn(u) fn(u')]` at every correlation, for variances `k`."""
    g = np.arange(-450, 451) * 0.02
    density = np.exp(-g * g / 2) * 0.02 / np.sqrt(2 * np.pi)
    rho = CORRELATIONS[:, None, None]
    u, v = g[:, None], rho * g[:, None] + np.sqrt(1 - rho**2) * g
    values = fn(np.sqrt(k) * u) * fn(np.sqrt(k) * v)
    return np.einsum("i,j,cij->c", density, density, values)


def duals(layer, k: float) -> tuple[np.ndarray, np.ndarray]:
    """`V` and `V̇` of a layer, from the kernel of `√k (cos, sin)` and `√k (1, 0)`."""
    x = np.sqrt(2 * k) * np.stack([CORRELATIONS, np.sqrt(1 - CORRELATIONS**2)], axis=1)
    first = np.sqrt(2 * k) * np.array([[1.0, 0.0]])
    kernel_fn = stax.serial(stax.Dense(1), layer)[2]
    kernel = kernel_fn(jnp.asarray(x), jnp.asarray(first), ("nngp", "ntk"))
    before = k * CORRELATIONS[:, None]  # of `Dense`, the NTK of which it is too
    return np.asarray(kernel.nngp)[:, 0], np.asarray(kernel.ntk / before)[:, 0]


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_enable_x64", True)
    ours = stax.Nonlinearity("tanh")
    theirs = stax.ElementwiseNumerical(jnp.tanh, DEGREE)
    print("| variance | V, ours | V, neural-tangents | V̇, ours | V̇, neural-tangents |")
    print("|---|---|---|---|---|")
    for k in VARIANCES:
        exact = expectation(np.tanh, k), expectation(lambda z: np.cosh(z) ** -2.0, k)
        found = [duals(layer, k) for layer in (ours, theirs)]
        errors = [
            f"{np.max(np.abs(values[i] / true - 1)):.1e}"
            for i, true in enumerate(exact)
            for values in found
        ]
        print(f"| {k:g} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
