"""Programs that leave the process: torch.export, AOTInductor, ONNX, torch.jit.trace and torch.jit.script."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from support import OPTIONS, SHAPES, OpLog, act_module_for, module_for, normal, pair, step
from test_compile import needs_compiler

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # deprecated, and still in use
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # torch's own use of its own deprecated class
]
FUSED = bn_ext.FusedBatchNorm1d
BATCH = torch.export.Dim("batch")


def network(cls: type[nn.BatchNorm1d], device: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    linear = [nn.Linear(6, 5, device=device), nn.Linear(5, 3, device=device)]
    return nn.Sequential(linear[0], module_for(cls, 5, device, **options), nn.ReLU(), linear[1])


def copies(device: str, training: bool, **options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    model = network(FUSED, device, **options).train(training)
    return model, copy.deepcopy(model)


def norms(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "norm" in str(node.target) and node.op == "call_function"]


# ---- torch.export ----


def _saved(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


EXPORTS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "as_is": ({}, lambda program: program),
    "strict": ({"strict": True}, lambda program: program),
    "any_batch": ({"dynamic_shapes": ({0: BATCH},)}, lambda program: program),
    "saved": ({"dynamic_shapes": ({0: BATCH},)}, _saved),
    "decomposed": ({"dynamic_shapes": ({0: BATCH},)}, lambda program: program.run_decompositions()),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", EXPORTS)
def test_exported_program_runs_our_kernels(device: str, way: str, training: bool, momentum: float | None) -> None:
    model, eager = copies(device, training, momentum=momentum)
    options, after = EXPORTS[way]
    program = after(torch.export.export(model, (normal((4, 6), device=device),), **options))
    assert model[1].num_batches_tracked.item() == 0, "export itself counts no batch"
    exported = program.module()
    for seed in range(2):
        x = normal((9 if "dynamic_shapes" in options else 4, 6), device=device, seed=seed)
        assert torch.equal(exported(x), eager(x))
    mine, theirs = exported.state_dict(), eager.state_dict()
    # A strict export of an evaluation leaves out the counter, which it never reads.
    assert set(theirs) - set(mine) <= ({"1.num_batches_tracked"} if way == "strict" and not training else set())
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("training", [True, False])
def test_exported_program_is_differentiable(device: str, training: bool) -> None:
    """What quantisation-aware training builds on: a graph that is still trained."""
    model, eager = copies(device, training)
    program = torch.export.export(model, (normal((4, 6), device=device),))
    assert norms(program.graph) == ["bn_ext.batch_norm.default"]
    exported, x = program.module(), normal((4, 6), device=device, seed=1)
    for call in (exported, eager):
        call(x).square().sum().backward()
    for (name, mine), theirs in zip(exported.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_reverted_model_exports_without_us(device: str) -> None:
    model = bn_ext.revert(network(FUSED, device).eval())
    program = torch.export.export(model, (normal((4, 6), device=device),))
    assert norms(program.graph) == ["aten.batch_norm.default"]


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's machinery warns of its own parts
def test_aot_inductor_package(device: str, tmp_path: Path) -> None:
    model, eager = copies(device, False)
    program = torch.export.export(model, (normal((4, 6), device=device),), dynamic_shapes=({0: BATCH},))
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for batch in (4, 9):
            x = normal((batch, 6), device=device, seed=batch)
            # The linear layers may be other kernels: some tens of roundings of a sum of products.
            bound = 64 * torch.finfo(torch.float32).eps * float(eager(x).abs().max())
            torch.testing.assert_close(loaded(x), eager(x), rtol=0, atol=bound)
            with OpLog() as log:
                loaded(x)
            assert [name.split(".")[0] for name in log.names] == ["bn_ext::batch_norm_inference"]


# ---- ONNX ----


def _onnx_by_export(model: nn.Module, x: Tensor) -> bytes:
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    return program.model_proto.SerializeToString()


def _onnx_by_trace(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
@pytest.mark.filterwarnings("ignore:The feature will be removed")
@pytest.mark.parametrize("exporter", [_onnx_by_export, _onnx_by_trace], ids=["export", "trace"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3)], ids=str)
def test_onnx_has_the_standard_operator(
    device: str, shape: tuple[int, ...], exporter: Callable[[nn.Module, Tensor], bytes]
) -> None:
    """Evaluation becomes ONNX's BatchNormalization, and another runtime computes with it what we compute."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    module = module_for(FUSED, shape[1], device).eval()
    data = exporter(nn.Sequential(module, nn.Tanh()).eval(), normal(shape, device=device))
    graph = onnx.load_from_string(data).graph
    assert [node.op_type for node in graph.node if node.op_type != "Identity"] == ["BatchNormalization", "Tanh"]

    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = normal((11, *shape[1:]), device=device, seed=1, mean=1.0)
    with OpLog() as log:
        right = module(x)
    assert log.names == ["bn_ext::batch_norm_forward"], "the export is over: our kernels again"
    (out,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    scale = (module.weight / (module.running_var + module.eps).sqrt()).abs()
    # The largest term of (x - mean) * scale + bias, in any order, rounded a few times; tanh has slope 1 at most.
    largest = ((x.abs().amax() + module.running_mean.abs()) * scale + module.bias.abs()).max().item()
    bound = 8 * torch.finfo(torch.float32).eps * max(largest, 1.0)
    torch.testing.assert_close(torch.from_numpy(out), right.tanh().detach().cpu(), rtol=0, atol=bound)


LONE: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: bn_ext.FusedBatchNorm1d(5),
    "converted": lambda: bn_ext.convert(nn.BatchNorm1d(5)),
    "frozen": lambda: bn_ext.freeze(bn_ext.FusedBatchNorm1d(5, allow_single_value=True)),
    "renorm": lambda: bn_ext.FusedBatchRenorm1d(5),
    "act": lambda: bn_ext.BatchNormAct1d(5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exporter", [_onnx_by_export, _onnx_by_trace], ids=["export", "trace"])
@pytest.mark.parametrize("made", LONE)
def test_onnx_of_a_module_alone(made: str, exporter: Callable[[nn.Module, Tensor], bytes]) -> None:
    runtime, module, x = pytest.importorskip("onnxruntime"), LONE[made]().eval(), normal((4, 5))
    session = runtime.InferenceSession(exporter(module, x))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x).detach())


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
@pytest.mark.filterwarnings("ignore:The feature will be removed")
@pytest.mark.parametrize("exporter", [_onnx_by_export, _onnx_by_trace], ids=["export", "trace"])
def test_onnx_of_what_follows(device: str, exporter: Callable[[nn.Module, Tensor], bytes]) -> None:
    """A fused activation becomes the standard operators one after the other."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    module = act_module_for(5, device).eval()
    data = exporter(nn.Sequential(module).eval(), normal((6, 5), device=device))
    graph = onnx.load_from_string(data).graph
    assert [node.op_type for node in graph.node if node.op_type != "Identity"] == ["BatchNormalization", "Relu"]
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    x = normal((11, 5), device=device, seed=1)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    # Some roundings of terms of size 10 at the most.
    bound = 8 * torch.finfo(torch.float32).eps * 10
    torch.testing.assert_close(torch.from_numpy(out), module(x).detach().cpu(), rtol=0, atol=bound)


# ---- TorchScript ----


# momentum=1: torch.jit.script finds an int where nn.BatchNorm1d's forward needs a float, and refuses.
SCRIPTED = {name: options for name, options in OPTIONS.items() if name != "momentum_int"}


def _reloaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("training", [True, False])
def test_traced_module_runs_our_kernels(device: str, training: bool) -> None:
    model, eager = copies(device, training)
    traced = torch.jit.trace(model, normal((4, 6), device=device), check_trace=False)
    traced.load_state_dict(eager.state_dict())
    for call in (traced, _reloaded(traced)):
        other, x = copy.deepcopy(eager), normal((9, 6), device=device, seed=1)
        assert torch.equal(call(x), other(x))
        call(x).square().sum().backward(), other(x).square().sum().backward()
        for mine, theirs in zip(call.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        for mine, theirs in zip(call.buffers(), other.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", SCRIPTED.values(), ids=SCRIPTED)
def test_scripted_module_is_natives(device: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """torch.jit.script compiles torch's own forward: nn.BatchNorm1d's bits, in a file that needs no bn_ext."""
    ours, native = pair(5, device, **options)
    scripted = torch.jit.script(ours)
    assert "bn_ext::" not in str(scripted.inlined_graph)
    for training in (True, False):
        scripted.train(training), native.train(training)
        x, g = normal(shape, device=device, mean=1.0), normal(shape, device=device, seed=1)
        for mine in (scripted, _reloaded(scripted)):
            results = astuple(step(mine, x, g)), astuple(step(copy.deepcopy(native), x, g))
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        native(x)
    assert type(ours) is FUSED, "scripting leaves the module as it was"


def test_scripted_model_can_be_frozen(device: str) -> None:
    model = network(FUSED, device).eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    x = normal((9, 6), device=device)
    # Some tens of roundings of the linear layers' sums, at the size of the output.
    bound = 64 * torch.finfo(torch.float32).eps * model(x).abs().max().item()
    torch.testing.assert_close(frozen(x), model(x), rtol=0, atol=bound)


def test_scripted_function_is_natives(device: str) -> None:
    scripted = torch.jit.script(bn_ext.functional.batch_norm)
    mean, var = normal((5,), device=device), normal((5,), device=device).abs() + 0.5
    x = normal((6, 5), device=device)
    assert torch.equal(scripted(x, mean, var), F.batch_norm(x, mean, var))
    assert torch.equal(scripted(x, None, None, None, None, True), F.batch_norm(x, None, None, training=True))
    expected = F.leaky_relu(F.batch_norm(x, mean, var) + x, 0.3)
    y = x.clone()
    assert torch.equal(scripted(y, mean, var, residual=x, activation="leaky_relu", negative_slope=0.3), expected)
    assert torch.equal(scripted(y, mean, var, residual=x, activation="leaky_relu", negative_slope=0.3, inplace=True), y)
    assert torch.equal(y, expected)
    with pytest.raises(torch.jit.Error, match="no such activation: tanh"):
        scripted(x, mean, var, activation="tanh")


def test_scripted_module_refuses_as_native() -> None:
    scripted = torch.jit.script(FUSED(5))
    with pytest.raises(torch.jit.Error, match="expected 2D or 3D input"):
        scripted(torch.zeros(2, 5, 3, 3))
