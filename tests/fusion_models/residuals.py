"""Residual blocks, and what else is added to a batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Base, linear_norm, model


@model(2)
class Torchvision(Base):
    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.fc1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.fc2(out)
        out = self.bn2(out)

        if self.down is not None:
            identity = self.down(x)

        out += identity
        out = self.relu(out)

        return out


@model(2)
class TorchvisionDown(Torchvision):
    def __init__(self) -> None:
        super().__init__()
        self.down = linear_norm()


class Opaque(nn.Module):
    """A module of the user's, which might do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@model(1)
class TorchvisionOpaque(Torchvision):
    def __init__(self) -> None:
        super().__init__()
        self.down = Opaque()


@model(2)
class Kuangliu(Base):
    """The shortcut in one expression, and added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = linear_norm()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.fc1(x)))
        out = self.bn2(self.fc2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return out


@model(1)
class ShortcutInside(Kuangliu):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.bn2(self.fc2(x)) + self.shortcut(x))


@model(1)
class EmptyShortcut(Kuangliu):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.fc2(x))
        out = out + self.shortcut(x)
        return torch.relu(out)


@model(1)
class ShortcutFirst(Kuangliu):
    def forward(self, x: Tensor) -> Tensor:
        return self.silu(self.shortcut(x) + self.bn2(self.fc2(x)))


@model(3)
class PlusItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn1(x)
        x = F.relu(self.bn2(x) + x)
        return torch.add(x, self.bn1(self.fc1(x))).relu_()


@model(2)
class Methods(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x).relu()
        return self.bn2(x).add_(x).relu_()


@model(1)
class TwoBranches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x) + self.bn2(x * 2))


@model(1)
class TwoBranchesInStatements(Base):
    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(self.fc1(x))
        b = self.bn2(self.fc2(x))
        return F.relu(a + b)


@model(1)
class Sums(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.silu(self.bn1(x) + x + y)


@model(0)
class OtherResiduals(Base):
    """What is added has another shape, another type, is a number, or the size of something."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x) + x.size(0))
        y = F.relu(self.bn2(y) + 1)
        row, low = x[:1], x.float()
        y = F.relu(self.bn1(y) + row)
        return F.relu(self.bn2(y) + low)


@model(0)
class WiderResidual(Base):
    """out += r keeps the type of out and refuses what is larger; here r has fewer rows, and another type."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        row = x[:1]
        out += row
        out = self.relu(out)
        half = out.float()
        out = self.bn2(out)
        out += half
        return self.relu(out)


@model(0)
class ThreeDimensions(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0).repeat(3, 1, 1)
        y = self.bn1(x.transpose(1, 2))
        return F.relu(y.transpose(1, 2) + x).mean(0)
