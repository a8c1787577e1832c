"""act(batch_norm(x) + residual): in one pass where our kernels run, else torch's own operations in the same order.

activation is None (the identity), "relu", "leaky_relu" (with negative_slope), "silu" or "gelu" (the exact one, by erf).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .dispatch import (
    Implementation,
    are_numbers,
    fused_batch_norm,
    leave_to_torch,
    overrides_functions,
    restored_on_error,
)

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu")


def check_activation(activation: str | None) -> None:
    """Raise a ValueError for the name of an activation that there is no kernel for."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation should be None or one of {known}, but is {activation!r}")


def activate(x: Tensor, residual: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    """Return act(x + residual) by torch's own operations; TorchScript compiles it, and takes no optional name."""
    if residual is not None:
        x = x + residual
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation != "identity":
        raise ValueError("no such activation: " + activation)
    return x


def check_call(
    input: Tensor, residual: Tensor | None, training: bool, inplace: bool, *parameters: Tensor | None
) -> None:
    """Raise before anything has changed where residual does not go with input, or input cannot be written.

    Raises:
        RuntimeError: input and residual cannot be broadcast; inplace in training, or where autograd needs the input.
    """
    if residual is not None and residual.shape != input.shape:
        torch.broadcast_shapes(input.shape, residual.shape)
    if not inplace:
        return
    if training:
        raise RuntimeError("inplace=True is for evaluation: in training batch norm needs its input again in backward")
    if _needs_graph(input, residual, *parameters):
        raise RuntimeError(
            "batch norm with inplace=True writes into its input, which autograd would need: call it under "
            "torch.no_grad(), or with inplace=False"
        )


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def finish(output: Tensor, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float,
           inplace: bool) -> Tensor:  # fmt: skip
    """Return act(output + residual), output being the batch norm of input, written into input if so asked."""
    result = activate(output, residual, activation or "identity", negative_slope)
    return input.copy_(result) if inplace else result


def fits(input: Tensor, residual: Tensor) -> bool:
    """Return whether the kernels add residual to the batch norm of input as it is."""
    return (
        residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == torch.strided
        and not overrides_functions(residual)
    )


def fused_batch_norm_act(
    implementation: Implementation,
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    inplace: bool,
) -> Tensor | None:
    """Return act(batch_norm(input) + residual), or None where there is no kernel and nothing has changed.

    implementation is what dispatch.choose returned. residual: of input's shape and dtype for one pass, else whatever
    can be added to the batch norm of input. inplace: write into input, in evaluation without autograd only.
    """
    check_call(input, residual, training, inplace, weight, bias)
    if not are_numbers(momentum, eps) or not (training or (running_mean is not None and running_var is not None)):
        return None  # native words the error
    if implementation is not ops.batch_norm or not (residual is None or fits(input, residual)):
        arguments = (running_mean, running_var, weight, bias, num_batches_tracked, training, momentum, eps)
        changed = (running_mean, running_var, num_batches_tracked) if training else ()
        with restored_on_error(*changed):  # the addition may raise
            output = fused_batch_norm(implementation, input, *arguments)
            return None if output is None else finish(output, input, residual, activation, negative_slope, inplace)
    name = activation or "identity"
    try:
        if inplace:
            ops.batch_norm_inference_(
                input, weight, bias, running_mean, running_var, eps, residual, name, negative_slope
            )
            return input
        return ops.batch_norm(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, residual,
            name, negative_slope,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        leave_to_torch(error, input)
        return None


__all__ = ["ACTIVATIONS", "activate", "check_activation", "check_call", "finish", "fits", "fused_batch_norm_act"]
