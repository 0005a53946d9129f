"""Gaussian expectations of pairs by quadrature, to compare with."""

import numpy as np


def by_polar_coordinates(f, g, k1, k2, rho):
    """`E[f(u) g(u')]` for functions that are smooth on the scale of their argument.

    Between the rays u = 0 and u' = 0 the rule of tanh-sinh, and along them trapezoids of log r:
    both are dense at 0 on every scale, where a function of large variance looks like a step.
    """
    log_r, step = np.linspace(-34.0, np.log(12.0), 620, retstep=True)
    r = np.exp(log_r)
    t = np.linspace(-4.2, 4.2, 450)[:, None]
    end = np.exp(-np.pi / 2 * np.sinh(np.abs(t)))  # 1 - |x| = 2 end²/(1 + end²), without rounding
    near, far = 2 * end**2 / (1 + end**2), 2 / (1 + end**2)
    weight = np.pi / 2 * np.cosh(t) * (2 * end / (1 + end**2)) ** 2 * (t[1] - t[0])
    total = 0.0
    for sign, opening in ((1, np.pi - np.arccos(rho)), (-1, np.arccos(rho))):
        one, other = (np.where(side, near, far) * opening / 2 for side in (t < 0, t > 0))
        u, v = np.sqrt(k1) * r * np.sin(one), sign * np.sqrt(k2) * r * np.sin(other)
        both = sum(np.asarray(f(s * u)) * np.asarray(g(s * v)) for s in (1, -1))
        total += np.sum(weight * opening / 2 * r**2 * np.exp(-(r**2) / 2) * step * both)
    return total / (2 * np.pi)
