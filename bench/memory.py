"""Measure the memory of a training step: most bytes of tensors at once, with native, converted and fused batch norms.

Beside these, fused ones in checkpoints, one for each block of the network, and with what backward needs offloaded by
save_on_cpu. On a processor that changes nothing: all of it is there already.

    python bench/memory.py
    python bench/memory.py --json bench/results/memory.jsonl
    python bench/memory.py --device cuda

Bytes are the allocator's, beyond those of parameters, optimizer and batch. `after forward` are those that are held for
backward (and the loss). Counts, not times: the same on every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from scripting import end, needed

with needed():
    import torch
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn
    from torch.autograd.graph import save_on_cpu
    from torch.profiler import ProfilerActivity, profile, record_function
    from torch.utils.checkpoint import checkpoint

    import bn_ext
    from environment import facts
    from networks import Residual, mlp, resnet1d

# Title, how to make the network, shape of a batch.
NETWORKS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("README's network", lambda: mlp(784, 10), (8192, 784)),
    ("10-layer ResNet, ReLU", lambda: resnet1d(16, 10), (32, 16, 1024)),
    ("10-layer ResNet, SiLU", lambda: resnet1d(16, 10, activation=nn.SiLU), (32, 16, 1024)),
)


class Checkpointed(nn.Module):
    """A network in checkpoints: a layer and what follows it up to the next, or a residual block."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for layer in network.children():
            if not self.blocks or isinstance(layer, (nn.Linear, nn.Conv1d, Residual, nn.AdaptiveAvgPool1d)):
                self.blocks.append(nn.Sequential())
            self.blocks[-1].append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=bn_ext.keep_statistics)
        return x


class Offloaded(nn.Module):
    """A network whose backward finds what it needs in the memory of the processor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.network(x)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn": lambda model: model,
    "convert": bn_ext.convert,
    "convert(fuse=True)": lambda model: bn_ext.convert(model, fuse=True),
    "checkpointed": lambda model: bn_ext.convert(Checkpointed(model), fuse=True),
    "offloaded": lambda model: Offloaded(bn_ext.convert(model, fuse=True)),
}

MARK = "the forward ends here"


@dataclass
class Memory:
    """Bytes beyond those before the step."""

    after_forward: int
    peak: int


def measure_cuda(forward: Callable[[], Tensor], rest: Callable[[Tensor], None]) -> Memory:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = forward()
    after_forward = torch.cuda.memory_allocated()
    rest(loss)
    return Memory(after_forward - before, torch.cuda.max_memory_allocated() - before)


def measure_cpu(forward: Callable[[], Tensor], rest: Callable[[Tensor], None]) -> Memory:
    """The profiler tells each allocation of tensors' memory, and each release of one that it saw allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loss = forward()
        with record_function(MARK):
            pass
        rest(loss)
    assert prof.profiler is not None
    held = peak = after_forward = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == MARK:
            after_forward = held
    return Memory(after_forward, peak)


def measure(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Memory:
    """A training step of a network that has made one already: its optimizer has its buffers."""
    model = model.to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(shape, device=device)
    y = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def forward() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def rest(loss: Tensor) -> None:
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    rest(forward())
    return (measure_cuda if device.type == "cuda" else measure_cpu)(forward, rest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the memory of a training step.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each network and kind")
    args = parser.parse_args(argv)
    shared = facts(args.device, "default")
    table = Table(title="memory of a training step, MB (of nn's)", title_justify="left")
    for heading in ("network", "input", "batch norms", "after forward", "peak"):
        table.add_column(heading, justify="left" if heading in ("network", "input", "batch norms") else "right")
    lines: list[str] = []
    for title, make, shape in NETWORKS:
        torch.manual_seed(0)
        native = make()
        base: Memory | None = None
        for kind, change in KINDS.items():
            memory = measure(change(copy.deepcopy(native)), shape, args.device)
            base = base or memory
            record = {**shared, "network": title, "shape": shape, "kind": kind, **asdict(memory)}
            lines.append(json.dumps(record) + "\n")
            cells = [
                f"{of / 1e6:.1f} ({of / right:.2f})"
                for of, right in ((memory.after_forward, base.after_forward), (memory.peak, base.peak))
            ]
            table.add_row(title, str(shape), kind, *cells)
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120).print(table)
    if args.json:
        args.json.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    end(main)
