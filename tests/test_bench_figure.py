"""The benchmark's figure, the errors that it shows, and the warning of a busy machine."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from rich.console import Console

import accuracy
import bench_batchnorm
import plot
import report
from grid import CUDA, FLOAT32, OTHER_DTYPES, PERMUTED, Point
from pictures import assert_nothing_overlaps

FACTS = {"device": "cpu", "device_name": "a processor", "threads": 2, "torch": "2", "bn_ext": "1", "commit": "abc"}
FACTS |= {"isa": "avx2", "torch_isa": "AVX2", "load_average": 0.1}
MODES = ("forward", "backward", "forward_backward", "eval")
SLOW, EVEN = (1024, 1024), (8192, 512)


def timed(points: Any = FLOAT32 + PERMUTED, modes: Any = MODES, **others: Any) -> list[dict[str, Any]]:
    """Records of three contenders: bn_ext 2 to 10 times as fast, slower at SLOW, slower within noise at EVEN."""
    found = []
    for number, (point, mode) in enumerate(itertools.product(points, modes)):
        ours = {SLOW: 15.0, EVEN: 10.2}.get(point.shape, 10 / (2 + number % 9))
        for contender, median in (("bn_ext", ours), ("nn", 10.0), ("copy", 1.0)):
            times = {"median_us": median, "p20_us": 0.95 * median, "p80_us": 1.05 * median, "gbps": 1.0}
            share = None if contender == "nn" else 0.01 * (1 + number)
            found.append({**FACTS, **others, "shape": list(point.shape), "dtype": point.dtype, "layout": point.layout,
                          "mode": mode, "contender": contender, "limit_fraction": share, **times})  # fmt: skip
    return found


def errors_of() -> list[dict[str, Any]]:
    return [
        {**FACTS, "shape": list(point.shape), "dtype": "float32", "layout": "contiguous", "mode": report.ACCURACY,
         "contender": contender, "mean_over_std": ratio, "error": size * ratio}
        for point in accuracy.POINTS
        for contender, size in (("bn_ext", 1e-7), ("nn", 1e-6))
        for ratio in accuracy.RATIOS
    ]  # fmt: skip


def test_bars_are_the_speedups_sorted_by_size() -> None:
    records = timed()
    axes = plot.figure(records + errors_of()).axes[0]
    assert axes.get_title() == "speed-up, forward + backward, float32"
    rows = [row for row in report.rows(records) if row.mode == "forward_backward"]
    bars = axes.patches
    assert len(bars) == len(rows) == 14 and all(bar.get_x() == 1 for bar in bars)
    names = [label.get_text().partition(",")[0] for label in axes.get_yticklabels()]
    sizes = [next(row.point.bytes for row in rows if row.point.name == name) for name in names]
    assert sizes == sorted(sizes, reverse=True), "the first bar is the lowest"
    expected: dict[tuple[str, bool], float] = {(r.point.name, r.point.layout == "nlc"): r.speedup or 0.0 for r in rows}
    drawn = {(name, bool(bar.get_hatch())): 1 + bar.get_width() for name, bar in zip(names, bars, strict=True)}
    assert drawn == pytest.approx(expected)
    red = [name for name, bar in zip(names, bars, strict=True) if as_hex(bar) == plot.SLOWER]
    assert red == ["1024x1024"], "within noise is not slower"
    assert [text.get_text() for text in axes.texts] == [f"{1 + bar.get_width():.2f}" for bar in bars]
    assert legend(axes) == ["contiguous", "made as (N, L, C)", "slower beyond noise"]


def as_hex(bar: Any) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in bar.get_facecolor()[:3])


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_limits_are_markers_without_lines() -> None:
    records = timed(FLOAT32 + PERMUTED + OTHER_DTYPES)
    axes = plot.figure(records + errors_of()).axes[1]
    assert legend(axes) == ["forward", "forward + backward", "eval"]
    *curves, limit = axes.lines
    assert list(limit.get_ydata()) == [1, 1]
    assert len({curve.get_marker() for curve in curves}) == 3
    for curve, mode in zip(curves, ("forward", "forward_backward", "eval"), strict=True):
        assert curve.get_linestyle() == "None"
        rows = [r for r in report.rows(records) if r.mode == mode and r.point in FLOAT32]
        shares = [row.by_contender["bn_ext"]["limit_fraction"] for row in rows]
        assert list(curve.get_xdata()) == [row.point.bytes / 1e6 for row in rows] and list(curve.get_ydata()) == shares
        assert axes.get_ylim()[1] > max(shares)


def test_errors_are_drawn_over_mean_by_std() -> None:
    axes = plot.figure(timed() + errors_of()).axes[2]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log") and len(axes.lines) == 4
    for line in axes.lines:
        assert list(line.get_xdata()) == [10.0**power for power in range(7)]
        assert line.get_ydata()[0] == (1e-7 if line.get_label().startswith("bn_ext") else 1e-6)


def only(records: list[dict[str, Any]], *contenders: str) -> list[dict[str, Any]]:
    return [record for record in records if record["contender"] in contenders]


USUAL, LIMITS = "speed-up, forward + backward, float32", "share of the memory's limit, float32"


@pytest.mark.parametrize(
    ("records", "titles"),
    [
        (timed(), [USUAL, LIMITS]),
        (timed(modes=["backward"]), ["speed-up, backward, float32", LIMITS]),
        (timed(OTHER_DTYPES), [USUAL.replace("float32", "bfloat16"), LIMITS.replace("float32", "bfloat16")]),
        (timed(PERMUTED), [USUAL]),
        (timed(FLOAT32[:1], ["gradient_penalty"]), ["speed-up, gradient penalty, float32", LIMITS]),
        (only(timed(), "bn_ext", "copy"), [LIMITS]),
        ([{**record, "limit_fraction": None} for record in only(timed(), "bn_ext", "nn")], [USUAL]),
        (errors_of(), ["error of the output, float32"]),
        (timed(CUDA, device="cuda:0", timing="replay"), [USUAL, LIMITS]),
    ],
    ids=["no errors", "one mode", "no float32", "no contiguous", "second order", "alone", "no copy", "errors", "cuda"],
)
def test_what_was_not_measured_is_left_out(records: list[dict[str, Any]], titles: list[str]) -> None:
    drawn = plot.figure(records)
    assert [axes.get_title() for axes in drawn.axes] == titles
    assert_nothing_overlaps(drawn)


def test_nothing_overlaps_in_the_whole_figure() -> None:
    drawn = plot.figure(timed(load_average=2.8) + errors_of())
    assert len(drawn.axes) == 3
    assert_nothing_overlaps(drawn)


@pytest.mark.parametrize(("load", "told"), [(2.8, True), (0.5, False), (None, False)])
def test_a_busy_machine_is_told_beside_the_figures(load: float | None, told: bool) -> None:
    records = timed(load_average=load)
    warning = "measured on a busy machine (load average 2.8): ratios only"
    assert (warning in plot.figure(records).get_suptitle()) == told
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"), width=200)  # noqa: SIM115
    report.show(records, console)
    assert (warning in console.export_text()) == told


def test_the_script_draws_from_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, records in (("times", timed()), ("errors", [{**r, "commit": "later"} for r in errors_of()])):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = tmp_path / "new" / "figure.png"
    assert plot.main([*files, str(picture)]) == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert "errors: a processor, 2 threads, commit later" in plot.heading(
        [*timed(), {**errors_of()[0], "commit": "later"}]
    )
    for text in ('{"network": "mlp", "shape": [1, 2], "kind": "nn"}\n', "no JSON", ""):
        (tmp_path / "other").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            plot.main([str(tmp_path / "other"), str(picture)])
        assert stopped.value.code == 1
    assert capsys.readouterr().err.count("error: nothing to draw") == 2


def test_a_figure_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in only(timed(), "nn")))
    assert bench_batchnorm.main(["--load", str(tmp_path / "r.jsonl"), "--plot", str(tmp_path / "x.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_errors_are_measured_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            right = nn.functional.batch_norm(input.double(), None, None, training=True, eps=self.eps)
            right[3, 1] += 0.25
            return right

    monkeypatch.setitem(accuracy.KINDS, "nn", Off)
    records = accuracy.measure(torch.device("cpu"), [Point((4096, 4)), Point((64, 4, 16))])
    curves = report.errors(records)
    assert len(records) == 2 * 2 * 7 and len(curves) == 4
    for (_, contender), curve in curves.items():
        assert list(curve) == list(accuracy.RATIOS)
        bound = (0.25 - 1e-6, 0.25 + 1e-6) if contender == "nn" else (1e-9, 2e-6)
        assert all(bound[0] <= error <= bound[1] for error in curve.values()), (contender, curve)


def test_accuracy_script_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy.measure, "__defaults__", ([Point((512, 4))],))
    path = tmp_path / "new" / "a.jsonl"
    assert accuracy.main(["--json", str(path)]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    said = capsys.readouterr().out
    assert len(found) == 14 and all(f"{r['error']:.2g}" in said and r["commit"] for r in found)
    (line,) = report.error_lines(found)
    ours, native = (r["error"] for r in found if r["mean_over_std"] == 1e4)
    assert f"{ours:.2g} standard deviations" in line and line.endswith(f"nn.BatchNorm1d {native:.2g}")
