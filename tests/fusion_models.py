"""Models as people write them, for tests that compare native, converted and fused ones.

Each forward is a way of writing batch norm and what follows it; `fused` counts the passes that one call of the fused
model computes by the fused operator, 0 where nothing may fuse. Inputs are (N, C) for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional

C = 4
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {}


def model(fused: int, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a class, made with options, whose fused form computes `fused` passes a call."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        MODELS["_".join((cls.__name__, *map(str, options.values())))] = (lambda: cls(**options), fused)
        return cls

    return enter


def built(name: str, fused: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Enter a function that builds a model."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        MODELS[name] = (make, fused)
        return make

    return enter


def linear_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))


class Base(nn.Module):
    """What the forwards below are written with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, C), nn.Linear(C, C)
        self.bn1, self.bn2 = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
        self.relu, self.silu, self.gelu = nn.ReLU(inplace=True), nn.SiLU(), nn.GELU()
        self.leaky = nn.LeakyReLU(0.2)
        self.down: Optional[nn.Module] = None  # noqa: UP045 (TorchScript's words)


# ---- Sequentials ----


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


# ---- residual blocks ----


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


# ---- ways of writing the activation ----


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


# ---- what symbolic tracing loses ----


@model(1)
class FrozenBackbone(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.relu(self.bn1(self.fc1(x)))
        return self.bn2(self.fc2(x))


@model(0)
class NormInContext(Base):
    """The norm within a context, the activation behind it: they have another mode of gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn1(self.fc1(x))
        y = self.relu(y)
        with torch.autocast("cpu", enabled=False):
            z = self.bn2(y)
        return F.relu(z)


@model(2)
class Optional_(Base):
    """if r is None: r = x."""

    def block(self, x: Tensor, r: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        if r is None:
            r = x
        return F.relu(self.bn1(self.fc1(x)) + r)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x), x)


@model(1)
class Masked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mask: Optional[Tensor] = None  # noqa: UP045

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)
        if self.mask is not None:
            y = y * self.mask
        y = F.relu(y)
        return F.relu(self.bn2(y))


@model(1)
class Tuples(Base):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, (tuple, list)):
            x = x[0]
        pair = (self.relu(self.bn1(x)), x)
        return pair[0] * 2


@model(1)
class GradMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        return y * 2 if torch.is_grad_enabled() else y


@model(1)
class ChildsTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        return y * 2 if self.bn1.training else y


@model(1)
class StochasticDepth(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() < 0.5:
            return self.fc2(x)
        return self.relu(self.bn1(x)) + x


@model(1)
class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x + torch.rand_like(x)))
        return F.dropout(y, 0.3, self.training)


@model(2)
class SideEffects(Base):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.hist = 0, []  # type: ignore[var-annotated]
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = self.relu(self.bn1(self.fc1(x)))
        self.hist.append(float(x.detach().sum()))
        self.total += x.detach().sum()
        return self.silu(self.bn2(x)) * self.steps


@model(1)
class Toggle(Base):
    def __init__(self) -> None:
        super().__init__()
        self.use = False

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(x)) if not self.use else torch.sigmoid(self.bn1(x))


@model(0)
class WrittenBetween(Base):
    """The base of the norm's input is written before the residual is added. Without autograd: it needs the input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            base = self.fc1(x)
            y = self.bn1(base[:, :])
            base.mul_(2)
            y += base
            y = self.relu(y)
        return y * x


@model(0)
class WrittenByAChild(Base):
    """As before, by a module: self.relu writes h in place, and h is what bn1 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.fc1(x)
            alias = h
            y = self.bn1(alias)
            r = self.down(h)
            y += r
            y = self.relu(y)
        return y * x


@model(0)
class WrittenThroughAView(WrittenByAChild):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            base = self.fc1(x)
            view = base.view(-1, C)
            y = self.bn1(view)
            r = self.down(base)
            y += r
            y = self.relu(y)
        return y * x


@model(0)
class WrittenByAChildOnItsOwn(WrittenByAChild):
    """The shortcut writes into its own input, which is no business of the batch norm's; but who can tell."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            g = self.fc2(x)
            y = self.bn1(self.fc1(x))
            r = self.down(g)
            y += g
            y = self.relu(y)
        return y * r * x


@model(1)
class ResidualWrittenLater(WrittenByAChild):
    """The residual is written behind the addition: that is where the batch norm is computed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            r = self.fc2(x)
            y = self.bn1(self.fc1(x))
            y = y + r
            r.zero_()
            y = torch.sigmoid(y)
        return y * r + x


@model(1)
class ResidualWrittenBeforeBackward(Base):
    """SiLU's derivative needs the sum, which torch keeps; who kept the residual would find it changed."""

    def forward(self, x: Tensor) -> Tensor:
        r = x * 2
        y = self.silu(self.bn1(self.fc1(x)) + r)
        with torch.no_grad():
            r.mul_(3)
        return y


@model(1)
class SharedBetween(Base):
    """The norm itself is called while its first call would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Linear(C, C), self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.fc1(x))
        identity = self.down(x)
        out += identity
        out = self.relu(out)
        return self.relu(self.bn2(out))


@model(0)
class ReadTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)
        z = self.bn2(x)
        return F.relu(y) + y + F.relu(z) * (z if self.training else 1)


@model(0)
class ReadLater(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)
        out = F.relu(y)
        for _ in range(2):
            out = out + y
            y = self.bn2(out)
        return out + y


@model(0)
class SeenByOthers(Base):
    """A function within sees the variable; so does who asks for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)

        def read() -> Tensor:
            return y * 2

        y = self.relu(y)
        z = self.bn2(read())
        names = sorted(k for k in locals() if k in ("y", "z"))
        z = self.relu(z)
        return z * len(names)


@model(0)
class InALoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(3):
            h = F.relu(y + 1)
            y = self.bn1(h)
            if y.shape[0] > 3:
                continue
            y = self.relu(y)
        return y


@model(0)
class Excepted(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.bn1(x)
            y = y.relu_if_it_could()  # type: ignore[operator]
        except AttributeError:
            y = y * 2
        return y


@model(0)
class Properties(Base):
    """Reading the activation does something; before the norm in one expression, behind it in two statements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    @property
    def activation(self) -> nn.Module:
        self.seen.append(int(self.bn1.num_batches_tracked) + int(self.bn2.num_batches_tracked))
        return self.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(x))
        y = self.bn2(x)
        y = self.activation(y)
        return y


@model(0)
class OwnGetattr(Base):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "relu":
            self.__dict__.setdefault("reads", []).append(int(self._modules["bn1"].num_batches_tracked))
        return found

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)
        y = self.relu(y)
        return y


@model(0)
class Decorated(Base):
    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) * x


@model(0)
class Lambda(Base):
    def __init__(self) -> None:
        super().__init__()
        self.block = lambda x: F.relu(self.bn1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) if x is None else self.fc2(F.relu(x) + self.bn2(self.fc1(x)).sigmoid())


@model(0)
class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.utils.checkpoint.checkpoint(self.bn1, x, use_reentrant=False))


@model(1)
class CheckpointedBlock(Base):
    def block(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@model(1)
class Arguments(Base):
    """A method with every kind of argument, defaults, annotations and a docstring."""

    def block(self, x: Tensor, /, r: Tensor, *more: Tensor, scale: float = 2.0, **options: Any) -> Tensor:
        """Say what it does."""
        y: Tensor = self.relu(self.bn1(x) + r)
        for other in more:
            y = y + other
        return y * scale * options.get("factor", 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x, x, x, factor=3)


@model(1)
class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc1(x.float().bfloat16()) if x.dtype is torch.int else x
            y = self.relu(self.bn1(y))
        return self.fc2(y)


@model(2)
class Walrus(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(y := self.fc1(x))) + y
        return F.silu(self.bn2(out)) if (z := out.shape[0]) > 0 else out * z


@model(0)
class Suppressed(Base):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError):
            y = self.bn1(x)
            y = self.fc1(y)
        return y


@model(1)
class Deleted(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x)
        z = self.relu(y)
        y = x
        w = self.bn2(z)
        del w
        return z + y


# ---- what an outsider broke an earlier version with, and what he missed ----


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
