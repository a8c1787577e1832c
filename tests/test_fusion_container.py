"""BatchNormAct1d: two ordinary children, computed in one pass where they are what they were made as."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch import Tensor, nn

import bn_ext
from support import OpLog, act_module_for, error_of, normal

F64 = torch.float64
C = 4
MAKES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "silu": nn.SiLU, "gelu": nn.GELU,
}  # fmt: skip


class Written(nn.Module):
    """The same, by torch's own modules."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.act(y if r is None else y + r)


def both(activation: Any = "relu") -> tuple[bn_ext.BatchNormAct1d, nn.Module]:
    """(ours, the same written by hand around native's), in float64."""
    mine = act_module_for(C, "cpu", activation, 0.2, dtype=F64)
    norm = nn.BatchNorm1d(C, dtype=F64)
    norm.load_state_dict(mine.norm.state_dict())
    return mine, Written(norm, copy.deepcopy(mine.act))


def results(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for training in (True, False):
        for residual in (False, True):
            model.train(training)
            x, r = (normal((8, C), F64, seed=k).requires_grad_() for k in range(2))
            y = model(x, r) if residual else model(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad, r.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            found += [b.clone() for b in model.buffers()]
    return found


def assert_same(mine: nn.Module, native: nn.Module) -> None:
    for a, b in zip(results(mine), results(native), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def fused_calls(model: nn.Module) -> int:
    with OpLog() as log:
        model(normal((8, C), F64)), model(normal((8, C), F64), normal((8, C), F64))
    return log.fused


@pytest.mark.parametrize("activation", MAKES)
def test_one_pass_and_native(activation: str) -> None:
    for act in (activation, MAKES[activation]()):
        mine, native = both(act)
        assert type(mine.act) is type(MAKES[activation]()) and type(mine.norm) is bn_ext.FusedBatchNorm1d
        assert fused_calls(mine) == 2
        assert_same(*both(act))
    assert list(mine.state_dict()) == [f"norm.{k}" for k in native.norm.state_dict()]


def test_constructor() -> None:
    module = bn_ext.BatchNormAct1d(C, "leaky_relu", 0.3, eps=0.1, momentum=None, affine=False, dtype=F64)
    assert module.act.negative_slope == 0.3 and module.norm.eps == 0.1 and module.norm.weight is None
    assert module.norm.momentum is None and module.norm.running_var.dtype == F64
    assert type(bn_ext.BatchNormAct1d(C, None).act) is nn.Identity and type(bn_ext.BatchNormAct1d(C).act) is nn.ReLU
    error = error_of(lambda: bn_ext.BatchNormAct1d(C, "tanh"))
    assert error is not None and error[0] is ValueError and "'relu'" in error[1] and "'tanh'" in error[1]
    assert list(inspect.signature(bn_ext.BatchNormAct1d).parameters)[:3] == [
        "num_features", "activation", "negative_slope",
    ]  # fmt: skip
    for gone in ("activation", "negative_slope", "inplace", "residual"):
        assert error_of(lambda g=gone: bn_ext.FusedBatchNorm1d(C, **{g: None}))[0] is TypeError
        assert not hasattr(bn_ext.FusedBatchNorm1d(C), gone)
    assert list(inspect.signature(bn_ext.FusedBatchNorm1d.forward).parameters) == [
        "self", "input", "lengths", "mask",
    ]  # fmt: skip


def test_without_an_activation_the_sum_is_one_pass() -> None:
    assert fused_calls(both(None)[0]) == 1
    assert_same(*both(None))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Subclass(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.clamp(min=0.5)


@pytest.mark.parametrize(
    "act", [Square, Subclass, nn.Tanh, lambda: nn.GELU("tanh"), nn.ReLU6, lambda: nn.LeakyReLU(-1)]
)
def test_other_activations_are_called(act: Callable[[], nn.Module]) -> None:
    mine, native = both(act())
    assert_same(mine, native)
    assert fused_calls(mine) == 0


def replace(name: str, by: Callable[[], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda m: setattr(m, name, by())


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "norm replaced": replace("norm", nn.Identity),
    "norm native": replace("norm", lambda: nn.BatchNorm1d(C, dtype=F64)),
    "act replaced": replace("act", nn.Tanh),
    "hook on norm": lambda m: m.norm.register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook on act": lambda m: m.act.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "backward hook": lambda m: m.norm.register_full_backward_hook(lambda m, i, o: tuple(g * 2 for g in i)),
    "parametrized": lambda m: parametrize.register_parametrization(m.norm, "weight", Double()),
    "own forward": lambda m: setattr(m.act, "forward", lambda x: x - 1),
    "frozen": lambda m: m.requires_grad_(False),
    "no statistics": lambda m: [setattr(m.norm, k, None) for k in ("running_mean", "running_var")],
    "pruned": lambda m: prune.l1_unstructured(m.norm, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_children_are_ordinary(change: str) -> None:
    """Whatever is done to a child has its effect, on the module, its copy and what is loaded from a pickle."""
    mine, native = both()
    CHANGES[change](mine), CHANGES[change](native)
    twins = [] if change == "pruned" else [copy.deepcopy(mine)]  # torch refuses to copy what is pruned
    if change != "pruned" and change not in ("parametrized", "own forward") and "hook" not in change:
        twins.append(pickle.loads(pickle.dumps(mine)))
    right = results(native)
    for twin in (*twins, mine):
        for a, b in zip(results(twin), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", ["row", "float32", "number", "integer", "larger"])
def test_residuals_that_no_kernel_adds(residual: str) -> None:
    x = normal((8, C), F64)
    value: Any = {
        "row": x[:1], "float32": x.float(), "number": 2.5, "integer": torch.ones(8, C, dtype=torch.int64),
        "larger": torch.ones(3, 8, C, dtype=F64),
    }[residual]  # fmt: skip
    mine, native = both()
    torch.testing.assert_close(mine(x, value), native(x, value))
    torch.testing.assert_close(mine.norm.running_var, native.norm.running_var)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", MAKES)
def test_tools(activation: str) -> None:
    mine, native = both(activation)
    mine.eval(), native.eval()
    x, r = normal((8, C), F64), normal((8, C), F64, seed=1)
    for arguments in ((x,), (x, r)):
        right = native(*arguments)
        scripted = torch.jit.script(mine)
        torch.testing.assert_close(scripted(*arguments), right)
        torch.testing.assert_close(torch.jit.trace(mine, arguments)(*arguments), right)
        for strict in (True, False):
            program = torch.export.export(mine, arguments, strict=strict)
            nodes = [node for node in program.graph.nodes if "bn_ext.batch_norm" in str(node.target)]
            assert len(nodes) == 1 and len(nodes[0].args) > 9, "what follows is in the same call"
            torch.testing.assert_close(program.module()(*arguments), right)
    graph = torch.fx.symbolic_trace(mine, concrete_args={"residual": None})
    assert {"norm", "act"} <= {str(node.target) for node in graph.graph.nodes}
    torch.testing.assert_close(graph(x), native(x))


def test_linear_folding_and_sync_batch_norm() -> None:
    """Tools that look for a batch norm find one, and what they put in its place is what runs."""
    mine, _ = both()
    mine.eval()
    linear = nn.Linear(C, C, dtype=F64)
    x = normal((8, C), F64)
    right = F.relu(mine.norm(linear(x)))
    model = nn.Sequential(torch.nn.utils.fuse_linear_bn_eval(linear.eval(), mine.norm), copy.deepcopy(mine))
    model[1].norm = nn.Identity()
    torch.testing.assert_close(model(x), right)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(mine)).eval()
    assert type(synchronised.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronised(linear(x)), right)


def test_convert_and_revert() -> None:
    mine, native = both()
    (entry,) = bn_ext.fusion_report(mine)
    assert (entry.name, entry.computes, entry.reason) == ("norm", "relu(batch norm)", "")
    assert bn_ext.convert(mine, fuse=True) is mine and bn_ext.fusion_report(mine) == [entry]
    bn_ext.revert(mine)
    assert type(mine) is bn_ext.BatchNormAct1d and type(mine.norm) is nn.BatchNorm1d and fused_calls(mine) == 0
    assert_same(bn_ext.revert(both()[0]), native)
