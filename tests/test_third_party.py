"""Networks of other packages, with our class imported or swapped in, beside the same networks left as they are.

Every test needs the packages of requirements/third-party*.txt, and skips the networks of those that are missing.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import bn_ext
from support import OpLog, normal
from third_party import CASES, Case, Inputs, imported_as, make_torchvision_importable

pytestmark = pytest.mark.filterwarnings("ignore")  # what other packages and torch.jit.script say of themselves
FUSED, NATIVE = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d
F64 = torch.float64
OURS = ("bn_ext::batch_norm_forward", "bn_ext::batch_norm_inference")
# float64 through some tens of layers; a wrong formula is off by far more, and so is a drawn number too many.
TOLERANCE = 1e-8
# Gradients that are zero but for rounding, as that of a bias before a batch norm, are held to this scale.
SMALLEST_SCALE = 1e-3


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Also what a network makes for itself, as a mask of ones, is float64."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    found = CASES[request.param]
    make_torchvision_importable()
    pytest.importorskip(found.package, reason=f"{found.package} of requirements/third-party*.txt is not installed")
    return found


@pytest.fixture(params=["swapped", "converted", "fused"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(case: Case) -> nn.Module:
    """The network with parameters and statistics of its batch norms that are not the trivial ones."""
    torch.manual_seed(0)
    model = case.build().train()
    for seed, norm in enumerate(m for m in model.modules() if isinstance(m, _BatchNorm)):
        size, s = (norm.num_features,), 4 * seed
        with torch.no_grad():
            if norm.affine:
                norm.weight.copy_(1 + 0.3 * normal(size, F64, seed=s))
                norm.bias.copy_(0.3 * normal(size, F64, seed=s + 1))
            if norm.track_running_stats:
                norm.running_mean.copy_(0.2 * normal(size, F64, seed=s + 2))
                norm.running_var.copy_(normal(size, F64, seed=s + 3).abs() + 0.5)
    return model


def both(case: Case, how: str) -> tuple[nn.Module, nn.Module]:
    """(ours, native) with the same weights."""
    native = build(case)
    if how == "swapped":
        with imported_as(FUSED, case.package):
            mine = build(case)
    else:
        mine = bn_ext.convert(build(case), fuse=how == "fused")
    assert mine.load_state_dict(native.state_dict()) is not None
    norms = [type(m) for m in mine.modules() if isinstance(m, NATIVE)]
    assert norms and set(norms) == {FUSED}
    assert not any(isinstance(m, FUSED) for m in native.modules())
    return mine, native


def tensors(output: Any) -> list[Tensor]:
    """The tensors of whatever a network returns, in order."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    assert found
    return found


def called(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(1)
    return tensors(model(*(x.clone() for x in inputs)))


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A sum with another weight for every entry, so that every gradient counts."""
    floating = [o for o in outputs if o.requires_grad]
    return torch.stack([(o * normal(tuple(o.shape), F64, seed=90 + i)).sum() for i, o in enumerate(floating)]).sum()


def step(model: nn.Module, case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """Forward and backward: outputs, gradients of the inputs and of every parameter, state afterwards."""
    wants = [x.is_floating_point() and case.input_gradient for x in case.inputs(seed)]
    inputs = tuple(x.requires_grad_(want) for x, want in zip(case.inputs(seed), wants, strict=True))
    torch.manual_seed(1)
    outputs = tensors(model(*inputs))
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(outputs), tuple(leaves.values()), allow_unused=True)
    found: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return found | {key: value.clone() for key, value in model.state_dict().items()} | {"drawn next": torch.rand(3)}


def assert_same(mine: dict[str, Tensor | None], native: dict[str, Tensor | None]) -> None:
    assert list(mine) == list(native)
    for key, right in native.items():
        found = mine[key]
        assert (found is None) == (right is None), key
        if found is None or right is None:
            continue
        assert found.dtype == right.dtype and found.shape == right.shape, key
        if not right.is_floating_point():
            assert torch.equal(found, right), key
            continue
        assert bool(right.isfinite().all()), f"{key} is not finite natively"
        scale = float(right.abs().max()) if right.numel() else 0.0
        bound = TOLERANCE * max(scale, SMALLEST_SCALE)
        torch.testing.assert_close(found, right, rtol=0, atol=bound, msg=lambda m, k=key: f"{k}: {m}")


def assert_same_outputs(mine: list[Tensor], native: list[Tensor]) -> None:
    assert_same(*({f"output {i}": o.detach() for i, o in enumerate(outputs)} for outputs in (mine, native)))


def calls_of_batch_norm(model: nn.Module, call: Callable[[], object]) -> int:
    """How often call has a BatchNorm1d of the model computed."""
    return calls_of(model, NATIVE, call)


def calls_of(model: nn.Module, kind: Any, call: Callable[[], object]) -> int:
    """How often call calls modules of a class, or of one with that name."""
    count: list[int] = []
    norms = [m for m in model.modules() if (type(m).__name__ == kind if isinstance(kind, str) else isinstance(m, kind))]
    handles = [m.register_forward_hook(lambda *_: count.append(1)) for m in norms]
    call()
    for handle in handles:
        handle.remove()
    return len(count)


def kernels(call: Callable[[], object]) -> tuple[int, int]:
    """How many batch norms our kernels computed in call, and how many of them with an activation."""
    with OpLog() as log:
        call()
    return sum(name in OURS for name in log.names), log.fused


def native_result(call: Callable[[], Any]) -> Any:
    """What the call on the native network returns; skips, with its reason, where it cannot be done natively either."""
    try:
        return call()
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:90]
        pytest.skip(f"natively: {type(error).__name__}: {first}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_batch_norm_runs_our_kernels(case: Case, how: str, training: bool) -> None:
    mine, native = both(case, how)
    mine.train(training), native.train(training)
    inputs = case.inputs(0)
    expected = calls_of_batch_norm(native, lambda: called(native, inputs))
    if how != "swapped":  # a ghost batch norm's loop is one call
        for ghost in [m for m in native.modules() if type(m).__name__ == "GBN"]:
            loops = calls_of(ghost, "GBN", lambda: called(native, inputs))
            expected += loops - calls_of_batch_norm(ghost, lambda: called(native, inputs))
    computed, activated = kernels(lambda: called(mine, inputs))
    assert computed == expected > 0
    assert bool(activated) == (how == "fused" and case.fuses)


def test_forward_and_backward(case: Case, how: str) -> None:
    mine, native = both(case, how)
    assert_same(step(mine, case), step(native, case))


def test_evaluation(case: Case, how: str) -> None:
    """With gradients and without."""
    mine, native = both(case, how)
    mine.eval(), native.eval()
    assert_same(step(mine, case), step(native, case))
    with torch.no_grad():
        assert_same_outputs(*(called(model, case.inputs(1)) for model in (mine, native)))


def test_three_steps_of_sgd(case: Case, how: str) -> None:
    """The state after them, with statistics and counters, and an evaluation of what was learned."""
    models = both(case, how)
    found: list[dict[str, Tensor | None]] = []
    for model in models:
        kept: dict[str, Tensor | None] = {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9) if parameters else None
        torch.manual_seed(2)
        for seed in range(3):
            x, *rest = case.inputs(seed)
            outputs = tensors(model(x.requires_grad_(case.input_gradient), *rest))
            loss = torch.stack([o.square().mean() for o in outputs if o.requires_grad]).sum()
            kept[f"loss {seed}"] = loss.detach()
            model.zero_grad()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        kept |= model.state_dict()
        model.eval()
        with torch.no_grad():
            kept |= {f"evaluated {i}": o for i, o in enumerate(called(model, case.inputs(3)))}
        found.append(kept)
    assert_same(*found)


def test_fx(case: Case, how: str) -> None:
    """Where the network can be traced symbolically, the graph is the same, with batch norms as modules, and right."""
    mine, native = both(case, how)
    graph = native_result(lambda: torch.fx.symbolic_trace(native))
    traced = torch.fx.symbolic_trace(mine)
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [(n.op, str(n.target)) for n in graph.graph.nodes]
    for training in (True, False):
        traced.train(training), native.train(training)
        right = native_result(lambda: called(graph, case.inputs(0)))
        assert_same_outputs(called(traced, case.inputs(0)), right)
    assert_same(dict(traced.state_dict()), dict(graph.state_dict()))


def test_script(case: Case, how: str) -> None:
    # What an earlier failure leaves in the registry would hide the reason of the next one.
    pytest.importorskip("torch.testing._internal.jit_utils").clear_class_registry()
    mine, native = both(case, how)
    right = native_result(lambda: torch.jit.script(native))
    scripted = torch.jit.script(mine)
    for training in (True, False):
        scripted.train(training), right.train(training)
        expected = native_result(lambda: called(right, case.inputs(0)))
        assert_same_outputs(called(scripted, case.inputs(0)), expected)
    assert_same(dict(scripted.state_dict()), dict(right.state_dict()))


def classes(model: nn.Module) -> list[tuple[str, str]]:
    """By name: a parametrized module has a class of its own."""
    return [(type(m).__module__, type(m).__qualname__) for m in model.modules()]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("by", COPIES)
def test_copies(case: Case, how: str, by: str) -> None:
    """A copy goes on from where the network was, by the same kernels, and the network knows nothing of it."""
    mine, native = both(case, how)
    with torch.no_grad():
        called(mine, case.inputs(0)), called(native, case.inputs(0))
    native_result(lambda: COPIES[by](native))
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    clone = COPIES[by](mine)
    assert classes(clone) == classes(mine)
    assert_same(step(clone, case, 1), step(native, case, 1))
    assert all(torch.equal(before[key], value) for key, value in mine.state_dict().items())
    assert kernels(lambda: called(clone, case.inputs(2))) == kernels(lambda: called(mine, case.inputs(2)))


def test_revert(case: Case, how: str) -> None:
    """The network is native again, to the bit, and every module has its own class."""
    mine, native = both(case, how)
    assert bn_ext.revert(mine) is mine
    assert classes(mine) == classes(native) and not any(isinstance(m, FUSED) for m in mine.modules())
    assert kernels(lambda: called(mine, case.inputs(0))) == (0, 0)
    called(native, case.inputs(0))
    for found, right in zip(called(mine, case.inputs(1)), called(native, case.inputs(1)), strict=True):
        assert torch.equal(found, right)
