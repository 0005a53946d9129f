"""What imports cost, beside what they stand on, each in a new process; they alternate."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

# `import nt_deq` makes neural-tangents importable on a current JAX, and costs next to nothing.
STATEMENTS = {
    "jax": "import jax",
    "nt_deq": "import nt_deq, jax",
    "neural_tangents": "import nt_deq, neural_tangents",
    "stax": "from nt_deq import stax",
    "nt-deq --help": "from nt_deq.cli import main; main(['--help'])",
}
LIMITS = [("nt_deq", "jax", 1.3), ("stax", "neural_tangents", 1.5)]
ROUNDS = 7


def seconds(statement: str) -> float:
    """Wall time of a new interpreter that does nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints the median time of each process, and the medians of the ratios beside their limits."""
    for statement in STATEMENTS.values():
        seconds(statement)  # leaves bytecode and a warm file cache
    rounds = [{name: seconds(s) for name, s in STATEMENTS.items()} for _ in range(ROUNDS)]
    for name, statement in STATEMENTS.items():
        print(f"{statement:48} {statistics.median(r[name] for r in rounds):6.2f} s")
    for name, base, limit in LIMITS:
        ratio = statistics.median(r[name] / r[base] for r in rounds)
        print(f"{name + ' / ' + base:48} {ratio:6.2f}, at most {limit}")


if __name__ == "__main__":
    main()
