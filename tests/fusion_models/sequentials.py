"""Models made of Sequentials, and parents that take theirs to pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import C, built, linear_norm, model


@built("seq", 4)
def _() -> nn.Module:
    return nn.Sequential(
        nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(inplace=True), nn.BatchNorm1d(C), nn.LeakyReLU(0.3, inplace=True),
        nn.BatchNorm1d(C), nn.SiLU(), nn.BatchNorm1d(C), nn.GELU(),
    )  # fmt: skip


@built("seq_nested", 3)
def _() -> nn.Module:
    inner = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU())
    return nn.Sequential(inner, nn.Sequential(linear_norm(), nn.SiLU()), nn.Sequential(nn.BatchNorm1d(C), nn.GELU()))


@built("seq_across", 2)
def _() -> nn.Module:
    return nn.Sequential(linear_norm(), nn.ReLU(), nn.BatchNorm1d(C), nn.Sequential(nn.SiLU(), nn.Linear(C, C)))


@built("seq_ends_with_norm", 0)
def _() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C))


@built("seq_other_activations", 0)
def _() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(C), nn.Tanh(), nn.BatchNorm1d(C), nn.GELU("tanh"), nn.BatchNorm1d(C), nn.ReLU6(),
        nn.BatchNorm1d(C), nn.Dropout(0.0), nn.ReLU(), nn.BatchNorm1d(C), nn.PReLU(),
    )  # fmt: skip


@built("seq_shared", 2)
def _() -> nn.Module:
    norm, relu = nn.BatchNorm1d(C), nn.ReLU()
    return nn.Sequential(norm, relu, nn.Linear(C, C), norm, relu, norm)


@built("seq_dropout", 1)
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Dropout(0.5), nn.Linear(C, C))


@built("seq_of_options", 3)
def _() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(C, affine=False), nn.ReLU(), nn.BatchNorm1d(C, track_running_stats=False), nn.ReLU(),
        nn.BatchNorm1d(C, momentum=None, eps=0.1), nn.ReLU(),
    )  # fmt: skip


class NormAct(nn.Sequential):
    """A Sequential of the user's, as torchvision's Conv2dNormActivation is one."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(nn.Linear(C, C), nn.BatchNorm1d(C), act())
        self.out_channels = C


@built("seq_subclass", 2)
def _() -> nn.Module:
    return nn.Sequential(NormAct(), NormAct(nn.SiLU), NormAct(nn.Tanh))


class OwnForward(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for i, module in enumerate(self):
            input = module(input) + i
        return input


@built("seq_own_forward", 0)
def _() -> nn.Module:
    return OwnForward(nn.BatchNorm1d(C), nn.ReLU())


class Backwards(nn.Sequential):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return reversed(list(super().__iter__()))


@built("seq_own_order", 0)
def _() -> nn.Module:
    return Backwards(nn.ReLU(), nn.BatchNorm1d(C), nn.Linear(C, C))


@model(1)
class Sliced(nn.Module):
    """A parent that takes its Sequential to pieces: what a child computes may not depend on its neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq[:2](x) + self.seq[1](x).sigmoid() + self.seq[:3](x)


@model(0)
class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for layer in self.seq:
            x = layer(x)
            taps.append(x)
        return torch.stack(taps).sum(0) + nn.Sequential(*list(self.seq.children())[:2])(x)


@model(2)
class Recombined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(linear_norm(), nn.ReLU()), NormAct()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = x + block(x)
        return x
