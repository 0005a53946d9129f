"""One page of HTML about what several launchers found, which needs no other file."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

from markdown_it import MarkdownIt

from experiments.lib.report import table

TITLE = "Infinitely wide deep equilibrium models: what was measured"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3.5rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
code { font: 0.9em ui-monospace, monospace; background: #f3f3f3; padding: 0 0.2em; }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; vertical-align: top; }
img { max-width: 100%; height: auto; }
"""


VERDICTS = {True: "holds", False: "**does not hold**", None: "cannot be told"}


def page(directory: Path, names: Mapping[str, str | None]) -> str:
    """Writes the page.

    Args:
      directory: where each launcher has its own directory, with what `report.write_claims` wrote.
      names: of the launchers, in order; for those without results, why.
    """
    rows, verdicts, sections = [], [], []
    for name, missing in names.items():
        if missing is not None:
            rows.append([f"[{name}](#{name})", missing, ""])
            sections.append(_section(name, f"# {name}\n\n{missing}\n"))
            continue
        report = directory / name / "report.md"
        sections.append(_section(name, report.read_text(encoding="utf-8"), report.parent))
        for claim in json.loads((report.parent / "results.json").read_text("utf-8"))["claims"]:
            verdicts.append(claim["holds"])
            rows.append([f"[{name}](#{name})", claim["claim"], VERDICTS[claim["holds"]]])
    summary = table(("launcher", "claim", "verdict"), rows, align="lll")
    start = f"# {TITLE}\n\n{verdicts.count(True)} of {len(verdicts)} claims hold.\n\n{summary}\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([_html(start), *sections])
        + "\n</body>\n</html>\n"
    )


def _html(markdown: str) -> str:
    return (
        MarkdownIt("commonmark", {"html": False, "xhtmlOut": False})
        .enable("table")
        .render(markdown)
    )


def _section(name: str, markdown: str, directory: Path | None = None) -> str:
    """A report one heading lower, with its figure in it."""
    html = _html(re.sub("^#", "##", markdown, flags=re.MULTILINE))
    if directory is not None:
        png = base64.b64encode((directory / f"{name}.png").read_bytes()).decode("ascii")
        html = html.replace(f'src="{name}.png"', f'src="data:image/png;base64,{png}"')
    return f'<section id="{name}">\n{html}</section>'
