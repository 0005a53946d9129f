"""All launchers in one run: what is run, kept and told, and the page."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from launching import start

from experiments import all as run_all
from experiments.claims import compare
from experiments.lib import html_report, report
from experiments.lib.workdir import Workdir
from nt_deq.errors import InputError

SETTINGS = compare.Settings(widths=(8, 16))
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
        sections={"Some numbers": "`y` is more.\n\n" + report.table(("x", "y"), [["<1", "2"]])},
        draw=lambda plt: plt.subplots()[0],
    )


def test_the_page_has_everything_escaped_and_nothing_from_elsewhere(tmp_path):
    claims = {
        "phase": [report.Claim("`W < 1` & more", "it is <0.5", True)],
        "limits": [report.Claim('a "quoted" claim', "no", False), report.Claim("b", "c", True)],
    }
    for name, of in claims.items():
        write_results(tmp_path, name, SETTINGS, of)
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


def test_what_is_handed_on(tmp_path, monkeypatch):
    commands = []

    def pretend(command, check):
        commands.append(command)
        name = command[2].removeprefix("experiments.claims.")
        if name == "spectrum":
            return subprocess.CompletedProcess(command, -9)
        write_results(tmp_path, name, SETTINGS, [report.Claim(f"{name}'s", "m", True)])
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
def test_it_runs_launchers(tmp_path):
    process = start("all", f"--workdir={tmp_path}", "--only=spectrum")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "[1/1] spectrum: finished" in err
    page = Page((tmp_path / "report.html").read_text())
    claims = json.loads((tmp_path / "spectrum" / "results.json").read_text())["claims"]
    assert len(claims) == 6
    assert all(plain(claim["claim"]) in page.text for claim in claims)
