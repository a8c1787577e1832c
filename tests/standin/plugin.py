"""pytest -p standin.plugin, in a process with the stand-in: which tests run, and how long one may."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from standin import skips

RUNTIME = ctypes.CDLL(None)
RUNTIME.standin_log_end.restype = ctypes.c_char_p
# A test that takes longer counts as failed; it is looked at where the interpreter comes back to Python.
SECONDS = int(os.environ.get("STANDIN_TEST_SECONDS", "180"))

torch.cuda.init()
torch._C._jit_override_can_fuse_on_gpu(False)  # TorchScript would compile kernels for the GPU


def work_of(call: Callable[[], object]) -> list[tuple[int, str]]:
    """(stream, name) of each kernel, copy, fill and operator that a call puts on the device."""
    torch.cuda.synchronize()
    RUNTIME.standin_log_begin()
    try:
        call()
    finally:
        text = RUNTIME.standin_log_end().decode()
    lines = [line.partition(" ") for line in text.splitlines()]
    return [(0 if at == "(nil)" else int(at, 16), name) for at, _, name in lines]


def launched(step: Callable[[], None], device: torch.device) -> list[str]:
    """In the place of bench/timing_cuda.py's, which asks the GPU's profiler."""
    return [name for _, name in work_of(step)]


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import timing_cuda

    timing_cuda.launched = launched


def wants_cuda(item: pytest.Item) -> bool:
    """Whether a test is one for a GPU: by its device, or by its file."""
    callspec = getattr(item, "callspec", None)
    device = callspec.params.get("device") if callspec else None
    return str(device).startswith("cuda") if device is not None else item.path.name in skips.CUDA_FILES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    caching = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
    chosen = [item for item in items if wants_cuda(item) and skips.needs_allocator(item.nodeid) == caching]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
    for item in items:
        callspec = getattr(item, "callspec", None)
        if why := skips.reason(item.nodeid, callspec.params if callspec else {}):
            item.add_marker(pytest.mark.skip(reason=why))


class TooLong(AssertionError):
    pass


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    def stop(number: int, frame: object) -> None:
        raise TooLong(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


OUTCOMES: list[tuple[str, str, str, float]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what has ended to the file that run.py reads, so that a process that is stopped has told of it."""
    if report.when != "call" and report.passed:
        return
    why = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
    if report.failed:
        why = report.longreprtext.strip().splitlines()[-1] if report.longreprtext else ""
    if path := os.environ.get("STANDIN_OUTCOMES"):
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, why, report.duration]) + "\n")
