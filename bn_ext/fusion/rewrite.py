"""From the chains of a method to the method that fuses: the calls become calls of pairing.py, all else stays as it is.

    self.relu(self.bn1(x))                     pair(self.relu, self.bn1, x)
    F.relu(self.bn2(x) + identity)             act(F.relu, add(plus, begin(self.bn2, x), identity))
    self.bn3(x) + identity                     finish(add(plus, begin(self.bn3, x), identity))

The order of evaluation is the source's.
"""

from __future__ import annotations

import ast
import copy
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..modules import FusedBatchNorm1d, LazyFusedBatchNorm1d
from . import pairing, waiting
from .chains import Body, Chain
from .pairing import ACTIVATION_METHODS, ADDITION_METHODS, is_sequential
from .resolve import Names
from .source import Method, Unreadable
from .syntax import text_of

FROM, SPEC = "_bn_ext_from", "_bn_ext_spec"  # attributes of the classes that parents.py makes
NORMS = (FusedBatchNorm1d, LazyFusedBatchNorm1d)  # exactly these: a subclass has a forward of its own

# What is done about a method: for each call of a batch norm, its number among the calls of the method's source and
# whether the activation behind it belongs to it.
Sites = tuple[tuple[int, bool], ...]

_HELPERS: dict[str, Any] = {
    "__bn_ext_pair__": pairing.pair, "__bn_ext_begin__": pairing.begin, "__bn_ext_wait__": waiting.wait,
    "__bn_ext_act__": pairing.act, "__bn_ext_act_method__": pairing.act_method, "__bn_ext_add__": pairing.add,
    "__bn_ext_add_method__": pairing.add_method, "__bn_ext_step__": pairing.step, "__bn_ext_finish__": pairing.finish,
    "__bn_ext_plus__": operator.add, "__bn_ext_iplus__": operator.iadd,
}  # fmt: skip


def methods_of(kind: type[nn.Module]) -> dict[str, types.FunctionType]:
    """Return the plain methods that instances of kind have from the classes below nn.Module, by name."""
    found: dict[str, Any] = {}
    for cls in kind.__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            if name not in found:
                found[name] = value
    dunder = ("__init__", "__call__", "__getattr__", "__setattr__")
    ours = __name__.partition(".")[0]
    return {
        n: f
        for n, f in found.items()
        if isinstance(f, types.FunctionType) and n not in dunder and (f.__module__ or "").partition(".")[0] != ours
    }


def calls_of(tree: ast.AST) -> list[ast.Call]:
    """Return the calls of one positional argument, which a batch norm's may be."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [c for c in calls if len(c.args) == 1 and not c.keywords and not isinstance(c.args[0], ast.Starred)]


def _calls_by_keyword(tree: ast.AST) -> list[ast.Call]:
    """Return the calls that give their arguments by keyword, or one by place and others so."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.keywords and len(node.args) < 2]


def _generates(tree: ast.FunctionDef) -> bool:
    """Return whether the method is a generator (or holds one: those are rare, and left alone with it)."""
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(tree))


def _resolve_claims(chains: list[Chain]) -> None:
    """Let every addition and activation belong to one batch norm: to that which need not wait for other calls.

    The activation of a variable may follow the batch norms of several branches, of which one has run.
    """
    taken: set[ast.AST] = set()
    for chain in sorted(chains, key=lambda c: (len(c.paths), -c.call.lineno, -c.call.col_offset)):
        shared = chain.add is None and chain.act is not None and bool(chain.act.args)
        shared = shared and isinstance(chain.act.args[0], ast.Name)  # type: ignore[union-attr]
        parts = {part for part in (chain.add, None if shared else chain.act) if part is not None}
        if parts & taken or (shared and chain.act in taken):
            chain.add = chain.act = None
            chain.reason = "what follows is part of another batch norm's"
        taken |= parts


# ---- what a method has ----


@dataclass
class Place:
    """One call in a method that can be that of batch norms: which, what is computed there, and why not more."""

    method: Method
    chain: Chain
    norms: list[FusedBatchNorm1d]
    activations: list[Any]  # (function, arguments, options) of what can follow it

    @property
    def line(self) -> int:
        return self.chain.call.lineno

    @property
    def number(self) -> int:
        """Which of the method's calls it is."""
        return calls_of(self.method.tree).index(self.chain.call)


def places_of(
    module: nn.Module, kind: type[nn.Module]
) -> tuple[dict[str, list[Place]], dict[str, tuple[str, set[str]]]]:
    """Return the places in the methods of module, whose class is kind; and of those that could not be read, why, and
    which children of module they name."""
    places: dict[str, list[Place]] = {}
    unreadable: dict[str, tuple[str, set[str]]] = {}
    roots = {n for n, m in module._modules.items() if m is not None and _holds_norm(m)}
    for name, function in methods_of(kind).items():
        if not (roots | _DYNAMIC) & _names_in(function.__code__):
            continue
        try:
            method = Method(function)
            if _generates(method.tree):
                raise Unreadable("it is a generator")
        except Unreadable as error:
            mentioned = roots & _names_in(function.__code__)
            unreadable[name] = (f"{kind.__name__}.{name} is left alone: {error}", mentioned)
            continue
        found = _places_in(module, kind, method)
        if found:
            places[name] = found
    return places, unreadable


# How a method can reach a module without naming it.
_DYNAMIC = {"getattr", "children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _holds_norm(module: nn.Module) -> bool:
    return any(type(m) in NORMS for m in module.modules())


def _places_in(module: nn.Module, kind: type[nn.Module], method: Method) -> list[Place]:
    names = Names(module, method.function, method.tree, method.owner)
    calls = calls_of(method.tree)
    body = _body(method, kind)
    called = {c: norms_of(names.values(c.func, body.loops_around(c))) for c in calls}
    called = {call: norms for call, norms in called.items() if norms}
    places = []
    for call, norms in called.items():
        chain = body.follow(call, set(called))
        activations: list[Any] = []
        if chain.act is not None:
            activations = _activations(names, chain.act, body.loops_around(chain.act))
            if not activations:
                chain.reason = "" if chain.add is not None else f"{text_of(chain.act)} follows, which is none of ours"
                chain.act = None
        unique = list({id(norm): norm for norm in norms}.values())
        places.append(Place(method, chain, unique, activations))
    _resolve_claims([place.chain for place in places])
    for call in _calls_by_keyword(method.tree):
        norms = norms_of(names.values(call.func, body.loops_around(call)))
        if norms:
            chain = Chain(call, reason="its call gives arguments by keyword: only norm(x) fuses")
            places.append(Place(method, chain, norms, []))
    return sorted(places, key=lambda place: (place.line, place.chain.call.col_offset))


def _body(method: Method, kind: type[nn.Module], tree: ast.FunctionDef | None = None) -> Body:
    """Return the body of a method; names are resolved by globals alone, so that it is one for all instances."""
    tree = method.tree if tree is None else tree
    values = Names(None, method.function, tree, method.owner).values
    return Body(tree, method.function.__code__, kind, method.owner, values)


def norms_of(values: list[Any]) -> list[Any]:
    """Return the batch norms that a call of one of values ends with: its own, or the last of a Sequential."""
    found = []
    for value in values:
        while isinstance(value, nn.Sequential) and is_sequential(original_of_class(type(value))) and value._modules:
            value = list(value._modules.values())[-1]
        if type(value) in NORMS:
            found.append(value)
    return found


def original_of_class(kind: type) -> type:
    """Return the class that kind was made of here, or kind."""
    found: type = vars(kind).get(FROM, kind)
    return found


def _activations(names: Names, act: ast.Call, loops: list[ast.AST]) -> list[Any]:
    """Return what the call of an activation can be of what is known, with its arguments behind the first."""
    if isinstance(act.func, ast.Attribute) and act.func.attr in ACTIVATION_METHODS and not act.args:
        return [(ACTIVATION_METHODS[act.func.attr][0], (), {})]
    args = tuple(value for argument in act.args[1:] for value in names.values(argument)[:1])
    options = {k.arg: value for k in act.keywords for value in names.values(k.value)[:1]}
    if len(args) + len(options) < len(act.args) - 1 + len(act.keywords):
        return []  # of an argument that cannot be told
    return [(f, args, options) for f in names.values(act.func, loops) if is_known(f)]


def is_known(function: Any) -> bool:
    """Return whether function is of the kinds that may be an activation, whatever hooks it has now."""
    if isinstance(function, nn.Module):
        return type(function) in pairing._ACTIVATION_MODULES
    return isinstance(function, (types.FunctionType, types.BuiltinFunctionType)) and (
        function in pairing._ACTIVATION_FUNCTIONS
    )


def sites_of(places: list[Place]) -> Sites:
    """Return what is to be done about the places of one method."""
    return tuple(sorted((p.number, p.chain.act is not None) for p in places if p.chain.fuses))


# ---- what it becomes ----


def rewritten(kind: type[nn.Module], function: types.FunctionType, sites: Sites) -> types.FunctionType | None:
    """Return the method that fuses at sites, or None where the source is another one than they were made for.

    Raises:
        Unreadable: there is no source, or it is not what runs.
    """
    method = Method(function)
    tree = copy.deepcopy(method.tree)
    calls = calls_of(tree)
    if any(number >= len(calls) for number, _ in sites):
        return None
    body = _body(method, kind, tree)
    chosen = {calls[number] for number, _ in sites}
    chains = []
    for number, with_act in sites:
        chain = body.follow(calls[number], chosen)
        if not with_act:
            chain.act = None
        chains.append(chain)
    _resolve_claims(chains)
    edits: Edits = {}
    for chain in chains:
        if chain.fuses:
            _plan(chain, body.self_name, edits)
    _Editor(edits).visit(tree)
    return method.compiled(tree, _HELPERS)


Edits = dict[ast.AST, Callable[[Any], Any]]


class _Editor(ast.NodeTransformer):
    """Replaces nodes by what edits make of them, children first."""

    def __init__(self, edits: Edits) -> None:
        self.edits = edits

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if node not in self.edits:
            return node
        made = self.edits[node](node)
        if isinstance(made, list):  # statements
            return made
        return _located(ast.copy_location(made, node), node)


def _located(made: ast.AST, at: ast.AST) -> ast.AST:
    """Give the parts of made that have no place in the source the place of the node that it stands for."""
    for child in ast.walk(made):
        if isinstance(child, (ast.expr, ast.stmt)) and not hasattr(child, "lineno"):
            ast.copy_location(child, at)
    return made


def _call(helper: str, *args: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    return ast.Call(func=_name(f"__bn_ext_{helper}__"), args=list(args), keywords=keywords or [])


def _name(name: str) -> ast.Name:
    return ast.Name(id=name, ctx=ast.Load())


def _plan(chain: Chain, self_name: str, edits: Edits) -> None:
    """Add the edits of one chain."""
    call, add, act, loop = chain.call, chain.add, chain.act, chain.loop
    if loop is not None:
        edits[call] = lambda n: _call("step", n.func, n.args[0], copy.deepcopy(loop.iter))
        _finish_behind(loop, call.args[0], edits)
        return
    if act is not None and add is None and act.args and act.args[0] is call and _constant(act):
        edits[act] = lambda n: _call("pair", n.func, call.func, call.args[0], *n.args[1:], keywords=n.keywords)
        return
    if chain.waits:
        strings = [
            ast.Tuple(elts=[ast.Constant(p) for p in dict.fromkeys(found)], ctx=ast.Load())
            for found in (chain.paths, chain.attributes)
        ]
        values = [_name(read) for read in dict.fromkeys(chain.reads)]
        edits[call] = lambda n: _call("wait", n.func, n.args[0], _name(self_name), *strings, *values)
    else:
        edits[call] = lambda n: _call("begin", n.func, n.args[0])
    if add is not None:
        last = act is None
        edits[add] = lambda n: _added(n, last)
    if act is not None:
        edits[act] = _acted
        if chain.finish is not None:
            _finish_behind(chain.finish, act.args[0], edits)


def _constant(act: ast.Call) -> bool:
    """Return whether the arguments behind the first are the same whenever they are evaluated."""
    return all(isinstance(a, ast.Constant) for a in (*act.args[1:], *(k.value for k in act.keywords)))


def _finish_behind(statement: ast.stmt, name: ast.expr, edits: Edits) -> None:
    """Compute a variable behind a statement in which an activation may have done so."""
    assert isinstance(name, ast.Name)
    before = edits.get(statement)
    store = ast.Name(id=name.id, ctx=ast.Store())
    made = ast.Assign(targets=[store], value=_call("finish", _name(name.id)))

    def append(node: Any) -> Any:
        found = node if before is None else before(node)
        return [*(found if isinstance(found, list) else [found]), _located(made, node)]

    edits[statement] = append


def _acted(node: ast.Call) -> ast.AST:
    if isinstance(node.func, ast.Attribute) and not node.args:
        return _call("act_method", ast.Constant(node.func.attr), node.func.value)
    return _call("act", node.func, *node.args, keywords=node.keywords)


def _added(node: ast.AST, last: bool) -> ast.AST:
    def end(made: ast.expr) -> ast.expr:
        return _call("finish", made) if last else made

    if isinstance(node, ast.AugAssign):
        assert isinstance(node.target, ast.Name)
        value = end(_call("add", _name("__bn_ext_iplus__"), _name(node.target.id), node.value))
        return ast.Assign(targets=[node.target], value=value)
    if isinstance(node, ast.BinOp):
        return end(_call("add", _name("__bn_ext_plus__"), node.left, node.right))
    assert isinstance(node, ast.Call)
    if isinstance(node.func, ast.Attribute) and len(node.args) == 1 and node.func.attr in ADDITION_METHODS:
        return end(_call("add_method", ast.Constant(node.func.attr), node.func.value, node.args[0]))
    return end(_call("add", node.func, *node.args))


__all__ = [
    "FROM",
    "NORMS",
    "SPEC",
    "Place",
    "Sites",
    "norms_of",
    "original_of_class",
    "places_of",
    "rewritten",
    "sites_of",
]
