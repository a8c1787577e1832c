"""Measure anew everything that README.md and docs/ quote: every result file, one after the other, on a quiet machine.

    python bench/bench_all.py --name cpu-xeon        # writes bench/results/cpu-xeon-2t.jsonl and the others
    python bench/bench_all.py --name mine --only memory,pairing
    python bench/bench_all.py --list

Takes about an hour on two cores. Refuses a machine on which something else runs, and sources that are not committed, as
figures of either say nothing to others; --anyway measures all the same.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripting import end, needed

with needed():
    from environment import busy_share, commit, tcmalloc
    from report import BUSY_SHARE

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
_PR_SET_THP_DISABLE = 41  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """One result file: its name behind --name, the commands whose lines it holds, and what they run under.

    With ``drawn`` the command draws its figure too, beside the file.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    preloaded: bool = False
    small_pages: bool = False
    drawn: bool = False


def bench(*options: str) -> tuple[tuple[str, ...], ...]:
    """Return the one command that runs the benchmark with these options."""
    return (("bench_batchnorm.py", *options),)


FLOAT32 = ("--filter", "float32")
SECOND_ORDER = bench("--threads", "2", "--no-rivals", "--modes", "double_backward,gradient_penalty")
LARGE = "8192x512,65536x256,64x128x1024,16x512x1024,4x4x1000000"
FRESH = bench(
    *("--threads", "2", "--no-rivals", "--memory", "fresh"),
    *("--modes", "forward,forward_backward,eval", "--filter", LARGE, *FLOAT32),
)
ONE_THREAD = ("--threads", "1", "--no-rivals", "--memory", "recycled", "--modes", "forward,backward,eval", *FLOAT32)
PARTS = (
    Part("-2t", bench("--threads", "2")),
    Part("-2t-tcmalloc", bench("--threads", "2", "--no-rivals"), preloaded=True),
    Part("-2t-recycled", bench("--threads", "2", "--no-rivals", "--memory", "recycled")),
    Part("-1t-recycled", bench(*ONE_THREAD)),
    Part("-2t-fresh", FRESH),
    Part("-2t-fresh-small-pages", FRESH, small_pages=True),
    Part("-2t-second-order", SECOND_ORDER),
    Part("-2t-second-order-tcmalloc", SECOND_ORDER, preloaded=True),
    Part("-2t-fusion", bench("--threads", "2", "--fusion")),
    Part("-2t-kinds", bench("--threads", "2", "--kinds", "--memory", "recycled")),
    Part("-2t-fusion-tcmalloc", bench("--threads", "2", "--fusion"), preloaded=True),
    Part(
        "-2t-examples",
        tuple(("../examples/train_fused.py", "--network", network) for network in ("mlp", "residual", "resnet")),
    ),
    Part("-memory", (("memory.py",),)),
    Part("-pairing", (("pairing.py",),)),
    Part("-accuracy", (("accuracy.py",),)),
    Part("-sequences", (("../examples/sequences.py",),)),
    Part("-small-batches", (("../examples/small_batches.py",),), drawn=True),
)
FIGURE = ("-2t", "-accuracy")  # what it is drawn of


def without_huge_pages() -> None:
    """Give this process and its children small pages alone."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def draw(name: str) -> str | None:
    """Draw the figure of the files that are there; return what went wrong, or None."""
    files = [path for part in FIGURE if (path := RESULTS / f"{name}{part}.jsonl").is_file()]
    target = RESULTS / f"{name}-2t.png"
    done = subprocess.run([sys.executable, str(BENCH / "plot.py"), *map(str, files), str(target)], check=False)
    return f"plot.py ended with status {done.returncode}" if done.returncode else None


def measure(part: Part, target: Path, of: str) -> str | None:
    """Run the commands of a part, of a commit, and write their lines to target; return what went wrong, or None.

    target is written when all is measured: half a file would pass for a whole one.
    """
    environ = {**os.environ, "BENCH_COMMIT": of}
    if part.preloaded:
        library = tcmalloc()
        if library is None:
            return "tcmalloc is not installed (Debian, Ubuntu: apt install libtcmalloc-minimal4)"
        environ["LD_PRELOAD"] = library
    lines = ""
    plot = ("--plot", str(target.with_suffix(".png"))) if part.drawn else ()
    for command in part.commands:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lines.jsonl"
            done = subprocess.run(
                [sys.executable, str(BENCH / command[0]), *command[1:], *plot, "--json", str(out)],
                env=environ,
                preexec_fn=without_huge_pages if part.small_pages else None,
                check=False,
            )
            if done.returncode or not out.is_file():
                return f"{' '.join(command)} ended with status {done.returncode}"
            lines += out.read_text(encoding="utf-8")
    target.write_text(lines, encoding="utf-8")
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="local", help="what the files' names begin with (default: local)")
    parser.add_argument("--only", metavar="PART,PART", help="these files alone, as --list names them, without the dash")
    parser.add_argument("--anyway", action="store_true", help="on a busy machine and from changed sources too")
    parser.add_argument("--list", action="store_true", help="print the files and their commands, measure nothing")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else [part.name[1:] for part in PARTS]
    if unknown := sorted(set(wanted) - {part.name[1:] for part in PARTS}):
        parser.error(f"no such file: {', '.join(unknown)}; --list names them")
    args.parts = [part for part in PARTS if part.name[1:] in wanted]
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure; return 1 where something could not be measured, 2 where the machine or the sources forbid it."""
    args = parse(argv)
    if args.list:
        for part in args.parts:
            print(f"{args.name}{part.name}.jsonl", *(f"    {' '.join(command)}" for command in part.commands), sep="\n")
        return 0
    of = commit()  # now: once the first file is written, a tracked file is changed
    if not args.anyway:
        if (share := busy_share()) is not None and share > BUSY_SHARE:
            print(f"bench_all.py: other processes keep {share:.0%} of the processors busy; stop them, or --anyway")
            return 2
        if of.endswith("-dirty"):
            print("bench_all.py: tracked files are changed, so no commit names what is measured; commit, or --anyway")
            return 2
    failed = []
    for number, part in enumerate(args.parts, 1):
        target = RESULTS / f"{args.name}{part.name}.jsonl"
        print(f"\n== {number} of {len(args.parts)}: {target.name}", flush=True)
        if wrong := measure(part, target, of):
            failed.append(f"{target.name}: {wrong}")
    if any(part.name in FIGURE for part in args.parts) and (wrong := draw(args.name)):
        failed.append(f"{args.name}-2t.png: {wrong}")
    for line in failed:
        print(f"not measured: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    end(main)
