"""Models as people write them: native, converted and fused do the same, whatever happens to them afterwards."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import bn_ext
from fusion_models import MODELS, C
from support import OpLog, normal

F64 = torch.float64
# Both forms are right to some tens of roundings of float64 on tame values, through at most ten layers.
TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def randomised(model: nn.Module) -> nn.Module:
    """Parameters and buffers that are not the trivial ones, in float64."""
    model.double()
    for i, (name, tensor) in enumerate((*model.named_parameters(), *model.named_buffers())):
        if tensor.is_floating_point():
            drawn = normal(tuple(tensor.shape), F64, seed=i)
            positive = name.endswith(("var", "weight")) and tensor.dim() == 1  # no channel may die behind a ReLU
            tensor.data.copy_(drawn.abs() + 0.5 if positive else 0.5 * drawn)
    return model


def make(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(native, converted, fused), in one state."""
    native = randomised(MODELS[name][0]())
    converted, fused = bn_ext.convert(copy.deepcopy(native)), copy.deepcopy(native)
    assert bn_ext.convert(fused, fuse=True) is fused
    return native, converted, fused


def plain_values(module: nn.Module) -> dict[str, Any]:
    """What the forwards count and collect."""
    kept = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_") and isinstance(value, (int, float, str, bool, list)):
                kept[f"{name}.{key}"] = copy.copy(value)
    return kept


def results(model: nn.Module, x: Tensor, steps: tuple[bool, ...] = (True, True, False)) -> list[Any]:
    """Training steps and evaluations: outputs, gradients, buffers, counters, and where the random numbers stand."""
    found: list[Any] = []
    torch.manual_seed(0)
    for training in steps:
        model.train(training)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf * 1)  # a tensor that the model may write
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found += [y.detach(), leaf.grad]
        found += [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]
        found += [plain_values(model), torch.rand(1)]
    return found


def assert_same(mine: list[Any], right: list[Any]) -> None:
    assert len(mine) == len(right)
    for a, b in zip(mine, right, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, **TOLERANCE)
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key]), key


def data() -> Tensor:
    return normal((8, C), F64, seed=77)


def fused_passes(model: nn.Module, x: Tensor) -> int:
    torch.manual_seed(1)  # StochasticDepth takes its block
    with OpLog() as log, warnings.catch_warnings():
        model(x.clone())
    return log.fused


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_native(name: str) -> None:
    native, converted, fused = make(name)
    right = results(copy.deepcopy(native), data())
    assert_same(results(converted, data()), right)
    assert_same(results(fused, data()), right)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_what_it_was(name: str) -> None:
    native, _, fused = make(name)
    assert list(fused.state_dict()) == list(native.state_dict()) and plain_values(fused) == plain_values(native)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in native.named_modules()]
    for mine, theirs in zip(fused.modules(), native.modules(), strict=True):
        assert isinstance(mine, type(theirs)) and vars(mine).keys() - {"__module__"} == vars(theirs).keys()
        assert type(mine).__name__.removeprefix("Fused") == type(theirs).__name__
        if type(theirs) is not nn.BatchNorm1d:
            assert type(mine).__module__ == type(theirs).__module__ and type(mine).__doc__ == type(theirs).__doc__
    assert repr(fused).replace("FusedBatchNorm1d", "BatchNorm1d") == repr(native)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_reported_is_what_happens(name: str) -> None:
    """Every pass that is computed by the fused operator is reported; what reports none is bitwise the converted one."""
    native, converted, fused = make(name)
    report = bn_ext.fusion_report(fused)
    norms = {n for n, m in native.named_modules() if type(m) is nn.BatchNorm1d}
    assert {entry.name for entry in report} == norms
    assert all(bool(entry.reason) == (entry.computes == "batch norm") for entry in report)
    assert fused_passes(fused, data()) == MODELS[name][1]
    assert bool(MODELS[name][1]) <= any(entry.fused for entry in report)
    assert fused_passes(converted, data()) == 0 and not any(e.fused for e in bn_ext.fusion_report(converted))
    if not any(entry.fused for entry in report):
        one, other = results(converted, data()), results(copy.deepcopy(fused), data())
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor))
    before = [type(m) for m in fused.modules()]
    assert bn_ext.fusion_report(bn_ext.convert(fused, fuse=True)) == report
    assert [type(m) for m in fused.modules()] == before


# ---- what is done to a model afterwards; each takes a model and returns the one to compare ----


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def reload_state(model: nn.Module) -> nn.Module:
    state = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    other.load_state_dict(state)
    return other


def rebuilt_norms(model: nn.Module) -> nn.Module:
    """Every batch norm made anew from its attributes and its state, as tools for deployment do."""
    for parent in list(model.modules()):
        for key, norm in parent._modules.items():
            if isinstance(norm, nn.BatchNorm1d):
                made = nn.BatchNorm1d(
                    norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
                ).double()
                made.load_state_dict(norm.state_dict())
                parent._modules[key] = made
    return model


def swapped(kind: type[nn.Module], by: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Replace every module of a type, wherever it is held."""

    def swap(model: nn.Module) -> nn.Module:
        made: dict[nn.Module, nn.Module] = {}
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if isinstance(child, kind):
                    parent._modules[key] = made.setdefault(child, by())
        return model

    return swap


def hooked(kind: type[nn.Module], how: str) -> Callable[[nn.Module], nn.Module]:
    """Listen to every module of a type: what it was given and gave is part of the model's counters."""

    def hook(model: nn.Module) -> nn.Module:
        model.heard = []
        for module in model.modules():
            if isinstance(module, kind):

                def hear(m: nn.Module, *values: Any) -> None:
                    tensors = [
                        t for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)
                    ]
                    model.heard.extend(float(t.detach().sum()) for t in tensors)

                getattr(module, how)(hear)
        return model

    return hook


def doubled(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A hook that changes what a module gives."""

    def hook(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda m, i, o: o * 2)
        return model

    return hook


def own_forward(model: nn.Module) -> nn.Module:
    """One module given a forward of its own, as accelerate and others do."""
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.SiLU)):
            module.forward = lambda x: torch.sigmoid(x) * 3  # type: ignore[method-assign]
    return model


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.25


def parametrized(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.BatchNorm1d) and module.affine and not parametrize.is_parametrized(module):
            parametrize.register_parametrization(module, "weight", Plus())
    return model


def parametrized_parent(model: nn.Module) -> nn.Module:
    """The class of what calls the norms is changed by a tool."""
    model.extra = nn.Parameter(torch.ones(1, dtype=F64))
    parametrize.register_parametrization(model, "extra", Plus())
    return model


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.requires_grad_(False)
            module.train = lambda mode=True: None  # type: ignore[method-assign, assignment, misc]
            module.training = False
    return model


def reverted_alone(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, bn_ext.FusedBatchNorm1d):
            bn_ext.revert(module)
            assert type(module) is nn.BatchNorm1d
    return model


def children_of_lists(model: nn.Module) -> nn.Module:
    """Sequentials taken to pieces and put together again."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if type(child).__name__ == "Sequential" and len(child) > 1:
                parent._modules[key] = nn.Sequential(child[:2], *list(child.children())[2:])
    return model


def some_frozen(model: nn.Module) -> nn.Module:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 > 0)
    return model


AFTERWARDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_a_file,
    "state_dict": reload_state,
    "revert": bn_ext.revert,
    "revert_of_a_copy": lambda m: bn_ext.revert(copy.deepcopy(m)),
    "revert_of_each_norm": reverted_alone,
    "convert_again": lambda m: bn_ext.convert(bn_ext.revert(bn_ext.convert(m, fuse=True)), fuse=True),
    "plain_convert": bn_ext.convert,
    "rebuilt_norms": rebuilt_norms,
    "norm_to_identity": swapped(nn.BatchNorm1d, nn.Identity),
    "norm_to_layer_norm": swapped(nn.BatchNorm1d, lambda: nn.LayerNorm(C).double()),
    "norm_to_native": swapped(nn.BatchNorm1d, lambda: nn.BatchNorm1d(C).double()),
    "act_to_tanh": swapped(nn.ReLU, nn.Tanh),
    "act_to_identity": swapped(nn.SiLU, nn.Identity),
    "act_to_hardswish": swapped(nn.ReLU, nn.Hardswish),
    "act_to_gelu": swapped(nn.ReLU, nn.GELU),
    "hook_norm": hooked(nn.BatchNorm1d, "register_forward_hook"),
    "pre_hook_norm": hooked(nn.BatchNorm1d, "register_forward_pre_hook"),
    "backward_hook_norm": hooked(nn.BatchNorm1d, "register_full_backward_hook"),
    "hook_act": hooked(nn.ReLU, "register_forward_hook"),
    "hook_all": hooked(nn.Module, "register_forward_hook"),
    "doubled_norm": doubled(nn.BatchNorm1d),
    "doubled_act": doubled(nn.ReLU),
    "own_forward": own_forward,
    "parametrized": parametrized,
    "parametrized_then_revert": lambda m: bn_ext.revert(parametrized(m)),
    "parametrized_parent": parametrized_parent,
    "parametrized_parent_then_revert": lambda m: bn_ext.revert(parametrized_parent(m)),
    "frozen": frozen,
    "sequentials_taken_to_pieces": children_of_lists,
    "some_parameters_frozen": some_frozen,
}  # fmt: skip
UNPICKLABLE = {"Lambda"}  # natively


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook", "ignore:Full backward hook")
@pytest.mark.parametrize("how", AFTERWARDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_after(name: str, how: str) -> None:
    if name in UNPICKLABLE and how in ("pickle", "torch.save"):
        pytest.skip("the native model cannot be pickled")
    native, converted, fused = make(name)
    results(fused, data(), (True,)), results(converted, data(), (True,)), results(native, data(), (True,))
    right = error_or(lambda: results(AFTERWARDS[how](native), data(), (True, False)))
    for mine in (fused, converted):
        found = error_or(lambda mine=mine: results(AFTERWARDS[how](mine), data(), (True, False)))
        if isinstance(right, Exception):
            assert type(found) is type(right) and str(found)[:60] == str(right)[:60]
        elif isinstance(found, Exception):
            raise found
        else:
            assert_same(found, right)


def error_or(call: Callable[[], Any]) -> Any:
    """What the call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def traced(model: nn.Module) -> Any:
    return torch.fx.symbolic_trace(model)


def fx_then_revert(model: nn.Module) -> Any:
    return bn_ext.revert(torch.fx.symbolic_trace(model))


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (data(),)).module()


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def synchronised(model: nn.Module) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "script": torch.jit.script,
    "trace": lambda m: torch.jit.trace(m, data(), check_trace=False),
    "fx": traced,
    "fx_then_revert": fx_then_revert,
    "export": exported,
    "compile": compiled,
    "sync_batch_norm": synchronised,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_through(name: str, tool: str) -> None:
    """Whatever a tool makes of the native model in evaluation it makes of the fused one; which stays as it was."""
    native, _, fused = make(name)
    native.eval(), fused.eval()
    classes, keys = [type(m) for m in fused.modules()], list(fused.state_dict())

    def output(model: nn.Module) -> Any:
        torch.manual_seed(3)
        made = error_or(lambda: TOOLS[tool](model))
        torch.manual_seed(4)
        return made if isinstance(made, Exception) else error_or(lambda: made(data()))

    right, mine = output(native), output(fused)
    if isinstance(right, Exception):
        pytest.skip(f"native: {type(right).__name__}")
    if isinstance(mine, Exception):
        raise mine
    torch.testing.assert_close(mine, right, **TOLERANCE)
    if tool != "sync_batch_norm":
        assert list(fused.state_dict()) == keys
        assert [type(m) for m in fused.modules()] == classes or tool == "fx_then_revert"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n][1]])
def test_compiled_training(name: str) -> None:
    native, _, fused = make(name)
    right = results(native, data(), (True,))
    torch._dynamo.reset()
    graphs = torch.compile(fused, backend="aot_eager")
    torch.manual_seed(0)
    leaf = data().requires_grad_()
    fused.train()
    y = graphs(leaf * 1)
    torch.testing.assert_close(y.detach(), right[0], **TOLERANCE)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    torch.testing.assert_close(leaf.grad, right[1], **TOLERANCE)


KEEPS_FUSION = (
    "deepcopy",
    "pickle",
    "torch.save",
    "state_dict",
    "convert_again",
    "some_parameters_frozen",
)


@pytest.mark.parametrize("how", KEEPS_FUSION)
@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n][1]])
def test_still_fused_after(name: str, how: str) -> None:
    fused = make(name)[2]
    assert fused_passes(AFTERWARDS[how](fused), data()) == MODELS[name][1]
