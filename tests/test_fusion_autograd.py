"""Fused calls and the rest of PyTorch: derivatives, memory kept, in place, operators, compile, fallbacks, options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import bn_ext
from reference_activated import ACTIVATIONS, SLOPE
from support import FLOATS, LAYOUTS, OpLog, act_module_for, error_of, module_for, name_of, normal

FUSED, NATIVE = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d
F32, F64 = torch.float32, torch.float64
ops = torch.ops.bn_ext
TORCH: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda v: v, "relu": F.relu, "leaky_relu": lambda v: F.leaky_relu(v, SLOPE), "silu": F.silu, "gelu": F.gelu,
}  # fmt: skip


def pair_of(activation: str | None, device: str, **options: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    """(ours, a call of the same in torch's own operations with a batch norm in the same state), in float64."""
    mine = act_module_for(4, device, activation, SLOPE, dtype=F64, **options)
    native = module_for(NATIVE, 4, device, dtype=F64, **options)

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        native.train(mine.training)
        y = native(x)
        return TORCH[activation](y if residual is None else y + residual)

    return mine, call


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(device: str, activation: str | None, with_residual: bool, training: bool) -> None:
    for shape in ((5, 3), (3, 2, 4)):
        module = act_module_for(shape[1], device, activation, SLOPE, dtype=F64).train(training)

        def call(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor, module: nn.Module = module) -> Tensor:
            arguments = (x, *residual)
            return torch.func.functional_call(module, {"norm.weight": weight, "norm.bias": bias}, arguments)

        residual = (normal(shape, F64, device, seed=3),) if with_residual else ()
        leaves = [normal(shape, F64, device), *(p.detach() for p in module.parameters()), *residual]
        leaves = [t.clone().requires_grad_() for t in leaves]
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


class Kept:
    """Counts what autograd keeps in a forward."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> Kept:
        def pack(t: Tensor) -> Tensor:
            self.tensors.append(t)
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_kept_for_backward(device: str, activation: str | None, with_residual: bool, training: bool) -> None:
    shape, channels = (64, 8, 50), 8
    x = normal(shape, device=device).requires_grad_()
    residual = normal(shape, device=device, seed=1) if with_residual else None
    module = bn_ext.BatchNormAct1d(channels, activation, device=device).train(training)
    with Kept() as kept:
        module(x, residual)
    large = [t for t in kept.tensors if t.numel() >= x.numel()]
    pointers = {t.data_ptr() for t in large if t.dtype != torch.uint8}
    by_mask = with_residual and activation in ("relu", "leaky_relu")
    mask_bytes = (x.numel() // 8 if device == "cpu" else x.nbytes // 16) + 16
    keeps = with_residual and activation is not None and not by_mask
    assert pointers == {x.data_ptr()} | ({residual.data_ptr()} if keeps else set())
    masks = [t for t in kept.tensors if t.dtype == torch.uint8 and t.numel() > 0]
    assert [m.numel() for m in masks] == ([mask_bytes] if by_mask else [])
    small = sum(t.numel() for t in kept.tensors if t.numel() < x.numel() and t.dtype != torch.uint8)
    assert small <= 8 * channels  # saved (6, C), weight, bias


def functional_of(norm: nn.BatchNorm1d, **after: Any) -> Callable[..., Tensor]:
    """The functional form in the place of norm, with what follows it."""

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        state = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return bn_ext.functional.batch_norm(x, *state, norm.training, residual=residual, **after)

    return call


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced_last", "misaligned"])
def test_in_place_in_evaluation(device: str, layout: str, activation: str | None) -> None:
    for with_residual in (False, True):
        x = LAYOUTS[layout](normal((6, 4, 9), device=device))
        residual = normal((6, 4, 9), device=device, seed=1) if with_residual else None
        norm = module_for(FUSED, 4, device).eval()
        after = {"activation": activation, "negative_slope": SLOPE}
        with torch.no_grad():
            right = functional_of(norm, **after)(x.clone(memory_format=torch.preserve_format), residual)
            version = x._version
            result = functional_of(norm, **after, inplace=True)(x, residual)
        assert result is x and torch.equal(x, right) and x._version > version
        again = x.clone()
        frozen = functional_of(norm.requires_grad_(False), activation=activation, inplace=True)
        assert frozen(again) is again  # autograd has nothing to do with it


def test_in_place_is_refused_where_the_input_is_needed(device: str) -> None:
    x, residual = normal((6, 4), device=device), normal((6, 4), device=device).requires_grad_()
    before = x.clone()
    norm = FUSED(4, device=device)
    call = functional_of(norm, activation="relu", inplace=True)
    for attempt, words in (
        (lambda: call(x), "for evaluation"),
        (lambda: norm.eval() and call(x), "autograd would need"),
        (lambda: norm.requires_grad_(False) and call(x, residual), "autograd would need"),
        (lambda: ops.batch_norm_inference_(
            x, None, None, norm.running_mean, norm.running_var, 1e-5, residual, "relu"
        ), "autograd would need"),
    ):  # fmt: skip
        error = error_of(attempt)
        assert error is not None and error[0] is RuntimeError and words in error[1]
    assert torch.equal(x, before) and torch.equal(norm.running_mean, torch.zeros(4, device=device))
    with torch.no_grad():
        assert error_of(lambda: call(x[:1].expand(6, 4)))[0] is RuntimeError  # elements that share memory
        held = torch.ones(6, 4, device=device, requires_grad=True)
    product = held * x  # autograd keeps x
    with torch.no_grad():
        call(x)
    assert "modified by an inplace operation" in error_of(lambda: product.sum().backward())[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_form_is_the_module(device: str, activation: str | None) -> None:
    module = act_module_for(4, device, activation, SLOPE)
    x, residual = normal((6, 4, 3), device=device), normal((6, 4, 3), device=device, seed=1)
    state = [t.clone() for t in (module.norm.running_mean, module.norm.running_var)]
    y = bn_ext.functional.batch_norm(
        x, *state, *module.parameters(), True, residual=residual, activation=activation, negative_slope=SLOPE
    )
    assert torch.equal(y, module(x, residual)) and torch.equal(state[0], module.norm.running_mean)
    unknown = error_of(lambda: bn_ext.functional.batch_norm(x, None, None, training=True, activation="elu"))
    assert unknown is not None and unknown[0] is ValueError


FALLBACKS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "broadcast": lambda m, x, r: m(x, r[:1]),
    "promoted": lambda m, x, r: m(x, r.float()),
    "vmap": lambda m, x, r: torch.func.vmap(lambda a, b: m(a, b))(torch.stack([x, x + r]), torch.stack([r, x])),
    "grad": lambda m, x, r: torch.func.grad(lambda a: m(a, r).square().sum())(x),
    "jvp": lambda m, x, r: torch.func.jvp(lambda a: m(a, r), (x,), (r,)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", FALLBACKS)
def test_where_there_is_no_fused_kernel(device: str, case: str, activation: str | None) -> None:
    mine, native = pair_of(activation, device, track_running_stats=False)
    x, residual = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    torch.testing.assert_close(FALLBACKS[case](mine, x, residual), FALLBACKS[case](native, x, residual))


def test_forward_mode(device: str) -> None:
    mine, native = pair_of("silu", device)
    x, t = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    with forward_ad.dual_level():
        results = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, t), t)) for f in (mine, native)]
    torch.testing.assert_close(*(tuple(r) for r in results))


def test_a_residual_that_cannot_be_added_changes_nothing(device: str) -> None:
    module = bn_ext.BatchNormAct1d(4, device=device)
    norm = module.norm
    x = normal((6, 4), device=device)
    for call in (module, functional_of(norm, activation="relu")):
        for residual in (torch.ones(5, 4, device=device), torch.ones(6, 3, device=device)):
            assert error_of(lambda c=call, r=residual: c(x, r))[0] is RuntimeError
    assert int(norm.num_batches_tracked) == 0 and torch.equal(norm.running_var, torch.ones(4, device=device))


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_opcheck_in_place(device: str, activation: str) -> None:
    """The other operators are in test_ops.py."""
    for dtype, layout in ((F32, "contiguous"), (torch.bfloat16, "permuted")):
        x, r = (LAYOUTS[layout](normal((3, 4, 5), dtype, device, seed=k)) for k in range(2))
        w, b, mean, var = (normal((4,), F32, device, seed=k).abs() + 0.5 for k in range(4, 8))
        for residual in (r, None):
            arguments = (x.clone(), w, b, mean, var, 1e-5, residual, activation, SLOPE)
            torch.library.opcheck(ops.batch_norm_inference_.default, arguments)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_in_one_graph(device: str, activation: str | None, training: bool) -> None:
    eager = act_module_for(4, device, activation, SLOPE).train(training)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    operands = [normal((6, 4, 5), device=device, seed=k) for k in range(3)]
    results = []
    for call, module in ((eager, eager), (compiled, traced)):
        x, residual = (t.clone().requires_grad_() for t in operands[:2])
        y = call(x, residual)
        grads = torch.autograd.grad(y, (x, residual, *module.parameters()), operands[2])
        results.append([y.detach(), *grads, *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    call = functional_of(eager.norm.eval(), activation=activation, inplace=True)
    with torch.no_grad():
        x = operands[0].clone()
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_autocast_leaves_types_as_batch_norm_does(device: str, dtype: torch.dtype) -> None:
    module = bn_ext.BatchNormAct1d(4, "gelu", device=device, dtype=F64 if dtype == F64 else F32)
    x = normal((6, 4), dtype, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16), OpLog() as log:
        y = module(x, x)
    assert y.dtype == dtype and log.names[0] == "bn_ext::batch_norm_forward" and log.fused == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script", "ignore::DeprecationWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_scripted_and_traced(device: str, activation: str) -> None:
    mine, native = pair_of(activation, device)
    model = nn.Sequential(mine)
    x = normal((6, 4), F64, device)
    mine.eval()
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(scripted(x), native(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), native(x))
