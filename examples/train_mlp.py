"""Train the README's network with nn.BatchNorm1d, with bn_ext.convert, with convert(fuse=True) and not normalised.

    python examples/train_mlp.py
    python examples/train_mlp.py --data fashion-mnist --root /usr/share/datasets/fashion-mnist

The four start from the same weights and take the same batches in the same order with the same optimiser. Then their
training steps are timed in turns, and the errors of both batch norms are measured where the mean is large. Exit status
1 says that ours did not agree with nn.BatchNorm1d.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from scripting import end, needed

with needed():
    import torch
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor, nn

    import accuracy
    import bn_ext
    import data
    import plot
    from environment import load_average
    from networks import mlp
    from report import Record, busy, errors
    from timing import Plan, Times, cpu_clock, race

# Epochs, batch size and learning rate; plain gradient descent with momentum, one rate for all networks.
DEFAULTS = {"digits": (20, 64, 0.01), "fashion-mnist": (5, 256, 0.01)}
MOMENTUM = 0.9
OUT = Path(__file__).resolve().parent.parent / "out"
TITLES = {
    "nn": "nn.BatchNorm1d",
    "converted": "bn_ext.convert",
    "fused": "convert(fuse=True)",
    "none": "no normalisation",
}
OURS = ("converted", "fused")
STEP_PLAN = Plan(block=0.01, budget=4.0, min_rounds=15)
# Where the errors of the closing lines are taken; any mean/std of accuracy.RATIOS.
LARGE_MEAN = 1e4


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
        logits, loss = self.update(x, y)
        self.step_seconds.append(time.perf_counter() - start)
        self.losses.append(float(loss.detach()))
        return logits.detach()

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise without a record of it; returns (logits, loss)."""
        logits = self.model(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return logits, loss

    def close_epoch(self, steps: int, x: Tensor, y: Tensor) -> None:
        """Record the mean loss of the last ``steps`` steps and the accuracy on x (M, features), y (M,)."""
        self.epoch_loss.append(sum(self.losses[-steps:]) / steps)
        self.model.eval()
        with torch.no_grad():
            self.accuracy.append(float((self.model(x).argmax(1) == y).double().mean()))
        self.model.train()


@dataclass
class Outcome:
    """The runs, and how far ours were from nn.BatchNorm1d's at each step: the largest difference of a logit."""

    dataset: data.Dataset
    runs: dict[str, Run]
    logit_gap: list[float] = field(default_factory=list)
    first_logit_size: float = 0.0

    @property
    def ours(self) -> list[str]:
        return [name for name in OURS if name in self.runs]

    def compare(self, logits: Mapping[str, Tensor]) -> None:
        """Record how far ours are from native's in one step; logits (N, classes) by the name of the run."""
        self.first_logit_size = self.first_logit_size or float(logits["nn"].abs().max())
        self.logit_gap.append(max(float((logits["nn"] - logits[name]).abs().max()) for name in self.ours))

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
    def same_start(self) -> bool:
        return self.logit_gap[0] <= self.rounding_bound

    @property
    def same_end(self) -> bool:
        native = self.runs["nn"].accuracy[-1]
        return max(abs(native - self.runs[name].accuracy[-1]) for name in self.ours) <= self.accuracy_bound

    @property
    def agreed(self) -> bool:
        return self.same_start and self.same_end


def build_runs(features: int, classes: int, seed: int, lr: float) -> dict[str, Run]:
    """The four networks from one seed. Batch norm draws no random numbers, so the linear layers start equal."""
    torch.manual_seed(seed)
    native = mlp(features, classes)
    torch.manual_seed(seed)
    plain = mlp(features, classes, normalise=False)
    models = {
        "nn": native,
        "converted": bn_ext.convert(copy.deepcopy(native)),
        "fused": bn_ext.convert(copy.deepcopy(native), fuse=True),
        "none": plain,
    }
    return {name: Run(m, torch.optim.SGD(m.parameters(), lr=lr, momentum=MOMENTUM)) for name, m in models.items()}


def train(dataset: data.Dataset, epochs: int, batch_size: int, lr: float, seed: int, console: Console) -> Outcome:
    """Train the four side by side, printing a line an epoch; raises ValueError when no full batch fits."""
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
                outcome.compare({name: run.step(x, y) for name, run in outcome.runs.items()})
                progress.advance(task)
            for run in outcome.runs.values():
                run.close_epoch(steps, dataset.test_x, dataset.test_y)
            console.print(epoch_line(outcome, epoch))
    return outcome


def header() -> str:
    """The two lines above the epochs."""
    titles = "".join(f"{TITLES[name]:>22}" for name in TITLES)
    return f"       {titles}\nepoch  {'loss  test acc.'.rjust(22) * len(TITLES)}"


def epoch_line(outcome: Outcome, epoch: int) -> str:
    """Loss and accuracy of all after an epoch."""
    cells = "".join(f"{r.epoch_loss[epoch]:>12.4f}{r.accuracy[epoch]:>9.2%} " for r in outcome.runs.values())
    return f"{epoch + 1:>5}  {cells}"


def step_times(outcome: Outcome, batch_size: int) -> dict[str, Times]:
    """Time a training step of each network, in turns. It trains them further, so all else has to be known by then."""
    x, y = outcome.dataset.train_x[:batch_size], outcome.dataset.train_y[:batch_size]
    return race({name: partial(run.update, x, y) for name, run in outcome.runs.items()}, cpu_clock, STEP_PLAN)


def reached(run: Run, accuracy: float) -> str:
    """In which epoch a run first had this test accuracy, in words."""
    epochs = [epoch for epoch, value in enumerate(run.accuracy, 1) if value >= accuracy]
    return f"epoch {epochs[0]}" if epochs else f"not within {len(run.accuracy)} epochs"


def summary(outcome: Outcome, times: Mapping[str, Times]) -> str:
    """What the training and the timing showed, in a few lines."""
    runs = outcome.runs
    native = runs["nn"].accuracy[-1]
    target = int(0.98 * native * 100) / 100
    at_first = "agree to float32 rounding" if outcome.same_start else "DIFFER"
    at_last = "same final accuracy" if outcome.same_end else "DIFFERENT final accuracy"
    accuracies = ", ".join(f"{runs[name].accuracy[-1]:.2%} ({TITLES[name]})" for name in ("nn", *outcome.ours))
    return "\n".join(
        [
            f"first step: the batch norms {at_first} (logits within {outcome.logit_gap[0]:.2g}, "
            f"allowed {outcome.rounding_bound:.2g})",
            f"{at_last}: {accuracies}, allowed difference {outcome.accuracy_bound:.2%}",
            f"test accuracy of {target:.0%} first reached: "
            + ", ".join(f"{TITLES[name]} {reached(run, target)}" for name, run in runs.items()),
            "training step, median of interleaved runs: "
            + ", ".join(f"{TITLES[name]} {1e6 * found.median:.0f} us" for name, found in times.items()),
        ]
    )


def closing(outcome: Outcome, times: Mapping[str, Times], records: list[Record]) -> str:
    """The sentence that the demo ends with: accuracy, time and error of ours beside nn.BatchNorm1d's."""
    same = "the same test accuracy" if outcome.agreed else "DIFFERENT results"
    native, fused = (outcome.runs[name].accuracy[-1] for name in ("nn", "fused"))
    step, usual = times["fused"], times["nn"]
    noise = "" if step.p80 < usual.p20 or step.p20 > usual.p80 else " (within noise)"
    curves = errors(records)
    ours, theirs = (curves[accuracy.POINTS[0], name][LARGE_MEAN] for name in ("bn_ext", "nn"))
    return (
        f"bn_ext with convert(fuse=True) beside nn.BatchNorm1d: {same} ({fused:.2%} and {native:.2%}), a training step "
        f"{usual.median / step.median:.2f} times as fast{noise}, and at mean/std {LARGE_MEAN:g} an error "
        f"{theirs / ours:,.0f} times smaller ({ours:.2g} and {theirs:.2g} standard deviations)."
    )


def figure(outcome: Outcome, times: Mapping[str, Times], records: list[Record], warning: str | None) -> Figure:
    """Training loss, test accuracy, time of a step, and the error of both batch norms."""
    drawn = Figure(figsize=(plot.WIDTH, 7), layout="constrained")
    (loss, correct), (steps, error) = drawn.subplots(2, 2)
    styles = {"nn": ("#9ec5e8", "-", 5.0), "converted": (plot.OURS, "-", 2.0), "fused": ("#7a1f00", ":", 2.0)}
    styles["none"] = ("#666666", "-", 1.5)
    for name, run in outcome.runs.items():
        colour, dash, width = styles[name]
        epochs = range(1, len(run.epoch_loss) + 1)
        line = {"color": colour, "linestyle": dash, "linewidth": width, "label": TITLES[name]}
        # A single epoch is a point, which no line shows.
        line["marker"] = "." if len(epochs) == 1 else ""
        loss.plot(epochs, run.epoch_loss, **line)
        correct.plot(epochs, [100 * value for value in run.accuracy], **line)
    loss.set(title="training loss", xlabel="epoch", yscale="log")
    correct.set(title="test accuracy, %", xlabel="epoch")
    for axes in (loss, correct):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5)
    draw_steps(steps, times)
    plot.accuracy(error, records)
    said = f"{outcome.dataset.name}: the same network, seed and batches"
    drawn.suptitle(f"{said}\n{warning}" if warning else said, fontsize=10)
    return drawn


def draw_steps(axes: Any, times: Mapping[str, Times]) -> None:
    """A bar for each network: the median time of a step, a whisker from p20 to p80, and the speed over native's."""
    places = range(len(times))
    medians = [1e3 * found.median for found in times.values()]
    ends = [[1e3 * (t.median - t.p20) for t in times.values()], [1e3 * (t.p80 - t.median) for t in times.values()]]
    colours = {"nn": plot.NATIVE, "none": "#999999"}
    axes.barh(places, medians, xerr=ends, color=[colours.get(name, plot.OURS) for name in times], capsize=3, height=0.6)
    for place, found in zip(places, times.values(), strict=True):
        text = f"{1e3 * found.median:.2f} ms, {times['nn'].median / found.median:.2f}x"
        axes.annotate(
            text, (1e3 * found.p80, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_yticks(places, [TITLES[name] for name in times])
    axes.invert_yaxis()
    axes.set(title="time of a training step", xlabel="milliseconds (median, p20 to p80)")
    axes.set_xlim(0, 1.6e3 * max(found.p80 for found in times.values()))  # room for the longest bar's figures
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3, axis="x")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one network with both batch norms and without.")
    parser.add_argument("--data", choices=data.NAMES, default="digits", help="what to train on (default: digits)")
    parser.add_argument("--root", type=Path, help=f"folder of the Fashion-MNIST files (default: {data.DEBIAN_ROOT})")
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 5 for Fashion-MNIST")
    parser.add_argument("--batch-size", type=int, help="default: 64 for digits, 256 for Fashion-MNIST")
    parser.add_argument("--lr", type=float, help="learning rate of all (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the batches (default: 0)")
    parser.add_argument("--plot", type=Path, help="where the figure goes (default: out/train_mlp_<data>.png)")
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
    warning = busy({"load_average": load_average()})
    try:
        with needed():
            dataset = data.load(args.data, args.root)
        console.print(
            f"{dataset.name}: {len(dataset.train_x)} training and {len(dataset.test_x)} test images, "
            f"{dataset.features} features, {dataset.classes} classes; batch {args.batch_size}, lr {args.lr:g}, "
            f"momentum {MOMENTUM}, seed {args.seed}, {torch.get_num_threads()} threads"
        )
        outcome = train(dataset, args.epochs, args.batch_size, args.lr, args.seed, console)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red")
        return 2
    times = step_times(outcome, args.batch_size)
    console.print(summary(outcome, times))
    if warning:
        console.print(f"times were {warning}", style="yellow")
    records = accuracy.measure(torch.device("cpu"))
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure(outcome, times, records, warning).savefig(args.plot, dpi=plot.DPI)
    console.print(f"figure: {args.plot}")
    console.print(closing(outcome, times, records))
    return 0 if outcome.agreed else 1


if __name__ == "__main__":
    end(main)
