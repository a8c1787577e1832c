"""freeze and unfreeze: batch norms that stay in evaluation whatever model.train() says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import Model
from .renorm_module import FusedBatchRenorm1d

_NORMS = (_BatchNorm, FusedBatchRenorm1d)


class _Stand:
    """What stands before a method, in a module's __dict__; it holds the module, so a deep copy's holds the copy."""

    name: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = vars(module).get(self.name)  # what stood there before: people freeze by a train of their own

    def hidden(self) -> Callable[[], Any]:
        return self.own or getattr(type(self.module), self.name).__get__(self.module)  # type: ignore[no-any-return]


class _Train(_Stand):
    name = "train"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.before: bool = module.training
        self.training: bool | None = None  # what was last asked for since, written by nn.Module.train

    def children(self) -> Iterator[nn.Module]:
        return self.module.children()

    def __call__(self, mode: bool = True) -> nn.Module:
        nn.Module.train(self, mode)  # type: ignore[type-var]  # of this: no thread ever sees the module in training
        self.module.training = False  # torch.compile's wrapper writes that of its module
        return self.module


class _ExtraRepr(_Stand):
    name = "extra_repr"

    def __call__(self) -> str:
        return ", ".join(filter(None, [self.hidden()(), "frozen=True"]))


class _ResetRunningStats(_Stand):
    name = "reset_running_stats"

    def __call__(self) -> None:
        pass  # torch.optim.swa_utils.update_bn resets what it cannot fill again here


class _ResetParameters(_Stand):
    name = "reset_parameters"

    def __call__(self) -> None:
        # Asked for by name, of memory that to_empty has made or of a lazy one's first input: there are no values yet.
        mine = vars(self.module)
        kept = mine.pop(_ResetRunningStats.name, None)
        try:
            self.hidden()()
        finally:
            if kept is not None:
                mine[_ResetRunningStats.name] = kept


_STANDS = (_Train, _ExtraRepr, _ResetRunningStats, _ResetParameters)


def freeze(model: Model) -> Model:
    """Keep every batch norm of model in evaluation, whatever model.train() says, in place, and return model.

    Each normalises by its running statistics, and these and num_batches_tracked stay as they are, also where
    reset_running_stats is called; load_state_dict writes them as ever, and reset_parameters begins anew. Weights and
    biases still learn where requires_grad is True, by the gradients of evaluation. It concerns FusedBatchNorm1d,
    FusedBatchRenorm1d, torch's BatchNorm1d, 2d and 3d, SyncBatchNorm, lazy ones and all subclasses. They keep their
    class, and stay frozen through convert, revert, copy.deepcopy and pickle. Their repr says frozen=True.

    Four things are beyond it. module.training = True by hand, and nn.Module.train(module), hold until the next train(),
    eval() or freeze. A train() of a subclass's own is not called, with what it asked for, before unfreeze. What makes
    another module or program of this one, as SyncBatchNorm.convert_sync_batchnorm and torch.jit.script do, only
    takes training=False along. A copy.copy of a batch norm is frozen, but its train() notes the mode for the original
    and returns that, until the copy is given to freeze or unfreeze.

    Args:
        model: any nn.Module. A lone batch norm is one too.

    Returns:
        model itself.

    Raises:
        ValueError: a batch norm has no running statistics, or is a program of torch.jit.script; its path is named, and
            nothing has changed.
        AttributeError: model is no nn.Module.

    Example:
        >>> from torch import nn
        >>> import bn_ext
        >>> model = bn_ext.freeze(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout()))
        >>> [module.training for module in model.train()]
        [True, False, True]
    """
    scripted = [name or "model itself" for name, module in model.named_modules() if _is_scripted(module)]
    if scripted:
        raise ValueError(f"cannot freeze a batch norm of TorchScript: {', '.join(scripted)}")
    norms = {module: name for name, module in model.named_modules() if isinstance(module, _NORMS)}
    without = [
        name or "model itself"
        for norm, name in norms.items()
        if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None
    ]
    if without:
        raise ValueError(f"cannot freeze a batch norm without running statistics: {', '.join(without)}")
    for norm in norms:
        stand = vars(norm).get("train")
        if not isinstance(stand, _Train) or stand.module is not norm:
            _release(norm)  # a copy.copy has what stands before the original
            vars(norm).update({kind.name: kind(norm) for kind in _STANDS})
        norm.training = False
    return model


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(module, "original_name", "")


def unfreeze(model: Model) -> Model:
    """Undo freeze in every batch norm of model, in place, and return model.

    Each gets the mode that train() or eval() last asked for while it was frozen, else the one that it had before.

    Args:
        model: any nn.Module. What is not frozen is left alone.

    Returns:
        model itself.

    Raises:
        AttributeError: model is no nn.Module.

    Example:
        >>> from torch import nn
        >>> import bn_ext
        >>> model = bn_ext.freeze(nn.Sequential(nn.BatchNorm1d(5))).eval()
        >>> model.train()[0].training, bn_ext.unfreeze(model)[0].training
        (False, True)
    """
    for module in list(model.modules()):
        _release(module)
    return model


def _release(module: nn.Module) -> None:
    for kind in _STANDS:
        stand = vars(module).get(kind.name)
        if isinstance(stand, kind):
            vars(module).pop(kind.name)
            vars(module).update({} if stand.own is None else {kind.name: stand.own})
            if isinstance(stand, _Train):
                plain = getattr(module.train, "__func__", None) is nn.Module.train  # it would set children too
                module.training = stand.before if stand.training is None or not plain else stand.training
                if stand.training is not None and not plain:
                    module.train(stand.training)  # a train of its own may decide otherwise


__all__ = ["freeze", "unfreeze"]
