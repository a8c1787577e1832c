"""Measure what deciding at every call costs: a batch norm and a ReLU on a small tensor, paired, apart, and native.

    python bench/pairing.py [--json FILE]

"deciding" is all that a pair adds to the call of one batch norm: whether both are what they were, whether somebody
listens, what the activation is. The rest are whole calls in evaluation, without autograd.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from scripting import end, needed

with needed():
    import torch
    import torch.nn.functional as F
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn

    import bn_ext
    from bn_ext.dispatch import choose
    from bn_ext.fusion import pairing
    from environment import facts

SHAPE, CALLS, ROUNDS = (32, 64), 2000, 60


class Written(nn.Module):
    """relu(norm(x)), as a forward written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(SHAPE[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


def contenders(x: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    def sequential() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(SHAPE[1]), nn.ReLU()).eval()

    paired, apart = bn_ext.convert(sequential(), fuse=True), bn_ext.convert(sequential())
    container, native = bn_ext.BatchNormAct1d(SHAPE[1]).eval(), sequential()
    written, by_hand = bn_ext.convert(Written().eval(), fuse=True), Written().eval()
    norm, act = paired[0], paired[1]
    is_norm, undisturbed, activation_of = pairing.is_norm, pairing.undisturbed, pairing.activation_of
    return {
        "choose": lambda: choose(x),
        "choose and decide": lambda: is_norm(norm) and undisturbed(x) and activation_of(act),
        "nothing": lambda: None,
        "Sequential: paired": lambda: paired(x),
        "Sequential: FusedBatchNorm1d, apart": lambda: apart(x),
        "Sequential: nn.BatchNorm1d": lambda: native(x),
        "forward by hand: paired": lambda: written(x),
        "forward by hand: nn.BatchNorm1d": lambda: by_hand(x),
        "BatchNormAct1d": lambda: container(x),
    }


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median microseconds of a call of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: median(times) for name, times in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what pairing at every call costs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(contenders(torch.randn(SHAPE)))
    found["deciding"] = found.pop("choose and decide") - found.pop("choose")
    del found["nothing"]
    table = Table(title=f"{SHAPE}, evaluation, one thread: microseconds a call (median)", title_justify="left")
    table.add_column("what")
    table.add_column("us", justify="right")
    for name, time_us in found.items():
        table.add_row(name, f"{time_us:.2f}")
    Console().print(table)
    if args.json:
        shared = facts(torch.device("cpu"))
        lines = [
            json.dumps({**shared, "what": name, "shape": list(SHAPE), "median_us": us}) for name, us in found.items()
        ]
        args.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    end(main)
