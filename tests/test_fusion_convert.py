"""bn_ext.convert(model, fuse=True) and its report: what is left alone and why, odd classes, transforms, errors."""

from __future__ import annotations

import copy
import logging
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from fusion_support import F64, Block, C, assert_same, fused_and_native, fused_calls, fuses
from support import error_of, normal


class Reasons(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(9))
        self.opaque = Block()
        self.slope = 0.3

    def forward(self, x: Tensor) -> Tensor:
        y = self.bns[0](x)
        x = F.relu(y) + y
        x = F.tanh(self.bns[1](x))
        x = F.leaky_relu(self.bns[2](x), self.slope * 2)
        y = self.bns[3](x)
        x = self.opaque(x)
        x = F.relu(x + y)
        y = self.bns[4](x)
        x = x.view(-1, C)
        x = F.relu(y)
        x = F.relu(self.bns[5](x * 2) + self.opaque(x))
        self.kept = self.bns[6](x)
        x = F.relu(self.kept)
        return self.bns[7](x)


WORDS = (
    "more than one", "tanh", "no plain values", "self.opaque is called", "line", "Block may do anything",
    "kept in self.kept", "returned", "no call of it was found",
)  # fmt: skip


def test_reasons_and_places() -> None:
    mine, native = fused_and_native(Reasons())
    report = bn_ext.fusion_report(mine)
    assert [entry.name for entry in report] == [*(f"bns.{i}" for i in range(9)), "opaque.bn"] and report.pop().fused
    for entry, words in zip(report, WORDS, strict=True):
        assert not entry.fused and entry.computes == "batch norm"
        assert words in entry.reason, (entry, words)
    lines = [int(entry.where.rpartition(":")[2]) for entry in report[:-1]]
    assert lines == sorted(lines) and all("Reasons.forward, test_fusion_convert.py" in e.where for e in report[:-1])
    assert_same(mine, native)


class Keywords(nn.Module):
    """Calls that give more than the input by place, each on a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(bn_ext.FusedBatchNorm1d(C) for _ in range(5))
        self.act = nn.ReLU()

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        x = self.act(self.bns[0](x, lengths=lengths))
        x = F.relu(self.bns[1](input=x))
        x = F.silu(self.bns[2](x, mask=mask) + x)
        options = {"lengths": lengths}
        x = F.relu(self.bns[3](x, **options))
        return F.relu(self.bns[4](x))


def test_calls_with_keywords_are_found() -> None:
    model = Keywords()
    x, lengths = normal((3, C, 5)), torch.tensor([2, 5, 1])
    arguments = x, lengths, torch.arange(5) < lengths[:, None]
    native = copy.deepcopy(model)
    *report, last = bn_ext.fusion_report(bn_ext.convert(model, fuse=True))
    assert last.fused and [entry.name for entry in report] == [f"bns.{i}" for i in range(4)]
    for entry in report:
        assert entry.computes == "batch norm" and "by keyword" in entry.reason, entry
        assert "Keywords.forward, test_fusion_convert.py:" in entry.where
    torch.testing.assert_close(model(*arguments), native(*arguments))


def test_log_and_no_fusion_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    model = bn_ext.convert(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()).double())
    assert type(model) is nn.Sequential and not fuses(model)
    (entry,) = bn_ext.fusion_report(model)
    assert "not converted with fuse=True" in entry.reason
    with caplog.at_level(logging.INFO, "bn_ext"):
        bn_ext.convert(model, fuse=True)
    assert "0 (the model, a Sequential): relu(batch norm)" in caplog.text
    assert fuses(model) and bn_ext.fusion_report(bn_ext.revert(model)) == []
    assert type(model) is nn.Sequential and type(model[0]) is nn.BatchNorm1d


def test_report_follows_what_the_model_is_now() -> None:
    mine, _ = fused_and_native(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU(), Block()))
    assert [e.fused for e in bn_ext.fusion_report(mine)] == [True, True]
    handle = mine[0].register_forward_hook(lambda *_: None)
    mine[2].act = nn.Tanh()
    assert [e.reason[:13] for e in bn_ext.fusion_report(mine)] == ["it has hooks,", "self.act(self"]
    handle.remove()
    mine[2].act = nn.GELU()
    assert [e.computes for e in bn_ext.fusion_report(mine)] == ["relu(batch norm)", "gelu(batch norm)"]
    mine[2].act, mine[1] = nn.Tanh(), nn.Tanh()
    bn_ext.convert(mine, fuse=True)
    mine[2].act, mine[1] = nn.ReLU(), nn.ReLU()
    assert [e.reason[:16] for e in bn_ext.fusion_report(mine)] == ["", "what calls it wa"]
    bn_ext.convert(mine, fuse=True)
    assert [e.fused for e in bn_ext.fusion_report(mine)] == [True, True]
    mine[1].register_forward_hook(lambda *_: None)
    assert "activation has hooks" in bn_ext.fusion_report(mine)[0].reason


def test_a_shared_block_has_one_report_and_a_block_called_twice_two() -> None:
    block = Block()
    mine, native = fused_and_native(nn.Sequential(block, block))
    assert len(bn_ext.fusion_report(mine)) == 1 and fused_calls(mine) == 2
    assert_same(mine, native)


# ---- vmap, transforms, stateless calls ----


def test_functional_call_and_transforms() -> None:
    mine, native = fused_and_native(nn.Sequential(Block(), nn.BatchNorm1d(C, track_running_stats=False), nn.SiLU()))
    for model in (mine, native):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    x = normal((8, C), F64)
    results = []
    for model in (mine, native):
        state = {k: v.detach() * 1.5 for k, v in model.named_parameters()}

        def loss(state: Any, x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, state, (x,)).square().sum()

        results.append(
            [
                loss(state, x),
                *torch.func.grad(loss)(state, x).values(),
                torch.func.vmap(lambda v, s=state, f=loss: f(s, v))(torch.stack([x, x + 1])),
                torch.func.jvp(lambda v, s=state, f=loss: f(s, v), (x,), (x,))[1],
            ]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_replicas_of_data_parallel() -> None:
    mine, native = fused_and_native(Block())
    for model in (mine, native):
        replica = model._replicate_for_data_parallel()
        for key, child in model._modules.items():
            part = child._replicate_for_data_parallel()
            for name, parameter in child._parameters.items():
                setattr(part, name, parameter * 1)
            for name, buffer in child._buffers.items():
                setattr(part, name, buffer)
            replica._modules[key] = part
        assert_same(replica, native)


def test_lazy_norms_fuse_once_they_know_their_size() -> None:
    mine = bn_ext.convert(nn.Sequential(nn.LazyBatchNorm1d(dtype=F64), nn.ReLU()), fuse=True)
    assert not fuses(mine) and type(mine[0]) is bn_ext.FusedBatchNorm1d and fuses(mine)


def test_errors_are_natives_and_change_nothing() -> None:
    mine, native = fused_and_native(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU(), Block()))
    for x in (torch.zeros(2, C + 1, dtype=F64), torch.zeros(1, C, dtype=F64), torch.zeros(2, C, 3, 3, dtype=F64),
              torch.zeros(2, C, dtype=torch.int64), "text", None):  # fmt: skip
        mistake, right = error_of(lambda x=x: mine(x)), error_of(lambda x=x: native(x))
        assert mistake is not None and right is not None and mistake[0] is right[0] and mistake[1][:40] == right[1][:40]
    assert all(int(m.num_batches_tracked) == 0 for m in mine.modules() if isinstance(m, nn.BatchNorm1d))


def test_operator_functions_are_what_they_are_called() -> None:
    """operator.add of a batch norm is an addition; written as a function it is left to the function."""

    class Operators(Block):
        def forward(self, x: Tensor) -> Tensor:
            return operator.add(self.bn(x), x)

    mine, native = fused_and_native(Operators())
    assert not fuses(mine)
    assert_same(mine, native)
