"""A method's syntax tree, proven to be what runs, and functions compiled from a changed one.

The proof: the tree, compiled again as it stands, has to give the very code that the method has. So a file that changed
since it was imported, an assertion that pytest rewrote, or a decorator cannot be mistaken for what runs.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import types
from collections.abc import Iterator, Mapping
from typing import Any

_FUTURE = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


class Unreadable(Exception):
    """Why a method's source cannot be used; the text is a reason for a report."""


def _definitions(tree: ast.AST, owner: str | None = None) -> Iterator[tuple[ast.FunctionDef, str | None]]:
    """Yield every function definition below tree, and the name of the class that it stands in, if any.

    Private names (__x) are those of the innermost class, also in a function within a method.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, owner
        yield from _definitions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _imports(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield the imports of a module's own scope: since 3.11 a call of an imported module's attribute compiles to other
    code than that of an object's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _imports(node)


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> tuple[list[tuple[ast.FunctionDef, str | None]], list[ast.stmt]]:
    """Return the function definitions of a file, each with the class it stands in, and the module's imports."""
    tree = ast.parse(text)
    return list(_definitions(tree)), list(_imports(tree))


# Definition, the class that this stands in, and imports, of a code: a model has many modules of few classes.
_PROVEN: dict[tuple[str, types.CodeType], tuple[ast.FunctionDef, str | None, list[ast.stmt]]] = {}


class Method:
    """A function of a class, its definition's syntax tree, and the name of the class that the definition stands in.

    Raises:
        Unreadable: there is no source, or it is not what runs.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        code = function.__code__
        if hasattr(function, "__wrapped__") or code.co_name == "<lambda>":
            raise Unreadable("it is decorated" if hasattr(function, "__wrapped__") else "it is a lambda")
        key = (code.co_filename, code)  # codes of two files can be equal
        if key in _PROVEN:
            self.tree, self.owner, self.imports = _PROVEN[key]
            return
        lines = linecache.getlines(code.co_filename, function.__globals__)
        if not lines:
            raise Unreadable("its source is not to be found")
        try:
            definitions, self.imports = _parse("".join(lines))
        except SyntaxError as error:
            raise Unreadable("its source is not what runs") from error
        found = [
            (node, owner)
            for node, owner in definitions
            if node.name == code.co_name
            and code.co_firstlineno in (node.lineno, *(d.lineno for d in node.decorator_list))
        ]
        for node, owner in found:
            self.tree, self.owner = node, owner
            try:
                if _same(self._compile(copy.deepcopy(node), ()), code):
                    if len(_PROVEN) > 1000:
                        _PROVEN.clear()
                    _PROVEN[key] = (self.tree, self.owner, self.imports)
                    return
            except SyntaxError:
                pass
        raise Unreadable("its source is not what runs")

    def compiled(self, tree: ast.FunctionDef, helpers: Mapping[str, Any]) -> types.FunctionType:
        """Return the function of a changed tree, which may name helpers; all else is the method's own.

        Its globals, the variables it closes over, its defaults and its name: who changes those changes both.
        """
        function = self.function
        code = self._compile(tree, tuple(helpers))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(types.CellType(helpers[name]) if name in helpers else cells[name] for name in code.co_freevars)
        made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        made.__kwdefaults__ = function.__kwdefaults__
        # torch.jit.script, inspect and help() read the source, signature and annotations of what is wrapped.
        return functools.update_wrapper(made, function)  # type: ignore[return-value]

    def _compile(self, tree: ast.FunctionDef, helpers: tuple[str, ...]) -> types.CodeType:
        """Compile tree where the method stands: in a class of its class's name, for private names and super()."""
        code = self.function.__code__
        tree.decorator_list, tree.returns = [], None
        arguments = tree.args
        for argument in (
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ):
            if argument is not None:
                argument.annotation = None
        none = ast.Constant(None)
        arguments.defaults = [none] * len(arguments.defaults)  # evaluated once, when the class was made
        arguments.kw_defaults = [None if default is None else none for default in arguments.kw_defaults]
        body: list[ast.stmt] = [tree]
        if self.owner is not None:
            body = [ast.ClassDef(name=self.owner, bases=[], keywords=[], body=body, decorator_list=[])]
            if hasattr(ast, "TypeVar"):
                body[0].type_params = []  # type: ignore[attr-defined]
            if self.owner not in code.co_freevars:
                body.insert(0, ast.Global([self.owner]))  # as the name is to the method
        outer = [ast.arg(name) for name in dict.fromkeys((*code.co_freevars, *helpers)) if name != "__class__"]
        factory = ast.FunctionDef(
            name="factory", body=body, decorator_list=[],
            args=ast.arguments(posonlyargs=[], args=outer, kwonlyargs=[], kw_defaults=[], defaults=[]),
        )  # fmt: skip
        if hasattr(ast, "TypeVar"):
            factory.type_params = []  # type: ignore[attr-defined]
        module = ast.fix_missing_locations(ast.Module(body=[*self.imports, factory], type_ignores=[]))
        flags = code.co_flags & _FUTURE
        made: types.CodeType = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
        for name in ("factory", *(() if self.owner is None else (self.owner,)), tree.name):
            made = next(c for c in made.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
        names: dict[str, Any] = {"co_qualname": getattr(code, "co_qualname", None)}  # since Python 3.11
        return made.replace(**names) if hasattr(made, "co_qualname") else made


def _same(one: types.CodeType, other: types.CodeType) -> bool:
    """Return whether two codes do the same; where they stand and what they are called aside."""
    names = (
        "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_posonlyargcount",
        "co_kwonlyargcount", "co_exceptiontable",
    )  # fmt: skip
    if any(getattr(one, name, None) != getattr(other, name, None) for name in names):
        return False
    return not (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED and _same_constant(one.co_consts, other.co_consts)


def _same_constant(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, types.CodeType):
        return _same(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(_same_constant(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, str) and one.count(".<locals>.") and other.count(".<locals>."):
        return one.rpartition(".")[2] == str(other).rpartition(".")[2]  # a nested function's qualified name
    return repr(one) == repr(other)  # 0.0 and -0.0 are equal
