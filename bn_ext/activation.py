"""What follows batch norm: act(x + residual) by torch's own operations, and the errors of its arguments.

activation is None (the identity), "relu", "leaky_relu" (with negative_slope), "silu" or "gelu" (the exact one, by erf).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import where_valid

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


def finish(
    output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    inplace: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Return act(output + residual), output being the batch norm of input, written into input if so asked.

    With valid, what counts of a padded batch, it is zero elsewhere, whatever lies there in residual.
    """
    if valid is not None and residual is not None:  # before the activation: its derivative there may be no number
        output, residual = where_valid(output + residual, input, valid), None
    result = activate(output, residual, activation or "identity", negative_slope)
    result = result if valid is None else where_valid(result, input, valid)
    return input.copy_(result) if inplace else result


__all__ = ["ACTIVATIONS", "activate", "check_activation", "check_call", "finish"]
