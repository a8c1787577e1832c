"""A build with CUDA kernels on a machine without a GPU: operators are registered, fake tensors pass through, and what
asks for a GPU says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from bn_ext import _C, _guard, launches
from support import assert_same, error_of, module_for, normal, step

RECORD = _guard.read_record()
pytestmark = pytest.mark.skipif(not RECORD["cuda"], reason=f"a build without CUDA kernels: {RECORD['cuda_reason']}")
GPU = torch.cuda.is_available()


def registered(key: str) -> set[str]:
    """The library's operators that have a kernel for a dispatch key."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bn_ext::")}
    return {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)}


def test_every_operator_with_a_kernel_for_the_cpu_has_one_for_cuda() -> None:
    assert registered("CUDA") == registered("CPU")
    assert "bn_ext::batch_norm_forward" in registered("CUDA")


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


# ---- each kind of call on fake tensors: shapes, strides and devices as the CPU gives them. torch's engine wants a GPU
# for a backward of "cuda" tensors, fake ones too, so its operators are called by hand ----

OPS = torch.ops.bn_ext


def forward(x: torch.Tensor, training: bool, **options: object) -> list[torch.Tensor]:
    norm = module_for(bn_ext.FusedBatchNorm1d, 3, str(x.device))
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return [bn_ext.functional.batch_norm(x, *state, training, **options)]  # type: ignore[arg-type]


def backward(x: torch.Tensor, training: bool) -> list[torch.Tensor]:
    y, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    wanted = [True, True, True, False]
    return [y, saved, *(t for t in OPS.batch_norm_backward(y, x, None, saved, training, wanted) if t is not None)]


CALLS: dict[str, Callable[[torch.Tensor, bool], list[torch.Tensor]]] = {
    "plain": forward,
    "followed": lambda x, training: forward(x, training, residual=x + 1, activation="gelu"),
    "lengths": lambda x, training: forward(x, training, lengths=torch.tensor([5, 2, 1, 4], device=x.device)),
    "virtual batches": lambda x, training: forward(x, training, virtual_batch_size=2),
    "backward": backward,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CALLS)
def test_fake_tensors_of_each_kind_of_call(kind: str, dtype: torch.dtype, training: bool) -> None:
    def results(device: str) -> list[torch.Tensor]:
        return CALLS[kind](normal((4, 3, 5), dtype, device), training)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = results("cuda")
    with torch.no_grad():
        real = results("cpu")
    assert {t.device.type for t in fake} == {"cuda"}
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


# ---- no GPU ----

no_gpu = pytest.mark.skipif(GPU, reason="there is a GPU")


def test_the_cpu_computes_as_native_does() -> None:
    ours, native = (module_for(cls, 3, dtype=torch.float64) for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d))
    x, g = normal((6, 3, 4), torch.float64), normal((6, 3, 4), torch.float64, seed=1)
    assert_same(step(ours, x, g), step(native, x, g))


@no_gpu
def test_a_module_for_a_gpu_fails_as_native_does() -> None:
    errors = [error_of(lambda cls=cls: cls(4, device="cuda")) for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d)]
    assert errors[0] == errors[1] and errors[0] is not None
    assert "NVIDIA" in errors[0][1]
    errors = [error_of(lambda cls=cls: cls(4).cuda()) for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d)]
    assert errors[0] == errors[1] and errors[0] is not None


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*(NVIDIA|GPU|CUDA)"):
        launches.device(name)


@no_gpu
def test_what_is_told_of_the_build(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bn_ext"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no: the kernels are there" in done.stdout and "but torch sees no GPU" in done.stdout
