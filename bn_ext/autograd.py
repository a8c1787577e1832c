"""autograd.Function around the operators: fused first and second derivatives, third ones made of torch operations.

These carry torch.func, whose transforms take no node in C++; everything else goes through their twin there
(csrc/torch/autograd.cpp), which is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .padding import gathered

Gradients = tuple[Tensor | None, ...]
Mask = tuple[bool, bool, bool]


def _only(wanted: Mask, gradients: Sequence[Tensor], inputs: int) -> Gradients:
    """Return the gradients of the first three of a Function's inputs, None for all that is not wanted."""
    found = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (*found, *(None,) * (inputs - 3))


class BatchNormGradients(torch.autograd.Function):
    """What batch_norm_backward does, to be differentiated again."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        saved: Tensor,
        training: bool,
        eps: float,
        mask: Mask,
        bias_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = ops.batch_norm_backward(grad_output, input, weight, saved, training, (*mask, False), bias_dtype)
        return found[:3]  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.training, ctx.eps, mask, _ = inputs
        ctx.mark_non_differentiable(*(t for t, wanted in zip(output, mask, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Gradients:
        if all(gradient is None for gradient in arriving):
            return (None,) * 8
        wanted = ctx.needs_input_grad[:3]
        first = (*arriving, *ctx.saved_tensors, ctx.training)
        if torch.is_grad_enabled():
            found = ops.batch_norm_composite_double_backward(*first, ctx.eps, wanted)
        else:
            found = ops.batch_norm_double_backward(*first, wanted)
        return _only(wanted, found, 8)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, int, int]]:
        """Go by the rules of the operations that the composite is made of."""
        *tensors, training, eps, mask, bias_dtype = inputs

        def composite(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return ops.batch_norm_composite_backward(  # type: ignore[no-any-return]
                *tensors, training, eps, mask, bias_dtype
            )

        return torch.vmap(composite, in_dims[:4])(*tensors), (0, 0, 0)


class BatchNorm(torch.autograd.Function):
    """Normalisation by the batch's own statistics or by mean and var; returns what batch_norm_forward does.

    Running statistics get no gradient, nor do mean and var.
    """

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
        mean: Tensor | None,
        var: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.batch_norm_forward(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, mean, var, valid=valid
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, saved, mask = output
        ctx.mark_non_differentiable(saved, mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], saved, inputs[10])
        ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
        ctx.eps, ctx.training = inputs[7], inputs[8] is None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> Gradients:
        if grad_output is None:
            return (None,) * 11
        wanted = ctx.needs_input_grad[:3]
        input, weight, saved, valid = ctx.saved_tensors
        if not torch.is_grad_enabled():
            first = (grad_output, input, weight, saved, ctx.training, (*wanted, False), ctx.bias_dtype)
            return _only(wanted, ops.batch_norm_backward(*first, valid=valid)[:3], 11)
        of_parameters: list[Tensor] = []

        def gradients(grad_output: Tensor, input: Tensor) -> Tensor:
            first, *rest = BatchNormGradients.apply(  # type: ignore[no-untyped-call]
                grad_output, input, weight, saved, ctx.training, ctx.eps, wanted, ctx.bias_dtype
            )
            of_parameters.extend(rest)
            return first if wanted[0] else torch.zeros_like(input)  # what is not wanted has no elements

        # Of a padded batch, that of what counts.
        of_input = gradients(grad_output, input) if valid is None else gathered(gradients, grad_output, valid, input)
        return _only(wanted, (of_input, *of_parameters), 11)


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
    valid: Tensor | None = None,
) -> Tensor:
    """Do what ops.batch_norm does, with the Functions above in place of its node in C++.

    input is (N, C) or (N, C, L), everything else (C,) or None; not training needs both running statistics.
    """
    fixed: tuple[Tensor | None, Tensor | None] = (None, None)
    if not training:
        fixed, running_mean, running_var, num_batches_tracked = (running_mean, running_var), None, None, None
    return BatchNorm.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, *fixed, valid
    )[0]


__all__ = ["BatchNorm", "BatchNormGradients", "batch_norm"]
