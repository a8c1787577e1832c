"""What the drop-in tests ask of both classes, and how two answers are compared."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from support import module_for, normal

FUSED, NATIVE, F64 = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d, torch.float64
CLASSES = (FUSED, NATIVE)
Norm = nn.BatchNorm1d
NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


# ---- what is seen of a call, and how two such are compared ----


class Raised(NamedTuple):
    kind: type[BaseException]
    text: str


def outcome(call: Callable[[], object]) -> object:
    """What call returns, or what it raises."""
    try:
        return call()
    except Exception as error:
        return Raised(type(error), str(error))


def told(call: Callable[[], object]) -> tuple[object, list[tuple[type[Warning], str]]]:
    """The outcome of call and every warning of it."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # those of torch's own C++ come once in a process else
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = outcome(call)
    finally:
        torch.set_warn_always(always)
    return result, [(w.category, str(w.message)) for w in caught]


def words(text: str) -> str:
    """text without what tells the classes apart: their names, where a forward was defined, their operators' names."""
    text = re.sub(r"\b\w*BatchNorm\w*\.forward\(\)", "forward()", text)
    text = re.sub(r" \(when checking argument in method [\w:]+\)", "", text)
    return text.replace("bn_ext.modules", "torch.nn.modules.batchnorm").replace("FusedBatchNorm1d", "BatchNorm1d")


def shown(mine: object, theirs: object, where: str) -> str:
    return f"{where}: {str(outcome(lambda: repr(mine)))[:300]} for {str(outcome(lambda: repr(theirs)))[:300]}"


def assert_alike(mine: Any, theirs: Any, where: str = "") -> None:
    """Same types and contents: tensors to rounding and with their flags, modules by kind, mode and state."""
    if isinstance(theirs, type):
        assert isinstance(mine, type) and words(mine.__name__) == words(theirs.__name__), where
        return
    assert words(type(mine).__name__) == words(type(theirs).__name__), shown(mine, theirs, where)
    if isinstance(theirs, Tensor):
        if nn.parameter.is_lazy(theirs):
            return
        for flag in ("dtype", "shape", "device", "layout", "requires_grad", "is_leaf"):
            assert getattr(mine, flag) == getattr(theirs, flag), f"{where}: {flag}"
        # Defaults of the type are far above what two right answers differ by, but for 16-bit values near zero.
        rough = {} if theirs.element_size() != 2 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(
            mine.detach(), theirs.detach(), equal_nan=True, msg=lambda m: f"{where}: {m}", **rough
        )
    elif isinstance(theirs, nn.Module):
        assert_alike(dict(mine.state_dict()), dict(theirs.state_dict()), f"{where}.state_dict")
        assert_alike(outcome(lambda: repr(mine)), outcome(lambda: repr(theirs)), f"{where}.repr")
    elif isinstance(theirs, str):
        assert words(mine) == words(theirs), where
    elif isinstance(theirs, Mapping):
        assert list(mine) == list(theirs), where
        for key, value in theirs.items():
            assert_alike(mine[key], value, f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        for k, (value, other) in enumerate(zip(mine, theirs, strict=False)):
            assert_alike(value, other, f"{where}[{k}]")
        if len(mine) != len(theirs):
            pytest.fail(shown(mine, theirs, where))
    else:
        both_nan = mine != mine and theirs != theirs
        assert mine == theirs or both_nan, shown(mine, theirs, where)


def held(module: nn.Module) -> dict[str, Any]:
    """Everything that module holds by now, gradients too, as values that do not change any more."""
    tensors = {**module._parameters, **module._buffers}
    seen: dict[str, Any] = {k: None if t is None else copy.copy(t.detach().clone()) for k, t in tensors.items()}
    seen["grads"] = {k: None if t is None or t.grad is None else t.grad.clone() for k, t in tensors.items()}
    seen["flags"] = {k: t is not None and t.requires_grad for k, t in tensors.items()}
    # Copies of plain numbers and texts; the mark for torch.fx is ours alone.
    seen["plain"] = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k != "__module__"}
    return seen


def batch_for(module: nn.Module, shape: tuple[int, ...] = (6, 5)) -> Tensor:
    """A leaf of the type and device of the module's own tensors."""
    own = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    like = own[0] if own else torch.zeros((), dtype=F64)
    return normal(shape, like.dtype, str(like.device), mean=0.5).requires_grad_()


def ran(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output of module, and the gradient of x, after a backward through it."""
    output = module(x)
    if output.requires_grad:
        output.backward(normal(tuple(output.shape), output.dtype, str(output.device), seed=1))
    return [output.detach(), x.grad]


Call = Callable[[nn.Module, Tensor], object]


def life(module: nn.Module, change: Callable[[Any], object], x: Tensor | None = None, call: Call = ran) -> list[Any]:
    """What change returns, then what module holds, computes and holds then. What raises must not have changed ours."""
    seen = [told(lambda: change(module)), held(module)]
    seen.append(outcome(lambda: call(module, batch_for(module) if x is None else x)))
    if not isinstance(seen[-1], Raised):
        seen.append(held(module))
    elif isinstance(module, FUSED):
        assert_alike(held(module), seen[1], "moved by a call that raised")
    return seen


def both(scenario: Callable[[type[Norm]], object]) -> None:
    """Play scenario with either class, from the same seed."""
    seen = []
    for cls in CLASSES:
        torch.manual_seed(0)
        seen.append(told(lambda c=cls: scenario(c)))
    assert_alike(*seen)


def compare(change: Callable[[Any], object], training: bool, device: str = "cpu", **options: Any) -> None:
    both(lambda cls: life(module_for(cls, 5, device, **{"dtype": F64, **options}).train(training), change))


def several(*calls: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda module: [outcome(lambda c=c: c(module)) for c in calls]
