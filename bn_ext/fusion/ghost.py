"""pytorch-tabnet's ghost batch norm, a module that calls its batch norm in a loop over chunks, in one call."""

from __future__ import annotations

import ast
import hashlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import piece_by_piece
from ..dispatch import by_operator
from ..modules import FusedBatchNorm1d, state_of, takes_single_value
from .pairing import is_norm, undisturbed
from .source import Method, Unreadable

# Of the forward's source, laid out by ast.unparse: chunks, the batch norm of each, what torch.cat makes of them.
_FORWARD = "0a3bf2d9a6bb68d712210c5fce8a064f82a3e1bb1cf40bae48a004b4bd9765d6"
GHOST = (("forward", ()),)  # as a spec: in the place of its method's sites, none


def is_ghost(kind: type[nn.Module]) -> bool:
    """Return whether kind is pytorch-tabnet's GBN, with the forward that is known of it."""
    if (kind.__module__, kind.__name__) != ("pytorch_tabnet.tab_network", "GBN"):
        return False
    forward = vars(kind).get("forward")
    if not isinstance(forward, types.FunctionType) or forward.__globals__.get("torch") is not torch:
        return False
    try:
        source = ast.unparse(Method(forward).tree)
    except Unreadable:
        return False
    return hashlib.sha256(source.encode()).hexdigest() == _FORWARD


def in_one_call(module: nn.Module, input: Any) -> Any:
    """Return what GBN's loop computes, or None where that is to run.

    Who watches the batch norm sees a call for every chunk; in training a last one of one row joins there too.
    """
    norm, size = module._modules.get("bn"), vars(module).get("virtual_batch_size")
    if type(size) is not int or size < 1 or not isinstance(input, Tensor) or not input.shape[:1].numel():
        return None
    if is_norm(norm) and undisturbed(input) and norm.virtual_batch_size is None:  # type: ignore[union-attr]
        allow = takes_single_value(norm)  # type: ignore[arg-type]
        output = by_operator(input, *state_of(norm), virtual_batch_size=size, allow_single_value=allow)  # type: ignore[arg-type]
        if output is not None:
            return output
    if type(norm) is FusedBatchNorm1d and norm.training:
        return piece_by_piece(norm, input, size)
    return None


__all__ = ["GHOST", "in_one_call", "is_ghost"]
