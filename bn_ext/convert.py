"""convert and revert: swap the batch norms of a model without touching anything that they hold."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from torch import nn

from .fusion.ghost import GHOST, is_ghost
from .fusion.parents import fused_class, original_of, why_not
from .fusion.report import Analysis, Fusion
from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d, mark_as_leaf

logger = logging.getLogger("bn_ext")
Model = TypeVar("Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.LazyBatchNorm1d: LazyFusedBatchNorm1d,
}
_NATIVE = {fused: native for native, fused in _FUSED.items()}


class _Undo:
    """Changes classes of modules, and takes it all back."""

    def __init__(self) -> None:
        self.was: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []

    def change(self, module: nn.Module, kind: type[nn.Module]) -> None:
        if type(module) is kind:
            return
        self.was.append((module, type(module), {k: v for k, v in vars(module).items() if k == "__module__"}))
        _set_class(module, kind)
        vars(module).pop("__module__", None)
        if isinstance(module, FusedBatchNorm1d):
            mark_as_leaf(module)

    def all(self) -> None:
        for module, kind, kept in reversed(self.was):
            _set_class(module, kind)
            vars(module).pop("__module__", None)
            vars(module).update(kept)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # a model may have a __setattr__ of its own


def convert(model: Model, fuse: bool = False) -> Model:
    """Make every BatchNorm1d and LazyBatchNorm1d of model a fused one, in place, and return model.

    The modules stay the objects that they are, so parameters, buffers, hooks, training flag, dtype, device, optimizer
    references and sharing are kept. Subclasses of BatchNorm1d (those that fully_shard and parametrizations make among
    them), SyncBatchNorm and the 2-D and 3-D variants are left alone, and reported. It succeeds, or raises and leaves
    the model as it was.

    pytorch-tabnet's GBN, which calls its batch norm for one chunk of the batch after the other, has the loop computed
    in one call: it gets a subclass of its class, of the same name. A last chunk of one row joins the one before it,
    where the loop raises.

    With fuse, what calls a batch norm also has it computed in one pass with the activation (ReLU, LeakyReLU, SiLU,
    exact GELU; module, function or method) that alone reads its output, and with an addition before that:

    - in an nn.Sequential, which looks at its children at every call;
    - in the methods of the model's own classes, where their source shows act(norm(x)) or act(norm(x) + r), in one
      expression or over statements of one block between which nothing can tell the difference. The module gets a
      subclass of its class, of the same name, whose method differs in these calls alone.

    Batch norms and activations stay what they are: one that is replaced, hooked, parametrized, synchronised or folded
    later is called as ever. What is computed where, why not more, and what was left alone is in
    bn_ext.fusion_report(model), and logged to "bn_ext" at level INFO; without fuse, what was left alone.

    Args:
        model: any nn.Module. A lone nn.BatchNorm1d is one too.
        fuse: also compute what follows a batch norm in the same pass.

    Returns:
        model itself.

    Raises:
        AttributeError: model is no nn.Module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import bn_ext
        >>> model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        >>> weight = model[1].weight
        >>> bn_ext.convert(model, fuse=True) is model
        True
        >>> type(model[1]).__name__, model[1].weight is weight
        ('FusedBatchNorm1d', True)
    """
    undo = _Undo()
    try:
        for module in list(model.modules()):
            if type(module) in _FUSED:  # exact: a subclass has a forward of its own
                undo.change(module, _FUSED[type(module)])
        if fuse:
            _fuse(model, undo)
        for module in list(model.modules()):
            kind = original_of(module)
            if is_ghost(kind) and not why_not(kind, GHOST):
                undo.change(module, fused_class(kind, GHOST))
    except BaseException:
        undo.all()
        raise
    if logger.isEnabledFor(logging.INFO):
        for entry in fusion_report(model):
            if fuse or not entry.converted:
                what = "not fused" if entry.converted else "left alone"
                because = f", {what}: {entry.reason}" if entry.reason else ""
                logger.info("%s (%s): %s%s", entry.name, entry.where, entry.computes, because)
    return model


def _fuse(model: nn.Module, undo: _Undo) -> None:
    analysis = Analysis(model)
    for module in list(model.modules()):
        kind = original_of(module)
        if module in analysis.specs:
            undo.change(module, fused_class(kind, analysis.specs[module]))
        elif kind is not type(module):
            undo.change(module, kind)  # it called a batch norm when it was converted, and does no more


def revert(model: Model) -> Model:
    """Undo convert: make every FusedBatchNorm1d and LazyFusedBatchNorm1d of model torch's own, in place.

    What calls them gets its own class back; where a tool has made a subclass of it since, its forward stays, and calls
    the batch norms as they are. A BatchNormAct1d stays one, with a batch norm of torch's in it. What gives a batch norm
    lengths, a mask or a packed sequence has to be changed: torch's takes none of them. Nor has it virtual batches, or
    takes a single value.

    Args:
        model: any nn.Module, converted or built with the fused classes.

    Returns:
        model itself.

    Raises:
        AttributeError: model is no nn.Module.

    Example:
        >>> from torch import nn
        >>> import bn_ext
        >>> model = bn_ext.convert(nn.Sequential(nn.BatchNorm1d(5), nn.ReLU()), fuse=True)
        >>> type(bn_ext.revert(model)[0]) is nn.BatchNorm1d, type(model) is nn.Sequential
        (True, True)
    """
    for module in list(model.modules()):
        if type(module) in _NATIVE:
            _set_class(module, _NATIVE[type(module)])
            vars(module).pop("__module__", None)
        elif original_of(module) is not type(module):
            _set_class(module, original_of(module))
    return model


def fusion_report(model: nn.Module) -> list[Fusion]:
    """Return every place where model calls a FusedBatchNorm1d: what is computed there now, and why that is no more.

    Batch norms that convert leaves alone are there too, with the reason. The model is only looked at.

    Args:
        model: any nn.Module, converted or not.

    Returns:
        A list of bn_ext.fusion.report.Fusion, in the order of model.named_modules().

    Raises:
        AttributeError: model is no nn.Module.

    Example:
        >>> from torch import nn
        >>> import bn_ext
        >>> model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Tanh())
        >>> for entry in bn_ext.fusion_report(bn_ext.convert(model, fuse=True)):
        ...     print(entry.name, entry.computes, entry.reason or "-", sep="; ")
        0; relu(batch norm); -
        2; batch norm; Tanh follows, which there is no kernel for
    """
    return Analysis(model).report()


__all__ = ["convert", "fusion_report", "revert"]
