"""Handles of the compiled operators, bound once, and their fake kernels (shapes, dtypes and strides, no data).

input is (N, C) or (N, C, L); statistics are float64 for float64 input and float32 for every other type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import guard_or_false

batch_norm = torch.ops.bn_ext.batch_norm.default
batch_norm_composite_backward = torch.ops.bn_ext.batch_norm_composite_backward.default
batch_norm_composite_double_backward = torch.ops.bn_ext.batch_norm_composite_double_backward.default
batch_norm_forward = torch.ops.bn_ext.batch_norm_forward.default
batch_norm_inference = torch.ops.bn_ext.batch_norm_inference.default
batch_norm_backward = torch.ops.bn_ext.batch_norm_backward.default
batch_norm_inference_backward = torch.ops.bn_ext.batch_norm_inference_backward.default
batch_norm_double_backward = torch.ops.bn_ext.batch_norm_double_backward.default
batch_norm_inference_double_backward = torch.ops.bn_ext.batch_norm_inference_double_backward.default
batch_norm_act = torch.ops.bn_ext.batch_norm_act.default
batch_norm_act_composite_backward = torch.ops.bn_ext.batch_norm_act_composite_backward.default
batch_norm_act_forward = torch.ops.bn_ext.batch_norm_act_forward.default
batch_norm_act_inference = torch.ops.bn_ext.batch_norm_act_inference.default
batch_norm_act_inference_ = torch.ops.bn_ext.batch_norm_act_inference_.default
batch_norm_act_backward = torch.ops.bn_ext.batch_norm_act_backward.default


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of input are computed and saved."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(f"Tensor on device {other.device} is not on the expected device {input.device}!")


def _check(input: Tensor, training: bool, eps: float | None = None, **vectors: Tensor | None) -> None:
    """Raise what the kernels' entry (csrc/glue.cpp) would, as far as shapes, types and devices tell.

    A graph that is being made is left to that entry, where it runs: the error then is the one that eager calls raise.
    """
    if TracingContext.try_get() is not None:
        _check_devices(input, *vectors.values())
        return
    if input.dim() not in (2, 3):
        raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")
    if training and guard_or_false(input.numel() == input.shape[1]):
        size = tuple(input.shape)
        raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({[*size]})")
    if eps is not None and training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps is not None and eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if input.dtype not in KERNEL_DTYPES:
        kind = torch.empty(0, dtype=input.dtype).type().rpartition(".")[2].removesuffix("Tensor")
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{kind}'")
    _check_devices(input, *vectors.values())
    if guard_or_false(input.numel() == 0):
        return
    if training and (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = vectors.get(name)
        if vector is not None and vector.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {vector.numel()}")


def _check_count(input: Tensor, count: Tensor | None) -> None:
    """Raise for a count without data beside an input with data, which has brought the call here."""
    if count is not None and count.device.type == "meta":
        _check_devices(input, count)


def _check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    _check_devices(input, residual)
    if residual.dtype != input.dtype:
        raise RuntimeError(f"residual should have the type of input, {input.dtype}, but has {residual.dtype}")
    if residual.shape != input.shape:
        size, other = list(input.shape), list(residual.shape)
        raise RuntimeError(f"residual should have the size of input, {size}, but has {other}")


@torch.library.register_fake("bn_ext::batch_norm_forward")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check(input, True, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_count(input, num_batches_tracked)
    return torch.empty_like(input), input.new_empty((3, input.shape[1]), dtype=statistics_dtype(input))


@torch.library.register_fake("bn_ext::batch_norm_inference")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    _check(input, False, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    return torch.empty_like(input)


def _fake_gradients(
    input: Tensor, weight: Tensor | None, output_mask: Sequence[bool], bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = statistics_dtype(input)
    parameter = statistics if weight is None else weight.dtype
    shape = input.shape[1:2] if weight is None else weight.shape
    none = input.new_empty((0,), dtype=statistics)
    grad_input = torch.empty_like(input) if output_mask[0] else none
    grad_weight, grad_bias = (
        input.new_empty(shape, dtype=dtype) if wanted else torch.empty_like(none)
        for dtype, wanted in zip((parameter, bias_dtype or parameter), output_mask[1:], strict=True)
    )
    return grad_input, grad_weight, grad_bias


@torch.library.register_fake("bn_ext::batch_norm_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    output_mask: Sequence[bool],
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output, weight, saved)
    return _fake_gradients(input, weight, output_mask, bias_dtype)


@torch.library.register_fake("bn_ext::batch_norm_inference_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    output_mask: Sequence[bool],
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output, weight, running_mean, running_var)
    return _fake_gradients(input, weight, output_mask, bias_dtype)


def _fake_second_gradients(
    input: Tensor, weight: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = output_mask[1], output_mask[2], False
    grad_input, grad_weight, none = _fake_gradients(input, weight, wanted)
    return torch.empty_like(input) if output_mask[0] else none, grad_input, grad_weight


@torch.library.register_fake("bn_ext::batch_norm_double_backward")
def _(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, weight, saved)
    return _fake_second_gradients(input, weight, output_mask)


@torch.library.register_fake("bn_ext::batch_norm_inference_double_backward")
def _(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, weight)
    _check_devices(input, running_mean, running_var)
    return _fake_second_gradients(input, weight, output_mask)


def mask_size(input: Tensor, residual: Tensor | None, activation: str) -> int:
    """Return the bytes that forward leaves for backward where there is a residual and the derivative goes by the sign
    of its argument: one for 8 elements (on CUDA: for 16 bytes of the output), and 16 to read beyond."""
    if residual is None or input.numel() == 0 or activation not in ("relu", "leaky_relu"):
        return 0
    elements = 16 // input.element_size() if input.device.type == "cuda" else 8
    return (input.numel() + elements - 1) // elements + 16


def _fake_mask(input: Tensor, residual: Tensor | None, activation: str, wanted: bool) -> Tensor:
    return input.new_empty((mask_size(input, residual, activation) if wanted else 0,), dtype=torch.uint8)


@torch.library.register_fake("bn_ext::batch_norm_act_forward")
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(input, True, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(input, residual)
    _check_count(input, num_batches_tracked)
    saved = input.new_empty((6, input.shape[1]), dtype=statistics_dtype(input))
    return torch.empty_like(input), saved, _fake_mask(input, residual, activation, save_mask)


@torch.library.register_fake("bn_ext::batch_norm_act_inference")
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(input, False, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(input, residual)
    saved = input.new_empty((6, input.shape[1]) if save else (0,), dtype=statistics_dtype(input))
    return torch.empty_like(input), saved, _fake_mask(input, residual, activation, save)


@torch.library.register_fake("bn_ext::batch_norm_act_inference_")
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> None:
    _check(input, False, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(input, residual)


@torch.library.register_fake("bn_ext::batch_norm_act_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    output_mask: Sequence[bool],
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output, residual, mask, weight, saved)
    of_input, of_residual, *of_parameters = output_mask
    grad_input, grad_weight, grad_bias = _fake_gradients(input, weight, (of_input, *of_parameters), bias_dtype)
    grad_residual = torch.empty_like(input) if of_residual else input.new_empty((0,))
    return grad_input, grad_residual, grad_weight, grad_bias
