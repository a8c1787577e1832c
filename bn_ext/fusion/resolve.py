"""Which objects an expression of a method can be, on one module as it is now.

It is used to find the batch norms that a call may mean, and to say what follows them. It runs no code of the user's:
properties, methods and functions are not called. What it misses is not fused; what it takes for a batch norm and is
none is called as ever.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

_MANY = 10_000  # objects that an expression can be; more are of no use to anybody


class Names:
    """What the names of a method can be bound to: parameters, local variables by all their assignments, globals."""

    def __init__(
        self, module: nn.Module | None, function: types.FunctionType, tree: ast.FunctionDef, owner: str | None
    ) -> None:
        self.module = module
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.self_name = arguments[0].arg if arguments else None
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.outer = {name: cell for name, cell in cells if name != "__class__"}
        self.owner = owner
        self._budget = _MANY
        self.function = function
        # name -> (expression, whether the name is an element of it, and the loop that makes it one)
        self.bindings: dict[str, list[tuple[ast.expr, bool, ast.AST | None]]] = {}
        self.loops: list[ast.AST] = []  # around what is asked for: a loop's variable is what that loop makes it
        self.unknown: set[str] = {a.arg for a in (*arguments[1:], *tree.args.kwonlyargs)}
        self._busy: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._bind(node.target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._bind_element(node.target, node.iter, node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.bindings.setdefault(target.id, []).append((value, False, None))
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            for one, part in zip(target.elts, value.elts):  # noqa: B905 (a star leaves the rest unknown)
                self._bind(one, part)

    def _bind_element(self, target: ast.expr, iterated: ast.expr, loop: ast.AST) -> None:
        """Bind the target of a loop over an expression: zip, enumerate, reversed, items and values are seen through."""
        name = ""
        if isinstance(iterated, ast.Call):
            callee = iterated.func
            name = getattr(callee, "id", "") or getattr(callee, "attr", "")
        elements = target.elts if isinstance(target, ast.Tuple) else []
        arguments = iterated.args if isinstance(iterated, ast.Call) else []
        if name == "zip" and len(elements) == len(arguments):
            for one, part in zip(elements, arguments, strict=True):
                self._bind_element(one, part, loop)
        elif name == "enumerate" and len(elements) == 2 and arguments:
            self._bind_element(elements[1], arguments[0], loop)
        elif name in ("reversed", "list", "tuple", "iter") and len(arguments) == 1:
            self._bind_element(target, arguments[0], loop)
        elif name in ("items", "named_children") and isinstance(iterated, ast.Call) and len(elements) == 2:
            if isinstance(iterated.func, ast.Attribute):
                self._bind_element(elements[1], iterated.func.value, loop)
        elif name in ("values", "children") and isinstance(iterated, ast.Call):
            if isinstance(iterated.func, ast.Attribute):
                self._bind_element(target, iterated.func.value, loop)
        elif isinstance(target, ast.Name):
            self.bindings.setdefault(target.id, []).append((iterated, True, loop))

    def values(self, node: ast.expr, loops: Sequence[ast.AST] = ()) -> list[Any]:
        """Return the objects that node can be, as far as they can be told; loops are those that it stands in."""
        self._budget, self.loops = _MANY, list(loops)
        return self._values(node)

    def _values(self, node: ast.expr) -> list[Any]:
        found: list[Any] = []
        self._budget -= 1
        if self._budget < 0:  # names that are all assigned to each other
            return found
        if isinstance(node, ast.Name):
            found = self._of_name(node.id)
        elif isinstance(node, ast.Attribute):
            found = [v for base in self._values(node.value) for v in attribute(base, mangled(node.attr, self.owner))]
        elif isinstance(node, ast.Subscript):
            for base in self._values(node.value):
                found += _items(base, node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            for base in self._values(node.args[0]):
                name = node.args[1] if len(node.args) > 1 else None
                if isinstance(name, ast.Constant):
                    found += attribute(base, str(name.value))
                elif isinstance(base, nn.Module):
                    found += [m for m in base._modules.values() if m is not None]
        elif isinstance(node, ast.IfExp):
            found = self._values(node.body) + self._values(node.orelse)
        elif isinstance(node, (ast.List, ast.Tuple)):
            found = [[v for element in node.elts for v in self._values(element)]]
        elif isinstance(node, ast.Constant):
            found = [node.value]
        return found[:_MANY]

    def _of_name(self, name: str) -> list[Any]:
        if name == self.self_name:
            return [] if self.module is None else [self.module]
        if name in self.bindings:
            if name in self._busy:  # x = f(x)
                return []
            self._busy.add(name)
            found = []
            bindings = self.bindings[name]
            if any(loop in self.loops for _, _, loop in bindings):
                bindings = [b for b in bindings if b[2] is None or b[2] in self.loops]
            for value, element, _ in bindings:
                for object in self._values(value):
                    found += elements_of(object) if element else [object]
            self._busy.discard(name)
            return found
        if name in self.unknown:
            return []
        if name in self.outer:
            try:
                return [self.outer[name].cell_contents]
            except ValueError:  # not bound yet
                return []
        return [self.function.__globals__[name]] if name in self.function.__globals__ else []


def mangled(name: str, owner: str | None) -> str:
    """Return what a private name (__x) is within a class of that name."""
    private = name.startswith("__") and not name.endswith("__") and owner is not None and owner.strip("_")
    return f"_{(owner or '').lstrip('_')}{name}" if private else name


def attribute(base: Any, name: str) -> list[Any]:
    """Return [base.name] where reading it runs no code of the user's, else []."""
    if isinstance(base, nn.Module):
        for kept in (vars(base), base._modules, base._parameters, base._buffers):
            if name in kept:
                return [kept[name]]
        found = inspect.getattr_static(type(base), name, None)
        return [] if found is None or hasattr(type(found), "__get__") else [found]
    if isinstance(base, types.ModuleType):
        return [vars(base)[name]] if name in vars(base) else []
    return []


def elements_of(base: Any) -> list[Any]:
    """Return what a loop over base can give, for the containers that hold modules."""
    if isinstance(base, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return [m for m in base._modules.values() if m is not None]
    if isinstance(base, dict):
        return list(base.values())
    return list(base) if isinstance(base, (list, tuple)) else []


def _items(base: Any, index: ast.expr) -> list[Any]:
    """Return what base[index] can be."""
    elements = elements_of(base)
    if isinstance(index, ast.Slice):
        return [elements]
    try:
        constant = ast.literal_eval(index)
    except ValueError:
        return elements
    try:
        if isinstance(base, (nn.ModuleDict, dict)):
            return [base[constant]]
        return [elements[constant]]
    except (KeyError, IndexError, TypeError):
        return []


def plain_attribute(kind: type, name: str) -> bool:
    """Return whether reading name of an instance of kind, an nn.Module's class, runs no code of the user's."""
    own: Any = kind
    if own.__getattribute__ is not object.__getattribute__ or own.__getattr__ is not nn.Module.__getattr__:
        return False
    return not hasattr(type(inspect.getattr_static(kind, name, None)), "__get__")


__all__ = ["Names", "attribute", "elements_of", "mangled", "plain_attribute"]
