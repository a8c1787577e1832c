"""bn_ext.convert and bn_ext.revert: the same tensors, hooks and modes in modules of the other class."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bn_ext
from support import module_for, normal, pair

Swap = Callable[[nn.Module], nn.Module]
Kind = type[nn.BatchNorm1d]
FUSED, NATIVE = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d
BOTH_WAYS = [
    pytest.param(bn_ext.convert, NATIVE, FUSED, id="convert"),
    pytest.param(bn_ext.revert, FUSED, NATIVE, id="revert"),
]


def network(cls: type[nn.BatchNorm1d], device: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5),
        module_for(cls, 5, momentum=None, eps=1e-3),
        nn.Sequential(nn.ReLU(), module_for(cls, 5, affine=False), nn.Sequential(module_for(cls, 5, bias=False))),
        nn.Linear(5, 3),
    ).to(device)


@pytest.mark.parametrize(("swap", "source", "target"), BOTH_WAYS)
def test_every_batch_norm_is_swapped_and_keeps_its_tensors(device: str, swap: Swap, source: Kind, target: Kind) -> None:
    model = network(source, device)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    names = [n for n, _ in model.named_modules()]
    attributes = {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in model.named_modules()}
    result = swap(model)
    assert result is model
    assert [n for n, _ in result.named_modules()] == names
    assert not any(type(m) is source for m in result.modules())
    assert sum(type(m) is target for m in result.modules()) == 3
    after = dict(result.named_parameters()) | dict(result.named_buffers())
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    for name, module in result.named_modules():
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == attributes[name]


@pytest.mark.parametrize("training", [True, False])
def test_converted_model_computes_the_same(device: str, training: bool) -> None:
    model = network(NATIVE, device).double().train(training)
    converted = bn_ext.convert(copy.deepcopy(model))
    x = normal((8, 6), torch.float64, device)
    for _ in range(2):
        losses = [m(x).square().sum() for m in (converted, model)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
    for (name, mine), theirs in zip(converted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
    for (name, mine), theirs in zip(converted.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("swap", "source", "target"), BOTH_WAYS)
def test_a_lone_module(device: str, swap: Swap, source: Kind, target: Kind) -> None:
    module = module_for(source, 4, device).eval()
    tensors = module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked
    result = swap(module)
    assert type(result) is target and result.training is False
    kept = result.weight, result.bias, result.running_mean, result.running_var, result.num_batches_tracked
    assert all(a is b for a, b in zip(kept, tensors, strict=True))


@pytest.mark.parametrize(("swap", "source", "target"), BOTH_WAYS)
def test_shared_modules_stay_shared(swap: Swap, source: Kind, target: Kind) -> None:
    shared = source(4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = shared, shared
            self.inner = nn.Sequential(shared, source(4))

    net = swap(Net())
    assert type(net.first) is target
    assert net.first is net.second is net.inner[0] and net.inner[1] is not net.first


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    bn_ext.convert(model)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize(("swap", "source", "target"), BOTH_WAYS)
def test_hooks_move_along(swap: Swap, source: Kind, target: Kind) -> None:
    module, calls = source(4), []
    handle = module.register_forward_hook(lambda m, a, o: calls.append(("forward", type(m))))
    module.register_forward_pre_hook(lambda m, a: calls.append(("pre", type(m))))
    module.register_forward_pre_hook(lambda m, a, k: calls.append(("kwargs", type(m))), with_kwargs=True)
    module.register_full_backward_hook(lambda m, gi, go: calls.append(("backward", type(m))))
    module.register_state_dict_post_hook(lambda m, sd, p, md: calls.append(("state", type(m))))
    module.weight.register_hook(lambda g: calls.append(("weight", None)))
    model = swap(nn.Sequential(module))
    model(normal((3, 4)).requires_grad_()).sum().backward()
    model.state_dict()
    assert sorted(calls, key=str) == sorted(
        [(k, target) for k in ("pre", "kwargs", "forward", "backward", "state")] + [("weight", None)], key=str
    )
    handle.remove()
    calls.clear()
    model(normal((3, 4)))
    assert ("forward", target) not in calls


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_of_each_module_are_kept(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.ReLU())
    model.train(training)
    model[0].train(not training)
    bn_ext.convert(model)
    assert [m.training for m in model] == [not training, training, training] and model.training is training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_device_and_frozen_parameters_are_kept(device: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).to(device, dtype)
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    result = bn_ext.convert(model)[0]
    assert result.weight.dtype == result.running_mean.dtype == dtype and result.weight.device == torch.device(device)
    assert not result.weight.requires_grad and result.bias.requires_grad and result.bias.grad is not None


def test_extra_attributes_and_buffers_are_kept() -> None:
    module = nn.BatchNorm1d(4)
    module.note = "mine"
    module.register_buffer("mask", torch.ones(4), persistent=False)
    module.register_buffer("scale", torch.ones(2))
    module.add_module("child", nn.Linear(2, 2))
    result = bn_ext.convert(nn.Sequential(module))[0]
    assert result.note == "mine" and result.mask is module.mask and result.child is module.child
    assert list(result.state_dict()) == list(module.state_dict())


def test_everything_else_is_left_alone() -> None:
    class Mine(nn.BatchNorm1d):
        pass

    class MineFused(bn_ext.FusedBatchNorm1d):
        pass

    others = [nn.SyncBatchNorm(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.InstanceNorm1d(4), nn.LayerNorm(4), Mine(4)]
    model = nn.Sequential(*others, MineFused(4), bn_ext.FusedBatchNorm1d(4))
    kept = list(model)
    bn_ext.convert(model)
    assert all(a is b for a, b in zip(kept, model, strict=True))
    model = nn.Sequential(*others, MineFused(4), nn.BatchNorm1d(4))
    kept = list(model)
    bn_ext.revert(model)
    assert all(a is b for a, b in zip(kept, model, strict=True))
    lone = nn.Linear(2, 2)
    assert bn_ext.convert(lone) is lone and bn_ext.revert(lone) is lone


def test_there_and_back_again(device: str) -> None:
    model = network(NATIVE, device)
    tensors = {k: v.data_ptr() for k, v in model.state_dict().items()}
    text = repr(model)
    bn_ext.revert(bn_ext.convert(bn_ext.convert(model)))
    assert repr(model) == text
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == tensors


def test_optimizer_made_before_conversion_still_trains(device: str) -> None:
    model = network(NATIVE, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn_ext.convert(model)
    before = model[1].weight.detach().clone()
    model(normal((8, 6), device=device)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_lazy_modules_both_ways(device: str) -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d(eps=0.5, device=device))
    bn_ext.convert(model)
    assert type(model[0]) is bn_ext.LazyFusedBatchNorm1d and model[0].eps == 0.5
    bn_ext.revert(model)
    assert type(model[0]) is nn.LazyBatchNorm1d
    bn_ext.convert(model)
    out = model(normal((6, 4), device=device))
    assert type(model[0]) is bn_ext.FusedBatchNorm1d and out.shape == (6, 4)
    assert model[0].num_batches_tracked.item() == 1
    model[0].load_state_dict(pair(4)[1].state_dict())


def test_a_converted_lazy_module_loads_and_copies() -> None:
    lazy = bn_ext.convert(nn.LazyBatchNorm1d())
    assert type(lazy) is bn_ext.LazyFusedBatchNorm1d
    lazy.load_state_dict(pair(4)[1].state_dict())
    clone = copy.deepcopy(lazy)
    assert torch.equal(clone(normal((6, 4))), lazy(normal((6, 4)))) and type(clone) is bn_ext.FusedBatchNorm1d


def test_conversion_to_sync_batch_norm_works_on_ours() -> None:
    model = nn.Sequential(module_for(FUSED, 4))
    weight = model[0].weight
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[0]) is nn.SyncBatchNorm and synced[0].weight is weight


def test_parametrized_modules_are_left_alone_or_keep_working() -> None:
    """register_parametrization gives the module a class of its own: not an exact nn.BatchNorm1d."""

    class Double(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw * 2

    model = nn.Sequential(nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    expected = model(normal((6, 4)))
    bn_ext.convert(model)
    torch.testing.assert_close(model(normal((6, 4))), expected)
