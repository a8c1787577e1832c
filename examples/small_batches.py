"""Accuracy against the size of the batch, 2 to 128, for batch norm and what is said to help where batches are small.

    python examples/small_batches.py
    python examples/small_batches.py --quick
    python examples/small_batches.py --json result.jsonl --plot figure.png

The README's network on the digits. Every training sees as many images, in batches of one size; the learning rate is in
proportion to the size, and falls to zero in a straight line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from scripting import check_output, end, needed

with needed():
    import matplotlib
    import torch
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import nn

    import bn_ext
    import data
    import plot
    import trials
    from environment import facts

SIZES = (2, 4, 8, 16, 32, 64, 128)
EPOCHS, SEEDS = 8, 3
LR, MOMENTUM = 0.1, 0.9  # of batches of LARGEST; other sizes in proportion
LARGEST = max(SIZES)
VIRTUAL = 16  # samples that the statistics of a virtual batch come from
GROUPS = 16  # of group norm
OUT = Path(__file__).resolve().parent.parent / "out"


@dataclass(frozen=True)
class Kind:
    """A norm and how it is trained.

    ``make`` takes the number of channels and of the steps of an epoch. With ``warm`` the first half of the epochs has
    batches of LARGEST, with ``freeze`` the batch norms are frozen after it. Sizes up to ``above`` are left out.
    """

    title: str
    make: Callable[[int, int], nn.Module]
    warm: bool = False
    freeze: bool = False
    above: int = 0


def batch_norm(channels: int, steps: int) -> nn.Module:
    return bn_ext.FusedBatchNorm1d(channels)


KINDS = {
    "batch": Kind("batch norm", batch_norm),
    "renorm": Kind("batch renorm", lambda channels, steps: bn_ext.FusedBatchRenorm1d(channels, warmup_steps=steps)),
    # Of batches that are no larger it would be batch norm.
    "virtual": Kind(
        f"virtual batches of {VIRTUAL}",
        lambda channels, steps: bn_ext.FusedBatchNorm1d(channels, virtual_batch_size=VIRTUAL),
        above=VIRTUAL,
    ),
    "group": Kind(f"group norm, {GROUPS} groups", lambda channels, steps: nn.GroupNorm(GROUPS, channels)),
    "layer": Kind("layer norm", lambda channels, steps: nn.LayerNorm(channels)),
    # As a trained network is tuned further: with its statistics as they are, and beside it with new ones.
    "frozen": Kind("batch norm, frozen", batch_norm, warm=True, freeze=True),
    "warm": Kind("batch norm, not frozen", batch_norm, warm=True),
    "none": Kind("no normalisation", lambda channels, steps: nn.Identity()),
}


def network(dataset: data.Dataset, kind: Kind, steps: int) -> nn.Sequential:
    """The README's network with another norm. No norm draws random numbers, so equal seeds have equal weights."""
    layers: list[nn.Module] = []
    for wide, narrow in ((dataset.features, 256), (256, 128)):
        layers += [nn.Linear(wide, narrow), kind.make(narrow, steps), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, dataset.classes))


def images(dataset: data.Dataset) -> int:
    """How many images an epoch has: whole batches of the largest size, so that every size sees as many."""
    return len(dataset.train_x) // LARGEST * LARGEST


def train(dataset: data.Dataset, kind: Kind, size: int, epochs: int, lr: float, seed: int) -> float:
    """Train with batches of ``size`` and return the test accuracy."""
    torch.manual_seed(seed)
    count = images(dataset)
    model = network(dataset, kind, count // size)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    half, seen = epochs // 2, 0
    for epoch in range(epochs):
        if kind.freeze and epoch == half:
            bn_ext.freeze(model)
        now = LARGEST if kind.warm and epoch < half else size
        for index in torch.randperm(len(dataset.train_x))[:count].split(now):
            optimiser.param_groups[0]["lr"] = lr * now / LARGEST * (1 - seen / (epochs * count))
            loss = nn.functional.cross_entropy(model(dataset.train_x[index]), dataset.train_y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen += now
    model.eval()
    with torch.no_grad():
        return float((model(dataset.test_x).argmax(1) == dataset.test_y).double().mean())


def measure(dataset: data.Dataset, args: argparse.Namespace, console: Console) -> list[trials.Record]:
    """Train every norm at every size from every seed; the progress counts steps, as small batches have more."""
    plan = [(name, size) for name, kind in KINDS.items() for size in args.sizes if size > kind.above]
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    found = []
    with Progress(*columns, console=console, transient=True) as progress:
        steps = {size: args.epochs * images(dataset) // size for size in args.sizes}
        task = progress.add_task("training", total=args.seeds * sum(steps[size] for _, size in plan))
        for name, size in plan:
            for seed in range(args.seeds):
                accuracy = train(dataset, KINDS[name], size, args.epochs, args.lr, seed)
                settings = {"batch": size, "seed": seed, "epochs": args.epochs, "lr": args.lr}
                found.append(
                    {"data": dataset.name, "kind": name, "title": KINDS[name].title, **settings, "accuracy": accuracy}
                )
                progress.advance(task, steps[size])
    return found


def figure(records: Sequence[trials.Record]) -> Figure:
    """The test error over the size of the batch: a line for each norm, whiskers from the least to the largest seed."""
    with matplotlib.rc_context(plot.SIZES):
        drawn = Figure(figsize=(plot.WIDTH, 5), layout="constrained")
        axes = drawn.subplots()
        for place, ((title,), mine) in enumerate(trials.grouped(records, "title").items()):
            by_size = {size: found for (size,), found in trials.grouped(mine, "batch").items()}
            errors = [[100 * (1 - r["accuracy"]) for r in found] for found in by_size.values()]
            middle = [mean(values) for values in errors]
            whiskers = [
                [m - min(values) for m, values in zip(middle, errors, strict=True)],
                [max(values) - m for m, values in zip(middle, errors, strict=True)],
            ]
            beside = 1.02 ** (place - len(KINDS) / 2)  # so that no whisker hides another
            sizes = [size * beside for size in by_size]
            axes.errorbar(sizes, middle, whiskers, label=title, marker="o", markersize=4, linewidth=1.3, capsize=2)
        sizes = sorted({record["batch"] for record in records})
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1)  # straight below one per cent, where a logarithm has no zero
        axes.set_ylim(bottom=80 * (1 - max(record["accuracy"] for record in records)))
        axes.set_xticks(sizes, map(str, sizes))
        axes.yaxis.set_major_locator(FixedLocator([0, 1, 2, 3, 5, 10, 20, 50, 100]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="size of the batch", ylabel="test error, % (mean, least and largest seed)")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", ncols=2)
        first = records[0]
        drawn.suptitle(
            f"{first['data']}: {first['epochs']} epochs in batches of one size, rate in proportion to it", fontsize=10
        )
    return drawn


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy against the size of the batch, for several norms.")
    parser.add_argument("--sizes", help=f"of batches, powers of two to {LARGEST} (default: all from {SIZES[0]} on)")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--seeds", type=int, help=f"how many trainings of each (default: {SEEDS})")
    parser.add_argument("--lr", type=float, default=LR, help=f"learning rate of batches of {LARGEST} (default: {LR})")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two epochs, three sizes, where not told otherwise: does it run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each training")
    parser.add_argument("--plot", type=Path, help="where the figure goes (default: out/small_batches.png)")
    args = parser.parse_args(argv)
    for name, quick, whole in (("epochs", 2, EPOCHS), ("seeds", 1, SEEDS), ("sizes", f"8,32,{LARGEST}", None)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else whole)
    try:
        args.sizes = sorted({int(size) for size in args.sizes.split(",")}) if args.sizes else list(SIZES)
    except ValueError:
        parser.error(f"--sizes takes numbers with commas between them, not {args.sizes}")
    if wrong := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"--sizes may have {', '.join(map(str, SIZES))}, not {', '.join(map(str, wrong))}")
    for name in ("epochs", "seeds", "lr"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be positive")
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: what is frozen is trained for the first half of them")
    args.plot = args.plot or OUT / "small_batches.png"
    check_output(parser, "--json", args.json)
    check_output(parser, "--plot", args.plot, Figure().canvas.get_supported_filetypes())
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # so small a network loses by a second thread
    console = Console(highlight=False, soft_wrap=True)
    with needed():
        dataset = data.load_digits()
    console.print(
        f"{dataset.name}: {args.epochs} epochs of {images(dataset)} images, {len(dataset.test_x)} test images; "
        f"rate {args.lr:g} at {LARGEST}, momentum {MOMENTUM}, {args.seeds} seeds"
    )
    records = measure(dataset, args, console)
    table = trials.small_batches(records)
    console.print(trials.printable(table, "test accuracy, % (± the farthest seed), by the size of the batch"))
    if args.json:
        shared = facts(torch.device("cpu"))
        args.json.write_text("".join(json.dumps({**shared, **r}) + "\n" for r in records), encoding="utf-8")
    figure(records).savefig(args.plot, dpi=plot.DPI)
    console.print(f"figure: {args.plot}")
    return 0


if __name__ == "__main__":
    end(main)
