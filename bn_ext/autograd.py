"""autograd.Function around the operators: fused first derivatives, differentiable ones where a graph is asked for.

These carry torch.func, whose transforms take no node in C++; everything else goes through their twin there
(csrc/autograd.cpp), which is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

Gradients = tuple[Tensor | None, ...]


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
            dx, dw, db = ops.batch_norm_composite_backward(grad_output, input, weight, None, None, ctx.eps, mask)
        else:
            dx, dw, db = ops.batch_norm_backward(grad_output, input, weight, saved, mask)
        return dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None, None, None, None, None, None


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
            dx, dw, db = ops.batch_norm_composite_backward(
                grad_output, input, weight, running_mean, running_var, ctx.eps, mask
            )
        else:
            dx, dw, db = ops.batch_norm_inference_backward(
                grad_output, input, weight, running_mean, running_var, ctx.eps, mask
            )
        return dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None, None, None, None


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Do what ops.batch_norm does, with the Functions above in place of its node in C++.

    input is (N, C) or (N, C, L), everything else (C,) or None; not training needs both running statistics.
    """
    if training:
        arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        return BatchNormTraining.apply(*arguments)[0]  # type: ignore[no-any-return, no-untyped-call]
    return BatchNormInference.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, weight, bias, running_mean, running_var, eps
    )


__all__ = ["BatchNormInference", "BatchNormTraining", "batch_norm"]
