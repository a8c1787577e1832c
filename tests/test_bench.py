"""The benchmark's machinery: what it counts, what it writes and what it notices. No test depends on a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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
from bench_support import TINY, record
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


def measure(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the benchmark in this process with very short rounds and read its result file back."""
    monkeypatch.setattr(bench_batchnorm, "QUICK_PLAN", TINY)
    monkeypatch.setattr(bench_batchnorm, "FULL_PLAN", TINY)
    assert bench_batchnorm.main([*arguments, "--json", str(file)]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("timing_by", [(), ("--replay",)], ids=["calls", "replay"])
def test_cuda_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timing_by: tuple[str, ...]) -> None:
    arguments = ("--quick", "--filter", "32x64*", "--device", "cuda", *timing_by)
    found = measure(monkeypatch, tmp_path / "r.jsonl", *arguments)
    assert found and all(line["median_us"] > 0 and line["cuda"] and line["driver"] for line in found)
    assert {line["timing"] for line in found} == {"replay" if timing_by else "calls"}
    for line in found:
        assert line["launches"] is None if line["contender"] == "copy" else line["launches"] >= 1, line
