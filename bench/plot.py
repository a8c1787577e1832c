"""The figure of a result file: speed-ups, the share of the memory's limit, and errors; whichever was measured.

python bench/plot.py result.jsonl result.png
python bench/plot.py result.jsonl accuracy.jsonl result.png    # errors of bench/accuracy.py --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripting import end, needed

with needed():
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    from grid import MODES
    from report import ACCURACY, Record, Row, busy, errors, rows

OURS, NATIVE, SLOWER, PALE = "#e8700a", "#1f77b4", "#d62728", "#f7b77e"
SIZES = {"font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5}
# At 9 inches wide and shown 900 pixels wide, a letter of 8.5 points is 12 pixels high.
WIDTH, DPI = 9, 200
MARKERS = {"forward": ("o", "#4c72b0"), "forward_backward": ("s", "#8172b3"), "eval": ("^", "#3f9a58")}
SPARE_MARKERS = (("D", "#937860"), ("v", "#c44e52"), ("P", "#777777"))

Panel = Callable[[Any], None]


def title(mode: str) -> str:
    """A mode in words."""
    return mode.replace("forward_backward", "forward + backward").replace("_", " ")


def megabytes(size: float) -> str:
    """A size in bytes for people, as a number of two digits and a unit."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.2g} {unit}" if size < 10 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2g} GB"


def speedups(axes: Any, found: list[Row], mode: str, dtype: str) -> None:
    """A bar for each tensor, the smallest on top: how many times faster than nn.BatchNorm1d, from 1 to either side."""
    # What was made as (N, L, C) follows the same shape in the usual layout.
    found = sorted(found, key=lambda row: (row.point.bytes, row.point.name, row.point.layout), reverse=True)
    usual: dict[str, Any] = {"facecolor": OURS}
    permuted: dict[str, Any] = {"facecolor": PALE, "hatch": "///", "edgecolor": OURS, "linewidth": 0}
    slower: dict[str, Any] = {"facecolor": SLOWER}
    values = [row.speedup or 1.0 for row in found]
    for place, (row, value) in enumerate(zip(found, values, strict=True)):
        style = permuted if row.point.layout == "nlc" else usual
        if row.verdict == "slower":
            style = style | slower
        axes.barh(place, value - 1, left=1, height=0.72, **style)
        # Always to the right of the line, also where the bar goes left: the other side has the names.
        end_of_bar = (max(value, 1), place)
        axes.annotate(f"{value:.2f}", end_of_bar, xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{row.point.name}, {megabytes(row.point.bytes)}" for row in found])
    axes.tick_params(axis="y", length=0)
    axes.set(title=f"speed-up, {title(mode)}, {dtype}", xlabel="times faster than nn.BatchNorm1d", xscale="log")
    least, most = min(0.8, 0.9 * min(values)), max(2.0, *values)
    axes.set_xlim(least, most * (most / least) ** 0.2)  # a sixth of the width for the last figure
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, axis="x")
    layouts = {row.point.layout for row in found}
    keys = [Patch(**usual, label="contiguous")] if "contiguous" in layouts else []
    if "nlc" in layouts:
        keys.append(Patch(**permuted, label="made as (N, L, C)"))
    if any(row.verdict == "slower" for row in found):
        keys.append(Patch(**slower, label="slower beyond noise"))
    # Room above the bars for as many lines as the legend has.
    axes.set_ylim(-0.6, max(4, len(found)) - 0.4 + 0.9 * -(-len(keys) // 2))
    axes.legend(handles=keys, loc="upper center", ncols=2, frameon=False, borderaxespad=0.1)


def limits(axes: Any, found: dict[str, list[Row]], dtype: str) -> None:
    """For each mode a marker for each tensor: the share of the memory's limit, a plain copy, over the input's size."""
    spare = iter(SPARE_MARKERS)
    most = 1.0
    for mode, chosen in found.items():
        marker, colour = MARKERS.get(mode) or next(spare)
        sizes = [row.point.bytes / 1e6 for row in chosen]
        shares = [row.by_contender["bn_ext"]["limit_fraction"] for row in chosen]
        axes.plot(sizes, shares, marker, color=colour, label=title(mode), markersize=5, alpha=0.85)
        most = max(most, *shares)
    axes.axhline(1, color="#555555", linewidth=1, linestyle="--")
    axes.set(title=f"share of the memory's limit, {dtype}", xlabel="input, MB", xscale="log", ylim=(0, 1.15 * most))
    axes.annotate("copy of the same size", (0, 1), xycoords=("axes fraction", "data"), xytext=(4, 3),
                  textcoords="offset points", fontsize=8.5, color="#555555")  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def accuracy(axes: Any, records: list[Record]) -> None:
    """The errors that accuracy.py measured over mean/std: a curve for each norm and tensor."""
    colours = {"bn_ext": (OURS, "bn_ext"), "nn": (NATIVE, "nn.BatchNorm1d")}
    styles = {2: ("o", "-", "(N, C)"), 3: ("^", "--", "(N, C, L)")}
    for (point, contender), curve in errors(records).items():
        colour, name = colours[contender]
        marker, dash, shape = styles[len(point.shape)]
        axes.plot(list(curve), list(curve.values()), color=colour, marker=marker, linestyle=dash, linewidth=1.2,
                  markersize=4.5, label=f"{name}, {shape}")  # fmt: skip
    axes.set(title="error of the output, float32", xlabel="mean / standard deviation", ylabel="standard deviations")
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(top=100 * axes.get_ylim()[1])  # room for the legend
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def panels(records: list[Record]) -> dict[str, Panel]:
    """The panels that these records have the figures for, by name.

    float32 and forward + backward where they were measured, else the first of what was.
    """
    timed = [record for record in records if {"mode", "contender", "shape", "layout"} <= record.keys()]
    timed = [record for record in timed if "chain" not in record]
    found = rows(timed)
    made: dict[str, Panel] = {}
    compared = [row for row in found if row.speedup is not None]
    if compared:
        dtype, mode = _first(compared, "float32", "forward_backward")
        chosen = [row for row in compared if row.point.dtype == dtype and row.mode == mode]
        made["speedups"] = partial(speedups, found=chosen, mode=mode, dtype=dtype)
    shared = [row for row in found if row.by_contender.get("bn_ext", {}).get("limit_fraction") is not None]
    shared = [row for row in shared if row.point.layout == "contiguous"]
    if shared:
        dtype, _ = _first(shared, "float32", "")
        by_mode = {mode: [r for r in shared if r.mode == mode and r.point.dtype == dtype] for mode in MODES}
        wanted = [mode for mode in by_mode if by_mode[mode] and mode in MARKERS] or [m for m in by_mode if by_mode[m]]
        made["limits"] = partial(limits, found={mode: by_mode[mode] for mode in wanted}, dtype=dtype)
    if errors(timed):
        made["accuracy"] = partial(accuracy, records=timed)
    return made


def _first(found: list[Row], dtype: str, mode: str) -> tuple[str, str]:
    """This dtype and this mode where a row has them, else those of the first row that is left."""
    found = [row for row in found if row.point.dtype == dtype] or found
    found = [row for row in found if row.mode == mode] or found
    return found[0].point.dtype, found[0].mode


def heading(records: list[Record]) -> str:
    """What was measured, on what, and a warning where the machine was busy."""
    timed = [record for record in records if record["mode"] != ACCURACY]
    first = (timed or records)[0]
    how = f"{first['threads']} threads"
    if first["device"].startswith("cuda"):
        how = f"timed by {first.get('timing', 'calls')}"
    place = f"{first['device_name']}, {how}, torch {first['torch']}, commit {first['commit']}"
    lines = [f"bn_ext {first['bn_ext']} against nn.BatchNorm1d", place]
    # Errors may come from a file of their own.
    other = next((record for record in records if record["mode"] == ACCURACY), first)
    if (other["device_name"], other["commit"]) != (first["device_name"], first["commit"]):
        lines.append(f"errors: {other['device_name']}, {other['threads']} threads, commit {other['commit']}")
    if timed and (warning := busy(first)):
        lines.append(warning)
    return "\n".join(lines)


def figure(records: list[Record]) -> Figure:
    """The figure of ``records``. Raises ValueError where they have nothing for any panel."""
    import matplotlib

    made = panels(records)
    if not made:
        raise ValueError("nothing to draw: no record compares bn_ext with nn.BatchNorm1d, a copy or float64")
    names = list(made)
    # The bars take the left half over the full height; what is alone takes all.
    mosaic = [["speedups", name] for name in names[1:]] if "speedups" in names and len(names) > 1 else [names]
    with matplotlib.rc_context(SIZES):
        drawn = Figure(figsize=(WIDTH, 6.6), layout="constrained")
        axes = drawn.subplot_mosaic(mosaic)
        for name, panel in made.items():
            panel(axes[name])
        bars = len(axes["speedups"].get_yticks()) if "speedups" in axes else 0
        drawn.set_figheight(max(6.0 if len(names) > 2 else 4.0, 1.6 + 0.27 * bars))
        drawn.suptitle(heading(records), fontsize=10)
    return drawn


def draw(records: list[Record], path: Path) -> None:
    """Write the figure of ``records`` as a PNG; the folder is made when it is missing."""
    drawn = figure(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=DPI)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw result files of bench_batchnorm.py and accuracy.py.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl", help="what --json wrote")
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    args = parser.parse_args(argv)
    try:
        lines = [line for file in args.files for line in file.read_text(encoding="utf-8").splitlines() if line]
        draw([json.loads(line) for line in lines], args.picture)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    end(main)
