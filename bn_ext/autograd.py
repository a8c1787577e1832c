"""autograd.Function around the operators: fused first and second derivatives, third ones made of torch operations.

These carry torch.func, whose transforms take no node in C++; everything else goes through their twin there
(csrc/autograd.cpp), which is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

Gradients = tuple[Tensor | None, ...]
Mask = tuple[bool, bool, bool]


def _only(wanted: Mask, gradients: Sequence[Tensor], inputs: int) -> Gradients:
    """Return the gradients of the first three of a Function's inputs, None for all that is not wanted."""
    found = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (*found, *(None,) * (inputs - 3))


class BatchNormGradients(torch.autograd.Function):
    """What batch_norm_backward does, or batch_norm_inference_backward, to be differentiated again.

    statistics is forward's saved tensor, or the running mean where variance, the running variance, is given.
    """

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        statistics: Tensor,
        variance: Tensor | None,
        eps: float,
        mask: Mask,
        bias_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if variance is None:
            return ops.batch_norm_backward(  # type: ignore[no-any-return]
                grad_output, input, weight, statistics, mask, bias_dtype
            )
        return ops.batch_norm_inference_backward(  # type: ignore[no-any-return]
            grad_output, input, weight, statistics, variance, eps, mask, bias_dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps, mask, _ = inputs
        ctx.mark_non_differentiable(*(t for t, wanted in zip(output, mask, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Gradients:
        if all(gradient is None for gradient in arriving):
            return (None,) * 8
        grad_output, input, weight, statistics, variance = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        first = (*arriving, grad_output, input, weight)
        if torch.is_grad_enabled():
            mean = None if variance is None else statistics
            found = ops.batch_norm_composite_double_backward(*first, mean, variance, ctx.eps, wanted)
        elif variance is None:
            found = ops.batch_norm_double_backward(*first, statistics, wanted)
        else:
            found = ops.batch_norm_inference_double_backward(*first, statistics, variance, ctx.eps, wanted)
        return _only(wanted, found, 8)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, int, int]]:
        """Go by the rules of the operations that the composite is made of."""
        grad_output, input, weight, statistics, variance, eps, mask, bias_dtype = inputs
        mean = None if variance is None else statistics
        mean_dim = None if variance is None else in_dims[3]

        def composite(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return ops.batch_norm_composite_backward(*tensors, eps, mask, bias_dtype)  # type: ignore[no-any-return]

        dims = (*in_dims[:3], mean_dim, in_dims[4])
        return torch.vmap(composite, dims)(grad_output, input, weight, mean, variance), (0, 0, 0)


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
        ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
        ctx.eps = inputs[7]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> Gradients:
        if grad_output is None:
            return (None,) * 8
        input, weight, saved = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = BatchNormGradients.apply(  # type: ignore[no-untyped-call]
                grad_output, input, weight, saved, None, ctx.eps, mask, ctx.bias_dtype
            )
        else:
            found = ops.batch_norm_backward(grad_output, input, weight, saved, mask, ctx.bias_dtype)
        return _only(mask, found, 8)


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
        ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
        ctx.eps = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Gradients:
        if grad_output is None:
            return (None,) * 6
        input, weight, running_mean, running_var = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = BatchNormGradients.apply(  # type: ignore[no-untyped-call]
                grad_output, input, weight, running_mean, running_var, ctx.eps, mask, ctx.bias_dtype
            )
        else:
            found = ops.batch_norm_inference_backward(
                grad_output, input, weight, running_mean, running_var, ctx.eps, mask, ctx.bias_dtype
            )
        return _only(mask, found, 6)


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


__all__ = ["BatchNormGradients", "BatchNormInference", "BatchNormTraining", "batch_norm"]
