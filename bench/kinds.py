"""Time padded and virtual batches against what there is without them: bench_batchnorm.py --kinds.

`lengths 50 %` and `lengths 90 %` are batches whose samples are so full on average. Contenders: `bn_ext`, with lengths;
`gathered`, nn.BatchNorm1d of the valid values, taken out and put back; `composed`, the formula by torch's operations;
`plain`, FusedBatchNorm1d of the whole padded tensor. `virtual 128`: `bn_ext`, one call; `loop nn` and `loop bn_ext`, a
loop over the pieces. `renorm`: `bn_ext`, FusedBatchRenorm1d past its warm-up; `composed`, torchrl's formula
by torch's operations; `plain`, FusedBatchNorm1d.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bn_ext
from environment import facts, set_memory
from fusion import records, shortened
from grid import Point
from report import busy
from timing import Plan, Step, race
from timing_cuda import cuda_clock

SIZE = 128  # of a virtual batch
PADDED = (Point((256, 128, 16)), Point((32, 64, 100)), Point((16, 512, 300)), Point((32, 256, 800)),
          Point((32, 256, 800), layout="nlc"), Point((32, 256, 800), "bfloat16"))  # fmt: skip
CUT = (Point((4096, 16)), Point((16384, 64)))
SMALL = (Point((128, 256)), Point((4096, 64)), Point((32, 256, 801)))
POINTS = (*PADDED, *CUT, *SMALL)
QUICK = (*PADDED[:2], *CUT, *SMALL[:2])
KINDS = {"lengths 50 %": PADDED, "lengths 90 %": PADDED, f"virtual {SIZE}": CUT, "renorm": SMALL}
MODES = ("forward_backward", "eval")
EPS = 1e-5

Call = Callable[[Tensor], Tensor]


def lengths_of(shape: tuple[int, ...], full: float, device: torch.device) -> Tensor:
    """Lengths from 2 * full - 1 to the whole, evenly spread."""
    n, _, length = shape
    spread = torch.linspace((2 * full - 1) * length, length, n, device=device).round().long().clamp(1, length)
    return spread[torch.randperm(n, device=device)]


def composed(norm: nn.BatchNorm1d, x: Tensor, counts: Tensor) -> Tensor:
    """The formula by torch's operations, in x's type; counts: booleans (N, 1, L)."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if norm.training:
        number = counts.sum()
        mean = torch.where(counts, x, zero).sum((0, 2), keepdim=True) / number
        centred = torch.where(counts, x - mean, zero)
        var = centred.square().sum((0, 2), keepdim=True) / number
        with torch.no_grad():
            norm.running_mean.lerp_(mean.flatten().to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((var.flatten() * number / (number - 1)).to(norm.running_var.dtype), norm.momentum)
            norm.num_batches_tracked.add_(1)
    else:
        mean, var = norm.running_mean[:, None], norm.running_var[:, None]
    scaled = (x - mean) * torch.rsqrt(var + EPS) * norm.weight[:, None] + norm.bias[:, None]
    return torch.where(counts, scaled.to(x.dtype), zero)


def renormalised(norm: nn.BatchNorm1d, x: Tensor, max_r: float = 3.0, max_d: float = 5.0) -> Tensor:
    """Batch renormalisation by torch's operations, as torchrl's module has it past the warm-up."""
    over, column = [d for d in range(x.dim()) if d != 1], (1, -1) + (1,) * (x.dim() - 2)
    mean, var = x.mean(over), x.var(over, unbiased=False)
    std, running_std = (var + EPS).sqrt(), (norm.running_var + EPS).sqrt()
    r = (std.detach() / running_std).clamp(1 / max_r, max_r)
    d = ((mean.detach() - norm.running_mean) / running_std).clamp(-max_d, max_d)
    number = x.numel() / x.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * number / (number - 1), norm.momentum)
        norm.num_batches_tracked.add_(1)
    hat = (x - mean.view(column)) / std.view(column) * r.view(column) + d.view(column)
    return hat * norm.weight.view(column) + norm.bias.view(column)


def gathered(norm: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    rows = norm(x.transpose(1, 2)[counts])
    n, c, length = x.shape
    return x.new_zeros((n, length, c)).index_put((counts,), rows).transpose(1, 2)


def calls(kind: str, point: Point, mode: str, device: torch.device) -> dict[str, tuple[Call, nn.Module]]:
    """Every contender's call, and the module that it goes by."""
    channels = point.shape[1]

    def made(kind_of: type[nn.Module], **options: Any) -> nn.Module:
        return kind_of(channels, device=device, **options).train(mode != "eval")

    found: dict[str, tuple[Call, nn.Module]] = {}
    if kind.startswith("virtual"):
        pieces = math.ceil(point.shape[0] / SIZE)
        one = made(bn_ext.FusedBatchNorm1d, virtual_batch_size=SIZE)
        found["bn_ext"] = one, one
        for name, of in (("loop nn", nn.BatchNorm1d), ("loop bn_ext", bn_ext.FusedBatchNorm1d)):
            norm = made(of)
            found[name] = lambda x, norm=norm: torch.cat([norm(piece) for piece in x.chunk(pieces)]), norm
        return found
    if kind == "renorm":
        renorm, formula, plain = (
            made(bn_ext.FusedBatchRenorm1d, warmup_steps=0), made(nn.BatchNorm1d, momentum=0.01),
            made(bn_ext.FusedBatchNorm1d),
        )  # fmt: skip
        found["bn_ext"] = renorm, renorm
        found["composed"] = (lambda x: renormalised(formula, x)), formula  # type: ignore[arg-type]
        found["plain"] = plain, plain
        return found
    lengths = lengths_of(point.shape, float(kind.split()[1]) / 100, device)
    counts = torch.arange(point.shape[2], device=device) < lengths[:, None]
    ours, plain = made(bn_ext.FusedBatchNorm1d), made(bn_ext.FusedBatchNorm1d)
    native, formula = made(nn.BatchNorm1d), made(nn.BatchNorm1d)
    found["bn_ext"] = (lambda x: ours(x, lengths=lengths)), ours
    found["gathered"] = (lambda x: gathered(native, x, counts)), native
    found["composed"] = (lambda x: composed(formula, x, counts.unsqueeze(1))), formula  # type: ignore[arg-type]
    found["plain"] = plain, plain
    return found


def steps(kind: str, point: Point, mode: str, device: torch.device) -> dict[str, Step]:
    """The contenders' steps; raises RuntimeError where their outputs differ beyond rounding."""
    x = point.randn(device)
    found: dict[str, Step] = {}
    right = None
    for name, (call, norm) in calls(kind, point, mode, device).items():
        output = call(x).detach()
        right = output if right is None else right
        bound = 1e-3 + 64 * torch.finfo(x.dtype).eps  # torch's own rounding of intermediate results
        if name != "plain" and float((output.float() - right.float()).abs().max()) > bound:
            raise RuntimeError(f"{point}, {kind}: {name} disagrees with bn_ext")
        grad = torch.randn_like(output)
        leaves = [x.detach().requires_grad_(mode != "eval"), *norm.parameters()]

        def step(call: Call = call, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> None:
            y = call(leaves[0])
            if mode != "eval":
                torch.autograd.grad(y, leaves, grad)

        found[name] = step
    return found


def run(args: argparse.Namespace, log: Console, out: Console, plan: Plan, seconds: float | None, cpu_clock: Any) -> int:
    """Measure and print every kind at its points, within `seconds` if given; write JSON lines where asked.

    Returns an exit status.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_memory(args.memory)
    torch.manual_seed(0)
    shared = facts(args.device, args.memory)
    todo = [
        (kind, point, mode)
        for kind, points in KINDS.items()
        for point in points
        for mode in args.modes
        if point in args.points and mode in MODES and (mode != "eval" or kind.startswith("lengths"))
    ]
    deadline = None if seconds is None else time.perf_counter() + seconds
    found: list[dict[str, Any]] = []
    status = 0
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(args.json.open("w", encoding="utf-8")) if args.json else None
        for number, (kind, point, mode) in enumerate(todo):
            clock = cuda_clock(args.device, 1) if args.device.type == "cuda" else cpu_clock
            started = time.perf_counter()
            try:
                with torch.no_grad() if mode == "eval" else contextlib.nullcontext():
                    ready = steps(kind, point, mode, args.device)
                    times = race(ready, clock, shortened(plan, deadline, len(todo) - number, started))
            except RuntimeError as error:
                status = 1
                log.print(f"error: {point}, {kind}, {mode}: {str(error).splitlines()[0]}", markup=False)
                continue
            found += records(shared, point, {"kind": kind, "mode": mode}, times, stream)
    out.print(table(found))
    if warning := busy(shared):
        out.print(warning, style="yellow")
    return status


def table(found: list[dict[str, Any]]) -> Table:
    """Medians of all contenders, and how many times faster `bn_ext` is than each."""
    made = Table(title="microseconds (median; bn_ext is so many times faster)", title_justify="left")
    for heading in ("shape, dtype", "kind", "mode", "bn_ext", "rivals"):
        made.add_column(heading, justify="right" if heading == "bn_ext" else "left", no_wrap=True)
    for (point, kind, mode), medians in medians_of(found).items():
        ours = medians.pop("bn_ext")
        rivals = ", ".join(f"{name} {taken:.0f} ({taken / ours:.2f}x)" for name, taken in medians.items())
        made.add_row(str(point), kind, mode.replace("_", " + "), f"{ours:.1f}", rivals)
    return made


# What a column of `compared` has: the first of these that was timed.
_COLUMNS = {
    "by nn.BatchNorm1d": ("gathered", "loop nn"),
    "composed": ("composed",),
    "FusedBatchNorm1d without": ("plain", "loop bn_ext"),
}
Compared = tuple[Point, list[str], list[float | None]]


def compared(found: Iterable[dict[str, Any]]) -> tuple[list[str], list[Compared]]:
    """A table's heading, and its lines: tensor, kind and mode, how many times longer than bn_ext the others take."""
    lines: list[Compared] = []
    for (point, kind, mode), medians in medians_of(found).items():
        timed = [next((medians[name] for name in names if name in medians), None) for names in _COLUMNS.values()]
        ratios = [None if taken is None else taken / medians["bn_ext"] for taken in timed]
        lines.append((point, [kind, mode.replace("_", " + ")], ratios))
    return ["input", "", "", *_COLUMNS], lines


def medians_of(found: Iterable[dict[str, Any]]) -> dict[tuple[Point, str, str], dict[str, float]]:
    """Microseconds of every contender, by the tensor, the kind and the mode."""
    rows: dict[tuple[Point, str, str], dict[str, float]] = {}
    for record in found:
        point = Point(tuple(record["shape"]), record["dtype"], record["layout"])
        rows.setdefault((point, record["kind"], record["mode"]), {})[record["contender"]] = record["median_us"]
    return rows
