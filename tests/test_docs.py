"""Every page of the documentation runs, and the reference has everything that is public."""

import importlib
import re
from pkgutil import resolve_name

import jax
import pytest
from documents import ROOT, run_python

import nt_deq

PAGES = {path.name for path in (ROOT / "docs").glob("*.md")}
MODULES = [f"nt_deq.{name}" for name in ("flax", "gp", "gpjax", "iterations", "large")]
MODULES += [f"nt_deq.{name}" for name in ("sklearn", "stax", "theory", "tinygp")]


@pytest.mark.slow  # make docs runs them
@pytest.mark.parametrize("page", sorted(PAGES))
def test_page_runs(page):
    x64 = jax.config.jax_enable_x64
    try:
        run_python(f"docs/{page}")
    finally:
        jax.config.update("jax_enable_x64", x64)


def test_reference_has_what_is_public():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = [resolve_name(path) for path in re.findall(r"^::: (\S+)$", text, re.M)]
    for name in (n for n in nt_deq.__all__ if f"nt_deq.{n}" not in MODULES):
        assert any(getattr(nt_deq, name) is thing for thing in shown), name
    for path in MODULES:
        module = importlib.import_module(path)
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == path and not name.startswith("_")
            exported = name in getattr(module, "__all__", ()) and path != "nt_deq.stax"
            assert not (own or exported) or any(thing is other for other in shown), (path, name)
