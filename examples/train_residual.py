"""Train a residual network with nn.BatchNorm1d, converted by bn_ext.convert(model, fuse=True), and by torch.compile.

    python examples/train_residual.py
    python examples/train_residual.py --data fashion-mnist --no-compile

The three start from the same weights and take the same batches. Exit status 1 says that the fused network and the
native one did not agree.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn

import bn_ext
import data
from train_mlp import DEFAULTS, MOMENTUM, Outcome, Run

WIDTH, BLOCKS = 256, 3


class Block(nn.Module):
    """x + two linear layers, each with a batch norm; relu after the first and after the sum. (N, WIDTH) in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.bn1 = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.linear2, self.bn2 = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.linear1(x)))
        y = self.bn2(self.linear2(y))
        y += x
        return self.relu(y)


def build_network(features: int, classes: int) -> nn.Sequential:
    """Input (N, features), output (N, classes)."""
    head = (nn.Linear(features, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    return nn.Sequential(*head, *(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, classes))


def build_runs(dataset: data.Dataset, seed: int, lr: float, compiled: bool) -> dict[str, Run]:
    """The same network as it is, fused and, where asked, compiled by torch."""
    torch.manual_seed(seed)
    native = build_network(dataset.features, dataset.classes)
    models: dict[str, nn.Module] = {
        "nn": native,
        "fused": bn_ext.convert(copy.deepcopy(native), fuse=True),
    }
    if compiled:
        models["compile"] = torch.compile(copy.deepcopy(native))
    return {name: Run(m, torch.optim.SGD(m.parameters(), lr=lr, momentum=MOMENTUM)) for name, m in models.items()}


def train(dataset: data.Dataset, runs: dict[str, Run], epochs: int, batch_size: int, seed: int) -> Outcome:
    """Train all runs side by side; raises ValueError when no full batch fits."""
    steps = len(dataset.train_x) // batch_size
    if steps == 0 or batch_size < 2:
        raise ValueError(f"the batch size must lie between 2 and {len(dataset.train_x)}, not {batch_size}")
    outcome = Outcome(dataset, runs)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(dataset.train_x), generator=shuffle)[: steps * batch_size]
        for index in order.split(batch_size):
            x, y = dataset.train_x[index], dataset.train_y[index]
            logits = {name: run.step(x, y) for name, run in runs.items()}
            outcome.first_logit_size = outcome.first_logit_size or float(logits["nn"].abs().max())
            outcome.logit_gap.append(float((logits["nn"] - logits["fused"]).abs().max()))
        for run in runs.values():
            run.close_epoch(steps, dataset.test_x, dataset.test_y)
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a residual network as it is, fused, and compiled by torch.")
    parser.add_argument("--data", choices=data.NAMES, default="digits", help="what to train on (default: digits)")
    parser.add_argument("--root", type=Path, help=f"folder of the Fashion-MNIST files (default: {data.DEBIAN_ROOT})")
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 5 for Fashion-MNIST")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the batches (default: 0)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    epochs, _, lr = DEFAULTS[args.data]
    try:
        dataset = data.load(args.data, args.root)
        runs = build_runs(dataset, args.seed, lr, not args.no_compile)
        for entry in bn_ext.fusion_report(runs["fused"].model):
            console.print(f"{entry.name}: {entry.computes}" + (f" ({entry.reason})" if entry.reason else ""))
        outcome = train(dataset, runs, args.epochs or epochs, args.batch_size, args.seed)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red")
        return 2
    titles = {"nn": "nn.BatchNorm1d", "fused": "convert(fuse=True)", "compile": "torch.compile"}
    for name, run in runs.items():
        time = 1e6 * median(run.step_seconds)
        console.print(f"{titles[name]:<20} test accuracy {run.accuracy[-1]:.2%}, median training step {time:.0f} us")
    console.print("the fused network agrees with the native one" if outcome.agreed else "the fused network DIFFERS")
    return 0 if outcome.agreed else 1


if __name__ == "__main__":
    sys.exit(main())
