"""The command `nt-deq`: what it computes is what the package does, and how it fails."""

import importlib
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from marks import slow_except

import nt_deq
from nt_deq import nt, stax
from nt_deq.cli import COMMANDS, kernel, main, make_parser

ROOT = Path(__file__).parents[2]
NT_DEQ = Path(sys.executable).with_name("nt-deq")


def run(*words, **options):
    """The command as a process of its own, in the working directory."""
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([NT_DEQ, *words], check=False, **options)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of data in the working directory, and the arrays in them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, x2 = rng.standard_normal((14, 3)), rng.standard_normal((7, 3))
    y, y2 = np.sin(x[:, 0]), np.sin(x2[:, 0])
    words, words2 = (np.where(y > 0, "high", "low") for y in (y, y2))
    arrays = {"x": x, "x2": x2, "y": y, "y2": y2, "words": words, "words2": words2}
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
        np.savetxt(f"{name}.csv", array, "%s", delimiter=",")
    np.save("bad.npy", np.where(np.arange(3) == 1, np.nan, x))
    np.save("huge.npy", 1e30 * x)
    np.save("flat.npy", y)
    np.savez("several.npz", x=x)
    np.save("text.npy", np.array(["a", "b"]))
    Path("empty.npy").write_bytes(b"")
    return arrays


def network(**options):
    return stax.serial(stax.DEQ(1, **options), stax.Dense(1))[2]


@pytest.mark.parametrize("get", slow_except(["ntk"], ["nngp", "ntk"]))
def test_kernel(files, monkeypatch, capsys, get, x64):
    # Two tiles, or three of which one is smaller and takes programs of its own.
    monkeypatch.setattr(kernel, "TILE", {"ntk": 7, "nngp": 6}[get])
    x, x2 = files["x"], files["x2"]
    flags = ["--get", get, "--W-std", "0.9", "--b-std", "0.2", "--activation", "erf", "--x64"]
    kernel_fn = network(W_std=0.9, b_std=0.2, activation="erf")
    assert main(["kernel", "x.npy", "--out", "k.npy", *flags]) == 0
    np.testing.assert_allclose(np.load("k.npy"), kernel_fn(x, None, get), rtol=1e-12, atol=1e-12)
    assert main(["kernel", "x.npy", "--x2", "x2.npy", "--out", "k2.npy", *flags]) == 0
    np.testing.assert_allclose(np.load("k2.npy"), kernel_fn(x, x2, get), rtol=1e-12, atol=1e-12)
    assert main(["kernel", "x.npy", "--out", "state.npy", "--of", "state", *flags]) == 0
    solution = nt_deq.deq_kernel(x, W_std=0.9, b_std=0.2, activation="erf")
    np.testing.assert_allclose(np.load("state.npy"), getattr(solution, get), rtol=1e-12, atol=1e-12)
    printed = capsys.readouterr()
    assert f"state.npy: {get.upper()} of z*, 14 × 14, float64." in printed.out
    assert f"an error of at most {solution.nngp_error.max():.1e}" in printed.out


# Nothing is imported before a command's own imports, as in pytest.
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("kernel x.npy --out k.npy", "k.npy: NNGP of f, 14 × 14, float32.\n"),
        ("predict x.csv words.csv x2.csv --out p.csv --probabilities q.csv", "leave-one-out: "),
        ("compare --widths 8 --networks 1 --steps 2", "on 20 inputs, 20 for testing"),
        ("phase --W-stds 1", "whatever the inputs, there is an equilibrium for W_std < 1.414"),
        ("info", "devices          cpu:0"),
    ],
    ids=COMMANDS,
)
def test_every_command_is_a_process(files, words, wanted):
    done = run(*words.split())
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
    assert "\r" not in done.stderr


def test_float32_is_the_default_and_x64_does_not_stay(files):
    assert main(["kernel", "x.npy", "--out", "k.npy", "--x64"]) == 0
    assert main(["kernel", "x.npy", "--out", "k32.npy"]) == 0
    k, k32 = np.load("k.npy"), np.load("k32.npy")
    assert (k.dtype, k32.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(k32, k, atol=1e-5)
    assert nt_deq.deq_kernel(files["x"], W_std=0.5).nngp.dtype == np.float32


def test_predict(files, x64):
    x, y, x2 = files["x"], files["y"], files["x2"]
    flags = ["--relative-noise", "0.01", "--W-std", "0.7", "--x64"]
    words = ["predict", "x.npy", "y.npy", "x2.npy", "--out", "mean.npy", "--std", "std.npy"]
    assert main([*words, *flags]) == 0
    ridge = 0.01 * np.diag(network(W_std=0.7)(x, None, "nngp")).mean()
    wanted = nt_deq.gp.GaussianProcess(network(W_std=0.7), x, y, ridge).posterior(x2)
    np.testing.assert_allclose(np.load("mean.npy"), wanted.mean, rtol=1e-9)
    np.testing.assert_allclose(np.load("std.npy"), np.sqrt(wanted.variance), rtol=1e-7)


def test_predict_labels(files, capsys):
    flags = ["--relative-noise", "0.01", "--probabilities", "p.csv", "--y-test", "words2.csv"]
    assert main(["predict", "x.csv", "words.csv", "x2.npy", "--out", "found.npy", *flags]) == 0
    classes, probabilities = Path("p.csv").read_text().split("\n", 1)
    assert classes == "high,low"
    p = np.loadtxt(probabilities.splitlines(), delimiter=",")
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    found, true = np.load("found.npy"), files["words2"]
    np.testing.assert_array_equal(found, np.array(["high", "low"])[p.argmax(axis=1)])
    out = capsys.readouterr().out
    assert "found.npy, p.csv: labels of 2 for 7 inputs, learned from 14" in out
    loss = -np.log(np.where(true == "high", p[:, 0], p[:, 1])).mean()
    right = (found == true).sum()
    assert f"words2.csv: {right / 7:.2%} right, {right} of 7 (the most" in out
    assert f"log loss {loss:.4f}." in out

    x, sign = np.float32(files["x"]), np.where(files["y"] > 0, -0.5, 0.5)  # of "low"
    ridge = 0.01 * np.diag(network(W_std=0.8)(x, None, "nngp")).mean()
    left_out = (
        nt_deq.gp.GaussianProcess(network(W_std=0.8), x, sign, ridge, "nngp").leave_one_out().mean
    )
    right = ((left_out > 0) == (sign > 0)).sum()
    assert f"leave-one-out: {right / 14:.2%} right, {right} of 14" in out


def test_predict_says_how_good_numbers_are(files, capsys):
    words = ["predict", "x.npy", "y.npy", "x2.npy", "--out", "p.npy", "--y-test", "y2.npy"]
    assert main([*words, "--store", "tiles"]) == 0
    out = capsys.readouterr().out
    error = np.sqrt(np.mean((np.load("p.npy") - files["y2"]) ** 2))
    assert f", root mean square error {error:.4g} (of the mean: {files['y2'].std():.4g})." in out
    assert "leave-one-out" not in out
    assert main([*words, "--force", "--store", "tiles", "--W-std", "0.9"]) == 2
    assert "another kernel (--W-std: 0.8 there, 0.9 here)" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    out = capsys.readouterr().out
    assert "leave-one-out: R² " in out
    assert "y2.npy: R² " in out


def test_predict_by_a_model_that_was_kept(files, capsys):
    flags = ["--W-std", "0.7", "--relative-noise", "0.01"]
    first = ["predict", "x.csv", "y.csv", "x2.csv", "--out", "p.npy", "--std", "s.npy", *flags]
    assert main([*first, "--model", "m"]) == 0
    assert "m: the model, for nt-deq predict X_test.npy --model m." in capsys.readouterr().out
    again = ["predict", "x2.npy", "--out", "p2.npy", "--std", "s2.npy", "--model", "m"]
    assert main([*again, "--y-test", "y2.npy"]) == 0
    out = capsys.readouterr().out
    assert "p2.npy, s2.npy: values for 7 inputs, learned from 14 by the model in m (" in out
    assert "(--W-std 0.7, --U-std 1.0, --b-std 0.0, --activation relu, --get nngp, --rel" in out
    assert "y2.npy: R² " in out
    for name in "ps":
        np.testing.assert_array_equal(np.load(f"{name}2.npy"), np.load(f"{name}.npy"))
    found = nt_deq.KernelRegression.load("m", network(W_std=0.7)).predict(files["x2"])
    np.testing.assert_array_equal(found, np.load("p.npy"))
    x64 = [*first, "--model", "m64", "--x64", "--force"]
    assert main(x64) == 0
    assert main([*again, "--force", "--model", "m64"]) == 0  # as the model says
    np.testing.assert_array_equal(np.load("p2.npy"), np.load("p.npy"))


def test_predict_labels_by_a_model_that_was_kept(files, capsys):
    flags = ["--probabilities", "q.npy", "--model", "m"]
    named = Path("named.csv")
    named.write_text("a,b,c\n" + Path("x.csv").read_text())
    assert main(["predict", "named.csv", "words.csv", "x2.csv", "--out", "p.npy", *flags]) == 0
    q, p = np.load("q.npy"), np.load("p.npy")
    assert main(["predict", "x2.csv", "--out", "p2.npy", *flags, "--force"]) == 0
    np.testing.assert_array_equal(np.load("p2.npy"), p)
    np.testing.assert_array_equal(np.load("q.npy"), q)
    found = nt_deq.KernelClassifier.load("m", network(W_std=0.8)).predict(files["x2"])
    np.testing.assert_array_equal(found, p)
    capsys.readouterr()
    named.write_text("a,c,b\n" + Path("x2.csv").read_text())
    x2 = ["predict", "x2.npy", "--out", "new.npy"]
    for words, message in (
        (["predict", "named.csv", "--out", "new.npy", "--model", "m"], "named.csv has 'c' in col"),
        ([*x2, "--model", "m", "--W-std", "0.9"], "--W-std=0.9, and --model=m was made with 0.8"),
        ([*x2, "--model", "m", "--get", "ntk"], "--get=ntk, and --model=m was made with nngp"),
        ([*x2, "--model", "m", "--x64"], "--x64=True, and --model=m was made with False"),
        ([*x2, "--model", "m", "--store", "k"], "--store=k, and --model=m was made with None"),
        ([*x2, "--model", "m", "--task", "regress"], "--task=regress, and --model=m was made"),
        ([*x2, "--model", "m", "--y-test", "y2.npy"], "=classify needs labels"),
        ([*x2, "--model", "none"], "--model=none holds no model"),
        (x2, "predict takes X.npy y.npy X_test.npy, or X_test.npy alone and --model DIR"),
        ([*x2[:2], *x2[1:]], "predict takes X.npy y.npy X_test.npy, or"),
        (["predict", "flat.npy", "--out", "new.npy", "--model", "m"], "inputs are (n, d)"),
        (["predict", "x.npy", "words.npy", *x2[1:], "--model", "m"], "m holds a model already"),
        (["predict", "x.npy", "words.npy", *x2[1:], "--model", "."], "holds something else"),
    ):
        assert main(words) == 2, words
        assert message in capsys.readouterr().err
    nt_deq.KernelClassifier(network(W_std=0.8), progress=False).fit(
        files["x"], files["words"]
    ).save("own")
    assert main([*x2, "--model", "own"]) == 2
    assert "own holds a KernelClassifier of Python's: load it there" in capsys.readouterr().err


@pytest.mark.slow
def test_compare(files, capsys):
    words = ["compare", "x.npy", "y.npy", "--widths", "128,16", "--networks", "2", "--steps", "20"]
    assert main(words) == 0
    table, note = capsys.readouterr().out.split("\n\n")
    rows = [[float(cell) for cell in line.split()] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [16, 128]
    for _, before, after, infinite, distance in rows:
        assert after < before
        assert infinite < before
        assert 0 < distance < 1
    assert rows[1][4] < rows[0][4] / 1.5  # 1/√width would be 2.8
    assert abs(rows[1][2] - rows[1][3]) < 0.1 * (rows[1][1] - rows[1][3])
    assert "20 steps" in note
    assert "on 12 inputs, 2 for testing" in note
    ntk = network(W_std=0.6)(np.float32(files["x"][:12]), None, "ntk")
    rate = float(nt.predict.max_learning_rate(ntk, y_train_size=12)) / 8
    assert f"learning rate {rate:.4g}" in note


def test_phase(files, capsys):
    assert main(["phase", "--W-stds", "0.4,1,1.4,1.5"]) == 0
    table, note = capsys.readouterr().out.split("\n\n")
    rows = [line.split() for line in table.splitlines()[2:]]
    assert rows == [  # relu: W_std²/2, and 2 W_std
        ["0.4", "0.0800", "0.8000", "yes", "yes"],
        ["1", "0.5000", "2.0000", "no", "yes"],
        ["1.4", "0.9800", "2.8000", "no", "yes"],
        ["1.5", "1.1250", "3.0000", "no", "no"],
    ]
    assert "W_std < 1.414; at and beyond it none has" in note
    assert main(["phase", "x.npy", "--activation", "tanh", "--W-stds", "1.2"]) == 0
    rate = nt_deq.theory.local_contraction(np.float32(files["x"]), W_std=1.2, activation="tanh")
    assert f" {rate.max():.4f} " in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("nt-deq", "jax", "neural-tangents", "devices", "float64"):
        assert f"\n{name} " in out
    assert "cpu:0" in out
    assert out.count("in place") + out.count("not needed") == len(nt_deq._bridges.bridges())


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "kernel none.npy --out k.npy", "none.npy: there is no such file"),
        (2, "kernel empty.npy --out k.npy", "empty.npy cannot be read as a .npy file"),
        (2, "kernel several.npz --out k.npy", "several.npz has several arrays"),
        (2, "kernel text.npy --out k.npy", "text.npy has <U1"),
        (2, "kernel flat.npy --out k.npy", "flat.npy has shape (14,): inputs are (n, d)"),
        (2, "kernel bad.npy --out k.npy", "bad.npy has NaN or infinite values in 14 of 14 rows"),
        (2, "kernel x.npy --out no/k.npy", "no/k.npy cannot be written: there is no directory no"),
        (2, "kernel x.npy --out .", "cannot be written: name another file"),
        (2, "kernel x.npy --out k.npy --W-std -1", "--W-std=-1.0 must be a finite standard"),
        (2, "kernel x.npy --out k.npy --activation rely", "activation='rely' is unknown"),
        (1, "kernel x.npy --out k.npy --W-std 1.5", "W_std=1.5 with activation='relu'"),
        (
            2,
            "predict x.npy y.npy x.npy --out p.npy --relative-noise -1",
            "relative_noise=-1.0 must",
        ),
        (2, "predict x.npy x2.npy x.npy --out p.npy", "x2.npy has float64 of shape (7, 3): 14"),
        (
            2,
            "predict x.npy y.npy x.npy --out p.npy --std p.npy",
            "p.npy is the file of --out",
        ),
        (2, "predict x.npy y.npy x2.npy --out ./y.npy", "--out=./y.npy is the file of y too"),
        (2, "predict x.npy y.npy x2.npy --out y2.npy --y-test y2.npy", "is the file of --y-test"),
        (2, "predict x.npy y.npy x.npy --out flat.npy", "--out=flat.npy is there already: --force"),
        (2, "predict x.npy y.npy x.npy --out p.npy --probabilities q.npy", "q.npy is for labels"),
        (2, "predict x.npy y.npy x.npy --out p.npy --y-test y2.npy", "14 inputs need targets"),
        (2, "predict x.npy words.npy x2.npy --out p.npy --y-test y2.npy", "needs labels: whole"),
        (2, "predict x.npy y.npy x2.npy --out p.npy --y-test words2.npy", "regress needs numbers"),
        (
            2,
            "predict x.npy y.npy x.npy --out p.npy --task classify",
            "=classify needs labels",
        ),
        (2, "kernel x.npy --out x.npy --force", "--out=x.npy is the file of X.npy too"),
        (2, "kernel x.npy --x2 x2.npy --out x2.npy", "--out=x2.npy is the file of --x2 too"),
        (2, "kernel x.npy --out y.npy", "--out=y.npy is there already: --force overwrites it"),
        (2, "kernel x.npy --out k.csv", "--out=k.csv: a kernel is written as .npy"),
        (2, "kernel words.csv --out k.npy", "words.csv, line 2, column 1 ('high'): 'high' is not"),
        (1, "predict x.npy y.npy x2.npy --out p.npy --W-std 1.5", "W_std=1.5 with activation"),
        (2, "compare x.npy", "x.npy has no targets beside it"),
        (1, "compare --W-std 1.45 --widths 4 --steps 1", "W_std=1.45 with activation"),
        (2, "phase bad.npy", "bad.npy has NaN"),
    ],
)
def test_mistakes_are_one_line(files, capsys, code, words, message):
    before = sorted(path.name for path in Path().iterdir())
    assert main(words.split()) == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("nt-deq: error: ")
    assert message in line
    assert out == ""
    assert sorted(path.name for path in Path().iterdir()) == before  # nothing half written
    np.testing.assert_array_equal(np.load("x.npy"), files["x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("kernels", "invalid choice: 'kernels'"),
        ("kernel x.npy", "the following arguments are required: --out"),
        ("kernel x.npy --out k.npy --get both", "argument --get: invalid choice: 'both'"),
        ("kernel x.npy --out k.npy --W_std 1", "unrecognized arguments: --W_std 1"),
        ("compare --widths 0,4", "argument --widths: invalid list of widths value: '0,4'"),
        ("compare --steps 0", "argument --steps: invalid positive integer value: '0'"),
        ("phase --W-stds 1,x", "argument --W-stds: invalid list of standard deviations value"),
    ],
)
def test_bad_flags_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as raised:
        main(words.split())
    assert raised.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("nt-deq: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_our_mistakes_are_not_the_users(files, capsys, monkeypatch):
    def run(args):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(kernel, "run", run)
    words = ["kernel", "x.npy", "--out", "k.npy"]
    assert main(words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: shapes do not match This is a mistake of nt-deq's: please report" in line
    assert main([*words, "--debug"]) == 3
    assert 'raise ValueError("shapes do not match")' in capsys.readouterr().err


def test_debug_shows_where_a_mistake_of_the_users_was_found(files, capsys):
    assert main(["kernel", "bad.npy", "--out", "k.npy", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "nt-deq: error: bad.npy has NaN" in err


def test_a_kernel_is_compiled_once_and_not_at_every_tile(files, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 2)
    traced, deq_network = [], nt_deq.deq_network

    def counting(**options):
        init_fn, apply_fn, kernel_fn = deq_network(**options)

        def counted(*args):
            traced.append(args)
            return kernel_fn(*args)

        return init_fn, apply_fn, counted

    monkeypatch.setattr(nt_deq, "deq_network", counting)
    assert main(["kernel", "x.npy", "--out", "k.npy"]) == 0
    assert len(traced) == 2  # on the diagonal and off it


def test_signals_end_it_with_files_as_they_were(files, request):
    # What runs in the background of a shell ignores SIGINT, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    np.save("many.npy", np.random.default_rng(0).standard_normal((9000, 3)))
    Path("k.npy").write_text("before")
    words = ["kernel", "many.npy", "--out", "k.npy", "--force", "--activation", "gelu"]
    left = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([NT_DEQ, *words], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not list(Path().glob(".nt-deq-k.npy.*.part")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        left[number] = process.returncode, len(list(Path().glob(".*"))), err
        assert Path("k.npy").read_text() == "before"
    message = "nt-deq: error: interrupted; files are as they were.\n"
    assert left == {
        signal.SIGINT: (130, 0, message),
        signal.SIGTERM: (143, 0, message),
        signal.SIGKILL: (-signal.SIGKILL, 1, ""),
    }
    assert main(["kernel", "x.npy", "--out", "other.npy"]) == 0
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    assert "\nexamples:\n  nt-deq " + command in out
    for line in out.split("examples:\n")[1].splitlines():
        assert line.startswith(f"  nt-deq {command}")


def test_the_program_and_that_its_help_does_not_import_jax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, name = project["project"]["scripts"]["nt-deq"].split(":")
    assert getattr(importlib.import_module(module), name) is main
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert module.partition(".")[0] in packages
    program = (
        f"import sys, {module}\n"
        f"try: {module}.{name}(['--help'])\n"
        "finally: print(sorted({'jax', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "exit codes: 0 done" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "nt_deq.cli", "kernel", "nowhere.npy", "--out", "k.npy"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nt-deq: error: nowhere.npy: there is no such file.\n"


def test_the_commands_of_the_documentation_can_be_parsed():
    commands = re.findall(r"^nt-deq (.+)$", (ROOT / "docs" / "cli.md").read_text(), re.M)
    commands += re.findall(r"`nt-deq ([a-z]+ .+?)`", (ROOT / "README.md").read_text())
    assert {command.split()[0] for command in commands} == set(COMMANDS)
    for command in commands:
        make_parser().parse_args(command.split())
