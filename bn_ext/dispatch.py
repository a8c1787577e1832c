"""What computes a call where it stands: our operators, our autograd Functions, or torch's own batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._C import _disabled_torch_function_impl as _no_override
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from . import autograd, ops
from ._guard import read_record

# Devices with kernels; elsewhere torch's own batch norm runs.
KERNEL_DEVICES = ("cpu", "meta", "cuda") if read_record()["cuda"] else ("cpu", "meta")

# ops.batch_norm's arguments: input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
# eps.
Implementation = Callable[..., Tensor]


def has_kernel(input: Tensor) -> bool:
    """Return whether input is a plain strided tensor on a device that this build has kernels for."""
    plain = type(input) in (Tensor, torch.nn.Parameter) and input.layout == torch.strided
    return plain and input.device.type in KERNEL_DEVICES


def transforms_supported() -> bool:
    """Return whether every torch.func transform in force can differentiate our operators (vmap and jvp cannot)."""
    if torch.compiler.is_dynamo_compiling():
        return False  # torch.compile traces what an autograd.Function computes there, and loses its backward
    stack = get_interpreter_stack()
    return stack is None or all(level.key() == TransformType.Grad for level in stack)


def overrides_functions(input: Tensor) -> bool:
    """Return whether input is of a type with a __torch_function__ of its own, torch.fx's stand-ins among them.

    torch.overrides.has_torch_function also says yes to a plain tensor under a mode, torch.set_default_device's for one.
    """
    kind = type(input)
    return kind is not Tensor and getattr(kind, "__torch_function__", _no_override) is not _no_override


def choose(input: Tensor) -> Implementation | None:
    """Return what computes batch norm where the call stands, or None where torch's own has to.

    The operator is for eager calls, torch.compile, torch.export and torch.jit.trace; the Functions are for
    torch.func.grad and vjp. Torch's own is for forward-mode AD, vmap, ONNX and tensor types that override functions.
    """
    if overrides_functions(input) or forward_ad._current_level >= 0:
        return None
    if _are_functorch_transforms_active():
        return autograd.batch_norm if transforms_supported() else None
    if torch.compiler.is_compiling():
        # A graph is made once and run later: whether there is a kernel is settled now. Export shows fake tensors here.
        plain = has_kernel(input) if torch.compiler.is_dynamo_compiling() else input.device.type in KERNEL_DEVICES
        if not plain or torch.onnx.is_in_onnx_export():
            return None
    elif _get_tracing_state() and torch.onnx.is_in_onnx_export():
        return None
    return cast(Implementation, ops.batch_norm)


def fused_batch_norm(
    implementation: Implementation,
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

    implementation is what choose returned. training selects the batch's own statistics. momentum None is the cumulative
    average 1 / num_batches_tracked.
    """
    if not training and (running_mean is None or running_var is None):
        return None  # native words the error
    try:
        return implementation(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
    except NotImplementedError:
        if has_kernel(input):
            raise
        return None
