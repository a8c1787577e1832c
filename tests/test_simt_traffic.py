"""What the CUDA kernels move, counted (tests/simt), against what the plan says; and plans of tensors of any size.

The plan is a promise: bytes read and written, launches, work for every SM. Counters hold the kernels to it at sizes
that run here; at full size the plan alone is looked at.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from simt.calls import DTYPES, EXCHANGES, Inputs, Pass, Result, exchange_of, walk_of
from simt.operators import library, plan_of
from simt_support import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    H200,
    INFERENCE_BACKWARD,
    T4,
    WALKS,
    check,
    ids,
    make,
    run,
    smallest,
)

PRESETS = ("T4", "A100", "RTX 3090", "RTX 4090", "H100", "H200", "B200", "RTX 5090")
TENSORS = ("x", "y", "dy", "dx", "gg_x", "grad_dy")
# Shapes that benchmarks are run on, from a few kilobytes to a gigabyte.
FULL_SIZE = (
    (32, 64), (256, 256), (1024, 1024), (8192, 512), (65536, 256), (262144, 1024), (8, 65536), (2, 65536),
    (2_000_000, 1), (4_000_000, 2), (100_000, 4), (4096, 33), (2_000_000, 1, 3), (136_000, 16, 16),
    (1_000_000, 16, 16), (2, 2, 1_000_000), (8, 5, 2000), (32, 256, 128), (16, 6, 1500),
)  # fmt: skip


def figures(device: str) -> dict[str, int]:
    """Of the device's model."""
    with library().session(device) as s:
        return {key: s.device(key) for key in ("sms", "cc_major", "shared_per_sm", "shared_per_block")}


def moved(result: Result, verb: str) -> int:
    """Bytes of the tensors that the launches read, or wrote."""
    return sum(result.counted(name, f"{verb}_bytes") for name in TENSORS)


def sources(pass_: Pass) -> tuple[str, ...]:
    return pass_.inputs


def assert_as_planned(pass_: Pass, inputs: Inputs, result: Result) -> None:
    """Every byte that the plan names and no other; outputs written once and never read; inputs never written."""
    plan = result.plan
    assert (moved(result, "read"), moved(result, "write")) == (plan["read_bytes"], plan["write_bytes"])
    assert len(result.launches) == plan["launches"]
    for name in sources(pass_):
        assert result.counted(name, "write_bytes") == 0
    for output in pass_.outputs(inputs.wants):
        assert result.counted(output, "read_bytes") == 0
        assert result.counted(output, "write_bytes") == inputs.x.nbytes
        times = [launch["buffers"].get(output, {}).get("writes_of_a_byte") for launch in result.launches]
        assert [t for t in times if t is not None] == [[1, 1]]
    # Each partial result is stored once, and so is each pooled one. Blocks of a tile all read the partial results of
    # all, and each of up to 32 lanes the first one too.
    assert result.counted("workspace", "write_bytes") == plan["workspace_bytes"]
    most = plan["workspace_bytes"] * (plan["splits"] + 32)
    assert result.counted("workspace", "read_bytes") <= most


# ---- bytes ----


@pytest.mark.parametrize("exchange", [*(e for e in EXCHANGES if e != "two_launches"), "grid_pooled"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, DOUBLE_BACKWARD], ids=ids)
def test_inputs_that_fit_on_chip_are_read_once(pass_: Pass, walk: str, exchange: str) -> None:
    shape, options = smallest(pass_, walk, exchange)
    if walk == "folded":
        shape = ((shape[0] + 3) // 4 * 4, *shape[1:])  # the values of an incomplete last row are read twice
    inputs = make(shape)
    result = check(pass_, inputs, **options)
    assert (walk_of(result.plan), exchange_of(result.plan)) == (walk, exchange)
    assert_as_planned(pass_, inputs, result)
    assert result.plan["read_bytes"] == inputs.x.nbytes * len(sources(pass_))
    for name in sources(pass_):
        assert result.launches[0]["buffers"][name]["reads_of_a_byte"] == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "misaligned", "sliced_last"])
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_exactly_the_planned_bytes(pass_: Pass, layout: str, dtype: torch.dtype) -> None:
    """Some rows kept, none kept, two launches, tails: the second read is of exactly the rest."""
    few = {"shared_per_block": 34 << 10, "shared_per_sm": 68 << 10}
    models: tuple[dict[str, Any], ...] = (H200, {"device": "A100", "sms": 2, **few}, {**T4, "sms": 8})
    for shape, model in itertools.product(((700, 68), (1003, 3), (301, 8, 7), (5, 3, 401)), models):
        inputs = make(shape, dtype, layout)
        assert_as_planned(pass_, inputs, run(pass_, inputs, **model))


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("pass_", [BACKWARD, INFERENCE_BACKWARD, DOUBLE_BACKWARD], ids=ids)
def test_what_is_not_wanted_is_not_moved(pass_: Pass, wants: tuple[bool, bool, bool]) -> None:
    inputs = make((700, 72), wants=wants)
    result = run(pass_, inputs, **H200)
    assert_as_planned(pass_, inputs, result)
    assert result.plan["write_bytes"] == inputs.x.nbytes * len(pass_.outputs(wants))
    reads_x = pass_.training or wants[1] or wants[2]
    assert result.plan["read_bytes"] == inputs.x.nbytes * (len(pass_.inputs) - 1 + reads_x)


@pytest.mark.parametrize("shape", [(320, 128), (1024, 256), (24, 16, 256), (512, 16, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_vector_paths_touch_no_sector_in_vain(pass_: Pass, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Rows of a tile that are whole sectors: an access of a warp takes no more 32-byte sectors than its bytes fill."""
    result = run(pass_, make(shape, dtype), **H200, align=512)
    assert result.plan["vector"] == (8 if pass_ == DOUBLE_BACKWARD and dtype.itemsize == 2 else 16) // dtype.itemsize
    for name, verb in (*((s, "read") for s in sources(pass_)), *((o, "write") for o in pass_.outputs())):
        assert result.counted(name, f"{verb}_bytes") > 0
        assert result.counted(name, f"{verb}_sectors") == result.counted(name, f"{verb}_ideal_sectors"), name


@pytest.mark.parametrize("shape", [(2048, 3), (255, 36), (301, 8, 7), (5, 3, 404)], ids=str)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_other_widths_cost_a_sector_at_each_end(pass_: Pass, shape: tuple[int, ...]) -> None:
    """A warp's access is of one or two runs that may begin and end within a sector: two more for each run."""
    result = run(pass_, make(shape), **H200, align=512)
    plan = result.plan
    runs = 1 if plan["planes"] else 32 // plan["tx"] + 2
    runs = 1 if plan["tiles"] == 1 else runs
    for name, verb in (*((s, "read") for s in sources(pass_)), *((o, "write") for o in pass_.outputs())):
        ideal, accesses = (result.counted(name, f"{verb}_{what}") for what in ("ideal_sectors", "accesses"))
        assert ideal <= result.counted(name, f"{verb}_sectors") <= ideal + 2 * runs * accesses, name


# ---- work for every SM ----


@pytest.mark.parametrize("shape", [(60_001, 1), (2, 4096), (2001, 1, 16)], ids=str)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_blocks_share_the_bytes(pass_: Pass, shape: tuple[int, ...]) -> None:
    """One channel of many values and many channels of two: all SMs work, and no block moves much more than another."""
    result = run(pass_, make(shape), **H200, of=library(eager=True))
    for launch in result.launches:
        assert len(launch["block_bytes"]) >= 4
        # A thread's rows are whole: a block may have one row of each thread more than the mean, and the tail.
        mean = sum(launch["block_bytes"]) / len(launch["block_bytes"])
        row = 256 * 16 * len(sources(pass_)) * 3
        assert max(launch["block_bytes"]) <= mean + row


@pytest.mark.parametrize("device", PRESETS)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_large_tensors_occupy_every_sm(pass_: Pass, device: str) -> None:
    """From 64 MB on there is a block for each SM, from 16 MB on for three of four (clusters come in powers of two).
    The busiest SM has at most 1.5 times its share."""
    for shape, dtype in itertools.product(FULL_SIZE, (torch.float32, torch.bfloat16)):
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < 16 << 20:
            continue
        plan, sms = plan_of(pass_, shape, dtype, device=device), figures(device)["sms"]
        assert plan["blocks"] >= sms * (1 if size >= 64 << 20 else 0.75), (shape, dtype, plan)
        share = plan["split_rows"] * plan["tx"] / (plan["rows"] * plan["vectors"])  # of the largest block
        assert -(-plan["blocks"] // sms) * share * sms <= 1.5, (shape, dtype, plan)


# ---- plans at full size ----


@pytest.mark.parametrize("device", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_every_plan_can_be_launched(dtype: torch.dtype, device: str) -> None:
    """Shared memory that a block can have, a cooperative grid that fits the device, clusters where there are any."""
    model = figures(device)
    reserved = 1024 if model["cc_major"] >= 8 else 0
    for pass_, shape, scalar in itertools.product(Pass, FULL_SIZE, (False, True)):
        plan = plan_of(pass_, shape, dtype, device=device, scalar=scalar)
        what = (pass_.name, shape, plan)
        assert plan["shared_bytes"] <= model["shared_per_block"], what
        assert 0 < plan["blocks"] < 2**31, what
        fits = min(2, model["shared_per_sm"] // (plan["shared_bytes"] + reserved)) * model["sms"]
        exchange = exchange_of(plan)
        if exchange.startswith("grid"):
            assert plan["blocks"] <= fits, what
        if exchange == "cluster":
            assert model["cc_major"] >= 9 and plan["splits"] <= 8, what


@pytest.mark.parametrize("device", PRESETS)
def test_plans_cover_every_element(device: str) -> None:
    """Rows of all splits times columns, and the tail, are the tensor; no split but a cluster's last is empty."""
    for pass_, shape, dtype, nlc in itertools.product(Pass, FULL_SIZE, (torch.float32, torch.float16), (False, True)):
        if nlc and len(shape) == 2:
            continue
        plan = plan_of(pass_, shape, dtype, device=device, nlc=nlc)
        what = (pass_.name, shape, plan)
        elements = plan["rows"] * plan["vectors"] * plan["vector"]
        tail = plan["tail"] * (plan["channels"] if plan["planes"] else 1)
        assert elements + tail == torch.Size(shape).numel(), what
        assert plan["splits"] * plan["split_rows"] >= plan["rows"], what
        assert plan["tiles"] * plan["tx"] >= plan["vectors"] > (plan["tiles"] - 1) * plan["tx"], what
        assert plan["tx"] * plan["ty"] <= 256, what
        if exchange_of(plan) != "cluster":
            assert (plan["splits"] - 1) * plan["split_rows"] < max(plan["rows"], 1), what


def test_launches_and_reads_promised() -> None:
    """One launch wherever a grid can meet, else two; small tensors and, on an H200, 22 MB of inputs are read once."""
    for shape, pass_ in itertools.product(FULL_SIZE, Pass):
        assert plan_of(pass_, shape)["launches"] == 1
        without = plan_of(pass_, shape, device="T4", cooperative=0)
        assert without["launches"] <= 2
    for shape in ((32, 64), (1024, 1024), (22528, 256), (8, 65536), (100_000, 4), (4096, 33), (32, 256, 128)):
        size = torch.Size(shape).numel() * 4
        assert plan_of(FORWARD, shape, device="H200")["read_bytes"] == size, shape
    for shape in ((32, 64), (1024, 1024), (11264, 256), (8, 65536), (100_000, 4), (32, 256, 128)):
        size = torch.Size(shape).numel() * 4
        assert plan_of(BACKWARD, shape, device="H200")["read_bytes"] == 2 * size, shape


def test_a_plan_depends_on_its_arguments_alone() -> None:
    for shape, pass_ in itertools.product(FULL_SIZE, Pass):
        first = plan_of(pass_, shape)
        plan_of(FORWARD, (7, 7))
        assert plan_of(pass_, shape) == first
