"""What torch's own test of its modules asks, with its inputs (ModuleInfo): conversions, values, copies and files."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from drop_in import CLASSES, F64, FUSED, NAMES, NATIVE, assert_alike, batch_for, held, outcome, ran
from support import FLOATS, LAYOUTS, name_of

try:
    from test_moduleinfo import COUNT, build, sample
except pytest.skip.Exception:  # its inputs are torch's own, which need a package that may be missing
    COUNT = 0

WAYS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.bfloat16),
    "type_name": lambda m: m.type("torch.DoubleTensor"),
    "to": lambda m: m.to(torch.float32),
    "cpu": lambda m: m.cpu(),
    "share": lambda m: m.share_memory(),
    "format": lambda m: m.to(memory_format=torch.contiguous_format),
    "empty": lambda m: emptied_as(m, m.eps),
}


def emptied_as(module: Any, eps: float) -> Any:
    module.to("meta")
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    return module


@pytest.mark.parametrize("future", ["", "swap_module_params", "overwrite_module_params"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index", range(COUNT))
def test_conversion_of_every_tensor(index: int, way: str, future: str, training: bool) -> None:
    """Types, and which tensors stay the objects that an optimizer holds."""
    given = sample(index, "cpu", torch.float32, training)
    x, seen = given.forward_input.args[0], []
    for cls in CLASSES:
        module = build(cls, given, "cpu", torch.float32, training)
        before = {k: getattr(module, k) for k in NAMES}
        setter = getattr(torch.__future__, f"set_{future}_on_conversion", None)
        if setter is not None:
            setter(True)
        try:
            result = outcome(lambda m=module: WAYS[way](m) is m)
        finally:
            if setter is not None:
                setter(False)
        same = {k: before[k] is getattr(module, k) for k in NAMES}
        like = next((t for t in module.state_dict().values() if t.is_floating_point()), x)
        seen.append([result, same, held(module), outcome(lambda m=module, t=like: ran(m, x.to(t.dtype))), held(module)])
    assert_alike(*seen)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided_last", "expanded_batch"])
@pytest.mark.parametrize("index", range(COUNT))
def test_values_and_gradients_beside_the_cpu(device: str, index: int, layout: str, training: bool) -> None:
    """Ours on every device next to native on the CPU; some of the tensors frozen."""
    given, seen = sample(index, "cpu", F64, training), []
    for cls, where in ((FUSED, device), (NATIVE, "cpu")):
        module = build(cls, given, where, F64, training)
        x = given.forward_input.args[0]
        x = LAYOUTS[layout](x).to(where) if x.numel() else x.to(where)
        for frozen in ((), ("weight",), ("bias", "x")):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in frozen)
            leaf = x.detach().requires_grad_("x" not in frozen)
            found = [*ran(module, leaf), *held(module)["grads"].values(), *module.buffers()]
            seen.append([None if t is None else t.detach().cpu().clone() for t in found])
    assert_alike(seen[:3], seen[3:])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("index", range(COUNT))
def test_copies_and_files(device: str, index: int, dtype: torch.dtype, training: bool) -> None:
    """A copy made by any of the usual ways is the module again, and goes on as native's copy does."""
    given, seen = sample(index, device, dtype, training), []
    for cls in CLASSES:
        module = build(cls, given, device, dtype, training)
        module(given.forward_input.args[0])
        file = io.BytesIO()
        torch.save(module, file)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module]
        copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
        assert all(type(c) is cls for c in copies)
        refused = outcome(lambda f=file: torch.load(io.BytesIO(f.getvalue()), weights_only=True))
        seen.append(
            [
                refused.kind,
                [
                    [outcome(lambda c=c: ran(c, batch_for(c, tuple(given.forward_input.args[0].shape)))), held(c)]
                    for c in copies
                ],
            ]
        )
    assert_alike(*seen)
