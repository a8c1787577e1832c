"""What only a GPU can show: every regime of the kernels, streams, graphs, launches, memory, no waiting for the GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bn_ext
import regimes
from bn_ext import launches
from support import (
    LAYOUTS,
    Step,
    assert_same,
    assert_step,
    expected_step,
    module_for,
    name_of,
    no_cuda_reason,
    normal,
    pair,
    step,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from timing_cuda import launched

pytestmark = pytest.mark.skipif(bool(no_cuda_reason()), reason=no_cuda_reason() or "there is a GPU")
OPS = torch.ops.bn_ext
GPU = torch.device("cuda:0")
MASK = [True, True, True, False]
# Shapes that take one block, a cluster or several, the whole grid with and without a second barrier.
SHAPES = [(32, 64), (999, 37), (65536, 64), (32768, 8), (64, 32, 16), (8192, 16, 16), (4, 4, 65536), (4, 70000)]
# Cycles of the GPU: tens of milliseconds, and a multiple of what the host takes for a training step and an evaluation.
SHORT_SLEEP, LONG_SLEEP = 100_000_000, 600_000_000


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(shape, dtype, "cuda:0", mean=2.0, seed=2 * seed), normal(shape, dtype, "cuda:0", seed=2 * seed + 1)


def raw_step(x: Tensor, g: Tensor) -> list[Tensor]:
    """Training forward and backward by the operators alone: output, saved, the three gradients."""
    y, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    return [y, saved, *OPS.batch_norm_backward(g, x, None, saved, True, MASK)]


def assert_bitwise(found: list[Tensor] | Step, expected: list[Tensor] | Step, what: str = "") -> None:
    if isinstance(found, Step) and isinstance(expected, Step):
        assert vars(found).keys() == vars(expected).keys()
        found, expected = ([v for v in vars(s).values() if v is not None] for s in (found, expected))
    assert isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected)
    for number, (mine, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, right), f"{what}: result {number} of shape {tuple(right.shape)}"


# ---- numbers ----


@pytest.mark.parametrize("case", regimes.CASES, ids=str)
def test_every_regime_against_float64(case: regimes.Case) -> None:
    regimes.check(case, "cuda:0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_regime_beside_native(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, native = pair(shape[1], "cuda:0", dtype=dtype)
    x, g = inputs(shape, dtype)
    for training in (True, False):
        ours.train(training), native.train(training)
        assert_same(step(ours, x, g), step(native, x, g), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_is_no_further_from_float64_than_native(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, native = pair(shape[1], "cuda:0")
    x, g = inputs(shape, dtype)
    right = expected_step(ours, x, g, 0.1)
    mine, theirs = step(ours, x, g), step(native, x, g)
    assert_step(mine, right, dtype)
    for name in ("output", "grad_input"):
        expected, ours_is, native_is = getattr(right, name), getattr(mine, name), getattr(theirs, name)
        error, other = (float((t.double() - expected).abs().max()) for t in (ours_is, native_is))
        # Both round the same exact value to storage; where it lies near a tie they may round it apart, by one unit.
        assert error <= other + torch.finfo(dtype).eps * float(expected.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_autocast(dtype: torch.dtype) -> None:
    """The layer before gives half precision, parameters stay float32: as in nn.BatchNorm1d."""
    linear = nn.Linear(48, 96, device=GPU)
    ours, native = pair(96, "cuda:0")
    results = []
    for module in (ours, native):
        with torch.autocast("cuda", dtype=dtype):
            hidden = linear(normal((2048, 48), device="cuda:0")).detach().requires_grad_()
        right = expected_step(module, hidden, normal((2048, 96), dtype, "cuda:0", seed=1), 0.1)
        with torch.autocast("cuda", dtype=dtype):
            output = module(hidden)
        output.backward(normal((2048, 96), dtype, "cuda:0", seed=1))
        assert hidden.dtype == dtype and module.weight.grad is not None and module.bias.grad is not None
        found = Step(output.detach(), hidden.grad, module.weight.grad, module.bias.grad)
        found.running_mean, found.running_var = module.running_mean, module.running_var
        results.append(found)
        if module is ours:
            assert_step(found, right, dtype)
    kinds = [[None if t is None else t.dtype for t in vars(r).values()] for r in results]
    assert kinds[0] == kinds[1]


def test_what_runs_where_blocks_cannot_wait_for_each_other() -> None:
    """Without cooperative launches a second launch merges; the variable is read when the library first asks."""
    script = [sys.executable, str(Path(regimes.__file__)), "--largest", "1100000"]
    done = subprocess.run(
        script, env={**os.environ, "BN_EXT_NO_COOPERATIVE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward: two launches" in done.stdout and "backward: two launches" in done.stdout
    assert ": grid" not in done.stdout


# ---- the same bits every time ----


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, in which memory that torch.empty gives out is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("case", regimes.CASES, ids=str)
def test_repeated_runs_are_bitwise_equal(case: regimes.Case) -> None:
    x, g = case.tensors("cuda:0")
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    module = module_for(bn_ext.FusedBatchNorm1d, case.shape[1], "cuda:0", dtype=dtype, **dict(case.options))
    for training in (True, False):
        module.train(training)
        first = step(copy.deepcopy(module), x, g)
        assert all(bool(t.isfinite().all()) for t in vars(first).values() if t is not None)
        for _ in range(4):
            assert_bitwise(step(copy.deepcopy(module), x, g), first)


# ---- streams ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_work_goes_to_the_current_stream(shape: tuple[int, ...]) -> None:
    """The input arrives late on a side stream: on any other one the kernels would read the NaN that is there before."""
    x, g = inputs(shape)
    expected = raw_step(x, g)
    late_x, late_g = (torch.full_like(t, torch.nan) for t in (x, g))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT_SLEEP)
        late_x.copy_(x), late_g.copy_(g)
        found = raw_step(late_x, late_g)
        evaluated = OPS.batch_norm_inference(late_x, None, None, expected[1][0].clone(), expected[1][2].clone(), 1e-5)
    side.synchronize()
    assert_bitwise(found, expected)
    assert bool(evaluated.isfinite().all())


def test_backward_goes_to_the_stream_of_the_forward() -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 64, "cuda:0")
    x, g = inputs((4096, 64))
    expected = step(copy.deepcopy(module), x, g)
    late = torch.full_like(g, torch.nan)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        torch.cuda._sleep(SHORT_SLEEP)
        late.copy_(g)
        output.backward(late)
    side.synchronize()
    assert leaf.grad is not None and expected.grad_input is not None
    assert_bitwise([output.detach(), leaf.grad], [expected.output, expected.grad_input])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_at_once_do_not_disturb_each_other(shape: tuple[int, ...]) -> None:
    """Each call has a workspace of its own, and grids that wait for all their blocks share the GPU."""
    given = [inputs(shape, seed=seed) for seed in range(3)]
    expected = [raw_step(*pair_) for pair_ in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[] for _ in given]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SHORT_SLEEP // 4)  # so that all queues are full when the first starts
    for _ in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(raw_step(*given[number]))
    torch.cuda.synchronize()
    for number, results in enumerate(found):
        for result in results:
            assert_bitwise(result, expected[number], f"stream {number}")


def test_threads_with_streams_of_their_own() -> None:
    given = [inputs(SHAPES[number], seed=number) for number in range(4)]
    expected = [raw_step(*pair_) for pair_ in given]
    torch.cuda.synchronize()

    def work(number: int) -> list[list[Tensor]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [raw_step(*given[number]) for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for number, results in enumerate(pool.map(work, range(4))):
            for result in results:
                assert_bitwise(result, expected[number], f"thread {number}")


# ---- no waiting ----


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_call_waits_for_the_gpu(shape: tuple[int, ...], momentum: float | None) -> None:
    """While the GPU is kept busy, all calls of a training and an evaluation step have returned."""
    module = module_for(bn_ext.FusedBatchNorm1d, shape[1], "cuda:0", momentum=momentum)
    x, g = inputs(shape)

    def calls() -> None:
        for training in (True, False):
            module.train(training)
            step(module, x, g)

    for _ in range(3):  # loads the kernels and fills the allocator
        calls()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        awake = torch.cuda.Event()
        torch.cuda._sleep(LONG_SLEEP)
        awake.record()
        calls()
        waited = awake.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    assert module.num_batches_tracked is not None and int(module.num_batches_tracked) == 4


# ---- graphs ----


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graph_of_a_training_step(shape: tuple[int, ...], momentum: float | None) -> None:
    """Every replay is bitwise the eager step: outputs, gradients, running statistics and the count of batches."""
    eager = module_for(bn_ext.FusedBatchNorm1d, shape[1], "cuda:0", momentum=momentum)
    graphed = copy.deepcopy(eager)
    x, g = (torch.zeros(shape, device=GPU) for _ in range(2))
    leaf = x.requires_grad_()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            graphed(leaf).backward(g)
    torch.cuda.current_stream().wait_stream(aside)
    graphed.load_state_dict(eager.state_dict())
    leaf.grad = graphed.weight.grad = graphed.bias.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = graphed(leaf)
        output.backward(g)
    for seed in range(4):
        new_x, new_g = inputs(shape, seed=seed)
        with torch.no_grad():
            leaf.copy_(new_x), g.copy_(new_g)
        expected = step(eager, new_x, new_g)
        junk = [torch.full((1 << size,), torch.nan, device=GPU) for size in range(8, 22)]
        del junk  # what other work leaves in memory is none of the graph's business
        graph.replay()
        found = Step(output.detach(), leaf.grad, graphed.weight.grad, graphed.bias.grad)
        found.running_mean, found.running_var = graphed.running_mean, graphed.running_var
        found.num_batches_tracked = graphed.num_batches_tracked
        assert_bitwise(found, expected, f"replay {seed}")


def test_make_graphed_callables() -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 64, "cuda:0")
    reference = copy.deepcopy(module)
    x, g = inputs((4096, 64))
    graphed = torch.cuda.make_graphed_callables(module, (torch.zeros_like(x).requires_grad_(),))
    for seed in range(3):
        x, g = inputs((4096, 64), seed=seed)
        mine, right = (step_through(call, x, g) for call in (graphed, reference))
        assert_bitwise(mine, right, f"call {seed}")


def step_through(call: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    output = call(leaf)
    return [output.detach().clone(), *(t.clone() for t in torch.autograd.grad(output, leaf, g))]


# ---- launches and memory ----

COUNTED = [
    *((shape, "contiguous", torch.float32) for shape in SHAPES),
    *((shape, "permuted", torch.bfloat16) for shape in ((64, 32, 16), (8, 3, 1000), (16, 128, 1024))),
    *(((3000, 33), "misaligned", torch.float16), ((65536, 64), "contiguous", torch.float64)),
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), COUNTED, ids=str)
def test_launches_are_the_plan_s(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Two kernels at most, fills and copies included, as many as bn_ext.launches says; native takes five and three."""
    x = LAYOUTS[layout](normal(shape, dtype, "cuda:0")).requires_grad_()
    module = module_for(bn_ext.FusedBatchNorm1d, shape[1], "cuda:0", momentum=None)
    on = launches.device("cuda:0")
    output = module(x)
    g = torch.randn_like(output)
    wanted = [x, module.weight, module.bias]
    backward = launched(lambda: torch.autograd.grad(output, wanted, g, retain_graph=True), GPU)
    forward = launched(lambda: module(x), GPU)
    module.eval()
    with torch.no_grad():
        inference = launched(lambda: module(x), GPU)
    for name, kernels in (("forward", forward), ("inference", inference), ("backward", backward)):
        planned = launches.plan_of(name, on, x, g)["launches"]
        assert len(kernels) == planned <= 2, (name, kernels)
        assert all("bn_ext" in kernel for kernel in kernels), kernels


@pytest.mark.parametrize(("shape", "layout", "dtype"), COUNTED, ids=str)
def test_memory_is_results_and_workspace(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """No tensor is copied on the way. Counted are the bytes asked for, which the allocator rounds up."""
    x = LAYOUTS[layout](normal(shape, dtype, "cuda:0"))
    g = LAYOUTS[layout](normal(shape, dtype, "cuda:0", seed=1))
    on = launches.device("cuda:0")
    _, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    calls = {
        "forward": lambda: OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5),
        "backward": lambda: OPS.batch_norm_backward(g, x, None, saved, True, MASK),
    }
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        results = sum(t.nbytes for t in call())
        used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        assert results <= used <= results + launches.plan_of(name, on, x, g)["workspace_bytes"], name


# ---- other devices, the compiler ----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_second_device_while_the_first_is_current() -> None:
    for case in regimes.CASES[:12]:
        regimes.check(case, "cuda:1")
        assert torch.cuda.current_device() == 0
    assert launches.device("cuda:1").sms > 0


def test_torch_compile_with_the_default_backend() -> None:
    pytest.importorskip("triton")
    net = nn.Sequential(nn.Linear(16, 64), bn_ext.FusedBatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)).to(GPU)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    for seed in range(3):
        x = normal((512, 16), device="cuda:0", seed=seed)
        outputs = [call(x) for call in (compiled, twin)]
        for output in outputs:
            output.square().mean().backward()
        # Matrix products may be ordered otherwise when compiled; the networks are four layers of size one.
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    for mine, right in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-3, atol=1e-3)
    assert int(net[1].num_batches_tracked) == 3
