"""What symbolic tracing loses, what writes in between, what reads variables later."""

from __future__ import annotations

import contextlib
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Base, C, model


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
