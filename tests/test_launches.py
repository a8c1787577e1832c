"""`python -m bn_ext.launches` and the plans behind it: what is promised of every launch, on every GPU that is known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bn_ext import _C, launches
from support import LAYOUTS, normal

ALL = list(launches.PRESETS.values())
H200, T4 = launches.PRESETS["H200"], launches.PRESETS["T4"]
SHAPES = [
    *((2, 1), (32, 64), (128, 256), (1024, 1000), (65536, 3), (70001, 5), (262144, 1024), (8, 65536), (2, 1 << 20)),
    *((32, 64, 128), (64, 128, 1024), (1024, 1, 4096), (4, 3, 1000003), (2000000, 1, 3), (136000, 16, 16)),
]


def plans(on: launches.Device, shape: tuple[int, ...], dtype: str, layout: str) -> dict[str, dict[str, Any]]:
    like = launches.made(shape, dtype, layout)
    return {name: launches.plan_of(name, on, like) for name in launches.PASSES}


@pytest.mark.parametrize("on", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("layout", launches.LAYOUTS)
@pytest.mark.parametrize("dtype", launches.DTYPES)
def test_every_plan_keeps_its_promises(on: launches.Device, layout: str, dtype: str) -> None:
    for shape in SHAPES:
        if layout == "nlc" and len(shape) == 2:
            continue
        tensor = launches.made(shape, dtype).nbytes
        for name, plan in plans(on, shape, dtype, layout).items():
            where = f"{shape} {name}: {plan}"
            inputs = 2 if "backward" in name else 1
            assert plan["blocks"] == plan["tiles"] * plan["splits"] >= 1, where
            assert plan["splits"] * plan["split_rows"] >= plan["rows"], where
            assert plan["tx"] * plan["ty"] <= plan["threads"], where
            assert plan["shared_bytes"] <= on.shared_per_block, where
            assert plan["write_bytes"] == tensor, where
            assert inputs * tensor <= plan["read_bytes"] <= 2 * inputs * tensor, where
            assert plan["launches"] == (2 if plan["exchange"] == "two launches" else 1), where
            assert (plan["workspace_bytes"] > 0) == (plan["exchange"] in ("grid", "two launches")), where
            assert plan["exchange"] != "cluster" or on.capability >= 90, where
            # Blocks that wait for each other have to be on the device at once.
            assert plan["exchange"] != "grid" or plan["blocks"] <= 2 * on.sms, where
            if plan["exchange"] == "grid":
                room = on.shared_per_sm // (plan["shared_bytes"] + on.reserved_per_block)
                assert plan["blocks"] <= room * on.sms, where
            if name == "inference":
                assert plan["read_bytes"] == tensor and plan["exchange"] == "none", where


def test_small_tensors_take_one_launch_and_are_read_once() -> None:
    for on in ALL:
        for name, plan in plans(on, (32, 64), "float32", "contiguous").items():
            assert plan["launches"] == 1 and plan["write_bytes"] == 32 * 64 * 4, (on.name, name)
            assert plan["read_bytes"] == plan["write_bytes"] * (2 if "backward" in name else 1), (on.name, name)


def test_what_fits_on_chip_is_read_once() -> None:
    """16.8 MB lie in the shared memory of an H200's SMs (30 MB) and not in that of a T4's (2.6 MB)."""
    for shape in ((4096, 1024), (65536, 64)):
        like = launches.made(shape, "float32")
        assert launches.plan_of("forward", H200, like)["read_bytes"] == like.nbytes
        assert launches.plan_of("forward", T4, like)["read_bytes"] > 1.5 * like.nbytes


def test_the_prediction_has_all_that_takes_time() -> None:
    for on in ALL:
        for shape in SHAPES:
            like = launches.made(shape, "float32")
            for name, plan in plans(on, shape, "float32", "contiguous").items():
                assert plan["waste"] >= 1 and plan["busiest"] >= 1, (on.name, shape, name)
                meets = {"none": 0.0, "cluster": 0.7}.get(plan["exchange"])
                assert plan["meeting"] == meets if meets is not None else plan["meeting"] > 2.5, (on.name, shape, name)
                moved = plan["read_bytes"] + plan["write_bytes"]
                for bandwidth in (1.0, 100.0, 1e9):  # by memory, and by what one SM does
                    found = launches.predicted(name, plan, "float32", bandwidth, on)
                    waits = plan["launches"] * launches.LAUNCH + plan["meeting"]
                    issue = launches.issue_time(name, "float32", moved, on)
                    assert issue is not None and like.nbytes > 0
                    busy = max(moved / bandwidth / 1e3, plan["lone"], plan["busiest"] * issue)
                    assert found == pytest.approx(waits + plan["waste"] * busy)


def row_bytes(plan: dict[str, Any], like: torch.Tensor) -> int:
    return int(plan["tx"] * plan["vector"] * like.element_size())


@pytest.mark.parametrize("dtype", launches.DTYPES)
@pytest.mark.parametrize("on", ALL, ids=lambda d: d.name)
def test_parts_of_lines_are_for_sums_that_few_blocks_would_take(on: launches.Device, dtype: str) -> None:
    for shape, layout in (((65536, 256), "contiguous"), ((262144, 1024), "contiguous"), ((64, 1024, 1024), "nlc")):
        like = launches.made(shape, dtype, layout)
        for name, plan in plans(on, shape, dtype, layout).items():
            assert row_bytes(plan, like) >= 128, (name, plan)
    small = launches.made((4096, 64), dtype)
    assert row_bytes(launches.plan_of("inference", on, small), small) >= 128  # nothing is summed


def test_a_small_tensor_occupies_more_than_a_few_sms() -> None:
    """(4096, 64) has two tiles of whole lines: 16 blocks in clusters of 8, or a barrier of the whole grid."""
    like = launches.made((4096, 64), "float32")
    for name in ("forward", "backward"):
        plan = launches.plan_of(name, H200, like)
        assert plan["exchange"] == "cluster" and plan["blocks"] == 64 and row_bytes(plan, like) == 32, (name, plan)


def test_without_cooperative_launches_there_are_two() -> None:
    like = launches.made((262144, 64), "float32")
    alone = launches.Device("old", T4.capability, T4.sms, T4.shared_per_sm, T4.shared_per_block, cooperative=False)
    assert launches.plan_of("forward", T4, like)["exchange"] == "grid"
    for name in ("forward", "backward"):
        assert launches.plan_of(name, alone, like)["launches"] == 2


def test_gradients_that_are_not_wanted_move_nothing() -> None:
    like = launches.made((65536, 256), "float32")
    sums = launches.plan_of("backward", H200, like, gradients=(False, True, True))
    assert sums["write_bytes"] == 0 and sums["read_bytes"] == 2 * like.nbytes
    only_input = launches.plan_of("inference_backward", H200, like, gradients=(True, False, False))
    assert only_input["read_bytes"] == only_input["write_bytes"] == like.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_of_any_strides(layout: str) -> None:
    """Strides of real tensors; an address that 16 bytes do not divide is walked element by element."""
    x = LAYOUTS[layout](normal((64, 32, 16)))
    for name in launches.PASSES:
        plan = launches.plan_of(name, H200, x, x)
        assert plan["write_bytes"] == 64 * 32 * 16 * 4
        if "misaligned" in layout:
            assert plan["vector"] == 1, plan
        if layout in ("contiguous", "permuted"):
            assert plan["vector"] == 4, plan


def test_presets_are_those_of_the_stand_in() -> None:
    """tests/simt models the same GPUs."""
    text = (Path(__file__).parent / "simt" / "device_model.cpp").read_text()
    row = re.compile(r'\{"([^"]+)", (\d+), (\d+), (\d+), (\d+) \* K, (\d+) \* K,')
    found = {name: tuple(map(int, figures)) for name, *figures in row.findall(text)}
    mine = {
        d.name: (d.capability // 10, d.capability % 10, d.sms, d.shared_per_sm // 1024, d.shared_per_block // 1024)
        for d in ALL
    }
    assert found == mine


def rows(text: str) -> dict[str, str]:
    """The table's rows: heading -> the rest of the line."""
    lines = [re.split(r"  +", line, maxsplit=1) for line in text.splitlines() if re.match(r"\w", line)]
    return {parts[0]: parts[1].strip() for parts in lines if len(parts) == 2}


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "64", "128", "1024", "--layout", "nlc", "--dtype", "bfloat16", "--device", "rtx 4090"]
    assert launches.main([*arguments, "--pass", "backward", "--bandwidth", "500"]) == 0
    text = capsys.readouterr().out
    like = launches.made((64, 128, 1024), "bfloat16", "nlc")
    plan = launches.plan_of("backward", launches.device("RTX 4090"), like)
    assert "RTX 4090: 128 SMs, capability 8.9, 500 GB/s (--bandwidth)" in text
    assert "64x128x1024 bfloat16 as nlc, 16.8 MB a tensor. A model, not a measurement." in text
    found = rows(text)
    assert found["launches"] == str(plan["launches"])
    assert found["reads x"] == found["reads dy"] and found["writes y"] == "-"
    assert found["reads x"].endswith(f"({plan['read_bytes'] / 2 / like.nbytes:.2f} times)")
    assert found["writes dx"] == "16.8 MB"
    moved = plan["read_bytes"] + plan["write_bytes"]
    assert found["time implied"] == f"{moved / 500e9 * 1e6:.1f} us"
    issued = moved / 512 * launches.INSTRUCTIONS["bfloat16"]["backward"] / (128 * 4 * 2.52e9)
    assert found["time to issue"] == f"{issued * 1e6:.1f} us" and found["limit"] == "memory"


def test_where_instructions_are_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "65536", "1024", "--dtype", "bfloat16", "--device", "H200", "--pass", "forward"]
    for bandwidth, limit in (("9000", "memory"), ("11000", "instructions")):  # 54 of them: 132 * 4 * 1.98e9 / 54 * 512
        assert launches.main([*arguments, "--bandwidth", bandwidth]) == 0
        assert rows(capsys.readouterr().out)["limit"] == limit


def test_a_device_without_a_known_clock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launches, "device", lambda name: launches.Device("X", 90, 132, 1 << 17, 1 << 16, 100.0))
    assert launches.main(["--shape", "32", "64", "--pass", "forward"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["time to issue"] == "-" and found["limit"] == "-"


def test_instructions_are_those_of_the_page() -> None:
    page = Path(__file__).parents[1] / "docs" / "gpu.md"
    if not page.exists():
        pytest.skip("there is no docs/ beside these tests")
    most: dict[tuple[str, str], float] = {}
    counted = page.read_text().split("<!-- counted -->")[1].split("<!-- counted until here -->")[0]
    for line in re.findall(r"^\| (\w+\d+) \| (\w+) \| \w+ \|(.*)$", counted, re.M):
        most[line[:2]] = max(most.get(line[:2], 0.0), float(line[2].split("|")[5]))
    for dtype, by_pass in launches.INSTRUCTIONS.items():
        for name, count in by_pass.items():
            assert most["bfloat16" if dtype == "float16" else dtype, name] == count, (dtype, name)


def test_the_command() -> None:
    command = [sys.executable, "-m", "bn_ext.launches", "--shape", "32", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "H200" in done.stdout and "4800 GB/s (the data sheet)" in done.stdout
    assert all(name in done.stdout for name in launches.PASSES)
    assert rows(done.stdout)["launches"].split() == ["1"] * 4


def test_sizes_as_text() -> None:
    texts = {0: "0 B", 999: "999 B", 1000: "1 kB", 999_600: "1 MB", 16_777_216: "16.8 MB", 2.5e12: "2500 GB"}
    assert {value: launches.size(value) for value in texts} == texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "5"), "N C or N C L"),
        (("--shape", "5", "0"), "at least 1"),
        (("--shape", "5", "5", "--layout", "nlc"), "three sizes"),
        (("--shape", "5", "5", "--device", "abacus"), "no such device: abacus; there are T4"),
        (("--shape", "5", "5", "--device", "cuda:99"), "cuda:99|built without CUDA"),
        (("--shape", "5", "5", "--bandwidth", "0"), "positive"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launches.main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert not shown.out and re.search(said, shown.err) and shown.err.count("\n") == 1


def test_the_library_refuses_what_has_no_plan() -> None:
    figures = H200.figures()
    dense = (0, 4, 1, 0)
    for arguments, said in (
        (("sideways", "float32", (2, 4, 1), [dense] * 2), "no such pass"),
        (("forward", "int8", (2, 4, 1), [dense] * 2), "no such dtype"),
        (("forward", "float32", (2, 4, 1), [dense]), "operands"),
        (("backward", "float32", (2, 4, 1), [dense] * 2), "operands"),
        (("forward", "float32", (0, 4, 1), [dense] * 2), "at least one element"),
    ):
        with pytest.raises(ValueError, match=said):
            _C.launch_plan(*arguments, **figures)
    with pytest.raises(ValueError, match="at least one SM"):
        _C.launch_plan("forward", "float32", (2, 4, 1), [dense] * 2, **{**figures, "sms": 0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_gpu_that_is_there() -> None:
    on = launches.device("cuda:0")
    seen = torch.cuda.get_device_properties(0)
    assert (on.capability, on.sms) == (10 * seen.major + seen.minor, seen.multi_processor_count)
    assert on.shared_per_block == seen.shared_memory_per_block_optin
    assert on.name == seen.name
