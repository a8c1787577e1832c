"""What README promises beyond nn.BatchNorm1d, or beside it: errors change nothing, types of gradients, denormals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map

import bn_ext
from drop_in import CLASSES, F64, FUSED, assert_alike, held, outcome
from support import OpLog, module_for, normal

# ---- a call that raises changes nothing ----


class Function(Tensor):
    """A type with a __torch_function__ of its own, torch's default one."""


class Dispatch(Tensor):
    """A type that sees operators alone and passes them on to the tensor that it wraps."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatch:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(t: Any) -> Any:
            return t.inner if isinstance(t, Dispatch) else t

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: Dispatch(t) if isinstance(t, Tensor) else t, result)


def of_inference_mode(device: str) -> Tensor:
    with torch.inference_mode():
        return normal((6, 5), F64, device)


INPUTS: dict[str, Callable[[str], Any]] = {
    "of_inference_mode": of_inference_mode,
    "jagged": lambda d: torch.nested.nested_tensor([normal((n, 5), F64, d) for n in (2, 3)], layout=torch.jagged),
    "nested": lambda d: torch.nested.nested_tensor([normal((n, 5), F64, d) for n in (2, 3)]),
    "one_value_function": lambda d: normal((1, 5), F64, d).as_subclass(Function),
    "one_value_dispatch": lambda d: Dispatch(normal((1, 5), F64, d)),
    "one_value": lambda d: normal((1, 5), F64, d),
    "sparse": lambda d: normal((6, 5), F64, d).to_sparse(),
    "quantised": lambda d: torch.quantize_per_tensor(normal((6, 5), device=d), 0.1, 0, torch.qint8),
    "no_tensor": lambda d: 3,
    "none": lambda d: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["module", "fused", "by_hand"])
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_that_is_refused_moves_nothing(device: str, kind: str, way: str) -> None:
    norm = module_for(FUSED, 5, device, dtype=F64)
    model: nn.Module = {
        "module": norm,
        "fused": bn_ext.convert(nn.Sequential(norm, nn.ReLU()), fuse=True),
        "by_hand": bn_ext.BatchNormAct1d(5),
    }[way]
    if way == "by_hand":
        model.norm = norm
    x = INPUTS[kind](device)
    before = held(norm)
    with pytest.raises(Exception):  # noqa: B017 (native's, whichever it is: below)
        model(x)
    assert_alike(held(norm), before)
    if way == "module":
        theirs = outcome(lambda: module_for(nn.BatchNorm1d, 5, device, dtype=F64)(INPUTS[kind](device)))
        assert type(outcome(lambda: model(x))) is type(theirs)


def test_vmap_with_statistics_of_its_own_moves_nothing(device: str) -> None:
    norm = module_for(FUSED, 5, device, dtype=F64)
    before = held(norm)
    with pytest.raises(Exception, match="vmap"):
        torch.vmap(norm)(normal((3, 6, 5), F64, device))
    assert_alike(held(norm), before)


RESIDUALS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda r: r.to("meta"),
    "complex_in_place": lambda r: torch.complex(r, r).to_sparse(),
    "quantised": lambda r: torch.quantize_per_tensor(r.float(), 0.1, 0, torch.qint8),
    "mkldnn": lambda r: r.float().to_mkldnn(),
    "other_shape": lambda r: r[:3],
    "text": lambda r: "text",
    "freed": lambda r: (r.untyped_storage().resize_(0), r)[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["function", "by_hand"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_residual_that_is_refused_moves_nothing(kind: str, way: str) -> None:
    block = bn_ext.BatchNormAct1d(5)
    block.norm = norm = module_for(FUSED, 5, dtype=F64)
    residual = outcome(lambda: RESIDUALS[kind](normal((6, 5), F64, seed=1)))
    x, before = normal((6, 5), F64), held(norm)
    with pytest.raises(Exception):  # noqa: B017 (torch's words for what it cannot add)
        if way == "by_hand":
            block(x, residual)
        else:
            mean, var = norm.running_mean, norm.running_var
            bn_ext.functional.batch_norm(x, mean, var, None, None, True, activation="relu", residual=residual)
    assert_alike(held(norm), before)


@pytest.mark.parametrize("kind", [Function, Dispatch], ids=lambda k: k.__name__)
@pytest.mark.parametrize("batches", [1, 3])
def test_types_of_others_count_each_batch_once(kind: Any, batches: int) -> None:
    seen = []
    for cls in CLASSES:
        norm = module_for(cls, 5, dtype=F64, momentum=None)
        for seed in range(batches):
            x = normal((6, 5), F64, seed=seed)
            norm(x.as_subclass(Function) if kind is Function else Dispatch(x))
        seen.append(held(norm))
    assert int(seen[0]["num_batches_tracked"]) == batches
    assert_alike(*seen)


# ---- the gradient of bias is of bias's type, and bias may change before it ----


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("weight", "bias", "input", "rows"),
    [
        (torch.float16, torch.float32, torch.float32, 70_000),  # more than float16 holds
        (torch.bfloat16, torch.float32, torch.float32, 1001),  # between two of bfloat16's numbers
        (torch.float32, torch.float64, torch.float64, 16_777_217),  # between two of float32's
        (None, torch.float64, torch.float32, 1001),
        (torch.float64, torch.bfloat16, torch.float64, 100),
    ],
    ids=str,
)
def test_gradient_of_bias_in_its_own_type(
    device: str, weight: torch.dtype | None, bias: torch.dtype, input: torch.dtype, rows: int, training: bool, act: Any
) -> None:
    if rows > 10**6:
        x = normal((64, 1), input, device).expand(64, 1)
        g, rows = torch.full((64, 1), 262_144.0, dtype=input, device=device), 262_144 * 64
        g[0] += 1
        rows += 1
    else:
        x, g = normal((rows, 1), input, device), torch.ones((rows, 1), dtype=input, device=device)
    w = None if weight is None else torch.ones(1, dtype=weight, device=device, requires_grad=True)
    b = torch.full((1,), 100.0, dtype=bias, device=device, requires_grad=True)  # relu lets everything pass
    mean, var = torch.zeros(1, dtype=F64, device=device), torch.ones(1, dtype=F64, device=device)
    y = bn_ext.functional.batch_norm(x, mean, var, w, b, training, activation=act)
    (grad,) = torch.autograd.grad(y, b, g)
    assert grad.dtype == bias and float(grad) == rows


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_bias_may_change_before_backward(device: str, training: bool, residual: bool, act: str | None) -> None:
    grads = []
    for change in (False, True):
        x, r = (normal((6, 5), F64, device, seed=k).requires_grad_() for k in (0, 1))
        norm = module_for(FUSED, 5, device, dtype=F64)
        given = (norm.running_mean, norm.running_var, norm.weight, norm.bias, training)
        y = bn_ext.functional.batch_norm(x, *given, activation=act, residual=r if residual else None)
        with torch.no_grad():
            norm.bias.add_(3.0 if change else 0.0)
        wanted = (x, norm.weight, norm.bias, *((r,) if residual else ()))
        grads.append(torch.autograd.grad(y, wanted, normal((6, 5), F64, device, seed=2)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- denormals ----


@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this machine has no mode without denormals")
@pytest.mark.parametrize("shape", [(4096, 33), (16, 8, 1024)], ids=str)
def test_flushed_denormals_are_flushed_in_every_thread(shape: tuple[int, ...]) -> None:
    """Half of the results are denormal, of operands that are not: kept, or zero, whichever thread computes them."""
    x, w = normal(shape), torch.full((shape[1],), 2e-38)
    results: dict[tuple[bool, int], list[Tensor]] = {}
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                y = bn_ext.functional.batch_norm(leaf, None, None, w, None, True)
                (grad,) = torch.autograd.grad(y, leaf, x)
                results[flush, threads] = [y.detach(), grad]
    finally:
        torch.set_flush_denormal(False)
    for flush in (False, True):
        one, two = (results[flush, threads] for threads in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), f"flush {flush}"
    kept, flushed = results[False, 1][0].abs(), results[True, 2][0].abs()
    smallest = torch.finfo(torch.float32).tiny
    torch.set_flush_denormal(False)
    assert ((kept > 0) & (kept < smallest)).any() and not ((flushed > 0) & (flushed < smallest)).any()


torch.set_flush_denormal(False)  # what asking for it has switched on


# ---- what convert leaves alone ----


def test_the_report_says_what_was_left_alone_and_why(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(nn.BatchNorm1d):
        pass

    parametrized = parametrizations.weight_norm(nn.BatchNorm1d(4), dim=None)
    others = [Mine(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4), parametrized]
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), *others)
    with caplog.at_level("INFO", logger="bn_ext"):
        bn_ext.convert(model)
    entries = {entry.name: entry for entry in bn_ext.fusion_report(model)}
    assert list(entries) == ["1", "3", "4", "5", "6"]
    assert [entry.converted for entry in entries.values()] == [True, False, False, False, False]
    words = {"3": "subclass", "4": "all processes", "5": "dimensions", "6": "parametrized"}
    for name, word in words.items():
        assert word in entries[name].reason and not entries[name].fused
        assert any(f"{name} (" in line and word in line for line in caplog.messages)


def test_sums_of_gradients_run_once_however_they_are_typed(device: str) -> None:
    """The type of the bias's gradient costs no second pass."""
    norm = module_for(FUSED, 5, device)
    norm.bias.data = norm.bias.data.double()
    with OpLog() as log:
        norm(normal((6, 5), device=device).requires_grad_()).sum().backward()
    assert log.names == ["bn_ext::batch_norm_forward", "bn_ext::batch_norm_backward"]
    assert norm.bias.grad is not None and norm.bias.grad.dtype == F64
