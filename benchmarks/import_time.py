"""`import nt_deq` beside `import jax, flax`, in new processes that alternate."""

from __future__ import annotations

import statistics
import subprocess
import sys

STATEMENTS = {"jax, flax": "import jax, flax", "nt_deq": "import nt_deq"}
ROUNDS = 7


def seconds(statement: str) -> float:
    """Wall time of one statement in a new interpreter, without the interpreter's own start."""
    program = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    """Prints the median time of each import and the median of their ratios."""
    for statement in STATEMENTS.values():
        seconds(statement)  # leaves bytecode and a warm file cache
    rounds = [{name: seconds(s) for name, s in STATEMENTS.items()} for _ in range(ROUNDS)]
    for name in STATEMENTS:
        print(f"import {name:10} {statistics.median(r[name] for r in rounds):6.2f} s")
    ratio = statistics.median(r["nt_deq"] / r["jax, flax"] for r in rounds)
    print(f"ratio             {ratio:6.2f}")


if __name__ == "__main__":
    main()
