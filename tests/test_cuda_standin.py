"""The CUDA glue under a real torch, on the stand-in for the CUDA runtime (tests/standin): streams, work, faults."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bn_ext
from bn_ext import launches
from bn_ext.functional import batch_norm
from support import Step, assert_same, module_for, normal, step

pytestmark = pytest.mark.skipif(
    "STANDIN_OVERLAY" not in os.environ, reason="the stand-in for the CUDA runtime is not there: make test-cuda-standin"
)
OPS = torch.ops.bn_ext
SHAPE = (64, 8)


def work_of(call: Callable[[], object]) -> list[tuple[int, str]]:
    from standin.plugin import work_of

    return work_of(call)


@pytest.fixture
def side() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    assert stream.cuda_stream != torch.cuda.current_stream().cuda_stream
    yield stream


def tensors(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    return normal(shape, device="cuda:0"), normal(shape, device="cuda:0", seed=1)


def raw_step(x: Tensor, g: Tensor) -> list[Tensor]:
    y, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    return [y, *OPS.batch_norm_backward(g, x, None, saved, True, [True, True, True, False])[:3]]


def train(shape: tuple[int, ...] = SHAPE, **options: Any) -> Callable[[], object]:
    """A training step with all gradients."""
    x, g = tensors(shape)
    leaves = [x.requires_grad_(), *(torch.ones(8, device="cuda", requires_grad=True) for _ in range(2))]
    state = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")

    def call() -> object:
        y = batch_norm(leaves[0], *state, *leaves[1:], training=True, **options)
        return torch.autograd.grad(y, leaves, g)

    return call


def second_derivative() -> Callable[[], object]:
    x, g = (t.requires_grad_() for t in tensors())
    ones = torch.ones_like(x)

    def call() -> object:
        (dx,) = torch.autograd.grad(batch_norm(x, None, None, None, None, True), x, g, create_graph=True)
        return torch.autograd.grad(dx, [x, g], ones)

    return call


def renormalised() -> Callable[[], object]:
    x, g = tensors()
    module = bn_ext.FusedBatchRenorm1d(8, device="cuda")
    return lambda: torch.autograd.grad(module(x.requires_grad_()), x, g)


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "plain": train,
    "followed": lambda: train(activation="relu"),
    "virtual": lambda: train(virtual_batch_size=16),
    "padded": lambda: train((6, 8, 10), lengths=torch.arange(4, 10, device="cuda")),
    "second derivative": second_derivative,
    "renormalised": renormalised,
}


@pytest.mark.parametrize("kind", CALLS)
def test_all_work_goes_to_the_current_stream(kind: str, side: torch.cuda.Stream) -> None:
    call = CALLS[kind]()
    with torch.cuda.stream(side):
        work = work_of(call)
    assert any("bn_ext::cuda" in name for _, name in work)
    assert {at for at, _ in work} == {side.cuda_stream}, work


def test_backward_goes_to_the_stream_of_the_forward(side: torch.cuda.Stream) -> None:
    x, g = tensors()
    with torch.cuda.stream(side):
        y = module_for(bn_ext.FusedBatchNorm1d, 8, "cuda:0")(x.requires_grad_())
    torch.cuda.synchronize()
    work = work_of(lambda: torch.autograd.grad(y, x, g))
    assert {at for at, name in work if "bn_ext::cuda" in name} == {side.cuda_stream}, work


def test_threads_with_streams_of_their_own() -> None:
    x, g = tensors((999, 8))

    def step_on(stream: torch.cuda.Stream) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return raw_step(x, g)

    expected = step_on(torch.cuda.current_stream())
    streams = [torch.cuda.Stream() for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(step_on, streams):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_second_device_while_the_first_is_current() -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 8, "cuda:1")
    here = module_for(bn_ext.FusedBatchNorm1d, 8)
    x, g = normal(SHAPE), normal(SHAPE, seed=1)
    mine, right = step(module, x.to("cuda:1"), g.to("cuda:1")), step(here, x, g)
    assert torch.cuda.current_device() == 0
    assert mine.output is not None and mine.output.device == torch.device("cuda", 1)
    assert_same(Step(**{k: None if v is None else v.cpu() for k, v in vars(mine).items()}), right, torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_two_kernels_and_nothing_else(training: bool) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 8, "cuda:0", momentum=None).train(training)
    x, g = tensors()
    leaves = [x.requires_grad_(), *module.parameters()]
    work = [name for _, name in work_of(lambda: torch.autograd.grad(module(x), leaves, g))]
    assert len(work) == 2 and all("bn_ext::cuda" in name for name in work), work


# ---- devices that are not as they were, or not as the build wants them ----


@pytest.mark.parametrize(
    ("shape", "exchange", "refusals"),
    [((16384, 16), "grid", 1), ((1024, 64), "cluster", 1), ((4096, 32), "cluster", 2)],
)
def test_what_no_longer_fits_is_planned_anew(shape: tuple[int, ...], exchange: str, refusals: int) -> None:
    """As where another process takes part of the device: the blocks that meet could not wait for each other."""
    x, g = tensors(shape)
    on = launches.device("cuda:0")
    assert launches.plan_of("backward", on, x, g)["exchange"] == exchange
    _, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    found: list[list[Tensor]] = []

    def backward() -> None:
        found.append(OPS.batch_norm_backward(g, x, None, saved, True, [True, True, True, False])[:3])

    assert len(work_of(backward)) == 1
    figure = ctypes.CDLL(None).standin_set
    figure.argtypes = ctypes.c_char_p, ctypes.c_long
    assert figure(b"sms", 2)  # four blocks at once: less than a cluster's eight, and than a grid's
    try:
        work = work_of(backward)
    finally:
        figure(b"sms", on.sms)
    # Kernels without clusters are those of an older device.
    left = {"capability": 80} if exchange == "cluster" else {}
    left |= {"cooperative": False} if refusals == 2 or exchange == "grid" else {}
    instead = launches.plan_of("backward", dataclasses.replace(on, **left), x, g)["launches"]
    assert len(work) == refusals + instead, work  # what is refused, and what comes in its place
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_tensors_of_two_devices_are_refused() -> None:
    x, weight = torch.ones(SHAPE, device="cuda:1"), torch.ones(8, device="cuda:0")
    with pytest.raises(RuntimeError, match="weight is on cuda:0, different from other tensors on cuda:1"):
        OPS.batch_norm_forward(x, weight, None, None, None, None, 0.1, 1e-5)


OTHER_GPU = """
import torch, warnings
import bn_ext
ours, native = (cls(4, device="cuda") for cls in (bn_ext.FusedBatchNorm1d, torch.nn.BatchNorm1d))
x = torch.randn(8, 4, device="cuda")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(ours(x), native(x))
assert torch.equal(ours.running_var, native.running_var) and int(ours.num_batches_tracked) == 2
print(*[str(w.message) for w in said if "bn_ext" in str(w.message)], sep=chr(10))
"""


def test_a_gpu_that_the_build_has_no_code_for_is_left_to_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "STANDIN_CAPABILITY": "80"}
    command = [sys.executable, "-c", OTHER_GPU]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "it was built for sm_90, which a GPU of compute capability 8.0 does not run" in line


# ---- the stand-in itself ----


def test_a_read_of_what_nobody_wrote_is_found() -> None:
    x = torch.empty(SHAPE, device="cuda")
    x[1:] = 1.0
    with pytest.raises(RuntimeError, match="reads what nobody wrote"):
        OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)


def test_a_fill_past_its_tensor_is_found() -> None:
    x, _ = tensors()
    fill = ctypes.CDLL(None).cudaMemset
    fill.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    assert fill(x.data_ptr(), 0, x.nbytes) == 0
    assert fill(x.data_ptr(), 0, x.nbytes + 4) == 1


def test_torch_s_own_kernels_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"no PTX of torch's own kernel .*dropout"):
        torch.ops.aten._fused_dropout(torch.ones(8, device="cuda"), 0.5)


def test_a_call_that_waits_is_told_from_one_that_does_not() -> None:
    """What test_cuda.py's test_no_call_waits_for_the_gpu goes by."""
    total = torch.ones(4, device="cuda")
    asleep = torch.cuda.Event()
    torch.cuda._sleep(1000)
    asleep.record()
    total.add_(1)
    assert not asleep.query()
    assert total.sum().item() == 8
    assert asleep.query()
