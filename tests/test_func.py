"""torch.func and forward-mode differentiation, next to native: grad, vjp, functional_call, jvp, jacobians, vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import bn_ext
from support import module_for, normal, pair

# torch loads its forward-mode formulas through its own deprecated jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
F64 = torch.float64
SHAPES = ((6, 4), (3, 4, 5))
BOTH = (bn_ext.functional.batch_norm, F.batch_norm)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_func_grad_of_functional_call(device: str, shape: tuple[int, ...], training: bool) -> None:
    x = normal(shape, F64, device)
    results = []
    for module in pair(4, device, dtype=F64):
        module.train(training)
        params = {k: v.detach() for k, v in module.named_parameters()}
        buffers = {k: v.clone() for k, v in module.named_buffers()}
        original = {k: v.clone() for k, v in module.named_buffers()}

        def loss(
            params: dict[str, Tensor], x: Tensor, buffers: dict[str, Tensor], module: nn.Module = module
        ) -> Tensor:
            return functional_call(module, (params, buffers), (x,)).pow(3).sum()

        by_params, by_input = torch.func.grad(loss, argnums=(0, 1))(params, x, buffers)
        again, value = torch.func.grad_and_value(loss)(params, x, buffers)
        results.append((by_params["weight"], by_params["bias"], by_input, again["weight"], value, *buffers.values()))
        for key, tensor in module.named_buffers():
            assert torch.equal(tensor, original[key]), "functional_call touched the module's own buffers"
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_func_grad_of_grad(device: str) -> None:
    x = normal((6, 4), F64, device)
    results = []
    for batch_norm in (bn_ext.functional.batch_norm, F.batch_norm):

        def inner(x: Tensor, batch_norm: Callable[..., Tensor] = batch_norm) -> Tensor:
            return batch_norm(x, None, None, training=True).pow(3).sum()

        def outer(x: Tensor, inner: Callable[[Tensor], Tensor] = inner) -> Tensor:
            return torch.func.grad(inner)(x).square().sum()

        results.append(torch.func.grad(outer)(x))
    torch.testing.assert_close(*results)


def test_func_vjp(device: str) -> None:
    x, g = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    results = []
    for batch_norm in (bn_ext.functional.batch_norm, F.batch_norm):
        out, pull = torch.func.vjp(lambda x, f=batch_norm: f(x, None, None, training=True), x)
        results.append((out, pull(g)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def stats(device: str) -> tuple[Tensor, Tensor]:
    return normal((4,), F64, device, seed=8), normal((4,), F64, device, seed=9).abs() + 0.5


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(device: str, training: bool) -> None:
    x, t = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    weight, w_t = normal((4,), F64, device, seed=2), normal((4,), F64, device, seed=3)
    mean, var = stats(device)
    results = []
    for batch_norm in BOTH:

        def run(
            x: Tensor, weight: Tensor, f: Callable[..., Tensor] = batch_norm, m: Tensor = mean, v: Tensor = var
        ) -> Tensor:
            return f(x, None if training else m, None if training else v, weight, None, training)

        results.append(torch.func.jvp(run, (x, weight), (t, w_t)))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            results[-1] += tuple(torch.autograd.forward_ad.unpack_dual(run(dual, weight)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_forward_mode_through_the_module_updates_its_buffers_once(device: str) -> None:
    x, t = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    results = []
    for module in pair(4, device, dtype=F64):
        with torch.autograd.forward_ad.dual_level():
            out = torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, t)))
        assert module.num_batches_tracked.item() == 1
        results.append((out.primal, out.tangent, module.running_mean, module.running_var))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("training", [True, False])
def test_jacobians(device: str, training: bool, jacobian: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x = normal((5, 4), F64, device)
    mean, var = stats(device)
    results = [
        jacobian(lambda x, f=f: f(x, None if training else mean, None if training else var, training=training).exp())(x)
        for f in BOTH
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_vmap(device: str, training: bool) -> None:
    """Three models at once: batched input and parameters."""
    x, weight = normal((3, 6, 4), F64, device), normal((3, 4), F64, device, seed=1)
    mean, var = stats(device)
    results = [
        torch.func.vmap(
            lambda x, w, f=f: f(x, None if training else mean, None if training else var, w, training=training)
        )(x, weight)
        for f in BOTH
    ]
    torch.testing.assert_close(*results)


def test_per_sample_gradients_in_eval(device: str) -> None:
    results = []
    for module in pair(4, device, dtype=F64):
        module.eval()
        params = {k: v.detach() for k, v in module.named_parameters()}

        def loss(params: dict[str, Tensor], row: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, params, (row[None],)).square().sum()

        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(params, normal((6, 4), F64, device)))
    for key, theirs in results[1].items():
        torch.testing.assert_close(results[0][key], theirs)


def test_ensembling_without_running_statistics(device: str) -> None:
    """The recipe of torch.func for batch norm: replace_all_batch_norm_modules_, which looks for _BatchNorm."""
    results = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        model = nn.Sequential(module_for(cls, 4, device, dtype=F64))
        torch.func.replace_all_batch_norm_modules_(model)
        assert model[0].running_mean is None
        params = {k: torch.stack([v.detach(), v.detach() * 2]) for k, v in model.named_parameters()}
        x = normal((6, 4), F64, device)
        results.append(torch.func.vmap(lambda p, model=model, x=x: functional_call(model, p, (x,)))(params))
    torch.testing.assert_close(*results)
