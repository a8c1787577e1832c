"""Ways of writing the activation, and of reaching the batch norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional

from .base import Base, C, model


@model(8)
class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](x))
        x = torch.relu(self.norms[1](x))
        x = self.norms[2](x).relu()
        x = F.leaky_relu(self.norms[3](x), 0.2, inplace=True)
        x = F.gelu(self.norms[4](x) + x)
        x = functional.silu(self.norms[5](x), inplace=True)
        x = torch.nn.functional.leaky_relu(self.norms[6](x), negative_slope=0.5)
        return F.gelu(self.norms[7](x), approximate="none")


@model(0)
class OtherFunctions(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(x), approximate="tanh")
        x = torch.tanh(self.bn2(x))
        x = F.relu6(self.bn1(x))
        x = F.leaky_relu(self.bn2(x), -0.2)
        x = F.dropout(self.bn1(x), 0.5, self.training)
        return F.softmax(self.bn2(x), -1)


@model(1)
class InStatements(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.fc1(x))
        y = self.gelu(h)
        return self.fc2(y)


@model(2)
class Annotated(Base):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.bn1(self.fc1(x))
        r: Tensor = x
        h: Tensor = h + r  # type: ignore[no-redef]
        y: Tensor = self.leaky(h)
        z: Tensor = self.bn2(y)
        z = self.gelu(z)
        return z


def marked(function: Any) -> Any:
    """A decorator that gives the function back."""
    function.mark = True
    return function


@model(1)
class Marked(Base):
    @marked
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(x))


@model(1)
class NestedCalls(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.fc1(x))
        return self.fc2(self.leaky(h))


@model(2)
class Conformer(nn.Module):
    """The convolution module of a conformer: norm, then SiLU, in statements and in one expression."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Conv1d(1, 2 * C, 1)
        self.depthwise = nn.Conv1d(C, C, 3, padding=1, groups=C)
        self.batch_norm, self.norm2 = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
        self.activation = nn.SiLU()
        self.out = nn.Conv1d(C, 1, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states.unsqueeze(1)
        hidden_states = F.glu(self.pointwise(hidden_states), dim=1)
        hidden_states = self.depthwise(hidden_states)
        hidden_states = self.batch_norm(hidden_states)
        hidden_states = self.activation(hidden_states)
        hidden_states = self.activation(self.norm2(hidden_states))
        return self.out(hidden_states).squeeze(1)


class Swish(nn.SiLU):
    """A subclass of an activation may do something else."""

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.sigmoid(1.5 * input)


@model(0)
class Subclassed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.act(self.fc1(x))))


@model(4)
class PointNet(nn.Module):
    """Lists of layers, and a loop over them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            bn = self.bns[i]
            x = F.relu(bn(conv(x)))
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = conv(x)
            x = bn(x)
            x = F.relu(x)
        return x


@model(1)
class Mixed(nn.Module):
    """A loop over layers of which only some are batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(C, C), nn.BatchNorm1d(C), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return x


@model(2)
class LayersInALoop(nn.Module):
    """for layer in self.layers: x = layer(x), and a loop with more in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(inplace=True), nn.BatchNorm1d(C), nn.Tanh(), nn.BatchNorm1d(C)]
        )
        self.others = nn.ModuleList([nn.BatchNorm1d(C), nn.ReLU()])
        self.tail = nn.ModuleList([nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), nn.GELU(), nn.BatchNorm1d(C)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = x * 2
        for layer in self.others:
            y = x
            x = layer(y)
        for layer in self.tail:
            x = layer(x)
        return x


class Loud(nn.ModuleList):
    """A list whose iteration does something."""

    def __iter__(self) -> Any:
        for module in super().__iter__():
            self.seen = getattr(self, "seen", 0) + int(self[0].num_batches_tracked)
            yield module


@model(0)
class LoudLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Loud([nn.BatchNorm1d(C), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@model(2)
class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(2):
            setattr(self, f"bn{i}", nn.BatchNorm1d(C))
        self.named = nn.ModuleDict({"act": nn.GELU(), "fc": nn.Linear(C, C)})

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.named["act"](getattr(self, f"bn{i}")(x))
        return x


@model(2)
class Comprehension(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.relu(bn(x)) for bn in self.bns]).sum(0)


@model(2)
class OtherMethods(Base):
    """A forward in several methods, as timm writes them."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.__stem(x)

    def __stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return F.gelu(self.bn2(x))


@model(1)
class Super(OtherMethods):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(super(OtherMethods, self).extra_repr())

    def forward_features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.fc1(x)))


@model(1)
class CallsNormElsewhere(Base):
    """A method that calls the norm alone: it computes batch norm, whatever forward makes of it."""

    def embed(self, x: Tensor) -> Tensor:
        return self.bn1(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x)) + self.embed(x)
