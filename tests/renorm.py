"""What the tests of batch renormalisation share: its factors and the whole of it in float64, modules, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bn_ext
from reference import (
    moments,
)

OPS = torch.ops.bn_ext
C, EPS = 6, 1e-5
SHAPES = {"flat": (23, C), "pairs": (2, C), "planes": (5, C, 9), "long": (2, C, 700), "many": (700, C)}
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
Renorm = tuple[float, float, float, float]
PLAIN: Renorm = (3.0, 5.0, 0.0, 0.0)


def factors(x: Tensor, mean: Tensor, var: Tensor, renorm: Renorm = PLAIN, count: int = 0) -> tuple[Tensor, Tensor]:
    """r and d in float64, as the paper has them, with torchrl's warm-up where that is no more than 1."""
    max_r, max_d, steps, smooth = renorm
    _, high, low, of_batch = moments(x)
    std, running = (of_batch + EPS).sqrt(), (var.double() + EPS).sqrt()
    r = (std / running).clamp(1 / max_r, max_r)
    d = ((high - mean.double() + low) / running).clamp(-max_d, max_d)
    share = 1.0 if not steps else min(1.0, count / steps if smooth else float(count // steps))
    return 1 + (r - 1) * share, d * share


def norm_of(device: str = "cpu", **options: Any) -> bn_ext.FusedBatchRenorm1d:
    norm = bn_ext.FusedBatchRenorm1d(C, device=device, **{"warmup_steps": 0} | options)
    spread(norm)
    return norm


def spread(norm: nn.Module) -> None:
    """Statistics that leave some channels within the bounds of r and d and others on either side."""
    line = torch.linspace(-1, 1, C, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(1.25 + 0.5 * line)
        norm.bias.copy_(0.3 - line)
        norm.running_mean.copy_(4 * line)
        norm.running_var.copy_((4 * line).exp())


def step(call: Callable[..., Tensor], norm: nn.Module, x: Tensor, g: Tensor, **valid: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x, **valid)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), g)]


def buffers(norm: nn.Module) -> list[Tensor]:
    return [b.clone() for b in norm.buffers()]


def unmoved(norm: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))


class Composed(nn.Module):
    """The same in float64 by torch's operations, one batch after the other."""

    def __init__(self, norm: bn_ext.FusedBatchRenorm1d) -> None:
        super().__init__()
        self.renorm: Renorm = (norm.max_r, norm.max_d, norm.warmup_steps, float(norm.smooth))
        self.momentum, self.count = norm.momentum, int(norm.num_batches_tracked)
        self.weight, self.bias = (nn.Parameter(t.detach().double().clone()) for t in (norm.weight, norm.bias))
        self.mean, self.var = (t.double().clone() for t in (norm.running_mean, norm.running_var))

    def forward(self, input: Tensor) -> Tensor:
        x = input.double()
        dims = [0, *range(2, x.dim())]
        shape = (1, C, *(1,) * (x.dim() - 2))
        mean, var, n = x.mean(dims), x.var(dims, unbiased=False), x.numel() // C
        r, d = (t.reshape(shape) for t in factors(x.detach(), self.mean, self.var, self.renorm, self.count))
        y = (x - mean.reshape(shape)) / (var.reshape(shape) + EPS).sqrt() * r + d
        self.mean = self.mean + self.momentum * (mean.detach() - self.mean)
        self.var = self.var + self.momentum * (var.detach() * n / (n - 1) - self.var)
        self.count += 1
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)
