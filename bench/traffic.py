"""What the memory of a GPU really moves, as NVIDIA's ncu counts it, beside the bytes of the model.

    ncu --kernel-name-base demangled --kernel-name regex:bn_ext --csv --print-units base --log-file counted.csv \\
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum python bench/traffic.py run
    python bench/traffic.py read counted.csv

`run` makes one call of each pass at some points, in the order in which `read` expects them. Reads that the L2 cache
answers do not reach the memory, and what is written last may still be in that cache when the kernel ends: the model
counts both, so less can be measured than it says, hardly more.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripting import end, needed

with needed():
    import torch

    from bn_ext import launches
    from grid import Point

PASSES = ("forward", "backward", "inference")
POINTS = (
    *(Point((1024, 1024)), Point((8192, 512)), Point((65536, 256)), Point((65536, 256), "bfloat16")),
    *(Point((64, 128, 1024)), Point((64, 128, 1024), layout="nlc"), Point((16, 512, 1024)), Point((136000, 16, 16))),
    *(Point((2000000, 1, 3)), Point((262144, 1024), "bfloat16"), Point((8, 65536))),
)
# What ncu calls the counters, and the units of --print-units base.
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
UNITS = {"byte": 1.0, "nsecond": 1e-9, "ns": 1e-9}
NOTHING_COUNTED = 77


def run() -> None:
    """One call of each pass at each point."""
    ops = torch.ops.bn_ext
    for point in POINTS:
        x = point.randn(torch.device("cuda"))
        y, saved, _ = ops.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
        ops.batch_norm_backward(y, x, None, saved, True, [True, True, True, False])
        ops.batch_norm_inference(x, None, None, saved[0].clone(), saved[2].clone(), 1e-5)
        torch.cuda.synchronize()
        del x, y, saved


def counted_launches(lines: Iterable[str]) -> list[dict[str, float]]:
    """From ncu's CSV, one dict of counter -> value for each launch, in their order; bytes and seconds."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        value = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        found.setdefault(row["ID"], {})[row["Metric Name"]] = value
    return [found[key] for key in sorted(found, key=int)]


def table(counted: list[dict[str, float]], on: launches.Device) -> Iterator[str]:
    """A line for each point and pass: model and counters. Raises ValueError where the launches are not the model's."""
    yield f"{'':<36}{'reads MB, model':>16}{'counted':>9}{'writes MB, model':>18}{'counted':>9}{'us':>8}{'GB/s':>7}"
    rest = iter(counted)
    for point in POINTS:
        x = point.meta()
        for name in PASSES:
            plan = launches.plan_of(name, on, x)
            parts = [next(rest, None) for _ in range(plan["launches"])]
            if None in parts:
                raise ValueError(f"fewer launches were counted than the model has, at {point} {name}")
            read, written, seconds = (sum(part[key] for part in parts if part) for key in (READ, WRITTEN, TIME))
            rate = (plan["read_bytes"] + plan["write_bytes"]) / seconds / 1e9
            yield (
                f"{point!s:<26}{name:<10}{plan['read_bytes'] / 1e6:>16.2f}{read / 1e6:>9.2f}"
                f"{plan['write_bytes'] / 1e6:>18.2f}{written / 1e6:>9.2f}{seconds * 1e6:>8.1f}{rate:>7.0f}"
            )
    if next(rest, None) is not None:
        raise ValueError("more launches were counted than the model has")


def main(argv: list[str]) -> int:
    if argv == ["run"]:
        run()
        return 0
    if len(argv) != 2 or argv[0] != "read":
        print(__doc__, file=sys.stderr)
        return 2
    counted = counted_launches(Path(argv[1]).read_text(encoding="utf-8").splitlines())
    if not counted:
        print("ncu counted nothing: it needs leave to read the counters of the GPU")
        return NOTHING_COUNTED
    try:
        print(*table(counted, launches.device("cuda:0")), sep="\n")
    except ValueError as error:
        print(f"error: {error}")
        return 1
    print("GB/s: the model's bytes over ncu's time of the kernel")
    return 0


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
