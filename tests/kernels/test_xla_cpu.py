"""Programs that ended the process on a CPU: docs/project/xla-cpu-segfault.md.

Each runs in a process of its own and compiles with every optimisation, as users do.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from nt_deq import stax

CONVOLUTION = """
import sys

import jax
import numpy as np

from nt_deq import stax

for case in sys.argv[1:]:
    print(case, flush=True)
    n, side, head, dtype = case.split(",")
    jax.config.update("jax_enable_x64", dtype == "float64")
    conv = stax.Conv(64, (3, 3), padding="SAME", W_std=0.9)
    cell = stax.FixedPoint(stax.serial(stax.Relu(), conv), inject=conv)
    pool = {"pool": stax.GlobalAvgPool(), "flatten": stax.Flatten()}[head]
    kernel_fn = stax.serial(cell, stax.Relu(), pool, stax.Dense(10))[2]
    images = jax.random.normal(jax.random.key(1), (int(n), int(side), int(side), 3), dtype)
    kernels = kernel_fn(images, None, ("nngp", "ntk"))
    for kernel in map(np.asarray, kernels):
        assert kernel.dtype == dtype and kernel.shape == (len(images),) * 2, case
        assert np.isfinite(kernel).all() and (np.diagonal(kernel) > 0).all(), case
        np.testing.assert_allclose(kernel, kernel.T, rtol=1e-4, err_msg=case)
print("done")
"""

# Every number of images with every head and dtype, and every side likewise, but not all at once.
NUMBERS = [f"{n},6,{head},{dtype}" for n, head, dtype in zip(
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32), ("pool", "flatten") * 6,
    ("float32",) * 6 + ("float64",) * 2 + ("float32",) * 3, strict=False,
)]  # fmt: skip
SIDES = [f"4,{side},{('pool', 'flatten')[side % 2]},float32" for side in range(4, 18)]
SIDES += [f"{n},16,pool,float32" for n in (4, 5, 8, 16, 32)]  # those that were seen to
SIDES += ["8,16,pool,float64", "5,9,flatten,float64"]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["8,16,pool,float32"], id="readme"),
        pytest.param(NUMBERS, id="numbers", marks=pytest.mark.slow),
        pytest.param(SIDES, id="sides", marks=pytest.mark.slow),
    ],
)
def test_kernels_of_a_convolutional_network(cases, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-X", "faulthandler", "-c", CONVOLUTION, *cases]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    printed = run.stdout.split()
    assert run.returncode == 0, f"{printed[-1]} ended with {run.returncode}: {run.stderr[-3000:]}"
    assert printed == [*cases, "done"]


def test_the_solver_sums_products_over_one_axis():
    """What XLA:CPU gives to YNNPACK of more axes is at its mercy."""
    conv = stax.Conv(1, (3, 3), padding="SAME", W_std=0.9)
    kernel_fn = stax.FixedPoint(stax.serial(stax.Relu(), conv), conv)[2]
    jaxpr = jax.make_jaxpr(lambda x: kernel_fn(x, None, ("nngp", "ntk")))(jnp.ones((3, 4, 4, 1)))
    sums = [found for found in equations(jaxpr.jaxpr) if found.primitive.name == "reduce_sum"]
    products = [found for found in sums if len(found.invars[0].aval.shape) > 1]
    assert products
    for found in products:
        assert len(found.params["axes"]) == 1, found


def equations(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
