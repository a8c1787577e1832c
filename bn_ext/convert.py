"""convert and revert: swap the batch norms of a model without touching anything that they hold."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d, mark_as_leaf

Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.LazyBatchNorm1d: LazyFusedBatchNorm1d,
}
_NATIVE = {fused: native for native, fused in _FUSED.items()}


def _swap(model: Model, classes: dict[type[nn.Module], type[nn.Module]]) -> Model:
    for module in model.modules():
        if type(module) in classes:  # exact: a user's subclass has a forward of its own
            module.__class__ = classes[type(module)]
            vars(module).pop("__module__", None)
            if isinstance(module, FusedBatchNorm1d):
                mark_as_leaf(module)
    return model


def convert(model: Model) -> Model:
    """Make every BatchNorm1d and LazyBatchNorm1d of model a fused one, in place, and return model.

    The modules stay the objects that they are, so parameters, buffers, hooks, training flag, dtype, device, optimizer
    references and sharing are kept. Subclasses of BatchNorm1d, SyncBatchNorm and the 2-D and 3-D variants are left
    alone.
    """
    return _swap(model, _FUSED)


def revert(model: Model) -> Model:
    """Undo convert: make every FusedBatchNorm1d and LazyFusedBatchNorm1d of model torch's own, in place."""
    return _swap(model, _NATIVE)


__all__ = ["convert", "revert"]
