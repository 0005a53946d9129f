"""A finite DEQ, forward and with its gradient, beside torchdeq 0.1.0 on one core of the CPU.

`z* = W_std/√n · φ(z*) W + U_std/√d · x U`: the same float32 weights and inputs, the same relative
tolerance of every sample, forward and backward; implicit gradients in `W` and `U` on both sides.
The methods take turns; a time is the least of the rounds, of the processor and not of the wall, so
that what else runs on the machine counts for little. Memory is what one gradient adds at its peak,
in a process of its own.

torch and torchdeq are not among the project's dependencies: without them our side runs alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import linear_call

import nt_deq
from benchmarks import _measure
from experiments.lib import report
from experiments.lib.report import BLUE, GREEN, ORANGE, RED, figure_style

try:
    import torch
    import torchdeq
except ImportError:
    torch = torchdeq = None

INSTALL = ".venv/bin/uv pip install torch torchdeq==0.1.0   (--torch-backend=cpu: without CUDA)"

SIZES = ((256, 64), (256, 512), (1024, 64), (1024, 512))  # width, batch
ACTIVATIONS = ("relu", "tanh")
FEATURES, W_STD = 784, 0.6
TOLERANCE = 32 * float(jnp.finfo(jnp.float32).eps)  # of |f(z) - z| / |f(z)|; our default
ROUNDS = 6  # the first of which is a warm-up
OURS = "nt_deq"
SOLVERS = ("fixed_point_iter", "anderson", "broyden")  # torchdeq's
COLORS = dict(zip((OURS, *SOLVERS), (BLUE, ORANGE, GREEN, RED), strict=True))
PASSES = {"forward": "forward_seconds", "forward and backward": "gradient_seconds"}
LARGEST_ERROR = 1e-4  # of a gradient, relatively
Counts = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """Weights `W` `(n, n)`, `U` `(d, n)` of variance 1 and inputs `x`, `(batch, d)`."""

    activation: str
    W: np.ndarray
    U: np.ndarray
    x: np.ndarray

    @classmethod
    def draw(cls, activation: str, width: int, batch: int) -> Problem:
        """Draws from the standard normal distribution."""
        rng = np.random.default_rng(0)
        shapes = ((width, width), (FEATURES, width), (batch, FEATURES))
        return cls(activation, *(rng.normal(size=s).astype(np.float32) for s in shapes))


@dataclass(frozen=True)
class Method:
    """What one side does with a problem.

    Attributes:
      forward: computes `φ(z*)`, `(batch, n)`.
      gradient: computes the gradient of `½ Σ φ(z*)² / batch` in `(W, U)`, forward pass included.
      compile_seconds: what both took to compile.
      count: how often `gradient` applies the layer and its transposed Jacobian.
    """

    forward: Callable[[], Any]
    gradient: Callable[[], tuple[Any, Any]]
    compile_seconds: float
    count: Callable[[], Counts]


def ours(problem: Problem) -> Method:
    """`nt_deq.flax.DEQ`, as it comes, under `jax.jit`."""
    width = problem.W.shape[0]
    activation = nt_deq.activations.ACTIVATIONS[problem.activation]
    x = jnp.asarray(problem.x)

    def model(activation):
        deq = nt_deq.flax.DEQ(FEATURES, width, W_std=W_STD, activation=activation, rngs=nnx.Rngs(0))
        deq.hidden.W[...], deq.inject.W[...] = jnp.asarray(problem.W), jnp.asarray(problem.U)
        return nt_deq.flax.functional(deq)

    def loss(apply_fn):
        return lambda params, x: jnp.sum(apply_fn(params, x) ** 2) / 2 / len(x)

    apply_fn, params = model(activation)
    start = time.process_time()
    forward = jax.jit(apply_fn).lower(params, x).compile()
    gradient = jax.jit(jax.grad(loss(apply_fn))).lower(params, x).compile()
    compile_seconds = time.process_time() - start

    def count():
        counts = {"forward": 0, "backward": 0}
        apply_fn, params = model(dataclasses.replace(activation, fn=_probed(activation.fn, counts)))
        jax.block_until_ready(jax.jit(jax.grad(loss(apply_fn)))(params, x))
        jax.effects_barrier()
        return counts

    return Method(
        lambda: jax.block_until_ready(forward(params, x)),
        lambda: tuple(jax.tree.leaves(jax.block_until_ready(gradient(params, x)))),
        compile_seconds,
        count,
    )


def _probed(fn: Callable, counts: Counts) -> Callable:
    """`fn`, telling `counts` of every evaluation, and of every one of its transposed derivative."""

    def tell(name):
        def add():
            counts[name] += 1

        jax.debug.callback(add)

    def transposed(_, cotangent):
        tell("backward")
        return cotangent

    @jax.custom_jvp
    def probe(z):
        tell("forward")
        return z

    @probe.defjvp
    def probe_jvp(primals, tangents):
        return probe(*primals), linear_call(lambda _, t: t, transposed, (), *tangents)

    return lambda z: fn(probe(z))


def theirs(problem: Problem, solver: str) -> Method:
    """One of the solvers of torchdeq, with its exact implicit gradient, `ift=True`."""
    phi = {"relu": torch.relu, "tanh": torch.tanh}[problem.activation]
    W, U, x = (torch.tensor(a) for a in (problem.W, problem.U, problem.x))
    W.requires_grad_()
    U.requires_grad_()
    deq = torchdeq.get_deq(
        f_solver=solver,
        b_solver=solver,
        ift=True,
        f_tol=TOLERANCE,
        b_tol=TOLERANCE,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )

    def output(probe=lambda z: z):
        A = W_STD / math.sqrt(len(W)) * W
        u = x @ U / math.sqrt(FEATURES)
        states, _ = deq(lambda z: torch.addmm(u, phi(probe(z)), A), torch.zeros_like(u))
        return phi(states[-1])

    @torch.no_grad()
    def forward():
        deq.eval()
        return output()

    def gradient(probe=lambda z: z):
        deq.train()
        loss = (output(probe) ** 2).sum() / 2 / len(x)
        return torch.autograd.grad(loss, (W, U))

    def count():
        counts = {"forward": 0, "backward": 0}

        class Probe(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z):
                counts["forward"] += 1
                return z.clone()

            @staticmethod
            def backward(ctx, cotangent):
                counts["backward"] += 1
                return cotangent

        gradient(Probe.apply)
        return counts

    return Method(forward, gradient, 0.0, count)


def methods(problem: Problem) -> dict[str, Method]:
    """All that can run here, by name."""
    return {OURS: ours(problem)} | {s: theirs(problem, s) for s in SOLVERS if torch is not None}


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least processor time of each call, which take turns."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            least[name] = min(least[name], time.process_time() - start)
    return least


def exact_gradient(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The same gradient in float64, by plain iteration of `z` and of its adjoint."""
    phi, derivative = {
        "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
        "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    }[problem.activation]
    W, U, x = (a.astype(float) for a in (problem.W, problem.U, problem.x))
    scale = W_STD / math.sqrt(len(W))
    A, u = scale * W, x @ U / math.sqrt(FEATURES)

    def fixed_point(f, z):
        while np.linalg.norm((new := f(z)) - z) > 1e-12 * np.linalg.norm(z):
            z = new
        return new

    z = fixed_point(lambda z: phi(z) @ A + u, u)
    d = derivative(z)
    cotangent = phi(z) * d / len(x)
    v = fixed_point(lambda v: v @ A.T * d + cotangent, cotangent)
    return scale * phi(z).T @ v, x.T @ v / math.sqrt(FEATURES)


def relative_error(arrays: Any, exact: Any) -> float:
    """The largest error, relative to the largest entry of its array."""
    pairs = [(np.asarray(a), np.asarray(e)) for a, e in zip(arrays, exact, strict=True)]
    return max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in pairs)


def peak_memory(name: str, width: int, batch: int) -> float:
    """MiB that one gradient adds at its peak, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.equilibrium", name, str(width), str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak_memory(name: str, width: str, batch: str) -> None:
    """What `peak_memory` runs."""
    problem = Problem.draw("relu", int(width), int(batch))
    build = ours if name == OURS else functools.partial(theirs, solver=name)
    build(Problem.draw("relu", 8, 2)).gradient()  # loads what is loaded late
    method = build(problem)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    before = _status("VmRSS")
    method.gradient()
    print(_status("VmHWM") - before)


def _status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[name].split()[0]) / 1024


def measure(activation: str, width: int, batch: int) -> list[dict[str, Any]]:
    """Returns the figures of each method, ours first."""
    problem = Problem.draw(activation, width, batch)
    exact = exact_gradient(problem)
    sides = methods(problem)
    errors = {name: relative_error(side.gradient(), exact) for name, side in sides.items()}
    for name, error in errors.items():
        if error > LARGEST_ERROR:
            raise SystemExit(f"{name}: its gradient is off by {error:.1e}: its time means nothing.")
    forward = seconds({name: side.forward for name, side in sides.items()})
    gradient = seconds({name: side.gradient for name, side in sides.items()})
    return [
        {
            "activation": activation,
            "width": width,
            "batch": batch,
            "method": name,
            "compile_seconds": side.compile_seconds,
            "forward_seconds": forward[name],
            "gradient_seconds": gradient[name],
            "layers": side.count(),
            "gradient_error": errors[name],
        }
        for name, side in sides.items()
    ]


HEADER = ("compile s", "forward ms", "× ours", "with gradient ms", "× ours", "layers", "error")


def table(rows: list[dict[str, Any]]) -> str:
    """One problem's figures; layers are those forward and their transposed Jacobians."""
    first = rows[0]
    title = f"{first['activation']}, width {first['width']}, batch {first['batch']}"
    cells = [
        (
            r["method"],
            f"{r['compile_seconds']:.2f}",
            f"{1e3 * r['forward_seconds']:.2f}",
            f"{r['forward_seconds'] / first['forward_seconds']:.2f}",
            f"{1e3 * r['gradient_seconds']:.2f}",
            f"{r['gradient_seconds'] / first['gradient_seconds']:.2f}",
            f"{r['layers']['forward']} + {r['layers']['backward']}",
            f"{r['gradient_error']:.0e}",
        )
        for r in rows
    ]
    return report.table((title, *HEADER), cells)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws how many times longer than ours every method takes."""
    names = list(dict.fromkeys(r["method"] for r in rows))
    with figure_style() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), sharey=True)
        for activation, axis_row in zip(ACTIVATIONS, axes, strict=True):
            mine = [r for r in rows if r["activation"] == activation]
            of = {name: [r for r in mine if r["method"] == name] for name in names}
            for (title, key), axis in zip(PASSES.items(), axis_row, strict=True):
                for i, name in enumerate(names):
                    ratios = [r[key] / b[key] for r, b in zip(of[name], of[OURS], strict=True)]
                    x = np.arange(len(SIZES)) + (i - (len(names) - 1) / 2) * 0.2
                    label = name if name == OURS else f"torchdeq, {name}"
                    bars = axis.bar(x, ratios, 0.18, color=COLORS[name], label=label)
                    texts = [f"{1e3 * r[key]:.{int(r[key] < 0.1)}f}" for r in of[name]]
                    axis.bar_label(bars, texts, fontsize=7)
                axis.set_yscale("log", subs=())
                axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
                axis.set_xticks(range(len(SIZES)), [f"width {w}\nbatch {b}" for w, b in SIZES])
                axis.grid(axis="x", visible=False)
                axis.set_title(f"{activation}: {title}")
        for axis in axes[:, 0]:
            axis.set_ylabel("time / time of nt_deq")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
        figure.suptitle(
            "The equilibrium of a finite network and its implicit gradient, on one core "
            "(on the bars: milliseconds)"
        )
        figure.savefig(file, dpi=120)


def main() -> None:
    """Measures every problem, prints tables, and writes JSON and the figure."""
    if hasattr(os, "sched_setaffinity"):  # before XLA counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if torch is None:
        print(f"torchdeq is not installed, so nt_deq runs alone. To install it: {INSTALL}\n")
    else:
        torch.set_num_threads(1)
    rows = []
    for activation in ACTIVATIONS:
        for size in SIZES:
            problem = measure(activation, *size)
            print(table(problem), end="\n\n", flush=True)
            rows += problem
    if Path("/proc/self/clear_refs").exists():
        names = list(dict.fromkeys(r["method"] for r in rows))
        memory = {(n, *size): peak_memory(n, *size) for size in SIZES for n in names}
        for r in rows:
            r["peak_mib"] = memory[r["method"], r["width"], r["batch"]]
        cells = [
            [f"width {w}, batch {b}", *(f"{memory[n, w, b]:.1f}" for n in names)] for w, b in SIZES
        ]
        print(report.table(["peak memory, MiB", *names], cells), end="\n\n")
    written = _measure.write("equilibrium", rows)
    draw(rows, written.with_suffix(".png"))
    print(f"{written}, and the figure beside it")


if __name__ == "__main__":
    print_peak_memory(*sys.argv[1:]) if sys.argv[1:] else main()
