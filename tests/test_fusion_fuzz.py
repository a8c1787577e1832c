"""Random models, native next to fused: Sequentials of anything in any nesting, and forwards of random statements."""

from __future__ import annotations

import copy
import itertools
import linecache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bn_ext
from support import normal

F64 = torch.float64
C = 3
fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


class Negate(nn.Module):
    """A module of the user's that keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += float(x.detach().sum())
        return -x


class Chain(nn.Sequential):
    pass


def randomised(model: nn.Module) -> nn.Module:
    model.double()
    for i, (name, tensor) in enumerate((*model.named_parameters(), *model.named_buffers())):
        if tensor.is_floating_point():
            drawn = normal(tuple(tensor.shape), F64, seed=i)
            positive = name.endswith(("var", "weight")) and tensor.dim() == 1
            tensor.data.copy_(drawn.abs() + 0.5 if positive else 0.5 * drawn)
    return model


def results(model: nn.Module, x: Tensor) -> list[Any]:
    """Two training steps and an evaluation; raises what the model raises."""
    found: list[Any] = []
    for training in (True, True, False):
        model.train(training)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf * 1)
        (y * torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)).sum().backward()
        found += [y.detach(), leaf.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]
        found.append(tuple(m.seen for m in model.modules() if isinstance(m, Negate)))
    return found


def compare(native: nn.Module) -> None:
    """The fused model does what the native one does, where that does anything; and so it does reverted."""
    x = normal((6, C), F64, seed=5)
    fused = bn_ext.convert(copy.deepcopy(native), fuse=True)
    again = copy.deepcopy(fused)
    spreads: list[float] = []
    judge = copy.deepcopy(native)
    for norm in judge.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.register_forward_pre_hook(lambda m, given: spreads.append(float(given[0].detach().var(0).min())))
    try:
        results(judge, x)
        right = results(copy.deepcopy(native), x)
    except Exception as error:
        event(f"native: {type(error).__name__}")
        return
    event(f"fused {sum(entry.fused for entry in bn_ext.fusion_report(fused))}")
    if min(spreads, default=1.0) < 1e-6:  # a constant channel: its output, and so a ReLU's slope, is rounding alone
        event("a dead channel")
        return
    size = max((float(t.abs().max()) for t in right if isinstance(t, Tensor) and t.numel()), default=1.0)
    for model in (fused, bn_ext.revert(again)):
        for mine, expected in zip(results(model, x), right, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9 * max(size, 1.0))
            elif expected is None:
                assert mine is None
            else:
                assert mine == pytest.approx(expected, rel=1e-8, abs=1e-9 * max(size, 1.0))


# ---- Sequentials ----

LAYERS: dict[str, Any] = {
    "norm": lambda: nn.BatchNorm1d(C), "bare": lambda: nn.BatchNorm1d(C, affine=False, momentum=None),
    "relu": nn.ReLU, "inplace": lambda: nn.ReLU(inplace=True), "leaky": lambda: nn.LeakyReLU(0.2, inplace=True),
    "steep": lambda: nn.LeakyReLU(-0.5), "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh, "identity": nn.Identity,
    "linear": lambda: nn.Linear(C, C), "negate": Negate, "container": lambda: bn_ext.BatchNormAct1d(C, "silu"),
}  # fmt: skip
trees = st.recursive(
    st.sampled_from(sorted(LAYERS)),
    lambda inner: st.tuples(st.sampled_from(["seq", "chain"]), st.lists(inner, max_size=5)),
    max_leaves=12,
)


def build(tree: Any, shared: dict[str, nn.Module], share: bool) -> nn.Module:
    if isinstance(tree, str):
        made: nn.Module = shared.setdefault(tree, LAYERS[tree]()) if share else LAYERS[tree]()
        return made
    kind = nn.Sequential if tree[0] == "seq" else Chain
    return kind(*(build(branch, shared, share) for branch in tree[1]))


@fuzz
@given(st.lists(trees, min_size=2, max_size=6), st.booleans(), st.sampled_from(["", "hook", "slice", "drop"]))
def test_sequentials(branches: list[Any], share: bool, change: str) -> None:
    model = randomised(nn.Sequential(*(build(branch, {}, share) for branch in branches)))
    if change == "slice":
        model = model[1:]
    elif change == "hook":
        next(reversed(list(model.modules()))).register_forward_hook(lambda m, i, o: o * 2)
    elif change == "drop":
        del model[0]
    compare(model)


# ---- forwards ----

NAMES = ("x", "a", "b", "out")


@st.composite
def expression(draw: Any, depth: int = 2) -> str:
    if depth == 0:
        return str(draw(st.sampled_from(NAMES)))
    inner = expression(depth - 1)
    kind = draw(st.integers(0, 13))
    one = draw(inner)
    if kind <= 3:
        return f"self.{draw(st.sampled_from(['bn1', 'bn2', 'bns[0]']))}({one})"
    if kind <= 6:
        f = draw(
            st.sampled_from(["F.relu", "self.relu", "self.silu", "torch.relu", "F.gelu", "torch.tanh", "self.leaky"])
        )
        return f"{f}({one})"
    if kind <= 8:
        other = draw(inner)
        return f"({one} + {other})" if kind == 7 else f"torch.add({one}, {other})"
    if kind == 9:
        return f"{one}.relu()"
    if kind <= 11:
        return f"self.{draw(st.sampled_from(['fc', 'down', 'negate', 'shared', 'chain']))}({one})"
    return f"({one} * 0.5)" if kind == 12 else str(draw(st.sampled_from([f"{one}.view(-1, {C})", f"{one}[:]"])))


@st.composite
def statements(draw: Any, depth: int = 2, size: int = 5) -> list[str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(1, size))):
        kind = draw(st.integers(0, 21))
        name, other = draw(st.sampled_from(NAMES)), draw(st.sampled_from(NAMES))
        if kind <= 4:
            lines.append(f"{name} = self.{draw(st.sampled_from(['bn1', 'bn2']))}({draw(expression(1))})")
        elif kind <= 6:
            lines.append(f"{name} = {draw(expression())}")
        elif kind <= 8:
            lines.append(f"{name} += {draw(expression(1))}")
        elif kind == 9:
            lines.append(f"{name} = {draw(st.sampled_from(['self.relu', 'F.relu', 'self.silu']))}({name})")
        elif kind == 10:
            lines.append(f"{name} = {other}")
        elif kind == 11 and depth:
            test = draw(
                st.sampled_from(["self.flag", "not self.flag", "self.none is not None", "self.training", "a is b"])
            )
            lines.append(f"if {test}:")
            lines += ["    " + line for line in draw(statements(depth - 1, 3))]
            if draw(st.booleans()):
                lines.append("else:")
                lines += ["    " + line for line in draw(statements(depth - 1, 2))]
        elif kind == 12 and depth:
            head = draw(
                st.sampled_from(
                    ["for i in range(2):", "with torch.no_grad():", "with contextlib.suppress(ValueError):", "try:"]
                )
            )
            lines.append(head)
            lines += ["    " + line for line in draw(statements(depth - 1, 3))]
            if head == "try:":
                lines += ["    if self.training: raise ValueError", "except ValueError:", f"    {name} = {other} * 2"]
        elif kind == 13:
            lines.append(f"with torch.no_grad(): {name}.{draw(st.sampled_from(['mul_(0.5)', 'relu_()', 'add_(1)']))}")
        elif kind == 14:
            lines.append(
                draw(st.sampled_from(["self.negate.seen += 1", f"self.kept = {name}", f"{name} = self.kept", "pass"]))
            )
        elif kind == 15:
            lines.append(f"{name} = self.helper({other})")
        elif kind == 16:
            lines.append(f"if self.{draw(st.sampled_from(['flag', 'none', 'bn1', 'relu']))} is not None:")
            lines.append(f"    {name} = self.{draw(st.sampled_from(['bn1', 'relu', 'silu', 'chain']))}({name})")
        elif kind == 17:
            lines.append(
                f"{name} = {draw(expression(1))} if {other} is b else self.down({draw(st.sampled_from(NAMES))})"
            )
        elif kind == 21:
            lines += [f"for layer in self.{draw(st.sampled_from(['layers', 'bns']))}:", f"    {name} = layer({name})"]
        elif kind == 18:
            lines.append(f"{name} = self.bn1.{draw(st.sampled_from(['running_mean', 'weight']))}.expand(6, {C})")
        else:
            f = draw(st.sampled_from(["F.relu", "self.silu", "self.gelu", "self.leaky"]))
            sides = draw(st.permutations([f"self.bn1({name})", draw(st.sampled_from(["x", "b", "self.down(b)"]))]))
            lines.append(f"{other} = {f}({' + '.join(sides)})")
    return lines


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
        self.bns = nn.ModuleList([nn.BatchNorm1d(C)])
        self.layers = nn.ModuleList([self.bn1, nn.ReLU(), nn.Linear(C, C), nn.BatchNorm1d(C), nn.SiLU(), self.bn2])
        self.relu, self.silu, self.leaky, self.gelu = nn.ReLU(inplace=True), nn.SiLU(), nn.LeakyReLU(0.2), nn.GELU()
        self.fc, self.negate = nn.Linear(C, C), Negate()
        self.down = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(C, C))
        self.shared = nn.Sequential(self.bn1, nn.ReLU())
        self.chain = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
        self.flag, self.none = True, None

    def helper(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(x) + x)


_numbers = itertools.count()


def forward_of(lines: list[str], result: str) -> nn.Module:
    """A module with a forward of these statements, whose source is to be found."""
    body = ["class Made(Base):", "    def forward(self, x):", "        a = b = out = x * 1.5", "        self.kept = a"]
    body += ["        " + line for line in (*lines, f"return {result}")]
    source = "\n".join(body) + "\n"
    file = f"<forward {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"Base": Base, "F": F, "torch": torch, "contextlib": __import__("contextlib")}
    exec(compile(source, file, "exec"), scope)
    made: nn.Module = scope["Made"]()
    return made


@fuzz
@given(statements(), expression())
def test_forwards(lines: list[str], result: str) -> None:
    compare(randomised(forward_of(lines, result)))
