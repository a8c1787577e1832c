"""What follows a batch norm's call in a method's source: an addition, an activation, and what runs in between.

A chain is found in one expression, act(norm(x)) or act(norm(x) + r), or over statements of one block:

    out = self.bn2(out)                     the call: it may wait from here
    if self.downsample is not None:         pure, and calls of modules that waiting.py looks at when it comes to it
        identity = self.downsample(x)
    out += identity                         the addition
    out = self.relu(out)                    the activation: all is computed here

Everything else ends it, with a reason. Between the call and the computation nothing may run that could write what the
batch norm reads or see what it writes; what that can be is said in `_pure` and `_inert`.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .pairing import ACTIVATION_METHODS, ADDITION_METHODS
from .resolve import plain_attribute

Block = list[ast.stmt]
# Who reads the variables of a frame by name could see one that waits.
_CONTEXTS = (
    torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode, torch.autocast,
    torch.autograd.no_grad, torch.autograd.profiler.record_function,
)  # fmt: skip
_FRAME_READERS = {"locals", "vars", "dir", "eval", "exec", "breakpoint"}
_FRAME_READERS_OF_MODULES = {"_getframe", "currentframe", "set_trace"}


@dataclass
class Chain:
    """A batch norm's call and what is computed with it: an addition, an activation, both, or neither and why."""

    call: ast.Call
    add: ast.AST | None = None  # BinOp, Call or AugAssign
    act: ast.Call | None = None
    paths: list[str] = field(default_factory=list)  # modules below self that are called before the computation
    reason: str = ""

    @property
    def fuses(self) -> bool:
        return self.add is not None or self.act is not None


class Stop(Exception):
    """The chain ends; the text is why."""


def text_of(node: ast.AST) -> str:
    """Return source of node that is short enough for a report."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


class Body:
    """A method's body with the parents of its nodes.

    Args:
        values: returns the objects that an expression can be (resolve.Names.values).
        kind: the class whose method it is.
    """

    def __init__(
        self, tree: ast.FunctionDef, code: types.CodeType, kind: type, values: Callable[[ast.expr], list[Any]]
    ) -> None:
        self.tree, self.code, self.kind, self.values = tree, code, kind, values
        self.parents: dict[ast.AST, ast.AST] = {}
        self.blocks: dict[ast.stmt, tuple[Block, int]] = {}
        for node in ast.walk(tree):
            for _, value in ast.iter_fields(node):
                children = value if isinstance(value, list) else [value]
                for i, child in enumerate(children):
                    if isinstance(child, ast.AST):
                        self.parents[child] = node
                    if isinstance(child, ast.stmt):
                        self.blocks[child] = (value, i)
        parameters = [*tree.args.posonlyargs, *tree.args.args]
        self.self_name = parameters[0].arg if parameters else ""
        named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        of_others = named | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        self.reads_frames = bool(named & _FRAME_READERS or of_others & _FRAME_READERS_OF_MODULES)

    # ---- what may run while a call waits ----

    def _pure(self, node: ast.expr) -> bool:
        """Return whether evaluating node reads names, constants, or a plain attribute of self or of a Python module."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if not isinstance(node, ast.Attribute):
            return False
        if isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return plain_attribute(self.kind, node.attr)
        bases = self.values(node.value)
        return self._pure(node.value) and bool(bases) and all(isinstance(b, types.ModuleType) for b in bases)

    def _test(self, node: ast.expr) -> bool:
        """Return whether node is a condition that runs no code of the user's."""
        if isinstance(node, ast.BoolOp):
            return all(self._test(value) for value in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self._test(node.operand)
        if isinstance(node, ast.Compare):
            identity = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
            return identity and all(self._pure(e) for e in (node.left, *node.comparators))
        return self._pure(node)

    def _inert(self, node: ast.expr) -> list[str]:
        """Return the paths of the modules that evaluating node calls, if it does no more than that; raises Stop."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return []
        if isinstance(node, ast.Call) and not node.keywords:
            path, function = [], node.func
            while isinstance(function, ast.Attribute):
                path.append(function.attr)
                function = function.value
            of_self = isinstance(function, ast.Name) and function.id == self.self_name
            if path and of_self and plain_attribute(self.kind, path[-1]):
                return [".".join(reversed(path)), *(p for argument in node.args for p in self._inert(argument))]
        raise Stop(f"{text_of(node)} runs before its output is read (line {node.lineno})")

    def _inert_statement(self, node: ast.stmt) -> list[str]:
        """The same of a statement."""
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return []
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(isinstance(t, ast.Name) for t in _targets(node)):
            return [] if node.value is None else self._inert(node.value)
        if isinstance(node, ast.If) and self._test(node.test):
            return [path for statement in (*node.body, *node.orelse) for path in self._inert_statement(statement)]
        raise Stop(f"line {node.lineno} runs before its output is read: {text_of(node)}")

    # ---- following one call ----

    def follow(self, call: ast.Call, norm_calls: set[ast.Call]) -> Chain:
        """Return the chain of a batch norm's call; norm_calls are all of the method's."""
        chain = Chain(call)
        current: ast.expr | ast.AugAssign = call
        try:
            while True:
                following = self._add(chain, current, norm_calls) if chain.add is None else None
                if following is not None:
                    current = chain.add = following
                    continue
                act = self._act(current) if isinstance(current, ast.expr) else None
                if act is not None:
                    chain.act = act
                    break
                current = self._reader(chain, current)
        except Stop as stop:
            chain.reason = "" if chain.add is not None else str(stop)
        return chain

    def _act(self, current: ast.expr) -> ast.Call | None:
        """Return the call that applies an activation to current; raises Stop where another function does."""
        parent = self.parents[current]
        if isinstance(parent, ast.Attribute):
            call = self.parents[parent]
            if isinstance(call, ast.Call) and call.func is parent and parent.attr in ACTIVATION_METHODS:
                return None if call.args or call.keywords else call
        if not isinstance(parent, ast.Call) or not parent.args or parent.args[0] is not current:
            return None
        others = [*parent.args[1:], *(k.value for k in parent.keywords)]
        if not all(isinstance(other, ast.Constant) for other in others) or any(k.arg is None for k in parent.keywords):
            raise Stop(f"{text_of(parent)} follows, whose other arguments are not constants")
        return parent

    def _add(self, chain: Chain, current: ast.expr | ast.AugAssign, norm_calls: set[ast.Call]) -> ast.expr | None:
        """Return the addition that current is an operand of, or None; the other operand must be inert."""
        parent = self.parents[current]
        other: ast.expr | None = None
        found: ast.expr | None = None
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add):
            found, other = parent, parent.right if parent.left is current else None
        elif isinstance(parent, ast.Call) and current in parent.args and self._is_torch_add(parent):
            found, other = parent, parent.args[1] if parent.args[0] is current else None
        elif isinstance(parent, ast.Attribute) and parent.attr in ADDITION_METHODS:
            call = self.parents[parent]
            if isinstance(call, ast.Call) and call.func is parent and len(call.args) == 1 and not call.keywords:
                found, other = call, call.args[0]
        if other is not None:
            if other in norm_calls:
                raise Stop("the addition is part of another batch norm's")
            chain.paths += self._inert(other)
        return found

    def _is_torch_add(self, call: ast.Call) -> bool:
        return len(call.args) == 2 and not call.keywords and any(f is torch.add for f in self.values(call.func))

    # ---- over statements ----

    def _reader(self, chain: Chain, current: ast.expr | ast.AugAssign) -> Any:
        """Return where the variable that current is assigned to is read: a Name, or an AugAssign of an addition."""
        statement = current if isinstance(current, ast.AugAssign) else self.parents[current]
        if isinstance(statement, ast.AugAssign) and statement is current:
            name = statement.target.id  # type: ignore[union-attr]
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and len(_targets(statement)) == 1:
            (target,) = _targets(statement)
            if not isinstance(target, ast.Name):
                raise Stop(f"its output is kept in {text_of(target)}")
            name = target.id
        else:
            what = "returned" if isinstance(statement, ast.Return) else f"read by {text_of(statement)}"
            raise Stop(f"its output is {what}")
        if not self._is_fast(name) or self.reads_frames or not self._is_own(statement):
            raise Stop(f"{name} can be seen by other functions")
        block, i = self.blocks[statement]
        paths: list[str] = []
        for follower in block[i + 1 :]:
            if not _mentions(follower, name):
                paths += self._inert_statement(follower)
                continue
            reader = self._read_in(follower, name, chain)
            if isinstance(reader, ast.AugAssign):
                paths += self._inert(reader.value)
                chain.add = reader
            elif not self._dead_after(follower, name):
                raise Stop(f"{name} is read again")
            if paths and chain.add is not None and not isinstance(reader, ast.AugAssign):
                raise Stop("a call runs between the addition and the activation")
            chain.paths += paths
            return reader
        raise Stop(f"{name} is not read in the same block of statements")

    def _read_in(self, statement: ast.stmt, name: str, chain: Chain) -> ast.Name | ast.AugAssign:
        """Return where statement reads name, as the first thing that it does but for pure ones; raises Stop."""
        if (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.target, ast.Name)
            and statement.target.id == name
            and isinstance(statement.op, ast.Add)
            and chain.add is None
            and not _mentions(statement.value, name)
        ):
            return statement
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)) or statement.value is None:
            raise Stop(f"line {statement.lineno} reads it: {text_of(statement)}")
        loads = [n for n in ast.walk(statement.value) if isinstance(n, ast.Name) and n.id == name]
        if len(loads) != 1:
            raise Stop("its output is read by more than one" if loads else f"{name} is not read")
        if any(not isinstance(t, ast.Name) for t in _targets(statement) if _mentions(t, name)):
            raise Stop(f"line {statement.lineno} reads it: {text_of(statement)}")
        node: ast.AST = loads[0]
        while node is not statement:
            parent = self.parents[node]
            if not all(self._pure(e) for e in _evaluated_before(parent, node)):
                raise Stop(f"more than reading it happens in {text_of(statement)}")
            node = parent
        return loads[0]

    def _dead_after(self, statement: ast.stmt, name: str) -> bool:
        """Return whether the value that name had before statement can not be read after it."""
        if isinstance(statement, ast.Return):
            return True
        if name in _names(_targets(statement)):
            return True
        block, i = self.blocks[statement]
        for follower in block[i + 1 :]:
            if not _mentions(follower, name):
                if not isinstance(follower, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return)):
                    break
                continue
            assigned = isinstance(follower, ast.Assign) and not _mentions(follower.value, name)
            return assigned and _names(_targets(follower)) == [name]
        reads = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name and not _stores(n)]
        return all(self._within(n, statement) for n in reads)

    def _within(self, node: ast.AST, ancestor: ast.AST) -> bool:
        while node is not ancestor and node in self.parents:
            node = self.parents[node]
        return node is ancestor

    def _is_fast(self, name: str) -> bool:
        """Return whether name is a local variable that no inner function shares."""
        return name in self.code.co_varnames and name not in self.code.co_cellvars

    def _is_own(self, statement: ast.AST) -> bool:
        """Return whether statement is the method's own, not an inner function's, and no exception can end before it.

        Where one is caught, the variable of a call that waits could be read afterwards.
        """
        node = self.parents[statement]
        while node is not self.tree:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try)):
                return False
            if type(node).__name__ == "TryStar" or (
                isinstance(node, (ast.With, ast.AsyncWith)) and self._catches(node)
            ):
                return False
            node = self.parents[node]
        return True

    def _catches(self, node: ast.With | ast.AsyncWith) -> bool:
        """Return whether a context may catch exceptions: all do but torch's for gradients and types."""
        for item in node.items:
            called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else None
            found = [] if called is None else self.values(called)
            if not found or not all(any(f is known for known in _CONTEXTS) for f in found):
                return True
        return False


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """Return what a statement assigns its value to."""
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    return statement.targets if isinstance(statement, ast.Assign) else []


def _names(targets: list[ast.expr]) -> list[str]:
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _stores(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _mentions(node: ast.AST, name: str) -> bool:
    """Return whether node reads, writes or deletes a variable, or declares it, or has an inner function."""
    return any(
        (isinstance(n, ast.Name) and n.id == name)
        or (isinstance(n, ast.arg) and n.arg == name)
        or (isinstance(n, (ast.Global, ast.Nonlocal)) and name in n.names)
        for n in ast.walk(node)
    )


def _evaluated_before(parent: ast.AST, child: ast.AST) -> Iterator[ast.expr]:
    """Yield what parent evaluates before child; raises Stop where child may not be evaluated, or more than once."""
    if isinstance(parent, ast.Call):
        parts: list[ast.AST] = [parent.func, *parent.args, *(k.value for k in parent.keywords)]
    elif isinstance(parent, ast.BinOp):
        parts = [parent.left, parent.right]
    elif isinstance(parent, (ast.Tuple, ast.List)):
        parts = [*parent.elts]
    elif isinstance(
        parent,
        (ast.Attribute, ast.Return, ast.Assign, ast.AnnAssign, ast.Expr, ast.UnaryOp, ast.keyword, ast.Subscript),
    ):
        parts = [child]
    else:
        raise Stop(f"its output is read by {text_of(parent)}")
    for part in parts:
        if part is child or (isinstance(parent, ast.Call) and _holds(part, child)):
            return
        yield part  # type: ignore[misc]


def _holds(node: ast.AST, child: ast.AST) -> bool:
    return any(n is child for n in ast.walk(node))


__all__ = ["Body", "Chain", "text_of"]
