"""What must hold of nt_deq where its wheel was installed into an empty environment.

Run by `make dist`, outside the checkout: `python -P tests/installed.py`. It is not one of pytest's
tests, which would find the checkout.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import nt_deq  # isort: split

import jax
import neural_tangents as nt

from nt_deq import stax

ROOT = Path(__file__).parent.parent

package = Path(nt_deq.__file__).parent
assert package != ROOT / "nt_deq", f"{package} is the checkout"
assert (package / "py.typed").exists()
assert importlib.util.find_spec("experiments") is None
version = importlib.metadata.version("nt-deq")
assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()

x = jax.numpy.array([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0]])
_, _, kernel_fn = stax.serial(stax.DEQ(8, W_std=0.6), stax.Dense(1))
ntk = kernel_fn(x, None, "ntk")[0, 1]
assert abs(ntk - -0.0730514147) < 1e-6, ntk  # by quadrature
predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, x[:, :1], diag_reg=0.0)
assert abs(predict_fn(x_test=x, get="ntk") - x[:, :1]).max() < 1e-4
assert not {"tensorflow", "sklearn", "matplotlib"} & sys.modules.keys()
command = [Path(sys.executable).parent / "nt-deq", "info"]
assert version in subprocess.run(command, check=True, capture_output=True, text=True).stdout
print(f"nt-deq {version} works from {package}")
