"""How a batch is cut into virtual ones, and whether there is more than one value of it, by torch's operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from .padding import in_sight


def has_single_value(input: Tensor, valid: Tensor | None = None) -> bool:
    """Return whether input, or what counts of it, has one value a channel, as far as the host can see."""
    if input.dim() not in (2, 3):
        return False
    if valid is None:
        return input.shape[0] == 1 and math.prod(input.shape[2:]) == 1
    values = None if _is_batched(valid) else in_sight(valid)
    return values is not None and int(values.sum()) == 1


def _is_batched(valid: Tensor) -> bool:
    """Return whether torch.vmap has put valid around what counts of many batches."""
    while is_functorch_wrapped_tensor(valid):
        if is_batchedtensor(valid):
            return True
        valid = get_unwrapped(valid)
    return False


def checked_virtual_batch_size(size: Any) -> int | None:
    """Return size as an int, or None for no cut; raise for what is no number of samples: a TypeError, or a ValueError
    for one below 1.
    """
    if size is None:
        return None
    if isinstance(size, bool) or not hasattr(type(size), "__index__"):
        raise TypeError(f"virtual_batch_size should be an int or None, but is {type(size).__name__}")
    samples = operator.index(size)
    if samples < 1:
        raise ValueError(f"virtual_batch_size should be at least 1, but is {size}")
    return samples


def piece_by_piece(norm: Callable[..., Tensor], input: Tensor, size: int | None, valid: Tensor | None = None) -> Tensor:
    """Return norm of the virtual batches of input, called in turn, as csrc/core/virtual_batch.h cuts them.

    With valid, what counts of a padded batch, its pieces are norm's second argument.
    """
    if size is None or input.dim() < 2:
        return norm(input) if valid is None else norm(input, valid)
    pieces = input.chunk(max(1, -(-input.shape[0] // size)))
    if len(pieces) > 1 and pieces[-1].shape[0] * math.prod(input.shape[2:]) == 1:  # one value a channel
        pieces = (*pieces[:-2], torch.cat(pieces[-2:]))
    if valid is None:
        return torch.cat([norm(piece) for piece in pieces])
    if len(pieces) > 1 and pieces[0].shape[0] * math.prod(input.shape[2:]) == 1:  # whatever counts of them
        size_of = [*pieces[0].shape]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({size_of})")
    of_valid = valid.split([piece.shape[0] for piece in pieces])
    return torch.cat([norm(piece, its) for piece, its in zip(pieces, of_valid, strict=True)])


__all__ = ["checked_virtual_batch_size", "has_single_value", "piece_by_piece"]
