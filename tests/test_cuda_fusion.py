"""What only a GPU can show of the fused calls: every regime, one launch, graphs, repeatability, memory in place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bn_ext
import regimes
from support import act_module_for, module_for, no_cuda_reason, normal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from timing_cuda import launched

pytestmark = pytest.mark.skipif(bool(no_cuda_reason()), reason=no_cuda_reason() or "there is a GPU")
GPU = torch.device("cuda:0")
SHAPES = [(32, 64), (65536, 64), (64, 32, 16), (8192, 16, 16), (4, 4, 65536)]
# By the argument, by the sum with a residual, by forward's mask.
FOLLOWED = [("gelu", False), ("silu", True), ("relu", True)]
followed = pytest.mark.parametrize(("activation", "sums"), FOLLOWED, ids=["argument", "sum", "mask"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def made(shape: tuple[int, ...], activation: str, sums: bool) -> tuple[bn_ext.BatchNormAct1d, list[Tensor], Tensor]:
    """(module, input and the residual if any, gradient of the output)."""
    module = act_module_for(shape[1], "cuda:0", activation)
    operands = [normal(shape, torch.float32, "cuda:0", seed=k).requires_grad_() for k in range(1 + sums)]
    return module, operands, normal(shape, torch.float32, "cuda:0", seed=2)


def step(module: torch.nn.Module, operands: list[Tensor], g: Tensor) -> list[Tensor]:
    y = module(*operands)
    return [y.detach(), *torch.autograd.grad(y, [*operands, *module.parameters()], g)]


@pytest.mark.parametrize("case", [c for c in regimes.CASES if not c.options], ids=str)
def test_every_regime_against_float64(case: regimes.Case) -> None:
    regimes.check_followed(case, "cuda:0")


@followed
@shapes
def test_one_launch_each(shape: tuple[int, ...], activation: str, sums: bool) -> None:
    """Forward with its mask and backward with all gradients, as with nothing behind batch norm."""
    module, operands, g = made(shape, activation, sums)
    y = module(*operands)
    wanted = [*operands, *module.parameters()]
    for call in (lambda: module(*operands), lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)):
        kernels = launched(call, GPU)
        assert len(kernels) == 1 and "bn_ext" in kernels[0], kernels


@followed
@shapes
def test_runs_repeat_bit_by_bit(shape: tuple[int, ...], activation: str, sums: bool) -> None:
    module, operands, g = made(shape, activation, sums)
    first = step(copy.deepcopy(module), operands, g)
    for _ in range(3):
        again = step(copy.deepcopy(module), operands, g)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@followed
@shapes
def test_graph_of_a_training_step(shape: tuple[int, ...], activation: str, sums: bool) -> None:
    """Every replay is bitwise the eager step, running statistics included."""
    eager, operands, g = made(shape, activation, sums)
    graphed = copy.deepcopy(eager)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(graphed, operands, g)
    torch.cuda.current_stream().wait_stream(aside)
    graphed.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(graphed, operands, g)
    for seed in range(3):
        with torch.no_grad():
            for k, t in enumerate(operands):
                t.copy_(normal(shape, torch.float32, "cuda:0", seed=10 * seed + k))
        expected = step(eager, operands, g)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(graphed.buffers(), eager.buffers(), strict=True))


def test_in_place_takes_no_memory() -> None:
    norm = module_for(bn_ext.FusedBatchNorm1d, 64, "cuda:0")
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    x = normal((65536, 64), torch.float32, "cuda:0")

    def call(x: Tensor) -> Tensor:
        return bn_ext.functional.batch_norm(x, *state, activation="silu", inplace=True)

    with torch.no_grad():
        call(x.clone())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert call(x) is x
        assert torch.cuda.max_memory_allocated() - before < x.nbytes // 100
