"""The memory that there is: of the host, within its control groups' limits, and of devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from nt_deq.regression.layout import Layout

# What a control group may take, has taken, and in its `memory.stat` what of that is but a cache.
_V2 = "memory.max", "memory.current", "inactive_file"
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def host_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may still take of the host's memory.

    Args:
      root: where `proc` and `sys` are.
    """
    return min([float(psutil.virtual_memory().available), *_left_to_groups(root)])


def device_memory(layout: Layout) -> float:
    """Bytes that this process may still take of its devices' memory; of a CPU's, the host's."""
    stats = [device.memory_stats() for device in layout.local_devices]
    if all(s and "bytes_limit" in s for s in stats):
        return float(sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats))
    return host_memory()


def _left_to_groups(root: Path) -> Iterator[float]:
    """What each control group that this process is in, and each one around it, has left."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, names = ("", _V2) if controllers == "" else ("memory", _V1)
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        while group == top or top in group.parents:
            yield from _left_to(group, *names)
            group = group.parent


def _left_to(group: Path, limit: str, used: str, cached: str) -> Iterator[float]:
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = int((group / limit).read_text()) - int((group / used).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return
    yield float(max(free, 0) + int(stat.get(cached, 0)))
