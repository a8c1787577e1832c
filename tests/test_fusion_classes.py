"""Fused models of classes that are not like others: registries, metaclasses, pickles, sources."""

from __future__ import annotations

import abc
import copy
import linecache
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from fusion_support import Block, C, assert_same, fused_and_native, fuses
from support import error_of

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
