"""Functional form, with the signature and the errors of torch.nn.functional.batch_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd
from ._guard import read_record

# Devices with kernels; elsewhere torch's own batch norm runs.
KERNEL_DEVICES = ("cpu", "meta", "cuda") if read_record()["cuda"] else ("cpu", "meta")


def has_kernel(input: Tensor) -> bool:
    """Return whether input is a plain strided tensor on a device that this build has kernels for."""
    plain = type(input) in (Tensor, torch.nn.Parameter) and input.layout == torch.strided
    return plain and input.device.type in KERNEL_DEVICES


def transforms_supported() -> bool:
    """Return whether every torch.func transform in force can differentiate our operators (vmap and jvp cannot)."""
    stack = get_interpreter_stack()
    return stack is None or all(level.key() == TransformType.Grad for level in stack)


def native_only(input: Tensor) -> bool:
    """Return whether torch's own batch norm must run: forward-mode AD, vmap, overriding tensor types."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() and not transforms_supported():
        return True
    return torch.autograd.forward_ad._current_level >= 0 or has_torch_function_variadic(input)


def fused_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor | None:
    """Return the batch norm of input (N, C) or (N, C, L), or None where there is no kernel and nothing has changed.

    training selects the batch's own statistics. momentum None is the cumulative average 1 / num_batches_tracked.
    """
    if not training and (running_mean is None or running_var is None):
        return None  # native words the error
    try:
        return autograd.batch_norm(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
    except NotImplementedError:
        if has_kernel(input):
            raise
        return None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Apply batch normalisation to every channel, as torch.nn.functional.batch_norm does.

    Args:
        input: (N, C) or (N, C, L), float64, float32, bfloat16 or float16, of any strides. Tensors of another rank,
            device or layout go to torch.nn.functional.batch_norm.
        running_mean, running_var: (C,), updated in place when training, else what input is normalised by.
        weight, bias: (C,) or None.
        training: use the statistics of input.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        Tensor of input's shape and dtype, in input's memory format.

    Raises:
        ValueError: one value per channel in training; eps not positive in training, or negative.
        RuntimeError: a per-channel tensor that is not of size C; running statistics missing when not training.
        NotImplementedError: input is not of a floating type.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if input.dim() in (2, 3) and momentum is not None and not native_only(input):
        output = fused_batch_norm(input, running_mean, running_var, weight, bias, None, training, momentum, eps)
        if output is not None:
            return output
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
