"""pytorch-tabnet's ghost batch norm, a module that calls its batch norm in a loop over chunks, in one call."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from ..dispatch import by_operator
from ..modules import state_of
from .pairing import is_norm, undisturbed

GHOST = (("forward", ()),)  # as a spec: in the place of its method's sites, none


def is_ghost(kind: type[nn.Module]) -> bool:
    """Return whether kind is pytorch-tabnet's GBN, with the forward that is known of it."""
    if (kind.__module__, kind.__name__) != ("pytorch_tabnet.tab_network", "GBN"):
        return False
    forward = vars(kind).get("forward")
    names = forward.__code__.co_names if isinstance(forward, types.FunctionType) else ()
    return {"chunk", "ceil", "shape", "virtual_batch_size", "cat"} <= set(names)


def in_one_call(module: nn.Module, input: Any) -> Any:
    """Return what GBN's loop computes, or None where the batch norm in it is not ours alone to call."""
    norm, size = module._modules.get("bn"), vars(module).get("virtual_batch_size")
    if type(size) is not int or size < 1 or not is_norm(norm) or not undisturbed(input):
        return None
    if norm.virtual_batch_size is not None or not input.shape[0]:  # type: ignore[union-attr]
        return None
    return by_operator(input, *state_of(norm), virtual_batch_size=size)  # type: ignore[arg-type]


__all__ = ["GHOST", "in_one_call", "is_ghost"]
