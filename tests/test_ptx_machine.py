"""The machine that interprets PTX, itself: what it computes, what it reports of small programs that are wrong."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import struct
from pathlib import Path

import pytest
import torch

import nvcc
from ptx import Machine
from simt import LaunchError
from simt.backend import ARCHITECTURES, running_on
from simt.operators import library

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 dynamic[];\n"
KINDS = {"pred": "p", "b16": "h", "b32": "r", "f32": "f", "b64": "d", "f64": "g"}
REGISTERS = "".join(f"  .reg .{kind} %{letter}<9>;\n" for kind, letter in KINDS.items())
# %d1: x, %d2: y, of the thread's own 8 bytes %d3 and %d4; %r1: its number
START = """
  ld.param.u64 %d1, [x];
  ld.param.u64 %d2, [y];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mad.lo.s32 %r3, %r2, 64, %r1;
  mul.wide.u32 %d4, %r3, 8;
  add.s64 %d3, %d1, %d4;
  add.s64 %d4, %d2, %d4;
"""


@functools.cache
def machine(architecture: int = 90) -> Machine:
    nvcc.toolkit_or_skip()
    with running_on(architecture):
        found = library()
    assert isinstance(found, Machine)
    return found


def run(
    folder: Path,
    body: str,
    x: torch.Tensor | None = None,
    *,
    blocks: int = 1,
    cluster: int = 1,
    cooperative: bool = False,
    seed: int = 0,
    fresh: bool = True,
) -> torch.Tensor:
    """y, of 64 threads a block that have 8 bytes of it each, which nobody wrote (fresh) or are zero, beside x."""
    file = folder / f"{len(list(folder.glob('*.ptx')))}.ptx"
    shared = "  .shared .align 16 .b8 s[1024];\n"
    parameters = ".visible .entry k(.param .u64 x, .param .u64 y)\n.maxntid 64, 1, 1\n.minnctapersm 4\n{\n"
    file.write_text(HEAD + parameters + REGISTERS + shared + START + body + "ret;\n}\n")
    of = machine().with_ptx(file)
    with of.session(seed=seed) as s:
        inputs = s.tensor("x", torch.zeros(64 * blocks, dtype=torch.int64) if x is None else x)
        s.filled("x", constant=True)
        zeros = torch.zeros(64 * blocks, dtype=torch.int64)
        y = s.empty("y", (64 * blocks,), torch.int64) if fresh else s.tensor("y", zeros)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (inputs, y)]
        arguments = (ctypes.c_void_p * 2)(*[ctypes.addressof(p) for p in pointers])
        counts = [ctypes.c_uint(n) for n in (blocks, 64, cluster)]
        s.run("ptx_launch", ctypes.c_char_p(b"k"), *counts, ctypes.c_int(cooperative), arguments)
        return y.clone()


# ---- every instruction that nvcc emits is known ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_can_be_decoded(architecture: int) -> None:
    files = machine(architecture).files
    if not files:
        pytest.skip("`make test-ptx` takes this architecture")
    assert machine(architecture).decode() > 100_000 * len(files)


@pytest.mark.parametrize(
    "instruction",
    [
        *("add.rz.f32 %f1, %f2, %f3", "add.ftz.f32 %f1, %f2, %f3", "fma.rn.sat.f32 %f1, %f2, %f3, %f4"),
        *("sin.approx.f32 %f1, %f2", "ld.local.u32 %r1, [%d1]", "cvt.rz.f32.f64 %f1, %g1", "mul.s32 %r1, %r2, %r3"),
        *("bar.red.popc.u32 %r1, 0, %p1", "red.global.add.f32 [%d1], %f1", "ld.global.L2::128B.u32 %r1, [%d1]"),
        *("atom.global.inc.u32 %r1, [%d1], %r2", "cvt.s32.f32 %r1, %f1", "cvt.f32.s32 %f1, %r1"),
        *("mad.hi.s32 %r1, %r2, %r3, %r4", "div.f32 %f1, %f2, %f3", "setp.eq.nand.s32 %p1, %r1, %r2, %p3"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, instruction: str) -> None:
    with pytest.raises(LaunchError, match=f"an instruction that is not supported: {re.escape(instruction)}"):
        run(tmp_path, f"{instruction};")


@pytest.mark.parametrize(
    ("instruction", "report"),
    [
        ("cp.async.cg.shared.global [%r1], [%d1], 16, 8", "cp.async.cg.shared.global of 4 operands"),
        ("setp.eq.and.s32 %p1|%p2, %r1, %r2, %p3", r"no register %p1\|%p2"),
        ("mov.u32 %r1, %smid", "no register %smid"),
        ("ld.global.v4.u32 {%r1, %r2}, [%d1]", "a vector of another size"),
        ("add.f32 %f1, %f2, 1.5", "a decimal number as a float: 1.5"),
        ("bra $NOWHERE", r"no label \$NOWHERE"),
        (".local .b8 stack[8]", "a directive that is not supported: .local"),
    ],
)
def test_other_operands_are_refused(tmp_path: Path, instruction: str, report: str) -> None:
    with pytest.raises(LaunchError, match=report):
        run(tmp_path, f"{instruction};")


# ---- what instructions compute ----


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f64(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


NAN32, NAN64 = 0x7FC00000, 0x7FF8 << 48
RESULT = {
    "d": "",
    "u": "cvt.u64.u32 %d0, %r0;",
    "s": "cvt.s64.s32 %d0, %r0;",
    "h": "cvt.u64.u16 %d0, %h0;",
    "f": "mov.b32 %r0, %f0; cvt.u64.u32 %d0, %r0;",
    "g": "mov.b64 %d0, %g0;",
    "p": "selp.b64 %d0, 1, 0, %p1;",
}
# name: (of RESULT, instructions on %d5, %d6, %d7 (also as %r5, %h5, %f5, %g5), their values, what comes out)
COMPUTED: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "add wraps": ("u", "add.s32 %r0, %r5, %r6;", (0x7FFFFFFF, 1), 0x80000000),
    "div to zero": ("s", "div.s32 %r0, %r5, %r6;", (-7, 2), -3),
    "div least by -1": ("s", "div.s32 %r0, %r5, %r6;", (-(2**31), -1), -(2**31)),
    "rem": ("s", "rem.s32 %r0, %r5, %r6;", (-7, 2), -1),
    "rem unsigned": ("u", "rem.u32 %r0, %r5, %r6;", (0xFFFFFFFF, 10), 5),
    "mul.wide.s32": ("d", "mul.wide.s32 %d0, %r5, %r6;", (-3, 5), -15),
    "mul.wide.u32": ("d", "mul.wide.u32 %d0, %r5, %r6;", (0xFFFFFFFF, 3), 3 * 0xFFFFFFFF),
    "mul.wide.u16": ("u", "mul.wide.u16 %r0, %h5, %h6;", (0xFFFF, 0xFFFF), 0xFFFF**2),
    "mul.hi.u32": ("u", "mul.hi.u32 %r0, %r5, %r6;", (0xFFFFFFFF, 3), 2),
    "mad.lo.s64": ("d", "mad.lo.s64 %d0, %d5, %d6, %d7;", (1 << 62, 4, 5), 5),
    "shl beyond": ("u", "shl.b32 %r0, %r5, %r6;", (1, 32), 0),
    "shr.s beyond": ("s", "shr.s32 %r0, %r5, %r6;", (-5, 40), -1),
    "shr.u": ("u", "shr.u32 %r0, %r5, %r6;", (0x80000000, 31), 1),
    "shr.s16": ("d", "shr.s16 %h0, %h5, %r6; cvt.s64.s16 %d0, %h0;", (0x8000, 3), -(1 << 12)),
    "bfi": ("u", "bfi.b32 %r0, %r5, %r6, 8, 4;", (0xFF, 0), 0xF00),
    "bfi of none": ("d", "bfi.b64 %d0, %d5, %d6, 8, 0;", (-1, 77), 77),
    "bfi of all": ("u", "bfi.b32 %r0, %r5, %r6, 0, 32;", (0x12345678, 0), 0x12345678),
    "prmt": ("u", "prmt.b32 %r0, %r5, %r6, 0x5410;", (0x11112222, 0x33334444), 0x44442222),
    "prmt of signs": ("u", "prmt.b32 %r0, %r5, %r6, 0xBA98;", (0x00800080, 0), 0x00FF00FF),
    "cvt.u16": ("u", "cvt.u16.u32 %h0, %r5; cvt.u32.u16 %r0, %h0;", (0x12345, 0), 0x2345),
    "cvt.s64.s32": ("d", "cvt.s64.s32 %d0, %r5;", (0xFFFFFFFE, 0), -2),
    "cvt.rn.f32.s32": ("f", "cvt.rn.f32.s32 %f0, %r5;", (16777217, 0), f32(16777216.0)),
    "cvt.rn.f32.f64": ("f", "cvt.rn.f32.f64 %f0, %g5;", (f64(1 + 2**-24), 0), f32(1.0)),
    "cvt.rn.f64.u64": ("g", "cvt.rn.f64.u64 %g0, %d5;", (-1, 0), f64(2.0**64)),
    "half ties to even": ("h", "cvt.rn.f16.f32 %h0, %f5;", (f32(2049.0), 0), 0x6800),
    "half overflows": ("h", "cvt.rn.f16.f32 %h0, %f5;", (f32(65520.0), 0), 0x7C00),
    "half subnormal": ("h", "cvt.rn.f16.f32 %h0, %f5;", (f32(2.0**-24), 0), 1),
    "from half": ("f", "cvt.f32.f16 %f0, %h5;", (0x8001, 0), f32(-(2.0**-24))),
    "bfloat ties to even": ("h", "cvt.rn.bf16.f32 %h0, %f5;", (0x3F808000, 0), 0x3F80),
    "bfloat rounds up": ("h", "cvt.rn.bf16.f32 %h0, %f5;", (0x3F818000, 0), 0x3F82),
    "min of NaN": ("f", "min.f32 %f0, %f5, %f6;", (NAN32, f32(3.0)), f32(3.0)),
    "min of zeros": ("g", "min.f64 %g0, %g5, %g6;", (f64(0.0), f64(-0.0)), f64(-0.0)),
    "max of zeros": ("g", "max.f64 %g0, %g5, %g6;", (f64(-0.0), f64(0.0)), f64(0.0)),
    "neg of zero": ("g", "neg.f64 %g0, %g5;", (f64(0.0), 0), f64(-0.0)),
    "fma is one rounding": ("g", "fma.rn.f64 %g0, %g5, %g6, %g7;",
                            (f64(1 + 2**-52), f64(1 - 2**-52), f64(-1.0)), f64(-(2.0**-104))),
    "mul is another": ("g", "mul.f64 %g0, %g5, %g6; add.f64 %g0, %g0, %g7;",
                       (f64(1 + 2**-52), f64(1 - 2**-52), f64(-1.0)), f64(0.0)),
    "sqrt": ("g", "sqrt.rn.f64 %g0, %g5;", (f64(2.0), 0), f64(math.sqrt(2))),
    "rcp": ("f", "rcp.rn.f32 %f0, %f5;", (f32(0.0), 0), f32(math.inf)),
    "rcp estimated above": ("f", "rcp.approx.ftz.f32 %f0, %f5;", (f32(7.0), 0), f32(1 / 7) + 1),
    "rcp estimated below": ("f", "rcp.approx.ftz.f32 %f0, %f5;", (f32(1.75), 0), f32(1 / 1.75) - 1),
    "rcp of a subnormal": ("f", "rcp.approx.ftz.f32 %f0, %f5;", (0x80000001, 0), f32(-math.inf)),
    "rcp is no subnormal": ("f", "rcp.approx.ftz.f32 %f0, %f5;", (f32(2.0**127), 0), 0),
    "setp.lt of NaN": ("p", "setp.lt.f32 %p1, %f5, %f6;", (NAN32, 0), 0),
    "setp.ltu of NaN": ("p", "setp.ltu.f32 %p1, %f5, %f6;", (NAN32, 0), 1),
    "setp.ne of NaN": ("p", "setp.ne.f64 %p1, %g5, %g6;", (NAN64, 0), 0),
    "setp.neu of NaN": ("p", "setp.neu.f64 %p1, %g5, %g6;", (NAN64, 0), 1),
    "setp signed": ("p", "setp.lt.s32 %p1, %r5, %r6;", (-1, 0), 1),
    "setp unsigned": ("p", "setp.lt.u32 %p1, %r5, %r6;", (-1, 0), 0),
    "setp with a bool": ("p", "setp.eq.s32 %p2, %r5, %r6; setp.ne.and.s32 %p1, %r5, %r7, %p2;", (4, 4, 5), 1),
    "guards": ("d", "setp.eq.s32 %p1, %r5, %r6; mov.u64 %d0, 1; @%p1 mov.u64 %d0, 2; @!%p1 mov.u64 %d0, 3;", (4, 5), 3),
    "parts": ("d", "mov.b64 {%r0, %r2}, %d5; mov.b64 %d0, {%r2, %r0};", (0x1111111122222222, 0), 0x2222222211111111),
    "a loop": (
        "d", "mov.u64 %d0, 0; $A: add.s64 %d0, %d0, 3; add.s64 %d5, %d5, -1; setp.ne.s64 %p1, %d5, 0; @%p1 bra $A;",
        (7, 0), 21,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_what_instructions_compute(tmp_path: Path, name: str) -> None:
    kind, code, values, right = COMPUTED[name]
    load = ""
    for k, value in enumerate(values):
        low = f"mov.u64 %d{5 + k}, {value}; cvt.u32.u64 %r{5 + k}, %d{5 + k}; cvt.u16.u64 %h{5 + k}, %d{5 + k};"
        load += f"{low} mov.b32 %f{5 + k}, %r{5 + k}; mov.b64 %g{5 + k}, %d{5 + k};\n"
    y = run(tmp_path, load + code + RESULT[kind] + " st.global.u64 [%d4], %d0;")
    assert set(y.tolist()) == {right if right < 2**63 else right - 2**64}


def test_lanes_of_a_warp(tmp_path: Path) -> None:
    store = "cvt.u64.u32 %d0, %r0; st.global.u64 [%d4], %d0;"
    lanes = torch.arange(64) % 32
    for kind, by, clamp, right in (
        ("bfly", 5, 31, lanes ^ 5),
        ("up", 3, 0, torch.where(lanes < 3, lanes, lanes - 3)),
        ("down", 3, 31, torch.where(lanes > 28, lanes, lanes + 3)),
        ("idx", 9, 31, torch.full_like(lanes, 9)),
        ("bfly", 4, (24 << 8) | 31, lanes ^ 4),
    ):
        shuffle = f"and.b32 %r1, %r1, 31; shfl.sync.{kind}.b32 %r0|%p1, %r1, {by}, {clamp}, 0xffffffff;"
        assert torch.equal(run(tmp_path, shuffle + store), right), kind
    vote = "setp.eq.s32 %p1, %r1, 5; vote.sync.any.pred %p2, %p1, 0xffffffff; selp.b32 %r0, 1, 0, %p2;"
    assert run(tmp_path, vote + store).tolist() == [1] * 32 + [0] * 32


# ---- what it reports ----

OWN = "mul.wide.u32 %d5, %r1, 8; cvt.u32.u64 %r5, %d5; mov.u32 %r6, s; add.s32 %r5, %r5, %r6;"  # its shared bytes
OTHER = "xor.b32 %r7, %r1, 32; shl.b32 %r7, %r7, 3; add.s32 %r7, %r7, %r6;"  # those of a thread of the other warp
COPY = OWN + "cp.async.ca.shared.global [%r5], [%d3], 8; cp.async.commit_group;"
FAULTY = {
    "beyond the end": ("ld.global.u64 %d5, [%d3+8];", r"reads out of bounds: 8 bytes at x \+ 512 .*at PTX"),
    "before the begin": ("st.global.u64 [%d4+-8], %d5;", r"writes out of bounds: 8 bytes at y - 8"),
    "misaligned": ("ld.global.v2.u32 {%r5, %r6}, [%d3+4];", r"(reads 8 misaligned bytes at x)|(out of bounds)"),
    "an input": ("st.global.u64 [%d3], %d4;", "writes to an input: x"),
    "never written": ("ld.global.u64 %d5, [%d4];", r"reads what nobody wrote: 8 bytes at y"),
    "never written, shared": (OWN + "ld.shared.u64 %d6, [%r5];", "reads shared memory that nobody wrote"),
    "beyond shared memory": (OWN + "st.shared.u64 [%r5+1000], %d5;", r"writes out of bounds: 8 bytes at shared byte"),
    "misaligned, shared": (OWN + "st.shared.u32 [%r5+2], %r1;", "writes 4 misaligned bytes at shared byte"),
    "no barrier": (OWN + OTHER + "st.shared.u64 [%r5], %d4; ld.shared.u64 %d6, [%r7];", "race: |that nobody wrote"),
    "no barrier before a write": (
        OWN + OTHER + "st.shared.u64 [%r5], %d4; bar.sync 0; ld.shared.u64 %d6, [%r7]; st.shared.u64 [%r5], %d3;",
        "race: ",
    ),
    "one address": ("st.global.u32 [%d2], %r1;", r"race: write of y \+ 0 not ordered behind the write by block"),
    "half a barrier": ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $E; bar.sync 0; $E:", "deadlock: "),
    "two aligned barriers": (
        "setp.lt.u32 %p1, %r1, 9; @%p1 bra $A; bar.sync 0; bra $E; $A: bar.sync 0; $E:", "meets in different barriers"
    ),
    "a lane that the mask leaves out": (
        "shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0xffff;", r"mask does not name"
    ),
    "a shuffle of half a warp": (
        "setp.lt.u32 %p1, %r1, 9; @%p1 bra $E; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; $E:", "which has ended|deadlock"
    ),
    "no wait": (COPY + "ld.shared.u64 %d6, [%r5];", "while a cp.async to it is not waited for"),
    "no commit": (
        OWN + "cp.async.ca.shared.global [%r5], [%d3], 8; cp.async.wait_group 0; ld.shared.u64 %d6, [%r5];",
        "while a cp.async to it is not waited for",
    ),
    "a wait that leaves one": (COPY + "cp.async.wait_group 1; ld.shared.u64 %d6, [%r5];", "while a cp.async"),
    "a wait is no barrier": (
        COPY + OTHER + "cp.async.wait_group 0; ld.shared.u64 %d6, [%r7];", "race: |that nobody wrote|while"
    ),
    "ends with copies": (COPY, "ends with copies that it did not wait for"),
    "cg of 8 bytes": (OWN + "cp.async.cg.shared.global [%r5], [%d3], 8;", "cp.async.cg copies 16 bytes"),
    "read-only, written": ("st.global.u64 [%d4], %d3; ld.global.nc.u64 %d5, [%d4];", "ld.global.nc of y .* writes"),
    "waits for nobody": (
        "$A: ld.acquire.gpu.u32 %r5, [%d1]; setp.eq.s32 %p1, %r5, 0; @%p1 bra $A;", "deadlock: polled for in vain"
    ),
    "trap": ("trap;", "trap, at PTX line"),
    "division": ("mov.u32 %r5, 0; div.u32 %r5, %r1, %r5;", "divided by zero"),
    "a shared address as a generic one": (
        OWN + "cvt.u64.u32 %d6, %r5; ld.u32 %r7, [%d6];", r"out of bounds: .*in no buffer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 4])
@pytest.mark.parametrize("name", FAULTY)
def test_what_is_reported(tmp_path: Path, name: str, seed: int) -> None:
    body, report = FAULTY[name]
    if name == "waits for nobody" and seed != 0:
        pytest.skip("two million polls, once")
    with pytest.raises(LaunchError, match=report):
        run(tmp_path, body, seed=seed)


def test_the_same_without_the_fault(tmp_path: Path) -> None:
    through = "st.shared.u64 [%r5], %d4; bar.sync 0; ld.shared.u64 %d6, [%r7]; bar.sync 0; st.shared.u64 [%r5], %d3;"
    run(tmp_path, OWN + OTHER + through)
    x = torch.arange(64)
    copied = "cp.async.wait_group 0; bar.sync 0; ld.shared.u64 %d6, [%r7]; st.global.u64 [%d4], %d6;"
    assert torch.equal(run(tmp_path, COPY + OTHER + copied, x), x ^ 32)
    run(tmp_path, "st.global.u64 [%d4], %d3; ld.global.u64 %d5, [%d4];")
    run(tmp_path, "mov.u64 %d5, 7; st.global.u64 [%d2], %d5;")  # the same value by all


# Block 0 writes, the others read behind what the last argument lets out or in.
MESSAGE = """
  setp.ne.s32 %p1, %r2, 0;
  @%p1 bra $READ;
  st.global.u64 [%d4], %d4;
  bar.sync 0;
  setp.ne.s32 %p2, %r1, 0;
  @%p2 bra $END;
  add.s64 %d5, %d2, 512;
  {first} [%d5], 1;
  bra $END;
$READ:
  add.s64 %d5, %d2, 512;
$AGAIN: {second} %r5, [%d5];
  setp.eq.s32 %p2, %r5, 0;
  @%p2 bra $AGAIN;
  add.s64 %d6, %d4, -512;
  ld.global.u64 %d7, [%d6];
$END:
"""


@pytest.mark.parametrize(
    ("first", "second", "ordered"),
    [
        ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32", True),
        ("st.relaxed.gpu.global.u32", "ld.acquire.gpu.global.u32", False),
        ("st.release.gpu.global.u32", "ld.relaxed.gpu.global.u32", False),
        ("red.release.gpu.global.add.u32", "ld.acquire.gpu.global.u32", True),
        ("red.global.add.u32", "ld.volatile.global.u32", False),
        ("membar.gl; red.global.add.u32", "ld.acquire.gpu.global.u32", True),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_release_and_acquire(tmp_path: Path, first: str, second: str, ordered: bool, seed: int) -> None:
    body = MESSAGE.format(first=first, second=second)
    if ordered:
        run(tmp_path, body, blocks=2, cooperative=True, seed=seed, fresh=False)
    else:
        with pytest.raises(
            LaunchError, match=r"race: read of y \+ \d+ not ordered behind the write by block \(0,0,0\)"
        ):
            run(tmp_path, body, blocks=2, cooperative=True, seed=seed, fresh=False)


NEIGHBOUR = (
    OWN
    + """
  cvt.u64.u32 %d5, %r5;
  cvta.shared.u64 %d5, %d5;
  mov.u32 %r7, %cluster_ctarank;
  xor.b32 %r7, %r7, 1;
  mapa.u64 %d5, %d5, %r7;
  cvt.u64.u32 %d7, %r2;
  st.shared.u64 [%r5], %d7;
"""
)
MEET = "barrier.cluster.arrive; barrier.cluster.wait;"


@pytest.mark.parametrize("seed", range(4))
def test_clusters(tmp_path: Path, seed: int) -> None:
    read = "ld.u64 %d6, [%d5]; st.global.u64 [%d4], %d6;"
    y = run(tmp_path, NEIGHBOUR + MEET + read + MEET, blocks=4, cluster=2, seed=seed)
    assert torch.equal(y, (torch.arange(256) // 64) ^ 1)
    with pytest.raises(LaunchError, match=r"before the cluster's first barrier|whose threads exit|nobody wrote"):
        run(tmp_path, NEIGHBOUR + read + MEET, blocks=4, cluster=2, seed=seed)
    with pytest.raises(LaunchError, match=r"whose threads exit|the block ends, and with it its shared memory"):
        run(tmp_path, NEIGHBOUR + MEET + read, blocks=4, cluster=2, seed=seed)
    with pytest.raises(LaunchError, match="without having arrived"):
        run(tmp_path, "barrier.cluster.wait;", blocks=4, cluster=2, seed=seed)


def test_launches_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"more threads than|cudaError_t|are sure to fit"):
        run(tmp_path, "", blocks=4 * 132 + 1, cooperative=True)
    with pytest.raises(LaunchError, match="cudaError_t"):
        run(tmp_path, "", blocks=3, cluster=2)
