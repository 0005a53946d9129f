"""Kernels of infinitely wide networks in GPJax (`pip install ".[gpjax]"` in a clone)."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Float, PyTree

from nt_deq._extras import extra
from nt_deq.typing import Get, MakeKernel

with extra("gpjax"):
    from gpjax.kernels import AbstractKernel
    from gpjax.kernels.computations import AbstractKernelComputation
    from gpjax.parameters import val
    from gpjax.typing import Array


class _Matrices(AbstractKernelComputation):
    """Computes matrices at once, not pair by pair, and exactly where an input meets itself."""

    def _gram(self, kernel, x):
        return kernel.matrix(x, None)

    def _cross_covariance(self, kernel, x, y):
        return kernel.matrix(x, y)

    def _diagonal(self, kernel, inputs):
        variances = jax.vmap(lambda x: kernel.matrix(x[None], None)[0, 0])(inputs)
        operator = lineax.DiagonalLinearOperator(variances)
        return lineax.TaggedLinearOperator(operator, lineax.positive_semidefinite_tag)


class StaxKernel(AbstractKernel):
    """Any stax kernel, ours or not, with hyper-parameters that `gpjax.fit` trains.

        from gpjax.parameters import PositiveReal, SigmoidBounded

        W_std = SigmoidBounded(0.8, high=nt_deq.gp.largest_W_std("relu"))
        kernel = StaxKernel(make_kernel, {"W_std": W_std, "b_std": PositiveReal(0.3)})
        prior = gpjax.gps.Prior(kernel, gpjax.mean_functions.Zero())

    Attributes:
      make_kernel: makes a stax `kernel_fn` of hyper-parameters, as for `nt_deq.gp.fit`.
      parameters: the hyper-parameters: GPJax's, which keep them where they belong, or numbers.
      get: `'nngp'` or `'ntk'`.
    """

    make_kernel: MakeKernel = eqx.field(static=True, init=False)
    parameters: dict[str, PyTree] = eqx.field(init=False)
    get: Get = eqx.field(static=True, init=False)

    def __init__(
        self,
        make_kernel: MakeKernel,
        parameters: Mapping[str, PyTree],
        get: Get = "nngp",
    ):
        self.make_kernel, self.parameters = make_kernel, dict(parameters)
        self.get: Get = get
        super().__init__(compute_engine=_Matrices())

    def __call__(self, x: Float[Array, " d"], y: Float[Array, " d"]) -> Float[jax.Array, ""]:
        """The kernel of two inputs `(d,)`."""
        return self.matrix(x[None], y[None])[0, 0]

    def matrix(
        self, x1: Float[Array, "n d"], x2: Float[Array, "m d"] | None
    ) -> Float[jax.Array, "n _"]:
        """The kernel of inputs `(n, d)` and `(m, d)`, or of `x1` with itself."""
        parameters = {name: val(p) for name, p in self.parameters.items()}
        x2 = None if x2 is None else jnp.asarray(x2)
        return self.make_kernel(parameters)(jnp.asarray(x1), x2, self.get)
