"""What the tests of freeze and unfreeze share: kinds of batch norms, a network, and what it is to be frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from support import module_for

FUSED, NATIVE = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d
Norm = nn.modules.batchnorm._BatchNorm


class Mine(nn.BatchNorm1d):
    """A subclass of somebody's."""


class MineFused(bn_ext.FusedBatchNorm1d):
    """The same of ours."""


KINDS: dict[type[Norm], tuple[int, ...]] = {  # and the shape of an input
    FUSED: (8, 5), MineFused: (8, 5), bn_ext.FusedBatchRenorm1d: (8, 5), NATIVE: (8, 5), Mine: (8, 5),
    nn.SyncBatchNorm: (8, 5),
    nn.BatchNorm2d: (4, 5, 3, 2), nn.BatchNorm3d: (4, 5, 3, 2, 2),
}  # fmt: skip
LAZY: dict[type[Norm], tuple[int, ...]] = {
    bn_ext.LazyFusedBatchNorm1d: (8, 5), nn.LazyBatchNorm1d: (8, 5), nn.LazyBatchNorm2d: (4, 5, 3, 2),
    nn.LazyBatchNorm3d: (4, 5, 3, 2, 2),
}  # fmt: skip
any_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
any_lazy = pytest.mark.parametrize("kind", LAZY, ids=lambda kind: kind.__name__)
ours_and_native = pytest.mark.parametrize("kind", [FUSED, NATIVE], ids=["ours", "native"])


def network(kind: type[nn.BatchNorm1d], device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(module_for(kind, 5), nn.Dropout(0.0))
    return nn.Sequential(nn.Linear(6, 5), module_for(kind, 5), nn.ReLU(), inner).to(device)


def norms_of(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm | bn_ext.FusedBatchRenorm1d)]


def is_frozen(model: nn.Module) -> bool:
    """Whether every batch norm of model stays in evaluation through train(), which returns it, and says so."""
    norms = norms_of(model)
    kept = all(norm.train() is norm and not norm.training and "frozen=True" in repr(norm) for norm in norms)
    model.train()
    return bool(norms) and kept and not any(norm.training for norm in norms)


def is_unfrozen(model: nn.Module) -> bool:
    norms = norms_of(model)
    return bool(norms) and all(norm.train().training and "frozen" not in repr(norm) for norm in norms)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of model that was never frozen computes in evaluation."""
    return bn_ext.unfreeze(copy.deepcopy(model)).eval()(x)
