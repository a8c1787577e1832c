"""FusedBatchNorm1d as a module, next to nn.BatchNorm1d in the same state: construction, state, modes, options, lazy."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bn_ext
from support import (
    FLOATS,
    OPTIONS,
    SHAPES,
    OpLog,
    assert_same,
    check_module,
    module_for,
    name_of,
    normal,
    pair,
    step,
    train_and_eval,
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_train_and_eval_as_native(device: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, native = pair(5, device, dtype=torch.float64, **options)
    train_and_eval(ours, native, shape, device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_and_repr_as_native(options: dict[str, Any]) -> None:
    ours, native = pair(5, **options)
    assert isinstance(ours, nn.BatchNorm1d)
    assert ours.extra_repr() == native.extra_repr()
    assert repr(ours) == "Fused" + repr(native)
    mine, theirs = ours.state_dict(), native.state_dict()
    assert list(mine) == list(theirs)
    assert mine._metadata == theirs._metadata
    for key in theirs:
        assert torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in native.named_parameters()]
    assert [k for k, _ in ours.named_buffers()] == [k for k, _ in native.named_buffers()]


@pytest.mark.parametrize(("ours", "native"), [
    (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d), (bn_ext.LazyFusedBatchNorm1d, nn.LazyBatchNorm1d),
])  # fmt: skip
def test_constructor_signature_is_natives_and_two_options(ours: Any, native: Any) -> None:
    found, expected = inspect.signature(ours).parameters, inspect.signature(native).parameters
    options = [p for name, p in found.items() if name not in expected]
    assert [p for name, p in found.items() if name in expected] == list(expected.values())
    assert [(p.name, p.default) for p in options] == [("virtual_batch_size", None), ("allow_single_value", False)]
    assert all(p.kind is p.KEYWORD_ONLY for p in options)
    # What is built by its signature, as configurations are, and shown by it.
    given = {"num_features": 3, "eps": 0.25, "virtual_batch_size": 8, "allow_single_value": True}
    module = ours(**{name: value for name, value in given.items() if name in found})
    assert {name: getattr(module, name) for name in ("virtual_batch_size", "allow_single_value", "eps")} == {
        name: given[name] for name in ("virtual_batch_size", "allow_single_value", "eps")
    }
    assert "virtual_batch_size=None, allow_single_value=False" in pydoc.render_doc(ours, renderer=pydoc.plaintext)


def test_a_subclass_passes_options_on() -> None:
    class Mine(bn_ext.FusedBatchNorm1d):
        def __init__(self, channels: int, **options: Any) -> None:
            super().__init__(channels, **options)

    assert Mine(3, virtual_batch_size=4).virtual_batch_size == 4
    assert list(inspect.signature(Mine).parameters) == ["channels", "options"]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_device_and_dtype_of_the_constructor(device: str, dtype: torch.dtype) -> None:
    module = bn_ext.FusedBatchNorm1d(3, 1e-4, 0.2, True, True, device, dtype)
    assert module.eps == 1e-4 and module.momentum == 0.2
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        assert tensor.dtype == dtype and tensor.device == torch.device(device)
    assert module.num_batches_tracked.dtype == torch.long and module.num_batches_tracked.device == torch.device(device)


def test_meta_module_and_to_empty(device: str) -> None:
    module = bn_ext.FusedBatchNorm1d(4, device="meta")
    out = module(torch.empty(6, 4, device="meta"))
    assert out.is_meta and out.shape == (6, 4)
    module = module.to_empty(device=device)
    module.reset_parameters()
    check_module(module, normal((6, 4), device=device), normal((6, 4), device=device, seed=1))


# ---- running statistics ----


def test_buffers_are_updated_in_place(device: str) -> None:
    ours, _ = pair(5, device)
    held = {k: (v, v.data_ptr()) for k, v in ours.named_buffers()}
    old = {k: v.clone() for k, v in ours.named_buffers()}
    step(ours, normal((6, 5), device=device))
    for key, (tensor, pointer) in held.items():
        now = getattr(ours, key)
        assert now is tensor and now.data_ptr() == pointer
        assert not torch.equal(now, old[key]), key
        assert not now.requires_grad


def test_eval_moves_no_buffer(device: str) -> None:
    ours, _ = pair(5, device)
    ours.eval()
    old = {k: v.clone() for k, v in ours.named_buffers()}
    step(ours, normal((6, 5), device=device), normal((6, 5), device=device, seed=1))
    for key, value in ours.named_buffers():
        assert torch.equal(value, old[key]), key


def test_cumulative_average_is_the_mean_over_batches(device: str) -> None:
    module = bn_ext.FusedBatchNorm1d(3, momentum=None, device=device, dtype=torch.float64)
    batches = [normal((7, 3), torch.float64, device, mean=k, seed=k) for k in range(4)]
    for batch in batches:
        module(batch)
    stacked = torch.stack(batches)
    # Four updates of four roundings each.
    bound = 16 * torch.finfo(torch.float64).eps * 4
    torch.testing.assert_close(module.running_mean, stacked.mean(1).mean(0), rtol=bound, atol=bound)
    torch.testing.assert_close(module.running_var, stacked.var(1).mean(0), rtol=bound, atol=bound)


def _drop_stats(m: nn.BatchNorm1d) -> None:
    m.running_mean = m.running_var = None


def _drop_counter(m: nn.BatchNorm1d) -> None:
    m.num_batches_tracked = None


def _untrack(m: nn.BatchNorm1d) -> None:
    m.track_running_stats = False


def _drop_counter_cumulative(m: nn.BatchNorm1d) -> None:
    m.num_batches_tracked, m.momentum = None, None


def _cumulative_late(m: nn.BatchNorm1d) -> None:
    m.num_batches_tracked.fill_(9)
    m.momentum = None


def _no_weight(m: nn.BatchNorm1d) -> None:
    m.weight = None


def _no_bias(m: nn.BatchNorm1d) -> None:
    m.bias = None


def _new_parameters(m: nn.BatchNorm1d) -> None:
    m.weight = nn.Parameter(torch.full_like(m.weight, -0.7))
    m.bias = nn.Parameter(torch.full_like(m.bias, 2.0))


def _new_buffers(m: nn.BatchNorm1d) -> None:
    m.running_mean = torch.full_like(m.running_mean, 0.4)
    m.running_var = torch.full_like(m.running_var, 2.0)


def _frozen(m: nn.BatchNorm1d) -> None:
    m.requires_grad_(False)


def _frozen_weight(m: nn.BatchNorm1d) -> None:
    m.weight.requires_grad_(False)


def _other_eps(m: nn.BatchNorm1d) -> None:
    m.eps, m.momentum = 0.125, 0.75


TOGGLES = (
    _drop_stats,
    _drop_counter,
    _untrack,
    _drop_counter_cumulative,
    _cumulative_late,
    _no_weight,
    _no_bias,
    _new_parameters,
    _new_buffers,
    _frozen,
    _frozen_weight,
    _other_eps,
)


@pytest.mark.parametrize("toggle", TOGGLES, ids=lambda f: f.__name__.strip("_"))
def test_attributes_changed_after_construction(device: str, toggle: Callable[[nn.BatchNorm1d], None]) -> None:
    ours, native = pair(5, device, dtype=torch.float64)
    for module in (ours, native):
        toggle(module)
    train_and_eval(ours, native, (6, 5), device)
    train_and_eval(ours, native, (4, 5, 3), device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strided_parameters_and_buffers(device: str, shape: tuple[int, ...]) -> None:
    """Next to native with the same values side by side: torch 2.13's CPU backward misreads a strided weight or
    running_var for (N, C) inputs."""
    ours, native = pair(5, device, dtype=torch.float64)
    ours.weight = nn.Parameter(ours.weight.detach().repeat_interleave(2)[::2])
    ours.bias = nn.Parameter(ours.bias.detach().repeat_interleave(3)[::3])
    ours.running_mean = ours.running_mean.repeat_interleave(2)[::2]
    ours.running_var = ours.running_var.repeat_interleave(2)[::2]
    train_and_eval(ours, native, shape, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_dtype_conversions_of_the_module(device: str, dtype: torch.dtype) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 5, device)
    module = {
        torch.float16: module.half,
        torch.bfloat16: module.bfloat16,
        torch.float64: module.double,
        torch.float32: module.float,
    }[dtype]()
    assert module.weight.dtype == module.running_var.dtype == dtype
    assert module.num_batches_tracked.dtype == torch.long
    for training in (True, False):
        module.train(training)
        check_module(module, normal((6, 5), dtype, device), normal((6, 5), dtype, device, seed=1))


# ---- modes, hooks, tools that work on any module ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(device: str, mode: Callable[[], Any], training: bool) -> None:
    ours, native = pair(5, device, dtype=torch.float64)
    ours.train(training), native.train(training)
    x = normal((6, 5), torch.float64, device)
    results = []
    for module in (ours, native):
        with mode():
            out = module(x)
        assert not out.requires_grad and out.grad_fn is None
        assert out.is_inference() == (mode is torch.inference_mode)
        results.append((out, *(b.clone() for b in module.buffers())))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)  # float64 defaults: 1e-7, far above either's rounding
    if training:
        assert ours.num_batches_tracked.item() == 1


def test_module_made_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        ours, native = pair(5, device, dtype=torch.float64)
        x = normal((6, 5), torch.float64, device)
        for training in (True, False):
            ours.train(training), native.train(training)
            torch.testing.assert_close(ours(x), native(x))
            torch.testing.assert_close(ours.running_var, native.running_var)


def test_hooks_run_as_on_native(device: str) -> None:
    seen: dict[str, list[tuple[str, Any]]] = {}
    for module in pair(5, device, dtype=torch.float64):
        log = seen.setdefault(type(module).__name__, [])
        module.register_forward_pre_hook(lambda m, a, log=log: log.append(("pre", a[0].shape)))
        module.register_forward_hook(lambda m, a, out, log=log: (log.append(("post", out.shape)), out * 2)[1])
        module.register_full_backward_pre_hook(lambda m, g, log=log: log.append(("back_pre", g[0].shape)))
        module.register_full_backward_hook(lambda m, gi, go, log=log: log.append(("back", gi[0].shape)))
        module.weight.register_hook(lambda g, log=log: log.append(("weight", g.shape)))
        x = normal((6, 5), torch.float64, device).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        log.append(("total", round(float(x.grad.square().sum() + out.detach().sum()), 6)))
    assert seen["FusedBatchNorm1d"] == seen["BatchNorm1d"]
    assert [name for name, _ in seen["BatchNorm1d"]][:3] == ["pre", "post", "back_pre"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_updates_statistics_as_native(device: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    results = []
    for module in pair(5, device, dtype=torch.float64):
        x = normal((6, 5), torch.float64, device).requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        assert module.num_batches_tracked.item() == 2  # the forward runs again in the backward
        results.append((x.grad, module.weight.grad, module.bias.grad, module.running_mean, module.running_var))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_saved_tensor_hooks_see_and_restore_everything(device: str, training: bool) -> None:
    x = normal((6, 5), torch.float64, device)
    g = normal((6, 5), torch.float64, device, seed=1)
    plain, hooked = (module_for(bn_ext.FusedBatchNorm1d, 5, device, dtype=torch.float64) for _ in range(2))
    plain.train(training), hooked.train(training)
    expected = step(plain, x, g)
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> Any:
        packed.append(tensor.shape)
        return tensor.detach().cpu().numpy().copy(), tensor.device

    def unpack(kept: Any) -> torch.Tensor:
        return torch.from_numpy(kept[0]).to(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_same(step(hooked, x, g), expected)
    assert x.shape in packed
    with torch.autograd.graph.save_on_cpu():
        step(hooked, x, g)


def test_parametrization_of_the_weight(device: str) -> None:
    class Positive(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw.exp()

    results = []
    for module in pair(5, device, dtype=torch.float64):
        nn.utils.parametrize.register_parametrization(module, "weight", Positive())
        x = normal((6, 5), torch.float64, device).requires_grad_()
        module(x).square().sum().backward()
        module.eval()(x).sum().backward()
        results.append((x.grad, module.parametrizations.weight.original.grad, module.bias.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_tools_that_look_for_batch_norm_find_ours(device: str) -> None:
    from torch.optim.swa_utils import update_bn

    batches = [normal((6, 4), torch.float64, device, seed=k) for k in range(3)]
    results = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        model = nn.Sequential(module_for(cls, 4, device, dtype=torch.float64))
        update_bn(batches, model)
        results.append((model[0].running_mean, model[0].running_var, model[0].num_batches_tracked))
        assert model[0].momentum == 0.1
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    linear = nn.Linear(4, 4, dtype=torch.float64, device=device).eval()
    ours = module_for(bn_ext.FusedBatchNorm1d, 4, device, dtype=torch.float64).eval()
    fused = nn.utils.fusion.fuse_linear_bn_eval(linear, ours)
    torch.testing.assert_close(fused(batches[0]), ours(linear(batches[0])))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_operators_do_the_work(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], training: bool
) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 5, device).train(training)
    with OpLog() as log:
        step(module, normal(shape, dtype, device), normal(shape, dtype, device, seed=1))
    assert [name.split(".")[0] for name in log.names] == ["bn_ext::batch_norm_forward", "bn_ext::batch_norm_backward"]
    with OpLog() as log, torch.no_grad():
        module(normal(shape, dtype, device))
    assert log.names == [f"bn_ext::batch_norm_{'forward' if training else 'inference'}"]
