"""Batches of sequences that come without padding: packed sequences, and nested tensors that are jagged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .padding import gathered


def is_ragged(input: Any) -> bool:
    """Return whether input is a batch of sequences without padding: packed, or jagged along its last dimension."""
    if isinstance(input, PackedSequence):
        return True
    jagged = isinstance(input, Tensor) and input.layout == torch.jagged
    return jagged and input.dim() == 3 and getattr(input, "_ragged_idx", 1) == 2


def of_values(
    norm: Callable[..., Tensor],
    input: Any,
    lengths: Tensor | None,
    mask: Tensor | None,
    residual: Any = None,
    cut: bool = False,
) -> Any:
    """Return norm of a ragged batch, through its (M, C) values, as a batch of the same kind.

    norm takes by name a residual, if one is given, and a mask, if some of the values belong to no sequence; with cut,
    where norm cuts its batch along M, it gets those alone that do.

    Raises:
        ValueError: lengths or mask are given; a residual that is not ragged in the same way.
    """
    if lengths is not None or mask is not None:
        raise ValueError(f"a {type(input).__name__} has lengths of its own")
    more = {}
    if isinstance(input, PackedSequence):
        if residual is not None:
            more["residual"] = _like(input, residual).data
        data = norm(input.data, **more)
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    values = input.values().transpose(0, 1)
    if residual is not None:
        more["residual"] = _like(input, residual).values().transpose(0, 1)
    if input.lengths() is not None:
        more["mask"] = _counts(values.shape[0], input.offsets(), input.lengths())
    if cut and "mask" in more:
        mask, others = more.pop("mask"), tuple(more.values())
        values = gathered(lambda x, *rows: norm(x, **dict(zip(more, rows, strict=True))), values, mask, *others)
    else:
        values = norm(values, **more)
    return torch.nested.nested_tensor_from_jagged(
        values.transpose(0, 1), input.offsets(), input.lengths(), jagged_dim=2,
        min_seqlen=input._maybe_min_seqlen, max_seqlen=input._maybe_max_seqlen,
    )  # fmt: skip


def _like(input: Any, residual: Any) -> Any:
    """Return residual if its values lie as those of input do."""
    if isinstance(input, PackedSequence):
        fits = isinstance(residual, PackedSequence) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(input[1:3], residual[1:3], strict=True)
        )
    else:
        fits = is_ragged(residual) and not isinstance(residual, PackedSequence) and residual.shape == input.shape
    if not fits:
        kind = type(input).__name__
        raise ValueError(f"the residual of a {kind} should be one with the same lengths, but is not")
    return residual


def _counts(size: int, offsets: Tensor, lengths: Tensor) -> Tensor:
    """Return booleans (size,): which of the values lie in a sequence, and not between two."""
    begins = offsets[: lengths.shape[0]]
    steps = torch.zeros(size + 1, dtype=torch.int64, device=offsets.device)
    one = torch.ones_like(begins, dtype=torch.int64)
    return steps.index_add(0, begins, one).index_add(0, begins + lengths, -one).cumsum(0)[:size] > 0


__all__ = ["is_ragged", "of_values"]
