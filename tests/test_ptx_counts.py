"""What docs/gpu.md says that the kernels execute is what they execute, and what they should take is the model's."""

from __future__ import annotations

import re
import subprocess

import pytest

import bench_support  # noqa: F401 (makes bench/ importable)
import nvcc
import roofline
from bn_ext import launches
from processes import ROOT
from ptx.count import page

PAGE = ROOT / "docs" / "gpu.md"


def block(name: str) -> list[str]:
    """The table between the marks of that name."""
    if not PAGE.exists():
        pytest.skip("there is no docs/ beside these tests")
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- {name} until here -->", PAGE.read_text(), re.S)
    assert found is not None
    return found[1].split("\n")


def test_the_page_has_what_the_model_says() -> None:
    on = launches.PRESETS["H200"]
    assert on.bandwidth is not None
    assert block("roofline") == roofline.page(on, on.bandwidth), "python bench/roofline.py --page prints the table"


def test_the_page_has_what_is_counted() -> None:
    home = nvcc.toolkit_or_skip()
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if "V13.0.88" not in said:
        pytest.skip("another nvcc makes other code")
    assert block("counted") == page(), "python tests/ptx/count.py --page prints the table"
