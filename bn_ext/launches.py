"""`python -m bn_ext.launches`: what a CUDA launch would be and move, computed from shape and device. No GPU is needed.

    python -m bn_ext.launches --shape 65536 256 --dtype float32 --device H200
    python -m bn_ext.launches --shape 64 128 1024 --layout nlc --pass backward --device cuda:0 --bandwidth 4300

It is the very plan that the operators launch by (csrc/cuda/plan.h). Bytes are of tensors alone: per-channel vectors and
partial results are left out, the latter are the workspace. Two times are told, and which of them is the limit: that of
these bytes at a bandwidth, and that of issuing the instructions which nvcc's code executes for them (docs/gpu.md), four
an SM and clock. The time predicted is the longer of them, longer still where the blocks leave SMs idle, and beside it
what the planner assumes for a launch and for blocks that meet.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _C

PASSES = ("forward", "inference", "backward", "inference_backward")
DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("contiguous", "nlc")


@dataclass(frozen=True)
class Device:
    """The figures of a GPU that a plan depends on; capability is 10 * major + minor, memory is in bytes.

    bandwidth is in GB/s (1e9 bytes), clock in GHz, as the product's data sheet has them, None where that is not known.
    """

    name: str
    capability: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    bandwidth: float | None = None
    reserved_per_block: int = 1024
    cooperative: bool = True
    clock: float | None = None

    def figures(self) -> dict[str, int | bool]:
        """Return what _C.launch_plan takes."""
        names = ("capability", "sms", "shared_per_sm", "shared_per_block", "reserved_per_block", "cooperative")
        return {name: getattr(self, name) for name in names}


_K = 1024
# Limits: CUDA programming guide, "Compute capabilities". SMs, bandwidth and boosted clock: the products' data sheets;
# of H100, H200 and B200 the clock is what their float32 rate means for 128 lanes an SM.
PRESETS = {
    preset.name: preset
    for preset in (
        Device("T4", 75, 40, 64 * _K, 64 * _K, 320.0, reserved_per_block=0, clock=1.59),
        Device("A100", 80, 108, 164 * _K, 163 * _K, 2039.0, clock=1.41),  # 80 GB, SXM
        Device("RTX 3090", 86, 82, 100 * _K, 99 * _K, 936.0, clock=1.70),
        Device("RTX 4090", 89, 128, 100 * _K, 99 * _K, 1008.0, clock=2.52),
        Device("H100", 90, 132, 228 * _K, 227 * _K, 3350.0, clock=1.98),  # SXM
        Device("H200", 90, 132, 228 * _K, 227 * _K, 4800.0, clock=1.98),
        Device("B200", 100, 148, 228 * _K, 227 * _K, 8000.0, clock=1.98),
        Device("RTX 5090", 120, 170, 100 * _K, 99 * _K, 1792.0, clock=2.41),
    )
}


# A thread's instructions for 16 bytes of tensors moved, in the walk that takes most (docs/gpu.md).
_OF_16_BITS = {"forward": 54.0, "inference": 38.5, "backward": 43.4, "inference_backward": 42.1}
INSTRUCTIONS = {
    "float32": {"forward": 26.3, "inference": 21.0, "backward": 22.1, "inference_backward": 20.4},
    "float64": {"forward": 19.6, "inference": 17.1, "backward": 17.7, "inference_backward": 17.0},
    "bfloat16": _OF_16_BITS,
    "float16": _OF_16_BITS,
}
_SCHEDULERS = 4  # of an SM, an instruction of a warp each a clock
LAUNCH = 2.0  # microseconds from one launch to the next, as csrc/cuda/cut.cpp has it


def _plain(name: str) -> str:
    """Return a GPU's name as people type it: "NVIDIA GeForce RTX 4090" and "rtx-4090" are "rtx4090"."""
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def device(name: str) -> Device:
    """Return the preset of that name, or the figures of the GPU that a torch device ("cuda:0") names.

    Raises ValueError for any other name, and for a GPU that is not there or that this build has no kernels for.
    """
    wish = _plain(name)
    matching = [
        preset for preset in PRESETS.values() if wish in (_plain(preset.name), _plain(preset.name).removeprefix("rtx"))
    ]
    if matching:
        return matching[0]
    if not name.startswith("cuda"):
        raise ValueError(f"no such device: {name}; there are {', '.join(PRESETS)} and cuda:0, cuda:1, ...")
    if not hasattr(_C, "query_device"):
        raise ValueError("bn_ext was built without CUDA, so it cannot ask a GPU for its figures; name a preset")
    try:
        index = torch.device(name).index
        figures = _C.query_device(torch.cuda.current_device() if index is None else index)
        title = torch.cuda.get_device_name(name)
        kilohertz = getattr(torch.cuda.get_device_properties(name), "clock_rate", None)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from error
    known = {preset.bandwidth for preset in PRESETS.values() if preset.name in title}
    clock = kilohertz / 1e6 if kilohertz else None
    return Device(name=title, bandwidth=known.pop() if len(known) == 1 else None, clock=clock, **figures)


def operand(like: Tensor) -> tuple[int, int, int, int]:
    """Return a tensor's offset and strides of (n, c, l) as _C.launch_plan takes them, in elements.

    The offset is from an aligned address: 0, unless the data of `like` is not aligned to 16 bytes.
    """
    offset = like.data_ptr() % 16 // like.element_size() if like.device.type != "meta" else 0
    n, c, *rest = like.stride()
    return (offset, n, c, *(rest or [0]))  # type: ignore[return-value]


def plan_of(
    pass_: str,
    on: Device,
    input: Tensor,
    grad_output: Tensor | None = None,
    gradients: tuple[bool, bool, bool] = (True, True, True),
) -> dict[str, Any]:
    """Return the plan of one pass over `input`, (N, C) or (N, C, L) of any strides; a meta tensor will do.

    `grad_output` has the shape of `input` and its layout unless given. `gradients` says which of grad_input,
    grad_weight and grad_bias are wanted. The keys are the fields of Plan in csrc/cuda/plan.h; bytes are of tensors.
    Raises ValueError for a pass, dtype or size that there is no plan for.
    """
    output = operand(torch.empty_like(input, device="meta"))
    operands = [operand(input), output]
    if "backward" in pass_:
        operands = [output if grad_output is None else operand(grad_output), operand(input)]
        operands += [output] * gradients[0]
    shape = (*input.shape, 1)[:3]
    dtype = str(input.dtype).removeprefix("torch.")
    return _C.launch_plan(  # type: ignore[no-any-return]
        pass_, dtype, shape, operands, gradients=gradients, **on.figures()
    )


def made(shape: Sequence[int], dtype: str, layout: str = "contiguous") -> Tensor:
    """Return a meta tensor of shape (N, C) or (N, C, L); layout "nlc" is (N, L, C) in memory, transposed.

    Raises ValueError for another number of sizes, a size below 1, or two sizes with layout "nlc".
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"the shape should be N C or N C L, at least 1 each, not {' '.join(map(str, shape))}")
    kind = getattr(torch, dtype)
    if layout == "contiguous":
        return torch.empty(tuple(shape), dtype=kind, device="meta")
    if len(shape) == 2:
        raise ValueError("layout nlc needs three sizes, N C L")
    n, c, length = shape
    return torch.empty((n, length, c), dtype=kind, device="meta").transpose(1, 2)


def size(value: float) -> str:
    """Return bytes as text in units of a thousand."""
    units = ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 999.5 else f"{value:.0f} {units[0]}"


def issue_time(pass_: str, dtype: str, moved: int, on: Device) -> float | None:
    """Return the microseconds that issuing a pass's instructions takes for `moved` bytes of tensors; None: no clock."""
    if on.clock is None:
        return None
    accesses = moved / (16 * 32)  # of a warp
    return INSTRUCTIONS[dtype][pass_] * accesses / (on.sms * _SCHEDULERS * on.clock * 1e3)


def predicted(pass_: str, plan: dict[str, Any], dtype: str, bandwidth: float, on: Device) -> float:
    """Return the microseconds that the model gives a pass at `bandwidth` GB/s, of which no GPU has shown any.

    What is read twice counts twice, although a cache may hold it.
    """
    moved = plan["read_bytes"] + plan["write_bytes"]
    issue = issue_time(pass_, dtype, moved, on) or 0.0
    busy = max(moved / bandwidth / 1e3, plan["lone"], plan["busiest"] * issue)
    return float(plan["launches"] * LAUNCH + plan["meeting"] + plan["waste"] * busy)


def lines(pass_: str, plan: dict[str, Any], like: Tensor, bandwidth: float, on: Device) -> dict[str, str]:
    """Return one column of the table, heading -> text, for a plan over tensors like `like`, at `bandwidth` GB/s."""
    item, whole = like.element_size(), like.numel() * like.element_size()
    inputs = ("x",) if "backward" not in pass_ else ("x", "dy")
    written = "y" if "backward" not in pass_ else "dx"
    each = plan["read_bytes"] / len(inputs)  # x and dy are read alike
    moved = plan["read_bytes"] + plan["write_bytes"]
    of_bytes, of_issue = moved / bandwidth / 1e3, issue_time(pass_, str(like.dtype).removeprefix("torch."), moved, on)
    limit = "-" if of_issue is None else "instructions" if of_issue > of_bytes else "memory"
    return {
        "launches": str(plan["launches"]),
        "exchange": plan["exchange"] + (", pooled" if plan["pooled"] else ""),
        "blocks": f"{plan['blocks']} = {plan['tiles']} tiles x {plan['splits']}",
        "tile": f"{plan['tx']} x {plan['ty']} threads, {plan['tile_channels']} channels",
        "walk": f"{'channel planes' if plan['planes'] else 'columns'}, {plan['vector'] * item} bytes an access",
        "kept rows": f"{plan['kept']} of {-(-plan['split_rows'] // plan['ty'])} a thread" if plan["kept"] else "-",
        "shared memory": f"{size(plan['shared_bytes'])} a block",
        "workspace": size(plan["workspace_bytes"]) if plan["workspace_bytes"] else "-",
        **{f"reads {t}": f"{size(each)} ({each / whole:.2f} times)" if t in inputs else "-" for t in ("x", "dy")},
        **{f"writes {t}": size(plan["write_bytes"]) if t == written else "-" for t in ("y", "dx")},
        "time implied": f"{of_bytes:.1f} us",
        "time to issue": "-" if of_issue is None else f"{of_issue:.1f} us",
        "limit": limit,
        "predicted": f"{predicted(pass_, plan, str(like.dtype).removeprefix('torch.'), bandwidth, on):.1f} us",
    }


def table(columns: dict[str, dict[str, str]]) -> str:
    """Return columns of text, heading -> (row -> text), beside each other."""
    rows = list(next(iter(columns.values())))
    left = max(map(len, rows))
    widths = {name: max(len(name), *map(len, column.values())) for name, column in columns.items()}
    text = [" " * left + "".join(f"  {name:<{widths[name]}}" for name in columns)]
    text += [f"{row:<{left}}" + "".join(f"  {columns[c][row]:<{widths[c]}}" for c in columns) for row in rows]
    return "\n".join(line.rstrip() for line in text)


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 0, or 2 with one line on stderr where there is nothing to print."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_ext.launches", description="A model of a launch, not a measurement."
    )
    parser.add_argument("--shape", type=int, nargs="+", required=True, metavar="SIZE", help="N C, or N C L")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="nlc: (N, L, C) in memory, transposed")
    parser.add_argument("--device", default="H200", help=f"{', '.join(PRESETS)}, or cuda:0 for the GPU that is there")
    parser.add_argument("--pass", action="append", choices=PASSES, dest="passes", help="may be repeated; default: all")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="default: the data sheet's")
    args = parser.parse_args(argv)
    try:
        on = device(args.device)
        like = made(args.shape, args.dtype, args.layout)
        bandwidth = on.bandwidth if args.bandwidth is None else args.bandwidth
        if bandwidth is None:
            raise ValueError(f"the bandwidth of {on.name} is not known here; give one with --bandwidth")
        if bandwidth <= 0:
            raise ValueError("the bandwidth should be positive")
        passes = args.passes or list(PASSES)
        columns = {name: lines(name, plan_of(name, on, like), like, bandwidth, on) for name in passes}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = "the data sheet" if args.bandwidth is None else "--bandwidth"
    name = "x".join(map(str, args.shape)) + f" {args.dtype}" + (" as nlc" if args.layout == "nlc" else "")
    print(
        f"{on.name}: {on.sms} SMs, capability {on.capability // 10}.{on.capability % 10}, {bandwidth:g} GB/s ({source})"
    )
    print(f"{name}, {size(like.numel() * like.element_size())} a tensor. A model, not a measurement.\n")
    print(table(columns))
    return 0


if __name__ == "__main__":
    from .__main__ import quietly

    sys.exit(quietly(main))
