"""The CUDA glue under a real torch, on the stand-in for the CUDA runtime (tests/standin): streams, work, faults."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bn_ext
from bn_ext.functional import batch_norm
from support import module_for, normal

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


@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_two_kernels_and_nothing_else(training: bool) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 8, "cuda:0", momentum=None).train(training)
    x, g = tensors()
    leaves = [x.requires_grad_(), *module.parameters()]
    work = [name for _, name in work_of(lambda: torch.autograd.grad(module(x), leaves, g))]
    assert len(work) == 2 and all("bn_ext::cuda" in name for name in work), work


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
