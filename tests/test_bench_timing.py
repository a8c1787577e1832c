"""What times, counts and sums up in the benchmark. No test depends on a time."""

from __future__ import annotations

import gc
import itertools
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import contenders
import environment
import report
import timing
import timing_cuda
from bench_support import TINY, record
from grid import Point


def test_copy_step_copies_each_set() -> None:
    bench = contenders.Bench(Point((4, 3, 5), layout="nlc"), "eval", torch.device("cpu"), sets=2)
    step = bench.step("copy")
    pairs = step.__closure__[0].cell_contents  # type: ignore[attr-defined]
    targets = [target for target, _ in itertools.islice(pairs, 2)]
    step()
    step()
    for target, source in zip(targets, bench.inputs, strict=True):
        assert torch.equal(target, source) and target.stride() == source.stride()
        assert target.data_ptr() != source.data_ptr()


def test_race_gives_every_contender_the_same_rounds() -> None:
    durations = {"a": itertools.cycle([1.0, 2.0, 3.0, 4.0, 5.0]), "b": itertools.repeat(7.0)}
    calls = {"a": 0, "b": 0}
    collected: list[bool] = []

    def step(name: str) -> Any:
        def run() -> None:
            calls[name] += 1

        run.name = name  # type: ignore[attr-defined]
        return run

    def clock(run: Any, count: int) -> float:
        collected.append(gc.isenabled())
        assert count == 1
        return next(durations[run.name])

    steps = {"a": step("a"), "b": step("b")}
    # Ten rounds see each of the five durations twice, wherever in the cycle calibration left off.
    plan = timing.Plan(block=0.5, budget=0.0, min_rounds=10)
    times = timing.race(steps, clock, plan)
    assert times["a"] == timing.Times(median=3.0, p20=1.8, p80=4.2, rounds=10)
    assert times["b"] == timing.Times(7.0, 7.0, 7.0, 10)
    assert calls == {"a": 10, "b": 10}, "one untimed call before each block"
    assert not any(collected) and gc.isenabled()


def test_calibration_fills_a_block() -> None:
    total = 0

    def clock(step: timing.Step, count: int) -> float:
        nonlocal total
        total += count
        return count * 1e-6

    assert timing.calibrate(lambda: None, clock, 1e-3) == 1000
    assert total < 2000, "calibrating costs about one block"
    assert timing.calibrate(lambda: None, lambda step, count: 1.0, 1e-3) == 1


def test_garbage_collection_comes_back_after_an_error() -> None:
    def failing(step: timing.Step, count: int) -> float:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        timing.race({"a": lambda: None}, failing, TINY)
    assert gc.isenabled()


def test_percentile_interpolates() -> None:
    assert timing.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert timing.percentile([7.0], 0.8) == 7.0
    assert timing.percentile([1.0, 2.0], 1.0) == 2.0


@pytest.mark.parametrize(("ours", "verdict"), [((20, 21, 22), "slower"), ((10, 12, 14), "even"), ((1, 2, 3), "faster")])
def test_verdict_needs_ranges_apart(ours: tuple[float, float, float], verdict: str) -> None:
    (row,) = report.rows([record("nn", 9, 10, 11), record("bn_ext", *ours)])
    assert row.verdict == verdict
    lines = report.comparison([row])
    assert lines[0].endswith(f"at {int(verdict == 'slower')} of 1 measurements")
    assert any("32x64 float32, eval" in line for line in lines[1:]) == (verdict != "faster")


def test_geometric_mean_by_mode_dtype_and_layout() -> None:
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    pairs = []
    for shape, median in (([32, 64], 5.0), ([128, 256], 1.25)):
        pairs += [record("nn", 10, 10, 10, shape=shape), record("bn_ext", median, median, median, shape=shape)]
    pairs += [record("nn", 9, 9, 9, dtype="bfloat16"), record("bn_ext", 9, 9, 9, dtype="bfloat16")]
    lines = report.means(report.rows(pairs))
    assert len(lines) == 2
    assert lines[0].split()[:3] == ["eval", "float32", "4.00x"] and "from 2.00x to 8.00x, points: 2" in lines[0]
    assert lines[1].split()[:3] == ["eval", "bfloat16", "1.00x"]


def test_commit_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"


def test_driver_is_what_its_own_tool_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.driver() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1.2\n")
    tool.chmod(0o755)
    assert environment.driver() == "580.1.2"


def test_cuda_input_sets_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    megabyte = 1 << 20
    properties = SimpleNamespace(L2_cache_size=50 * megabyte)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    for size in (4, 16, 64, 200):
        assert (timing_cuda.input_sets(size * megabyte, device) - 1) * size >= 2 * 50
    assert timing_cuda.input_sets(200 * megabyte, device) == 2
    assert timing_cuda.input_sets(1, device) == timing_cuda.MAX_SETS


def test_launches_are_what_ran_on_the_gpu() -> None:
    cuda, cpu = timing_cuda.DeviceType.CUDA, timing_cuda.DeviceType.CPU
    events = [
        SimpleNamespace(name="cudaLaunchKernel", device_type=cpu, is_user_annotation=False),
        SimpleNamespace(name="kernel", device_type=cuda, is_user_annotation=False),
        SimpleNamespace(name="Memset (Device)", device_type=cuda),
        SimpleNamespace(name="a range", device_type=cuda, is_user_annotation=True),
    ]
    assert timing_cuda.on_device(events) == ["kernel", "Memset (Device)"]


def test_launches_are_a_column_where_they_were_counted() -> None:
    pair = [record("nn", 9, 10, 11, launches=5), record("bn_ext", 4, 5, 6, launches=1, gbps=1.0, limit_fraction=0.5)]
    column = report.table(report.rows(pair), "eval").columns[-1]
    assert column.header == "launches" and list(column.cells) == ["1 : 5"]
    for line in pair:
        line["launches"] = None
    assert report.table(report.rows(pair), "eval").columns[-1].header == "of limit"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the policy is glibc's mallopt")
def test_memory_policies_change_where_large_outputs_land() -> None:
    """Ten outputs of 16 MB, one after the other: recycled memory is faulted in once, fresh memory every time."""
    script = """
import resource, sys, torch, environment
environment.set_memory(sys.argv[1])
x = torch.ones(1 << 22)
for _ in range(30):  # an aligned allocation may not fit where the last one was: glibc walks a little first
    x.relu()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x.relu()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for policy in ("fresh", "recycled"):
        command = [sys.executable, "-c", script, policy]
        folder = Path(environment.__file__).parent
        faults[policy] = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout)
    # A 16 MB output has 4096 small pages, or 8 huge ones where the system uses them unasked.
    assert faults["recycled"] < 8 <= faults["fresh"] / 10
