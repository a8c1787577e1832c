"""Measure the error of both batch norms where the mean is large beside the standard deviation.

    python bench/accuracy.py
    python bench/accuracy.py --json bench/results/accuracy.jsonl

Training forward of float32 inputs, against float64 on the very same inputs; the largest error of an output, in units of
the standard deviation. Takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scripting import end, needed

with needed():
    import torch
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn

    import bn_ext
    from environment import facts
    from grid import Point
    from report import ACCURACY, Record, errors

POINTS = (Point((16384, 64)), Point((64, 64, 256)))
EPS = 1e-5
RATIOS = tuple(10.0**power for power in range(7))
KINDS: dict[str, type[nn.Module]] = {"bn_ext": bn_ext.FusedBatchNorm1d, "nn": nn.BatchNorm1d}


def exact(x: Tensor) -> Tensor:
    """Batch norm of x (N, C) or (N, C, L) in float64, with weight 1 and bias 0."""
    over = [0, *range(2, x.dim())]
    centred = x.double() - x.double().mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True) + EPS).sqrt()


def measure(device: torch.device, points: Sequence[Point] = POINTS) -> list[Record]:
    """A record for each of ``points``, RATIOS and KINDS; the same inputs in every run."""
    found: list[Record] = []
    for point in points:
        noise = torch.randn(point.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for ratio in RATIOS:
            x = (noise + ratio).to(point.torch_dtype)
            right = exact(x)
            for contender, kind in KINDS.items():
                module = kind(point.shape[1], eps=EPS, device=device)
                with torch.no_grad():
                    error = (module(x.to(device)).cpu().double() - right).abs().max()
                record = {"dtype": point.dtype, "shape": list(point.shape), "layout": point.layout, "mode": ACCURACY}
                found.append(record | {"contender": contender, "mean_over_std": ratio, "error": float(error)})
    return found


def table(records: list[Record]) -> Table:
    """The errors: a row for each mean/std, two columns for each shape."""
    out = Table(title="largest error of an output, standard deviations", title_justify="left")
    out.add_column("mean/std", justify="right")
    curves = errors(records)
    for point, contender in curves:
        out.add_column(f"{point.name} {contender}", justify="right")
    for ratio in RATIOS:
        out.add_row(f"{ratio:g}", *(f"{curve[ratio]:.2g}" for curve in curves.values()))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the error of both batch norms at growing mean/std.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line for each error")
    args = parser.parse_args(argv)
    shared = facts(args.device)
    found = [{**shared, **record} for record in measure(args.device)]
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120).print(table(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    end(main)
