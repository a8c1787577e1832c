"""The figure of a result file: achieved bandwidth against tensor size, and speed-ups, one column a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from grid import MODES
from report import Record, Row, label, rows

matplotlib.use("Agg")

# The backend has to be chosen before this import.
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLES = {
    "copy": ("#777777", "copy of the same size (limit)"),
    "nn": ("#1f77b4", "nn.BatchNorm1d"),
    "compile": ("#2ca02c", "torch.compile(nn.BatchNorm1d)"),
    "bn_ext": ("#ff7f0e", "bn_ext"),
}


def _bandwidth(axes: Any, found: list[Row]) -> None:
    """GB/s over the tensor's size for float32 in the default layout; 2-D inputs are discs, 3-D ones triangles."""
    chosen = [row for row in found if row.point.dtype == "float32" and row.point.layout == "contiguous"]
    chosen.sort(key=lambda row: row.point.bytes)
    for contender, (colour, title) in STYLES.items():
        pairs = [(r, r.by_contender[contender]["gbps"]) for r in chosen if contender in r.by_contender]
        for dimensions, marker in ((2, "o"), (3, "^")):
            part = [(row.point.bytes / 1e6, gbps) for row, gbps in pairs if len(row.point.shape) == dimensions]
            if part:
                text = title if dimensions == 2 or all(len(r.point.shape) == 3 for r, _ in pairs) else None
                style = "--" if contender == "copy" else "-"
                axes.plot(*zip(*part, strict=True), style, color=colour, marker=marker, linewidth=1, label=text)
    axes.set(xscale="log", yscale="log", xlabel="input, MB (discs: 2-D, triangles: 3-D)", ylabel="GB/s (least bytes)")
    axes.grid(alpha=0.3, which="both")


def _speedups(axes: Any, found: list[Row]) -> None:
    """A bar for each point: how many times faster than nn.BatchNorm1d; a diamond for torch.compile."""
    compared = [row for row in found if row.speedup is not None][::-1]
    places = list(range(len(compared)))
    names = [label(row.point) for row in compared]
    colours = ["#d62728" if row.verdict == "slower" else STYLES["bn_ext"][0] for row in compared]
    speedups = [row.speedup or 0.0 for row in compared]
    # Bars start at 1, so that what is slower than native points the other way.
    axes.barh(places, [s - 1 for s in speedups], left=1, color=colours)
    # The legend shows the usual colour even where the first bar is a red one.
    axes.barh(0, 0, left=1, color=STYLES["bn_ext"][0], label="bn_ext (red: slower beyond noise)")
    compiled = [
        (row.by_contender["nn"]["median_us"] / row.by_contender["compile"]["median_us"], place)
        for place, row in zip(places, compared, strict=True)
        if "compile" in row.by_contender
    ]
    if compiled:
        axes.plot(*zip(*compiled, strict=True), "D", color=STYLES["compile"][0], label="torch.compile", markersize=5)
    for place, value in zip(places, speedups, strict=True):
        end = (max(value, 1), place)
        axes.annotate(f"{value:.2f}x", end, xytext=(3, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    values = speedups + [value for value, _ in compiled] + [1.0]
    axes.set(xscale="log", xlabel="times faster than nn.BatchNorm1d")
    axes.set_xlim(min(0.45, 0.9 * min(values)), max(2.2, 1.5 * max(values)))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.02)
    axes.grid(alpha=0.3, axis="x")


def draw(records: list[Record], path: Path) -> None:
    """Write the figure of ``records`` as a PNG; the folder is made when it is missing."""
    found = rows(records)
    modes = [mode for mode in MODES if any(row.mode == mode for row in found)]
    height = 5 + 0.28 * max(sum(row.mode == mode for row in found) for mode in modes)
    figure, grid = plt.subplots(2, len(modes), figsize=(6 * len(modes), height), squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.1)
    for column, mode in enumerate(modes):
        chosen = [row for row in found if row.mode == mode]
        grid[0, column].set_title(mode.replace("_", " + "))
        _bandwidth(grid[0, column], chosen)
        _speedups(grid[1, column], chosen)
    # One legend for each row of the figure serves all modes; the first column has whatever was measured.
    for axes, place in ((grid[0, 0], "outside lower left"), (grid[1, 0], "outside lower right")):
        handles, titles = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, titles, loc=place, ncols=len(titles), fontsize=9)
    first = records[0]
    timing = first.get("timing", "calls")
    how = f"{first['threads']} threads" if not first["device"].startswith("cuda") else f"timed by {timing}"
    figure.suptitle(
        f"{first['device_name']}, {how}, torch {first['torch']}, bn_ext {first['bn_ext']}, commit {first['commit']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
