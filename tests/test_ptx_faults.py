"""Faults planted in the PTX of kernels: each is found, by a report of the machine or by a result that is wrong.

A fault is looked for in the regimes that execute it, one after the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import nvcc
from ptx.faults import changed, count_of
from ptx_support import RACE, call_of, found
from simt.backend import running_on
from simt.operators import library
from simt_support import BACKWARD, FORWARD, INFERENCE

NONE = "none"


@pytest.fixture(scope="module", autouse=True)
def _toolkit() -> None:
    nvcc.toolkit_or_skip()


KERNELS = {
    "forward": (FORWARD, "reduce_kernelINS0_7ForwardIfLi4E"),
    "backward": (BACKWARD, "reduce_kernelINS0_8BackwardIfLi4E"),
    "evaluation": (INFERENCE, "12apply_kernelINS0_10EvaluationIfLi4E"),
}
# name: (kernel, architecture, lines, which of them (None: all), what they become, exchange, rows, report)
PLANTED: dict[str, tuple[str, int, str, int | None, str, str, int, str]] = {
    "no barrier before the block's partial results": ("forward", 90, r"^\tbar\.sync \t0;$", 1, "", "grid", 0, RACE),
    "no barrier before the momentum": ("forward", 90, r"^\tbar\.sync \t0;$", 2, "", NONE, 0, RACE),
    "no barrier before the coefficients": ("forward", 90, r"^\tbar\.sync \t0;$", -1, "", NONE, 0, RACE),
    "no barrier before evaluation's coefficients": ("evaluation", 75, r"^\tbar\.sync \t0;$", -1, "", NONE, 0, RACE),
    "no first cluster barrier": (
        "forward",
        90,
        r"^\tbarrier\.cluster\.arrive;\n\tbarrier\.cluster\.wait;$",
        0,
        "",
        "cluster",
        0,
        "before the cluster's first barrier|whose threads exit",
    ),
    "no last cluster barrier": (
        "forward",
        100,
        r"^\tbarrier\.cluster\.arrive;\n\tbarrier\.cluster\.wait;$",
        1,
        "",
        "cluster",
        0,
        "whose threads exit|the block ends, and with it",
    ),
    "arrival without a wait": (
        "backward",
        90,
        r"^\tbarrier\.cluster\.wait;$",
        0,
        "",
        "cluster",
        0,
        "arrives twice|cluster's first",
    ),
    "grid barrier that releases nothing": (
        "forward",
        75,
        r"^\tatom\.add\.release\.gpu",
        0,
        r"\tatom.add.relaxed.gpu",
        "grid",
        0,
        RACE,
    ),
    "grid barrier that acquires nothing": (
        "backward",
        100,
        r"^\tld\.acquire\.gpu\.u32",
        0,
        r"\tld.relaxed.gpu.u32",
        "grid",
        0,
        RACE,
    ),
    "no barrier within the grid's": ("forward", 90, r"^\tbarrier\.sync \t0;$", 0, "", "grid", 0, RACE),
    "second grid barrier that releases nothing": (
        "forward",
        100,
        r"^\tatom\.add\.release\.gpu",
        1,
        r"\tatom.add.relaxed.gpu",
        "grid_pooled",
        0,
        RACE,
    ),
    "partial results past the read-only cache": (
        "forward",
        75,
        r"^\tld\.global\.v4\.u32",
        None,
        r"\tld.global.nc.v4.u32",
        "grid",
        0,
        r"ld\.global\.nc of .* writes|reads by ld",
    ),
    "no wait for copies": (
        "forward",
        100,
        r"^\tcp\.async\.wait_group \d;$",
        -1,
        "",
        NONE,
        257,
        "while a cp.async to it",
    ),
    "a wait that leaves one more": (
        "backward",
        90,
        r"^\tcp\.async\.wait_group 0;$",
        -1,
        r"\tcp.async.wait_group 1;",
        NONE,
        257,
        "while a cp.async to it",
    ),
    "no commit of copies": (
        "forward",
        100,
        r"^\tcp\.async\.commit_group;$",
        -1,
        "",
        NONE,
        257,
        "cp.async|did not commit",
    ),
    "copies of half": (
        "forward",
        90,
        r"^\tcp\.async\.cg(\.shared\.global \[%r\d+\], \[%rd\d+\]), 16;$",
        -1,
        r"\tcp.async.ca\1, 8;",
        NONE,
        513,
        "that nobody wrote",
    ),
    "a mask of half a warp": (
        "backward",
        75,
        r"(\tshfl\.sync\.bfly\.b32 .*), %r\d+;$",
        0,
        r"\1, 65535;",
        NONE,
        0,
        "mask does not name",
    ),
    "a store in the wrong order": (
        "forward",
        75,
        r"(\tst\.global\.v4\.u32 \[%rd\d+\]), \{(%r\d+), (%r\d+),",
        -1,
        r"\1, {\3, \2,",
        NONE,
        0,
        "the tolerance",
    ),
    "a store too far": (
        "evaluation",
        100,
        r"(\tst\.global(?:\.cs)?\.v4\.u32 \[%rd\d+)\]",
        None,
        r"\1+16]",
        NONE,
        0,
        "writes out of bounds|race|tolerance",
    ),
    "a misaligned load": (
        "evaluation",
        90,
        r"(\tld\.global\S*\.nc\S*\.v4\.u32 .*\[%rd\d+)\]",
        None,
        r"\1+4]",
        NONE,
        0,
        "reads 16 misaligned bytes",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_changed_ptx_is_found(name: str, tmp_path: Path) -> None:
    kernel, architecture, pattern, which, by, exchange, rows, report = PLANTED[name]
    pass_, part = KERNELS[kernel]
    with running_on(architecture):

        def plant(of: Any) -> Any:
            return changed(of, part, pattern, by, which, tmp_path)

        walks = ("columns", "folded", "by_span", "planes") if pass_ != INFERENCE else ("columns",)
        calls = [call_of(pass_, walk, exchange, plant, rows=rows if walk == "columns" else 0) for walk in walks]
        said = found(calls)
    assert said, "all results are right, and nothing is reported"
    assert re.search(report, said), said


IN_VAIN = {("backward", 2)}  # behind the momentum, which backward does not read


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_no_barrier_of_a_block_is_in_vain(kernel: str, tmp_path: Path) -> None:
    pass_, part = KERNELS[kernel]
    with running_on(90):
        number = count_of(library(), part, r"^\tbar\.sync \t0;$")
        for which in range(number):
            calls = [
                call_of(pass_, walk, how, lambda of, k=which: changed(of, part, r"^\tbar\.sync \t0;$", "", k, tmp_path))
                for walk, how in (("columns", NONE), ("folded", NONE), ("by_span", "grid"))
            ]
            assert bool(found(calls)) == ((kernel, which) not in IN_VAIN), f"barrier {which} of {number}"
