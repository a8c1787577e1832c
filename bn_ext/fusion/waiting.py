"""May a batch norm's call wait while other calls of the model run?

Where a residual is computed between the batch norm and the addition, as by the downsampling of a residual block, the
call is put off until then. That changes nothing if what runs in between can neither write what the batch norm reads
nor see what it writes: layers of torch's own that nobody listens to, that share no memory with it and that do not
write into what they are given.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..modules import FusedBatchNorm1d
from .pairing import Pending, begin, listens

# Layers whose output is new memory, whatever they are given.
_LAYERS = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, FusedBatchNorm1d,
)  # fmt: skip
# Modules whose forward touches its input, its own parameters and its own buffers, and calls nothing of the user's.
INERT: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *_LAYERS, nn.Identity, nn.Sequential, nn.Flatten, nn.Unflatten,
        nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ConstantPad1d, nn.ZeroPad1d, nn.ReflectionPad1d,
        nn.ReplicationPad1d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.GLU, nn.Softmax,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout,
    )
}  # fmt: skip


def why_not_inert(module: nn.Module, norm: nn.Module, input: Tensor | None = None) -> str:
    """Return why a call of module might write what norm reads of input, or see what it writes; "" if it cannot."""
    held = _storages([*norm._parameters.values(), *norm._buffers.values(), input])
    given = True  # whether a module may be handed what module is: no layer has made something new so far
    for part in module.modules():
        kind = type(part)
        if kind not in INERT or kind.forward is not INERT[kind]:
            return f"{kind.__name__} may do anything"
        if listens(part):
            return f"its {kind.__name__} has hooks"
        if part is norm or not held.isdisjoint(_storages(part._buffers.values())):
            return "it shares the batch norm's statistics"
        given = given and kind not in _LAYERS
        if given and getattr(part, "inplace", False):
            return f"its {kind.__name__} writes into what it is given"
    return ""


def _storages(tensors: Any) -> set[int]:
    """Return what tells apart the memory of tensors; in a graph the tensors themselves have to do."""
    present = [t for t in tensors if t is not None]
    return {id(t) for t in present} if is_compiling() else {t.untyped_storage()._cdata for t in present}


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


def _matters(value: Any, norm: nn.Module) -> bool:
    """Return whether asking value for its truth, or handing it to a layer, may tell what norm has written."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return False
    if type(value) in INERT:  # an nn.Sequential has a length
        return False
    if type(value) not in (Tensor, nn.Parameter):
        return True
    return not _storages(norm._buffers.values()).isdisjoint(_storages([value]))


def wait(norm: Any, input: Any, owner: Any, paths: tuple[str, ...], attributes: tuple[str, ...], *values: Any) -> Any:
    """Return norm(input), or what waits for the rest while the modules at paths below owner may be called.

    attributes of owner, and values, are what these are given and what conditions in between ask for their truth.
    """
    pending = begin(norm, input)
    if type(pending) is not Pending:
        return pending
    for path in paths:
        try:
            module = path_of(owner, path)
        except (KeyError, AttributeError):
            return pending.value()
        if module is not None and why_not_inert(module, pending.norm, pending.input):
            return pending.value()
    for name in attributes:
        kept = next((k for k in (vars(owner), owner._modules, owner._buffers, owner._parameters) if name in k), None)
        if kept is None and not hasattr(type(owner), name):
            return pending.value()
        if _matters(getattr(type(owner), name) if kept is None else kept[name], pending.norm):
            return pending.value()
    if any(_matters(value, pending.norm) for value in values):
        return pending.value()
    return pending
