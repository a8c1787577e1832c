"""What is replaced after a conversion: methods, functions of torch, modes and hooks that listen."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bn_ext
from fusion_support import F64, Block, C, assert_same, fused_and_native, fused_calls, fuses
from support import normal


def test_a_class_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, native = fused_and_native(nn.Sequential(Block(), nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())))
    monkeypatch.setattr(Block, "forward", lambda self, x: self.bn(self.fc(x)) * 5)
    assert_same(mine, native)
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: input * 7)
    assert_same(mine, native)


def test_a_function_whose_code_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As %autoreload does it."""
    mine, native = fused_and_native(Block())

    def other(self, x):  # type: ignore[no-untyped-def]
        return self.act(self.bn(self.fc(x))) - 1

    monkeypatch.setattr(Block.forward, "__code__", other.__code__)
    assert_same(mine, native)


@pytest.mark.parametrize("way", ["signature", "static", "mock", "defaults", "alias", "sequential"])
def test_a_method_replaced_by_one_of_another_kind(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(Block):
        def _impl(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return F.relu(self.bn(x)) * scale

        forward = _impl

    class Row(nn.Sequential):
        pass

    make = Row(nn.BatchNorm1d(C), nn.ReLU()) if way == "sequential" else Scaled()
    mine, native = fused_and_native(make)
    assert fuses(mine)
    if way == "signature":
        monkeypatch.setattr(Scaled, "forward", lambda self, x, scale=3.0, extra=1: self.bn(x) * scale + extra)
        assert_same(lambda x: mine(x, extra=5), lambda x: native(x, extra=5))
    elif way == "static":
        monkeypatch.setattr(Scaled, "forward", staticmethod(lambda x: x * 3))
    elif way == "mock":
        with mock.patch.object(Scaled, "forward", return_value=torch.ones(1)) as patched:
            assert mine(2) is native(2) and patched.call_args_list == [mock.call(2)] * 2
        assert fuses(mine)
    elif way == "defaults":
        monkeypatch.setattr(Scaled._impl, "__defaults__", (5.0,))
    elif way == "alias":
        monkeypatch.setattr(Scaled, "_impl", lambda self, x: x * 0)  # forward is what it was
    else:
        monkeypatch.setattr(Row, "forward", lambda self, x: x * 0)
    assert_same(mine, native)


def test_a_class_converted_again_once_its_source_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class made for the old source is not taken for the new one; the old module says that it does not fuse."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.act(self.bn(self.fc(x))) * 2

    old, _ = fused_and_native(Block())
    monkeypatch.setattr(Block, "forward", forward)
    new, native = fused_and_native(Block())
    assert fuses(new) and bn_ext.fusion_report(new)[0].fused
    assert not fuses(old) and not bn_ext.fusion_report(old)[0].fused
    assert_same(new, native)


def test_classes_that_nobody_holds_are_let_go() -> None:
    def make() -> weakref.ref[type]:
        large = torch.zeros(1)

        class Local(Block):
            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.bn(x)) + large

        model = bn_ext.convert(Local(), fuse=True)
        assert fuses(model.double())
        return weakref.ref(Local)

    kind = make()
    gc.collect()
    assert kind() is None


def test_an_empty_cell_and_many_names() -> None:
    class Late(Block):
        def forward(self, x: Tensor) -> Tensor:
            a = b = c = d = e = f = g = h = x
            for _ in range(2):
                a, b, c, d, e, f, g, h = h, a, b, c, d, e, f, g
                a, b, c, d, e, f, g, h = b, c, d, e, f, g, h, a
                a, b, c, d, e, f, g, h = c, d, e, f, g, h, a, b
            return self.act(self.bn(a)) * later

    mine = bn_ext.convert(Late(), fuse=True)
    later = 2.0
    assert fuses(mine.double())


def test_a_subclass_of_the_container_has_its_own_forward() -> None:
    class Doubled(bn_ext.BatchNormAct1d):
        def forward(self, x: Tensor, residual: Any = None) -> Tensor:
            return self.act(self.norm(x) * 2)

    mine, native = fused_and_native(Doubled(C))
    assert not bn_ext.fusion_report(mine)[0].fused and not fuses(mine)
    assert_same(mine, native)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_with_every_protocol_and_by_its_class(protocol: int) -> None:
    mine, native = fused_and_native(nn.Sequential(Block(), nn.BatchNorm1d(C), nn.SiLU()))
    loaded, kinds = pickle.loads(pickle.dumps((mine, [type(m) for m in mine.modules()]), protocol))
    assert fused_calls(loaded) == 2 and kinds == [type(m) for m in mine.modules()]
    assert_same(loaded, native)


def test_compiled_under_a_function_mode_and_global_hooks() -> None:
    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            y = func(*args, **(kwargs or {}))
            return y * 2 if func in (F.relu, torch.relu) else y

    mine, native = fused_and_native(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    found = []
    for model in (mine, native):
        torch._dynamo.reset()
        with Doubles():
            found.append(torch.compile(model, backend="eager")(normal((8, C), F64)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["function", "module", "norm", "method", "call"])
def test_torch_replaced(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ways(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.bn(x)) + F.relu(self.bn(x)) + self.bn(x).relu()
            return y + torch.add(self.bn(x), x)

    mine, native = fused_and_native(Ways())
    sequential = bn_ext.convert(nn.Sequential(copy.deepcopy(native.bn), nn.ReLU()), fuse=True)
    plain = nn.Sequential(copy.deepcopy(native.bn), nn.ReLU())
    if kind == "function":
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.sigmoid(x))
    elif kind == "module":
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: torch.sigmoid(x))
    elif kind == "method":
        monkeypatch.setattr(Tensor, "relu", lambda self: torch.sigmoid(self))
    elif kind == "call":
        real = nn.Module.__call__
        monkeypatch.setattr(nn.Module, "__call__", lambda self, *a: real(self, *a) * 2)
    else:
        for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
            monkeypatch.setattr(cls, "forward", lambda self, x: x * 2)
    assert_same(mine, native)
    assert_same(sequential, plain)


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_what_it_sees_of_native() -> None:
    mine, native = fused_and_native(nn.Sequential(Block(), nn.BatchNorm1d(C), nn.SiLU()))
    seen = []
    for model in (mine, native):
        with Listening() as mode:
            model(normal((8, C), F64))
        seen.append([name for name in mode.seen if name in ("relu", "silu")])
    assert seen[0] == seen[1] == ["relu", "silu"]
    with torch.device("cpu"):  # a mode too, which cares for factories alone
        assert fused_calls(mine) == 2


def test_global_hooks_see_every_module() -> None:
    mine, native = fused_and_native(nn.Sequential(Block(), nn.BatchNorm1d(C), nn.SiLU()))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(type(m).__name__.removeprefix("Fused"))
    )
    try:
        for model in (mine, native):
            model(normal((8, C), F64))
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and "ReLU" in seen


def test_a_module_compiled_on_its_own() -> None:
    mine, native = fused_and_native(Block())
    mine.act.compile(backend="eager")
    assert not fuses(mine)
    assert_same(mine, native)


class Subclass(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["input", "residual"])
def test_tensor_types_that_override_functions(which: str) -> None:
    class Adds(Block):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.relu(self.bn(x) + r)

    mine, native = fused_and_native(Adds())
    found = []
    for model in (mine, native):
        Subclass.seen.clear()
        operands = [normal((8, C), F64), normal((8, C), F64, seed=1)]
        operands[which == "residual"] = operands[which == "residual"].as_subclass(Subclass)
        y = model(*operands)
        found.append((type(y), [s for s in Subclass.seen if s in ("relu", "add", "batch_norm")]))
    assert found[0] == found[1] and found[0][0] is Subclass and "relu" in found[0][1]
