"""What must hold of nt_deq where its wheel was installed into an empty environment.

Run by `make dist`, outside the checkout: `python -P tests/installed.py`. It is not one of pytest's
tests, which would find the checkout. Commands are processes of their own, from an empty directory.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import nt_deq
from nt_deq import nt, stax

ROOT = Path(__file__).parent.parent

package = Path(nt_deq.__file__).parent
assert package != ROOT / "nt_deq", f"{package} is the checkout"
assert (package / "py.typed").exists()
assert importlib.util.find_spec("experiments") is None
version = importlib.metadata.version("nt-deq")
assert nt_deq.__version__ == version
assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()

x = jax.numpy.array([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0]])
_, _, kernel_fn = stax.serial(stax.DEQ(8, W_std=0.6), stax.Dense(1))
ntk = kernel_fn(x, None, "ntk")[0, 1]
assert abs(ntk - -0.0730514147) < 1e-6, ntk  # by quadrature
predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, x[:, :1], diag_reg=0.0)
assert abs(jax.numpy.subtract(predict_fn(x_test=x, get="ntk"), x[:, :1])).max() < 1e-4

# Eagerly, with every optimisation of the compiler, at a size that has crashed it.
conv = stax.Conv(8, (3, 3), padding="SAME", W_std=0.9)
cell = stax.serial(stax.Relu(), conv)
layers = stax.FixedPoint(cell, inject=conv), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(10)
images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
kernels = stax.serial(*layers)[2](images, None, ("nngp", "ntk"))
for kernel in kernels:
    np.testing.assert_allclose(kernel, kernel.T, rtol=1e-4)
    assert np.linalg.eigvalsh(kernel).min() > 0

assert not {"tensorflow", "sklearn", "matplotlib"} & sys.modules.keys()

with tempfile.TemporaryDirectory() as directory:

    def run(words: str) -> str:
        """What a command prints; none of them may import scikit-learn, which is not there."""
        command = [Path(sys.executable).parent / "nt-deq", *words.split()]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"nt-deq {words} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    assert importlib.util.find_spec("sklearn") is None
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((20, 3))
    np.save(f"{directory}/x.npy", inputs)
    np.savetxt(f"{directory}/x.csv", inputs, delimiter=",", header="a,b,c", comments="")
    np.savetxt(f"{directory}/y.csv", np.where(inputs[:, 0] > 0, "high", "low"), fmt="%s")
    assert version in run("--version")
    assert version in run("info")
    assert "k.npy: NNGP of f, 20 × 20" in run("kernel x.npy --out k.npy")
    assert "leave-one-out" in run("predict x.csv y.csv x.csv --out p.csv --probabilities q.csv")
    assert "on 16 inputs, 4 for testing" in run(
        "compare x.csv y.csv --widths 8 --networks 1 --steps 2"
    )
    assert "there is an equilibrium" in run("phase x.npy --W-stds 0.5,1")
print(f"nt-deq {version} works from {package}")
