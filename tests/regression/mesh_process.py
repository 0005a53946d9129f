"""One process of the tests of meshes, `mesh_process.py TASK ...`: see test_kernel_regression.py."""

# A model does not tell which solver it has.
# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false

import os
import re
import signal
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from nt_deq import KernelRegression, stax
from nt_deq._jax import enable_x64
from nt_deq.regression import layout
from nt_deq.regression.store import Store


def fit(**options):
    layout._SIDE = 48
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    kernel_fn = stax.serial(stax.Dense(1, 1.5, 0.2), stax.Erf(), stax.Dense(1))[2]
    options = dict(method="cg", relative_residual=1e-7, rank=40, progress=False) | options
    return KernelRegression(kernel_fn, "ntk", 1e-3, **options).fit(x, np.sin(x[:, :2]))


def die_after(tiles):
    write = Store.write
    written = []

    def counted(self, *args):
        write(self, *args)
        written.append(args[:2])
        if len(written) == tiles:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    Store.write = counted


def save(path, found):
    if jax.process_index() == 0:
        np.save(path, found.predict(np.ones((4, 6), np.float32) * np.arange(4)[:, None]))


def received(fn, *args):
    """Bytes that each device receives in a compiled program, as XLA's rings pass them."""
    program = fn.__wrapped__.lower(*args).compile().as_text()
    pattern = r"= f(\d+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter)\("
    devices, total = jax.device_count(), 0.0
    for bits, shape, kind in re.findall(pattern, program):
        size = int(bits) / 8 * np.prod([int(n) for n in shape.split(",") if n])
        passes = {"all-gather": 1, "all-reduce": 2, "reduce-scatter": devices}[kind]
        total += passes * size * (devices - 1) / devices
    return total


def communication():
    """Of a step of conjugate gradients: as planned, and in the compiled programs."""
    found = fit(mesh=Mesh(np.array(jax.devices()), ("x",)), keep="memory")
    cut, v = found._kernel.layout, found._kernel.layout.vector(found.coefficients_)
    precondition = found._solver.precondition
    with enable_x64(True):
        counted = received(layout._replicate, v.astype("float32"), cut.replicated)
        counted += received(cut.sum, cut.zeros(v.shape[1]))
        counted += received(precondition.solve, precondition.approximation, v)
    print(found.plan_.bytes_per_step, counted)


def main(task, *args):
    if task in ("store", "killed"):
        if task == "killed":
            die_after(5)
        save(args[1], fit(store=args[0]))
    elif task == "mesh":
        save(args[0], fit(mesh=Mesh(np.array(jax.devices()), ("x",))))
    elif task == "communication":
        communication()
    else:
        process, count, port, store, result = args
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", int(count), int(process), heartbeat_timeout_seconds=10
        )
        if task == "local":  # only the first fits, on its own devices, into a store
            devices = np.array(jax.local_devices())  # which all processes find together
            if process == "0":
                mesh = Mesh(devices, ("x",))
                save(result, fit(store=store, mesh=mesh))
                save(result, fit(keep="memory"))
            return
        if task == "lost" and process == str(int(count) - 1):
            die_after(3)
        found = fit(store=store, mesh=Mesh(np.array(jax.devices()), ("x",)))
        x = np.ones((4, 6), np.float32) * np.arange(4)[:, None]
        predicted = found.predict(x)
        if process == "0":
            np.save(result, predicted)


if __name__ == "__main__":
    main(*sys.argv[1:])
