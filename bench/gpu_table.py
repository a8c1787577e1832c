"""What scripts/gpu_check.sh found, in one table: tests by their logs, speed by the result files beside them.

    python bench/gpu_table.py FOLDER

By mode and type: how many tensors, how many times faster than nn.BatchNorm1d (geometric mean, and the worst), the share
of the copy's rate that tensors beyond the cache reach (median, in the bytes that must move), and the time that the
model of `python -m bn_ext.launches` predicts at the copy's rate, over the time measured (median).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from scripting import end, needed

with needed():
    from bn_ext import launches
    from grid import PASSES
    from report import Row, geometric_mean, label, rows

LARGE = 32 << 20  # bytes of a tensor
TESTS = ("cuda-tests", "large-tests", "suite")
COUNT = re.compile(r"\d+ (?:passed|failed|skipped|errors?)")
FILES = ("bench-replay", "bench-calls", "bench-compile")  # not bench-fusion, whose contenders are others


def tests(folder: Path) -> Iterator[str]:
    """A line for each log of tests: pytest's counts, the last in it."""
    for name in TESTS:
        log = folder / f"{name}.log"
        if log.exists():
            counts = [COUNT.findall(line) for line in log.read_text().splitlines() if COUNT.match(line)]
            yield f"{name:<14} {', '.join(counts[-1]) if counts else 'no counts'}"


def planner(title: str) -> launches.Device | None:
    """The GPU of that name as the planner knows it."""
    plain = re.sub(r"[^a-z0-9]", "", title.lower())
    found = [on for name, on in launches.PRESETS.items() if re.sub(r"[^a-z0-9]", "", name.lower()) in plain]
    return found[0] if len(found) == 1 else None


def predicted(row: Row, on: launches.Device) -> float | None:
    """Microseconds by the planner's model, at the rate of the copy."""
    copy = row.by_contender.get("copy")
    names = ("inference",) if row.mode == "eval" else PASSES.get(row.mode, ())
    if copy is None or not {*names} <= {*launches.PASSES} or not names:
        return None
    plans = [(name, launches.plan_of(name, on, row.point.meta())) for name in names]
    return sum(launches.predicted(name, plan, row.point.dtype, copy["gbps"], on) for name, plan in plans)


def speed(found: list[Row]) -> Iterator[str]:
    """A line for each mode and type of one file."""
    for mode, dtype in dict.fromkeys((row.mode, row.point.dtype) for row in found):
        group = [row for row in found if (row.mode, row.point.dtype) == (mode, dtype) and "bn_ext" in row.by_contender]
        compared = [(row.speedup, row) for row in group if row.speedup is not None]
        if not compared:
            continue
        worst, where = min(compared, key=lambda one: one[0])
        large = [row for row in group if row.point.bytes >= LARGE]
        shares = [row.by_contender["bn_ext"]["limit_fraction"] for row in large]
        shares = [share for share in shares if share is not None]
        on = planner(group[0].by_contender["bn_ext"]["device_name"])
        models = [(predicted(row, on), row) for row in large] if on else []
        model = [time / row.by_contender["bn_ext"]["median_us"] for time, row in models if time is not None]
        mean = geometric_mean(value for value, _ in compared)
        yield (
            f"{mode:<17}{dtype:<10}{len(compared):>5}{mean:>8.2f}{worst:>8.2f}"
            f"{f'{statistics.median(shares):.0%}' if shares else '-':>9}"
            f"{f'{statistics.median(model):.2f}' if model else '-':>8}  {label(where.point)}"
        )


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__.split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    lines = list(tests(folder))
    for name in FILES:
        file = folder / f"{name}.jsonl"
        found = rows(json.loads(line) for line in file.read_text().splitlines() if line) if file.exists() else []
        if table := list(speed(found)):
            title = f"{name}: mode, type"
            lines += [
                "",
                f"{title:<27}{'tensors':>5}{'vs nn':>6}{'worst':>8}{'of copy':>9}{'model':>8}  the worst",
                *table,
            ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    end(main)
