"""torch.compile: one graph, one compilation, and eager's own bits, for training, evaluation and torch.func inside."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import bn_ext
from support import error_of, module_for, normal

pytestmark = [
    pytest.mark.usefixtures("_zero_counters"),
    # torch loads its own parts through its own deprecated jit.script.
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")) or sys.platform == "win32",
    reason="torch's inductor needs a C++ compiler here",
)
FUSED = bn_ext.FusedBatchNorm1d
F64 = torch.float64


@pytest.fixture
def _zero_counters() -> None:
    counters.clear()


@pytest.mark.parametrize("turn", range(torch._dynamo.config.recompile_limit + 1))
def test_compilations_of_other_tests_do_not_count(turn: int) -> None:
    """Of the suite itself: one forward in many graphs over many tests reaches torch's limit (conftest.py)."""
    torch.compile(FUSED(turn + 1), backend="eager", fullgraph=True)(normal((4, turn + 1)))


class Calls:
    """A backend that runs graphs as they are and keeps the names of what they call."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


class Contiguous(nn.Module):
    """Fixes the strides of the gradient that comes in, which torch.compile is free to choose: sums follow strides."""

    def forward(self, input: Tensor) -> Tensor:
        return input.contiguous()


def network(device: str, **options: Any) -> nn.Sequential:
    """Around batch norm, operations that every compiler computes exactly: a difference of bits is batch norm's."""
    first, second = (module_for(FUSED, 8, device, **options) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, Contiguous())


def learn(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and every gradient of one call, and the buffers after it."""
    leaf = x.detach().requires_grad_()
    out = call(leaf)
    grad_output = normal(tuple(out.shape), device=str(x.device), seed=9)
    grads = torch.autograd.grad(out, [leaf, *model.parameters()], grad_output)
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def rows(*sizes: int) -> list[tuple[int, ...]]:
    return [(n, 8) for n in sizes]


# shapes, dynamic=, options, layout, graphs of training and evaluation together: "automatic" is surprised by the second
# shape once, and remembers
CASES = {
    "static": ([(6, 8, 5)] * 2, False, {}, (1, 2), 2),
    "dynamic": (rows(6, 32, 17, 5), True, {"momentum": None}, None, 2),
    "automatic": ([(3, 8, 5), (6, 8, 5), (7, 8, 5)], None, {"affine": False}, None, 3),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_one_compilation_and_eagers_bits(device: str, case: str) -> None:
    """With the compiler that users get; no graph break, no compilation for a batch size."""
    shapes, dynamic, options, transposed, graphs = CASES[case]
    eager, traced = network(device, **options), network(device, **options)
    compiled = torch.compile(traced, fullgraph=True, dynamic=dynamic)
    for training in (True, False):
        eager.train(training), traced.train(training)
        for seed, shape in enumerate(shapes):
            x = normal(shape, device=device, seed=seed, mean=1.0)
            if transposed:
                x = x.transpose(*transposed).contiguous().transpose(*transposed)
            assert_equal(learn(traced, compiled, x), learn(eager, eager, x))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(device: str, mode: Callable[[], Any], training: bool) -> None:
    eager, traced = network(device).train(training), network(device).train(training)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = normal((6, 8), device=device)
    with mode():
        assert torch.equal(compiled(x), eager(x))
    assert_equal(list(traced.buffers()), list(eager.buffers()))


class Positive(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.exp()


def _plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def _functional(model: nn.Module, x: Tensor) -> Tensor:
    first = model[0]
    running = first.running_mean, first.running_var
    return bn_ext.functional.batch_norm(x, *running, first.weight, first.bias, first.training) + 0 * model(x)


@pytest.mark.parametrize("around", ["autocast", "default_device", "parametrized", "checkpoint", "functional"])
def test_what_may_surround_it(device: str, around: str) -> None:
    """Each is traced whole and gives eager's bits; only checkpoint's counter may differ, as it does for native."""
    eager = network(device)
    if around == "parametrized":
        nn.utils.parametrize.register_parametrization(eager[0], "weight", Positive())
    traced = copy.deepcopy(eager)
    run = {"checkpoint": _checkpointed, "functional": _functional}.get(around, _plain)
    context = {
        "autocast": lambda: torch.autocast(torch.device(device).type, dtype=torch.bfloat16),
        "default_device": lambda: torch.device(device),
    }.get(around, nullcontext)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = normal((6, 8), device=device)
    results = []
    for model, call in ((traced, compiled), (eager, run)):
        with context():
            results.append(learn(model, lambda x, m=model, c=call: c(m, x), x))
    learned = len(results[0]) - len(list(eager.buffers()))
    keep = learned if around == "checkpoint" else None
    assert_equal(results[0][:keep], results[1][:keep])


def test_compiled_training_graph_holds_our_operator_alone(device: str) -> None:
    calls = Calls()
    model = network(device)
    torch.compile(model, fullgraph=True, backend=calls)(normal((6, 8), device=device))
    (graph,) = calls.graphs
    assert [name for name in graph if "norm" in name] == ["bn_ext.batch_norm.default"] * 2


def test_a_device_without_kernels_is_native_from_the_trace_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph runs where no exception handler of ours does: the choice cannot wait for the kernel to be missing."""
    monkeypatch.setattr(bn_ext.dispatch, "kernels_on", lambda device: False)
    calls = Calls()
    torch.compile(network(device), fullgraph=True, backend=calls)(normal((6, 8), device=device))
    (graph,) = calls.graphs
    assert graph and not any("bn_ext" in name for name in graph)


def test_errors_of_a_compiled_module(device: str) -> None:
    """One value per channel: eager's error, and no buffer has moved."""
    eager, traced = network(device), network(device)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    before = [b.clone() for b in traced.buffers()]
    assert error_of(lambda: compiled(normal((1, 8), device=device))) == error_of(
        lambda: eager(normal((1, 8), device=device))
    )
    assert_equal(list(traced.buffers()), before)


# ---- torch.func inside of torch.compile ----


def _grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.grad(lambda x: f(x).pow(3).sum())(x)


def _jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(f, (x,), (x.square(),))


def _vmap(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.vmap(f)(torch.stack([x, x.square()]))


def _jacrev(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jacrev(f)(x)


@pytest.mark.parametrize("transform", [_grad, _jvp, _vmap, _jacrev], ids=lambda f: f.__name__.strip("_"))
def test_transforms_inside_are_right(device: str, transform: Callable[..., Any]) -> None:
    """Next to native's own transform, eager: a transform that loses a derivative says nothing."""
    x = normal((5, 4), F64, device)

    def run(x: Tensor, batch_norm: Callable[..., Tensor]) -> Any:
        return transform(lambda x: batch_norm(x, None, None, training=True), x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bn_ext.functional.batch_norm), run(x, F.batch_norm))


# ---- compiled autograd ----


@pytest.mark.parametrize("training", [True, False])
def test_compiled_autograd_traces_the_node(device: str, training: bool) -> None:
    """An eager forward whose backward is compiled: the node in C++ is seen through, without a graph break."""
    eager, traced = network(device).train(training), network(device).train(training)
    x = normal((6, 8), device=device)
    expected = learn(eager, eager, x)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        assert_equal(learn(traced, traced, x), expected)


# ---- the differentiable operator, which is what torch.compile and torch.export see ----


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_the_differentiable_operator(device: str, training: bool) -> None:
    module = module_for(FUSED, 4, device)
    x = normal((3, 4, 5), device=device).requires_grad_()
    tensors = module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked
    momentum = 0.1 if training else 0.0
    torch.library.opcheck(torch.ops.bn_ext.batch_norm.default, (x, *tensors, training, momentum, 1e-5))
