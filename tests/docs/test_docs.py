"""Every page and the README run, and the reference has everything that is public."""

import importlib
import re
from pkgutil import resolve_name

import pytest
from documents import ROOT, python_code, run_apart

import nt_deq

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MODULES = [
    f"nt_deq.{name}" for name in ("activations", "flax", "gp", "gpjax", "fixed_point", "regression")
]
MODULES += [f"nt_deq.{name}" for name in ("sklearn", "stax", "theory", "tinygp")]
ELSEWHERE = "nt"  # neural-tangents has its own reference
# What is run besides what a page shows: there a program may be compiled into something else.
OTHER_SIZES = {
    "README.md": [
        {"(2, 20, 5)": "(2, 5, 3)", "DEQ(5, 256": "DEQ(3, 32", "Dense(256": "Dense(32",
         "(2, 8, 8, 3)": "(8, 16, 16, 3)"},
        {"(2, 20, 5)": "(2, 33, 16)", "DEQ(5, 256": "DEQ(16, 100", "Dense(256": "Dense(100",
         "(2, 8, 8, 3)": "(5, 7, 12, 1)"},
    ],
    "docs/existence.md": [
        {"(6, 4)": "(9, 4)", "4, 32": "4, 100"},
        {"(6, 4)": "(40, 4)", "4, 32": "4, 8"},
    ],
    "docs/faq.md": [{"(8, 4)": "(5, 4)"}, {"(8, 4)": "(32, 4)"}],
    "docs/index.md": [{"(20, 5)": "(1, 1)"}, {"(20, 5)": "(300, 40)"}],
    "docs/migration.md": [
        {"(10, 4)": "(16, 4)", "512": "16"},
        {"(10, 4)": "(32, 4)", "512": "100"},
    ],
    "docs/neural_ode.md": [{"(6, 4)": "(3, 7)"}, {"(6, 4)": "(12, 2)"}],
    "docs/precision.md": [{"(20, 5)": "(7, 3)"}, {"(20, 5)": "(300, 40)"}],
    "docs/solvers.md": [
        {"(20, 5)": "(7, 3)", "29 *": "9 *", "(4, 32)": "(7, 12)"},
        {"(20, 5)": "(300, 40)", "29 *": "125 *", "(4, 32)": "(1, 128)"},
    ],
    "docs/training.md": [
        {"12, 64": "1, 100", "> 0.97": "> 0.2", "(1, 24": "(1, 8", "24, 24, kernel": "8, 8, kernel",
         "(24, num_groups=8": "(8, num_groups=4", "* 24": "* 8", "(6, 4)": "(3, 4)",
         "Transformer(32": "Transformer(16"},
        {"12, 64": "1, 33", "> 0.97": "> 0.2", "(1, 24": "(1, 40",
         "24, 24, kernel": "40, 40, kernel", "(24, num_groups": "(40, num_groups", "* 24": "* 40",
         "(6, 4)": "(9, 4)", "Transformer(32": "Transformer(48"},
    ],
    "docs/tutorial.md": [
        {"(2, 20, 5)": "(2, 8, 5)", "256": "32", "128": "32"},
        {"(2, 20, 5)": "(2, 33, 5)", "256": "100", "128": "200"},
    ],
}  # fmt: skip


@pytest.mark.slow  # make docs runs them
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path):
    run_apart(page, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "sizes"), [(page, sizes) for page, both in OTHER_SIZES.items() for sizes in both]
)
def test_page_runs_at_other_sizes(page, sizes, tmp_path):
    run_apart(page, tmp_path, sizes)


@pytest.mark.parametrize("page", PAGES)
def test_what_draws_arrays_has_other_sizes(page):
    if "random.normal" in python_code(page):
        assert len(OTHER_SIZES.get(page, [])) == 2, f"OTHER_SIZES must name two for {page}"


def test_reference_has_what_is_public():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = [resolve_name(path) for path in re.findall(r"^::: (\S+)$", text, re.M)]
    for name in {*nt_deq.__all__} - {ELSEWHERE, *(m.removeprefix("nt_deq.") for m in MODULES)}:
        assert any(getattr(nt_deq, name) is thing for thing in shown), name
    for path in MODULES:
        module = importlib.import_module(path)
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == path and not name.startswith("_")
            exported = name in getattr(module, "__all__", ()) and path != "nt_deq.stax"
            assert not (own or exported) or any(thing is other for other in shown), (path, name)
