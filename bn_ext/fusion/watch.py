"""Which code looks at classes: a module that does must keep the very class that it has."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator

from torch import nn

_NOT_THE_USERS = {"torch", "bn_ext", *sys.stdlib_module_names} - {"__main__"}
_SKIPPED = ("CACHE", "PUSH_NULL", "RESUME", "PRECALL", "CALL", "CALL_FUNCTION")
_KEPT = ("__name__", "__qualname__", "__module__", "__doc__")  # what the subclass has of the class that it stands for


def _functions_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the functions of a class and its bases below nn.Module, those of properties and class methods included."""
    for cls in kind.__mro__:
        if cls is nn.Module or (cls.__module__ or "").partition(".")[0] in _NOT_THE_USERS:
            continue
        for name, value in vars(cls).items():
            parts = [value, getattr(value, "__func__", None), getattr(value, "fget", None)]
            for part in parts:
                function = inspect.unwrap(part) if callable(part) else None
                if isinstance(function, types.FunctionType):
                    yield name, function


def asks_for_its_class(kind: type) -> str:
    """Return the name of a method of kind that reads type(self) or self.__class__, or ""."""
    for name, function in _functions_of(kind):
        code = function.__code__
        if code.co_argcount and _asks(code, code.co_varnames[0]):
            return name
    return ""


def asks_for_class_named(kind: type, name: str) -> str:
    """Return the name of a method of kind that reads classes of other objects and names one `name`, or ""."""
    for method, function in _functions_of(kind):
        if name in _names(function.__code__) and _asks(function.__code__):
            return method
    return ""


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    names = {*code.co_names, *code.co_freevars}
    return frozenset(names.union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType))))


@functools.lru_cache(maxsize=4096)
def _asks(code: types.CodeType, of: str | None = None) -> bool:
    """Return whether code asks for the class of anything, or of the variable `of`; not for a name alone."""
    seen = [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]
    for one, other, third in itertools.zip_longest(seen, seen[1:], seen[2:]):
        if other is None or (third is not None and third.argval in _KEPT):
            continue
        if one.argval == "type" and one.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")):
            found = of is None or _loads(other, of)
        elif other.argval == "__class__" and other.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            found = of is None or _loads(one, of)
        else:
            continue
        if found:
            return True
    return any(_asks(c, of) for c in code.co_consts if isinstance(c, types.CodeType))


def _loads(instruction: dis.Instruction, name: str) -> bool:
    """Return whether an instruction ends with reading a variable; some read two."""
    value = instruction.argval
    return instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")) and (
        value == name or (isinstance(value, tuple) and name in value)
    )


__all__ = ["asks_for_class_named", "asks_for_its_class"]
