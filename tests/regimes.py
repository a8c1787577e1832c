"""A set of calls that reaches every way in which the CUDA kernels cover a tensor, each held to the float64 reference.

    python tests/regimes.py [--device cuda:0] [--largest ELEMENTS]

runs each of them once, training and evaluation, forward and backward, plain and with a residual and an activation: what
compute-sanitizer watches. The references are computed on the CPU, so that the GPU runs little but our kernels. Prints a
line a call and what was reached; the exit status is 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import bn_ext
from bn_ext import launches
from reference import assert_within
from reference_activated import activated
from support import LAYOUTS, Step, act_module_for, assert_step, expected_step, module_for, normal, step


@dataclass(frozen=True)
class Case:
    """One input: (N, C) or (N, C, L), the layouts (support.LAYOUTS) of it and of its gradient, and module options."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str = ""  # like the input's
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.layout]
        parts += [f"grad {self.grad_layout}"] * bool(self.grad_layout)
        return " ".join(parts + [f"{key}={value}" for key, value in self.options])

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """(input, gradient of the output), the same values on every device."""
        x = normal(self.shape, self.dtype, device, mean=2.0, seed=1)
        g = normal(self.shape, self.dtype, device, mean=0.5, seed=2)
        return LAYOUTS[self.layout](x), LAYOUTS[self.grad_layout or self.layout](g)


_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = (
    # channels side by side: one block, a cluster, the whole grid, partial results merged once; with a tail of rows
    *(Case((32, 64)), Case((7, 5)), Case((1001, 3)), Case((300, 64), _BF16), Case((999, 37)), Case((4, 70000), _F16)),
    *(Case((200, 1000), _F64), Case((32768, 8)), Case((4096, 64)), Case((16384, 64), _BF16), Case((60001, 37))),
    *(Case((300, 1)), Case((2, 3)), Case((200000, 2), _F16), Case((65536, 64)), Case((65536, 64), _F64)),
    # element by element: odd sizes, addresses that 16 bytes do not divide, strides
    *(
        Case((100, 7), layout="sliced_channels"),
        Case((3000, 33), layout="misaligned"),
        Case((501, 3), _BF16, "reversed"),
    ),
    *(Case((4096, 24), layout="strided_channels"), Case((9000, 24), _F16, "misaligned_3"), Case((257, 5), _F64)),
    # short planes: a row holds whole channels
    *(Case((64, 32, 16)), Case((2000, 16, 16), _BF16), Case((8192, 16, 16)), Case((6, 5, 3)), Case((3001, 5, 7), _F64)),
    # channel planes, several a block or many blocks a plane
    *(Case((8, 3, 1000)), Case((4, 4, 65536), _F16), Case((128, 1, 4096)), Case((500000, 1, 3)), Case((16, 128, 1024))),
    *(Case((100000, 1), _BF16), Case((1000003, 1)), Case((4, 3, 100001)), Case((2, 700, 130), _BF16)),
    # (N, L, C) in memory
    *(Case((64, 32, 16), layout="permuted"), Case((2000, 16, 16), _BF16, "permuted")),
    *(Case((8, 3, 1000), _F64, "permuted"), Case((4, 128, 4096), _F16, "permuted"), Case((6, 5, 3), layout="permuted")),
    # input and gradient that do not lie alike
    *(Case((64, 32, 16), layout="permuted", grad_layout="contiguous"), Case((512, 40), grad_layout="expanded_batch")),
    *(Case((30, 20, 50), grad_layout="permuted"), Case((2000, 12), _BF16, "sliced_batch", "permuted")),
    *(Case((40, 6, 300), layout="channels_first", grad_layout="expanded_all"), Case((300, 24), _F16, "overlapping")),
    # nothing but the input has a gradient; sums alone; no running statistics; the cumulative average
    *(Case((2048, 48), options=(("affine", False),)), Case((2048, 48), options=(("track_running_stats", False),))),
    Case((128, 10, 100), _BF16, options=(("momentum", None),)),
)


def regime(plan: dict[str, Any]) -> str:
    """What a plan is, in words that name the branches of the kernels."""
    walk = "planes" if plan["planes"] else "spans" if plan["span"] > 1 else "joined rows" if joined(plan) else "columns"
    access = "vectors" if plan["vector"] > 1 else "elements"
    rows = -(-plan["split_rows"] // plan["ty"])
    kept = "all kept" if plan["kept"] >= rows else "some kept" if plan["kept"] else "none kept"
    return f"{plan['exchange']}{' pooled' * plan['pooled']}, {walk}, {access}, {kept}{', tail' * (plan['tail'] > 0)}"


def joined(plan: dict[str, Any]) -> bool:
    """Whether a row of the plan is several rows of the tensor."""
    return bool(plan["vectors"] * plan["vector"] > plan["channels"])


def regimes(case: Case, on: launches.Device) -> Iterator[tuple[str, str]]:
    """(pass, regime) of the four passes over a case on a device."""
    x, g = case.tensors("cpu")
    for name in launches.PASSES:
        yield name, regime(launches.plan_of(name, on, x, g))


def on_cpu(found: Step) -> Step:
    return Step(**{f.name: None if (t := getattr(found, f.name)) is None else t.cpu() for f in fields(Step)})


def check(case: Case, device: str) -> None:
    """Train and evaluate one step on the device; AssertionError where a result is outside the reference's tolerance."""
    x, g = case.tensors("cpu")
    there = case.tensors(device)
    options = dict(case.options)
    float64 = {"dtype": torch.float64} if case.dtype == torch.float64 else {}
    module = module_for(bn_ext.FusedBatchNorm1d, case.shape[1], **options, **float64)
    momentum = options.get("momentum", 0.1)
    for training in (True, False):
        module.train(training)
        expected = expected_step(module, x, g, 1.0 if momentum is None else momentum)
        found = step(copy.deepcopy(module).to(device), *there)
        assert_step(on_cpu(found), expected, case.dtype)


FOLLOWED = (("relu", True), ("gelu", True), ("silu", False))  # by the mask, by the sum, by batch norm alone


def check_followed(case: Case, device: str) -> None:
    """Likewise with what may follow batch norm in the same pass: FOLLOWED."""
    here, there = (
        [*case.tensors(place), LAYOUTS[case.layout](normal(case.shape, case.dtype, place, mean=-0.5, seed=3))]
        for place in ("cpu", device)
    )
    x, g, r = here
    options = {"dtype": torch.float64} if case.dtype == torch.float64 else {}
    for activation, sums in FOLLOWED:
        for training in (True, False):
            module = act_module_for(case.shape[1], activation=activation, **options).train(training)
            norm = module.norm
            running = {"running_mean": norm.running_mean.clone(), "running_var": norm.running_var.clone()}
            mine = copy.deepcopy(module).to(device)
            leaf, residual = there[0].detach().requires_grad_(), there[2].detach().requires_grad_()
            y = mine(leaf, residual if sums else None)
            leaves = [leaf, *mine.parameters(), *[residual] * sums]
            found = [t.cpu() for t in torch.autograd.grad(y, leaves, there[1])]
            right = activated(
                x, r if sums else None, norm.weight, norm.bias, g, activation, given=y.detach().cpu(),
                training=training, eps=norm.eps, **running,
            )  # fmt: skip
            assert_within(y.detach().cpu(), right.output, right.output_tolerance, "output")
            assert_within(found[0], right.norm.grad_input, right.grad_input_tolerance(), "grad input")
            for grad, which in zip(found[1:3], ("weight", "bias"), strict=True):
                expected = getattr(right.norm, f"grad_{which}")
                assert_within(grad, expected, right.grad_param_tolerance(which, grad.dtype), which)
            if sums:
                assert_within(found[3], right.passed, right.passed_tolerance, "grad residual")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every regime of the kernels once.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--largest", type=int, default=1 << 40, metavar="ELEMENTS", help="leave larger inputs out")
    args = parser.parse_args(argv)
    on = launches.device(args.device) if args.device.startswith("cuda") else launches.PRESETS["H200"]
    wrong, reached = 0, set()
    chosen = [case for case in CASES if torch.Size(case.shape).numel() <= args.largest]
    for case in chosen:
        try:
            check(case, args.device)
            if not case.options:
                check_followed(case, args.device)
            verdict = "ok"
        except AssertionError as error:
            wrong += 1
            verdict = f"WRONG: {error}"
        reached |= set(regimes(case, on))
        print(f"{case}: {verdict}", flush=True)
    for name, what in sorted(reached):
        print(f"  {name}: {what}")
    print(f"{len(chosen) - wrong} of {len(chosen)} calls right, {len(reached)} regimes reached")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
