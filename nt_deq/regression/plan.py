"""How a fit is done, and what it will need, decided before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import psutil

from nt_deq.errors import ArgumentError
from nt_deq.regression.layout import Layout
from nt_deq.regression.nystrom import leading_count

_DIRECT = 8192  # inputs up to which a factorisation is the shorter way
_MOST_LANDMARKS = 4000
_TYPICAL_STEPS = 40  # of conjugate gradients, for the estimate of time
_OVERHEAD = 0.5e9  # the process itself: programs, libraries


@dataclass(frozen=True)
class Plan:
    """What a fit does and needs.

    Attributes:
      method: 'cholesky' or 'cg'.
      keep: where the kernel matrix is: 'memory', 'store' or 'nothing'.
      rank: landmarks of the preconditioner.
      memory: bytes of one process, at the most.
      available: bytes that there are.
      disk: bytes in the store.
      flops: of the kernel's products `x·xᵀ` not counted, of everything else.
      seconds: estimated from a timed tile; `None` before it is timed.
      bytes_per_step: that a step of conjugate gradients sends between devices, each.
    """

    method: str
    keep: str
    rank: int
    memory: float
    available: float
    disk: float
    flops: float
    bytes_per_step: float
    seconds: float | None = None

    def __str__(self) -> str:
        """One line for the user."""
        if self.method == "cholesky":
            how = "Cholesky factorisation in place"
        else:
            where = "computed anew" if self.keep == "nothing" else f"in {self.keep}"
            how = f"conjugate gradients with {self.rank} landmarks, the kernel {where}"
        parts = [f"{self.memory / 1e9:.2g} of {self.available / 1e9:.2g} GB memory"]
        if self.disk:
            parts.append(f"{self.disk / 1e9:.2g} GB on disk")
        parts.append(f"{self.flops:.1e} flops")
        if self.bytes_per_step:
            parts.append(f"{self.bytes_per_step / 1e6:.2g} MB a step between devices")
        if self.seconds is not None:
            parts.append(f"about {self.seconds:.0f} s")
        return f"{how}: {', '.join(parts)}"


def available_memory(layout: Layout) -> float:
    """Bytes that this process may take: the accelerators', or the machine's share on a CPU."""
    mine = [d for d in layout.mesh.devices.flat if d.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in mine]
    if all(s and "bytes_limit" in s for s in stats):
        return float(sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats))
    return float(psutil.virtual_memory().available)


def make_plan(
    layout: Layout,
    *,
    method: str,
    keep: str,
    rank: int | None,
    memory: float | None,
    outputs: int,
    inputs_bytes: float,
) -> Plan:
    """Chooses how to fit.

    Args:
      layout: of the kernel matrix.
      method: 'auto', 'cholesky' or 'cg'.
      keep: 'auto', 'memory', 'store' or 'nothing'.
      rank: landmarks, or `None` to choose.
      memory: bytes that the process may take; `None` is what is available.
      outputs: columns of the targets.
      inputs_bytes: size of the training inputs.

    Raises:
      MemoryError: it cannot fit, whatever is left open; the message says what could.
    """
    n, share = layout.n, layout.devices / _processes(layout)
    available = available_memory(layout) if memory is None else float(memory)
    triangle = layout.tiles * (layout.tiles + 1) // 2
    tile = 4.0 * layout.side**2
    base = _OVERHEAD + 2 * inputs_bytes + 8 * share * tile  # a few tiles at work on each device
    vectors = 8.0 * layout.rows * outputs * 8

    if method == "auto":
        direct = base + 8.0 * n * n
        small = n <= _DIRECT and direct <= available and _processes(layout) == 1
        method = "cholesky" if small and keep in ("auto", "memory") else "cg"
    if method == "cholesky":
        if _processes(layout) > 1:
            raise ArgumentError(
                "method='cholesky' runs in one process; take method='cg' on a mesh."
            )
        plan = Plan(method, "memory", 0, base + 8.0 * n * n, available, 0.0, n**3 / 3, 0.0)
        return _checked(plan, "method='cg'")

    per_landmark = 4.0 * layout.rows / _processes(layout)
    vectors += 2 * 2 * per_landmark * leading_count(n)  # in float64, and while they are made
    kept = tile * triangle / _processes(layout)
    if keep == "auto":
        room = base + vectors + kept + per_landmark * min(1000, n)
        keep = "memory" if room <= available else "nothing"
    held = kept if keep == "memory" else 0.0
    if rank is None:
        free = (available - base - vectors - held) / (1.3 * per_landmark)
        rank = int(max(min(n // 8, _MOST_LANDMARKS, free // 500 * 500), min(n, 100)))
    needed = base + vectors + held + 1.3 * per_landmark * rank
    flops = (2.0 * n * n * outputs + 4.0 * n * rank * outputs) * _TYPICAL_STEPS
    flops += 2.0 * n * rank**2
    sent = 0.0 if layout.devices == 1 else bytes_per_step(layout, outputs, rank)
    disk = tile * triangle if keep == "store" else 0.0
    plan = Plan("cg", keep, rank, needed, available, disk, flops, sent)
    return _checked(plan, "a store=directory" if keep == "memory" else "a smaller rank")


def bytes_per_step(layout: Layout, outputs: int, rank: int) -> float:
    """What each device receives in a step of conjugate gradients.

    The direction, in float32, is gathered; its product, in float64, is summed and scattered. What
    the preconditioner projects on the landmarks, in float32, and twice on its leading eigenvectors,
    in float64, is summed for all.
    """
    others = (layout.devices - 1) / layout.devices
    summed = 4.0 * rank + 2 * 8.0 * leading_count(rank)
    return others * outputs * (4.0 * layout.rows + 8.0 * layout.rows + 2 * summed)


def estimate_seconds(
    plan: Plan, layout: Layout, outputs: int, tile_seconds: float, product_seconds: float
) -> float:
    """The time of a fit, from that of a round of tiles and of its product with the vectors."""
    rounds = sum(1 for _ in layout.rounds())
    speed = 2.0 * layout.devices * layout.side**2 * outputs / product_seconds
    if plan.method == "cholesky":
        return rounds * tile_seconds + plan.flops / speed
    step = rounds * product_seconds
    build = rounds * tile_seconds
    times = _TYPICAL_STEPS if plan.keep == "nothing" else 1
    landmarks = plan.rank / layout.side * layout.tiles / layout.devices * tile_seconds
    return times * build + _TYPICAL_STEPS * step + landmarks + 2.0 * layout.n * plan.rank**2 / speed


def _processes(layout: Layout) -> int:
    return len({device.process_index for device in layout.mesh.devices.flat})


def _checked(plan: Plan, remedy: str) -> Plan:
    if plan.memory > plan.available:
        raise MemoryError(
            f"method={plan.method!r} with the kernel in {plan.keep} needs {plan.memory / 1e9:.2f} "
            f"GB and there are {plan.available / 1e9:.2f} GB: take {remedy}, fewer inputs, or, if "
            "there is more than that, memory=BYTES."
        )
    return plan
