"""The pages say what is true: their code runs, their links lead somewhere, every public name is described."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import bn_ext
from processes import PACKAGE, ROOT, run

PAGES = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [ROOT / "README.md", *PAGES]
WITH_LINKS = [*WITH_CODE, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
if not PAGES:
    pytest.skip("there is no docs/ beside these tests", allow_module_level=True)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(text: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL)


# ---- code ----

NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^\n]+?) -->\s*\Z")


class Block(NamedTuple):
    code: str
    line: int  # of its first line in the page
    not_run: str  # why, "" for one that runs


def blocks_of(page: Path) -> list[Block]:
    """The ```python blocks of a page; a comment <!-- not run: why --> before one keeps it from being run."""
    text, found = page.read_text(), []
    for fence in fences(text):
        if fence["language"].strip() == "python":
            mark = NOT_RUN.search(text, 0, fence.start())
            found.append(Block(fence["code"], text.count("\n", 0, fence.start("code")), mark["why"] if mark else ""))
    return found


@pytest.mark.filterwarnings("ignore")  # torch's, of its own parts
@pytest.mark.parametrize("page", [page for page in WITH_CODE if blocks_of(page)], ids=name_of)
def test_code_of_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as one module, as a reader types it. A file, since fusing reads the source of classes."""
    lines = [""] * page.read_text().count("\n")
    for block in blocks_of(page):
        if not block.not_run:  # each line where the page has it, so that a traceback tells where that is
            code = block.code.splitlines()
            lines[block.line : block.line + len(code)] = code
    file = tmp_path / f"{page.stem}.py"
    file.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    spec = spec_from_file_location(f"code_of_{page.stem}", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


def test_few_blocks_are_not_run() -> None:
    assert sum(bool(block.not_run) for page in WITH_CODE for block in blocks_of(page)) <= 3


def modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(bn_ext.__path__, "bn_ext.")]
    return [bn_ext, *(importlib.import_module(name) for name in names if name != "bn_ext._C")]


DOCTESTS = [
    test for module in modules() for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("test", DOCTESTS, ids=lambda test: test.name)
def test_examples_of_docstrings(test: doctest.DocTest) -> None:
    """They import what they use: nothing of their module is there by itself."""
    report: list[str] = []
    alone = doctest.DocTest(test.examples, {}, test.name, test.filename, test.lineno, test.docstring)
    result = doctest.DocTestRunner(verbose=False).run(alone, out=report.append)
    assert not result.failed, "".join(report)


# ---- every public name is described ----

PUBLIC: dict[str, Callable[..., Any]] = {
    **{f"bn_ext.{name}": getattr(bn_ext, name) for name in bn_ext.__all__ if callable(getattr(bn_ext, name))},
    **{f"bn_ext.functional.{name}": getattr(bn_ext.functional, name) for name in bn_ext.functional.__all__},
}
COMPUTES = {name for name, made in PUBLIC.items() if inspect.isclass(made) or name.startswith("bn_ext.functional.")}


def sections_of(made: Callable[..., Any]) -> dict[str, str]:
    """Heading -> text below it, of a docstring of Google's style."""
    parts = re.split(r"^([A-Z]\w+):$", inspect.cleandoc(made.__doc__ or ""), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_every_section(name: str) -> None:
    sections, takes = sections_of(PUBLIC[name]), inspect.signature(PUBLIC[name]).parameters
    wanted = {"Example"} | ({"Args", "Raises"} if takes else set()) | ({"Shape"} if name in COMPUTES else set())
    assert wanted <= set(sections)
    assert ">>> " in sections["Example"]
    described = re.findall(r"^ {4}(\w[\w, ]*):", sections.get("Args", ""), re.MULTILINE)
    names = {one.strip() for group in described for one in group.split(",")}
    assert set(takes) <= names, "an argument without a word"


def test_the_page_of_the_api_has_every_name_and_no_other() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE)
    assert set(PUBLIC) <= set(shown) and len(set(shown)) == len(shown)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    assert "__version__" in text and {f"bn_ext.{name}" for name in bn_ext.__all__} <= {
        *PUBLIC, "bn_ext.functional", "bn_ext.__version__"
    }  # fmt: skip


# ---- links ----


def prose_of(page: Path) -> str:
    """A page without its blocks of code, and without brackets in its spans of code, which are no links."""
    text = page.read_text()
    for fence in reversed(list(fences(text))):
        text = text[: fence.start()] + text[fence.end() :]
    return re.sub(r"`([^`]*)`", lambda span: re.sub(r"[\[\]()]", "", span[1]), text)


def anchors_of(page: Path) -> set[str]:
    """What # of a link to a page may name: headings, as hosts of Markdown spell them, and what autodoc puts there."""
    shown = re.findall(r"^\.\. auto\w+:: ([\w.]+)", page.read_text(), re.MULTILINE)
    headings = re.findall(r"^#+ +(.+?) *$", prose_of(page), re.MULTILINE)
    return {*shown, *(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)}


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for text, target in re.findall(r"\[([^\[\]]*)\]\(([^)\s]+)\)", prose_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue  # another site
        file = page.parent / path if path else page
        known = file.exists() and file.resolve().is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors_of(file)) or not text:
            broken.append(f"[{text}]({target})")
    assert broken == []


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    """`csrc/cuda/plan.h` in a sentence is a link too, for those who read the page beside the sources."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    spans = re.findall(rf"`((?:{folders})/[\w./*-]*)`", page.read_text())
    ours = [span for span in spans if not span.startswith(("build/", "out/"))]
    assert [span for span in ours if not any(ROOT.glob(span.rstrip("/")))] == []


# ---- the site ----


def test_the_site_can_be_built(tmp_path: Path) -> None:
    """As `make docs` does: a warning fails it, and a broken link is one."""
    missing = [name for name in ("sphinx", "myst_parser", "furo") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the site's generator is not installed: {', '.join(missing)} (make docs)")
    options = ["-a", "-E", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    pages, site = str(ROOT / "docs"), str(tmp_path / "site")
    run(sys.executable, "-m", "sphinx", *options, pages, site, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert "bn_ext.FusedBatchNorm1d" in (tmp_path / "site" / "api.html").read_text()
