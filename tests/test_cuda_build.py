"""A build with CUDA kernels on a machine without a GPU: operators are registered, fake tensors pass through."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from bn_ext import _C, _guard

RECORD = _guard.read_record()
pytestmark = pytest.mark.skipif(not RECORD["cuda"], reason=f"a build without CUDA kernels: {RECORD['cuda_reason']}")
FAMILY = ("forward", "inference", "inference_", "backward", "double_backward")


@pytest.mark.parametrize("name", [f"batch_norm_{part}" for part in FAMILY])
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bn_ext::{name}", "CUDA")


def test_the_library_says_for_which_gpus_it_is() -> None:
    info = _C.build_info()
    assert info["cuda_codes"] == RECORD["cuda_codes"]
    assert RECORD["cuda_codes"].startswith("sm_")
    assert info["cuda"]


def network(fuse: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4, device="cuda"), nn.BatchNorm1d(4, device="cuda"), nn.ReLU())
    return bn_ext.convert(model, fuse=fuse)


def is_norm(node: torch.fx.Node) -> bool:
    return "norm" in str(node.target)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compile_and_export_of_fake_cuda_tensors(fuse: bool, training: bool) -> None:
    """As a machine without a GPU makes a program for one that has it."""
    calls: list[tuple[str, bool]] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        calls.extend((str(node.target), "relu" in node.args) for node in graph.graph.nodes if is_norm(node))
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = network(fuse).train(training)
        x = torch.randn(8, 6, device="cuda")
        y = model(x)
        assert (y.device.type, y.shape) == ("cuda", (8, 4))
        torch.compile(model, backend=backend, fullgraph=True)(x)
        program = torch.export.export(model, (x,))
    targets = [(str(node.target), "relu" in node.args) for node in program.graph.nodes if is_norm(node)]
    assert calls == targets == [("bn_ext.batch_norm.default", fuse)]
