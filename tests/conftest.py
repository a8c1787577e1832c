"""Fixtures, the device parameter, hypothesis profiles, and the accuracy table printed after the run."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from bn_ext import _C
from processes import SECTIONS
from support import DEVICES, no_cuda_reason

# The same examples on every run by default, so that a red run can be repeated; "explore" draws new ones.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("repeatable", derandomize=True, max_examples=150, **_COMMON)
settings.register_profile("explore", derandomize=False, max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Compiled graphs stay on disk, and torch does not see that the operators in them have changed with the library.
_LIBRARY = Path(_C.__file__).stat()
_GRAPHS = Path(tempfile.gettempdir()) / f"bn_ext_graphs_{_LIBRARY.st_mtime_ns}_{_LIBRARY.st_size}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_GRAPHS))

Row = tuple[str, str, float, float, float]
_TABLE = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: small accuracy and layout core, also run once per instruction-set level")
    config.stash[_TABLE], config.stash[SECTIONS] = [], []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give what a worker of pytest-xdist has to print to the process that prints; write which kernels ran."""
    if "simt.tally" in sys.modules:
        sys.modules["simt.tally"].write()
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["printed"] = session.config.stash[_TABLE], session.config.stash[SECTIONS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    rows, sections = getattr(node, "workeroutput", {}).get("printed", ((), ()))
    node.config.stash[_TABLE] += [tuple(row) for row in rows]
    node.config.stash[SECTIONS] += [tuple(section) for section in sections]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; those that cannot run here are skipped with the reason, all from this one place."""
    if request.param != "cpu" and no_cuda_reason():
        pytest.skip(no_cuda_reason())
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give all skips for want of CUDA one place, so that the summary has one line for them and not one a test."""
    report = yield
    reason = no_cuda_reason()
    if report.skipped and reason and isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(reason):
        report.longrepr = (__file__, 0, report.longrepr[2])
    return report


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Every test starts from the same seed and leaves no thread count and no compiled frame behind.

    torch counts how often a function was compiled, over all tests of a process, and gives up at a limit.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


@pytest.fixture
def accuracy_row(request: pytest.FixtureRequest) -> Callable[[str, str, float, float, float], None]:
    """Add a row (case, quantity, our error, native's error, bound) to the table of the terminal summary."""

    def add(case: str, quantity: str, ours: float, native: float, bound: float) -> None:
        request.config.stash[_TABLE].append((case, quantity, ours, native, bound))

    return add


def _worst_by_ratio(rows: list[Row]) -> list[Row]:
    """One row for each mean/std and quantity: the largest errors over all shapes."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row[0].rpartition("mean/std ")[2], row[1]), []).append(row)
    return [
        (f"mean/std {ratio}, {len(g)} shapes", quantity, max(r[2] for r in g), max(r[3] for r in g), g[0][4])
        for (ratio, quantity), g in groups.items()
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in config.stash[SECTIONS]:
        terminalreporter.section(title)
        terminalreporter.write("".join(f"{line}\n" for line in lines))
    rows = config.stash[_TABLE]
    if not rows:
        return
    verbose = config.get_verbosity() > 0
    kind = "every case" if verbose else "worst over shapes; -v shows every case"
    terminalreporter.section(f"error against float64, bn_ext beside nn.BatchNorm1d ({kind})")
    rows = rows if verbose else _worst_by_ratio(rows)
    width = max(len(row[0]) for row in rows)
    header = f"{'case':<{width}}  {'quantity':<12}  {'bn_ext':>9}  {'nn':>9}  {'bound':>9}  {'nn/bn_ext':>9}"
    terminalreporter.write_line(header)
    for case, quantity, ours, native, bound in rows:
        ratio = f"{native / ours:9.3g}" if ours > 0 else "        -"
        terminalreporter.write_line(
            f"{case:<{width}}  {quantity:<12}  {ours:9.2e}  {native:9.2e}  {bound:9.1e}  {ratio}"
        )
