"""Instructions per element of the CPU kernels, counted by callgrind: a regression guard that needs no quiet machine.

The counts are exact for one compiler and one source, so the committed figures (instructions/counts.json, by the first
line of `g++ --version`) hold for that compiler only; elsewhere the test is skipped. After a change that is meant to
move them: BN_EXT_UPDATE_COUNTS=1 python -m pytest tests/test_instructions.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "instructions" / "driver.cpp"
COUNTS = HERE / "instructions" / "counts.json"
UPDATE = "BN_EXT_UPDATE_COUNTS"
CASES = re.findall(r'\{"(\w+)",\s+\{(\d+), (\d+), (\d+)\}', DRIVER.read_text())
# Another minor release of the C library or of valgrind may count its own few calls differently.
TOLERANCE = 0.02


def compiler() -> str:
    """The first line that g++ says of itself, "" where there is none."""
    if not shutil.which("g++"):
        return ""
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"^flags.*\bavx2\b.*", info.read_text(), re.M) is not None


@pytest.fixture(scope="module")
def committed() -> dict[str, float]:
    """Instructions per element of this compiler's code."""
    if not shutil.which("valgrind"):
        pytest.skip("no valgrind on this machine")
    if not avx2():
        pytest.skip("this machine has no AVX2")
    known: dict[str, dict[str, float]] = json.loads(COUNTS.read_text())
    if compiler() not in known and not os.environ.get(UPDATE):
        pytest.skip(f"no figures for this compiler: {compiler() or 'there is no g++'}")
    return known.get(compiler(), {})


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("instructions") / "driver"
    command = ["g++", "-std=c++20", "-O3", f"-I{HERE.parent / 'csrc'}", str(DRIVER), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True)
    return binary


def instructions(binary: Path, name: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(binary), name, str(times)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Collected : (\d+)", said)[1])


@pytest.mark.parametrize(("name", "n", "c", "length"), CASES, ids=[case[0] for case in CASES])
def test_instructions_per_element(
    committed: dict[str, float], driver: Path, name: str, n: str, c: str, length: str
) -> None:
    numel = int(n) * int(c) * int(length)
    # Two more runs than one: start, fill and first-call costs cancel.
    count = (instructions(driver, name, 3) - instructions(driver, name, 1)) / 2 / numel
    assert count > 0.1, "fewer instructions than vectors of 8 elements need: nothing ran"
    if os.environ.get(UPDATE):
        known = json.loads(COUNTS.read_text())
        known.setdefault(compiler(), {})[name] = round(count, 3)
        COUNTS.write_text(json.dumps(known, indent=2) + "\n")
        return
    assert count == pytest.approx(committed[name], rel=TOLERANCE), (
        f"{name}: {count:.3f} instructions per element, {committed[name]} committed; see the top of this file"
    )
