"""What the theorems on wide deep equilibrium models say, as functions.

    z^(l+1) = W_std/√n · W φ(z^l) + U_std/√d · U x + b_std · b,     z^0 = 0,

with the same W, U, b in every layer. Gao et al. 2023 (arXiv:2310.10767) show that `z^l` tends to a
Gaussian process as the width grows, that so does its limit `z*` in the depth, that the two limits
may be exchanged, and that the covariance of distinct inputs is strictly positive definite. Feng &
Kolter 2023 (arXiv:2310.14062) show the same of the NTK. The functions give the conditions of these
theorems, the kernel of every depth, how fast it tends to that of `z*`, the infinitely deep network
without injection for which all this fails, and tests of whether a sample is Gaussian.
"""

from nt_deq.theory.contraction import (
    convergence_rate,
    global_contraction,
    local_contraction,
)
from nt_deq.theory.definiteness import (
    SmallestEigenvalue,
    smallest_eigenvalue,
)
from nt_deq.theory.depth import (
    depth_kernels,
    mlp_correlation_gap,
    mlp_kernels,
)
from nt_deq.theory.gaussianity import (
    GaussianityTest,
    Lilliefors,
    Mardia,
    covariance_test,
    lilliefors,
    mardia,
)
from nt_deq.theory.residual import (
    untied_residual_kernels,
)

__all__ = [
    "GaussianityTest",
    "Lilliefors",
    "Mardia",
    "SmallestEigenvalue",
    "convergence_rate",
    "covariance_test",
    "depth_kernels",
    "global_contraction",
    "lilliefors",
    "local_contraction",
    "mardia",
    "mlp_correlation_gap",
    "mlp_kernels",
    "smallest_eigenvalue",
    "untied_residual_kernels",
]
