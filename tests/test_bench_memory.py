"""The measurement of a step's memory: against bytes counted by hand, and the script on small networks."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bn_ext
import memory


def test_bytes_counted_by_hand(device: str) -> None:
    held: list[Tensor] = []

    def zeros(kibibytes: int) -> Tensor:
        return torch.zeros(kibibytes, 1024, dtype=torch.uint8, device=device)

    def forward() -> Tensor:
        held.append(zeros(100))
        zeros(700)  # goes at once
        return zeros(10)

    def rest(loss: Tensor) -> None:
        held.append(zeros(1000))
        held.clear()
        zeros(200)

    measure = memory.measure_cuda if device.startswith("cuda") else memory.measure_cpu
    found = measure(forward, rest)
    # torch.cuda counts in blocks of 512 bytes, of which these are multiples.
    assert (found.after_forward, found.peak) == (110 * 1024, 1110 * 1024)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 4))

    monkeypatch.setattr(memory, "NETWORKS", (("small", network, (512, 8)),))
    path = tmp_path / "memory.jsonl"
    assert memory.main(["--json", str(path)]) == 0
    records = {line["kind"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert list(records) == list(memory.KINDS) and "small" in capsys.readouterr().out
    # Silu keeps its argument, the output of the batch norm: fused, there is no such tensor.
    saved = records["nn"]["after_forward"] - records["convert(fuse=True)"]["after_forward"]
    assert abs(saved - 4 * 512 * 64) < 4 * 512 * 64 / 10
    assert records["convert"]["peak"] < 1.1 * records["nn"]["peak"]
    # Of the first block a checkpoint keeps its input and its output, and not what lies between.
    saved = records["convert(fuse=True)"]["after_forward"] - records["checkpointed"]["after_forward"]
    assert abs(saved - 4 * 512 * 64) < 4 * 512 * 64 / 10
    assert records["offloaded"] == records["convert(fuse=True)"] | {"kind": "offloaded"}  # all is there already


def test_blocks_in_checkpoints() -> None:
    """Each runs twice, counts once, and gives the gradients that it gives without."""
    for _, make, shape in memory.NETWORKS:
        torch.manual_seed(0)
        plain = bn_ext.convert(make(), fuse=True)
        through = memory.KINDS["checkpointed"](copy.deepcopy(plain))
        x, gradients = torch.randn(4, *shape[1:-1], min(shape[-1], 784)), []
        for model in (plain, through):
            model(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *gradients)) and all(map(torch.equal, plain.buffers(), through.buffers()))
