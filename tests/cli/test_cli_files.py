"""What the command line reads and writes: tables and their mistakes, and files written whole."""

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nt_deq import _progress
from nt_deq._files import remove_orphans, whole
from nt_deq.cli import arrays, csv_files, quality
from nt_deq.cli.files import check_outputs
from nt_deq.errors import InputError


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a text file in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="x.csv"):
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


NUMBERS = [[1, 2.5], [-3e-2, 4]]


@pytest.mark.parametrize(
    "text",
    [
        "1,2.5\n-3e-2,4\n",
        "age,height\n1,2.5\n-3e-2,4",
        '\ufeff"the age","height, in m"\r\n1,2.5\r\n-3e-2,"4"\r\n',
        "age;height\n1;2.5\n-3e-2;4\n",
        "\n1\t2.5\n\n-3e-2\t4\n\n",
    ],
)
def test_tables_of_numbers(table, text):
    np.testing.assert_array_equal(arrays.read_inputs(table(text)), NUMBERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n\n3,x\n", "x.csv, line 4, column 2 ('b'): 'x' is not a number"),
        ("1,2\n3,\n", "x.csv, line 2, column 2: it is empty"),
        ("1;2,5\n3;4\n", "x.csv, line 1, column 2: '2,5' is not a number"),
        ("1,a\n3,4\n", "x.csv, line 1, column 2: 'a' is not a number"),
        ("a,b\n1,2\n1,2,3\n", "x.csv, line 3 has 3 columns, and the first line 2"),
        ("a,b\n1,nan\n", "x.csv has NaN or infinite values in 1 of 1 rows (first: row 0)"),
        ("0,1,2\n5,6,7\n", "line 1 counts the columns from 0, as pandas names them"),
        (",a\n0,5\n1,6\n", "column 1 has no name, like the numbers of rows that pandas writes"),
        ("a,b\n", "x.csv has shape (0, "),
        ("", "x.csv has shape (0, "),
    ],
)
def test_mistakes_in_a_table_are_named_by_line_and_column(table, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        arrays.read_inputs(table(text))


def test_a_table_that_is_not_text(table):
    Path("x.csv").write_bytes(b"1,2\n\xff\xfe,3\n")
    with pytest.raises(InputError, match="it is not text in UTF-8"):
        arrays.read_inputs("x.csv")
    with pytest.raises(InputError, match=r"x.csv cannot be read as a table: field larger than"):
        arrays.read_inputs(table("a" * 200_000))


def test_columns_of_two_tables_have_to_agree(table):
    x = table("a,b\n1,2\n")
    same, swapped = table("a,b\n3,4\n", "same.csv"), table("b,a\n3,4\n", "swapped.csv")
    np.testing.assert_array_equal(arrays.read_input_pair(x, same)[1], [[3, 4]])
    with pytest.raises(InputError, match=r"swapped.csv has 'b' in column 1, and x.csv has 'a'"):
        arrays.read_input_pair(x, swapped)
    with pytest.raises(InputError, match=r"wide.csv has 3 features, and x.csv has 2"):
        arrays.read_input_pair(x, table("3,4,5\n", "wide.csv"))


@pytest.mark.parametrize(
    ("text", "task", "targets"),
    [
        ("y\n1\n2\n1\n", "auto", np.array([1, 2, 1])),
        ("1.0\n2\n1\n", "auto", np.array([1.0, 2, 1])),
        ("1.0\n2\n1\n", "classify", np.array([1, 2, 1])),
        ("1\n2\n1\n", "regress", np.array([1.0, 2, 1])),
        ("kind\ncat\ndog\ncat\n", "auto", np.array(["cat", "dog", "cat"])),
        ("cat\ndog\ncat\n", "auto", np.array(["cat", "dog", "cat"])),
        ("u,v\n1,2\n3,4\n5,6.5\n", "auto", np.array([[1, 2], [3, 4], [5, 6.5]])),
    ],
)
def test_targets_of_a_table(table, text, task, targets):
    found = arrays.read_targets(table(text, "y.csv"), 3, task)
    assert found.dtype.kind == targets.dtype.kind
    np.testing.assert_array_equal(found, targets)


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("1\n2\n3\n4\n", "auto", "y.csv has 4 lines, and there are 3 inputs"),  # 1 is no header
        ("cat\ndog\ncat\ndog\n", "auto", "y.csv has 4 lines"),  # nor is cat
        ("a\n1\n2\n", "regress", "y.csv has 'a', and --task=regress needs numbers"),
        ("1\n2.5\n3\n", "classify", "y.csv has 2.5, and --task=classify needs labels"),
        ("cat\nnan\ninf\n", "regress", "needs numbers"),
        ("1.5\nnan\n2\n", "auto", "y.csv has NaN or infinite values"),
        ("a,b\nc,d\ne,f\n", "auto", "y.csv has <U1 of shape (3, 2): 3 inputs need labels (3,)"),
        ('cat\n""\ndog\n', "auto", "y.csv has no value in row 1"),
    ],
)
def test_targets_that_cannot_be_right(table, text, task, message):
    with pytest.raises(InputError, match=re.escape(message)):
        arrays.read_targets(table(text, "y.csv"), 3, task)


def test_targets_that_may_be_meant_otherwise_are_told(table, capsys):
    np.save("y.npy", np.repeat([1.0, 2.0, 3.0], 5))
    assert arrays.read_targets("y.npy", 15).dtype == np.float64
    assert "y.npy has 3 whole numbers, saved as float64, which are" in capsys.readouterr().err
    np.save("y.npy", np.arange(40))
    arrays.read_targets("y.npy", 40)
    assert "y.npy has 40 integers in 40 rows, which are taken for" in capsys.readouterr().err
    for y in (np.repeat([1, 2, 3], 5), np.linspace(0, 1, 15), np.arange(15.0), np.ones(15)):
        np.save("y.npy", y)
        arrays.read_targets("y.npy", 15)
    np.save("y.npy", np.repeat([1.0, 2.0, 3.0], 5))
    arrays.read_targets("y.npy", 15, "classify")
    assert capsys.readouterr().err == ""


def test_what_is_written_can_be_read(table):
    arrays.write("p.csv", np.array(NUMBERS, np.float32), ["u, first", "v"])
    np.testing.assert_allclose(arrays.read_inputs("p.csv"), NUMBERS, rtol=1e-7)
    assert csv_files.read_names("p.csv") == ["u, first", "v"]
    arrays.write("p.tsv", np.array(["cat", "dog"]), ["label"])
    assert Path("p.tsv").read_text() == "label\ncat\ndog\n"
    arrays.write("p.npy", np.array(["cat", "dog"]), ["label"])
    np.testing.assert_array_equal(np.load("p.npy"), ["cat", "dog"])


def test_measures_of_quality():
    y = np.array([[1.0, 2], [3, 6]])
    assert quality.of_numbers(y + 0.5, y) == (
        "R² 0.9000, root mean square error 0.5 (of the mean: 1.581)"
    )
    assert quality.of_numbers(np.ones(3), np.ones(3)).startswith("root mean square error 0 ")
    found, labels, p = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), np.full((4, 2), 0.5)
    assert quality.of_labels(found, labels, np.log(p)) == (
        "75.00% right, 3 of 4 (the most frequent class is 75.00%); log loss 0.6931"
    )
    unknown = quality.of_labels(found, np.array([0, 1, -1, 0]), np.log(p))
    assert unknown.startswith("75.00% right")
    assert unknown.endswith("log loss inf")


def test_outputs_that_must_not_be_written(table):
    x, y = table("1\n"), table("1\n", "y.csv")
    Path("link.csv").symlink_to(x)
    Path("directory").mkdir()
    for out, message in [
        ("x.csv", "--out=x.csv is the file of X too"),
        ("./x.csv", "--out=./x.csv is the file of X too"),
        ("link.csv", "--out=link.csv is the file of X too"),
        ("directory", "--out=directory cannot be written"),
        ("no/p.csv", "there is no directory no"),
        ("new.csv", "--std=new.csv is the file of --out too"),
    ]:
        outputs = {"--out": out, "--std": "new.csv", "--probabilities": None}
        with pytest.raises(InputError, match=re.escape(message)):
            check_outputs(outputs, {"X": x, "--x2": None}, force=True)
    with pytest.raises(InputError, match=r"--out=y.csv is there already: --force overwrites it"):
        check_outputs({"--out": y}, {"X": x}, force=False)
    check_outputs({"--out": y}, {"X": x}, force=True)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "file.txt"
    with whole(file) as temporary:
        temporary.write_text("first")
        assert not file.exists()
        remove_orphans(tmp_path)  # as another run does
        assert temporary.exists()
    with pytest.raises(IsADirectoryError), whole(file) as temporary:
        temporary.parent.write_text("sec")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert file.read_text() == "first"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    def flush(handle):
        opened = os.fstat(handle)
        events.append("directory" if stat.S_ISDIR(opened.st_mode) else f"{opened.st_size} bytes")

    def replace(temporary, target):
        events.append("name")
        os.rename(temporary, target)

    events = []
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", replace)
    with whole(tmp_path / "file.txt") as temporary:
        temporary.write_text("first")
    assert events == ["5 bytes", "name", "directory"]


def test_what_a_dead_writer_left_is_removed(tmp_path):
    program = (
        "import os, sys; from nt_deq._files import whole\n"
        "with whole('dead.npy') as file: file.write_text('part'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False, timeout=60)
    assert len(list(tmp_path.glob(".nt-deq-dead.npy.*.part"))) == 1
    (tmp_path / ".nt-deq").write_text("somebody's")
    with whole(tmp_path / "other.npy"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".nt-deq", "other.npy"]


def test_progress_in_a_log_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(_progress, "_SECONDS", 0.01)

    def work():
        for _ in _progress.progress_bar(range(3), desc="kernel", unit="tile"):
            time.sleep(0.02)
        return capsys.readouterr().err

    lines = work().splitlines()
    assert re.match(r"kernel:  33%\|.*\| 1/3 ", lines[0])
    assert re.match(r"kernel: 100%\|.*\| 3/3 ", lines[-1])
    monkeypatch.setattr(_progress, "_SECONDS", 1000)
    assert work() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert work() == ""
    monkeypatch.setattr(_progress, "QUIET", 0)
    assert "\rkernel: 100%" in work()
