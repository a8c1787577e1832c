"""What docs/gpu.md says that the kernels execute is what they execute."""

from __future__ import annotations

import re
import subprocess

import pytest

import nvcc
from processes import ROOT
from ptx.count import page

PAGE = ROOT / "docs" / "gpu.md"


def test_the_page_has_what_is_counted() -> None:
    home = nvcc.toolkit_or_skip()
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if "V13.0.88" not in said:
        pytest.skip("another nvcc makes other code")
    if not PAGE.exists():
        pytest.skip("there is no docs/ beside these tests")
    table = re.search(r"<!-- counted -->\n(.*?)\n<!-- counted until here -->", PAGE.read_text(), re.S)
    assert table is not None
    assert table[1].split("\n") == page(), "python tests/ptx/count.py --page prints the table"
