"""keep_statistics: running statistics that stay as they are where a checkpoint runs a forward again.

Our operators ask a flag of the thread (csrc/torch/calls.cpp). Torch's own get copies from a mode, not None, as what
autograd saves has to be what it was in forward. A renormalised batch goes by the running statistics themselves: forward
notes what they were, for the recomputation.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]  # running_mean, running_var, num_batches_tracked


class _Here(threading.local):
    """What is on in this thread, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []
        self.recomputations: list[_Recomputation] = []


_here = _Here()


class _Forward(AbstractContextManager["_Forward"]):
    """Where it is on, in its thread, it notes what renormalised batches go by."""

    def __init__(self) -> None:
        # By running_mean, which is kept, so that no other tensor gets its id.
        self.noted: dict[int, list[tuple[Tensor, Statistics]]] = defaultdict(list)

    def __enter__(self) -> _Forward:
        _here.forwards.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _here.forwards.remove(self)


class _Recomputation(TorchFunctionMode):
    """Where it is on, in its thread, no running statistics and no count of batches move."""

    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.forward = forward
        self.seen: dict[int, int] = {}

    def __enter__(self) -> _Recomputation:
        enter_recomputation()
        self.seen = defaultdict(int)
        _here.recomputations.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _here.recomputations.remove(self)
        leave_recomputation()

    def noted(self, mean: Tensor) -> Statistics | None:
        """Return what the call that is run again went by, if its forward is known."""
        of_mean, at = self.forward.noted.get(id(mean), []), self.seen[id(mean)]
        self.seen[id(mean)] += 1
        return of_mean[at][1] if at < len(of_mean) else None

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


def in_checkpoint() -> bool:
    """Return whether as_in_forward has anything to note or to find: in a graph nothing, which _in_a_graph sees to."""
    return not torch.compiler.is_compiling() and bool(_here.forwards or _here.recomputations)


@contextmanager
def as_in_forward(*statistics: Tensor | None) -> Iterator[Statistics]:
    """Yield the running statistics and the count that a renormalised batch goes by.

    In a recomputation these are copies of forward's, which may move: each virtual batch goes by what the one before
    leaves.
    """
    mean, here = statistics[0], _here
    if mean is None:  # which raises later
        yield statistics  # type: ignore[misc]
        return
    noted = here.recomputations[-1].noted(mean) if here.recomputations else None
    for forward in here.forwards:
        forward.noted[id(mean)].append((mean, tuple(map(_copy, noted or statistics))))
    if noted is None:
        yield statistics  # type: ignore[misc]
        return
    depth = len(here.recomputations)
    for _ in range(depth):
        leave_recomputation()
    try:
        yield tuple(map(_copy, noted))
    finally:
        for _ in range(depth):
            enter_recomputation()


def _in_a_graph(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    renormalises = operator is torch.ops.bn_ext.batch_norm_forward.default and (kwargs.get("renorm") or len(args) > 16)
    return CheckpointPolicy.MUST_SAVE if renormalises else CheckpointPolicy.PREFER_RECOMPUTE


def keep_statistics() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what has a checkpoint move running statistics once: the context_fn of torch.utils.checkpoint.checkpoint.

    A checkpoint runs its forward again in backward. Batch norms then normalise by the same batch, but they also move
    their running statistics, and count the batch, a second time. With this they leave both as forward has left them. It
    concerns FusedBatchNorm1d and what is fused with it, bn_ext.functional.batch_norm, torch's batch norms, its
    SyncBatchNorm, its instance norms and its functions, and subclasses that move their statistics by these; in the
    thread that recomputes, so what trains beside it is not touched. FusedBatchRenorm1d goes by the running statistics
    that forward went by.

    Two kinds of calls are beyond it, where the batch norm is torch's own: those of a program of torch.jit.script or
    torch.jit.trace, and of a module that is compiled inside of the checkpoint. A checkpoint inside of what is compiled
    is as it should be. So is a FusedBatchNorm1d in any of these but torch.jit.script, which makes it torch's.

    A reentrant checkpoint takes no context_fn. Its function runs without gradients first and with them again, so it may
    enter the second context itself where torch.is_grad_enabled().

    Returns:
        Two context managers. The first is for forward, and notes what renormalised batches go by, which no longer is
        there later. In the second, which may be entered repeatedly, statistics stay.

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
        return create_selective_checkpoint_contexts(_in_a_graph)  # type: ignore[no-any-return]
    forward = _Forward()
    return forward, _Recomputation(forward)


__all__ = ["as_in_forward", "in_checkpoint", "keep_statistics"]
