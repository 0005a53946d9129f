"""Kernels of infinitely wide networks in tinygp (`pip install ".[tinygp]"` in a clone)."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
from jax import Array
from jaxtyping import Float, PyTree

from nt_deq._extras import extra
from nt_deq.typing import Get, MakeKernel

with extra("tinygp"):
    from tinygp.kernels import Kernel


class StaxKernel(Kernel):
    """Any stax kernel, ours or not, with hyper-parameters that tinygp's tools differentiate.

        kernel = StaxKernel(make_kernel, {"W_std": 0.8, "b_std": 0.3})
        tinygp.GaussianProcess(kernel, x, diag=0.1).log_probability(y)

    A matrix is computed at once, as fast as by the kernel itself; in a sum or a product with
    another kernel, pair by pair.

    Attributes:
      make_kernel: makes a stax `kernel_fn` of hyper-parameters, as for `nt_deq.gp.fit`.
      parameters: the hyper-parameters, which may be traced.
      get: `'nngp'` or `'ntk'`.
    """

    make_kernel: MakeKernel = eqx.field(static=True)
    parameters: Mapping[str, PyTree]
    get: Get = eqx.field(static=True, default="nngp")

    def evaluate(self, X1: Float[Array, " d"], X2: Float[Array, " d"]) -> Float[Array, ""]:
        """The kernel of two inputs `(d,)`."""
        return self._matrix(X1[None], X2[None])[0, 0]

    def evaluate_diag(self, X: Float[Array, " d"]) -> Float[Array, ""]:
        """The kernel of an input `(d,)` with itself."""
        return self._matrix(X[None], None)[0, 0]

    def __call__(
        self, X1: Float[Array, "n d"], X2: Float[Array, "m d"] | None = None
    ) -> Float[Array, "n ..."]:
        """The kernel of inputs `(n, d)` and `(m, d)`; of one batch alone its diagonal, `(n,)`."""
        if X2 is None:
            return jax.vmap(self.evaluate_diag)(X1)
        return self._matrix(X1, None if X2 is X1 else X2)

    def _matrix(self, x1, x2):
        return self.make_kernel(dict(self.parameters))(x1, x2, self.get)
