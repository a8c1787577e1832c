"""Tell nine speakers apart by recordings of 7 to 29 steps: batch norm that counts the padding, masked, and layer norm.

    python examples/sequences.py
    python examples/sequences.py --quick
    python examples/sequences.py --json result.jsonl

A batch is padded with zeros, and only the normalisation differs between the networks. Each is trained on batches padded
to little and to much, then asked for the test recordings alone, without any padding, and padded to several lengths.
Exit status 1 says that a logit of the masked network changed with the padding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from scripting import check_output, end, needed

with needed():
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor, nn

    import bn_ext
    import data
    import trials
    from environment import facts

WIDTH, BLOCKS = 64, 3
EPOCHS, BATCH, LR = 40, 30, 2e-3  # Adam; the rate falls to zero in a straight line
SEEDS = 3
TRAINED_AT = (29, 120)  # steps that the batches of training are padded to; the longest recording has 29
TESTED_AT = (29, 60, 120)  # likewise of the test


class StepNorm(nn.LayerNorm):
    """Layer norm over the channels of each step: (N, C, L) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "counted": bn_ext.FusedBatchNorm1d,
    "masked": bn_ext.FusedBatchNorm1d,
    "layer": StepNorm,
}
TITLES = {"counted": "padding counted", "masked": "masked", "layer": "layer norm"}


class Network(nn.Module):
    """Blocks of a convolution, a norm and a ReLU, the mean over the valid steps, a linear layer.

    A masked norm leaves zero beyond the lengths, ReLU keeps it, and the next convolution reads what it would have read
    beyond the end of a recording alone. So nothing of the padding reaches a logit.
    """

    def __init__(self, channels: int, classes: int, kind: str) -> None:
        super().__init__()
        widths = (channels, *[WIDTH] * BLOCKS)
        pairs = pairwise(widths)
        self.convolutions = nn.ModuleList(nn.Conv1d(a, b, 5, padding=2, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(NORMS[kind](WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, classes)
        self.masked = kind == "masked"

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (N, channels, L), zero from step lengths[n] on; lengths (N,) int64. Returns logits (N, classes)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x)
            x = torch.relu(norm(x, lengths=lengths) if self.masked else norm(x))
        valid = torch.arange(x.size(2)) < lengths[:, None]
        return self.head((x * valid[:, None]).sum(2) / lengths[:, None])


def padded(recordings: Sequence[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """One batch (N, channels, L) of recordings with zeros behind them, and their lengths (N,).

    L is ``steps``, or the length of the longest recording where that is more.
    """
    lengths = torch.tensor([recording.size(1) for recording in recordings])
    x = recordings[0].new_zeros(len(recordings), recordings[0].size(0), max(steps, int(lengths.max())))
    for row, recording in zip(x, recordings, strict=True):
        row[:, : recording.size(1)] = recording
    return x, lengths


def train(dataset: data.Sequences, kind: str, steps: int, epochs: int, seed: int) -> Network:
    """A network trained on batches that are padded to ``steps``; equal seeds have equal convolutions and batches."""
    torch.manual_seed(seed)
    network = Network(dataset.channels, dataset.classes, kind)
    optimiser = torch.optim.Adam(network.parameters(), lr=LR)
    x, lengths = padded(dataset.train_x, steps)
    batches = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: batches * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(network(x[index], lengths[index]), dataset.train_y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network


@torch.no_grad()
def answers(network: Network, dataset: data.Sequences) -> dict[str, Tensor]:
    """The logits of the test recordings: each alone, and padded to each of TESTED_AT, in evaluation.

    "batch 29" and so on are those in training, by the statistics of the whole test set as one padded batch: what a
    batch norm without running statistics does.
    """
    network.eval()
    found = {"alone": torch.cat([network(*padded([recording], 0)) for recording in dataset.test_x])}
    for steps in TESTED_AT:
        found[str(steps)] = network(*padded(dataset.test_x, steps))
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    for steps in TESTED_AT:
        found[f"batch {steps}"] = network(*padded(dataset.test_x, steps))
    network.load_state_dict(state)
    return found


def record(dataset: data.Sequences, kind: str, trained_at: int, seed: int, logits: dict[str, Tensor]) -> trials.Record:
    """What one network showed, as a line of the result file.

    ``change`` is the largest difference of a logit between a recording alone and padded, ``batch_change`` that between
    batches padded to least and to more; both over the largest logit.
    """
    accuracy = {name: float((found.argmax(1) == dataset.test_y).double().mean()) for name, found in logits.items()}
    alone, least = logits["alone"], logits[f"batch {TESTED_AT[0]}"]
    change = max(float((logits[str(steps)] - alone).abs().max()) for steps in TESTED_AT)
    batch_change = max(float((logits[f"batch {steps}"] - least).abs().max()) for steps in TESTED_AT)
    return {
        "data": dataset.name,
        "kind": kind,
        "title": TITLES[kind],
        "trained_at": trained_at,
        "seed": seed,
        "accuracy": accuracy,
        "change": change / float(alone.abs().max()),
        "batch_change": batch_change / float(least.abs().max()),
    }


def bound(blocks: int = BLOCKS) -> float:
    """The most that rounding may change a logit, over the largest: 64 units in the last place a block is generous."""
    return 64 * blocks * torch.finfo(torch.float32).eps


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify sequences of different lengths with three norms.")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--seeds", type=int, help=f"how many trainings of each (default: {SEEDS})")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two epochs, where not told otherwise: does it run"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each network")
    args = parser.parse_args(argv)
    for name, quick, whole in (("epochs", 2, EPOCHS), ("seeds", 1, SEEDS)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else whole)
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive")
    check_output(parser, "--json", args.json)
    return args


def measure(dataset: data.Sequences, epochs: int, seeds: int, console: Console) -> list[trials.Record]:
    """Train and ask every network: each norm, padding of training and seed."""
    found = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("networks"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(NORMS) * len(TRAINED_AT) * seeds)
        for kind in NORMS:
            for trained_at in TRAINED_AT:
                for seed in range(seeds):
                    network = train(dataset, kind, trained_at, epochs, seed)
                    found.append(record(dataset, kind, trained_at, seed, answers(network, dataset)))
                    progress.advance(task)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # so small a network loses by a second thread
    console = Console(highlight=False, soft_wrap=True)
    with needed():
        dataset = data.load_japanese_vowels()
    console.print(
        f"{dataset.name}: {len(dataset.train_x)} training and {len(dataset.test_x)} test recordings of up to "
        f"{dataset.longest} steps, {dataset.channels} channels, {dataset.classes} speakers; {args.epochs} epochs, "
        f"batch {BATCH}, {args.seeds} seeds"
    )
    records = measure(dataset, args.epochs, args.seeds, console)
    for title, places, change in (
        ("accuracy in evaluation, % (± the farthest seed), of recordings alone and padded", trials.EVALUATED, "change"),
        ("accuracy by the statistics of the test batch, %", trials.OF_BATCH, "batch_change"),
    ):
        console.print(trials.printable(trials.sequences(records, places, change), title))
    if args.json:
        shared = facts(torch.device("cpu"))
        args.json.write_text("".join(json.dumps({**shared, **r}) + "\n" for r in records), encoding="utf-8")
    worst = max(max(r["change"], r["batch_change"]) for r in records if r["kind"] == "masked")
    independent = worst <= bound()
    said = "do not depend" if independent else "DEPEND"
    console.print(f"masked: logits {said} on the padding ({worst:.1e} of the largest, allowed {bound():.1e})")
    return 0 if independent else 1


if __name__ == "__main__":
    end(main)
