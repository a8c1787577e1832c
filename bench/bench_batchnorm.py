"""Time bn_ext against nn.BatchNorm1d, torch.compile of it, oneDNN and a plain copy of the same size.

    python bench/bench_batchnorm.py --quick
    python bench/bench_batchnorm.py --json results.jsonl --plot results.png
    python bench/bench_batchnorm.py --filter "65536x*" --filter float32 --modes eval
    python bench/bench_batchnorm.py --fusion --quick
    python bench/bench_batchnorm.py --kinds --quick
    python bench/bench_batchnorm.py --device cuda --replay --seconds 120 --no-rivals

bench/README.md says how to read what comes out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from scripting import end, needed

with needed():
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    import accuracy
    import fusion
    import kinds
    import report
    from contenders import Bench, Disagreement, check_agreement
    from environment import MEMORY, facts, set_memory
    from grid import CONTENDERS, CUDA, DEFAULT_MODES, FULL, MODES, QUICK, RIVALS, Point, least_bytes, select
    from timing import Plan, Step, Times, cpu_clock, race
    from timing_cuda import captured, cuda_clock, input_sets, launched, memory_needed

QUICK_PLAN = Plan(block=0.002, budget=0.6, min_rounds=5, max_rounds=80)
FULL_PLAN = Plan(block=0.005, budget=3.0, min_rounds=15)
# With --seconds, when every measurement gets its share of the time.
SHARED_PLAN = Plan(block=0.002, budget=3.0, min_rounds=7)
# Of the time that --seconds gives, the part for measuring; imports, set-up and counting launches take the rest.
MEASURING = 0.85
# Of the minute that --quick may take, a part stays for the imports, the tables and a busy machine.
QUICK_SECONDS = 40.0
# The least rounds that a median can be taken of, for a machine on which that time is over before the points are.
LATE_ROUNDS = 3


def time_to_measure(args: argparse.Namespace) -> tuple[Plan, float | None]:
    """How long each measurement may take, and all of them together (None: as long as they do)."""
    if args.quick:
        return QUICK_PLAN, QUICK_SECONDS
    return (SHARED_PLAN, MEASURING * args.seconds) if args.seconds else (FULL_PLAN, None)


class Runner:
    """Measures the points of one run; remembers which rivals work here."""

    def __init__(self, args: argparse.Namespace, log: Console) -> None:
        self.device: torch.device = args.device
        self.points: list[Point] = args.points
        self.modes, self.log = args.modes, log
        alone = args.quick or args.no_rivals
        self.contenders = [name for name in CONTENDERS if name not in RIVALS or not alone]
        self.replay: bool = args.replay
        self.cuda = self.device.type == "cuda"
        self.plan, seconds = time_to_measure(args)
        self.deadline = None if seconds is None else time.perf_counter() + seconds
        self.failed = 0
        self.shared = {**facts(self.device, args.memory), "timing": "replay" if self.replay else "calls"}
        if warning := report.busy(self.shared):
            log.print(warning)

    def measure(self) -> Iterator[list[report.Record]]:
        """The measurements of one point in one mode after the other, under a progress bar.

        What goes wrong at a point is said and counted in ``failed``, and the next point follows.
        """
        total = len(self.points) * len(self.modes)
        with self.progress(total) as (progress, task):
            for number, point in enumerate(self.points):
                done = number * len(self.modes)
                progress.update(task, description=f"{point}: checking", completed=done)
                if self.too_large(point):
                    self.log.print(f"{point} is left out: it does not fit into the memory of the GPU", markup=False)
                    continue
                try:
                    check_agreement(point, self.device)
                    for mode in self.modes:
                        progress.update(task, description=f"{point}: {mode}", completed=done)
                        yield self.measure_one(point, mode, self.plan_for(total - done))
                        done += 1
                except (Disagreement, RuntimeError) as error:
                    self.failed += 1
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    where = "" if isinstance(error, Disagreement) else f"{point}: "
                    self.log.print(f"error: {where}{reason[0]}", markup=False)

    def count_launches(self, found: list[report.Record]) -> None:
        """Fill in ``launches`` on CUDA. After all timing, since a profiler may slow what comes after it."""
        if not self.cuda:
            return
        with self.progress(len(found)) as (progress, task):
            for record in found:
                progress.advance(task)
                if record["contender"] not in ("bn_ext", "nn"):  # compile would be compiled once more
                    continue
                point = Point(tuple(record["shape"]), record["dtype"], record["layout"])
                progress.update(task, description=f"{point}: counting launches")
                bench = Bench(point, record["mode"], self.device)
                with bench.grad_mode():
                    record["launches"] = len(launched(bench.step(record["contender"]), self.device))

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[tuple[Progress, TaskID]]:
        columns = (TextColumn("{task.description:<45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.log, transient=True) as progress:
            yield progress, progress.add_task("starting", total=total)

    def too_large(self, point: Point) -> bool:
        if not self.cuda:
            return False
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return memory_needed(point.bytes, input_sets(point.bytes, self.device)) > free

    def plan_for(self, left: int) -> Plan:
        """The plan of the next measurement, shortened so that the ``left`` measurements end in time."""
        if self.deadline is None:
            return self.plan
        share = (self.deadline - time.perf_counter()) / left
        if share <= 0:
            return replace(self.plan, budget=0.0, min_rounds=LATE_ROUNDS)
        return replace(self.plan, budget=min(self.plan.budget, share))

    def measure_one(self, point: Point, mode: str, plan: Plan) -> list[report.Record]:
        sets = input_sets(point.bytes, self.device) if self.cuda else 1
        started = time.perf_counter()
        bench = Bench(point, mode, self.device, sets)
        with bench.grad_mode():
            steps = {name: self.ready(bench.step(name), sets) for name in self.contenders if name not in RIVALS}
            for name in (name for name in RIVALS if name in self.contenders and bench.has(name)):
                try:
                    steps[name] = self.ready(bench.step(name), sets)
                    steps[name]()
                except Exception as error:  # whatever such a stack raises, the other contenders are still timed
                    steps.pop(name, None)
                    self.contenders.remove(name)
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    self.log.print(f"{RIVALS[name]} does not work here and is left out: {reason[0]}", markup=False)
            # In a hurry the time that the set-up took comes off the time to measure.
            spent = time.perf_counter() - started if self.deadline is not None else 0.0
            repeats = sets if self.replay else 1
            clock = cuda_clock(self.device, repeats) if self.cuda else cpu_clock
            times = race(steps, clock, replace(plan, budget=plan.budget - spent, block=plan.block / repeats))
        return records(point, mode, times, self.shared)

    def ready(self, step: Step, sets: int) -> Step:
        """The step as it is timed: called, or replayed with every input set once."""
        return captured(step, sets, self.device) if self.replay else step


def records(point: Point, mode: str, times: dict[str, Times], shared: dict[str, object]) -> list[report.Record]:
    """The lines of the result file for one point in one mode."""
    cache = int(str(shared["cache_bytes"]))
    copy_gbps = least_bytes(point, mode, "copy", cache) / times["copy"].median / 1e9 if "copy" in times else None
    found: list[report.Record] = []
    for contender, seconds in times.items():
        moved = least_bytes(point, mode, contender, cache)
        gbps = moved / seconds.median / 1e9
        speedup = times["nn"].median / seconds.median if "nn" in times and contender != "copy" else None
        found.append(
            {
                **shared,
                "dtype": point.dtype,
                "shape": list(point.shape),
                "layout": point.layout,
                "mode": mode,
                "contender": contender,
                "median_us": seconds.median * 1e6,
                "p20_us": seconds.p20 * 1e6,
                "p80_us": seconds.p80 * 1e6,
                "rounds": seconds.rounds,
                "bytes": moved,
                "gbps": gbps,
                "limit_fraction": gbps / copy_gbps if copy_gbps else None,
                "speedup": speedup,
                "launches": None,
            }
        )
    return found


def device(name: str) -> torch.device:
    """A device by name; raises ValueError for a name that torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(name) from error


def grid_of(args: argparse.Namespace) -> tuple[Point, ...]:
    if args.fusion:
        return fusion.QUICK if args.quick else fusion.POINTS
    if args.kinds:
        return kinds.QUICK if args.quick else kinds.POINTS
    return QUICK if args.quick else CUDA if args.device.type == "cuda" else FULL


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time bn_ext against nn.BatchNorm1d, torch.compile and a copy.")
    parser.add_argument("--quick", action="store_true", help="within a minute: fewer points, short rounds, no rivals")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a line and measurement")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG: speed-ups, share of the limit, errors")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and bn_ext (default: torch's own)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="PATTERN",
        help='only matching points, by shape, dtype or layout: "65536x*", "float32", "32x64,128x256"; may be repeated',
    )
    parser.add_argument("--modes", default=",".join(DEFAULT_MODES), help=f"comma-separated, of {', '.join(MODES)}")
    parser.add_argument("--seconds", type=float, metavar="S", help="about how long to take, shared by the measurements")
    parser.add_argument("--replay", action="store_true", help="CUDA: time replays of a graph of calls, not calls")
    parser.add_argument("--no-rivals", action="store_true", help="without torch.compile (takes minutes) and oneDNN")
    parser.add_argument(
        "--memory",
        choices=MEMORY,
        default="default",
        help="how the C library serves large tensors (bench/README.md)",
    )
    parser.add_argument(
        "--fusion", action="store_true", help="time relu(bn(x)) and relu(bn(x) + r) instead (fusion.py)"
    )
    parser.add_argument(
        "--kinds", action="store_true", help="time padded and virtual batches and renorm instead (kinds.py)"
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing: tables and plot of a result file")
    args = parser.parse_args(argv)
    args.modes = args.modes.split(",")
    modes = DEFAULT_MODES if args.fusion or args.kinds else MODES
    unknown = sorted(set(args.modes) - set(modes))
    if unknown:
        parser.error(f"no such mode: {', '.join(unknown)}; there are {', '.join(modes)}")
    args.points = select(grid_of(args), args.filter)
    if not args.points:
        parser.error(f"no point of the grid matches --filter {' '.join(args.filter)}")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.seconds is not None and args.seconds <= 0:
        parser.error("--seconds must be positive")
    if args.fusion and args.kinds:
        parser.error("--fusion and --kinds are two runs")
    if (args.fusion or args.kinds) and args.plot:
        parser.error(f"--plot draws no {'--fusion' if args.fusion else '--kinds'}")
    if args.replay and args.device.type != "cuda":
        parser.error("--replay needs --device cuda")
    if args.device.type == "cuda" and not args.load and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device here")
    return args


def run(args: argparse.Namespace, log: Console) -> tuple[list[report.Record], int]:
    """Measure all that was asked for: the measurements, and how many points went wrong.

    Every line goes to the result file as soon as it is there; when all are, once more with the launches counted.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    set_memory(args.memory)
    torch.manual_seed(0)
    runner = Runner(args, log)
    found: list[report.Record] = []
    stream: IO[str] | None = None
    try:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            stream = args.json.open("w", encoding="utf-8")
        for part in runner.measure():
            found += part
            if stream:
                stream.writelines(json.dumps(record) + "\n" for record in part)
                stream.flush()
        runner.count_launches(found)
        if args.plot and found:
            log.print("measuring the error at growing mean/std")
            found += [{**runner.shared, **record} for record in accuracy.measure(args.device)]
    except KeyboardInterrupt:
        log.print("interrupted; what was measured so far:")
    finally:
        if stream:
            stream.seek(0)
            stream.writelines(json.dumps(record) + "\n" for record in found)
            stream.truncate()
            stream.close()
    return found, runner.failed


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    failed = 0
    # A pipe has no width of its own; the tables need a little more than rich assumes there.
    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
    if args.plot:
        # Before anything is measured, so that a missing package is told at once.
        import plot
    try:
        if args.kinds:
            return kinds.run(args, log, out, *time_to_measure(args), cpu_clock)
        if args.fusion:
            return fusion.run(args, log, out, *time_to_measure(args), cpu_clock)
        if args.load:
            found = [json.loads(line) for line in args.load.read_text(encoding="utf-8").splitlines() if line]
        else:
            found, failed = run(args, log)
    except BrokenPipeError:  # rich before 13.8 passes it on; not an error of a file
        raise
    except OSError as error:
        log.print(f"error: {error}", markup=False)
        return 1
    report.show(found, out)
    if args.plot and found:
        try:
            plot.draw(found, args.plot)
        except (OSError, ValueError) as error:
            log.print(f"error: {error}", markup=False)
            return 1
        out.print(f"plot: {args.plot}")
    if failed:
        log.print(f"{failed} of {len(args.points)} points went wrong, see above")
    return int(failed > 0)


if __name__ == "__main__":
    end(main)
