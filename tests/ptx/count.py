"""Print what the kernels execute, by architecture and regime, for each 16 bytes of the tensors that they move.

python tests/ptx/count.py [--architecture 90] [--dtype float32] [--contract] [--page]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simt.backend import ARCHITECTURES, backend, running_on
from simt.calls import Inputs, Pass
from simt.operators import library
from simt_support import WALKS, make, run
from support import name_of

CLASSES = ("fp32", "fp64", "integer", "memory", "other")
TENSORS = ("x", "y", "dy", "dx", "gg_x", "grad_dy")
# Rows by walk, for half a million elements; the exchange by the device, as few SMs make blocks meet.
ROWS = {"columns": 2**13, "folded": 2**17, "by_span": 2**13, "planes": 2**15}
DEVICES: dict[str, dict[str, Any]] = {
    "none": {"device": "H200", "sms": 1},
    "cluster": {"device": "H200", "sms": 16},
    "grid": {"device": "A100", "sms": 16},
    "two_launches": {"device": "T4", "sms": 16, "cooperative": 0},
}
HEAD = ("pass", "walk", "exchange", "shape", *CLASSES, "all", "sectors", "banks", "barriers")
WORDS = 4  # columns of HEAD


def counted(name: str, pass_: Pass, inputs: Inputs, exchange: str, **options: Any) -> tuple[str, ...]:
    """A row of HEAD: a thread's instructions; sectors and turns, of those there must be; a block's barriers."""
    machine = library() if exchange == "none" else library(eager=True)
    with machine.counting() as counts:
        result = run(pass_, inputs, of=machine, **DEVICES[exchange], **options)
    moved = sum(result.counted(name, f"{verb}_bytes") for name in TENSORS for verb in ("read", "write")) / 16
    sectors, ideal = (
        sum(result.counted(name, f"{verb}_{what}") for name in TENSORS for verb in ("read", "write"))
        for what in ("sectors", "ideal_sectors")
    )
    turns, least = (sum(c[key] for c in counts) for key in ("turns", "least_turns"))
    blocks = sum(launch["grid"][0] * launch["grid"][1] for launch in result.launches)
    cells = [name, *result.regime, "x".join(map(str, inputs.x.shape))]
    cells += [f"{sum(c[name] for c in counts) / moved:.1f}" for name in CLASSES]
    cells += [f"{sum(c[name] for c in counts for name in CLASSES) / moved:.1f}", f"{sectors / ideal:.2f}"]
    return (*cells, f"{turns / max(least, 1):.2f}", f"{sum(c['barriers'] for c in counts) / blocks:.1f}")


def plain(dtype: torch.dtype, *exchanges: str) -> Iterator[tuple[str, ...]]:
    """Rows of every pass and walk."""
    for pass_ in Pass:
        for walk in WALKS:
            for exchange in exchanges if pass_ != Pass.INFERENCE else exchanges[:1]:
                if exchange != "cluster" or backend().architecture >= 90:
                    yield counted(pass_.name.lower(), pass_, make(WALKS[walk](ROWS[walk]), dtype), exchange)


def activated(dtype: torch.dtype) -> Iterator[tuple[str, ...]]:
    """Rows of what an activation adds, of one walk; backward computes its argument anew."""
    for activation in ("relu", "silu", "gelu"):
        inputs = make(WALKS["columns"](ROWS["columns"]), dtype, activation=activation)
        saved = run(Pass.FORWARD, inputs, **DEVICES["none"]).saved
        for pass_ in (Pass.FORWARD, Pass.INFERENCE, Pass.BACKWARD):
            options = {"saved": saved} if pass_ == Pass.BACKWARD else {}
            given = replace(inputs, wants_residual=False)
            yield counted(f"{pass_.name.lower()}, {activation}", pass_, given, "none", **options)


def page() -> list[str]:
    """The table of docs/gpu.md."""
    lines = ["| type | pass | walk | fp32 | fp64 | integer | memory | other | all | banks |", "| --- " * 10 + "|"]
    with running_on(90):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for row in (*plain(dtype, "none"), *activated(dtype)):
                cells = {"type": name_of(dtype)} | dict(zip(HEAD, row, strict=True))
                wanted = ("type", "pass", "walk", *CLASSES, "all", "banks")
                if dtype == torch.float32 or cells["walk"] in ("planes", "columns"):
                    lines.append("| " + " | ".join(cells[k] for k in wanted) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--contract", action="store_true", help="multiply and add in one, wherever ptxas may")
    parser.add_argument("--page", action="store_true", help="the table of docs/gpu.md")
    given = parser.parse_args()
    if given.page:
        print("\n".join(page()))
        return
    with running_on(given.architecture, contract=given.contract):
        dtype = getattr(torch, given.dtype)
        rows = list(dict.fromkeys((*plain(dtype, *DEVICES), *activated(dtype))))
    widths = [max(len(line[k]) for line in (HEAD, *rows)) for k in range(len(HEAD))]
    print(f"sm_{given.architecture}, {given.dtype}: a thread's instructions for 16 bytes moved; sectors and turns of")
    print("shared memory's banks, of those there must be; barriers a block")
    for line in (HEAD, *rows):
        cells = [
            cell.ljust(w) if k < WORDS else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells))


if __name__ == "__main__":
    main()
