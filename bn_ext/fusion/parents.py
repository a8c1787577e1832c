"""Subclasses of the model's own classes whose methods fuse, and modules put into them and taken out again.

Only the class of a module that calls a batch norm changes; its name, what it holds, and every batch norm and activation
stay what they are. A method that its class has replaced since, or whose code or defaults have changed, is called as
the class has it today.
"""

from __future__ import annotations

import abc
import copyreg
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import waiting
from .ghost import GHOST, in_one_call, is_ghost
from .pairing import is_sequential, run_sequential
from .rewrite import FROM, SPEC, Sites, methods_of, original_of_class, rewritten
from .source import Unreadable
from .watch import asks_for_its_class

# Per method, the sites; for a Sequential whose forward is torch's, none.
Spec = tuple[tuple[str, Sites], ...]


class FusedType(abc.ABCMeta):
    """The classes that are made here can be pickled, though they are not to be found where their name says."""


class FusedParent(nn.Module, metaclass=FusedType):
    """Marks the subclasses that are made here, and keeps them out of sight of who looks at classes."""

    def __init_subclass__(cls, _made_here: bool = False, **options: Any) -> None:
        if not _made_here:  # a registry of the user's is for the user's classes
            super().__init_subclass__(**options)


def _reduce(kind: type) -> Any:
    if FROM in vars(kind):
        return loaded_class, (vars(kind)[FROM], vars(kind)[SPEC])
    return kind.__qualname__  # a tool's or a user's subclass of ours: to be found by its name, or not at all


copyreg.pickle(FusedType, _reduce)


def loaded_class(original: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """Return the class that a pickle has: the original where its source is another one by now."""
    try:
        return fused_class(original, spec)
    except Exception:
        return original


# ---- may a class have such a subclass? ----


def why_not(kind: type[nn.Module], spec: Spec) -> str:
    """Return why no subclass of kind can stand in its place, or ""."""
    if type(kind) not in (type, abc.ABCMeta):
        return f"{kind.__name__} has a metaclass of its own"
    if kind is not nn.Sequential and is_of_torch(kind):
        return f"{kind.__name__} is a class of torch's"
    asks = asks_for_its_class(kind)
    if asks:
        return f"{kind.__name__}.{asks} asks for its own class"
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


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    output, norm = run_sequential(self._modules.values(), input, None)
    return output if norm is None else norm(output)


def _ghost_forward(original: type[nn.Module]) -> Callable[..., Any]:
    loop: Any = original.forward

    def forward(self: nn.Module, x: Any) -> Any:
        output = in_one_call(self, x)
        return loop(self, x) if output is None else output

    return forward


# ---- the classes ----

# By the original's identity, so that neither is kept alive.
_CLASSES: weakref.WeakValueDictionary[tuple[int, Spec], Any] = weakref.WeakValueDictionary()


def fused_class(original: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """Return the subclass of original whose methods fuse, one for a spec.

    Raises:
        Unreadable: there is no source, or it is another one than the spec was made for.
        Exception: what making a subclass raises.
    """
    key = (id(original), spec)
    known = _CLASSES.get(key)
    if known is not None and vars(known)[FROM] is original and is_current(known):
        return known  # type: ignore[no-any-return]
    kind: Any = None

    def today(self: nn.Module, name: str) -> Any:
        return getattr(super(kind, self), name)

    members: dict[str, Any] = {}
    functions = methods_of(original)
    if spec == GHOST and not is_ghost(original):
        raise Unreadable(f"{original.__name__} is another one")
    for name, sites in spec:
        made = None
        if name in functions:
            made = _ghost_forward(original) if spec == GHOST else rewritten(original, functions[name], sites)
        if made is None:
            raise Unreadable(f"the source of {original.__name__}.{name} is another one")
        members[name] = _guarded(original, name, functions[name], made, today)
    if not spec:
        # Not a method of original's own: torch's, also where original is a subclass.
        forward: Any = nn.Sequential.forward
        members["forward"] = _guarded(original, "forward", forward, _sequential_forward, today)
        members["forward"].__bn_ext_stale__ = lambda: not is_sequential(original)
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    members |= {"__annotations__": dict(getattr(original, "__annotations__", {})), FROM: original, SPEC: spec}
    bases = (FusedParent, original)
    kind = types.new_class(original.__name__, bases, {"_made_here": True}, lambda scope: scope.update(members))
    if original is nn.Sequential:
        waiting.INERT[kind] = kind.forward
    _CLASSES[key] = kind
    return kind  # type: ignore[no-any-return]


def _guarded(
    original: type[nn.Module], name: str, function: types.FunctionType, made: Any, today: Callable[..., Any]
) -> types.FunctionType:
    """Return a method that calls made, or what original has under that name by now, if that is another one."""
    code, defaults, kwdefaults = function.__code__, function.__defaults__, function.__kwdefaults__

    @torch.compiler.assume_constant_result
    def stale() -> bool:
        return (
            getattr(original, name, None) is not function
            or function.__code__ is not code
            or function.__defaults__ is not defaults
            or function.__kwdefaults__ is not kwdefaults
        )

    # torch.jit.script resolves the names of the source, which it reads from what is wrapped, by this function's globals
    # and by the variables that it closes over.
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    mine = {"_stale": stale, "_today": today, "_name": name, "_made": made}
    closed = [*mine, *(free for free in cells if free not in mine)]
    text = f"""def factory({", ".join(closed)}):
    def method(self, /, *args, **kwargs):
        if 0: {", ".join(closed)}
        if _stale(): return _today(self, _name)(*args, **kwargs)
        return _made(self, *args, **kwargs)
"""
    module = compile(text, "<bn_ext>", "exec")
    factory = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    method = next(c for c in factory.co_consts if isinstance(c, types.CodeType))
    closure = tuple(types.CellType(mine[free]) if free in mine else cells[free] for free in method.co_freevars)
    guarded = types.FunctionType(method, function.__globals__, function.__name__, None, closure)
    functools.update_wrapper(guarded, function)
    guarded.__dict__["__bn_ext_current__"] = lambda: not stale()
    return guarded


def is_current(kind: Any) -> bool:
    """Return whether the methods of a class that was made here are made of what the original has today."""
    names = ("forward",) if not vars(kind)[SPEC] else tuple(name for name, _ in vars(kind)[SPEC])
    return all(vars(kind)[name].__bn_ext_current__() for name in names)


def original_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that module had before it was given one of ours."""
    return original_of_class(type(module))


def is_fused(module: nn.Module) -> bool:
    """Return whether module's methods are ours, also where a tool has made a subclass since, and not out of date."""
    kind = next((k for k in type(module).__mro__ if FROM in vars(k)), None)
    return kind is not None and is_current(kind)


__all__ = ["FROM", "SPEC", "Spec", "fused_class", "is_fused", "is_of_torch", "original_of", "why_not"]
