"""keep_statistics: running statistics that stay as they are where a checkpoint runs a forward again.

Our operators ask a flag of the thread (csrc/torch/calls.cpp). Torch's own get copies from a mode, not None, as what
autograd saves has to be what it was in forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._C import enter_recomputation, leave_recomputation
from .dispatch import KNOWN, QUIET, unheard

# What moves running statistics, and where it takes the mean; the variance is behind it.
_MOVING: dict[Callable[..., Any], int] = {
    **dict.fromkeys((*KNOWN, F.instance_norm, torch.batch_norm_update_stats), 1),
    **dict.fromkeys((torch.batch_norm_gather_stats, torch.batch_norm_gather_stats_with_counts), 3),
    **dict.fromkeys((torch.batch_norm, torch.native_batch_norm, torch._native_batch_norm_legit), 3),
    **dict.fromkeys((torch.cudnn_batch_norm, torch.miopen_batch_norm, torch.instance_norm), 3),
}
_STATISTICS = ("running_mean", "running_var")
_COUNTING = (Tensor.add_, Tensor.__iadd__)
_dispatch_modes = torch._C._len_torch_dispatch_stack


def _copy(tensor: Any) -> Any:
    """Return a copy that no mode hears of: a selective checkpoint counts what runs."""
    if not isinstance(tensor, Tensor):
        return tensor
    with unheard(tensor), _disable_current_modes() if _dispatch_modes() else nullcontext():
        return tensor.detach().clone()


def _is_count(tensor: Any) -> bool:
    """Return whether the module whose method runs is a batch norm, and tensor what it counts its batches by."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module):
            return isinstance(owner, _NormBase) and getattr(owner, "num_batches_tracked", None) is tensor
        frame = frame.f_back
    return False


class _Recomputation(TorchFunctionMode):
    """Where it is on, in its thread, no running statistics and no count of batches move."""

    def __enter__(self) -> _Recomputation:
        enter_recomputation()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        leave_recomputation()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the same graph as in forward, or it might save something else
            return function(*args, **kwargs)
        at = _MOVING.get(function)
        if at is not None:
            args = (*args[:at], *map(_copy, args[at : at + 2]), *args[at + 2 :])
            kwargs = {name: _copy(value) if name in _STATISTICS else value for name, value in kwargs.items()}
        elif function in _COUNTING and _is_count(args[0]):
            function(_copy(args[0]), *args[1:], **kwargs)
            return args[0]
        return function(*args, **kwargs)


QUIET.add(_Recomputation)


def _recompute_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def keep_statistics() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what has a checkpoint move running statistics once: the context_fn of torch.utils.checkpoint.checkpoint.

    A checkpoint runs its forward again in backward. Batch norms then normalise by the same batch, but they also move
    their running statistics, and count the batch, a second time. With this they leave both as forward has left them. It
    concerns FusedBatchNorm1d and what is fused with it, bn_ext.functional.batch_norm, torch's batch norms, its
    SyncBatchNorm, its instance norms and its functions, and all subclasses of these; in the thread that recomputes, so
    what trains beside it is not touched.

    Two kinds of calls are beyond it, where the batch norm is torch's own: those of a program of torch.jit.script or
    torch.jit.trace, and of a module that is compiled inside of the checkpoint. A checkpoint inside of what is compiled
    is as it should be. So is a FusedBatchNorm1d in any of these but torch.jit.script, which makes it torch's.

    A reentrant checkpoint takes no context_fn. Its function runs without gradients first and with them again, so it may
    enter the second context itself where torch.is_grad_enabled().

    Returns:
        Two context managers. The first is for forward, and does nothing. In the second, which may be entered
        repeatedly, statistics stay.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> import bn_ext
        >>> norm, x = bn_ext.FusedBatchNorm1d(5), torch.randn(8, 5, requires_grad=True)
        >>> y = checkpoint(norm, x, use_reentrant=False, context_fn=bn_ext.keep_statistics)
        >>> y.sum().backward()
        >>> norm.num_batches_tracked
        tensor(1)
    """
    if get_proxy_mode() is not None:  # in a graph nothing is counted twice: as torch does without a context_fn
        return create_selective_checkpoint_contexts(_recompute_all)  # type: ignore[no-any-return]
    return nullcontext(), _Recomputation()


__all__ = ["keep_statistics"]
