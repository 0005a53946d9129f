"""How launchers start and end, what they keep, and the tables and fits of their reports."""

import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
from launching import start

from experiments.claims import compare, dynamics, gaussianity, generalization, spectrum
from experiments.lib import launch
from experiments.lib.report import fit_power_law, table
from experiments.lib.workdir import Workdir
from experiments.train import classifier
from nt_deq.errors import InputError

JOB = """
import dataclasses, subprocess, sys
from experiments.lib import launch
@dataclasses.dataclass(frozen=True)
class Settings(launch.Settings):
    a: int = launch.flag(1, "a")
    b: int = launch.flag(2, "b")
    c: tuple[int, ...] = launch.flag((3, 4), "c")
def job(settings, workdir):
    print(settings.a, settings.b, settings.c, flush=True)
    {}
launch.main(Settings, job, {{"a": 10, "b": 20}})
"""


@dataclass(frozen=True)
class Bounded(launch.Settings):
    n: int = launch.flag(3, "", at_least=2, at_most=9)
    x: float | None = launch.flag(None, "", above=0, below=1.5)
    widths: tuple[int, ...] = launch.flag((1, 2, 3), "", at_least=1, different=3)
    kind: str = launch.flag("a", "", one_of={"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (Bounded, {"n": 1}, "--n=1 is too small: it must be at least 2."),
        (Bounded, {"n": 10}, "--n=10 is too large: it must be at most 9."),
        (Bounded, {"x": 0.0}, "--x=0.0 is too small: it must be above 0."),
        (Bounded, {"x": 1.5}, "--x=1.5 is too large: it must be below 1.5."),
        (Bounded, {"x": float("nan")}, "--x=nan is not a finite number."),
        (Bounded, {"widths": (4, 5, 0)}, "--widths=4,5,0 is too small"),
        (Bounded, {"widths": ()}, "--widths= must be at least 3 different numbers"),
        (Bounded, {"widths": (4, 5)}, "--widths=4,5 must be at least 3 different numbers"),
        (Bounded, {"widths": (4, 5, 6, 4)}, "--widths=4,5,6,4 must be at least 3 different"),
        (Bounded, {"kind": "c"}, "--kind=c is unknown: use one of a, b."),
        (spectrum.Settings, {"counts": ()}, "--counts= must be at least 1 different numbers"),
        (compare.Settings, {"widths": (64,)}, "--widths=64 must be at least 2 different"),
        (compare.Settings, {"activation": "swish"}, "--activation=swish is unknown"),
        (compare.Settings, {"data_dir": "x"}, "--data_dir=x is for --data=mnist alone"),
        (dynamics.Settings, {"ntk_inputs": 65}, "--ntk_inputs=65 is too large"),
        (gaussianity.Settings, {"networks": 50, "inputs_count": 30}, "--networks=50 is too small"),
        (generalization.Settings, {"network_counts": (70,)}, "70 is not among --counts"),
        (generalization.Settings, {"W_std": 1.5}, "--W_std=1.5 is too large"),
        (classifier.Settings, {"n_train": 50, "batch_size": 51}, "there are --n_train=50"),
        (classifier.Settings, {"warmup_steps": 220}, "is too large: there are 220 steps"),
        (classifier.Settings, {"network": "rnn"}, "--network=rnn is unknown: use one of dense"),
        (classifier.Settings, {"lipschitz": 1.0}, "--lipschitz=1.0 is too large"),
        (classifier.Settings, {"shift": 1}, "--shift=1 is for --network=conv alone"),
    ],
)
def test_settings_that_cannot_be_right(settings, flags, message):
    with pytest.raises(InputError) as error:
        settings(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_gives_way_to_flags(tmp_path):
    process = start("-c" + JOB.format(""), f"--workdir={tmp_path}", "--config=full", "--a=5")
    assert process.communicate(timeout=60) == ("5 20 (3, 4)\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(("--a=many",), "--a=many", marks=pytest.mark.slow),
        pytest.param(("--a=5",), "--workdir is missing", marks=pytest.mark.slow),
        (("--workdir=out/unused", "--c=64,wide"), "--c=64,wide must be integers"),
    ],
)
def test_bad_flags_end_it_with_one_line(flags, message):
    process = start("-c" + JOB.format(""), *flags)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_one_process_in_a_directory(tmp_path):
    command = "-c" + JOB.format("input()"), f"--workdir={tmp_path}"
    first = start(*command)
    assert first.stdout.readline() == "1 2 (3, 4)\n"
    second = start(*command)
    assert second.communicate(timeout=60)[1] == (
        f"error: --workdir={tmp_path} is in use by process {first.pid}: wait until it ends, or "
        "name another directory.\n"
    )
    assert first.communicate("\n", timeout=60)[1] == ""
    assert (first.returncode, second.returncode) == (0, 1)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_ends_it_and_what_it_has_started(tmp_path, number):
    child = 'subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])'
    process = start("-c" + JOB.format(child), f"--workdir={tmp_path}")
    assert process.stdout.readline() == "1 2 (3, 4)\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # until the child has let go of its output, too
    assert process.returncode == 128 + number
    assert err == f"Interrupted. Kept in {tmp_path}: nothing yet; the same command goes on there.\n"


@pytest.mark.slow
def test_signals_keep_what_is_finished(tmp_path):
    flags = ("--n_train=16", "--n_test=20", "--widths=16,32", "--seeds=3", "--steps=1000000")
    process = start("claims.compare", f"--workdir={tmp_path}", *flags)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("parts/infinite.*.npz")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert f"Interrupted. Kept in {tmp_path}: infinite; the same command" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("parts/.*"))


def test_parts_are_kept_by_all_that_they_depend_on(tmp_path):
    calls = []

    def part(**inputs):
        def compute():
            calls.append(inputs)
            return {"a": np.arange(3.0)}

        np.testing.assert_array_equal(Workdir(tmp_path).part("p", inputs, compute)["a"], [0, 1, 2])
        return len(calls)

    array = np.ones((2, 3))
    assert part(x=array, n=1) == 1
    assert part(n=1, x=array.copy()) == 1
    for i, other in enumerate(({"x": array, "n": 2}, {"x": array.T, "n": 1}, {"x": 1.0, "n": 1})):
        assert part(**other) == 2 + i


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def compute():
        raise KeyboardInterrupt

    workdir = Workdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        workdir.part("part", {}, compute)
    assert workdir.kept == []
    assert not list(tmp_path.glob("parts/*"))


def test_a_power_law_is_fitted_with_its_error():
    x = np.repeat([10.0, 100.0, 1000.0], 20)
    noise = np.random.default_rng(0).normal(size=x.size) * 0.1
    fit = fit_power_law(x, 3 * x**-0.5 * np.exp(noise))
    assert fit.low < -0.5 < fit.high
    # The textbook's standard error of a slope: σ / √Σ (x - mean)².
    assert fit.standard_error == pytest.approx(0.1 / (np.log(x).std() * np.sqrt(x.size)), rel=0.3)
    np.testing.assert_allclose(fit(100), 0.3, rtol=0.1)
    assert str(fit).startswith("−0.")


def test_tables():
    assert table(("a", "bb"), [["long", "1"], ["x", "22"]]).splitlines() == [
        "| a    |  bb |",
        "| ---- | --: |",
        "| long |   1 |",
        "| x    |  22 |",
    ]
