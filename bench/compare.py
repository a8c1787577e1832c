"""Two result files side by side: what a change did to every measurement. `make bench-compare BASE=file` measures first.

    python bench/compare.py base.jsonl new.jsonl

Times of two runs on one machine differ by more than most changes, so the figure that counts is relative: how many times
faster than nn.BatchNorm1d, or of the copy limit where that was not measured, each run was; new over base.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from scripting import end, needed

with needed():
    from rich.console import Console
    from rich.table import Table

    from report import Row, geometric_mean, label, ratio, rows

YARDSTICKS = ("nn", "copy")


def load(path: Path) -> list[Row]:
    """Read a result file. Raises SystemExit in one sentence where it is none."""
    try:
        return rows(json.loads(line) for line in path.read_text().splitlines() if line)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path} is not a result of bench_batchnorm.py --json: {error}") from error


def relative(row: Row) -> tuple[float, str] | None:
    """(how many times faster than the yardstick, its name) of our time in one measurement."""
    for name in YARDSTICKS:
        if (value := ratio(row, name, "bn_ext")) is not None:
            return value, name
    return None


def changes(base: list[Row], new: list[Row]) -> list[tuple[Row, float, float, str]]:
    """(measurement, base's figure, new's figure, yardstick) of all that both files have."""
    before = {(row.point, row.mode): row for row in base}
    found = []
    for row in new:
        old = before.get((row.point, row.mode))
        first, second = relative(old) if old else None, relative(row)
        if first and second and first[1] == second[1]:
            found.append((row, first[0], second[0], first[1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two result files of bench_batchnorm.py.")
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    found = changes(load(args.base), load(args.new))
    if not found:
        sys.exit("The two files have no measurement in common.")
    table = Table(
        title=f"{args.new.name} against {args.base.name}: times faster than the yardstick", title_justify="left"
    )
    for heading in ("shape, dtype", "mode", "yardstick", "base", "new", "new / base"):
        table.add_column(heading, justify="left" if heading in ("shape, dtype", "mode", "yardstick") else "right")
    for row, first, second, name in found:
        change = second / first
        colour = "green" if change > 1.1 else "red" if change < 0.9 else "default"
        table.add_row(label(row.point), row.mode, name, f"{first:.2f}", f"{second:.2f}", f"[{colour}]{change:.2f}[/]")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for mode in dict.fromkeys(row.mode for row, *_ in found):
        values = [second / first for row, first, second, _ in found if row.mode == mode]
        console.print(
            f"{mode:<17} geometric mean of new / base {geometric_mean(values):.3f} ({len(values)} measurements)"
        )
    return 0


if __name__ == "__main__":
    end(main)
