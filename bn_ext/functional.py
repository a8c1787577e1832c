"""Functional form, with the signature and the errors of torch.nn.functional.batch_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._C import _disabled_torch_function_impl as _no_override
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

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


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Tensor:
    """Apply batch normalisation to every channel, as torch.nn.functional.batch_norm does.

    With residual or activation the result is act(batch_norm(input) + residual), in the same passes over memory.

    Args:
        input: (N, C) or (N, C, L), float64, float32, bfloat16 or float16, of any strides. Tensors of another rank,
            device or layout go to torch.nn.functional.batch_norm.
        running_mean, running_var: (C,), updated in place when training, else what input is normalised by.
        weight, bias: (C,) or None.
        training: use the statistics of input.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        residual: what is added before the activation; of input's shape and dtype for one pass. Backward reads
            it again (relu and leaky_relu on the CPU do not), so it is kept, by reference, and must not change.
        activation: None, "relu", "leaky_relu", "silu" or "gelu" (the exact one, by erf).
        negative_slope: leaky_relu's.
        inplace: write the result into input; in evaluation only, and where autograd does not need input.

    Returns:
        Tensor of input's shape and dtype, in input's memory format.

    Raises:
        ValueError: one value per channel in training; eps not positive in training, or negative; no such activation.
        RuntimeError: a per-channel tensor that is not of size C; running statistics missing when not training; a
            residual that cannot be added; inplace in training or where autograd needs input.
        NotImplementedError: input is not of a floating type.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    tensors = (input, running_mean, running_var, weight, bias)
    plain = residual is None and activation is None and not inplace
    if has_torch_function_variadic(*tensors):
        after: dict[str, Any] = {"residual": residual, "activation": activation, "negative_slope": negative_slope}
        after["inplace"] = inplace
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps,
            **({} if plain else after),
        )  # fmt: skip
    if not plain:
        return _batch_norm_act(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
            negative_slope, inplace,
        )  # fmt: skip
    implementation = choose(input) if input.dim() in (2, 3) and momentum is not None else None
    if implementation is not None:
        output = fused_batch_norm(
            implementation, input, running_mean, running_var, weight, bias, None, training, momentum, eps
        )
        if output is not None:
            return output
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    inplace: bool,
) -> Tensor:
    from .activation import check_activation, check_call, finish, fused_batch_norm_act  # it imports this module

    check_activation(activation)
    implementation = choose(input) if input.dim() in (2, 3) and momentum is not None else None
    if implementation is not None:
        output = fused_batch_norm_act(
            implementation, input, residual, running_mean, running_var, weight, bias, None, training, momentum, eps,
            activation, negative_slope, inplace,
        )  # fmt: skip
        if output is not None:
            return output
    check_call(input, residual, training, inplace, weight, bias)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return finish(output, input, residual, activation, negative_slope, inplace)
