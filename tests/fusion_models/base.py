"""Where the models are entered, and what most of them are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import nn

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
