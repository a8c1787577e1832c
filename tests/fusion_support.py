"""What the tests of fused models share: a block, its fused form, and whether a call fuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bn_ext
from support import OpLog, normal

F64 = torch.float64
C = 4


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


def fused_calls(model: Callable[[Tensor], Tensor]) -> int:
    with OpLog() as log:
        model(normal((8, C), F64))
    return log.fused


def fuses(model: Callable[[Tensor], Tensor]) -> bool:
    return fused_calls(model) > 0
