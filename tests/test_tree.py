"""The rule of csrc's tree: who may include whom. It is what lets a room be read, compiled and tested by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from processes import ROOT

CSRC = ROOT / "csrc"
if not CSRC.is_dir():
    pytest.skip("there is no csrc/ beside these tests", allow_module_level=True)

# What a folder may include of the others. Only torch/ may include torch's own headers.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "torch"},
}
OF_TORCH = ("torch/", "ATen/", "c10/", "caffe2/", "pybind11/")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())


def wrong(folder: str, text: str, here: Path = CSRC) -> list[str]:
    """The includes of a file of ``folder`` that the rule forbids, or that lead nowhere."""
    found = []
    for quote, name in INCLUDE.findall(text):
        if quote == "<":
            if folder != "torch" and name.startswith(OF_TORCH):
                found.append(name)
            continue
        own = here / folder / name
        path = own if own.is_file() else here / name
        if not path.is_file() or path.relative_to(here).parts[0] not in MAY_INCLUDE[folder]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_file_includes_what_its_folder_may(path: Path) -> None:
    folder, *_ = path.relative_to(CSRC).parts
    assert folder in MAY_INCLUDE and len(path.relative_to(CSRC).parts) == 2, "a file lies in one of four folders"
    assert not wrong(folder, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("folder", "line", "forbidden"),
    [
        ("core", "#include <ATen/core/Tensor.h>", True),
        ("cpu", "  # include <c10/util/Half.h>", True),
        ("cuda", "#include <cuda_runtime.h>", False),
        ("cpu", '#include "cuda/plan.h"', True),
        ("cuda", '#include "cpu/entries.h"', True),
        ("core", '#include "torch/checks.h"', True),
        ("cpu", '#include "core/kernels.h"', False),
        ("cpu", '#include "no_such.h"', True),
        ("torch", "#include <torch/library.h>", False),
    ],
)
def test_the_rule_tells_right_from_wrong(folder: str, line: str, forbidden: bool) -> None:
    assert bool(wrong(folder, f"// a file\n{line}\n")) is forbidden


def test_no_file_is_too_long_for_a_head() -> None:
    long = {path.name: lines for path in FILES if (lines := path.read_text(encoding="utf-8").count("\n")) > 400}
    assert not long
