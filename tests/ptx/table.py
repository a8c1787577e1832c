"""What ran where, of the runs whose processes left it in a folder (BN_EXT_TALLY): `make test-ptx` ends with it.

python -m ptx.table FOLDER

First pass by exchange: the calls on each machine, and how many of the pairs of walk and type they were of. Then what
was asked for beside the plain batch.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from simt import tally

Of = tuple[str, ...]


def lines(heading: Sequence[str], rows: dict[Of, dict[str, str]], machines: Sequence[str]) -> list[str]:
    """A table of Markdown: rows' names, then a cell a machine."""
    told = [[*heading, *machines], ["---"] * (len(heading) + len(machines))]
    told += [[*of, *(cells.get(machine, "-") for machine in machines)] for of, cells in rows.items()]
    return [f"| {' | '.join(row)} |" for row in told]


def tables(folder: Path) -> list[str]:
    calls: dict[Of, Counter[str]] = defaultdict(Counter)
    pairs: dict[tuple[Of, str], set[Of]] = defaultdict(set)
    asked: dict[Of, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for row, count in tally.read(folder):
        of, machine = (row["pass"], row["exchange"]), row["machine"]
        calls[of][machine] += count
        pairs[of, machine].add((row["walk"], row["dtype"]))
        asked[row["batch"], row["follows"] or "-"][machine] += count
        total[machine] += count
    machines = sorted(total, key=lambda name: (len(name), name))
    first = {of: {m: f"{n} ({len(pairs[of, m])})" for m, n in calls[of].items()} for of in sorted(calls)} | {
        ("all", ""): {m: str(n) for m, n in total.items()}
    }
    second = {of: {m: str(n) for m, n in asked[of].items()} for of in sorted(asked)}
    return [
        *lines(("pass", "exchange"), first, machines),
        "",
        *lines(("batch", "with"), second, machines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print("\n".join(tables(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
