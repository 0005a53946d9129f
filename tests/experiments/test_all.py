"""All launchers in one run: what is run, kept and told, and the page."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import all as run_all
from experiments.claims import phase
from experiments.lib import html_report, report
from experiments.lib.workdir import Workdir, versions
from nt_deq.errors import InputError

ROOT = Path(__file__).parents[2]
LINKS = ("src", "href", "srcset", "data", "action", "poster")


class Page(HTMLParser):
    """The text of a page, what it links to, its elements, and whether every one is closed."""

    def __init__(self, html):
        super().__init__()
        self.words, self.links, self.open, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in LINKS]
        if tag not in ("meta", "img", "hr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def plain(text):
    return " ".join(text.replace("`", "").split())


def write_results(path, name, settings, claims):
    report.write_claims(
        Workdir(path / name),
        name,
        title=f"About {name} & <others>",
        introduction="Where `a < b`.\n\nA second paragraph.",
        caption="A line, with <em>.",
        settings=settings,
        claims=claims,
        numbers={},
        tables=[report.Table(("x", "y"), [["<1", "2"]], "Some numbers", "`y` is more.")],
        draw=lambda plt: plt.subplots()[0],
    )


def test_the_page_has_everything_escaped_and_nothing_from_elsewhere(tmp_path):
    claims = {
        "phase": [report.Claim("`W < 1` & more", "it is <0.5", True)],
        "limits": [report.Claim('a "quoted" claim', "no", False), report.Claim("b", "c", True)],
    }
    for name, of in claims.items():
        write_results(tmp_path, name, {"widths": (8, 16), "data_dir": None}, of)
    html = html_report.page(
        tmp_path, {"phase": None, "limits": None, "compare": "It <ended> with exit code 1."}
    )
    page = Page(html)
    assert "2 of 3 claims hold." in page.text
    for name, of in claims.items():
        for claim in of:
            assert page.text.count(plain(claim.claim)) >= 2  # above and in its section
            assert plain(claim.measured) in page.text
        image = base64.b64encode((tmp_path / name / f"{name}.png").read_bytes()).decode()
        assert f"data:image/png;base64,{image}" in page.links
    for text in ("Where a < b .", "A second paragraph.", "A line, with <em>.", "<1", "8,16"):
        assert text in page.text
    assert "It <ended> with exit code 1." in page.text
    assert "About phase & <others>" in page.text
    assert "data_dir" not in page.text
    assert page.text.count("does not hold") == 2  # above and in its section
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    anchors = re.findall(r'<section id="(\w+)">', html)
    assert anchors == ["phase", "limits", "compare"]
    assert {link[1:] for link in page.links if link.startswith("#")} == set(anchors)
    assert not {"script", "link", "iframe", "em"} & set(page.tags)
    assert "url(" not in html
    assert "http" not in html


def test_finished_is_of_the_same_settings_and_versions(tmp_path):
    workdir, settings = Workdir(tmp_path), run_all.Settings(only="phase")
    assert not run_all.finished(settings, workdir, "phase")
    write_results(tmp_path, "phase", dataclasses.asdict(phase.Settings()), [])
    assert run_all.finished(settings, workdir, "phase")
    full = dataclasses.replace(settings, config="full")
    assert not run_all.finished(full, workdir, "phase")
    write_results(tmp_path, "phase", dataclasses.asdict(phase.Settings(**phase.FULL)), [])
    assert run_all.finished(full, workdir, "phase")
    file = tmp_path / "phase" / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps({**results, "versions": {**versions(), "jax": "0.0"}}))
    assert not run_all.finished(full, workdir, "phase")


def test_what_is_handed_on(tmp_path, monkeypatch):
    commands = []

    def pretend(command, check):
        commands.append(command)
        name = command[2].removeprefix("experiments.claims.")
        if name == "spectrum":
            return subprocess.CompletedProcess(command, -9)
        write_results(tmp_path, name, {}, [report.Claim(f"{name}'s", "m", True)])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    settings = run_all.Settings(
        only="compare,spectrum,phase", config="full", data_dir="some/directory"
    )
    workdir = Workdir(tmp_path)
    with pytest.raises(SystemExit, match=r"1 of 3 launchers failed: spectrum\."):
        run_all.main(settings, workdir)
    of = {command[2]: command[3:] for command in commands}
    assert list(of) == [
        "experiments.claims.spectrum",
        "experiments.claims.phase",
        "experiments.claims.compare",
    ]
    assert of["experiments.claims.phase"] == [f"--workdir={tmp_path / 'phase'}", "--config=full"]
    assert of["experiments.claims.compare"][1:] == [
        "--config=full",
        "--data=mnist",
        "--data_dir=some/directory",
    ]
    assert all(command[:2] == [sys.executable, "-m"] for command in commands)
    assert workdir.kept == ["phase", "compare"]
    page = Page((tmp_path / "report.html").read_text())
    assert "It was killed by signal 9" in page.text
    assert "phase's" in page.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"only": "phase,phases"}, "'phases' is not a launcher"),
        ({"config": "huge"}, "--config=huge is unknown"),
        ({"config": "full"}, "--data_dir"),
    ],
)
def test_flags_that_cannot_be_right(flags, message):
    with pytest.raises(InputError, match=message):
        run_all.Settings(**flags)


@pytest.mark.slow
def test_it_runs_launchers_and_keeps_them(tmp_path):
    command = [sys.executable, "-m", "experiments.all", f"--workdir={tmp_path}", "--only=phase"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    assert "[1/1] phase: finished" in first.stderr
    page = Page((tmp_path / "report.html").read_text())
    results = json.loads((tmp_path / "phase" / "results.json").read_text())
    assert results["claims"]
    for claim in results["claims"]:
        assert plain(claim["claim"]) in page.text
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert "[1/1] phase: kept from an earlier run" in again.stderr


def test_the_same_command_twice_is_told_of_the_first(tmp_path):
    program = """
from experiments.lib import launch
def job(settings, workdir):
    print("started", flush=True)
    input()
launch.main(launch.Settings, job)
"""
    command = [sys.executable, "-c", program, f"--workdir={tmp_path}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert first.stdout.readline() == "started\n"
    options = {"cwd": ROOT, "text": True, "capture_output": True, "timeout": 60}
    second = subprocess.run(command, **options)
    assert second.returncode == 1
    assert second.stderr == (
        f"error: --workdir={tmp_path} is in use by process {first.pid}: wait until it ends, or "
        "name another directory.\n"
    )
    assert first.communicate("\n", timeout=60)[1] == ""
    again = subprocess.run(command, input="\n", **options)
    assert again.returncode == 0, again.stderr


def test_sigterm_ends_the_launchers_that_it_has_started(tmp_path):
    program = """
import subprocess, sys
from experiments.lib import launch
def job(settings, workdir):
    child = "import time; print('started', flush=True); time.sleep(600)"
    subprocess.run([sys.executable, "-c", child], check=False)
launch.main(launch.Settings, job)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, f"--workdir={tmp_path}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "started\n"
    process.terminate()
    _, err = process.communicate(timeout=60)  # until the child has let go of its output, too
    assert process.returncode == 143
    assert err == f"Interrupted. Kept in {tmp_path}: nothing yet; the same command goes on there.\n"
