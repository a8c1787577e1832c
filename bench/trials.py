"""Tables of what was trained from several seeds, as sequences.py and small_batches.py of examples/ and docs/ show it.

A table is a pair of its heading and its rows, all of them texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from rich import table

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

# How the test recordings come: alone, padded to so many steps, and so padded as one batch of which the statistics are.
EVALUATED, OF_BATCH = ("alone", "29", "60", "120"), ("batch 29", "batch 60", "batch 120")


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records by their values of keys, in the order in which these first appear."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return found


def spread(values: Sequence[float]) -> str:
    """The mean in per cent and, where they differ, how far the farthest is from it: 98.4 ±0.6."""
    middle = 100 * mean(values)
    farthest = f"{max(abs(100 * value - middle) for value in values):.1f}"
    return f"{middle:.1f}" + (f" ±{farthest}" if farthest != "0.0" else "")


def sequences(records: Iterable[Record], places: Sequence[str], change: str) -> Table:
    """A row for each norm and padding of training: the accuracy at each of places, the largest change of a logit."""
    rows = []
    for (title, trained_at), seeds in grouped(records, "title", "trained_at").items():
        accuracy = [spread([record["accuracy"][place] for record in seeds]) for place in places]
        rows.append([title, str(trained_at), *accuracy, f"{max(record[change] for record in seeds):.1g}"])
    return ["norm", "trained at", *(place.replace("batch ", "") for place in places), "change"], rows


def small_batches(records: Iterable[Record]) -> Table:
    """A row for each norm, a column for each size of a batch."""
    records = list(records)
    sizes = sorted({record["batch"] for record in records})
    rows = []
    for (title,), mine in grouped(records, "title").items():
        found = {size: spread([r["accuracy"] for r in seeds]) for (size,), seeds in grouped(mine, "batch").items()}
        rows.append([title, *(found.get(size, "-") for size in sizes)])
    return ["norm", *map(str, sizes)], rows


def printable(made: Table, title: str) -> table.Table:
    """The same for a terminal of 80 columns: what follows the mean goes to a line of its own."""
    heading, rows = made
    drawn = table.Table(*heading, title=title)
    for row in rows:
        drawn.add_row(*(cell.replace(" ±", "\n±") for cell in row))
    return drawn
