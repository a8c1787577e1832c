"""autograd.Function around the operators: fused first derivatives, differentiable ones where a graph is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

Gradients = tuple[Tensor | None, ...]


def _channel_dims(input: Tensor) -> list[int]:
    return [dim for dim in range(input.dim()) if dim != 1]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view([1, -1] + [1] * (input.dim() - 2))


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    mask: tuple[bool, ...],
) -> Gradients:
    """Return the gradients as compositions of differentiable torch operations, for derivatives of higher order.

    running is (running_mean, running_var) where these normalised the input, None where its own statistics did. The
    formulas are those of csrc/formulas.h; input's statistics are computed anew so that the graph reaches input.
    """
    dims = _channel_dims(input)
    dtype = ops.statistics_dtype(input)
    x, dy = input.to(dtype), grad_output.to(dtype)
    if running is None:
        centred = x - x.mean(dims, keepdim=True)
        invstd = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    else:
        centred = x - _per_channel(running[0].to(dtype), x)
        invstd = torch.rsqrt(_per_channel(running[1].to(dtype), x) + eps)
    normalised = centred * invstd
    grad_input = grad_weight = grad_bias = None
    if mask[0]:
        scale = invstd if weight is None else invstd * _per_channel(weight.to(dtype), x)
        if running is None:
            projection = dy.mean(dims, keepdim=True) + normalised * (dy * normalised).mean(dims, keepdim=True)
            grad_input = ((dy - projection) * scale).to(input.dtype)
        else:
            grad_input = (dy * scale).to(input.dtype)
    if mask[1]:
        grad_weight = (dy * normalised).sum(dims)
    if mask[2]:
        grad_bias = dy.sum(dims)
    return grad_input, grad_weight, grad_bias


def _wanted(gradients: tuple[Tensor, Tensor, Tensor], mask: tuple[bool, ...]) -> Gradients:
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, mask, strict=True))


class BatchNormTraining(torch.autograd.Function):
    """Normalisation by the batch's own statistics; returns (output, saved), saved as batch_norm_forward's."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        return ops.batch_norm_forward(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        saved = output[1]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], saved)
        ctx.eps = inputs[7]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> Gradients:
        if grad_output is None:
            return (None,) * 8
        input, weight, saved = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(grad_output, input, weight, None, ctx.eps, mask)
        else:
            gradients = _wanted(ops.batch_norm_backward(grad_output, input, weight, saved, mask), mask)
        return *gradients, None, None, None, None, None


class BatchNormInference(torch.autograd.Function):
    """Normalisation by fixed running statistics, which get no gradient."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> Tensor:
        return ops.batch_norm_inference(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3], inputs[4])
        ctx.eps = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Gradients:
        if grad_output is None:
            return (None,) * 6
        input, weight, running_mean, running_var = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            running = (running_mean, running_var)
            gradients = _differentiable_gradients(grad_output, input, weight, running, ctx.eps, mask)
        else:
            gradients = _wanted(
                ops.batch_norm_inference_backward(grad_output, input, weight, running_mean, running_var, ctx.eps, mask),
                mask,
            )
        return *gradients, None, None, None


# Function.apply inspects forward's signature anew on every call, which costs more than a small batch norm. Outside of
# torch.func transforms it only goes on to this base method, which takes the arguments as they are.
_apply_training = super(torch.autograd.Function, BatchNormTraining).apply
_apply_inference = super(torch.autograd.Function, BatchNormInference).apply


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plain() -> bool:
    """Return whether neither the compiler nor a torch.func transform is looking on."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def batch_norm_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Return input (N, C) or (N, C, L) normalised by its own statistics; update what is tracked in place."""
    arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    if not _needs_grad(input, weight, bias):
        return ops.batch_norm_forward(*arguments)[0]  # type: ignore[no-any-return]
    apply = _apply_training if _plain() else BatchNormTraining.apply
    return apply(*arguments)[0]  # type: ignore[no-any-return, no-untyped-call]


def batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """Return input (N, C) or (N, C, L) normalised by running_mean and running_var (C,)."""
    arguments = (input, weight, bias, running_mean, running_var, eps)
    if not _needs_grad(input, weight, bias):
        return ops.batch_norm_inference(*arguments)  # type: ignore[no-any-return]
    apply = _apply_inference if _plain() else BatchNormInference.apply
    return apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


__all__ = ["BatchNormInference", "BatchNormTraining", "batch_norm_inference", "batch_norm_training"]
