"""What the benchmarks measure with: programs compiled once, timed in turns."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# Most of the memory of this machine, in bytes.
MEMORY = 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Program:
    """A compiled function of fixed arguments.

    Attributes:
      compile: seconds that tracing and compiling took.
      bytes: the most that its outputs and temporaries take, by XLA's own account.
      run: seconds of its fastest call so far.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    compile: float
    bytes: int
    run: float = float("inf")

    def __call__(self) -> Any:
        """Runs it and keeps the time if it is the least."""
        start = time.perf_counter()
        out = jax.block_until_ready(self.fn(*self.args))
        self.run = min(self.run, time.perf_counter() - start)
        return out


def build(fn: Callable[..., Any], *args: Any) -> Program:
    """Compiles `fn(*args)`."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return Program(compiled, args, seconds, memory.output_size_in_bytes + memory.temp_size_in_bytes)


def take_turns(programs: Mapping[str, Program], budget: float = 20.0, most: int = 15) -> None:
    """Runs all programs in turn, so that what disturbs the machine disturbs all of them.

    One that needs more memory than there is does not run, and its time stays infinite.

    Args:
      programs: they keep their least times.
      budget: seconds after which no new round starts; there are at least two, but for a program
        that takes the budget by itself.
      most: rounds at most.
    """
    start = time.perf_counter()
    for done in range(most):
        if done >= 2 and time.perf_counter() - start > budget:
            return
        for program in programs.values():
            if program.bytes < MEMORY and (done == 0 or program.run < budget):
                program()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows and machine to `out/benchmarks/<name>.json`."""
    path = ROOT / "out" / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1) + "\n")
    return path
