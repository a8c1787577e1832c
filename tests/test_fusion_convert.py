"""bn_ext.convert(model, fuse=True): what is fused, what is left and why, and the same results as before."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from support import normal

FUSED = bn_ext.FusedBatchNorm1d
F64 = torch.float64
C = 4


class Block(nn.Module):
    """A residual block as they are written: one activation module for two places, additions in place."""

    def __init__(self, down: bool) -> None:
        super().__init__()
        self.first, self.bn1, self.relu = nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(inplace=True)
        self.second, self.bn2 = nn.Linear(C, C), nn.BatchNorm1d(C)
        self.down = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.first(x)))
        out = self.bn2(self.second(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](x))
        x = torch.relu(self.norms[1](x))
        x = self.norms[2](x).relu()
        x = F.leaky_relu(self.norms[3](x), 0.2, inplace=True)
        x = F.gelu(self.norms[4](x) + x)
        x = torch.add(x, self.norms[5](x)).relu_()
        return F.silu(input=x) if x is None else F.silu(self.norms[6](x), inplace=True)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(C), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x * 2))


class OneNorm(nn.Module):
    """A batch norm, and a forward given by the test."""

    def __init__(self, body: Callable[[OneNorm, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.act, self.body = nn.BatchNorm1d(C), nn.ReLU(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def randomised(model: nn.Module) -> nn.Module:
    """Parameters and buffers that are not the trivial ones, in float64."""
    model.double()
    for i, (name, tensor) in enumerate((*model.named_parameters(), *model.named_buffers())):
        if tensor.is_floating_point():
            drawn = normal(tuple(tensor.shape), F64, seed=i)
            tensor.data.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn)
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two training steps and an evaluation: outputs, gradients, buffers."""
    found = []
    for training in (True, True, False):
        model.train(training)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf.clone())  # the clone may be written in place
        y.square().sum().backward()
        found += [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        found += [b.clone() for b in model.buffers()]
    return found


def assert_same(mine: nn.Module, native: nn.Module) -> None:
    x = normal((8, C), F64, seed=77)
    for a, b in zip(results(mine, x), results(native, x), strict=True):
        torch.testing.assert_close(a, b)


def fused_and_native(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    native = randomised(model)
    mine = copy.deepcopy(native)
    assert bn_ext.convert(mine, fuse=True) is mine
    assert list(mine.state_dict()) == list(native.state_dict())
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in native.named_modules()]
    return mine, native


WHOLE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "sequential": (
        lambda: nn.Sequential(
            nn.BatchNorm1d(C), nn.ReLU(inplace=True), nn.BatchNorm1d(C), nn.LeakyReLU(0.3),
            nn.BatchNorm1d(C), nn.SiLU(),
            nn.Sequential(nn.BatchNorm1d(C), nn.GELU()),
        ),
        ["relu(batch norm)", "leaky_relu(batch norm)", "silu(batch norm)", "gelu(batch norm)"],
    ),
    "block": (lambda: Block(False), ["relu(batch norm)", "relu(batch norm + residual)"]),
    "down": (lambda: Block(True), ["relu(batch norm)", "relu(batch norm + residual)", "batch norm"]),
    "functional": (
        Functional,
        [*["relu(batch norm)"] * 3, "leaky_relu(batch norm)", "gelu(batch norm + residual)",
         "relu(batch norm + residual)", "silu(batch norm)"],
    ),
    "branches": (TwoBranches, ["batch norm", "relu(batch norm + residual)"]),
    "nested": (
        lambda: nn.Sequential(nn.Linear(C, C), Block(True), nn.ModuleDict({"a": Block(False)})["a"]),
        ["relu(batch norm)", "relu(batch norm + residual)", "batch norm", "relu(batch norm)",
         "relu(batch norm + residual)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_fused_and_the_same(case: str) -> None:
    make, computes = WHOLE[case]
    mine, native = fused_and_native(make())
    assert [entry.computes for entry in bn_ext.fusion_report(mine)] == computes
    assert_same(mine, native)


@pytest.mark.parametrize("case", WHOLE)
def test_reverted_to_what_it_was(case: str) -> None:
    mine, native = fused_and_native(WHOLE[case][0]())
    reverted = bn_ext.revert(mine)
    assert [(n, type(m)) for n, m in reverted.named_modules()] == [(n, type(m)) for n, m in native.named_modules()]
    assert bn_ext.fusion_report(reverted) == []
    assert_same(reverted, native)


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "again", "compile", "export"])
def test_a_fused_model_is_a_model(case: str, way: str) -> None:
    mine, native = fused_and_native(WHOLE[case][0]())
    if way == "deepcopy":
        other = copy.deepcopy(mine)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in mine.parameters()}
        mine = other
    elif way == "pickle":
        mine = pickle.loads(pickle.dumps(mine))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(mine, file)
        file.seek(0)
        mine = torch.load(file, weights_only=False)
    elif way == "again":
        bn_ext.convert(mine, fuse=True)
    elif way == "export":
        x = normal((8, C), F64)
        program = torch.export.export(mine.eval(), (x.clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        operators = {str(node.target) for node in program.graph.nodes}
        assert "bn_ext.batch_norm_act.default" in operators or not any(f.fused for f in bn_ext.fusion_report(mine))
        torch.testing.assert_close(program.module()(x.clone()), native.eval()(x.clone()))
        return
    else:
        torch._dynamo.reset()
        x = normal((8, C), F64)
        torch.testing.assert_close(torch.compile(mine, backend="aot_eager")(x.clone()), native(x.clone()))
        return
    assert_same(mine, native)


def output_twice(m: OneNorm, x: Tensor) -> Tensor:
    y = m.bn(x)
    return F.relu(y) + y


def dropped(m: OneNorm, x: Tensor) -> Tensor:
    return F.dropout(F.relu(m.bn(x)), 0.0, m.training)


def branching(m: OneNorm, x: Tensor) -> Tensor:
    return F.relu(m.bn(x)) if x.sum() > 0 else m.bn(x)


def two_uses(m: OneNorm, x: Tensor) -> Tensor:
    return F.relu(m.bn(x)) + F.silu(m.bn(x * 2))


def counting(m: OneNorm, x: Tensor) -> Tensor:
    m.seen = getattr(m, "seen", 0) + 1
    return F.relu(m.bn(x))


LEFT: dict[str, tuple[Callable[[OneNorm, Tensor], Tensor], str]] = {
    "output read twice": (output_twice, "read by more than one"),
    "approximate gelu": (lambda m, x: F.gelu(m.bn(x), approximate="tanh"), "no activation"),
    "a number added": (lambda m, x: F.tanh(m.bn(x) + 1), "no activation"),
    "training tested": (dropped, "differs between training"),
    "values tested": (branching, "does not trace"),
    "two activations": (two_uses, "different activations"),
    "attributes set": (counting, "sets attributes"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case: str) -> None:
    body, words = LEFT[case]
    mine, native = fused_and_native(OneNorm(body))
    (entry,) = bn_ext.fusion_report(mine)
    assert not entry.fused and words in entry.reason
    assert type(mine) is OneNorm and type(mine.bn) is FUSED and mine.bn.activation is None
    assert getattr(mine, "seen", 0) == 0
    assert_same(mine, native)


def test_an_input_that_changes_before_the_residual_is_added() -> None:
    """Without autograd only: batch norm's backward would need it."""

    def body(m: OneNorm, x: Tensor) -> Tensor:
        y = m.bn(x)
        x.mul_(2)
        return F.relu(y + x)

    mine, native = fused_and_native(OneNorm(body))
    assert "may change before" in bn_ext.fusion_report(mine)[0].reason
    x = normal((8, C), F64)
    with torch.no_grad():
        torch.testing.assert_close(mine(x.clone()), native(x.clone()))


def test_every_call_of_a_shared_norm_has_to_fit() -> None:
    mine, native = fused_and_native(OneNorm(lambda m, x: F.relu(m.bn(x)) + torch.relu(m.bn(x * 2))))
    assert mine.bn.activation == "relu"
    assert_same(mine, native)
    norm, relu = nn.BatchNorm1d(C), nn.ReLU()
    mine, native = fused_and_native(nn.Sequential(norm, relu, nn.Linear(C, C), norm, nn.Linear(C, C)))
    assert type(mine[1]) is nn.ReLU and not bn_ext.fusion_report(mine)[0].fused
    assert_same(mine, native)


@pytest.mark.parametrize("where", ["bn", "act"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_modules_with_hooks_are_left_alone(where: str, kind: str) -> None:
    called = []
    for model in (OneNorm(lambda m, x: m.act(m.bn(x))), nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())):
        target = model.get_submodule({"bn": "0", "act": "1"}[where] if isinstance(model, nn.Sequential) else where)
        getattr(target, kind)(lambda *arguments: called.append(arguments) and None)
        bn_ext.convert(model, fuse=True)
        (entry,) = bn_ext.fusion_report(model)
        assert not entry.fused
        called.clear()
        model(torch.ones(3, C, requires_grad=True)).sum().backward()
        assert len(called) == 1


def test_other_hooks_still_run() -> None:
    model = nn.Sequential(Block(True), nn.Linear(C, C))
    seen = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.BatchNorm1d, nn.ReLU)):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    x = torch.randn(5, C)
    model(x)
    before = seen.copy()
    seen.clear()
    bn_ext.convert(model, fuse=True)(x)
    assert seen == before and sum(entry.fused for entry in bn_ext.fusion_report(model)) == 2


def test_without_fuse_nothing_is_fused_and_a_norm_with_an_activation_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = bn_ext.convert(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    assert model[0].activation is None and bn_ext.fusion_report(model) == []
    own = nn.Sequential(FUSED(C, activation="gelu"), nn.ReLU())
    with caplog.at_level(logging.INFO, "bn_ext"):
        bn_ext.convert(own, fuse=True)
    assert "0: gelu(batch norm), not fused: it has an activation" in caplog.text
    assert type(own[1]) is nn.ReLU and type(bn_ext.revert(own)[0]) is FUSED
