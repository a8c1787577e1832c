"""bn_ext.keep_statistics: a checkpoint's recomputation moves no running statistics and counts no batch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    set_checkpoint_early_stop,
)

import bn_ext
from checkpoints import gradients, kept, moved_once
from freezing import FUSED, KINDS, LAZY, Norm, any_kind, any_lazy, equal, network, ours_and_native, state_of
from support import FLOATS, OpLog, act_module_for, module_for, name_of, normal

F64 = torch.float64
any_momentum = pytest.mark.parametrize("momentum", [0.1, None], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules")


# ---- every batch norm ----


@any_momentum
@any_kind
def test_a_recomputation_moves_nothing(device: str, kind: type[Norm], momentum: float | None) -> None:
    model = nn.Sequential(kind(5, momentum=momentum), nn.Tanh(), kind(5, momentum=momentum)).to(device)
    for seed in range(3):
        assert moved_once(model, normal(KINDS[kind], device=device, mean=2.0, seed=seed)) == 2
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 3


@ours_and_native
def test_without_it_both_count_twice(device: str, kind: type[nn.BatchNorm1d]) -> None:
    norm = kind(5).to(device)
    x = normal((8, 5), device=device).requires_grad_()
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 2


@any_lazy
def test_lazy_batch_norms(device: str, kind: type[Norm]) -> None:
    model: Any = nn.Sequential(kind()).to(device)
    x = normal(LAZY[kind], device=device)
    kept(model, x.clone().requires_grad_()).sum().backward()  # the first one, which makes it an ordinary one
    assert model[0].num_batches_tracked == 1
    moved_once(model, x)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": 1.5}], ids=str)
@ours_and_native
def test_options(device: str, kind: type[nn.BatchNorm1d], options: dict[str, Any]) -> None:
    moved_once(nn.Sequential(nn.Tanh(), module_for(kind, 5, device, **options)), normal((8, 5), device=device))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@any_momentum
def test_types_of_input_and_statistics(device: str, momentum: float | None, dtype: torch.dtype) -> None:
    norm = module_for(FUSED, 5, device, momentum=momentum)
    moved_once(norm, normal((4, 5, 3), dtype, device))
    moved_once(norm.to(dtype), normal((3, 4, 5), dtype, device).permute(1, 2, 0))


@pytest.mark.parametrize("count", [torch.int64, torch.int32, torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("size", [None, 3], ids=str)
@any_momentum
def test_counts_of_any_type(device: str, momentum: float | None, size: int | None, count: torch.dtype) -> None:
    """What of them only torch counts on takes torch's way in both forwards."""
    norm = module_for(FUSED, 5, device, momentum=momentum)
    norm.virtual_batch_size = size
    norm.num_batches_tracked = torch.tensor(7, dtype=count, device=device)
    moved_once(norm, normal((8, 5), device=device))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("virtual", [None, 4], ids=str)
def test_batch_norm_and_activation(device: str, virtual: int | None, activation: str) -> None:
    model = act_module_for(5, device, activation)
    model.norm.virtual_batch_size = virtual
    r = normal((9, 5), device=device, seed=1)
    assert moved_once(model, normal((9, 5), device=device), lambda model, x: model(x, r)) == 2
    moved_once(model, normal((9, 5), device=device), lambda model, x: model(x, r[:1]))


def test_fused_pairs_stay_fused(device: str) -> None:
    layers = [nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5), nn.SiLU()]
    model = bn_ext.convert(nn.Sequential(*layers).to(device), fuse=True)
    output = kept(model, normal((8, 5), device=device).requires_grad_())
    with OpLog() as log:
        output.sum().backward()
    assert log.fused == 2 and model[3].num_batches_tracked == 1
    moved_once(model, normal((8, 5), device=device))


class Synchronised(torch.autograd.Function):
    """Writes statistics as SyncBatchNorm does, in a Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        torch.batch_norm_update_stats(x, mean, var, 0.1)
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0].exp(), None, None


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ours": bn_ext.functional.batch_norm,
    "relu": lambda *a, **k: bn_ext.functional.batch_norm(*a, **k, activation="relu"),
    "virtual": lambda *a, **k: bn_ext.functional.batch_norm(*a, **k, virtual_batch_size=3),
    "torch.nn.functional": F.batch_norm,
    "torch": lambda x, mean, var, **k: torch.batch_norm(
        x, k["weight"], k["bias"], mean, var, True, 0.1, 1e-5, cudnn_enabled=False
    ),
    "torch, by name": lambda x, mean, var, **k: torch.batch_norm(
        x, k["weight"], k["bias"], running_mean=mean, running_var=var, training=True, momentum=0.1, eps=1e-5,
        cudnn_enabled=False,
    ),
    "native": lambda x, mean, var, **k: torch.native_batch_norm(
        x, k["weight"], k["bias"], mean, var, True, 0.1, 1e-5
    )[0],
    "in a Function": lambda x, mean, var, **k: Synchronised.apply(x, mean, var),
    "instance_norm": lambda x, mean, var, training, **k: F.instance_norm(x, mean, var, **k),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(device: str, function: str) -> None:
    norm = module_for(nn.BatchNorm1d, 5, device)

    def run(norm: nn.Module, x: Tensor) -> Tensor:
        values = {"weight": norm.weight, "bias": norm.bias}
        return FUNCTIONS[function](x, norm.running_mean, norm.running_var, training=True, **values)

    moved_once(norm, normal((8, 5, 3), device=device), run)
    assert norm.running_mean.ne(module_for(nn.BatchNorm1d, 5, device).running_mean).all()


def test_instance_norms(device: str) -> None:
    moved_once(nn.InstanceNorm1d(5, track_running_stats=True).to(device), normal((8, 5, 3), device=device))


class ByHand(nn.BatchNorm1d):
    """A forward of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.num_batches_tracked.add_(torch.ones_like(self.num_batches_tracked))
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


class Counting(nn.Module):
    """Its own count is none of a batch norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.steps = FUSED(5), 0
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.int64).add_(1)
        self.steps += int(self.num_batches_tracked.add_(1))
        return self.norm(x) * one.to(x)


def test_a_forward_of_somebodys_own(device: str) -> None:
    norm = ByHand(5).to(device)
    moved_once(norm, normal((8, 5), device=device))
    assert norm.num_batches_tracked == 2


def test_what_else_counts_goes_on(device: str) -> None:
    model = Counting().to(device)
    x = normal((8, 5), device=device).requires_grad_()
    kept(model, x).sum().backward()
    assert (model.norm.num_batches_tracked, model.num_batches_tracked, model.steps) == (1, 2, 3)
    assert x.grad is not None and x.grad.isfinite().all()


@ours_and_native
def test_evaluation_and_frozen(device: str, kind: type[nn.BatchNorm1d]) -> None:
    moved_once(network(kind, device).eval(), normal((8, 6), device=device))
    moved_once(bn_ext.freeze(network(kind, device)).train(), normal((8, 6), device=device))


# ---- what autograd saves ----


@pytest.mark.parametrize("kind", [FUSED, nn.BatchNorm1d, nn.BatchNorm2d], ids=lambda kind: kind.__name__)
def test_saved_tensors_are_the_same(device: str, kind: type[Norm]) -> None:
    """To the bit in ours; native saves its running statistics too, which its backward does not look at in training."""
    model = nn.Sequential(kind(5), nn.SiLU()).to(device)
    x = normal(KINDS[kind], device=device).requires_grad_()
    runs: list[list[Tensor]] = [[], []]
    for found, context in zip(runs, bn_ext.keep_statistics(), strict=True):
        with saved_tensors_hooks(lambda t, found=found: found.append(t.detach().clone()), lambda t: t), context:
            model(x)
    first, second = runs
    assert len(first) == len(second) >= 4
    assert all(a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(first, second, strict=True))
    different = [a for a, b in zip(first, second, strict=True) if not a.equal(b)]
    assert len(different) == 0 if kind is FUSED else all(t.shape == (5,) for t in different)


@pytest.mark.parametrize("early_stop", [True, False])
@ours_and_native
def test_early_stop(device: str, kind: type[nn.BatchNorm1d], early_stop: bool) -> None:
    with set_checkpoint_early_stop(early_stop):
        assert moved_once(network(kind, device), normal((8, 6), device=device)) == 2
        assert moved_once(kind(5).to(device), normal((8, 5), device=device)) == 2


@ours_and_native
def test_several_backwards(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model, x = network(kind, device), normal((8, 6), device=device).requires_grad_()
    loss = kept(model, x).square().sum()
    before, found = state_of(model), []
    for _ in range(3):
        found.append(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True))
    assert equal(state_of(model), before)
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


@ours_and_native
def test_second_derivatives(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model = network(kind, device).double()
    plain, found = copy.deepcopy(model), []
    for module, around in ((model, kept), (plain, lambda module, x: module(x))):
        x = normal((8, 6), F64, device).requires_grad_()
        (grad,) = torch.autograd.grad(around(module, x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append(gradients(module, x))
    assert equal(state_of(model), state_of(plain))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inside", [True, False])
@ours_and_native
def test_saved_on_the_cpu(device: str, kind: type[nn.BatchNorm1d], inside: bool) -> None:
    def offloaded(call: Callable[..., Any], *inputs: Any) -> Any:
        with save_on_cpu():
            return call(*inputs)

    model, x = network(kind, device), normal((8, 6), device=device)
    if inside:  # these hooks are nearer: nothing is left for the checkpoint to compute again
        assert moved_once(model, x, offloaded) == 1
    else:
        assert moved_once(model, x, around=lambda run, x: offloaded(kept, run, x)) == 2
    assert moved_once(model, x, around=offloaded) == 1  # without a checkpoint


def test_dropout_draws_the_same(device: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), FUSED(5), nn.Dropout(), nn.BatchNorm1d(5)).to(device)

    def seeded(model: nn.Module, x: Tensor) -> Any:
        torch.manual_seed(1)
        return model(x)

    moved_once(model, normal((16, 6), device=device), seeded)


# ---- checkpoints in checkpoints, errors, threads ----


@pytest.mark.parametrize("inner", [kept, lambda run, x: run(x)], ids=["both", "outer"])
@ours_and_native
def test_nested(device: str, kind: type[nn.BatchNorm1d], inner: Callable[..., Any]) -> None:
    model = network(kind, device)

    def run(model: nn.Module, x: Tensor) -> Any:
        first, *rest = model.children()
        return inner(nn.Sequential(*rest), inner(nn.Sequential(first), x).tanh())

    moved_once(model, normal((8, 6), device=device), run)


def test_a_model_in_parts(device: str) -> None:
    """A checkpoint for each, as checkpoint_sequential makes them, which takes no context_fn."""
    model = network(FUSED, device)

    def by_parts(_: Any, x: Tensor) -> Any:
        for part in model:
            x = kept(part, x)
        return x

    x = normal((8, 6), device=device).requires_grad_()
    by_parts(None, x).sum().backward()
    assert model[1].num_batches_tracked == 1
    checkpoint_sequential(model, 2, x, use_reentrant=False).sum().backward()
    assert model[1].num_batches_tracked > 1


@ours_and_native
def test_an_error_ends_it(device: str, kind: type[nn.BatchNorm1d]) -> None:
    norm, runs = kind(5).to(device), 0

    def run(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        y = norm(x)
        if runs == 2:
            raise OSError("no space left")
        return y.exp()

    output = kept(run, normal((8, 5), device=device).requires_grad_())
    with pytest.raises(OSError, match="no space left"):
        output.sum().backward()
    assert norm.num_batches_tracked == 1
    norm(normal((8, 5), device=device))
    assert norm.num_batches_tracked == 2 and torch._C._len_torch_function_stack() == 0


@ours_and_native
def test_another_thread_goes_on(device: str, kind: type[nn.BatchNorm1d]) -> None:
    """What trains beside a recomputation moves its statistics."""
    norm, other = kind(5).to(device), kind(5).to(device)
    x = normal((8, 5), device=device)
    again, done = threading.Event(), threading.Event()

    def run(x: Tensor) -> Tensor:
        y = norm(x)
        if norm.num_batches_tracked == 1 and torch._C._len_torch_function_stack():
            again.set()
            assert done.wait(60)
        return y.exp()

    def beside() -> None:
        assert again.wait(60)
        other(x)
        done.set()

    thread = threading.Thread(target=beside)
    thread.start()
    kept(run, x.clone().requires_grad_()).sum().backward()
    thread.join()
    assert (norm.num_batches_tracked, other.num_batches_tracked) == (1, 1)
    assert other.running_mean.ne(0).all()


@ours_and_native
def test_backward_in_another_thread(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model = network(kind, device)
    output = kept(model, normal((8, 6), device=device).requires_grad_())
    before = state_of(model)
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    thread.join()
    assert model[0].weight.grad is not None and equal(state_of(model), before)


def test_the_first_context_is_that_of_an_ordinary_forward(device: str) -> None:
    forward, again = bn_ext.keep_statistics()
    norm, x = FUSED(5).to(device), normal((8, 5), device=device)
    with forward:
        norm(x)
    for _ in range(2):
        with again, again, bn_ext.keep_statistics()[1]:
            norm(x)
    assert norm.num_batches_tracked == 1
    norm(x)
    assert norm.num_batches_tracked == 2


@ours_and_native
def test_a_reentrant_checkpoint_by_hand(device: str, kind: type[nn.BatchNorm1d]) -> None:
    """It runs forward without gradients, and again with them."""

    def run(model: nn.Module, x: Tensor) -> Any:
        def once(x: Tensor) -> Any:
            with bn_ext.keep_statistics()[1] if torch.is_grad_enabled() else nullcontext():
                return model(x)

        return checkpoint(once, x, use_reentrant=True)

    model = network(kind, device)
    moved_once(model, normal((8, 6), device=device), around=lambda call, x: run(call, x))
