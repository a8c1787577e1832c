"""What follows a batch norm's call in a method's source: an addition, an activation, and what runs in between.

A chain is found in one expression, act(norm(x)) or act(norm(x) + r), or over statements of one block:

    out = self.bn2(out)                     the call: it may wait from here
    if self.downsample is not None:         pure, and calls of modules that waiting.py looks at when it comes to it
        identity = self.downsample(x)
    out += identity                         the addition
    out = self.relu(out)                    the activation: all is computed here

Everything else ends it, with a reason. Between the call and the computation nothing may run that could write what the
batch norm reads or see what it writes; what that can be is said in `Between`. Also `if self.relu is not None:` around
the activation, and one around the call that it is the end of, are seen through.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .between import Between
from .pairing import ACTIVATION_METHODS, ADDITION_METHODS
from .resolve import mangled, plain_attribute
from .syntax import Stop, assigns, evaluated_before, mentions, names, targets, text_of

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
    # What runs before the computation: modules below self that are called, attributes of self whose truth is asked for,
    # and local variables that these calls are given or whose truth is asked for.
    paths: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    # Behind which the variable is computed if nothing in it has done so.
    finish: ast.If | None = None
    loop: ast.For | None = None  # for layer in self.layers: x = layer(x)
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether what runs in between has to be looked at when it comes to it."""
        return bool(self.paths or self.attributes or self.reads)

    def take(self, between: Between) -> None:
        """Have it run before the computation."""
        self.paths += between.paths
        self.attributes += between.attributes
        self.reads += between.reads

    @property
    def fuses(self) -> bool:
        return self.add is not None or self.act is not None or self.loop is not None


class Body:
    """A method's body with the parents of its nodes.

    Args:
        values: returns the objects that an expression can be (resolve.Names.values).
        kind: the class whose method it is.
        owner: the name of the class that it is written in, for private names.
    """

    def __init__(
        self,
        tree: ast.FunctionDef,
        code: types.CodeType,
        kind: type,
        owner: str | None,
        values: Callable[[ast.expr], list[Any]],
    ) -> None:
        self.tree, self.code, self.kind, self.owner, self.values = tree, code, kind, owner, values
        self.parents: dict[ast.AST, ast.AST] = {}
        self.blocks: dict[ast.stmt, tuple[list[ast.stmt], int]] = {}
        for node in ast.walk(tree):
            for _, value in ast.iter_fields(node):
                children = value if isinstance(value, list) else [value]
                for i, child in enumerate(children):
                    if isinstance(child, ast.AST):
                        self.parents[child] = node
                    if isinstance(child, ast.stmt):
                        self.blocks[child] = (value, i)
        positional = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        self.self_name = positional[0] if positional else ""
        if any(
            isinstance(n, ast.Name) and n.id == self.self_name and not isinstance(n.ctx, ast.Load)
            for n in ast.walk(tree)
        ):
            self.self_name = ""  # it may be something else by then
        others = (*tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg)
        self.parameters = {*positional, *(a.arg for a in others if a is not None)}
        named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        of_others = named | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        self.reads_frames = bool(named & _FRAME_READERS or of_others & _FRAME_READERS_OF_MODULES)

    # ---- what may run while a call waits ----

    def of_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    def mangled(self, name: str) -> str:
        return mangled(name, self.owner)

    def pure(self, node: ast.expr) -> bool:
        """Return whether evaluating node reads names, constants, or a plain attribute of self or of a Python module."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return True
        if not isinstance(node, ast.Attribute):
            return False
        if self.of_self(node.value):
            return plain_attribute(self.kind, self.mangled(node.attr))
        bases = self.values(node.value)
        return self.pure(node.value) and bool(bases) and all(isinstance(b, types.ModuleType) for b in bases)

    def is_bound(self, name: str, statement: ast.stmt) -> bool:
        """Return whether a local variable has a value wherever statement is reached."""
        named = (n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name)
        deleted = any(isinstance(n.ctx, ast.Del) for n in named)
        deleted |= any(isinstance(n, ast.ExceptHandler) and n.name == name for n in ast.walk(self.tree))
        if not self._is_fast(name) or deleted or not self._is_own(statement):
            return False
        if name in self.parameters:
            return True
        node: ast.AST = statement
        while node is not self.tree:
            if isinstance(node, ast.stmt):
                block, i = self.blocks[node]
                if any(assigns(earlier, name) for earlier in block[:i]):
                    return True
            node = self.parents[node]
        return False

    def loops_around(self, node: ast.AST) -> list[ast.AST]:
        """Return the loops, and the generators of comprehensions, that node stands in."""
        found: list[ast.AST] = []
        while node is not self.tree:
            node = self.parents[node]
            found += [node] if isinstance(node, ast.For) else getattr(node, "generators", [])
        return found

    def statement_with(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    # ---- following one call ----

    def follow(self, call: ast.Call, norm_calls: set[ast.Call]) -> Chain:
        """Return the chain of a batch norm's call; norm_calls are all of the method's."""
        chain = Chain(call, loop=self._loop_of(call))
        if chain.loop is not None:
            return chain
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

    def _loop_of(self, call: ast.Call) -> ast.For | None:
        """Return the loop whose body is `x = layer(x)` and nothing else, layer being an element of self's attribute."""
        statement = self.parents[call]
        loop = self.parents.get(statement)
        if not isinstance(statement, ast.Assign) or not isinstance(loop, ast.For) or len(loop.body) > 1 or loop.orelse:
            return None
        layer, (given,), iterated = call.func, call.args, loop.iter
        if (
            not isinstance(layer, ast.Name)
            or not isinstance(given, ast.Name)
            or not isinstance(iterated, ast.Attribute)
        ):
            return None
        alike = names([loop.target]) == [layer.id] and names(statement.targets) == [given.id] != [layer.id]
        fast = self._is_fast(layer.id) and self._is_fast(given.id) and not self.reads_frames and self._is_own(loop)
        plain = self.of_self(iterated.value) and self.pure(iterated) and len(statement.targets) == 1
        return loop if alike and fast and plain else None

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
        if not all(self.pure(other) for other in others) or any(k.arg is None for k in parent.keywords):
            raise Stop(f"{text_of(parent)} follows, whose other arguments are no plain values")
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
                raise Stop("what follows is part of another batch norm's")
            statement = self.statement_with(current)
            between = Between(self, statement)
            between.expression(other)
            if (between.paths or between.attributes) and not self._is_own(statement):
                raise Stop(f"{text_of(other)} runs before its output is read, in an inner function or a try")
            chain.take(between)
        return found

    def _is_torch_add(self, call: ast.Call) -> bool:
        return len(call.args) == 2 and not call.keywords and any(f is torch.add for f in self.values(call.func))

    # ---- over statements ----

    def _reader(self, chain: Chain, current: ast.expr | ast.AugAssign) -> Any:
        """Return where the variable that current is assigned to is read: a Name, or an AugAssign of an addition."""
        statement = current if isinstance(current, ast.AugAssign) else self.parents[current]
        if isinstance(statement, ast.AugAssign) and statement is current:
            name = statement.target.id  # type: ignore[union-attr]
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and len(targets(statement)) == 1:
            (target,) = targets(statement)
            if not isinstance(target, ast.Name):
                raise Stop(f"its output is kept in {text_of(target)}")
            name = target.id
        else:
            what = "returned" if isinstance(statement, ast.Return) else f"read by {text_of(statement)}"
            raise Stop(f"its output is {what}")
        if not self._is_fast(name) or self.reads_frames or not self._is_own(statement):
            raise Stop(f"{name} can be seen by other functions")
        between = Between(self, statement)
        for follower in self._following(statement):
            if not mentions(follower, name):
                between.statement_of(follower)
                continue
            inside = self._act_within(follower, name, between) if chain.add is None or not between.paths else None
            if inside is not None:
                chain.finish = follower  # type: ignore[assignment]
                reader: ast.Name | ast.AugAssign = inside
            else:
                reader = self._read_in(follower, name, chain)
            if isinstance(reader, ast.AugAssign):
                between.expression(reader.value)
                chain.add = reader
            elif inside is None and not self._dead_after(follower, name, chain):
                raise Stop(f"{name} is read again")
            if between.paths and chain.add is not None and not isinstance(reader, ast.AugAssign):
                raise Stop("a call runs between the addition and the activation")
            chain.take(between)
            return reader
        raise Stop(f"{name} is not read in the same block of statements")

    def _following(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        """Yield what runs after statement: the rest of its block, and what is behind the If that it is the end of."""
        while True:
            block, i = self.blocks[statement]
            yield from block[i + 1 :]
            parent = self.parents[statement]
            if not isinstance(parent, ast.If):
                return
            statement = parent

    def _act_within(self, statement: ast.stmt, name: str, between: Between) -> ast.Name | None:
        """Return where name is read in `if condition: name = f(name)`, whose other statements do not mention it."""
        if not isinstance(statement, ast.If) or any(mentions(s, name) for s in (*statement.orelse, statement.test)):
            return None
        if not between.test(statement.test):
            return None
        for inner in statement.body:
            if not mentions(inner, name):
                between.statement_of(inner, False)
                continue
            value = inner.value if isinstance(inner, ast.Assign) and names(inner.targets) == [name] else None
            if isinstance(value, ast.Call) and value.args and self.pure(value.func):
                given = value.args[0]
                if isinstance(given, ast.Name) and given.id == name and not mentions(value, name, but=given):
                    return given
            return None
        return None

    def _read_in(self, statement: ast.stmt, name: str, chain: Chain) -> ast.Name | ast.AugAssign:
        """Return where statement reads name, as the first thing that it does but for pure ones; raises Stop."""
        if (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.target, ast.Name)
            and statement.target.id == name
            and isinstance(statement.op, ast.Add)
            and chain.add is None
            and not mentions(statement.value, name)
        ):
            return statement
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)) or statement.value is None:
            raise Stop(f"line {statement.lineno} reads it: {text_of(statement)}")
        loads = [n for n in ast.walk(statement.value) if isinstance(n, ast.Name) and n.id == name]
        if len(loads) != 1:
            raise Stop("its output is read by more than one" if loads else f"{name} is not read")
        if any(not isinstance(t, ast.Name) for t in targets(statement) if mentions(t, name)):
            raise Stop(f"line {statement.lineno} reads it: {text_of(statement)}")
        node: ast.AST = loads[0]
        while node is not statement:
            parent = self.parents[node]
            if not all(self.pure(e) for e in evaluated_before(parent, node)):
                raise Stop(f"more than reading it happens in {text_of(statement)}")
            node = parent
        return loads[0]

    def _dead_after(self, statement: ast.stmt, name: str, chain: Chain) -> bool:
        """Return whether the value that name had before statement can not be read after it; but by the chain itself."""
        if isinstance(statement, ast.Return):
            return True
        if name in names(targets(statement)):
            return True
        block, i = self.blocks[statement]
        for follower in block[i + 1 :]:
            if not mentions(follower, name):
                if not isinstance(follower, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return)):
                    break
                continue
            assigned = isinstance(follower, ast.Assign) and not mentions(follower.value, name)
            return assigned and names(targets(follower)) == [name]
        reads = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name and not self._stores(n)]
        own = (statement,) if chain.add is None else (statement, chain.add)
        return all(any(self._within(n, part) for part in own) for n in reads)

    def _stores(self, node: ast.Name) -> bool:
        return isinstance(node.ctx, ast.Store) and not isinstance(self.parents[node], ast.AugAssign)

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


__all__ = ["Body", "Chain"]
