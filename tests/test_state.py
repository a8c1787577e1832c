"""Saving, loading, copying and lazy construction, next to nn.BatchNorm1d."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bn_ext
from support import BIAS_OPTION, OPTIONS, SHAPES, assert_same, make, module_for, normal, pair, step, train_and_eval


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_loads_both_ways(device: str, options: dict[str, Any]) -> None:
    ours, native = pair(5, device, dtype=torch.float64, **options)
    x = normal((6, 5), torch.float64, device)
    step(ours, x), step(native, x)
    fresh_native, fresh_ours = (make(cls, 5, **options).to(x) for cls in (nn.BatchNorm1d, bn_ext.FusedBatchNorm1d))
    assert not any(fresh_native.load_state_dict(ours.state_dict(), strict=True))
    assert not any(fresh_ours.load_state_dict(native.state_dict(), strict=True))
    train_and_eval(fresh_ours, fresh_native, (6, 5), device)


@pytest.mark.parametrize("version", [None, 1])
def test_state_dict_from_before_version_2(version: int | None) -> None:
    ours, native = pair(5, dtype=torch.float64)
    for module in (ours, native):
        step(module, normal((6, 5), torch.float64))
        old = module_for(nn.BatchNorm1d, 5, dtype=torch.float64).state_dict()
        del old["num_batches_tracked"]
        if version is None:
            del old._metadata
        else:
            old._metadata[""]["version"] = version
        assert not any(module.load_state_dict(old, strict=True))
        assert module.num_batches_tracked.item() == 1  # an old checkpoint leaves the counter alone
    train_and_eval(ours, native, (6, 5), "cpu")


def test_strict_keys_as_native() -> None:
    ours, native = pair(5)
    broken = native.state_dict()
    del broken["num_batches_tracked"]  # version 2 must have it
    broken["extra"] = torch.zeros(1)
    texts = []
    for module in (ours, native):
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(broken)
        texts.append(str(caught.value))
    assert texts[0] == texts[1].replace("BatchNorm1d", "FusedBatchNorm1d")
    result = ours.load_state_dict(broken, strict=False)
    assert result.missing_keys == ["num_batches_tracked"] and result.unexpected_keys == ["extra"]


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved_whole(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _saved_weights(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = type(module)(module.num_features, affine=module.affine, device=module.running_mean.device)
    fresh = fresh.to(module.running_mean.dtype)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, _pickled, _saved_whole, _saved_weights])
@pytest.mark.parametrize("affine", [True, False])
def test_copies_work_and_keep_their_state(device: str, copier: Callable[[nn.Module], nn.Module], affine: bool) -> None:
    ours, native = pair(5, device, affine=affine, dtype=torch.float64)
    x = normal((6, 5), torch.float64, device)
    step(ours, x), step(native, x)
    clone = copier(ours)
    assert type(clone) is bn_ext.FusedBatchNorm1d
    assert clone.num_batches_tracked.item() == 1
    train_and_eval(clone, native, (6, 5), device)


def test_deepcopy_shares_nothing(device: str) -> None:
    ours, _ = pair(5, device)
    clone = copy.deepcopy(ours)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    step(clone, normal((6, 5), device=device))
    assert clone.num_batches_tracked.item() == 1
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_resets_as_native(device: str) -> None:
    ours, native = pair(5, device)
    step(ours, normal((6, 5), device=device))
    ours.reset_running_stats()
    assert torch.equal(ours.running_mean, torch.zeros_like(ours.running_mean))
    assert torch.equal(ours.running_var, torch.ones_like(ours.running_var)) and ours.num_batches_tracked.item() == 0
    assert not torch.equal(ours.weight, torch.ones_like(ours.weight))
    ours.reset_parameters()
    native.reset_parameters()
    for key, value in native.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


# ---- lazy ----


@pytest.mark.parametrize("options", [v for k, v in OPTIONS.items()], ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lazy_module_becomes_the_real_one(device: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    if "bias" in options and not BIAS_OPTION:
        pytest.skip("the lazy modules of this torch have no option bias")
    ours = bn_ext.LazyFusedBatchNorm1d(device=device, dtype=torch.float64, **options)
    native = nn.LazyBatchNorm1d(device=device, dtype=torch.float64, **options)
    assert isinstance(ours, nn.modules.lazy.LazyModuleMixin) and isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert ours.has_uninitialized_params() == native.has_uninitialized_params()
    if ours.has_uninitialized_params():
        x = normal(shape, torch.float64, device)
        assert_same(step_lazy(ours, x), step_lazy(native, x))
        assert type(ours) is bn_ext.FusedBatchNorm1d and type(native) is nn.BatchNorm1d
        assert repr(ours) == "Fused" + repr(native)
        train_and_eval(ours, native, shape, device)


def step_lazy(module: nn.Module, x: torch.Tensor) -> Any:
    module(x)
    return step(module, x, torch.ones_like(x))


def test_lazy_state_dict_fills_the_lazy_module() -> None:
    trained = module_for(bn_ext.FusedBatchNorm1d, 5)
    lazy = bn_ext.LazyFusedBatchNorm1d()
    lazy.load_state_dict(trained.state_dict())
    assert not lazy.has_uninitialized_params()
    out = lazy.eval()(normal((6, 5)))
    assert type(lazy) is bn_ext.FusedBatchNorm1d
    assert torch.equal(out, trained.eval()(normal((6, 5))))
    empty = bn_ext.LazyFusedBatchNorm1d()
    assert sorted(empty.state_dict()) == sorted(nn.LazyBatchNorm1d().state_dict())


def test_lazy_refuses_wrong_rank_as_native() -> None:
    texts = []
    for cls in (bn_ext.LazyFusedBatchNorm1d, nn.LazyBatchNorm1d):
        with pytest.raises(ValueError) as caught:
            cls()(torch.zeros(2, 4, 3, 3))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
