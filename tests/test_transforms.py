"""Transforms that test_func.py leaves out: batched gradients, nesting, checkpoints, modes, fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import bn_ext
from support import OpLog, module_for, normal, pair

# torch loads its forward-mode formulas through its own deprecated jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")
FUSED = bn_ext.FusedBatchNorm1d
F64 = torch.float64
KERNELS = ["forward", "backward"]  # of evaluation too, where a backward will follow


def pure(module: nn.BatchNorm1d, training: bool) -> Callable[[Tensor], Tensor]:
    """The module as a function that moves no buffer: what a transform that calls it several times needs."""
    module.train(training)
    if training:
        module.track_running_stats = False
    return module


# ---- batched gradients ----


@pytest.fixture
def _slow_fallbacks_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


@pytest.mark.usefixtures("_slow_fallbacks_are_errors")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("training", [True, False])
def test_jacobians_do_not_loop_over_rows(
    device: str, training: bool, transform: Callable[..., Callable[[Tensor], Tensor]]
) -> None:
    """vmap over our backward goes by batching rules, of which torch would otherwise warn that they are missing."""
    x = normal((2, 4, 3), F64, device)
    modules = [pure(m, training) for m in pair(4, device, dtype=F64)]
    results = [transform(lambda x, f=module: f(x).exp())(x) for module in modules]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batched_grad_outputs(device: str, training: bool, create_graph: bool) -> None:
    g = normal((3, 6, 4), F64, device, seed=1)
    results = []
    for module in pair(4, device, dtype=F64):
        x = normal((6, 4), F64, device).requires_grad_()
        inputs = x, module.weight, module.bias
        out = pure(module, training)(x)
        first = torch.autograd.grad(out, inputs, g, is_grads_batched=True, create_graph=create_graph)
        results.append(first)
        if create_graph:
            penalty = sum(grad.square().sum() for grad in first)
            results[-1] += torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_every_mode(device: str, training: bool) -> None:
    """Forward and reverse mode, each also batched, through the module."""
    module = pure(module_for(FUSED, 3, device, dtype=F64), training)
    x = normal((5, 3), F64, device).requires_grad_()
    assert torch.autograd.gradcheck(
        module, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(module, x, check_fwd_over_rev=True, check_rev_over_rev=True)


# ---- nesting ----


def _forward_over_reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.jvp(torch.func.grad(lambda x: f(x).exp().sum()), (x,), (x.square(),))


def _reverse_over_forward(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.square(),))[1].pow(3).sum())(x)


def _vmap_of_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.vmap(torch.func.grad(lambda x: f(x).exp().sum()))(torch.stack([x, x.square(), -x]))


def _grad_of_vmap(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.func.grad(lambda x: torch.func.vmap(f)(torch.stack([x, x.square()])).exp().sum())(x)


def _linearised(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    value, push = torch.func.linearize(f, x)
    return value, push(x.square())


def _old_style(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    jacobian = torch.autograd.functional.jacobian(f, x, vectorize=True)
    return jacobian, torch.autograd.functional.hvp(lambda x: f(x).exp().sum(), x, x.square())


TRANSFORMS = (_forward_over_reverse, _reverse_over_forward, _vmap_of_grad, _grad_of_vmap, _linearised, _old_style)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of torch's own linearize
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("training", [True, False])
def test_nested_transforms(device: str, training: bool, transform: Callable[..., Any]) -> None:
    x = normal((6, 4), F64, device)
    results = [transform(pure(m, training), x) for m in pair(4, device, dtype=F64)]
    torch.testing.assert_close(*results)


def test_an_ensemble_with_its_running_statistics(device: str) -> None:
    """stack_module_state and functional_call under vmap: parameters and buffers of several trained models."""
    x = normal((6, 4), F64, device)
    results = []
    for cls in (FUSED, nn.BatchNorm1d):
        models = [nn.Sequential(module_for(cls, 4, device, dtype=F64)) for _ in range(3)]
        for k, model in enumerate(models):
            model(normal((9, 4), F64, device, seed=k, mean=k))
            model.eval()
        params, buffers = torch.func.stack_module_state(models)

        def call(p: Any, b: Any, model: nn.Module = models[0]) -> Tensor:
            return torch.func.functional_call(model, (p, b), (x,))

        results.append(torch.func.vmap(call)(params, buffers))
        torch.testing.assert_close(results[-1], torch.stack([model(x) for model in models]))
    torch.testing.assert_close(*results)


# ---- checkpoints ----


def layers(cls: type[nn.BatchNorm1d], device: str) -> nn.Sequential:
    first, second = (module_for(cls, 4, device, dtype=F64) for _ in range(2))
    return nn.Sequential(nn.Tanh(), first, nn.Tanh(), second)


def _whole(model: nn.Sequential, x: Tensor, policy: Any) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def _recompute_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_tanh(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.tanh.default else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "selective_none": lambda model, x: _whole(model, x, _recompute_all),
    "selective_tanh": lambda model, x: _whole(model, x, _keep_tanh),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(device: str, kind: str) -> None:
    results = []
    for cls in (FUSED, nn.BatchNorm1d):
        model = layers(cls, device)
        x = normal((6, 4), F64, device).requires_grad_()
        CHECKPOINTS[kind](model, x).square().sum().backward()
        results.append((x.grad, *(p.grad for p in model.parameters()), *model.buffers()))
    torch.testing.assert_close(*results)


# ---- modes and stand-ins for tensors ----


class Watching(TorchFunctionMode):
    """Sees every function of torch, and changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["default_device", "torch_function_mode", "parameter"])
def test_kernels_run_where_the_input_is_an_ordinary_tensor(device: str, mode: str, training: bool) -> None:
    """A mode in force, torch.set_default_device's for one, does not make a tensor one that overrides functions."""
    module = module_for(FUSED, 4, device).train(training)
    x = normal((6, 4), device=device)
    leaf = nn.Parameter(x) if mode == "parameter" else x.requires_grad_()
    context = {"default_device": lambda: torch.device(device), "torch_function_mode": Watching}.get(mode, OpLog)
    with context(), OpLog() as log:
        module(leaf).sum().backward()
        bn_ext.functional.batch_norm(leaf, None, None, training=True)
    stages = [*KERNELS, "forward"]
    assert [name.split(".")[0] for name in log.names] == [f"bn_ext::batch_norm_{stage}" for stage in stages]


@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_of_fake_tensors(device: str, training: bool) -> None:
    """What memory planners do: shapes, strides and types of a whole step, and no data."""
    with FakeTensorMode() as mode:
        module = FUSED(4, device=device).train(training)
        x = torch.empty(3, 5, 4, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        out = module(x)
        out.sum().backward()
    assert out.fake_mode is mode and out.dtype == torch.bfloat16 and out.stride() == x.stride()
    assert x.grad.shape == x.shape and module.weight.grad.dtype == torch.float32


def test_a_meta_model_learns_shapes(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), FUSED(4, device="meta"))
    model(torch.empty(6, 3, device="meta")).sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
    real = model.to_empty(device=device)
    for layer in real:
        layer.reset_parameters()
    assert bool(real(normal((6, 3), device=device)).isfinite().all())


def test_make_fx_records_our_operators(device: str) -> None:
    """Tracers of operators (AOT tools, partitioners) find ours, forward and backward."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module = module_for(FUSED, 4, device).eval()

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(module(x).sum(), x)[0]

    graph = make_fx(step)(normal((6, 4), device=device))
    names = [str(node.target) for node in graph.graph.nodes if "batch_norm" in str(node.target)]
    assert names == ["bn_ext.batch_norm_forward.default", "bn_ext.batch_norm_backward.default"]
    x = normal((9, 4), device=device)[:6] * 3
    assert torch.equal(graph(x), step(x))


def test_native_where_a_tensor_type_overrides_functions(device: str) -> None:
    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    seen: list[Any] = []
    out = module_for(FUSED, 4, device)(normal((6, 4), device=device).as_subclass(Logged))
    assert isinstance(out, Logged) and F.batch_norm in seen
