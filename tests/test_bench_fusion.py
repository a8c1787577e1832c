"""bench_batchnorm.py --fusion: every row is measured, and nothing that disagrees is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_batchnorm
import fusion
from grid import DEFAULT_MODES
from timing import Plan


def test_fusion_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = tmp_path / "fusion.jsonl"
    arguments = ["--fusion", "--quick", "--filter", "32x64", "--json", str(result)]
    assert bench_batchnorm.main(arguments) == 0
    found = [json.loads(line) for line in result.read_text().splitlines()]
    assert {(r["chain"], r["mode"], r["contender"]) for r in found} == {
        (chain, mode, contender)
        for chain in ("bn+relu", "bn+add+relu")
        for mode in DEFAULT_MODES
        for contender in ("fused", "separate", "nn")
    }
    assert all(r["median_us"] > 0 for r in found) and "bn+add+relu" in capsys.readouterr().out


def test_what_is_left_of_the_time_is_shared() -> None:
    now = time.perf_counter()
    plan = Plan(block=0.001, budget=0.6, min_rounds=5)
    assert fusion.shortened(plan, None, 10, now) == plan
    assert abs(fusion.shortened(plan, now + 1, 10, now).budget - 0.1) < 0.05
    assert fusion.shortened(plan, now + 100, 10, now) == plan
    late = fusion.shortened(plan, now - 1, 10, now)
    assert (late.budget, late.min_rounds) == (0.0, fusion.LATE_ROUNDS)


def test_fusion_refuses_to_time_what_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "relu", torch.sigmoid)
    assert bench_batchnorm.main(["--fusion", "--quick", "--filter", "32x64", "--modes", "eval"]) == 1


def test_fusion_has_no_second_derivatives(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_batchnorm.main(["--fusion", "--quick", "--modes", "double_backward"])
    assert "no such mode: double_backward" in capsys.readouterr().err
