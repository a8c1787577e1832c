"""May a batch norm's call wait while other calls of the model run?

Where a residual is computed between the batch norm and the addition, as by the downsampling of a residual block, the
call is put off until then. That changes nothing if what runs in between can neither write what the batch norm reads
nor see what it writes: modules of torch's own that share nothing with it, and an input that nobody else can reach.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import FusedBatchNorm1d
from .pairing import Pending, called_as_ever, is_norm, listens, undisturbed

# Modules whose forward touches its input, its own parameters and its own buffers, and calls nothing of the user's.
INERT: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        nn.Identity, nn.Sequential, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ConstantPad1d, nn.ZeroPad1d, nn.ReflectionPad1d,
        nn.ReplicationPad1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm,
        nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
        nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.GLU, nn.Softmax,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout,
        FusedBatchNorm1d,
    )
}  # fmt: skip


def why_not_inert(module: nn.Module, norm: nn.Module) -> str:
    """Return why a call of module might write what norm reads or see what it writes, or "" if it cannot."""
    held = {id(t) for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None}
    for part in module.modules():
        kind = type(part)
        if kind not in INERT or kind.forward is not INERT[kind] or not called_as_ever(kind):
            return f"{kind.__name__} may do anything"
        if listens(part):
            return f"its {kind.__name__} has hooks"
        if part is norm or any(id(t) in held for t in part._buffers.values()):
            return "it shares the batch norm's statistics"
    return ""


def path_of(owner: nn.Module, path: str) -> Any:
    """Return the module at a dotted path below owner, None where there is None; raises KeyError for anything else."""
    found: Any = owner
    for name in path.split("."):
        found = found._modules[name] if name in found._modules else vars(found)[name]
        if found is None:
            break
        if not isinstance(found, nn.Module):
            raise KeyError(path)
    return found


def _references(norm: Any, input: Any, owner: Any, paths: tuple[str, ...], named: bool) -> tuple[int, ...]:
    """What `wait` sees of an input that only its caller's expression refers to: to be called as `wait` is."""
    return sys.getrefcount(input), input._use_count(), torch._C._storage_Use_Count(input.untyped_storage()._cdata)


def _alone() -> dict[bool, tuple[int, ...]]:
    """The counts of a tensor that nobody else holds: as a temporary, and as the local variable that is assigned to."""
    value: Any = torch.empty(1)
    value = _references(None, value, None, (), True)
    return {True: value, False: _references(None, torch.empty(1), None, (), False)}


_ALONE = _alone()
_TENSOR: Any = Tensor


def wait(norm: Any, input: Any, owner: Any, paths: tuple[str, ...], named: bool) -> Any:
    """Return norm(input), or what waits for the rest while the modules at paths below owner may be called.

    named: input is a local variable of the caller's that nothing reads in between, not a temporary.
    """
    if not is_norm(norm) or type(input) is not _TENSOR or torch.compiler.is_compiling() or not undisturbed(input):
        return norm(input)
    storage = torch._C._storage_Use_Count(input.untyped_storage()._cdata)
    counts = (sys.getrefcount(input), input._use_count(), storage)
    if any(here > alone for here, alone in zip(counts, _ALONE[named], strict=True)):
        return norm(input)
    for path in paths:
        try:
            module = path_of(owner, path)
        except (KeyError, AttributeError):
            return norm(input)
        if module is not None and why_not_inert(module, norm):
            return norm(input)
    return Pending(norm, input)
