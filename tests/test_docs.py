"""Documentation that runs: the README's Python blocks in order, every example in a docstring; links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pathlib
import pkgutil
import re

import pytest

import bayesmeta

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "GLOSSARY.md", "CHANGELOG.md")


def blocks(text: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def modules() -> list[str]:
    """Every module of the package, the zoo included."""
    found = pkgutil.walk_packages(bayesmeta.__path__, prefix="bayesmeta.")
    return ["bayesmeta", *(module.name for module in found)]


def test_the_readme_runs() -> None:
    code = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(code) >= 2
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(code):
            exec(compile(block, f"README block {number + 1}", "exec"), namespace)
    assert "corrected" in printed.getvalue()
    post = namespace["post"]
    assert isinstance(post, bayesmeta.Posterior)
    assert (post.flag == "").all()
    level, floor = post.mean("phi").mean(0)
    assert 1.2 < level < 1.8
    assert -1.0 < floor < -0.3


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    count = sum(bool(test.examples) for name in modules() for test in finder.find(importlib.import_module(name)))
    assert count >= 3


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("http", "#"))]
    missing = [target for target in targets if not (ROOT / target.split("#")[0]).exists()]
    assert missing == []
    assert targets or page != "README.md"


def test_the_quickstart_is_short() -> None:
    first = blocks((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 25
