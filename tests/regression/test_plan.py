"""How a fit is planned: by the memory of the host, in its control groups, and of the devices."""

import types

import jax
import numpy as np
import psutil
import pytest

from nt_deq import KernelRegression
from nt_deq.regression import plan
from nt_deq.regression.layout import Layout
from nt_deq.regression.memory import device_memory, host_memory
from nt_deq.regression.plan import make_plan


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 64 GB free, and its control groups; the function makes one."""
    free = types.SimpleNamespace(available=64 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    return tmp_path, write


def test_memory_without_control_groups(machine):
    assert host_memory(machine[0]) == 64e9


def test_memory_of_a_control_group_and_of_those_around_it(machine):
    root, write = machine
    write("proc/self/cgroup", "0::/job/step")
    for group, limit, used, cached in (
        ("job/step", "max", 3 * 10**9, 0),
        ("job", 10 * 10**9, 7 * 10**9, 2 * 10**9),
    ):
        write(f"sys/fs/cgroup/{group}/memory.max", limit)
        write(f"sys/fs/cgroup/{group}/memory.current", used)
        write(f"sys/fs/cgroup/{group}/memory.stat", f"anon 5\ninactive_file {cached}")
    assert host_memory(root) == 5e9


def test_memory_of_a_control_group_of_the_first_version(machine):
    root, write = machine
    write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n0::/")
    write("sys/fs/cgroup/memory/x/memory.limit_in_bytes", 4 * 10**9)
    write("sys/fs/cgroup/memory/x/memory.usage_in_bytes", 10**9)
    write("sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 500000000")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", 2**63 - 4096)  # none
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", 10**9)
    write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0")
    assert host_memory(root) == 3.5e9


def layout_of(n, platform):
    """A layout as of one device of a platform that is not there."""
    layout = Layout(n)
    stats = {"bytes_limit": 80 * 10**9, "bytes_in_use": 10**9}
    device = types.SimpleNamespace(
        platform=platform,
        process_index=0,
        memory_stats=lambda: stats if platform == "gpu" else None,
    )
    devices = np.array([device])
    vars(layout)["mesh"] = types.SimpleNamespace(devices=devices)
    return layout


@pytest.mark.usefixtures("unchecked")
def test_a_device_has_memory_of_its_own(monkeypatch):
    """A factor is made by the host, and tiles are on the device: neither takes the other's."""
    common = dict(rank=None, memory=None, outputs=10, inputs_bytes=1e8)
    monkeypatch.setattr(plan, "host_memory", lambda: 4e9)
    gpu, cpu = (layout_of(60_000, platform) for platform in ("gpu", "cpu"))
    assert device_memory(gpu) == 79e9
    found = make_plan(gpu, method="auto", keep="auto", **common)
    assert (found.method, found.keep) == ("cg", "memory")
    assert found.memory < 1e9 < 7e9 < found.device_memory
    assert "of 79 GB on the devices" in str(found)
    monkeypatch.setattr(plan, "device_memory", lambda layout: 4e9)
    assert make_plan(cpu, method="auto", keep="auto", **common).keep == "nothing"
    with pytest.raises(MemoryError, match=r"needs 29.* GB of memory and there are 4.00"):
        make_plan(gpu, method="cholesky", keep="auto", **common)
    with pytest.raises(MemoryError, match=r"on the devices and there are 4.00"):
        make_plan(gpu, method="cg", keep="memory", **common)


def test_the_default_device_computes():
    last = jax.local_devices()[-1]
    with jax.default_device(last):
        assert list(Layout(10).mesh.devices.flat) == [last]
    assert list(Layout(10).mesh.devices.flat) == [jax.local_devices()[0]]


def test_numbers_that_overflow_are_no_solution():
    def kernel_fn(x1, x2, get):
        return x1 @ (x1 if x2 is None else x2).T + 1.0

    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    model = KernelRegression(kernel_fn, relative_noise=1e-2, method="cg", progress=False)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan"):
        model.fit(x, np.full(60, 1e300))
