"""Time batch norm with what follows it, in one pass and in several: bench_batchnorm.py --fusion.

Rows are relu(bn(x)) and relu(bn(x) + r). Contenders: `fused`, BatchNormAct1d; `separate`, a plain FusedBatchNorm1d and
torch's operations behind it; `nn`, nn.BatchNorm1d and these; `compile`, torch.compile of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bn_ext
from contenders import compiled, forget_compiled
from environment import facts, set_memory
from grid import Point
from report import busy
from timing import Plan, Step, Times, race
from timing_cuda import cuda_clock

POINTS = (
    Point((32, 64)),
    Point((128, 256)),
    Point((1024, 1024)),
    Point((65536, 256)),
    Point((64, 128, 1024)),
    Point((64, 128, 1024), layout="nlc"),
    Point((1024, 1024), "bfloat16"),
    Point((64, 128, 1024), "bfloat16"),
)
QUICK = tuple(point for point in POINTS if point.dtype == "float32" and point.layout == "contiguous")
# The least rounds that a median can be taken of, where the time is over.
LATE_ROUNDS = 3
CONTENDERS = ("fused", "separate", "nn", "compile")
CHAINS = ("bn+relu", "bn+add+relu")


class Follow(nn.Module):
    """relu(norm(x)) or relu(norm(x) + r), by torch's own operations behind the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, r: Tensor | None) -> Tensor:
        y = self.norm(x)
        return torch.relu(y if r is None else y + r)


def make(contender: str, point: Point, device: torch.device) -> nn.Module:
    """The contender's module, called with x and r or None."""
    options: dict[str, Any] = {"device": device, "dtype": torch.float64 if point.dtype == "float64" else torch.float32}
    if contender == "fused":
        return bn_ext.BatchNormAct1d(point.shape[1], "relu", **options)
    kind = bn_ext.FusedBatchNorm1d if contender == "separate" else nn.BatchNorm1d
    return Follow(kind(point.shape[1], **options))


def make_step(
    call: Callable[..., Tensor], leaves: list[Tensor], r: Tensor | None, grad: Tensor | None, mode: str
) -> Step:
    """A step of one call, with its backward where there is a gradient; of mode backward, that alone."""
    if mode == "backward":
        output = call(leaves[0], r)

        def backward() -> None:
            torch.autograd.grad(output, leaves, grad, retain_graph=True)

        return backward

    def step() -> None:
        y = call(leaves[0], r)
        if grad is not None:
            y.backward(grad)
            for leaf in leaves:
                leaf.grad = None

    return step


def steps(point: Point, chain: str, mode: str, device: torch.device, contenders: list[str]) -> dict[str, Step]:
    """The contenders' steps at a point; raises RuntimeError where their outputs differ beyond rounding."""
    x, r = point.randn(device), point.randn(device) if chain == "bn+add+relu" else None
    with_backward = mode in ("backward", "forward_backward")
    forget_compiled()
    if with_backward:
        x.requires_grad_()
        r = None if r is None else r.requires_grad_()
    found: dict[str, Step] = {}
    right = None
    for name in contenders:
        module = make(name, point, device).train(mode != "eval")
        with torch.no_grad():
            output = module(x, r)
        right = output if right is None else right
        # Native's own error is what the bound is for, as in contenders.py.
        if float((output.float() - right.float()).abs().max()) > 1e-3 + 4 * torch.finfo(x.dtype).eps * 8:
            raise RuntimeError(f"{point}, {chain}: {name} disagrees with {contenders[0]}")
        call: Callable[..., Tensor] = module
        if name == "compile":
            call = compiled(module)
        grad = torch.randn_like(output) if with_backward else None
        leaves = [x, *([] if r is None else [r]), *module.parameters()]
        found[name] = make_step(call, leaves, r, grad, mode)
    return found


def run(args: argparse.Namespace, log: Console, out: Console, plan: Plan, seconds: float | None, cpu_clock: Any) -> int:
    """Measure and print every point, chain and mode, within `seconds` if given; write JSON lines where asked.

    Returns an exit status.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_memory(args.memory)
    contenders = [name for name in CONTENDERS if name != "compile" or not (args.quick or args.no_rivals)]
    shared = facts(args.device, args.memory)
    total = len(args.points) * len(CHAINS) * len(args.modes)
    deadline = None if seconds is None else time.perf_counter() + seconds
    found: list[dict[str, Any]] = []
    status = 0
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(args.json.open("w", encoding="utf-8")) if args.json else None
        for number, (point, chain, mode) in enumerate(
            (p, c, m) for p in args.points for c in CHAINS for m in args.modes
        ):
            clock = cuda_clock(args.device, 1) if args.device.type == "cuda" else cpu_clock
            started = time.perf_counter()
            try:
                with torch.no_grad() if mode == "eval" else contextlib.nullcontext():
                    ready = steps(point, chain, mode, args.device, contenders)
                    times = race(ready, clock, shortened(plan, deadline, total - number, started))
            except RuntimeError as error:
                status = 1
                log.print(f"error: {point}, {chain}, {mode}: {str(error).splitlines()[0]}", markup=False)
                continue
            found += records(shared, point, {"chain": chain, "mode": mode}, times, stream)
    for mode in args.modes:
        out.print(table([record for record in found if record["mode"] == mode], mode, contenders))
    if warning := busy(shared):
        out.print(warning, style="yellow")
    return status


def records(
    shared: dict[str, Any], point: Point, what: dict[str, str], times: dict[str, Times], stream: IO[str] | None
) -> list[dict[str, Any]]:
    """The lines of a result file for one race, `what` it was at `point`; they go to stream too."""
    place = {"shape": list(point.shape), "dtype": point.dtype, "layout": point.layout, **what}
    found = []
    for name, taken in times.items():
        record = {**shared, **place, "contender": name, "median_us": taken.median * 1e6}
        record |= {"p20_us": taken.p20 * 1e6, "p80_us": taken.p80 * 1e6, "rounds": taken.rounds}
        found.append(record)
        if stream:
            stream.write(json.dumps(record) + "\n")
    return found


def shortened(plan: Plan, deadline: float | None, left: int, started: float) -> Plan:
    """The plan of a measurement that was set up from `started` on, so that this and those `left` end in time."""
    if deadline is None:
        return plan
    now = time.perf_counter()
    budget = min(plan.budget, (deadline - started) / left - (now - started))
    return replace(plan, budget=max(0.0, budget), min_rounds=plan.min_rounds if budget > 0 else LATE_ROUNDS)


def table(found: list[dict[str, Any]], mode: str, contenders: list[str]) -> Table:
    """One mode: medians of all contenders, and how many times faster `fused` is than each."""
    made = Table(title=f"{mode.replace('_', ' + ')}, microseconds (median; times faster than it)", title_justify="left")
    for heading in ("shape, dtype", "what", *contenders):
        made.add_column(heading, justify="left" if heading in ("shape, dtype", "what") else "right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for record in found:
        point = Point(tuple(record["shape"]), record["dtype"], record["layout"])
        rows.setdefault((str(point), record["chain"]), {})[record["contender"]] = record["median_us"]
    for (label, chain), medians in rows.items():
        cells = [f"{medians['fused']:.1f}"]
        cells += [f"{medians[name]:.1f} ({medians[name] / medians['fused']:.2f}x)" for name in contenders[1:]]
        made.add_row(label, chain, *cells)
    return made
