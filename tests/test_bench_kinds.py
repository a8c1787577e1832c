"""bench_batchnorm.py --kinds: every row is measured, and nothing that disagrees is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_batchnorm
import kinds
from grid import Point


def test_kinds_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = tmp_path / "kinds.jsonl"
    points = "32x64x100,4096x16,128x256"
    arguments = ["--kinds", "--quick", "--filter", points, "--threads", "1", "--json", str(result)]
    assert bench_batchnorm.main(arguments) == 0
    found = [json.loads(line) for line in result.read_text().splitlines()]
    padded = {
        (f"lengths {full} %", mode, contender)
        for full in (50, 90)
        for mode in ("forward_backward", "eval")
        for contender in ("bn_ext", "gathered", "composed", "plain")
    }
    cut = {("virtual 128", "forward_backward", name) for name in ("bn_ext", "loop nn", "loop bn_ext")}
    renorm = {("renorm", "forward_backward", name) for name in ("bn_ext", "composed", "plain")}
    assert {(r["kind"], r["mode"], r["contender"]) for r in found} == padded | cut | renorm
    assert all(r["median_us"] > 0 for r in found) and "composed" in capsys.readouterr().out


@pytest.mark.parametrize("full", [0.5, 0.9])
def test_batches_are_as_full_as_their_name(full: float) -> None:
    lengths = kinds.lengths_of((32, 6, 200), full, torch.device("cpu"))
    assert abs(float(lengths.double().mean()) / 200 - full) < 0.02 and lengths.max() == 200


def test_kinds_refuse_to_time_what_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(norm: torch.nn.Module, x: Tensor, counts: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(kinds, "gathered", wrong)
    with pytest.raises(RuntimeError, match="gathered disagrees"):
        kinds.steps("lengths 50 %", Point((8, 4, 30)), "forward_backward", torch.device("cpu"))


def test_kinds_and_fusion_are_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_batchnorm.main(["--kinds", "--fusion", "--quick"])
    assert "two runs" in capsys.readouterr().err
