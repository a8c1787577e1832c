"""Write the tables of README.md and docs/ from the result files that they quote.

    python bench/tables.py                          # of bench/results/NAME-*.jsonl, NAME as below
    python bench/tables.py --name mine --print speed
    python bench/tables.py --check                  # status 1 where a page says other than its files

A page holds a table between two comments, `<!-- figures: speed -->` and `<!-- end -->`; what stands between them is
replaced. `bench_all.py` measures the files.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from scripting import end, needed

with needed():
    import kinds
    import trials
    from grid import Point
    from report import Record, Row, busy, errors, geometric_mean, ratio, rows, verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NAME = "cpu-xeon"  # what the names of the files begin with that the pages quote
ELSEWHERE = {"-2t-kinds": "cpu-epyc", "-sequences": "cpu-epyc", "-small-batches": "cpu-epyc"}  # of another machine
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIRST_ORDER = ("forward", "forward_backward", "eval")
KIND_OF_FUSION = {"bn+relu": "relu", "bn+add+relu": "add, relu"}


class Results:
    """The result files whose names begin with ``name``, read when they are asked for."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name, self.folder = name, folder

    def path(self, part: str) -> Path:
        name = ELSEWHERE.get(part, self.name) if self.name == NAME else self.name
        return self.folder / f"{name}{part}.jsonl"

    def records(self, part: str) -> list[Record]:
        text = self.path(part).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def rows(self, part: str) -> dict[tuple[str, str], Row]:
        """What was timed, by the tensor's label and the mode."""
        return {(tensor(row), row.mode): row for row in rows(self.records(part))}


def tensor(row: Row) -> str:
    return tensor_of(row.point)


def tensor_of(point: Point) -> str:
    """A tensor as a table names it: shape, then the dtype where it is not float32, then the layout."""
    dtype = "" if point.dtype == "float32" else f" {point.dtype}"
    return f"({', '.join(map(str, point.shape))}){dtype}{' from (N, L, C)' if point.layout == 'nlc' else ''}"


def times(value: float | None) -> str:
    """A ratio with three digits."""
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def exponent(value: float) -> str:
    """A small number with two digits: 6.4e-7."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}"


def markdown(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    cells = [list(heading), *map(list, lines)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in cells)


def is_contiguous(row: Row) -> bool:
    return row.point.layout == "contiguous"


def float32(found: Iterable[Row], mode: str) -> list[Row]:
    return [row for row in found if row.mode == mode and row.point.dtype == "float32"]


def mean(found: Iterable[Row], slow: str = "nn", fast: str = "bn_ext") -> float | None:
    """The geometric mean of how many times longer ``slow`` takes than ``fast``; None where neither was measured."""
    values = [value for row in found if (value := ratio(row, slow, fast)) is not None]
    return geometric_mean(values) if values else None


def speed(results: Results) -> str:
    """How many times faster bn_ext is in each float32 tensor of the grid, and in the mean."""
    usual, pooled = results.rows("-2t"), results.rows("-2t-tcmalloc")
    names = [tensor(row) for row in float32(usual.values(), "forward")]
    lines = []
    for name in names:
        ratios = [found[name, mode].speedup for found in (usual, pooled) for mode in FIRST_ORDER]
        both = usual[name, "forward_backward"]
        ratios += [ratio(both, "compile", "bn_ext"), ratio(both, "onednn", "bn_ext")]
        lines.append([name, *map(times, ratios)])
    for title, chosen in (("contiguous", is_contiguous), (f"all {len(names)}", lambda row: True)):
        groups = [filter(chosen, float32(found.values(), mode)) for found in (usual, pooled) for mode in FIRST_ORDER]
        ratios = [mean(group) for group in groups]
        both_of_all = list(filter(chosen, float32(usual.values(), "forward_backward")))
        ratios += [mean(both_of_all, "compile"), mean(both_of_all, "onednn")]
        lines.append([f"geometric mean, {title}", *(f"**{times(value)}**" for value in ratios)])
    modes = [mode.replace("_", " + ") for mode in FIRST_ORDER]
    heading = ["input, float32", *modes, f"tcmalloc: {modes[0]}", *modes[1:], "torch.compile", "oneDNN"]
    return markdown(heading, lines)


def more(results: Results) -> str:
    """Geometric means of what the main table leaves out: other dtypes, both compiled, second derivatives."""
    usual = list(results.rows("-2t").values())
    second = list(results.rows("-2t-second-order").values())

    def cell(found: Iterable[Row], slow: str = "nn", fast: str = "bn_ext") -> str:
        values = [value for row in found if (value := ratio(row, slow, fast)) is not None]
        if not values:
            return "-"
        return f"{times(geometric_mean(values))} ({times(min(values))} to {times(max(values))})"

    lines = []
    for dtype in ("bfloat16", "float16", "float64"):
        groups = [[r for r in usual if r.mode == mode and r.point.dtype == dtype] for mode in FIRST_ORDER]
        points = {row.point for group in groups for row in group}
        lines.append([f"{dtype}, {len(points)} tensors", *map(cell, groups)])
    groups = [float32(usual, mode) for mode in FIRST_ORDER]
    lines.append(["float32, both compiled by torch.compile", *(cell(group, "compile", "compiled") for group in groups)])
    lines.append(["float32, bn_ext called eagerly, native compiled", *(cell(group, "compile") for group in groups)])
    for mode, title in (("double_backward", "a double backward"), ("gradient_penalty", "a gradient penalty")):
        lines.append([f"float32, {title}", "-", cell(row for row in float32(second, mode) if is_contiguous(row)), "-"])
    return markdown(["", *(mode.replace("_", " + ") for mode in FIRST_ORDER)], lines)


def fusion(results: Results) -> str:
    """How many times faster one pass is than the same in several, for each tensor and chain."""

    def grouped(part: str) -> dict[tuple[str, str, str], Row]:
        found: dict[tuple[str, str, str], Row] = {}
        for chain in KIND_OF_FUSION:
            for row in rows(record for record in results.records(part) if record["chain"] == chain):
                found[tensor(row), chain, row.mode] = row
        return found

    usual, pooled = grouped("-2t-fusion"), grouped("-2t-fusion-tcmalloc")
    columns = [
        *((usual, "forward_backward", rival) for rival in ("nn", "separate", "compile")),
        (pooled, "forward_backward", "nn"),
        *((usual, "eval", rival) for rival in ("nn", "separate", "compile")),
    ]
    lines = []
    for name in dict.fromkeys(name for name, _, _ in usual):
        for chain, title in KIND_OF_FUSION.items():
            ratios = [ratio(found[name, chain, mode], rival, "fused") for found, mode, rival in columns]
            lines.append([name if title == "relu" else "", title, *map(times, ratios)])
    means = [
        mean((row for (_, _, m), row in found.items() if m == mode), rival, "fused") for found, mode, rival in columns
    ]
    lines.append(["geometric mean", "", *(f"**{times(value)}**" for value in means)])
    heading = ["input", "", "forward + backward: eager", "separate", "torch.compile", "tcmalloc: eager"]
    return markdown([*heading, "eval: eager", "separate", "torch.compile"], lines)


def steps(results: Results) -> str:
    """Milliseconds of a training step of the networks of examples/, and their accuracy."""
    titles = {
        "mlp": "the README's",
        "residual": "residual, width 256",
        "resnet": "10-layer ResNet, the digits as signals",
    }
    found = {(record["network"], record["kind"]): record for record in results.records("-2t-examples")}
    kinds = ("fused", "nn", "compile")
    lines = []
    for network, title in titles.items():
        all_kinds = [found[network, kind] for kind in kinds]
        lines.append([title, *(milliseconds(record["median_us"]) for record in all_kinds)])
        lines[-1] += [f"{record['accuracy']:.3f}" for record in all_kinds[:2]]
    return markdown(["network", "fused", "native", "torch.compile", "accuracy: fused", "native"], lines)


def memory(results: Results) -> str:
    """Megabytes that the tensors of a training step take."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in results.records("-memory"):
        name = f"{record['network']}, ({', '.join(map(str, record['shape']))})"
        for when in ("after_forward", "peak"):
            found.setdefault((name, when), {})[record["kind"]] = record
    titles = {
        "nn": "native",
        "convert": "converted",
        "convert(fuse=True)": "fused",
        "checkpointed": "fused, in checkpoints",
    }
    measured = [kind for kind in titles if all(kind in kinds for kinds in found.values())]
    lines = []
    for (name, when), kinds in found.items():
        cells = [f"{kinds[kind][when] / 1e6:.1f}" for kind in measured]
        lines.append([name if when == "after_forward" else "", when.replace("_", " "), *cells])
    return markdown(["network, input", "", *(titles[kind] for kind in measured)], lines)


def padded_and_virtual(results: Results) -> str:
    """How many times longer than bn_ext what there is without its kinds of batches takes."""
    heading, found = kinds.compared(results.records("-2t-kinds"))
    lines = [[tensor_of(point), *head, *map(times, ratios)] for point, head, ratios in found]
    return markdown(heading, lines)


def pairing(results: Results) -> str:
    """Microseconds of a call of a batch norm and a ReLU."""
    return markdown(["", "us"], [[r["what"], f"{r['median_us']:.1f}"] for r in results.records("-pairing")])


def limit(results: Results) -> str:
    """The share of the memory's limit, with all memory warm, and what the second thread gains."""
    two, one = results.rows("-2t-recycled"), results.rows("-1t-recycled")
    modes = ("forward", "backward", "eval")
    lines = []
    for name in dict.fromkeys(name for name, _ in two):
        rows_of = {mode: two[name, mode] for mode in modes}
        row = rows_of["forward"]
        size = row.point.bytes
        cells = []
        for mode, timed in rows_of.items():
            ours = timed.by_contender["bn_ext"]
            moved = f" of {round(ours['bytes'] / size)}B" if mode != "eval" else ""
            cells.append(f"{ours['limit_fraction']:.2f}{moved}")
        gains = [
            one[name, mode].by_contender["bn_ext"]["median_us"] / timed.by_contender["bn_ext"]["median_us"]
            for mode, timed in rows_of.items()
            if (name, mode) in one
        ]
        copied = f"{row.by_contender['copy']['gbps']:.0f}"
        lines.append([name, f"{size / 1e6:.1f}", copied, *cells, " ".join(f"{gain:.1f}" for gain in gains)])
    return markdown(["tensor", "MB", "copy, GB/s", *modes, "two threads against one"], lines)


def fresh(results: Results) -> str:
    """Milliseconds where every output is fresh memory, with huge pages and with small ones."""
    huge, small = results.rows("-2t-fresh"), results.rows("-2t-fresh-small-pages")
    lines = []
    for name in dict.fromkeys(name for name, _ in huge):
        cells = [
            ", ".join(milliseconds(pages[name, mode].by_contender[who]["median_us"]) for pages in (huge, small))
            for who in ("bn_ext", "nn")
            for mode in FIRST_ORDER
        ]
        lines.append([name, *cells])
    modes = [mode.replace("_", " + ") for mode in FIRST_ORDER]
    return markdown(["tensor", *modes, f"nn.BatchNorm1d: {modes[0]}", *modes[1:]], lines)


def at_growing_means(results: Results) -> str:
    """The largest error of an output in standard deviations, at each mean/std."""
    curves = errors(results.records("-accuracy"))
    ratios = next(iter(curves.values()))
    lines = [[f"{means:g}", *(exponent(curve[means]) for curve in curves.values())] for means in ratios]
    titles = {"bn_ext": "bn_ext", "nn": "nn.BatchNorm1d"}
    names = [f"({', '.join(map(str, point.shape))}): {titles[who]}" for point, who in curves]
    return markdown(["mean/std", *names], lines)


def padding(results: Results) -> str:
    """The accuracy in evaluation of the networks of examples/sequences.py, by the padding of the test recordings."""
    return markdown(*trials.sequences(results.records("-sequences"), trials.EVALUATED, "change"))


def padding_of_batch(results: Results) -> str:
    """Likewise by the statistics of the padded test batch."""
    return markdown(*trials.sequences(results.records("-sequences"), trials.OF_BATCH, "batch_change"))


def small_batches(results: Results) -> str:
    """The accuracy of each norm at each size of a batch."""
    return markdown(*trials.small_batches(results.records("-small-batches")))


TIMED = ("-2t", "-2t-tcmalloc", "-2t-recycled", "-1t-recycled", "-2t-second-order", "-2t-second-order-tcmalloc")
TIMED_FUSED = ("-2t-fusion", "-2t-fusion-tcmalloc")


def slower(results: Results) -> str:
    """Where bn_ext is slower beyond noise, of all files: than native, and with a fusion than each of its rivals."""

    def judged(parts: Iterable[str], ours: str, rivals: Iterable[str]) -> tuple[list[str], int]:
        found, count = [], 0
        for part in parts:
            records = results.records(part)
            chains = dict.fromkeys(record.get("chain") for record in records)
            timed = [(c, row) for c in chains for row in rows(r for r in records if r.get("chain") == c)]
            for chain, row, rival in ((chain, row, rival) for chain, row in timed for rival in rivals):
                told = verdict(row, ours, rival)
                count += told != "unknown"
                if told == "slower":
                    words = (tensor(row), chain, row.mode.replace("_", " + ", 1), times(ratio(row, rival, ours)))
                    found.append(f"{' '.join(word for word in words if word)} (`{part}`)")
        return found, count

    plain, of_plain = judged(TIMED, "bn_ext", ("nn",))
    fused, of_fused = judged(TIMED_FUSED, "fused", ("nn", "separate", "compile"))
    text = (
        f"Slower than native beyond noise (the ranges from p20 to p80 are apart) at {len(plain)} of {of_plain} "
        f"measurements{': ' * bool(plain)}{'; '.join(plain)}. With a fusion, slower than eager, separate or compiled "
        f"rivals beyond noise at {len(fused)} of {of_fused} measurements{': ' * bool(fused)}{'; '.join(fused)}."
    )
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False) + "\n"


def files(results: Results) -> str:
    """Of what commit each file is, and whether the machine had other work."""
    lines = []
    paths = set(results.folder.glob(f"{results.name}-*.jsonl")) | {results.path(part) for part in ELSEWHERE}
    for path in sorted(path for path in paths if path.exists()):
        first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        state = "busy" if busy(first) else "quiet"
        lines.append([f"`{path.name}`", f"`{first['commit']}`", first["timestamp"][:10], f"{first['torch']}", state])
    return markdown(["file", "commit", "on", "torch", "machine"], lines)


def headline(results: Results) -> str:
    """The README's figures in two sentences."""

    def compared(timed: Iterable[Row]) -> list[Row]:
        return [row for row in float32(timed, "forward_backward") if is_contiguous(row)]

    plain = compared(results.rows("-2t").values())
    fused = compared(rows(record for record in results.records("-2t-fusion") if record["chain"] == "bn+relu"))
    worst = {"bn_ext": 0.0, "nn": 0.0}
    for (_, who), curve in errors(results.records("-accuracy")).items():
        worst[who] = max(worst[who], curve[1e4])
    text = (
        f"Forward + backward is {times(mean(plain))} times as fast as nn.BatchNorm1d, "
        f"{times(mean(fused, fast='fused'))} times with the ReLU behind it "
        f"(`bench/results/{results.name}-2t.jsonl`, `-fusion.jsonl`: two cores, float32, "
        f"geometric means over {len(plain)} and {len(fused)} shapes). At a mean of 1e4 standard deviations its worst "
        f"output is {exponent(worst['bn_ext'])} of one off, torch's {worst['nn']:.1g} ([accuracy](docs/accuracy.md)). "
        "Results are bitwise the same for any number of threads."
    )
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False) + "\n"


TABLES: dict[str, Callable[[Results], str]] = {
    "speed": speed,
    "more": more,
    "fusion": fusion,
    "steps": steps,
    "memory": memory,
    "padded_and_virtual": padded_and_virtual,
    "pairing": pairing,
    "limit": limit,
    "fresh": fresh,
    "at_growing_means": at_growing_means,
    "padding": padding,
    "padding_of_batch": padding_of_batch,
    "small_batches": small_batches,
    "slower": slower,
    "files": files,
    "headline": headline,
}


def filled(text: str, results: Results) -> str:
    """The text of a page with every marked table made anew. Raises KeyError for a name that is none of TABLES."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]](results)}{match[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default=NAME, help=f"what the files' names begin with (default: {NAME})")
    parser.add_argument(
        "--print", choices=TABLES, metavar="TABLE", help=f"print one, write nothing: {', '.join(TABLES)}"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page would change")
    args = parser.parse_args(argv)
    results = Results(args.name)
    try:
        if args.print:
            print(TABLES[args.print](results), end="")
            return 0
        texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
        stale = [(page, new) for page, text in texts.items() if (new := filled(text, results)) != text]
    except OSError as error:
        parser.exit(1, f"error: {error}\n")
    for page, new in stale:
        print(f"{page.relative_to(ROOT)}: {'not as its files say' if args.check else 'written'}")
        if not args.check:
            page.write_text(new, encoding="utf-8")
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    end(main)
