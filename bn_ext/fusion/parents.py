"""Subclasses of the model's own classes whose forward fuses, and modules put into them and taken out again.

Only the class of a module that calls a batch norm changes; its name, what it holds, and every batch norm and activation
stay what they are.
"""

from __future__ import annotations

import abc
import copyreg
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from . import waiting
from .pairing import called_as_ever, listens, run_sequential
from .rewrite import Sites, methods_of, rewritten
from .source import Unreadable

# Per method, the sites; for a Sequential whose forward is torch's, none.
Spec = tuple[tuple[str, Sites], ...]


class FusedParent(nn.Module):
    """Marks the subclasses that are made here, and keeps them out of sight of who looks at classes."""

    fused_from: type[nn.Module]
    fused_spec: Spec

    def __init_subclass__(cls, _made_here: bool = False, **options: Any) -> None:
        if not _made_here:  # a registry of the user's is for the user's classes
            super().__init_subclass__(**options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        found = super().__reduce_ex__(protocol)
        kind: Any = type(self)
        if not isinstance(found, tuple) or "fused_from" not in vars(kind):  # a tool's subclass of ours
            return found
        if found[0] is copyreg.__newobj__ and found[1][0] is kind:  # type: ignore[attr-defined]
            return (new, (kind.fused_from, kind.fused_spec, *found[1][1:]), *found[2:])
        return found


def new(original: type[nn.Module], spec: Spec, *args: Any) -> nn.Module:
    """Make an empty module for copy and pickle, of a fused class where the original's source is still known."""
    try:
        kind = fused_class(original, spec)
    except Exception:  # the source is gone, or another one: the original is right all the same
        kind = original
    return kind.__new__(kind, *args)


def why_not(kind: type[nn.Module], spec: Spec) -> str:
    """Return why no subclass of kind can stand in its place, or ""."""
    if type(kind) not in (type, abc.ABCMeta):
        return f"{kind.__name__} has a metaclass of its own"
    if kind is not nn.Sequential and is_of_torch(kind):
        return f"{kind.__name__} is a class of torch's"
    if issubclass(kind, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return f"{kind.__name__}'s forward is generated"
    try:
        made = fused_class(kind, spec)
    except Unreadable as error:
        return f"{kind.__name__} is left alone: {error}"
    except Exception as error:
        return f"{kind.__name__} cannot have a subclass: {type(error).__name__}: {error}"
    layout = ("__basicsize__", "__itemsize__", "__dictoffset__", "__weakrefoffset__")
    if any(getattr(made, name) != getattr(kind, name) for name in layout):
        return f"{kind.__name__} has a memory layout of its own"
    return ""


def is_of_torch(kind: type) -> bool:
    """Return whether kind is one of torch's classes, or one that torch made of another class (FSDP, parametrize)."""
    return (kind.__module__ or "").partition(".")[0] == "torch"


def is_sequential(kind: type[nn.Module]) -> bool:
    """Return whether kind's forward is that of nn.Sequential, over its children."""
    return (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
    )


_SEQUENTIAL_FORWARD = nn.Sequential.forward


def _sequential_forward(self: nn.Sequential, input: Tensor) -> Tensor:
    if _stale():
        return nn.Sequential.forward(self, input)  # type: ignore[no-any-return, no-untyped-call]
    output, norm = run_sequential(self._modules.values(), input, None, _is_nested)
    return output if norm is None else norm(output)  # type: ignore[no-any-return]


# torch.jit.script reads the source of what it wraps, so it compiles torch's own.
functools.update_wrapper(_sequential_forward, nn.Sequential.forward)


@torch.compiler.assume_constant_result
def _stale() -> bool:
    """Return whether somebody has replaced the forward of nn.Sequential."""
    return nn.Sequential.forward is not _SEQUENTIAL_FORWARD


def _is_nested(module: nn.Module) -> bool:
    """Return whether a call of module calls its children one after the other and nothing else."""
    kind: Any = type(module)
    of_ours = vars(kind).get("forward") is _sequential_forward
    return (of_ours or kind is nn.Sequential) and called_as_ever(kind) and not listens(module) and not _stale()


_CLASSES: dict[tuple[type[nn.Module], Spec], type[nn.Module]] = {}


def fused_class(original: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """Return the subclass of original whose methods fuse, one for a spec.

    Raises:
        Unreadable: there is no source, or it is another one than the spec was made for.
        Exception: what making a subclass raises, such as a hook of the original's.
    """
    if (original, spec) in _CLASSES:
        return _CLASSES[original, spec]
    members: dict[str, Any] = {}
    if spec:
        functions = methods_of(original)
        for name, sites in spec:
            made = rewritten(original, functions[name], sites) if name in functions else None
            if made is None:
                raise Unreadable(f"the source of {original.__name__}.{name} is another one")
            members[name] = made
    else:
        members["forward"] = _sequential_forward
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    members |= {"fused_from": original, "fused_spec": spec}
    kind: Any = types.new_class(
        original.__name__, (FusedParent, original), {"_made_here": True}, lambda scope: scope.update(members)
    )
    if original is nn.Sequential:
        waiting.INERT[kind] = _sequential_forward
    _CLASSES[original, spec] = kind
    return kind  # type: ignore[no-any-return]


def original_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that module had before it was given one of ours."""
    found: type[nn.Module] = vars(type(module)).get("fused_from", type(module))
    return found


def is_fused(module: nn.Module) -> bool:
    """Return whether module's forward is one of ours, also where a tool has made a subclass since."""
    return isinstance(module, FusedParent)


__all__ = ["FusedParent", "Spec", "fused_class", "is_fused", "is_of_torch", "is_sequential", "original_of", "why_not"]
