"""Train a network with nn.BatchNorm1d, converted by bn_ext.convert(model, fuse=True), and by torch.compile.

    python examples/train_fused.py
    python examples/train_fused.py --network residual --data fashion-mnist
    python examples/train_fused.py --no-compile --json result.jsonl

The three start from the same weights and take the same batches. Exit status 1 says that the fused network and the
native one did not agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from scripting import end, needed

with needed():
    import torch
    from rich.console import Console
    from torch import nn

    import bn_ext
    import data
    from environment import facts
    from networks import mlp, residual_mlp, resnet
    from train_mlp import DEFAULTS, MOMENTUM, Outcome, Run

NETWORKS = {"mlp": mlp, "residual": residual_mlp, "resnet": resnet}
TITLES = {"nn": "nn.BatchNorm1d", "fused": "convert(fuse=True)", "compile": "torch.compile"}


def build_runs(native: nn.Module, lr: float, compiled: bool) -> dict[str, Run]:
    """The same network as it is, fused and, where asked, compiled by torch."""
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
            outcome.compare({name: run.step(x, y) for name, run in runs.items()})
        for run in runs.values():
            run.close_epoch(steps, dataset.test_x, dataset.test_y)
    return outcome


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a network as it is, fused, and compiled by torch.")
    parser.add_argument("--network", choices=NETWORKS, default="mlp", help="the README's (default), or another")
    parser.add_argument("--data", choices=data.NAMES, default="digits", help="what to train on (default: digits)")
    parser.add_argument("--root", type=Path, help=f"folder of the Fashion-MNIST files (default: {data.DEBIAN_ROOT})")
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 5 for Fashion-MNIST")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the batches (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    epochs, _, lr = DEFAULTS[args.data]
    try:
        with needed():
            dataset = data.load(args.data, args.root)
        torch.manual_seed(args.seed)
        runs = build_runs(NETWORKS[args.network](dataset.features, dataset.classes), lr, not args.no_compile)
        for entry in bn_ext.fusion_report(runs["fused"].model):
            console.print(f"{entry.name}: {entry.computes}" + (f" ({entry.reason})" if entry.reason else ""))
        outcome = train(dataset, runs, args.epochs or epochs, args.batch_size, args.seed)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red")
        return 2
    lines = []
    for name, run in runs.items():
        time = 1e6 * median(run.step_seconds)
        console.print(f"{TITLES[name]:<20} test accuracy {run.accuracy[-1]:.2%}, median training step {time:.0f} us")
        record = {**facts(torch.device("cpu")), "network": args.network, "data": args.data, "kind": name}
        lines.append(record | {"batch": args.batch_size, "median_us": time, "accuracy": run.accuracy[-1]})
    if args.json:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    console.print("the fused network agrees with the native one" if outcome.agreed else "the fused network DIFFERS")
    return 0 if outcome.agreed else 1


if __name__ == "__main__":
    end(main)
