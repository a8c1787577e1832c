"""What an outsider broke an earlier version with, and what he missed."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Base, C, built, linear_norm, model
from .residuals import Kuangliu, TorchvisionDown


@model(0)
class ReadsStatistics(Base):
    """The statistics, read through another name behind the call: by a layer, and by a condition."""

    def forward(self, x: Tensor) -> Tensor:
        rm, n = self.bn1.running_mean, self.bn2.num_batches_tracked
        out = self.bn1(self.fc1(x))
        g = self.fc2(rm)
        out = F.relu(out) + g
        h = self.bn2(out)
        if n:
            r = x
        else:
            r = None
        h = F.relu(h)
        return h if r is None else h + r


@model(0)
class PrivateProperty(Base):
    @property
    def __scale(self) -> float:
        return 1.0 + self.bn1.num_batches_tracked.item()

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(x)
        return self.__scale * F.relu(h)


@model(0)
class TableOfCalls(Base):
    """What is indexed is evaluated before the index."""

    def table(self) -> Tensor:
        self.steps = float(self.bn1.num_batches_tracked)
        return torch.ones(99, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(x)
        return self.table()[F.relu(h).long()] * self.steps * x


@model(0)
class AddedToLater(Base):
    def __init__(self) -> None:
        super().__init__()
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            h = self.bn1(x)
            y = F.relu(h)
        else:
            h = y = x
        h += 1
        return y


@model(0)
class SuperOfItsClass(Base):
    """Wrong, and wide-spread: it works as long as the class has no subclass."""

    def train(self, mode: bool = True) -> SuperOfItsClass:
        super(self.__class__, self).train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))


@model(0)
class CountsOnItsClass(Base):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).steps += 1
        return F.relu(self.bn1(x)) * (1 if "steps" in vars(CountsOnItsClass) else 2)


@model(0)
class AsksForSequentials(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x) * 2 if type(part) is nn.Sequential else part(x)
        return self.bn1(x)


@model(1)
class NamesItsClass(Base):
    """What a class says of itself it says of the class that stands for it."""

    def forward(self, x: Tensor) -> Tensor:
        of_class = f"{type(self).__name__} {self.__class__.__qualname__}"
        self.name = f"{of_class} {self._get_name()} {isinstance(self, NamesItsClass)}"
        return F.relu(self.bn1(x))


def fast_forward(self: Base, x: Tensor) -> Tensor:
    return F.relu(self.bn1(self.fc1(x)))


@model(1)
class AnotherName(Base):
    forward = fast_forward


@model(0)
class GivenOnTheInstance(Base):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.fast  # type: ignore[method-assign]

    def fast(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.fc1(x)))


@model(2)
class BasicConv(Base):
    """Norm and activation that may not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Optional[nn.Module] = nn.SiLU()  # noqa: UP045
        self.final = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.bn1 is not None:
            x = self.bn1(x)
        if self.relu is not None:
            x = self.relu(x)
        out = self.bn2(x)
        if self.final:
            out = self.act(out)
        return out


@model(0)
class BasicConvWithout(BasicConv):
    def __init__(self) -> None:
        super().__init__()
        self.final, self.relu = False, None  # type: ignore[assignment]


@model(2)
class Conditional(TorchvisionDown):
    """The shortcut in a conditional expression, options that are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace, self.slope = False, 0.3

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.fc1(x)), self.slope, inplace=self.inplace)
        out = self.bn2(self.fc2(out))
        res = x if self.down is None else self.down(x)
        return F.relu(out + res, inplace=self.inplace)


@model(2)
class Residuals(Base):
    """Branches that are Sequentials and end with a batch norm, as in many ResNets and in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(linear_norm(), nn.ReLU(), nn.Linear(C, C), nn.BatchNorm1d(C))
        self.shortcut = linear_norm()

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.body(x) + self.shortcut(x)) if x is None else self.relu(self.body(x) + x)


@model(2)
class SequentialThenActivation(Residuals):
    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        y = self.silu(y)
        return F.relu(self.shortcut(y))


@model(1)
class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__norm, self.__act = nn.BatchNorm1d(C), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.__act(self.__norm(x))


class Layers(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self[1](self[0](x)))


@built("module_list_with_a_forward", 0)
def _() -> nn.Module:
    return Layers([nn.Linear(C, C), nn.BatchNorm1d(C)])


@model(0)
class Unbound(Base):
    """A variable that has a value only where it is read: it must not be read before."""

    def forward(self, x: Tensor) -> Tensor:
        if self.down is not None:
            z = x * 2
        out = self.bn1(x)
        identity = x
        if self.down is not None:
            identity = self.down(z)
        out += identity
        return self.relu(out)


@model(2)
class InnerFunctions(TorchvisionDown):
    """Functions within the method, one of which has another self."""

    def forward(self, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            return F.relu(self.bn1(y) + self.down(y))

        def other(self: Any, y: Tensor) -> Tensor:
            return y + (1 if self.flag else 2)

        holder = type("Holder", (), {"flag": True})()
        return F.relu(self.bn2(block(x) + other(holder, x)))


@model(0)
class AnotherSelf(Kuangliu):
    def forward(self, x: Tensor) -> Tensor:
        bn, first = self.bn2, self
        self = self.shortcut
        y = bn(first.fc2(x))
        y += self(x)
        return F.relu(y) if first.down is not None else y.sigmoid()


@model(0)
class BoundByHandlers(TorchvisionDown):
    def forward(self, x: Tensor) -> Tensor:
        given = x
        try:
            raise ValueError
        except ValueError as given:  # type: ignore[assignment]  # noqa: F841
            pass
        out = self.bn1(self.fc1(x))
        identity = x
        if self.relu is None:
            identity = self.down(given)
        out += identity
        return self.relu(out)


@model(1)
class Branches(Base):
    """One activation behind the batch norms of two branches."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = self.bn1(self.fc1(x))
        else:
            y = self.bn2(self.fc1(x))
        y = self.relu(y)
        return self.fc2(y)


@model(3)
class SumsInALoop(TorchvisionDown):
    """A sum in place whose activation has another name, in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < 2:
            h = self.bn1(x)
            h += self.down(x)
            x = F.relu(h)
            i += 1
        out = self.bn2(x)
        out += x
        y = self.relu(out)
        return y


@model(2)
class Zipped(nn.Module):
    """The activations are a list's elements, too."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(3))
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.GELU()])

    def forward(self, x: Tensor) -> Tensor:
        for bn, act in zip(self.bns, self.acts, strict=True):
            x = act(bn(x))
        return x


@model(2)
class WritesItsInput(Base):
    """A branch whose first layer writes into what it is given, which is then added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(C, C), nn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        y = self.relu(self.body(x) + x)
        return F.gelu(self.bn1(y))


@model(1)
class Aliases(TorchvisionDown):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.fc1(x))
        given = x
        identity = self.down(given)
        out += identity
        return self.relu(out)
