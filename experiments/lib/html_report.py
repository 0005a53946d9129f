"""One page of HTML about what several launchers found, which needs no other file."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from experiments.lib.launch import format_value

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 3.5rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
h3 { margin-top: 2rem; }
code { font: 0.9em ui-monospace, monospace; background: #f3f3f3; padding: 0 0.2em; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child, .summary th, .summary td { text-align: left; }
td:first-child { white-space: nowrap; }
.wide { overflow-x: auto; }
.claim { border-left: 4px solid; padding: 0.1rem 0 0.1rem 1rem; margin: 1.2rem 0; }
.claim p { margin: 0.3rem 0; }
.holds { border-color: #009e73; }
.fails { border-color: #d55e00; }
.verdict { font-weight: 600; white-space: nowrap; }
.holds .verdict { color: #00704f; }
.fails .verdict { color: #b34700; }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: 0.95rem; }
summary { cursor: pointer; margin-top: 1.5rem; }
"""


def page(directory: Path, names: Mapping[str, str | None]) -> str:
    """Writes the page.

    Args:
      directory: where each launcher has its own directory, with what `report.write_claims` wrote.
      names: of the launchers, in order; for those without results, why.
    """
    results = {
        name: json.loads((directory / name / "results.json").read_text("utf-8"))
        for name, missing in names.items()
        if missing is None
    }
    claims = [claim for result in results.values() for claim in result["claims"]]
    holding = sum(claim["holds"] for claim in claims)
    sections = [
        _missing(name, missing)
        if missing is not None
        else _section(name, results[name], (directory / name / f"{name}.png").read_bytes())
        for name, missing in names.items()
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Infinitely wide deep equilibrium models: what was measured</title>\n"
        f"<style>{STYLE}</style>\n"
        "</head>\n<body>\n<h1>Infinitely wide deep equilibrium models: what was measured</h1>\n"
        f"<p>{holding} of {len(claims)} claims hold.</p>\n{_summary(names, results)}\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n"))


def _table(header: Any, rows: Any) -> str:
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="wide"><table>\n<thead>{line("th", header)}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _verdict(claim: Mapping[str, Any]) -> str:
    text = "holds" if claim["holds"] else "does not hold"
    return f'<span class="verdict">{text}</span>'


def _kind(claim: Mapping[str, Any]) -> str:
    return "holds" if claim["holds"] else "fails"


def _summary(names: Mapping[str, str | None], results: Mapping[str, Any]) -> str:
    rows = []
    for name, missing in names.items():
        link = f'<a href="#{name}">{name}</a>'
        if missing is not None:
            rows.append(f"<tr><td>{link}</td><td>{_inline(missing)}</td><td></td></tr>")
            continue
        rows += [
            f'<tr class="{_kind(claim)}"><td>{link}</td><td>{_inline(claim["claim"])}</td>'
            f"<td>{_verdict(claim)}</td></tr>"
            for claim in results[name]["claims"]
        ]
    return (
        '<div class="wide"><table class="summary">\n<thead><tr><th>launcher</th><th>claim</th>'
        f"<th>verdict</th></tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table></div>"
    )


def _missing(name: str, why: str) -> str:
    return f'<h2 id="{name}">{name}</h2>\n<p>{_inline(why)}</p>'


def _section(name: str, result: Mapping[str, Any], png: bytes) -> str:
    claims = "\n".join(
        f'<div class="claim {_kind(c)}">\n<p>{_inline(c["claim"])} {_verdict(c)}</p>\n'
        f'<p class="note">Measured: {_inline(c["measured"])}</p>\n</div>'
        for c in result["claims"]
    )
    tables = "\n".join(
        (f"<h3>{_inline(table['title'])}</h3>\n" if table["title"] else "")
        + (f'<p class="note">{_inline(table["note"])}</p>\n' if table["note"] else "")
        + _table(table["header"], table["rows"])
        for table in result["tables"]
    )
    settings = [
        [f"`--{flag}`", f"`{format_value(tuple(v) if isinstance(v, list) else v)}`"]
        for flag, v in result["settings"].items()
        if v is not None
    ]
    used = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return (
        f'<h2 id="{name}">{_inline(result["title"])}</h2>\n{_paragraphs(result["introduction"])}\n'
        f"{claims}\n<figure>\n"
        f'<img alt="{escape(result["caption"])}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">\n'
        f"<figcaption>{_inline(result['caption'])}</figcaption>\n</figure>\n{tables}\n"
        "<details>\n"
        f"<summary>Settings of <code>python -m experiments.claims.{name}</code></summary>\n"
        f"{_table(('flag', 'value'), settings)}\n<p>Versions: {escape(used)}.</p>\n</details>"
    )
