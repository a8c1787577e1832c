"""bn_ext.keep_statistics with what else stands around a forward: selective checkpoints, modes, compilers, hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import bn_ext
from checkpoints import Both, gradients, kept, moved_once
from freezing import FUSED, equal, network, ours_and_native, state_of
from support import OpLog, module_for, normal

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
aten = torch.ops.aten


# ---- with another context_fn ----


SAVED: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "layers": (aten.tanh.default, aten.clone.default, aten.silu.default),
    "batch norms": (torch.ops.bn_ext.batch_norm_forward.default, aten.native_batch_norm.default),
}


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("saved", SAVED)
@ours_and_native
def test_selective_checkpoints(device: str, kind: type[nn.BatchNorm1d], saved: str, first: bool) -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in SAVED[saved] else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        pairs = bn_ext.keep_statistics(), create_selective_checkpoint_contexts(policy)
        return tuple(Both(*both) for both in zip(*(pairs if first else pairs[::-1]), strict=True))

    model = nn.Sequential(nn.Tanh(), module_for(kind, 5, device), nn.SiLU(), module_for(kind, 5, device))

    def run(model: nn.Module, x: Tensor) -> Any:
        return model(x.clone())

    moved_once(model, normal((8, 5), device=device), run, lambda call, x: kept(call, x, context_fn=contexts))


# ---- modes ----


class Watching(TorchFunctionMode):
    """Writes down every function of torch that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@ours_and_native
def test_a_mode_around_the_step(device: str, kind: type[nn.BatchNorm1d]) -> None:
    with Watching() as mode:
        moved_once(network(kind, device), normal((8, 6), device=device))
    assert mode.seen.count("batch_norm") == 4  # it sees Tensor.backward as one call


@ours_and_native
def test_a_mode_in_the_function(device: str, kind: type[nn.BatchNorm1d]) -> None:
    seen: list[list[str]] = []

    def run(model: nn.Module, x: Tensor) -> Any:
        with Watching() as mode:
            seen.append(mode.seen)
            return model(x)

    moved_once(network(kind, device), normal((8, 6), device=device), run)
    plain, first, second = seen
    assert plain == first and "batch_norm" in first
    assert second == first[: len(second)] and second.count("batch_norm") == 2  # it ends early


def test_default_device_keeps_our_kernels(device: str) -> None:
    with torch.device(device):
        moved_once(network(FUSED, device), normal((8, 6), device=device))
        output = kept(network(FUSED, device), normal((8, 6), device=device).requires_grad_())
    with torch.device(device), OpLog() as log:
        output.sum().backward()
    assert [name.split(".")[0] for name in log.names] == 2 * ["bn_ext::batch_norm_forward"] + 2 * [
        "bn_ext::batch_norm_backward"
    ]


def test_fake_tensors(device: str) -> None:
    with FakeTensorMode():
        model = nn.Sequential(FUSED(5, device=device), nn.Tanh(), nn.BatchNorm1d(5, device=device))
        x = torch.randn(8, 5, device=device, requires_grad=True)
        kept(model, x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


class Plain(Tensor):
    """A tensor of somebody's, that torch's own forward takes."""


def test_where_torch_computes_ours(device: str) -> None:
    norm = module_for(FUSED, 5, device, momentum=None)
    x = normal((8, 5), device=device).as_subclass(Plain)
    assert moved_once(norm, x) == 2
    norm.virtual_batch_size = 3
    assert moved_once(norm, x) == 2
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("way", ["lengths", "mask", "virtual", "torch"])
def test_padded_batches(device: str, way: str) -> None:
    norm = module_for(FUSED, 5, device)
    norm.virtual_batch_size = 2 if way == "virtual" else None
    lengths = torch.tensor([4, 1, 3, 2], device=device)
    valid = {"mask": torch.arange(4, device=device) < lengths[:, None]} if way == "mask" else {"lengths": lengths}
    x = normal((4, 5, 4), device=device)
    moved_once(norm, x.as_subclass(Plain) if way == "torch" else x, lambda norm, x: norm(x, **valid))
    assert norm.num_batches_tracked == (2 if way == "virtual" else 1)


@ours_and_native
def test_hooks_of_modules_run(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model, calls = network(kind, device), []
    model[1].register_forward_pre_hook(lambda module, args: calls.append("pre"))
    model[1].register_forward_hook(lambda module, args, output: calls.append("post"))
    model[1].register_full_backward_hook(lambda module, before, after: calls.append("back"))
    output = kept(model, normal((8, 6), device=device).requires_grad_())
    before = state_of(model)
    output.sum().backward()
    assert equal(state_of(model), before) and calls.count("pre") == 2 and calls.count("back") >= 1


# ---- functions of modules ----


@ours_and_native
def test_functional_call(device: str, kind: type[nn.BatchNorm1d]) -> None:
    """Statistics that are given move once, those of the module not at all."""
    model = network(kind, device)
    before = state_of(model)
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain = copy.deepcopy(model)
    x = normal((8, 6), device=device).requires_grad_()
    plain(x)

    def run(x: Tensor) -> Any:
        return torch.func.functional_call(model, given, (x,))

    kept(run, x).sum().backward()
    assert equal(state_of(model), before)
    assert all(torch.equal(given[name], buffer) for name, buffer in plain.named_buffers())


def test_gradients_of_torch_func(device: str) -> None:
    norm = module_for(FUSED, 5, device)
    x = normal((8, 5), device=device)
    before = state_of(norm)
    with bn_ext.keep_statistics()[1]:
        torch.func.grad(lambda x: norm(x).square().sum())(x)
        torch.func.vjp(norm, x)
    assert equal(state_of(norm), before)
    torch.func.grad(lambda x: norm(x).square().sum())(x)
    assert norm.num_batches_tracked == 1


# ---- compilers ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@ours_and_native
def test_a_checkpoint_in_what_is_compiled(device: str, kind: type[nn.BatchNorm1d], backend: str) -> None:
    model = network(kind, device).double()
    plain = copy.deepcopy(model)
    options = {"context_fn": bn_ext.keep_statistics}
    if kind is not FUSED and backend == "eager":
        options = {}  # torch refuses the count that has changed, with a context_fn or without

    def run(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False, **options)

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    found = []
    for module, call in ((model, compiled), (plain, plain)):
        x = normal((8, 6), torch.float64, device).requires_grad_()
        output = call(x).square().sum()
        if not options:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.backward()
            return
        output.backward()
        found.append([*gradients(module, x), *module.buffers()])
    torch.testing.assert_close(*found)
    assert model[1].num_batches_tracked == 1


def test_a_checkpoint_in_what_is_compiled_recomputes(device: str) -> None:
    """What backward is left with is what it is left with without a context_fn."""
    model, kept_bytes = network(FUSED, device), []
    for options in ({}, {"context_fn": bn_ext.keep_statistics}):
        torch._dynamo.reset()
        saved: list[int] = []

        def run(x: Tensor, options: Any = options) -> Any:
            return checkpoint(model, x, use_reentrant=False, **options)

        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            torch.compile(run, backend="aot_eager")(normal((8, 6), device=device).requires_grad_())
        kept_bytes.append(sorted(saved))
    assert kept_bytes[0] == kept_bytes[1] and kept_bytes[0]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_module_in_a_checkpoint(device: str, backend: str, fuse: bool) -> None:
    """Ours are kept there too; torch's own move again, as without this, and nothing worse happens."""
    model = bn_ext.convert(network(FUSED, device), fuse=fuse)
    plain, x = copy.deepcopy(model), normal((8, 6), device=device)
    expected = torch.compile(plain, backend=backend)(x)
    expected.square().sum().backward()
    output = kept(torch.compile(model, backend=backend), x.requires_grad_())
    output.square().sum().backward()
    assert output.equal(expected) and equal(state_of(model), state_of(plain))

    native = bn_ext.revert(network(FUSED, device))
    kept(torch.compile(native, backend=backend), x).square().sum().backward()
    assert native[1].num_batches_tracked == 2


@ours_and_native
def test_compiled_autograd(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model = network(kind, device)
    output = kept(model, normal((8, 6), device=device).requires_grad_())
    before = state_of(model)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.sum().backward()
    assert equal(state_of(model), before) and model[0].weight.grad is not None


def test_programs(device: str) -> None:
    """A traced one calls our operator, a scripted one torch's. Torch cannot end either early, nor while it profiles."""
    x = normal((8, 6), device=device).requires_grad_()
    model = nn.Sequential(nn.Linear(6, 5), FUSED(5), nn.Tanh()).to(device)
    traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
    for program, moves in ((traced, 1), (torch.jit.script(copy.deepcopy(model)), 2)):
        buffers = dict(program.named_buffers())
        for _ in range(3):
            program(x).sum().backward()
        before = int(buffers["1.num_batches_tracked"])
        with set_checkpoint_early_stop(False):
            kept(program, x).sum().backward()
        assert buffers["1.num_batches_tracked"] == before + moves


class Passes(TorchFunctionMode):
    """Passes on what it hears, and keeps it."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(function)
        return function(*args, **(kwargs or {}))


LENGTHS = torch.tensor([4, 0, 3, 4, 1, 2])
MORE_THAN_BATCH_NORM: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (lambda: FUSED(5), {}),
    "lengths": (lambda: FUSED(5), {"lengths": LENGTHS}),
    "single value": (lambda: FUSED(5, allow_single_value=True), {"lengths": LENGTHS}),
    "cut": (lambda: FUSED(5, virtual_batch_size=2), {}),
    "act": (lambda: bn_ext.BatchNormAct1d(5), {}),
    "act, residual": (lambda: bn_ext.BatchNormAct1d(5, "silu"), {"residual": torch.ones(6, 5, 4)}),
    "act, lengths": (lambda: bn_ext.BatchNormAct1d(5, "gelu"), {"lengths": LENGTHS}),
    "act of another": (lambda: bn_ext.BatchNormAct1d(5, nn.Tanh()), {"lengths": LENGTHS}),
    "Sequential": (lambda: bn_ext.convert(nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()), fuse=True), {}),
    "renorm": (lambda: bn_ext.FusedBatchRenorm1d(5), {}),
    "renorm, lengths": (lambda: bn_ext.FusedBatchRenorm1d(5), {"lengths": LENGTHS}),
    "torch's": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("listens", ["forward", "backward", "both"])
@pytest.mark.parametrize("what", MORE_THAN_BATCH_NORM)
def test_a_mode_that_listens_to_one_of_the_two_runs(what: str, listens: str, training: bool) -> None:
    make, given = MORE_THAN_BATCH_NORM[what]
    model, plain = (make().train(training) for _ in range(2))
    x = normal((6, 5, 4))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(xs[0], **given)
    expected.square().sum().backward()
    with Passes() if listens != "backward" else nullcontext():
        y = checkpoint(model, xs[1], use_reentrant=False, context_fn=bn_ext.keep_statistics, **given)
    with Passes() if listens != "forward" else nullcontext():
        y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for mine, theirs in zip(gradients(model, xs[1]), gradients(plain, xs[0]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert equal(state_of(model), state_of(plain))


def test_a_mode_hears_of_batch_norm_alone_in_a_checkpoint_too() -> None:
    mode, x = Passes(), normal((6, 5, 4)).requires_grad_()
    with mode:
        checkpoint(FUSED(5), x, use_reentrant=False).sum().backward()
    assert mode.heard.count(nn.functional.batch_norm) == 1  # autograd runs it again without the mode
    mode.heard.clear()
    with mode:
        bn_ext.BatchNormAct1d(5)(x)
    assert {nn.functional.batch_norm, nn.functional.relu} <= set(mode.heard)
