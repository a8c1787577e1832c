"""Train the README's network three times: nn.BatchNorm1d, FusedBatchNorm1d, and no normalisation.

    python examples/train_mlp.py
    python examples/train_mlp.py --data fashion-mnist --root /usr/share/datasets/fashion-mnist

The three start from the same weights and take the same batches in the same order with the same optimiser. Exit status 1
says that the two batch norms did not agree.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import bn_ext
import data
from networks import mlp

# Epochs, batch size and learning rate; plain gradient descent with momentum, one rate for all three networks.
DEFAULTS = {"digits": (20, 64, 0.01), "fashion-mnist": (5, 256, 0.01)}
MOMENTUM = 0.9
OUT = Path(__file__).resolve().parent.parent / "out"
TITLES = {"nn": "nn.BatchNorm1d", "fused": "FusedBatchNorm1d", "none": "no normalisation"}


@dataclass
class Run:
    """One network, its optimiser and what was seen of it: ``losses`` and ``step_seconds`` a step, the rest an epoch."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step on x (N, features), y (N,); returns the logits (N, classes) from before the update."""
        start = time.perf_counter()
        logits = self.model(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss.detach()))
        return logits.detach()

    def close_epoch(self, steps: int, x: Tensor, y: Tensor) -> None:
        """Record the mean loss of the last ``steps`` steps and the accuracy on x (M, features), y (M,)."""
        self.epoch_loss.append(sum(self.losses[-steps:]) / steps)
        self.model.eval()
        with torch.no_grad():
            self.accuracy.append(float((self.model(x).argmax(1) == y).double().mean()))
        self.model.train()


@dataclass
class Outcome:
    """Everything the summary needs: the three runs, and how far the two batch norms were apart at each step."""

    dataset: data.Dataset
    runs: dict[str, Run]
    logit_gap: list[float] = field(default_factory=list)
    first_logit_size: float = 0.0

    @property
    def loss_gap(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.runs["nn"].losses, self.runs["fused"].losses, strict=True)]

    @property
    def rounding_bound(self) -> float:
        """The most that two right float32 answers can differ in the first logits.

        Two normalisations, each a handful of roundings, and the sums of three matrix products: 64 units in the last
        place of the largest logit is generous to rounding and far below any mistake in a formula.
        """
        return 64 * torch.finfo(torch.float32).eps * max(1.0, self.first_logit_size)

    @property
    def accuracy_bound(self) -> float:
        """Three standard errors of the difference between two accuracies on this test set, at least one image."""
        p, count = self.runs["nn"].accuracy[-1], len(self.dataset.test_y)
        return max(1 / count, 3 * (2 * p * (1 - p) / count) ** 0.5)

    @property
    def agreed(self) -> bool:
        final = abs(self.runs["nn"].accuracy[-1] - self.runs["fused"].accuracy[-1])
        return self.logit_gap[0] <= self.rounding_bound and final <= self.accuracy_bound


def build_runs(features: int, classes: int, seed: int, lr: float) -> dict[str, Run]:
    """The three networks from one seed. Batch norm draws no random numbers, so the linear layers start equal."""
    torch.manual_seed(seed)
    native = mlp(features, classes)
    torch.manual_seed(seed)
    plain = mlp(features, classes, normalise=False)
    models = {"nn": native, "fused": bn_ext.convert(copy.deepcopy(native)), "none": plain}
    return {name: Run(m, torch.optim.SGD(m.parameters(), lr=lr, momentum=MOMENTUM)) for name, m in models.items()}


def train(dataset: data.Dataset, epochs: int, batch_size: int, lr: float, seed: int, console: Console) -> Outcome:
    """Train the three side by side, printing a line an epoch; raises ValueError when no full batch fits."""
    steps = len(dataset.train_x) // batch_size
    if steps == 0 or batch_size < 2:
        raise ValueError(f"the batch size must lie between 2 and {len(dataset.train_x)}, not {batch_size}")
    outcome = Outcome(dataset, build_runs(dataset.features, dataset.classes, seed, lr))
    shuffle = torch.Generator().manual_seed(seed)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=epochs * steps)
        console.print(header())
        for epoch in range(epochs):
            # The last, partial batch is left out: it could hold a single sample, which has no variance.
            order = torch.randperm(len(dataset.train_x), generator=shuffle)[: steps * batch_size]
            for index in order.split(batch_size):
                x, y = dataset.train_x[index], dataset.train_y[index]
                logits = {name: run.step(x, y) for name, run in outcome.runs.items()}
                if not outcome.logit_gap:
                    outcome.first_logit_size = float(logits["nn"].abs().max())
                outcome.logit_gap.append(float((logits["nn"] - logits["fused"]).abs().max()))
                progress.advance(task)
            for run in outcome.runs.values():
                run.close_epoch(steps, dataset.test_x, dataset.test_y)
            console.print(epoch_line(outcome, epoch, steps))
    return outcome


def header() -> str:
    """The two lines above the epochs."""
    titles = "".join(f"{TITLES[name]:>22}" for name in TITLES)
    return f"       {titles}   largest difference in\nepoch  {'loss  test acc.'.rjust(22) * 3}   loss of the two norms"


def epoch_line(outcome: Outcome, epoch: int, steps: int) -> str:
    """Loss and accuracy of the three after an epoch, and the largest difference of the losses of the two within it."""
    cells = "".join(f"{r.epoch_loss[epoch]:>12.4f}{r.accuracy[epoch]:>9.2%} " for r in outcome.runs.values())
    return f"{epoch + 1:>5}  {cells}   {max(outcome.loss_gap[epoch * steps : (epoch + 1) * steps]):.2g}"


def reached(run: Run, accuracy: float) -> str:
    """In which epoch a run first had this test accuracy, in words."""
    epochs = [epoch for epoch, value in enumerate(run.accuracy, 1) if value >= accuracy]
    return f"epoch {epochs[0]}" if epochs else f"not within {len(run.accuracy)} epochs"


def summary(outcome: Outcome) -> str:
    """What the runs showed, in a few lines."""
    runs = outcome.runs
    native, fused = runs["nn"], runs["fused"]
    target = int(0.98 * native.accuracy[-1] * 100) / 100
    times = {name: 1e6 * median(run.step_seconds) for name, run in runs.items()}
    at_first = "agree to float32 rounding" if outcome.logit_gap[0] <= outcome.rounding_bound else "DIFFER"
    gap = abs(native.accuracy[-1] - fused.accuracy[-1])
    at_last = "same final accuracy" if gap <= outcome.accuracy_bound else "DIFFERENT final accuracy"
    return "\n".join(
        [
            f"first step: the two batch norms {at_first} (logits within {outcome.logit_gap[0]:.2g}, "
            f"allowed {outcome.rounding_bound:.2g}; loss within {outcome.loss_gap[0]:.2g})",
            f"all {len(outcome.loss_gap)} steps: logits within {max(outcome.logit_gap):.2g}, "
            f"loss within {max(outcome.loss_gap):.2g} (rounding, amplified by training)",
            f"{at_last}: {native.accuracy[-1]:.2%} ({TITLES['nn']}) and {fused.accuracy[-1]:.2%} ({TITLES['fused']}), "
            f"allowed difference {outcome.accuracy_bound:.2%}",
            f"test accuracy of {target:.0%} first reached: "
            + ", ".join(f"{TITLES[name]} {reached(run, target)}" for name, run in runs.items()),
            "median time of a training step: "
            + ", ".join(f"{TITLES[name]} {value:.0f} us" for name, value in times.items()),
        ]
    )


def plot(outcome: Outcome, path: Path) -> None:
    """Write the curves as a PNG: training loss, test accuracy, and the difference of the two batch norms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    styles = {"nn": ("#1f77b4", "-", 4.0), "fused": ("#ff7f0e", "--", 1.8), "none": ("#555555", "-", 1.8)}
    for name, run in outcome.runs.items():
        colour, dash, width = styles[name]
        epochs = range(1, len(run.epoch_loss) + 1)
        line = {"color": colour, "linestyle": dash, "linewidth": width, "label": TITLES[name], "marker": "."}
        left.plot(epochs, run.epoch_loss, **line)
        middle.plot(epochs, [100 * value for value in run.accuracy], **line)
    steps = range(1, len(outcome.loss_gap) + 1)
    # Runs that agree to the last bit have no place on a logarithmic axis; they are drawn at its foot.
    right.semilogy(steps, [max(gap, 1e-9) for gap in outcome.logit_gap], linewidth=0.8, label="logits")
    right.semilogy(steps, [max(gap, 1e-9) for gap in outcome.loss_gap], linewidth=0.8, label="loss")
    left.set(title="training loss", xlabel="epoch", yscale="log")
    middle.set(title="test accuracy, %", xlabel="epoch")
    right.set(title="largest difference of the two batch norms", xlabel="step")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{outcome.dataset.name}: the same network, seed and batches, three kinds of normalisation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one network with nn.BatchNorm1d, FusedBatchNorm1d and neither.")
    parser.add_argument("--data", choices=data.NAMES, default="digits", help="what to train on (default: digits)")
    parser.add_argument("--root", type=Path, help=f"folder of the Fashion-MNIST files (default: {data.DEBIAN_ROOT})")
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 5 for Fashion-MNIST")
    parser.add_argument("--batch-size", type=int, help="default: 64 for digits, 256 for Fashion-MNIST")
    parser.add_argument("--lr", type=float, help="learning rate of all three (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the batches (default: 0)")
    parser.add_argument("--plot", type=Path, help="where the curves go (default: out/train_mlp_<data>.png)")
    args = parser.parse_args(argv)
    for name, value in zip(("epochs", "batch_size", "lr"), DEFAULTS[args.data], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.plot = args.plot or OUT / f"train_mlp_{args.data}.png"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        dataset = data.load(args.data, args.root)
        console.print(
            f"{dataset.name}: {len(dataset.train_x)} training and {len(dataset.test_x)} test images, "
            f"{dataset.features} features, {dataset.classes} classes; batch {args.batch_size}, lr {args.lr:g}, "
            f"momentum {MOMENTUM}, seed {args.seed}, {torch.get_num_threads()} threads"
        )
        outcome = train(dataset, args.epochs, args.batch_size, args.lr, args.seed, console)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red")
        return 2
    console.print(summary(outcome))
    plot(outcome, args.plot)
    console.print(f"curves: {args.plot}")
    return 0 if outcome.agreed else 1


if __name__ == "__main__":
    sys.exit(main())
