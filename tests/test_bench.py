"""The benchmark's machinery: what it counts, what it writes and what it notices. No test depends on a time."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_batchnorm
import contenders
import environment
import grid
import report
import timing
import timing_cuda
from grid import Point
from support import OpLog

KEYS = {
    *("device", "dtype", "shape", "layout", "mode", "contender", "median_us", "p20_us", "p80_us", "bytes", "gbps"),
    *("limit_fraction", "threads", "torch", "commit", "device_name", "python", "timestamp", "bn_ext", "isa", "speedup"),
    *("driver", "timing", "launches"),
}
ERROR = {
    "shape": [4, 4],
    "dtype": "float32",
    "layout": "contiguous",
    "contender": "nn",
    "mean_over_std": 10.0,
    "error": 0.5,
}
TINY = timing.Plan(block=1e-5, budget=0.0, min_rounds=2)


def measure(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the benchmark in this process with very short rounds and read its result file back."""
    monkeypatch.setattr(bench_batchnorm, "QUICK_PLAN", TINY)
    monkeypatch.setattr(bench_batchnorm, "FULL_PLAN", TINY)
    assert bench_batchnorm.main([*arguments, "--json", str(file)]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def record(contender: str, low: float, median: float, high: float, **others: Any) -> dict[str, Any]:
    times = {"p20_us": low, "median_us": median, "p80_us": high}
    point = {"shape": [32, 64], "dtype": "float32", "layout": "contiguous", "mode": "eval"}
    return {**point, "contender": contender, **times, **others}


def test_least_bytes_model() -> None:
    point = Point((32, 64))
    assert point.bytes == 32 * 64 * 4
    once = {"forward": 2 * 8192, "backward": 3 * 8192, "forward_backward": 5 * 8192, "eval": 2 * 8192}
    once |= {"double_backward": 10 * 8192, "gradient_penalty": 10 * 8192}
    twice = {"forward": 3 * 8192, "backward": 5 * 8192, "forward_backward": 8 * 8192, "eval": 2 * 8192}
    twice |= {"double_backward": 16 * 8192, "gradient_penalty": 16 * 8192}

    def moved(point: Point, contender: str, cache: int) -> dict[str, int]:
        return {mode: grid.least_bytes(point, mode, contender, cache) for mode in grid.MODES}

    for contender in ("bn_ext", "nn", "compile"):
        assert moved(point, contender, 3 * 8192) == once
        some = {"forward": 2 * 8192, "forward_backward": 7 * 8192, "double_backward": 15 * 8192}
        assert moved(point, contender, 8192) == {**twice, **some, "gradient_penalty": 15 * 8192}
        assert moved(point, contender, 8191) == twice
    assert moved(point, "copy", 0) == dict.fromkeys(grid.MODES, 2 * 8192)
    planes = Point((4, 8, 64))
    assert moved(planes, "nn", 3072) == once, "a channel of 1 KB stays in the cache, though the tensor does not"
    assert moved(planes, "nn", 1023) == twice
    assert moved(Point((4, 8, 64), layout="nlc"), "nn", 3072) == twice
    assert Point((32, 64), "bfloat16").bytes == Point((32, 64)).bytes // 2


def test_grid_covers_sizes_dtypes_and_layouts() -> None:
    assert set(grid.FLOAT32) <= set(grid.QUICK) <= set(grid.FULL)
    assert len(set(grid.FULL)) == len(grid.FULL)
    assert {"float32", "bfloat16", "float16", "float64"} == {point.dtype for point in grid.FULL}
    assert {"contiguous", "nlc"} == {point.layout for point in grid.FULL}
    assert min(p.bytes for p in grid.FLOAT32) < 1e4 and max(p.bytes for p in grid.FLOAT32) > 6e7


def test_the_grid_of_a_gpu_has_every_shape_in_three_types() -> None:
    assert len(set(grid.CUDA)) == len(grid.CUDA)
    large = {(2000000, 1, 3), (1000000, 16, 16), (136000, 16, 16), (262144, 1024), (8, 65536)}
    for dtype in ("float32", "bfloat16", "float16"):
        here = {(point.shape, point.layout) for point in grid.CUDA if point.dtype == dtype}
        assert here == {(p.shape, p.layout) for p in grid.FLOAT32 + grid.PERMUTED} | {(s, "contiguous") for s in large}
    assert set(grid.FULL) <= set(grid.CUDA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_make_the_tensor_that_they_name(dtype: str) -> None:
    cpu = torch.device("cpu")
    plain, permuted = Point((2, 3, 5), dtype).randn(cpu), Point((2, 3, 5), dtype, "nlc").randn(cpu)
    assert plain.shape == permuted.shape == (2, 3, 5)
    assert plain.stride() == (15, 5, 1) and permuted.stride() == (15, 1, 3)
    assert plain.dtype == permuted.dtype == getattr(torch, dtype)


def test_filter_patterns() -> None:
    assert grid.select(grid.FULL, ["32x64", "float32"]) == [Point((32, 64))]
    assert {p.shape[0] for p in grid.select(grid.FULL, ["65536x*"])} == {65536}
    assert {p.layout for p in grid.select(grid.FULL, ["nlc"])} == {"nlc"}
    assert len(grid.select(grid.FLOAT32, ["32x64,128x256"])) == 2
    assert grid.select(grid.FULL, []) == list(grid.FULL)


def test_result_file_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "figure.png"
    monkeypatch.setattr(bench_batchnorm.accuracy, "measure", lambda device: [{"mode": report.ACCURACY, **ERROR}])
    found = measure(monkeypatch, tmp_path / "r.jsonl", "--quick", "--filter", "32x64*,128x256", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    error = found.pop()
    assert error.items() >= ERROR.items() and error["commit"] == found[0]["commit"], (
        "what the figure shows is in the file"
    )
    points = grid.select(grid.QUICK, ["32x64*,128x256"])
    assert len(points) >= 4 and len(found) == len(points) * len(grid.DEFAULT_MODES) * 3
    for line in found:
        assert line.keys() >= KEYS
        assert 0 < line["p20_us"] <= line["median_us"] <= line["p80_us"]
        point = Point(tuple(line["shape"]), line["dtype"], line["layout"])
        assert line["bytes"] == grid.least_bytes(point, line["mode"], line["contender"], line["cache_bytes"])
        assert line["gbps"] == pytest.approx(line["bytes"] / (line["median_us"] * 1e-6) / 1e9)
    for row in report.rows(found):
        assert row.by_contender.keys() == {"bn_ext", "nn", "copy"}
        ours, native, copy = (row.by_contender[name] for name in ("bn_ext", "nn", "copy"))
        assert copy["limit_fraction"] == pytest.approx(1) and copy["speedup"] is None
        assert ours["limit_fraction"] == pytest.approx(ours["gbps"] / copy["gbps"])
        assert ours["speedup"] == pytest.approx(native["median_us"] / ours["median_us"]) == row.speedup


def test_script_runs_from_any_folder(tmp_path: Path) -> None:
    lines = [record("nn", 9, 10, 11), record("bn_ext", 4, 5, 6), record("copy", 1, 1, 1)]
    facts = environment.facts(torch.device("cpu"))
    extra = {"gbps": 1.0, "limit_fraction": 0.5}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({**facts, **line, **extra}) + "\n" for line in lines))
    command = [sys.executable, bench_batchnorm.__file__, "--load", "r.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "32x64 float32" in result.stdout and "2.00x" in result.stdout
    assert "slower than nn.BatchNorm1d beyond noise at 0 of 1" in result.stdout


def test_a_broken_compiler_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(module: nn.Module) -> nn.Module:
        raise RuntimeError("no working compiler\nsecond line")

    monkeypatch.setattr(contenders, "compiled", broken)
    found = measure(monkeypatch, tmp_path / "r.jsonl", "--filter", "32x64", "--modes", "forward,eval")
    assert {line["contender"] for line in found} == {"bn_ext", "nn", "onednn", "copy"} and len(found) == 8
    message = capsys.readouterr().err
    assert message.count("torch.compile does not work here") == 1
    assert "no working compiler" in message and "second line" not in message


def test_second_order_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They take the double backward of both; torch.compile, which has none, is left out."""
    monkeypatch.setattr(contenders, "compiled", lambda module: pytest.fail("compiled"))
    modes = ",".join(grid.SECOND_ORDER_MODES)
    found = measure(monkeypatch, tmp_path / "r.jsonl", "--filter", "32x64*", "--filter", "float32", "--modes", modes)
    assert {line["mode"] for line in found} == set(grid.SECOND_ORDER_MODES)
    assert {line["contender"] for line in found} == {"bn_ext", "nn", "copy"}


@pytest.mark.parametrize("mode", grid.SECOND_ORDER_MODES)
@pytest.mark.parametrize("layout", ["contiguous", "nlc"])
def test_second_order_steps_are_the_kernels(mode: str, layout: str) -> None:
    bench = contenders.Bench(Point((4, 3, 5), layout=layout), mode, torch.device("cpu"), sets=2)
    step = bench.step("bn_ext")
    with OpLog() as log:
        step()
    assert [name for name in log.names if "double_backward" in name] == ["bn_ext::batch_norm_double_backward"]
    assert all(x.grad is None for x in bench.inputs)


def test_compile_is_a_contender_of_the_full_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of both batch norms, and what was compiled for one is still there when the other is."""
    seen: list[str] = []

    def compiled(module: nn.Module) -> nn.Module:
        seen.append(type(module).__name__)
        return module

    monkeypatch.setattr(contenders, "compiled", compiled)
    monkeypatch.setattr(contenders, "forget_compiled", lambda: seen.append("forgotten"))
    found = measure(monkeypatch, tmp_path / "r.jsonl", "--filter", "32x64", "--modes", "forward_backward")
    assert sorted(line["contender"] for line in found) == sorted(grid.CONTENDERS)
    assert seen == ["forgotten", "BatchNorm1d", "FusedBatchNorm1d"]
    (line,) = report.compiled_means(report.rows(found))
    times = {line["contender"]: line["median_us"] for line in found}
    assert f"{times['compile'] / times['compiled']:.2f}x" in line


def test_disagreement_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Wrong(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 1.01

    cpu = torch.device("cpu")
    for point in grid.select(grid.QUICK, ["32x64*,1024x1024"]):
        contenders.check_agreement(point, cpu)
    monkeypatch.setattr(contenders.bn_ext, "FusedBatchNorm1d", Wrong)
    with pytest.raises(contenders.Disagreement, match="32x64 float32: output differs"):
        contenders.check_agreement(Point((32, 64)), cpu)
    assert bench_batchnorm.main(["--quick", "--filter", "32x64"]) == 1


def test_a_point_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(point: Point, device: torch.device) -> None:
        if point.shape == (32, 64):
            raise RuntimeError("out of luck\nsecond line")

    monkeypatch.setattr(bench_batchnorm, "QUICK_PLAN", TINY)
    monkeypatch.setattr(bench_batchnorm, "check_agreement", fail)
    file = tmp_path / "r.jsonl"
    arguments = ["--quick", "--filter", "32x64,128x256", "--filter", "float32", "--json", str(file)]
    assert bench_batchnorm.main(arguments) == 1
    assert {tuple(json.loads(line)["shape"]) for line in file.read_text().splitlines()} == {(128, 256)}
    message = capsys.readouterr().err
    assert "error: 32x64 float32: out of luck\n" in message and "1 of 2 points went wrong" in message


@pytest.mark.parametrize("contender", ["bn_ext", "nn"])
@pytest.mark.parametrize("layout", ["contiguous", "nlc"])
def test_step_runs_backward_and_leaves_no_gradient(contender: str, layout: str) -> None:
    bench = contenders.Bench(Point((4, 3, 5), layout=layout), "forward_backward", torch.device("cpu"), sets=2)
    seen: list[int] = []
    for place, x in enumerate(bench.inputs):
        x.register_hook(lambda grad, place=place: seen.append(place))
    step = bench.step(contender)
    for _ in range(4):
        step()
    assert seen == [0, 1, 0, 1]
    assert all(x.grad is None for x in bench.inputs)


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


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--modes", "sideways"], ["--threads", "0"], ["--device", "abacus"], ["--filter", "7x7"]),
        *(["--seconds", "0"], ["--replay"], ["--plot", "x.png", "--fusion"]),
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_batchnorm.parse(arguments)
    assert stopped.value.code == 2
    assert arguments[0].strip("-").rstrip("s") in capsys.readouterr().err


def test_threads_are_set_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--quick", "--filter", "32x64", "--modes", "eval", "--threads", "1")
    assert {line["threads"] for line in measure(monkeypatch, tmp_path / "r.jsonl", *arguments)} == {1}


def test_quick_shares_what_is_left_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    args = bench_batchnorm.parse(["--quick"])
    runner = bench_batchnorm.Runner(args, bench_batchnorm.Console(stderr=True))
    now = runner.deadline - bench_batchnorm.QUICK_SECONDS
    monkeypatch.setattr(bench_batchnorm.time, "perf_counter", lambda: now + 35.0)
    assert runner.plan_for(100).budget == pytest.approx(0.05)
    assert runner.plan_for(1).budget == bench_batchnorm.QUICK_PLAN.budget
    monkeypatch.setattr(bench_batchnorm.time, "perf_counter", lambda: now + 50.0)
    late = runner.plan_for(10)
    assert late.budget == 0.0 and late.min_rounds < bench_batchnorm.QUICK_PLAN.min_rounds


def test_seconds_are_shared_by_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = bench_batchnorm.Runner(bench_batchnorm.parse(["--seconds", "100"]), bench_batchnorm.Console(stderr=True))
    start = runner.deadline - 85.0
    monkeypatch.setattr(bench_batchnorm.time, "perf_counter", lambda: start + 35.0)
    assert runner.plan_for(100).budget == pytest.approx(0.5)
    assert runner.plan_for(1) == bench_batchnorm.SHARED_PLAN
    assert bench_batchnorm.Runner(bench_batchnorm.parse([]), bench_batchnorm.Console(stderr=True)).deadline is None


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("timing_by", [(), ("--replay",)], ids=["calls", "replay"])
def test_cuda_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timing_by: tuple[str, ...]) -> None:
    arguments = ("--quick", "--filter", "32x64*", "--device", "cuda", *timing_by)
    found = measure(monkeypatch, tmp_path / "r.jsonl", *arguments)
    assert found and all(line["median_us"] > 0 and line["cuda"] and line["driver"] for line in found)
    assert {line["timing"] for line in found} == {"replay" if timing_by else "calls"}
    for line in found:
        assert line["launches"] is None if line["contender"] == "copy" else line["launches"] >= 1, line


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
