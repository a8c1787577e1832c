"""bn_ext.convert(model, fuse=True) and its report: what is left alone and why, odd classes, what is replaced later."""

from __future__ import annotations

import abc
import copy
import gc
import linecache
import logging
import operator
import pickle
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bn_ext
from support import OpLog, error_of, normal

F64 = torch.float64
C = 4
ACT = "bn_ext::batch_norm_act_forward"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.act = nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.fc(x)))


def fused_and_native(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    native = model.double()
    mine = copy.deepcopy(native)
    assert bn_ext.convert(mine, fuse=True) is mine
    return mine, native


def assert_same(mine: Callable[[Tensor], Tensor], native: Callable[[Tensor], Tensor]) -> None:
    x = normal((8, C), F64, seed=7)
    torch.testing.assert_close(mine(x.clone()), native(x.clone()), rtol=1e-10, atol=1e-10)


def operators(model: Callable[[Tensor], Tensor]) -> list[str]:
    with OpLog() as log:
        model(normal((8, C), F64))
    return log.names


def fuses(model: Callable[[Tensor], Tensor]) -> bool:
    return ACT in operators(model)


# ---- the report ----


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
    assert len(bn_ext.fusion_report(mine)) == 1 and operators(mine).count(ACT) == 2
    assert_same(mine, native)


# ---- classes that are not like others ----


REGISTRY: dict[str, type] = {}


class Registered(Block):
    """A class that registers its subclasses, and demands a keyword of them."""

    def __init_subclass__(cls, *, key: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        REGISTRY[key] = cls


class Entered(Registered, key="entered"):
    pass


class Meta(type):
    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, *arguments: Any) -> Any:
        mcs.made.append(name)
        return super().__new__(mcs, name, *arguments)


class WithMeta(Block, metaclass=Meta):
    pass


class Abstract(Block, abc.ABC):
    @abc.abstractmethod
    def name(self) -> str: ...


class Concrete(Abstract):
    def name(self) -> str:
        return type(self).__name__


class Slots(Block):
    __slots__ = ("extra",)


class Frozen(Block):
    """Attributes cannot be set once it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.done = True

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("done"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


T = TypeVar("T")


class Parametrised(Block, Generic[T]):
    pass


class Reduced(Block):
    """Pickled in a way of its own."""

    def __reduce__(self) -> Any:
        return (Reduced, (), {"_modules": self._modules, "_parameters": self._parameters, "_buffers": self._buffers})


class State(Block):
    def __getstate__(self) -> Any:
        return {**vars(self), "saved": True}

    def __setstate__(self, state: Any) -> None:
        assert state.pop("saved")
        super().__setstate__(state)


class Named(Block):
    """What a class says of itself is what its user wrote."""

    def forward(self, x: Tensor) -> Tensor:
        assert type(self).__name__ == self.__class__.__qualname__ == "Named" and isinstance(self, Named)
        return super().forward(x) + F.relu(self.bn(x))


def local_class(scale: float) -> nn.Module:
    class Local(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(x)) * scale * Local.factor() + len(super().extra_repr())

        @staticmethod
        def factor() -> int:
            return 2

    return Local()


FUSED_CLASSES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "registered": (Entered, True), "metaclass": (WithMeta, False), "abstract": (Concrete, True), "slots": (Slots, True),
    "frozen": (Frozen, True), "generic": (Parametrised, True), "generic_alias": (Parametrised[int], True),
    "reduce": (Reduced, True), "state": (State, True), "local": (lambda: local_class(3.0), True),
}  # fmt: skip


@pytest.mark.parametrize("case", FUSED_CLASSES)
def test_odd_classes(case: str) -> None:
    make, fused = FUSED_CLASSES[case]
    registry, made = dict(REGISTRY), list(Meta.made)
    mine, native = fused_and_native(make())
    assert fuses(mine) == fused == bn_ext.fusion_report(mine)[0].fused
    assert registry == REGISTRY and made == Meta.made
    assert isinstance(mine, type(native)) and type(mine).__name__ == type(native).__name__
    assert_same(mine, native)
    copies = [copy.deepcopy] if case == "local" else [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    for way in copies:
        assert_same(way(mine), way(native))
    assert type(bn_ext.revert(mine)) is type(native)
    assert_same(mine, native)


def test_a_subclass_of_the_users_is_registered_as_ever() -> None:
    """Also one that a tool makes of the class that convert made."""
    mine, _ = fused_and_native(Entered())
    kind = types.new_class("Later", (type(mine),), {"key": "later"})
    assert REGISTRY.pop("later") is kind
    with pytest.raises(TypeError, match="key"):
        types.new_class("Later", (type(mine),))


SOURCE = """
class Made(Block):
    def forward(self, x):
        return self.act(self.bn(x)) * 2
"""


def from_source(file: str, source: str, known: str | None) -> nn.Module:
    """A module of a class made by exec, whose file is known to linecache as `known`."""
    scope = {"Block": Block, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    if known is not None:
        linecache.cache[file] = (len(known), None, known.splitlines(keepends=True), file)
    return scope["Made"]()  # type: ignore[no-any-return, operator]


def test_the_source_has_to_be_what_runs() -> None:
    """As in a notebook; without a source; and where the file has changed since it was imported."""
    cell = from_source("<cell 1>", SOURCE, SOURCE)
    assert fuses(fused_and_native(cell)[0])
    for known, words in ((None, "not to be found"), (SOURCE.replace("* 2", "* 3"), "not what runs"), ("(", "not what")):
        mine, native = fused_and_native(from_source(f"<cell {known}>", SOURCE, known))
        assert words in bn_ext.fusion_report(mine)[0].reason and not fuses(mine)
        assert_same(mine, native)


ONE_LINE = """
class Made(Block):
    def forward(self, x): y = self.bn(x); y = self.act(y); return y
    def other(self, x): return x"""


def test_a_method_of_one_line() -> None:
    mine, native = fused_and_native(from_source("<one line>", ONE_LINE, ONE_LINE))
    assert fuses(mine)
    assert_same(mine, native)


def test_what_goes_wrong_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = sys.modules["bn_ext.convert"]
    model = nn.Sequential(Block(), nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    before = [(type(m), list(vars(m))) for m in model.modules()]
    real, calls = conversion._set_class, []

    def fail(module: nn.Module, kind: type) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("here")
        real(module, kind)

    monkeypatch.setattr(conversion, "_set_class", fail)
    assert error_of(lambda: bn_ext.convert(model, fuse=True)) == (RuntimeError, "here")
    assert [(type(m), list(vars(m))) for m in model.modules()] == before


def test_pickled_where_the_source_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model saved fused and loaded where its class has been changed computes what that class says."""
    mine, _ = fused_and_native(Block())
    data = pickle.dumps(mine)

    def forward(self: Block, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x))

    monkeypatch.setattr(Block, "forward", forward)
    loaded = pickle.loads(data)
    assert_same(loaded, lambda x: torch.sigmoid(loaded.fc(x)))


# ---- what is replaced after the conversion ----


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
    assert operators(loaded).count(ACT) == 2 and kinds == [type(m) for m in mine.modules()]
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
        assert operators(mine).count(ACT) == 2


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
