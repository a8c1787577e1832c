"""Ours put in the place of torch's names, under torch's tools and modes, and given what it cannot use: as native."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

import bn_ext
from drop_in import CLASSES, F64, FUSED, NATIVE, Norm, Raised, assert_alike, both, held, outcome, ran, told
from support import OpLog, module_for, normal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
]
OURS, THEIRS = bn_ext.functional.batch_norm, F.batch_norm


# ---- torch's names replaced ----


def network(kind: type[Norm] | None = None) -> nn.Sequential:
    """A network whose batch norms are those of nn.BatchNorm1d as it is now, or of kind."""
    torch.manual_seed(0)
    norms = [module_for(kind or nn.BatchNorm1d, 5) for _ in range(2)]
    return nn.Sequential(nn.Conv1d(3, 5, 2), norms[0], nn.ReLU(), nn.Sequential(norms[1], nn.Conv1d(5, 5, 1))).double()


X = (4, 3, 6)


def steps(model: Callable[[Tensor], Tensor], device: str) -> list[object]:
    """Two calls of model and their gradients; of a module its state too."""
    seen: list[object] = [ran(model, normal(X, F64, device, seed=k).requires_grad_()) for k in range(2)]  # type: ignore[arg-type]
    if isinstance(model, nn.Module):
        seen += [[p.grad for p in model.parameters()], list(model.buffers())]
    return seen


def traced_by_fx(model: nn.Module, device: str) -> object:
    graph = torch.fx.symbolic_trace(model)
    return [(n.op, str(n.target)) for n in graph.graph.nodes], steps(graph, device), steps(copy.deepcopy(graph), device)


def copied(model: nn.Module, device: str) -> object:
    file = io.BytesIO()
    torch.save(model, file)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    return [(steps(m, device), repr(m)) for m in copies]


def scripted(model: nn.Module, device: str) -> object:
    script = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return steps(script, device), steps(torch.jit.load(file), device), [n.kind() for n in script.inlined_graph.nodes()]


def frozen(model: nn.Module, device: str) -> object:
    """The graph, in which a convolution may have swallowed the batch norm, and what it computes."""
    model.eval()
    x = normal(X, F64, device)
    kept = torch.jit.freeze(torch.jit.script(model), preserved_attrs=["training"])
    folded = torch.jit.freeze(torch.jit.script(model))
    best = torch.jit.optimize_for_inference(torch.jit.script(model))
    kinds = [[n.kind() for n in m.graph.nodes()] for m in (kept, folded, best)]
    return (
        kinds,
        [m(x).detach() for m in (kept, folded, best)],
        outcome(lambda: torch.jit.freeze(torch.jit.script(model.train()))),
    )


def folded_by_fx(model: nn.Module, device: str) -> object:
    folded = fuse(model.eval())
    return [type(m) for m in folded.modules()][1:], folded(normal(X, F64, device)).detach()


def converted(model: nn.Module, device: str) -> object:
    """A model of torch's own classes, made before: there and back."""
    model = network(NATIVE).to(device)
    ours = bn_ext.convert(copy.deepcopy(model), fuse=True)
    assert type(ours[1]) is FUSED
    seen = steps(ours, device)
    assert type(bn_ext.revert(ours)[1]) is NATIVE
    return seen, steps(model, device), steps(ours, device), isinstance(ours[1], NATIVE)


def lazy(model: nn.Module, device: str) -> object:
    model = nn.Sequential(nn.LazyConv1d(4, 1), nn.LazyBatchNorm1d(momentum=None)).to(device, F64)
    return repr(model), steps(model, device), repr(model), list(model.state_dict())


def synchronised(model: nn.Module, device: str) -> object:
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    return synced, steps(synced, device), outcome(lambda: synced.cpu().train()(normal(X, F64)))


def called_with_other_tensors(model: nn.Module, device: str) -> object:
    """torch.func.functional_call: buffers that are passed move, the module's own do not; tied weights; refusals."""
    model[3][0].weight = model[1].weight
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    del state["3.0.weight"]
    state["1.weight"] *= 2
    x = normal(X, F64, device)
    call = torch.func.functional_call
    seen: list[Any] = [call(model, state, x), call(model, state, x, tie_weights=False), state, list(model.buffers())]
    refused = (
        lambda: call(model, {**state, "3.0.weight": state["1.weight"] * 1}, x),
        lambda: call(model, {**state, "none": x}, x),
        lambda: call(model, {"1.weight": state["1.weight"]}, x, strict=True),
        lambda: call(model.eval(), {"1.running_mean": x}, x),
    )
    return seen, [outcome(c) for c in refused], list(model.state_dict().items())


def averaged(model: nn.Module, device: str) -> object:
    average = AveragedModel(model, use_buffers=True)
    seen = steps(model, device)
    average.update_parameters(model)
    return seen, steps(average, device), list(average.state_dict().items())


def exported(model: nn.Module, device: str) -> object:
    program = torch.export.export(model, (normal(X, F64, device),))
    signature = program.graph_signature
    return steps(program.module(), device), signature.buffers, signature.buffers_to_mutate, signature.parameters


def compiled(model: nn.Module, device: str) -> object:
    torch._dynamo.reset()
    return steps(torch.compile(model, backend="aot_eager", fullgraph=True), device)


def subclassed(model: nn.Module, device: str) -> object:
    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            mean, var = self.running_mean, self.running_var
            again = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
            return super().forward(input) + again

    return steps(module_for(Own, 3, device, dtype=F64), device)


def of_other_ranks(model: nn.Module, device: str) -> object:
    """What else calls torch.nn.functional.batch_norm."""
    found = []
    for kind, shape in (
        (nn.BatchNorm2d, (3, 4, 2, 2)),
        (nn.BatchNorm3d, (3, 4, 2, 2, 2)),
        (nn.SyncBatchNorm, (3, 4, 2)),
    ):
        other = kind(4).to(device, F64).train(kind is not nn.SyncBatchNorm)
        x = normal(shape, F64, device)
        found.append((ran(other, x.requires_grad_()), held(other)))
        if kind is not nn.SyncBatchNorm:
            found.append((torch.jit.script(other.eval())(x), torch.fx.symbolic_trace(nn.Sequential(other))(x)))
    return found


TOOLS = (traced_by_fx, copied, scripted, frozen, folded_by_fx, converted, lazy, synchronised,
         called_with_other_tensors, averaged, exported, compiled, subclassed, of_other_ranks)  # fmt: skip


@pytest.mark.parametrize("which", ["class", "function", "both", "every_name"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_names_of_torch_replaced(
    device: str, tool: Callable[[nn.Module, str], object], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [outcome(lambda: tool(network().to(device), device))]
    torch._dynamo.reset()
    if which in ("class", "both"):
        monkeypatch.setattr(nn, "BatchNorm1d", FUSED)
    if which in ("function", "both"):
        monkeypatch.setattr(F, "batch_norm", OURS)
    if which == "every_name":
        for module in (nn, nn.modules, nn.modules.batchnorm):
            monkeypatch.setattr(module, "BatchNorm1d", FUSED)
            monkeypatch.setattr(module, "LazyBatchNorm1d", bn_ext.LazyFusedBatchNorm1d)
    seen.insert(0, outcome(lambda: tool(network().to(device), device)))
    assert_alike(*seen)
    assert not isinstance(seen[1], Raised), seen[1]


EARLY = """
import torch, bn_ext
from torch import nn
nn.BatchNorm1d = bn_ext.FusedBatchNorm1d
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.fx.experimental.optimization import fuse
x = torch.randn(4, 3, 6)
model = nn.Sequential(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), nn.ReLU())
model(x)
model.eval()
right = model(x)
bn_ext.revert(model)  # they go by the exact type: README.md
for folded in (fuse_modules(model, ["0", "1", "2"]), fuse_modules(model, ["0", "1"]), fuse(model)):
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules()), folded
    torch.testing.assert_close(folded(x), right)
print(type(fuse_modules_qat(model.train(), ["0", "1", "2"])[0]).__name__)
"""


def test_a_program_that_replaces_the_class_before_it_imports_the_tools() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", EARLY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ConvBnReLU1d"


@pytest.mark.parametrize("tool", [frozen, folded_by_fx], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_folding_of_every_kind_of_batch_norm(device: str, tool: Any, options: dict[str, Any]) -> None:
    """Where torch.fx's rewriter goes by the exact type, the reverted model is what it takes (README.md)."""

    def scenario(cls: type[Norm]) -> object:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 5, 2), module_for(cls, 5, **options), nn.ReLU()).to(device, F64)
        return tool(bn_ext.revert(model) if tool is folded_by_fx else model, device)

    for cls in CLASSES:  # torch warns of the age of what it is shown first, once a process and class
        told(lambda cls=cls: scenario(cls))
    both(scenario)


# ---- somebody else in the place of torch.nn.functional.batch_norm ----


def described(value: object) -> object:
    return (value.shape, value.dtype, value.requires_grad) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("way", ["module", "fused", "compiled", "fused_compiled", "scripted", "checkpoint", "vmap"])
@pytest.mark.parametrize("wrapper", ["profiler", "other", "raises"])
def test_somebody_elses_function(
    device: str, wrapper: str, way: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        if wrapper == "raises":
            raise KeyError("not today")
        if "compiled" not in way:
            calls.append([described(a) for a in args] + [(k, described(v)) for k, v in kwargs.items()])
        return args[0] * 2 if wrapper == "other" else THEIRS(*args, **kwargs)

    def scenario(cls: type[Norm]) -> object:
        calls.clear()
        torch._dynamo.reset()
        norm = module_for(cls, 5, device, dtype=F64).train(training)
        model: Any = nn.Sequential(norm, nn.ReLU())
        if "fused" in way and cls is FUSED:
            model = bn_ext.convert(model, fuse=True)
        if "compiled" in way:
            model = torch.compile(model, backend="eager")
        before = held(norm)
        if way == "checkpoint":
            call = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # noqa: E731
        elif way == "vmap":
            call = lambda x: torch.vmap(model, randomness="different")(x.expand(2, 6, 5))  # noqa: E731
        else:
            call = torch.jit.script(model) if way == "scripted" else model
        result = outcome(lambda: ran(call, normal((6, 5), F64, device).requires_grad_()))
        if isinstance(result, Raised):
            assert cls is NATIVE or "compiled" in way or outcome(lambda: assert_alike(held(norm), before)) is None
            return result.kind
        return result, held(norm), list(calls)

    if way == "vmap" and training:
        pytest.skip("torch has no rule for statistics that are updated in place")
    monkeypatch.setattr(F, "batch_norm", replacement)
    both(scenario)


# ---- modes ----


class Log(TorchFunctionMode):
    """Writes down every function of torch that is called, and lets one of them do something else."""

    def __init__(self, instead: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [described(a) for a in args] + [(k, described(v)) for k, v in (kwargs or {}).items()]
        self.seen.append((getattr(func, "__name__", str(func)), given))
        replaced = self.instead is not None and getattr(func, "__name__", "") == "batch_norm"
        return (self.instead if replaced else func)(*args, **(kwargs or {}))


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("not today")


INSTEAD: dict[str, Callable[..., Any] | None] = {"log": None, "other": lambda x, *a, **k: x * 2, "refuses": refuses}
CALLED = {
    "rows": ({}, (6, 5)), "planes": ({}, (4, 5, 3)), "momentum_none": ({"momentum": None}, (6, 5)),
    "no_tracking": ({"track_running_stats": False}, (6, 5)), "no_affine": ({"affine": False}, (6, 5)),
    "empty": ({}, (0, 5)), "one_value": ({}, (1, 5)), "wrong_rank": ({}, (2, 5, 3, 3)), "wrong_size": ({}, (6, 4)),
    "eps": ({"eps": -1.0}, (6, 5)),
}  # fmt: skip


@pytest.mark.parametrize("way", ["module", "fused", "twice", "compiled"])
@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("case", CALLED)
def test_modes_see_what_they_see_of_native(device: str, case: str, instead: str, way: str, training: bool) -> None:
    """The very calls, in their order, with their arguments, and what the mode makes of them."""
    options, shape = CALLED[case]
    if way == "compiled" and case not in ("rows", "momentum_none"):
        pytest.skip("two cases are enough: compiling takes long")

    def scenario(cls: type[Norm]) -> object:
        torch._dynamo.reset()
        norm = module_for(cls, 5, device, dtype=F64, **options).train(training)
        model: Any = nn.Sequential(norm, nn.ReLU())
        if way == "fused":
            model = bn_ext.convert(model, fuse=True) if cls is FUSED else model
        elif way == "compiled":
            model = torch.compile(model, backend="eager")
        before, x = held(norm), normal(shape, F64, device)
        outer, inner = Log(), Log(INSTEAD[instead])
        with outer, inner if way != "twice" else Log(), inner:
            result = outcome(lambda: model(x))
        seen = [] if way == "compiled" else [outer.seen, inner.seen]
        if isinstance(result, Raised):
            assert cls is NATIVE or way == "compiled" or outcome(lambda: assert_alike(held(norm), before)) is None
            return result if way != "compiled" else result.kind, seen
        return result, held(norm), seen

    both(scenario)


@pytest.mark.parametrize("instead", INSTEAD)
def test_modes_and_the_function(device: str, instead: str, training: bool) -> None:
    seen = []
    for function in (OURS, THEIRS):
        mean, var = torch.zeros(5, dtype=F64, device=device), torch.ones(5, dtype=F64, device=device)
        x = normal((6, 5), F64, device)
        with Log(INSTEAD[instead]) as mode:
            results = [
                outcome(lambda f=function, x=x, m=mean, v=var: f(x, m, v, training=training)),
                outcome(lambda f=function, x=x, m=mean, v=var: f(x, m, v, x[0], x[1], training, 0.3, 1e-3)),
            ]
        seen.append([results, mode.seen, mean, var])
    assert_alike(*seen)


def test_a_default_device_changes_nothing(device: str, training: bool) -> None:
    results = []
    for default in (None, device):
        torch.set_default_device(default)
        try:
            module = module_for(FUSED, 5, device).train(training)
            with OpLog() as log:
                result = ran(module, normal((6, 5), device=device).requires_grad_())
        finally:
            torch.set_default_device(None)
        results.append((result, log.names, held(module)))
        assert all(name.startswith("bn_ext::") for name in log.names) and len(log.names) == 2
    assert_alike(*results)
