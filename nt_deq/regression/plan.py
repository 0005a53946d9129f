"""How a fit is done, and what it will need, decided before it starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nt_deq.errors import ArgumentError
from nt_deq.regression.layout import Layout
from nt_deq.regression.memory import device_memory, host_memory
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
      rank: landmarks of the preconditioner, at most.
      memory: bytes of one process' host memory, at the most; on a CPU, its devices' too.
      available: bytes that there are of it.
      device_memory: bytes on the devices of one process, at the most; on a CPU they are counted
        with the host's.
      device_available: bytes that there are of it.
      disk: bytes in the store.
      flops: of the kernel's products `x·xᵀ` not counted, of everything else.
      bytes_per_step: that a step of conjugate gradients sends between devices, each.
      seconds: estimated from a timed tile; `None` where it is not timed, of few inputs.
    """

    method: str
    keep: str
    rank: int
    memory: float
    available: float
    device_memory: float
    device_available: float
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
        parts = [f"{_of(self.memory, self.available)} memory"]
        if self.device_memory:
            parts.append(f"{_of(self.device_memory, self.device_available)} on the devices")
        if self.disk:
            parts.append(f"{self.disk / 1e9:.2g} GB on disk")
        parts.append(f"{self.flops:.1e} flops")
        if self.bytes_per_step:
            parts.append(f"{self.bytes_per_step / 1e6:.2g} MB a step between devices")
        if self.seconds is not None:
            parts.append(f"about {self.seconds:.0f} s")
        return f"{how}: {', '.join(parts)}"


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
      memory: bytes that the process may take of the host's memory and of its devices'; `None` is
        what is available of each.
      outputs: columns of the targets.
      inputs_bytes: size of the training inputs.

    Raises:
      MemoryError: it cannot fit, whatever is left open; the message says what could.
    """
    n, processes = layout.n, len(layout.processes)
    is_host = layout.mesh.devices.flat[0].platform == "cpu"  # the devices have its memory
    available = host_memory() if memory is None else float(memory)
    device_available = device_memory(layout) if memory is None else float(memory)
    tile = 4.0 * layout.side**2
    host = _OVERHEAD + 2 * inputs_bytes
    device = 8 * tile * layout.devices / processes  # a few tiles at work on each

    def planned(method, keep, rank, host, device, **others):
        both = (host + device, 0.0) if is_host else (host, device)
        plan = Plan(method, keep, rank, both[0], available, both[1], device_available, **others)
        return _checked(plan)

    if method == "auto":
        fits = host + 8.0 * n * n + device * is_host <= available
        small = n <= _DIRECT and fits and processes == 1
        method = "cholesky" if small and keep in ("auto", "memory") else "cg"
    if method == "cholesky":
        if processes > 1:
            raise ArgumentError(
                "method='cholesky' runs in one process; take method='cg' on a mesh."
            )
        return planned(
            method, "memory", 0, host + 8.0 * n * n, device,
            disk=0.0, flops=n**3 / 3, bytes_per_step=0.0,
        )  # fmt: skip

    per_landmark = 4.0 * layout.rows / processes
    device += 8.0 * layout.rows * outputs * 8
    device += 2 * 2 * per_landmark * leading_count(n)  # in float64, and while they are made
    kept = tile * layout.triangle / processes
    free = (available - host if is_host else device_available) - device
    if keep == "auto":
        keep = "memory" if kept + per_landmark * min(1000, n) <= free else "nothing"
    held = kept if keep == "memory" else 0.0
    if rank is None:
        most = (free - held) / (1.3 * per_landmark)
        rank = int(max(min(n // 8, _MOST_LANDMARKS, most // 500 * 500), min(n, 100)))
    flops = (2.0 * n * n * outputs + 4.0 * n * rank * outputs) * _TYPICAL_STEPS
    return planned(
        method, keep, rank, host, device + held + 1.3 * per_landmark * rank,
        disk=tile * layout.triangle if keep == "store" else 0.0,
        flops=flops + 2.0 * n * rank**2,
        bytes_per_step=0.0 if layout.devices == 1 else bytes_per_step(layout, outputs, rank),
    )  # fmt: skip


def room_for_tiles(plan: Plan, layout: Layout, itemsize: int) -> bool:
    """Whether another triangle of tiles, of so many bytes an entry, fits beside what is planned."""
    tiles = float(itemsize) * layout.side**2 * layout.triangle / len(layout.processes)
    if plan.device_memory:
        return plan.device_memory + tiles <= plan.device_available
    return plan.memory + tiles <= plan.available


def bytes_per_step(layout: Layout, outputs: int, rank: int) -> float:
    """What each device receives in a step of conjugate gradients.

    The direction, in float32, is gathered; its product, in float64, is summed and scattered. What
    the preconditioner projects on the landmarks, in float32, and twice on its leading eigenvectors,
    in float64, is summed for all.
    """
    others = (layout.devices - 1) / layout.devices
    summed = 4.0 * rank + 2 * 8.0 * leading_count(rank)
    return others * outputs * (4.0 * layout.rows + 8.0 * layout.rows + 2 * summed)


def with_seconds(
    plan: Plan, layout: Layout, outputs: int, tile_seconds: float, product_seconds: float
) -> Plan:
    """Adds the time of a fit, from that of a round of tiles and of its product with the vectors."""
    rounds = sum(1 for _ in layout.rounds())
    speed = 2.0 * layout.devices * layout.side**2 * outputs / product_seconds
    if plan.method == "cholesky":
        return dataclasses.replace(plan, seconds=rounds * tile_seconds + plan.flops / speed)
    step = rounds * product_seconds
    build = rounds * tile_seconds
    times = _TYPICAL_STEPS if plan.keep == "nothing" else 1
    landmarks = plan.rank / layout.side * layout.tiles / layout.devices * tile_seconds
    landmarks += 2.0 * layout.n * plan.rank**2 / speed
    seconds = times * build + _TYPICAL_STEPS * step + landmarks
    return dataclasses.replace(plan, seconds=seconds)


def _of(needed: float, available: float) -> str:
    return f"{needed / 1e9:.2g} of {available / 1e9:.2g} GB"


def _checked(plan: Plan) -> Plan:
    """Raises where a plan needs more than there is."""
    if plan.method == "cholesky":
        remedy = "method='cg'"
    else:
        remedy = "a store=directory" if plan.keep == "memory" else "a smaller rank"
    for needed, available, where in (
        (plan.memory, plan.available, "of memory"),
        (plan.device_memory, plan.device_available, "on the devices"),
    ):
        if needed > available:
            raise MemoryError(
                f"method={plan.method!r} with the kernel in {plan.keep} needs {needed / 1e9:.2f} "
                f"GB {where} and there are {available / 1e9:.2f} GB: take {remedy}, fewer inputs, "
                "or, if there is more than that, memory=BYTES."
            )
    return plan
