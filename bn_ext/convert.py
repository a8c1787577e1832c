"""convert and revert: swap the batch norms of a model without touching anything that they hold."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .fuse import fuse as fuse_followers
from .fuse import unfuse
from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d, mark_as_leaf

Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.LazyBatchNorm1d: LazyFusedBatchNorm1d,
}
_NATIVE = {fused: native for native, fused in _FUSED.items()}


def _swap(model: Model, classes: dict[type[nn.Module], type[nn.Module]]) -> Model:
    for module in model.modules():
        if type(module) in classes and getattr(module, "activation", None) is None:  # exact: subclasses have a forward
            module.__class__ = classes[type(module)]
            vars(module).pop("__module__", None)
            if isinstance(module, FusedBatchNorm1d):
                mark_as_leaf(module)
    return model


def convert(model: Model, fuse: bool = False) -> Model:
    """Make every BatchNorm1d and LazyBatchNorm1d of model a fused one, in place, and return model.

    The modules stay the objects that they are, so parameters, buffers, hooks, training flag, dtype, device, optimizer
    references and sharing are kept. Subclasses of BatchNorm1d, SyncBatchNorm and the 2-D and 3-D variants are left
    alone.

    With fuse, a batch norm also computes the activation (ReLU, LeakyReLU, SiLU, exact GELU; module, function or method)
    that alone reads its output, and the addition before it, where the model shows them: in the order of an
    nn.Sequential, whose activation becomes an nn.Identity, or in the forward of any other module that torch.fx can
    trace, which gets a subclass of its class with that forward. What was done and what was not, and why, is in
    bn_ext.fusion_report(model), and logged to "bn_ext" at level INFO. A fused forward is that of today: later changes
    of attributes that the original's Python code tests have no effect, as with torch.fx.
    """
    model = _swap(model, _FUSED)
    if fuse:
        fuse_followers(model)
    return model


def revert(model: Model) -> Model:
    """Undo convert: make every FusedBatchNorm1d and LazyFusedBatchNorm1d of model torch's own, in place.

    One that was made with an activation, not by convert, stays, as torch's own would leave the activation out.
    """
    unfuse(model)
    return _swap(model, _NATIVE)


__all__ = ["convert", "revert"]
