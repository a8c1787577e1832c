"""act(batch norm(x) + residual) in one pass: values and gradients against float64, layouts, repeatability, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from reference import assert_within, ulp
from reference_activated import ACTIVATIONS, FORMULA_ULP, SLOPE, activated, value_and_derivative
from support import FLOATS, LAYOUTS, OpLog, act_module_for, name_of, normal

F32, F64 = torch.float32, torch.float64
# rows of channels: folded, ragged, wider than a block; planes: short runs, runs of several pieces; by span
SHAPES = ((6, 5), (67, 3), (40, 1001), (9, 5, 70), (2, 3, 2100), (7, 6, 9))


NAMES: dict[type[nn.Module], str | None] = {
    nn.Identity: None, nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip


def check(
    module: bn_ext.BatchNormAct1d, x: Tensor, residual: Tensor | None, grad_output: Tensor, names: str = "xrwb"
) -> tuple[Tensor, ...]:
    """Run one step, hold every tensor of it to the reference, and return output and gradients. names: what requires a
    gradient, of x, residual, weight and bias."""
    norm = module.norm
    running = {"running_mean": norm.running_mean.clone(), "running_var": norm.running_var.clone()}
    x = x.detach().requires_grad_("x" in names)
    residual = None if residual is None else residual.detach().requires_grad_("r" in names)
    for name, parameter in (("w", norm.weight), ("b", norm.bias)):
        if parameter is not None:
            parameter.requires_grad_(name in names)
    y = module(x) if residual is None else module(x, residual)
    assert y.dtype == x.dtype and y.shape == x.shape
    right = activated(
        x, residual, norm.weight, norm.bias, grad_output, NAMES[type(module.act)], given=y, training=module.training,
        eps=norm.eps, **running,
    )  # fmt: skip
    assert_within(y, right.output, right.output_tolerance, "output")
    wanted = {"x": x, "r": residual, "w": norm.weight, "b": norm.bias}
    wanted = {k: v for k, v in wanted.items() if v is not None and v.requires_grad}
    grads = dict(zip(wanted, torch.autograd.grad(y, tuple(wanted.values()), grad_output), strict=True))
    for key, grad in grads.items():
        assert grad.dtype == wanted[key].dtype and grad.shape == wanted[key].shape
        if key == "x":
            assert_within(grad, right.norm.grad_input, right.grad_input_tolerance(), "grad input")
        elif key == "r":
            assert_within(grad, right.passed, right.passed_tolerance, "grad residual")
        else:
            which = "weight" if key == "w" else "bias"
            expected = getattr(right.norm, f"grad_{which}")
            assert_within(grad, expected, right.grad_param_tolerance(which, grad.dtype), f"grad {which}")
    return y.detach(), *grads.values()


def module_of(channels: int, device: str, dtype: torch.dtype, activation: str | None) -> bn_ext.BatchNormAct1d:
    return act_module_for(channels, device, activation, SLOPE, dtype=F64 if dtype == F64 else F32)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str, with_residual: bool) -> list[Any]:
    x, r, g = (normal(shape, dtype, device, seed=k, mean=0.25 * (k == 0)) for k in range(3))
    return [x, r if with_residual else None, g]


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_values_and_gradients(
    device: str, dtype: torch.dtype, activation: str | None, with_residual: bool, training: bool
) -> None:
    for shape in SHAPES:
        module = module_of(shape[1], device, dtype, activation).train(training)
        x, residual, g = tensors(shape, dtype, device, with_residual)
        with OpLog() as log:
            check(module, x, residual, g)
        plain = activation is None and not with_residual
        assert log.fused == (not plain)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device: str, layout: str, activation: str) -> None:
    """Every operand in every layout, and each in another one than the others."""
    for shape in ((18, 7), (6, 5, 9), (3, 4, 130)):
        for own in range(4):
            module = module_of(shape[1], device, F32, activation)
            operands = tensors(shape, F32, device, True)
            operands = [LAYOUTS[layout](t) if own in (k, 3) else t for k, t in enumerate(operands)]
            check(module, *operands)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("names", ["x", "r", "w", "b", "xr", "wb", "rb", "xw"])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_only_the_gradients_that_are_wanted(device: str, activation: str, names: str, training: bool) -> None:
    for dtype in (F32, torch.bfloat16, F64):
        module = module_of(5, device, dtype, activation).train(training)
        check(module, *tensors((33, 5, 3), dtype, device, True), names=names)
        if "r" not in names:
            check(module, *tensors((33, 5, 3), dtype, device, False), names=names)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_large_means_keep_their_digits(device: str, activation: str) -> None:
    module = module_of(4, device, F32, activation)
    x, residual, g = tensors((500, 4), F32, device, True)
    check(module, x + 1e4, residual, g)
    check(module, x + 1e4, None, g)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_formulas_in_both_tails(device: str, activation: str, dtype: torch.dtype) -> None:
    """Batch norm as the identity: what is left is the activation, to FORMULA_ULP wherever it is a normal number."""
    ends = {"silu": 80.0, "gelu": 12.0}[activation]
    x = torch.cat([torch.linspace(-ends, ends, 20001), torch.logspace(-30, 1, 999), -torch.logspace(-30, 1, 999)])
    x = x.to(device=device, dtype=dtype)[:, None]
    zero, one = (torch.full((1,), v, device=device, dtype=dtype) for v in (0, 1))
    op = torch.ops.bn_ext
    none = (None,) * 6
    y, saved, _ = op.batch_norm_forward(x, *none, 0.0, zero, one, None, activation)
    wanted = [True, False, False, False]
    grad, *_ = op.batch_norm_backward(torch.ones_like(x), x, None, saved, False, wanted, None, None, None, activation)
    value, derivative = value_and_derivative(x.double(), activation)
    # In float64 the reference has roundings of its own: an argument off by one moves erfc by v^2, its own exp likewise.
    promised = FORMULA_ULP - 2 * (device == "cpu") + (2 * x.double().square() + 4 if dtype == F64 else 0)
    assert_within(y, value, promised * ulp(value, dtype), activation)
    largest = torch.maximum(x.double().abs(), torch.ones_like(value)) * torch.maximum(
        (value / x.double()).abs(), (derivative - value / x.double()).abs()
    )
    assert_within(grad, derivative, promised * ulp(largest, dtype), f"{activation}'")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_not_finite_and_zero(device: str, activation: str | None, dtype: torch.dtype, with_residual: bool) -> None:
    """Evaluation, where each element stands for itself: torch's own operations on the same numbers."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 3.0], dtype=dtype, device=device)
    x = values[:, None].repeat(1, 3)
    residual = values.roll(3)[:, None].repeat(1, 3) if with_residual else None
    module = bn_ext.BatchNormAct1d(3, activation, SLOPE, eps=0.25, device=device).eval()
    module.norm.running_var.fill_(0.75)  # bn(x) = x
    native = nn.BatchNorm1d(3, eps=0.25, device=device).eval().double()
    native.running_var.fill_(0.75)
    results = []
    for norm, kind in ((module, dtype), (native, F64)):
        leaf = x.to(kind, copy=True).requires_grad_()
        other = None if residual is None else residual.to(kind, copy=True).requires_grad_()
        if norm is module:
            y = norm(leaf, other)
        else:
            y = norm(leaf) if other is None else norm(leaf) + other
            y = {
                "relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
                "leaky_relu": lambda v: nn.functional.leaky_relu(v, SLOPE),
            }.get(activation, lambda v: v)(y)  # fmt: skip
        y.backward(torch.ones_like(y))
        results.append([y.detach(), leaf.grad, *([] if other is None else [other.grad])])
    for mine, right in zip(*results, strict=True):
        # gelu(inf) is inf by our formula; torch's multiplies, and on some machines says NaN.
        infinite = mine.isinf() & right.isnan() if activation == "gelu" else torch.zeros_like(mine, dtype=torch.bool)
        torch.testing.assert_close(
            mine.double()[~infinite], right.double()[~infinite], rtol=torch.finfo(dtype).eps, atol=1e-7, equal_nan=True
        )


def test_gradient_of_relu_at_zero_and_of_infinite_gradients(device: str) -> None:
    """0, not 0 * inf = NaN, where relu blocks; with the mask and without."""
    for residual in (None, torch.zeros(4, 2, device=device)):
        x = torch.tensor([[-1.0, 0.0]] * 4, device=device, requires_grad=True)
        module = bn_ext.BatchNormAct1d(2, device=device).eval()
        module(x, residual).backward(torch.full((4, 2), torch.inf, device=device))
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_number_of_threads_gives_the_same_bits(activation: str | None, dtype: torch.dtype) -> None:
    """Masks included: rows of 257 channels begin and end inside a byte that two threads write."""
    for shape in ((3000, 257), (24, 10, 2050)):
        module = module_of(shape[1], "cpu", dtype, activation)
        operands = tensors(shape, dtype, "cpu", True)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, residual, _ = (t.clone().requires_grad_() for t in operands)
            y = module(x, residual)
            grads = torch.autograd.grad(y, (x, residual, *module.parameters()), operands[2])
            runs.append([y.detach(), *grads])
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_mask_is_the_sign_of_every_element() -> None:
    """Bit i belongs to element i of the output's memory, whatever the walk."""
    for shape in ((5, 3), (130, 257), (3, 4, 1030)):
        for layout in ("contiguous", "permuted"):
            x, residual = (LAYOUTS[layout](normal(shape, F32, seed=k)) for k in (0, 1))
            vectors = (None,) * 5
            y, _, mask = torch.ops.bn_ext.batch_norm_forward(x, *vectors, 0.1, 1e-5, None, None, residual, "relu")
            memory = y.as_strided((y.numel(),), (1,)) > 0
            mask = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten()
            assert torch.equal(mask[: y.numel()].bool(), memory)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(device: str, training: bool) -> None:
    x = torch.empty(0, 4, device=device, requires_grad=True)
    module = bn_ext.BatchNormAct1d(4, device=device).train(training)
    module(x, torch.empty(0, 4, device=device)).sum().backward()
    assert x.grad.shape == (0, 4) and torch.equal(module.norm.weight.grad, torch.zeros(4, device=device))
    assert int(module.norm.num_batches_tracked) == training


# Outputs of more than 8 MiB are streamed, from the first aligned element of each ragged row or run on; rows wider than
# a block, runs of several pieces.
LARGE = ((2150, 1003), (3, 5, 143003))


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("activation", "with_residual"), [("relu", False), ("leaky_relu", True), ("gelu", True)])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, activation: str, with_residual: bool, training: bool
) -> None:
    shape = shape if dtype == F32 else (2 * shape[0], *shape[1:])
    module = module_of(shape[1], device, dtype, activation).train(training)
    check(module, *tensors(shape, dtype, device, with_residual))
