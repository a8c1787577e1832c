"""What runs between a batch norm's call and its computation: little enough to be told, or the chain ends there.

Allowed are names, constants, conditions, and calls of modules below self. What these do is looked at when it comes to
it (waiting.py), and so are the values that they are given or that conditions ask for their truth.
"""

from __future__ import annotations

import ast
from typing import Protocol

from .resolve import plain_attribute
from .syntax import Stop, names, targets, text_of


class Method(Protocol):
    """What is asked of the method's body (chains.Body)."""

    kind: type

    def of_self(self, node: ast.expr) -> bool: ...
    def mangled(self, name: str) -> str: ...
    def pure(self, node: ast.expr) -> bool: ...
    def is_bound(self, name: str, statement: ast.stmt) -> bool: ...


class Between:
    """Collects it from expressions and statements, each of which raises Stop where it is more.

    Attributes:
        paths: modules below self that are called.
        attributes: attributes of self that a condition asks for their truth.
        reads: local variables that calls are given, or conditions ask for their truth.
    """

    def __init__(self, body: Method, statement: ast.stmt) -> None:
        self.body, self.statement = body, statement
        self.paths: list[str] = []
        self.attributes: list[str] = []
        self.reads: list[str] = []
        # Variables assigned here: whether on every way, and the variables that they may be.
        self._assigned: dict[str, tuple[bool, list[str]]] = {}

    def test(self, node: ast.expr) -> bool:
        """Return whether node is a condition that runs no code of the user's, but for asking values for their truth."""
        if isinstance(node, ast.BoolOp):
            return all(self.test(value) for value in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self.test(node.operand)
        if isinstance(node, ast.Compare):
            identity = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
            return identity and all(self.body.pure(e) for e in (node.left, *node.comparators))
        if isinstance(node, ast.Name):
            self._read(node.id)
        elif isinstance(node, ast.Attribute) and self.body.of_self(node.value):
            self.attributes.append(self.body.mangled(node.attr))
        elif not isinstance(node, ast.Constant):
            return False
        return self.body.pure(node)

    def expression(self, node: ast.expr) -> list[str]:
        """Take in an expression; return the variables that its value may be."""
        if isinstance(node, ast.Constant):
            return []
        if isinstance(node, ast.Name):
            return [node.id]
        if isinstance(node, ast.IfExp) and self.test(node.test):
            return self.expression(node.body) + self.expression(node.orelse)
        if isinstance(node, ast.Call) and not node.keywords:
            path, function = [], node.func
            while isinstance(function, ast.Attribute):
                path.append(self.body.mangled(function.attr))
                function = function.value
            if path and self.body.of_self(function) and plain_attribute(self.body.kind, path[-1]):
                self.paths.append(".".join(reversed(path)))
                for argument in node.args:
                    for name in self.expression(argument):
                        self._read(name)
                return []
        raise Stop(f"{text_of(node)} runs before its output is read (line {node.lineno})")

    def statement_of(self, node: ast.stmt, always: bool = True) -> None:
        """Take in a statement; always: it runs on every way."""
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(isinstance(t, ast.Name) for t in targets(node)):
            if node.value is not None:
                sources = self.expression(node.value)
                for name in names(targets(node)):
                    before, others = self._assigned.get(name, (False, []))
                    self._assigned[name] = (always or before, sources if always else sources + others)
            return
        if isinstance(node, ast.If) and self.test(node.test):
            for child in (*node.body, *node.orelse):
                self.statement_of(child, False)
            return
        raise Stop(f"line {node.lineno} runs before its output is read: {text_of(node)}")

    def _read(self, name: str) -> None:
        """Note a variable whose value matters: it is looked at where the call starts to wait, so it must have one."""
        always, sources = self._assigned.pop(name, (False, []))
        for source in sources:
            self._read(source)
        if not always:
            if not self.body.is_bound(name, self.statement):
                raise Stop(f"{name} may have no value yet where the batch norm is called")
            self.reads.append(name)
        if always or sources:
            self._assigned[name] = (always, sources)


__all__ = ["Between"]
