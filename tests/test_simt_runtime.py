"""The stand-in CUDA runtime itself: toy kernels give right results, wrong kernels are reported, counters are exact."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import simt

SOURCES = [simt.HERE / name for name in ("toy.cu", "faults.cu", "toy_driver.cpp")]
SEEDS = range(6)
FAULTS = (
    (
        "read_past_end",
        r"block \(\d,0,0\) thread \(\d+,0,0\): reads out of bounds: x \+ 2\d\d \(x has .*at faults.cu",
    ),
    ("write_before_begin", r"thread \(\d+,0,0\): writes out of bounds: x - \d+ \(x has 256 bytes\)"),
    ("load_past_end", r"reads out of bounds: 4 bytes at x \+ 256 \(x has 256 bytes\) at .*faults.cu:\d+"),
    ("load_misaligned", r"reads 16 misaligned bytes"),
    ("half_reach_barrier", r"deadlock: .*threads 0-15: __syncthreads at faults.cu:\d+; threads 16-63: ended"),
    ("two_barriers", r"meet in different barriers: __syncthreads at faults.cu:\d+ and __syncthreads at faults.cu:\d+"),
    ("half_a_warp", r"(names a lane that has ended|deadlock: .*__shfl_xor_sync at faults.cu:\d+)"),
    ("dynamic_past_end", r"reads out of bounds: dynamic shared memory \+ \d+ \(.* 256 bytes\), at faults.cu:"),
    ("static_past_end", r"an index outside its array.* at faults.cu:\d+"),
    ("int_overflow", r"an integer overflow.* at faults.cu:\d+"),
    ("wait_for_nobody", r"deadlock: .*ld_acquire at faults.cu:\d+"),
    ("lock_never_free", r"deadlock: .*atomic at faults.cu:\d+"),
    ("grid_barrier_uncooperative", r"grid sync in a launch that is not cooperative"),
)


@pytest.fixture(scope="module")
def library() -> simt.Library:
    return simt.build("toy", SOURCES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sum_bound(n: int) -> float:
    """A float32 sum of n values of size about 1 by a tree or in runs: sqrt(n) roundings of a sum of size sqrt(n)."""
    return n * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("seed", SEEDS)
def test_block_reduction_and_every_byte_read_once(library: simt.Library, seed: int) -> None:
    value = normal(9, 1028) + 3
    with library.session(seed=seed) as s:
        x, mean, m2 = s.tensor("x", value), s.empty("mean", (9,), value.dtype), s.empty("m2", (9,), value.dtype)
        (launch,) = s.run("toy_moments", x, mean, m2, *x.shape)
        reference = value.double()
        # Welford's update is stable: the error grows with the steps of the longest chain, 12 here and 7 merges
        torch.testing.assert_close(mean.double(), reference.mean(1), rtol=0, atol=20 * 4 * 2**-24)
        torch.testing.assert_close(m2.double(), reference.var(1, correction=0) * 1028, rtol=40 * 2**-24, atol=0)
    assert launch["kernel"] == "toy::moments_kernel"
    assert launch["buffers"]["x"]["read_bytes"] == value.nbytes
    assert launch["buffers"]["x"]["reads_of_a_byte"] == [1, 1]
    assert launch["buffers"]["mean"]["write_bytes"] == 9 * 4
    assert launch["block_bytes"] == [1028 * 4 + 8] * 9


def test_results_do_not_depend_on_the_schedule(library: simt.Library) -> None:
    def outcome(seed: int) -> torch.Tensor:
        with library.session(seed=seed, sms=5) as s:
            x, y = s.tensor("x", normal(4096)), s.empty("y", (4096,), torch.float32)
            s.run("toy_center", x, y, s.empty("workspace", (5,), torch.float32), None, 4096)
            return y.clone()

    first = outcome(0)
    for seed in SEEDS:
        assert torch.equal(outcome(seed), first)


def test_a_removed_barrier_shows(library: simt.Library, tmp_path: Path) -> None:
    text = SOURCES[0].read_text()
    line = "  __syncthreads();  // the warps' moments are written\n"
    assert text.count(line) == 1
    (tmp_path / "toy.cu").write_text(text.replace(line, ""))
    flags = [f"-I{simt.HERE}"]
    broken = simt.build("toy_without_barrier", [tmp_path / "toy.cu", *SOURCES[1:]], flags)
    value = normal(4, 1028)
    wrong = 0
    for seed in SEEDS:
        with broken.session(seed=seed) as s:
            x, mean, m2 = s.tensor("x", value), s.empty("mean", (4,), value.dtype), s.empty("m2", (4,), value.dtype)
            s.run("toy_moments", x, mean, m2, *x.shape)
            wrong += not torch.allclose(mean, value.mean(1), rtol=0, atol=1e-3)
    assert wrong > 0


@pytest.mark.parametrize("semaphore", [False, True], ids=["grid_sync", "semaphore"])
@pytest.mark.parametrize("seed", SEEDS)
def test_cooperative_barrier_and_single_read(library: simt.Library, seed: int, semaphore: bool) -> None:
    n = 6 * 128 * 4 * 2 + 40
    value = normal(n) + 1
    with library.session("A100", seed=seed, sms=6) as s:
        x, y = s.tensor("x", value), s.empty("y", (n,), value.dtype)
        partial = s.empty("workspace", (6,), value.dtype)
        arrivals = s.tensor("arrivals", torch.zeros(1, dtype=torch.int32)) if semaphore else None
        for _ in range(2):  # a semaphore works again as the launch left it
            (launch,) = s.run("toy_center", x, y, partial, arrivals, n)
        torch.testing.assert_close(y, value - value.mean(), rtol=0, atol=sum_bound(n))
    assert launch["cooperative"]
    assert launch["grid"] == [6, 1, 1]
    assert launch["grid_barriers"] == (0 if semaphore else 1)
    assert launch["buffers"]["x"]["reads_of_a_byte"] == [1, 1]
    assert launch["buffers"]["y"]["writes_of_a_byte"] == [1, 1]
    assert (
        launch["buffers"]["workspace"] | {"read_bytes": 6 * 6 * 4, "write_bytes": 6 * 4}
        == (launch["buffers"]["workspace"])
    )


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_and_distributed_shared_memory(library: simt.Library, seed: int, cluster: int) -> None:
    n = 1500
    value = normal(n) + 1
    with library.session("H200", seed=seed) as s:
        x, y = s.tensor("x", value, align=4), s.empty("y", (n,), value.dtype, align=4)
        (launch,) = s.run("toy_center_by_clusters", x, y, n, cluster)
        torch.testing.assert_close(y, value - value.mean(), rtol=0, atol=sum_bound(n))
    assert launch["cluster"] == cluster
    assert launch["buffers"]["x"]["reads_of_a_byte"] == [2, 2]


def test_what_the_device_refuses(library: simt.Library) -> None:
    with library.session("A100") as s:
        x, y = s.tensor("x", normal(64)), s.empty("y", (64,), torch.float32)
        with pytest.raises(simt.LaunchError, match=r"cudaError_t 1$"):  # no clusters before 9.0
            s.run("toy_center_by_clusters", x, y, 64, 2)
    with library.session("H200") as s:
        x, y = s.tensor("x", normal(64)), s.empty("y", (64,), torch.float32)
        with pytest.raises(simt.LaunchError, match=r"cudaError_t 1$"):  # 8 at most without leave
            s.run("toy_center_by_clusters", x, y, 64, 16)
    for kilobytes, refused in ((99, True), (103, False)):  # a block wants 100 KB
        with library.session("H200", sms=1, shared_per_block=kilobytes * 1024) as s:
            n = 25 * 1024
            x, y = s.tensor("x", normal(n)), s.empty("y", (n,), torch.float32)
            call = ("toy_center", x, y, s.empty("workspace", (1,), torch.float32), None, n)
            if refused:
                with pytest.raises(simt.LaunchError, match=r"cudaError_t 1$"):
                    s.run(*call)
            else:
                assert s.run(*call)[0]["blocks_per_sm"] == 2


def counters(library: simt.Library, n: int, stride: int) -> dict[str, int]:
    with library.session() as s:
        value = normal(n * stride)
        x, y = s.tensor("x", value, align=512), s.empty("y", (n * stride,), value.dtype, align=512)
        (launch,) = s.run("toy_copy", x, y, n, stride)
        assert torch.equal(y[::stride], value[::stride])
        assert launch["buffers"]["x"]["reads_of_a_byte"] == [int(stride == 1), 1]
        return launch["buffers"]["x"] | launch["buffers"]["y"]


def test_counters_coalesced(library: simt.Library) -> None:
    n = 3 * 128 + 40  # 13 full warps and one of 8 lanes
    got = counters(library, n, 1)
    for verb in ("read", "write"):
        assert got[f"{verb}_bytes"] == n * 4
        assert got[f"{verb}_accesses"] == 14
        assert got[f"{verb}_sectors"] == got[f"{verb}_ideal_sectors"] == 13 * 4 + 1


@pytest.mark.parametrize("stride", [2, 8, 9])
def test_counters_strided(library: simt.Library, stride: int) -> None:
    n = 256
    got = counters(library, n, stride)
    per_warp = {2: 8, 8: 32, 9: 32}[stride]
    for verb in ("read", "write"):
        assert got[f"{verb}_bytes"] == n * 4
        assert got[f"{verb}_sectors"] == n // 32 * per_warp
        assert got[f"{verb}_ideal_sectors"] == n // 32 * 4


@pytest.mark.parametrize(("name", "report"), FAULTS, ids=[name for name, _ in FAULTS])
def test_fault_is_reported(library: simt.Library, name: str, report: str) -> None:
    kind = fault_names().index(name)
    for seed in (0, 1):
        with library.session(seed=seed) as s:
            x = s.tensor("x", normal(64), align=4, left=name == "write_before_begin")
            with pytest.raises(simt.LaunchError, match="(?s)toy::" + name + ": .*" + report):
                s.run("toy_fault", kind, x, 64)
            # and the runtime goes on
            y = s.empty("y", (64,), torch.float32)
            s.run("toy_copy", x, y, 64, 1)
            assert torch.equal(x, y)


def fault_names() -> list[str]:
    text = (simt.HERE / "faults.cu").read_text()
    return text.split("kKernels[] = {")[1].split("}")[0].replace(",", " ").split()


def test_every_fault_has_a_test() -> None:
    assert set(fault_names()) == {name for name, _ in FAULTS} | {"shared_never_written", "copy_without_wait"}


@pytest.mark.parametrize("name", ["shared_never_written", "copy_without_wait"])
def test_poison_shows(library: simt.Library, name: str) -> None:
    with library.session() as s:
        x = s.tensor("x", torch.zeros(64), align=4)
        s.run("toy_fault", fault_names().index(name), x, 64)
        assert x.isnan().sum() >= 62


def test_fresh_memory_is_poison_and_slack_is_watched(library: simt.Library) -> None:
    with library.session() as s:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert s.empty(f"scratch {dtype}", (7,), dtype).isnan().all()
        x, y = s.tensor("x", normal(33)), s.empty("y", (33,), torch.float32)  # 12 bytes of slack before the page
        ctypes.c_float.from_address(y.data_ptr() + y.nbytes).value = 1.0
        with pytest.raises(simt.LaunchError, match="memory beside y was overwritten"):
            s.run("toy_copy", x, y, 33, 1)


def test_sixteen_bit_types_round_as_torch_does(library: simt.Library) -> None:
    generator = torch.Generator().manual_seed(0)
    every_half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    size = torch.randint(-130, 127, (4096,), generator=generator)
    drawn = torch.ldexp(torch.randn(4096, generator=generator), size)
    edges = torch.tensor([65519.0, 65520.0, 2**-25, 2**-25 * 1.0001, float("inf"), float("nan")])
    value = torch.cat([every_half, every_half * (1 + 2**-11), drawn, edges])
    n = value.numel()
    with library.session() as s:
        x = s.tensor("x", value.double())
        half, bfloat16 = s.empty("half", (n,), torch.float32), s.empty("bfloat16", (n,), torch.float32)
        s.run("toy_round", x, half, bfloat16, n)
        torch.testing.assert_close(half, value.half().float(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(bfloat16, value.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
