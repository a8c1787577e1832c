"""Padded batches: what counts of them, by torch's operations.

valid is what the operators take (csrc/torch/ops.cpp): lengths, integers (N,), or a mask, booleans (N, L) or (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import ops


def checked_valid(lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return the one of lengths and mask that is given; raise for what cannot be one.

    Raises:
        ValueError: both are given, or one that is sparse or nested.
        TypeError: lengths are no tensor of integers, or mask is no tensor of booleans.
    """
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask say the same: only one of them can be given")
    valid = mask if lengths is None else lengths
    if valid is None:
        return None
    name = "mask" if lengths is None else "lengths"
    if not isinstance(valid, Tensor):
        raise TypeError(f"{name} should be a tensor, but is {type(valid).__name__}")
    if (valid.dtype == torch.bool) != (lengths is None) or valid.is_floating_point() or valid.is_complex():
        kind = "booleans" if lengths is None else "integers"
        raise TypeError(f"{name} should be a tensor of {kind}, but is of {valid.dtype}")
    if valid.layout != torch.strided:
        raise ValueError(f"{name} should be dense, but is of layout {valid.layout}")
    return valid.to(torch.int64) if valid.dtype in _UNSIGNED else valid


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which torch hardly computes with


def check_padded(input: Tensor, valid: Tensor) -> None:
    """Raise what the kernels would: of ranks, sizes, and of lengths whose values the host has, their range."""
    if input.dim() not in (2, 3):
        raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")
    ops.check_valid(input, valid)
    if torch.compiler.is_compiling() or valid.dtype == torch.bool or valid.numel() == 0:
        return
    with torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(), _disable_current_modes():
        lengths = in_sight(valid)
        # As int64: in int8 a length of the input of 300 would be 44.
        wrong = None if lengths is None else lengths[(lengths < 0) | (lengths.long() > input.shape[2])]
        if wrong is not None and wrong.numel() > 0:
            raise ValueError(f"lengths should be from 0 to {input.shape[2]}, but there is {int(wrong[0])}")


def in_sight(valid: Tensor) -> Tensor | None:
    """Return what torch.func has put something around, or valid, if the host has its values, else None."""
    if torch.compiler.is_compiling() or _get_tracing_state():
        return None
    while is_functorch_wrapped_tensor(valid):
        valid = get_unwrapped(valid)
    stands_for_others = getattr(type(valid), "__torch_dispatch__", _PLAIN) is not _PLAIN
    return None if stands_for_others or valid.device.type != "cpu" else valid


_PLAIN = Tensor.__torch_dispatch__


def _positions(valid: Tensor, input: Tensor) -> Tensor:
    """Return booleans of size (N, 1, L), of an (N, C) input (N, 1): where input counts."""
    if valid.dtype == torch.bool:
        return valid.unsqueeze(1)
    return (torch.arange(input.shape[2], device=valid.device) < valid.unsqueeze(1)).unsqueeze(1)


def where_valid(t: Tensor, input: Tensor, valid: Tensor) -> Tensor:
    """Return t, of input's size or wider, with zeros where input does not count."""
    return torch.where(_positions(valid, input), t, 0)


def zero_beyond(t: Tensor, input: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return where_valid of t, or t where neither lengths nor mask are given; graphs of torch.fx name it."""
    valid = checked_valid(lengths, mask)
    return t if valid is None else where_valid(t, input, valid)


def masked(norm: Callable[..., Tensor], input: Tensor, valid: Tensor) -> Tensor:
    """Return norm, which takes every value by itself, of what counts, and zero elsewhere."""
    return where_valid(norm(where_valid(input, input, valid)), input, valid)


def gathered(norm: Callable[..., Tensor], input: Tensor, valid: Tensor, *others: Tensor) -> Tensor:
    """Return norm of what counts, an (M, C) batch, in the places that it came from, and zero elsewhere.

    What counts of others, of input's size too, is norm's further arguments.
    """
    flat = input.dim() == 2
    places = _positions(valid, input).flatten().nonzero().squeeze(1)
    rows = [t if flat else t.transpose(1, 2).reshape(-1, t.shape[1]) for t in (input, *others)]
    output = norm(*(t.index_select(0, places) for t in rows))
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float().to(output.dtype)  # a tangent too, which torch's own batch norm leaves in float32
    full = output.new_zeros(rows[0].shape).index_copy(0, places, output)
    if flat:
        return full
    full = full.reshape(input.shape[0], input.shape[2], -1).transpose(1, 2)
    return full.contiguous() if input.is_contiguous() else full


def trained(norm: Callable[..., Tensor], input: Tensor, valid: Tensor) -> Tensor:
    """Return gathered of a norm in training, which raises where input has one value a channel, whatever counts."""
    if input.dim() in (2, 3) and input.shape[0] == 1 and input.shape[2:].numel() == 1:
        size = [*input.shape]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({size})")
    return gathered(norm, input, valid)


__all__ = [
    "check_padded",
    "checked_valid",
    "gathered",
    "in_sight",
    "masked",
    "trained",
    "where_valid",
    "zero_beyond",
]
