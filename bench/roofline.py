"""What the kernels should take on a GPU by the planner's model, and nn.BatchNorm1d's by the same. No GPU is needed.

    python bench/roofline.py [--device H200] [--bandwidth GB/s] [--page]

For the benchmark's grid in float32 and bfloat16, with --page a part of it: the bytes that a pass moves, and their time
at the device's bandwidth; the time that issuing its instructions takes; the time predicted, with launches, the meeting
of blocks and idle SMs; what most of that is; and how many times as long two others would take. `native`: ATen's
kernels, which read each tensor once for the sums and once for the result, in five launches forward (fill, statistics,
running statistics, result, the counter of batches) and three backward. `two-pass`: a kernel for the sums and one for
the result, as one writes them in Triton. Both are let off with their bytes and launches: every SM at work, no
instruction counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from scripting import end, needed

with needed():
    from bn_ext import launches
    from grid import CUDA, FLOAT32, OTHER_DTYPES, PERMUTED, TENSORS_READ, TENSORS_WRITTEN, Point

PASSES = ("forward", "backward")
LAUNCHES = {"native": {"forward": 5, "backward": 3}, "two-pass": {"forward": 2, "backward": 2}}
DTYPES = ("float32", "bfloat16")
HEAD = ("tensor", "pass", "MB", "x read", "memory", "issue", "predicted", "limit", *LAUNCHES)


def of_others(name: str, pass_: str, point: Point, bandwidth: float) -> float:
    """Microseconds of two sweeps, the second of which writes."""
    moved = point.bytes * (2 * TENSORS_READ[pass_] + TENSORS_WRITTEN[pass_])
    return launches.LAUNCH * LAUNCHES[name][pass_] + moved / bandwidth / 1e3


def limit(plan: dict[str, float], memory: float, issue: float, time: float) -> str:
    """What takes most of the time predicted."""
    waits = launches.LAUNCH * plan["launches"] + plan["meeting"]
    busy = max(memory, issue)
    parts = {"launch": waits, "idle SMs": time - waits - busy, "instructions" if issue > memory else "memory": busy}
    return max(parts, key=lambda part: parts[part])


def row(pass_: str, point: Point, bandwidth: float, on: launches.Device) -> tuple[str, ...]:
    """A row of HEAD; times are in microseconds."""
    plan = launches.plan_of(pass_, on, point.meta())
    moved = plan["read_bytes"] + plan["write_bytes"]
    memory, issue = moved / bandwidth / 1e3, launches.issue_time(pass_, point.dtype, moved, on) or 0.0
    time = launches.predicted(pass_, plan, point.dtype, bandwidth, on)
    sizes = str(point.shape) + (" from (N, L, C)" if point.layout == "nlc" else "")
    return (
        f"{sizes} {point.dtype}",
        pass_,
        f"{moved / 1e6:.3g}",
        f"{plan['read_bytes'] / point.bytes / TENSORS_READ[pass_]:.2f}",
        *(f"{value:.1f}" for value in (memory, issue, time)),
        limit(plan, memory, issue, time),
        *(f"{of_others(name, pass_, point, bandwidth) / time:.2f}" for name in LAUNCHES),
    )


def table(points: Iterable[Point], on: launches.Device, bandwidth: float) -> list[tuple[str, ...]]:
    """HEAD, and two rows for each of the points."""
    return [HEAD, *(row(name, point, bandwidth, on) for point in points if point.dtype in DTYPES for name in PASSES)]


def page(on: launches.Device, bandwidth: float) -> list[str]:
    """The table as docs/gpu.md has it."""
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table((*FLOAT32, *PERMUTED, *OTHER_DTYPES), on, bandwidth))
    return [head, "| --- " * len(HEAD) + "|", *rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="H200", help=f"{', '.join(launches.PRESETS)}, or cuda:0; default: H200")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="default: the data sheet's")
    parser.add_argument("--page", action="store_true", help="as docs/gpu.md has it")
    args = parser.parse_args()
    try:
        on = launches.device(args.device)
    except ValueError as error:
        parser.error(str(error))
    bandwidth = args.bandwidth or on.bandwidth
    if not bandwidth or bandwidth < 0:
        parser.error(f"give the bandwidth of {on.name} with --bandwidth, in GB/s")
    if args.page:
        print("\n".join(page(on, bandwidth)))
        return 0
    cells = table(CUDA, on, bandwidth)
    widths = [max(len(line[k]) for line in cells) for k in range(len(HEAD))]
    print(f"{on.name}, {bandwidth:g} GB/s; times in microseconds. A model, not a measurement.\n")
    for name, pass_, *numbers in cells:
        right = (cell.rjust(w) for cell, w in zip(numbers, widths[2:], strict=True))
        print("  ".join((name.ljust(widths[0]), pass_.ljust(widths[1]), *right)))
    return 0


if __name__ == "__main__":
    end(main)
