"""Small questions about syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator


class Stop(Exception):
    """What follows a batch norm ends here; the text is why, for a report."""


def text_of(node: ast.AST) -> str:
    """Return source of node that is short enough for a report."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


def targets(statement: ast.stmt) -> list[ast.expr]:
    """Return what a statement assigns its value to."""
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    return statement.targets if isinstance(statement, ast.Assign) else []


def names(expressions: list[ast.expr]) -> list[str]:
    """Return those of expressions that are plain variables."""
    return [expression.id for expression in expressions if isinstance(expression, ast.Name)]


def assigns(statement: ast.stmt, name: str) -> bool:
    """Return whether a statement gives a variable a value, whatever happens."""
    return name in names(targets(statement)) and getattr(statement, "value", None) is not None


def mentions(node: ast.AST, name: str, but: ast.AST | None = None) -> bool:
    """Return whether node reads, writes, deletes or declares a variable, elsewhere than in but, inner functions too."""
    return any(
        (isinstance(n, ast.Name) and n.id == name and n is not but)
        or (isinstance(n, ast.arg) and n.arg == name)
        or (isinstance(n, (ast.Global, ast.Nonlocal)) and name in n.names)
        for n in ast.walk(node)
    )


def evaluated_before(parent: ast.AST, child: ast.AST) -> Iterator[ast.expr]:
    """Yield what parent evaluates before child; raises Stop where child may not be evaluated, or more than once."""
    if isinstance(parent, ast.Call):
        parts: list[ast.AST] = [parent.func, *parent.args, *(k.value for k in parent.keywords)]
    elif isinstance(parent, ast.BinOp):
        parts = [parent.left, parent.right]
    elif isinstance(parent, (ast.Tuple, ast.List)):
        parts = [*parent.elts]
    elif isinstance(parent, ast.Subscript):
        parts = [parent.value, parent.slice]
    elif isinstance(parent, (ast.Attribute, ast.Return, ast.Assign, ast.AnnAssign, ast.Expr, ast.UnaryOp, ast.keyword)):
        parts = [child]
    else:
        raise Stop(f"its output is read by {text_of(parent)}")
    for part in parts:
        if part is child or (isinstance(parent, ast.Call) and any(n is child for n in ast.walk(part))):
            return
        yield part  # type: ignore[misc]


__all__ = ["Stop", "assigns", "evaluated_before", "mentions", "names", "targets", "text_of"]
