"""Handles of the compiled operators, bound once, and their fake kernels (shapes, dtypes and strides, no data).

input is (N, C) or (N, C, L); statistics are float64 for float64 input and float32 for every other type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

batch_norm = torch.ops.bn_ext.batch_norm.default
batch_norm_composite_backward = torch.ops.bn_ext.batch_norm_composite_backward.default
batch_norm_composite_double_backward = torch.ops.bn_ext.batch_norm_composite_double_backward.default
batch_norm_forward = torch.ops.bn_ext.batch_norm_forward.default
batch_norm_inference = torch.ops.bn_ext.batch_norm_inference.default
batch_norm_backward = torch.ops.bn_ext.batch_norm_backward.default
batch_norm_inference_backward = torch.ops.bn_ext.batch_norm_inference_backward.default
batch_norm_double_backward = torch.ops.bn_ext.batch_norm_double_backward.default
batch_norm_inference_double_backward = torch.ops.bn_ext.batch_norm_inference_double_backward.default


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of input are computed and saved."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(f"Tensor on device {other.device} is not on the expected device {input.device}!")


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
    _check_devices(input, weight, bias, running_mean, running_var, num_batches_tracked)
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
    _check_devices(input, weight, bias, running_mean, running_var)
    return torch.empty_like(input)


def _fake_gradients(input: Tensor, weight: Tensor | None, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    statistics = statistics_dtype(input)
    parameter = statistics if weight is None else weight.dtype
    shape = input.shape[1:2] if weight is None else weight.shape
    none = input.new_empty((0,), dtype=statistics)
    grad_input = torch.empty_like(input) if output_mask[0] else none
    grad_weight, grad_bias = (
        input.new_empty(shape, dtype=parameter) if wanted else torch.empty_like(none) for wanted in output_mask[1:]
    )
    return grad_input, grad_weight, grad_bias


@torch.library.register_fake("bn_ext::batch_norm_backward")
def _(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, saved: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output, weight, saved)
    return _fake_gradients(input, weight, output_mask)


@torch.library.register_fake("bn_ext::batch_norm_inference_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output, weight, running_mean, running_var)
    return _fake_gradients(input, weight, output_mask)


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
