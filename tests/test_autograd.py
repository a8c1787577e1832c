"""Gradients: masks, frozen parameters, first and second order, several graphs at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bn_ext
from reference import reduce_dims, reference
from support import OpLog, Step, assert_same, assert_step, assert_within, expected_step, module_for, normal, pair, step

SHAPES = ((6, 4), (3, 4, 5))
F64 = torch.float64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_what_needs_a_gradient_gets_one(
    device: str, shape: tuple[int, ...], needs: tuple[bool, bool, bool], training: bool
) -> None:
    g = normal(shape, F64, device, seed=1)
    results = []
    with OpLog() as log:
        for module in pair(4, device, dtype=F64):
            module.train(training)
            module.weight.requires_grad_(needs[1])
            module.bias.requires_grad_(needs[2])
            x = normal(shape, F64, device).requires_grad_(needs[0])
            out = module(x)
            assert out.requires_grad == any(needs)
            if any(needs):
                out.backward(g)
            results.append((x.grad, module.weight.grad, module.bias.grad))
            assert all(b.grad is None and not b.requires_grad for b in module.buffers())
    for mine, theirs, needed in zip(*results, needs, strict=True):
        assert (mine is not None) == needed == (theirs is not None)
        if needed:
            torch.testing.assert_close(mine, theirs)
    # A frozen parameter must cost nothing: the operator is told what to leave out.
    backward = [args for name, args in log.calls if name.startswith("bn_ext::") and "backward" in name]
    masks = [next(a for a in args if isinstance(a, list)) for args in backward]
    assert [tuple(mask) for mask in masks] == ([(*needs, False)] if any(needs) else [])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_variants_against_the_reference(
    device: str, shape: tuple[int, ...], options: dict[str, Any], training: bool
) -> None:
    for dtype in (torch.float32, F64):
        ours, native = pair(4, device, dtype=dtype, **options)
        ours.train(training), native.train(training)
        x, g = normal(shape, dtype, device), normal(shape, dtype, device, seed=1)
        assert_same(step(ours, x, g), step(native, x, g), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["weight", "bias", "both", "none"])
def test_weight_only_and_bias_only(device: str, given: str, training: bool, dtype: torch.dtype) -> None:
    x, g = normal((9, 4), dtype, device), normal((9, 4), dtype, device, seed=1)
    weight = normal((4,), dtype, device, seed=2).requires_grad_() if given in ("weight", "both") else None
    bias = normal((4,), dtype, device, seed=3).requires_grad_() if given in ("bias", "both") else None
    mean, var = normal((4,), dtype, device, seed=4), normal((4,), dtype, device, seed=5).square() + 0.5
    ref = reference(x, weight, bias, g, running_mean=mean, running_var=var, training=training)
    leaf = x.clone().requires_grad_()
    out = bn_ext.functional.batch_norm(leaf, mean, var, weight, bias, training)
    wanted = {"grad_input": leaf, "grad_weight": weight, "grad_bias": bias}
    wanted = {k: v for k, v in wanted.items() if v is not None}
    grads = dict(zip(wanted, torch.autograd.grad(out, tuple(wanted.values()), g), strict=True))
    assert_step(Step(output=out, running_mean=mean, running_var=var, **grads), ref, dtype)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_weight_of_a_module_without_bias(device: str, training: bool) -> None:
    results = []
    for module in pair(4, device, dtype=F64, bias=False):
        module.train(training).weight.requires_grad_(False)
        x = normal((6, 4), F64, device).requires_grad_()
        module(x).square().sum().backward()
        assert module.weight.grad is None
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_nothing_to_differentiate(device: str) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device).requires_grad_(False)
    out = module(normal((6, 4), device=device))
    assert not out.requires_grad and out.grad_fn is None
    assert module.num_batches_tracked.item() == 1


# ---- finite differences ----


def functional_of(
    training: bool, device: str, buffers: bool = True
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """A pure function of (x, weight, bias): the buffers are new on every call, as gradcheck needs."""

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        mean = torch.linspace(-0.5, 0.5, x.shape[1], dtype=F64, device=device) if buffers else None
        var = torch.linspace(0.5, 1.5, x.shape[1], dtype=F64, device=device) if buffers else None
        return bn_ext.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-3)

    return run


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)], ids=str)
def test_finite_differences(
    device: str, shape: tuple[int, ...], training: bool, affine: str, check: Callable[..., bool]
) -> None:
    inputs = [normal(shape, F64, device).requires_grad_()]
    if affine != "none":
        inputs.append(normal((3,), F64, device, seed=1).requires_grad_())
    if affine == "both":
        inputs.append(normal((3,), F64, device, seed=2).requires_grad_())
    assert check(functional_of(training, device), inputs)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
def test_finite_differences_of_a_permuted_input(device: str, check: Callable[..., bool]) -> None:
    base = normal((2, 4, 3), F64, device).requires_grad_()
    weight = normal((3,), F64, device, seed=1).requires_grad_()
    run = functional_of(True, device, buffers=False)
    assert check(lambda x, w: run(x.transpose(1, 2), w), (base, weight))


# ---- second order next to native ----


def second_order(module: nn.BatchNorm1d, x: Tensor, frozen: bool = False) -> list[Tensor]:
    """Gradients of a gradient penalty, and of a sum of first gradients, by every input."""
    x = x.detach().requires_grad_()
    params = [] if frozen else [p for p in (module.weight, module.bias) if p is not None]
    first = torch.autograd.grad(module(x).pow(3).sum(), [x, *params], create_graph=True)
    assert all(g.requires_grad for g in first)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, [x, *params], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_backward_as_native(device: str, shape: tuple[int, ...], options: dict, training: bool) -> None:
    ours, native = pair(4, device, dtype=F64, **options)
    ours.train(training), native.train(training)
    x = normal(shape, F64, device)
    for mine, theirs in zip(second_order(ours, x), second_order(native, x), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(ours.num_batches_tracked, native.num_batches_tracked) if native.track_running_stats else True


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_with_frozen_parameters(device: str, training: bool) -> None:
    results = []
    for module in pair(4, device, dtype=F64):
        module.train(training).requires_grad_(False)
        results.append(second_order(module, normal((6, 4), F64, device), frozen=True)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_in_float32(device: str, training: bool) -> None:
    """No worse than twice native's own float32 error against native in float64, plus a few roundings."""
    x = normal((64, 4), device=device)
    ours, native = pair(4, device)
    exact = module_for(nn.BatchNorm1d, 4, device, dtype=F64)
    for module in (ours, native, exact):
        module.train(training)
    for mine, theirs, right in zip(
        second_order(ours, x), second_order(native, x), second_order(exact, x.double()), strict=True
    ):
        size = float(right.abs().max())
        bound = 2 * float((theirs - right).abs().max()) + 64 * torch.finfo(torch.float32).eps * size
        assert float((mine - right).abs().max()) <= bound


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("training", [True, False])
def test_first_order_with_create_graph(device: str, training: bool, ratio: float) -> None:
    """create_graph=True takes another path to the same gradient: as accurate as native's, at any mean (factor 2)."""
    x, g = normal((2000, 4), device=device, mean=ratio), normal((2000, 4), device=device, seed=1, mean=0.25)
    errors = []
    for module in pair(4, device):
        module.train(training)
        ref = expected_step(module, x, g, 0.1)
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out, (leaf, module.weight, module.bias), g, create_graph=True)
        rights = ref.grad_input, ref.grad_weight, ref.grad_bias
        errors.append([float((a.detach() - b).norm() / b.norm()) for a, b in zip(grads, rights, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 2 * theirs + 32 * torch.finfo(torch.float32).eps


def test_second_order_of_a_mixed_precision_module(device: str) -> None:
    """bfloat16 input with float32 parameters: second order follows the float64 one to bfloat16's rounding."""
    x = normal((64, 4), torch.bfloat16, device)
    ours = module_for(bn_ext.FusedBatchNorm1d, 4, device)
    exact = module_for(nn.BatchNorm1d, 4, device, dtype=F64)
    for mine, right in zip(second_order(ours, x), second_order(exact, x.double()), strict=True):
        # Output, its cube and both gradients are each rounded to 8 bits; a hundred of those roundings bound the sum.
        bound = 100 * torch.finfo(torch.bfloat16).eps * float(right.abs().max())
        assert float((mine.double() - right).abs().max()) <= bound


@pytest.mark.parametrize("training", [True, False])
def test_hessian_vector_product(device: str, training: bool) -> None:
    v = normal((6, 4), F64, device, seed=3)
    results = []
    for module in pair(4, device, dtype=F64):
        module.train(training)
        x = normal((6, 4), F64, device).requires_grad_()
        (first,) = torch.autograd.grad(module(x).exp().sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first * v).sum(), x)[0])
    torch.testing.assert_close(*results)


# ---- several graphs at once ----


def test_forward_twice_then_backward(device: str) -> None:
    """The second forward moves the running statistics; the first graph must not mind."""
    results = []
    for module in pair(4, device, dtype=F64):
        xs = [normal((6, 4), F64, device, seed=k).requires_grad_() for k in range(2)]
        outs = [module(x) for x in xs]
        (outs[0].square().sum() + outs[1].exp().sum()).backward()
        results.append((xs[0].grad, xs[1].grad, module.weight.grad, module.bias.grad, module.running_var))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_eval_graph_survives_a_training_step(device: str) -> None:
    """The gradient belongs to the statistics that the eval forward used; native takes those of the backward's time."""
    x, g = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device, dtype=F64).eval()
    ref = reference(x, module.weight, module.bias, g, running_mean=module.running_mean,
                    running_var=module.running_var, training=False)  # fmt: skip
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    module.train()(normal((6, 4), F64, device, seed=2, mean=4.0))
    grads = torch.autograd.grad(out, (leaf, module.weight, module.bias), g)
    assert_step(Step(out, *grads), ref, F64)


def test_retain_graph_gives_the_same_twice(device: str) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device)
    x = normal((6, 4), device=device).requires_grad_()
    loss = module(x).square().sum()
    first = torch.autograd.grad(loss, (x, module.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, module.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate(device: str) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device, dtype=F64)
    x = normal((6, 4), F64, device).requires_grad_()
    module(x).square().sum().backward()
    once = x.grad.clone(), module.weight.grad.clone()
    module(x).square().sum().backward()
    torch.testing.assert_close((x.grad, module.weight.grad), (2 * once[0], 2 * once[1]))


@pytest.mark.parametrize("change", ["reset", "load", "in_place"])
def test_training_graph_does_not_depend_on_the_buffers(device: str, change: str) -> None:
    """Stricter than native, which saves the buffers: reset_running_stats between forward and backward is fine."""
    x, g = normal((6, 4), F64, device), normal((6, 4), F64, device, seed=1)
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device, dtype=F64)
    ref = reference(x, module.weight, module.bias, g)
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    if change == "reset":
        module.reset_running_stats()
    elif change == "load":
        for buffer in module.buffers():
            buffer.copy_(torch.zeros_like(buffer))
    else:
        module.running_var.mul_(100)
    grads = torch.autograd.grad(out, (leaf, module.weight, module.bias), g)
    assert_step(Step(out, *grads), ref, F64)


def test_output_may_be_changed_in_place(device: str) -> None:
    """ReLU in place after batch norm is the usual network: the output must not be needed by the backward."""
    results = []
    for module in pair(4, device, dtype=F64):
        x = normal((6, 4), F64, device).requires_grad_()
        F.relu(module(x), inplace=True).sum().backward()
        results.append((x.grad, module.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_shared_module_and_a_deep_chain(device: str) -> None:
    results = []
    for module in pair(4, device, dtype=F64):
        x = normal((6, 4), F64, device).requires_grad_()
        y = x
        for _ in range(5):
            y = module(y.tanh())
        y.square().sum().backward()
        results.append((x.grad, module.weight.grad, module.bias.grad, module.running_mean))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(device: str) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        x = normal((6, 4), device=device).requires_grad_()
        module_for(bn_ext.FusedBatchNorm1d, 4, device)(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradient_sums_to_zero_over_the_batch(device: str) -> None:
    """A property of the training gradient: it is orthogonal to 1 and to xhat, up to the error model."""
    x, g = normal((50, 4, 7), device=device), normal((50, 4, 7), device=device, seed=1)
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device, track_running_stats=False)
    ref = reference(x, module.weight, module.bias, g)
    grad = step(module, x, g).grad_input
    assert grad is not None and ref.grad_input is not None
    zero = torch.zeros(4, dtype=F64, device=device)
    bound = 8 * torch.finfo(torch.float32).eps * ref.grad_input.abs().sum(reduce_dims(x))
    assert_within(grad.double().sum(reduce_dims(x)), zero, bound, "sum of the gradient")
    assert_within((grad.double() * ref.normalized).sum(reduce_dims(x)), zero, 4 * bound, "gradient along xhat")
