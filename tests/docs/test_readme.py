"""The README's commands and links lead somewhere; test_docs.py runs its Python."""

import re
import tomllib

from documents import ROOT, blocks


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        line
        for language, code in blocks("README.md")
        if language == "bash"
        for line in code.split("\n")
    ]
    targets = [line.split()[1] for line in commands if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_linked_files_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert "docs/compare.png" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_it_is_short_and_in_order():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    parts = ("## Install", "## Three lines", "![", "| | neural-tangents", "## Launchers")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_there_is_one_address():
    """The address of the repository is that of `[project.urls]`, wherever it is named."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    files = [ROOT / "pyproject.toml", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for file in [*files, *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("nt_deq*/**/*.py")]:
        for address in re.findall(r"https://[\w./-]*/nt-deq(?![\w-])", file.read_text()):
            assert address == urls["Repository"], (file, address)
