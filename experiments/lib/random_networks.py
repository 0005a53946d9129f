"""Finite deep equilibrium networks drawn at random: what their outputs and covariances are.

`z ← W_std/√n · W φ(z) + U_std/√d · U x` from `z = 0`, without bias, with outputs `f = V φ(z)/√n`;
all of `W`, `U`, `V` from `N(0, 1)`. One network after the other goes through one compiled loop that
draws it, iterates it and keeps only its outputs and its covariance, so that memory is one network's
whatever their number; blocks of networks are parts of the working directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import nt_deq
from experiments.lib import launch
from experiments.lib.launch import flag
from experiments.lib.networks import Architecture, dense
from experiments.lib.workdir import Arrays, Workdir
from nt_deq._progress import progress_bar
from nt_deq.errors import NoEquilibriumError

ACTIVATIONS = ("tanh", "relu")
FEATURES = 10  # of the published figures
OUTPUTS = 2
MAX_STEPS = 1000
BLOCK = 2**27  # weights drawn before a part is kept
CALL = 10  # networks of one call: the same for all counts, so that they share a program


@dataclass(frozen=True)
class Settings(launch.Settings):
    """The flags that launchers with random networks share."""

    W_std: float = flag(0.6, "standard deviation of the recurrent weights", above=0)
    U_std: float = flag(1.0, "standard deviation of the input weights", above=0)
    seed: int = flag(0, "of the inputs and of the networks", at_least=0)

    def inputs(self, count: int, features: int = FEATURES) -> np.ndarray:
        """Standard Gaussian inputs, `(count, features)`, float64; a larger count adds to them."""
        return np.random.default_rng(self.seed).standard_normal((count, features))

    def limit(self, x: np.ndarray, activation: str) -> np.ndarray:
        """`Σ* = E[φ(z*)φ(z*)ᵀ]`, the covariance of an output at infinite width, float64."""
        return Architecture(self.W_std, self.U_std, 0.0, activation).kernels(x)[0]


def relative_error(covariance: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """`‖C - Σ‖²/‖Σ‖²` in Frobenius norm, over the last two axes."""
    return np.sum((covariance - limit) ** 2, axis=(-2, -1)) / np.sum(limit**2, axis=(-2, -1))


def chance_error(covariances: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """The same of the mean over the first axis, if chance alone made the networks differ."""
    variance = covariances.var(axis=0, ddof=1) / len(covariances)
    return relative_error(limit + np.sqrt(variance), limit)


@partial(jax.jit, static_argnames=("architecture", "width", "depths"))
def _draw(keys, *, x, architecture, width, depths):
    def draw(key):
        rngs: Any = SimpleNamespace(params=iter(jax.random.split(key, 3)).__next__)  # W, U and V
        solver = nt_deq.Picard(max_steps=MAX_STEPS)
        network = dense(architecture, x.shape[1], width, OUTPUTS, rngs, solver=solver)

        def results(z, found):
            h = network.deq.activation.fn(z)
            outputs, covariance = network.readout(h), h @ h.T / width
            return jnp.where(found, outputs, jnp.nan), jnp.where(found, covariance, jnp.nan)

        if not depths:
            found = network.deq.solve(x)
            return results(found.value, found.converged.all())
        z, parts = jnp.zeros((len(x), width), x.dtype), []
        for layers in np.diff(depths, prepend=0):
            z = lax.fori_loop(0, int(layers), lambda _, z: network.deq.step(z, x), z)
            parts.append(results(z, True))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    with jax.default_matmul_precision("highest"):
        return lax.map(draw, keys)  # not batched: XLA's batched products are slow on a CPU


def by_calls(
    draw: Callable[[Array], Any], root: Array, networks: range, progress: Callable[[int], Any]
) -> Any:
    """`draw(keys)` of all networks, in calls of `CALL` keys; a key is of `root` and its number."""
    parts = []
    for first in networks[::CALL]:
        used = min(CALL, networks.stop - first)
        keys = jax.vmap(partial(jax.random.fold_in, root))(first + jnp.arange(CALL))
        parts.append(jax.tree.map(lambda array, used=used: np.asarray(array)[:used], draw(keys)))
        progress(used)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def sample(
    settings: Settings,
    workdir: Workdir,
    x: np.ndarray,
    *,
    activation: str,
    width: int,
    count: int,
    depths: Sequence[int] = (),
) -> Arrays:
    """Draws networks, or takes those that are kept.

    Args:
      settings: their standard deviations and the seed.
      workdir: where blocks of networks are kept.
      x: inputs, `(m, d)`; computed with in float32.
      activation: `φ`, by name.
      width: of the networks.
      count: how many.
      depths: ascending; empty is the equilibrium.

    Returns:
      `outputs (count, m, OUTPUTS)` and `covariances (count, m, m)`, `h hᵀ/width` of each network;
      with depths, `(count, len(depths), ...)`. NaN where a network came to no equilibrium.

    Raises:
      NoEquilibriumError: most networks have no equilibrium.
    """
    common = {
        "W_std": settings.W_std, "U_std": settings.U_std, "width": width, "activation": activation,
        "x": x.astype(np.float32),
    }  # fmt: skip
    root = jax.random.fold_in(jax.random.key(settings.seed), width)
    root = jax.random.fold_in(root, 1 + len(depths))
    architecture = Architecture(settings.W_std, settings.U_std, 0.0, activation)
    draw = partial(
        _draw, x=common["x"], architecture=architecture, width=width, depths=tuple(depths)
    )
    size = max(1, min(count, BLOCK // width**2))
    blocks: list[Arrays] = []
    name = f"{activation}-width-{width}"
    with progress_bar(total=count, desc=name, unit="network") as bar:
        for start in range(0, count, size):
            stop = min(start + size, count)

            def compute(start=start, stop=stop) -> Arrays:
                outputs, covariances = by_calls(draw, root, range(start, stop), bar.update)
                return {"outputs": outputs, "covariances": covariances}

            inputs = {"seed": settings.seed, "depths": list(depths), "networks": [start, stop]}
            blocks.append(workdir.part(f"{name}-{start}", common | inputs, compute))
            bar.update(stop - bar.n)  # by those that were kept
    drawn = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    missing = np.isnan(drawn["outputs"]).any(axis=tuple(range(1, drawn["outputs"].ndim)))
    if missing.mean() > 0.5:
        raise NoEquilibriumError(
            f"--W_std={settings.W_std} is too large: {missing.sum()} of {count} networks of width "
            f"{width} with {activation} come to no equilibrium; take a smaller one."
        )
    return drawn


def converged(drawn: Arrays) -> Arrays:
    """The networks that came to an equilibrium, in float64."""
    found = ~np.isnan(drawn["outputs"]).any(axis=(1, 2))
    return {name: array[found].astype(np.float64) for name, array in drawn.items()}
