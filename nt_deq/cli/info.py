"""Shows versions, devices and what of neural-tangents is bridged.

For a bug report, and to see whether JAX has found a GPU or a TPU. neural-tangents 0.6.5 needs some
names that newer versions of JAX have moved: each bridge stands for one of them, and is in place
where the installed JAX needs it.

Examples:
  nt-deq info
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

PACKAGES = (
    "nt-deq", "jax", "jaxlib", "neural-tangents", "flax", "optax", "optimistix", "lineax", "numpy",
    "scipy", "tensorstore",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no flags."""


def run(args: argparse.Namespace) -> None:
    """Prints it."""
    import jax
    import jax.numpy as jnp

    from nt_deq import _bridges

    for name, version in [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, importlib.metadata.version(name)) for name in PACKAGES),
    ]:
        print(f"{name:<16} {version}")
    devices = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    print(f"{'devices':<16} {devices} ({kinds})")
    is_double = jnp.zeros(()).dtype == jnp.float64
    x64 = "on" if is_double else "off (--x64 and JAX_ENABLE_X64=1 turn it on)"
    print(f"{'float64':<16} {x64}")
    print("bridges to neural-tangents:")
    for name, needed in _bridges.bridges().items():
        print(f"  {name:<43} {'in place' if needed else 'not needed'}")
