"""From measurements, the dicts of the result file, to tables and a closing summary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from grid import MODES, RIVALS, Point

Record = dict[str, Any]
NOT_CONTIGUOUS = {"nlc": " (N,L,C)"}
# The mode of records of accuracy.py, which hold errors and no times.
ACCURACY = "accuracy"
# From which share of the processors' time for others on, or load average in older files, times are of a busy machine.
BUSY_SHARE, BUSY_LOAD = 0.1, 0.5


@dataclass(frozen=True)
class Row:
    """All contenders at one point in one mode."""

    point: Point
    mode: str
    by_contender: dict[str, Record]

    @property
    def speedup(self) -> float | None:
        return ratio(self, "nn", "bn_ext")

    @property
    def verdict(self) -> str:
        return verdict(self, "bn_ext", "nn")


def verdict(row: Row, ours: str, rival: str) -> str:
    """Against a rival: "faster" or "slower" when the ranges from p20 to p80 are apart, else "even"."""
    mine, theirs = row.by_contender.get(ours), row.by_contender.get(rival)
    if mine is None or theirs is None:
        return "unknown"
    if mine["p20_us"] > theirs["p80_us"]:
        return "slower"
    return "faster" if mine["p80_us"] < theirs["p20_us"] else "even"


def ratio(row: Row, slow: str, fast: str) -> float | None:
    """How many times longer ``slow`` takes than ``fast``; None when one of them was not measured."""
    if slow not in row.by_contender or fast not in row.by_contender:
        return None
    return float(row.by_contender[slow]["median_us"] / row.by_contender[fast]["median_us"])


def rows(records: Iterable[Record]) -> list[Row]:
    """Group measurements of time by point and mode, in the order in which they first appear."""
    grouped: dict[tuple[Point, str], dict[str, Record]] = {}
    for record in records:
        if record["mode"] != ACCURACY:
            grouped.setdefault((point_of(record), record["mode"]), {})[record["contender"]] = record
    return [Row(point, mode, found) for (point, mode), found in grouped.items()]


def point_of(record: Record) -> Point:
    """The tensor that a record is about."""
    return Point(tuple(record["shape"]), record["dtype"], record["layout"])


def errors(records: Iterable[Record]) -> dict[tuple[Point, str], dict[float, float]]:
    """What accuracy.py measured: by tensor and contender, the error at each mean/std."""
    curves: dict[tuple[Point, str], dict[float, float]] = {}
    for record in records:
        if record["mode"] == ACCURACY:
            curve = curves.setdefault((point_of(record), record["contender"]), {})
            curve[record["mean_over_std"]] = record["error"]
    return curves


def busy(record: Record) -> str | None:
    """A warning where the machine had other work when the run of this record began."""
    share, load = record.get("busy_share"), record.get("load_average")
    if share is not None:  # the load average still holds the measurement before this one
        what = f"others had {share:.0%} of the processors" if share > BUSY_SHARE else None
    else:
        what = f"load average {load:.1f}" if load is not None and load > BUSY_LOAD else None
    return f"measured on a busy machine ({what}): ratios only" if what else None


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of at least one positive number."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def label(point: Point) -> str:
    """A point in a table or a figure: shape, dtype and, when it is not the usual one, the layout."""
    return f"{point.name} {point.dtype}{NOT_CONTIGUOUS.get(point.layout, '')}"


def table(found: list[Row], mode: str) -> Table:
    """One mode's table: median microseconds of all contenders, and what they mean."""
    out = Table(title=f"{mode.replace('_', ' + ')}, microseconds (median)", title_justify="left")
    out.add_column("shape, dtype")
    rivals = [name for name in RIVALS if any(name in row.by_contender for row in found)]
    counted = any(record.get("launches") for row in found for record in row.by_contender.values())
    headings = ["bn_ext", "p20-p80", "nn", "copy", "vs nn", "GB/s", "of limit"]
    headings += [heading for name in rivals for heading in (name, f"vs {name}")] + ["launches"] * counted
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    colours = {"faster": "green", "slower": "red"}
    for row in (row for row in found if row.mode == mode):
        ours = row.by_contender.get("bn_ext")
        medians = {name: record["median_us"] for name, record in row.by_contender.items()}
        colour = colours.get(row.verdict)
        speedup = _times(row.speedup)
        cells = [
            _number(medians.get("bn_ext")),
            f"{_number(ours['p20_us'])}-{_number(ours['p80_us'])}" if ours else "-",
            _number(medians.get("nn")),
            _number(medians.get("copy")),
            f"[{colour}]{speedup}[/]" if colour else speedup,
            _number(ours["gbps"]) if ours else "-",
            f"{ours['limit_fraction']:.0%}" if ours and ours["limit_fraction"] is not None else "-",
        ]
        for name in rivals:
            cells += [_number(medians.get(name)), _times(ratio(row, name, "bn_ext"))]
        if counted:
            both = (row.by_contender.get(name, {}).get("launches") for name in ("bn_ext", "nn"))
            cells.append(" : ".join("-" if count is None else str(count) for count in both))
        out.add_row(label(row.point), *cells)
    return out


def means(found: list[Row]) -> list[str]:
    """One line for each mode, dtype and layout: the geometric mean of the speed-up, its least and its largest value."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in found:
        if row.speedup is not None:
            groups.setdefault((row.mode, row.point.dtype, row.point.layout), []).append(row.speedup)
    return [
        f"{mode:<17} {dtype + NOT_CONTIGUOUS.get(layout, ''):<17} {geometric_mean(values):5.2f}x   "
        f"(from {min(values):.2f}x to {max(values):.2f}x, points: {len(values)})"
        for (mode, dtype, layout), values in sorted(groups.items(), key=lambda item: MODES.index(item[0][0]))
    ]


def compiled_means(found: list[Row]) -> list[str]:
    """Likewise of both compiled by torch.compile, for each mode."""
    lines = []
    for mode in MODES:
        values = [v for row in found if row.mode == mode and (v := ratio(row, "compile", "compiled")) is not None]
        if values:
            span = f"(from {min(values):.2f}x to {max(values):.2f}x, points: {len(values)})"
            lines.append(f"{mode:<17} {'all':<17} {geometric_mean(values):5.2f}x   {span}")
    return lines


def comparison(found: list[Row]) -> list[str]:
    """Where bn_ext is slower than native: beyond noise, a line each; within it, by name when it is more than 5 %."""
    compared = [row for row in found if row.speedup is not None]
    slower = [row for row in compared if row.verdict == "slower"]
    within = [row for row in compared if row.verdict == "even" and (row.speedup or 0) < 0.95]
    lines = [f"slower than nn.BatchNorm1d beyond noise at {len(slower)} of {len(compared)} measurements"]
    for row in slower:
        ours, native = row.by_contender["bn_ext"], row.by_contender["nn"]
        lines.append(
            f"  {row.point}, {row.mode}: {ours['median_us']:.1f} us ({ours['p20_us']:.1f}-{ours['p80_us']:.1f}) "
            f"against {native['median_us']:.1f} us ({native['p20_us']:.1f}-{native['p80_us']:.1f})"
        )
    if within:
        names = "; ".join(f"{row.point}, {row.mode} ({row.speedup:.2f}x)" for row in within)
        lines.append(f"slower in the median by more than 5 %, but within noise: {names}")
    return lines


def error_lines(records: list[Record], ratio: float = 1e4) -> list[str]:
    """One line for each tensor of accuracy.py: the errors of both at one mean/std."""
    curves = errors(records)
    return [
        f"error at mean/std {ratio:g}, {point}: {ours[ratio]:.2g} standard deviations, "
        f"nn.BatchNorm1d {curves[point, 'nn'][ratio]:.2g}"
        for (point, contender), ours in curves.items()
        if contender == "bn_ext" and ratio in ours and ratio in curves.get((point, "nn"), {})
    ]


def show(records: list[Record], console: Console) -> None:
    """Print the tables and the summary."""
    if not records:
        console.print("nothing was measured")
        return
    found = rows(records)
    for mode in MODES:
        if any(row.mode == mode for row in found):
            console.print(table(found, mode))
    first = records[0]
    if first["device"].startswith("cuda"):
        where = f"{first['device_name']}, driver {first['driver']}, torch {first['torch']}, bn_ext {first['bn_ext']}"
        how = {"calls": "Calls from Python, events around blocks of them", "replay": "Replays of a CUDA graph of calls"}
        timed = f"{how[first['timing']]}; launches are bn_ext : nn.\n"
    else:
        where = (
            f"{first['device_name']}, {first['threads']} threads, torch {first['torch']} ({first['torch_isa']}), "
            f"bn_ext {first['bn_ext']} ({first['isa']})"
        )
        timed = ""
    console.print(
        f"{where}, commit {first['commit']}",
        timed + "GB/s counts the least bytes; the limit is dst.copy_(src) of the same tensor in the same run.",
        sep="\n",
    )
    if found and (warning := busy(first)):
        console.print(warning, style="yellow")
    lines = means(found)
    if lines:
        console.print("\nspeed-up over nn.BatchNorm1d, geometric mean", *lines, sep="\n")
        if compiled := compiled_means(found):
            console.print("\nspeed-up over nn.BatchNorm1d, both compiled by torch.compile", *compiled, sep="\n")
        console.print("", *comparison(found), sep="\n")
    if lines := error_lines(records):
        console.print("", *lines, sep="\n")
