"""Finding batch norm -> (+ residual) -> activation in a model, and having the batch norm's kernel compute all of it.

Two ways, neither of which touches parameters, buffers, names or hooks:

- In an nn.Sequential the activation behind a batch norm becomes an nn.Identity.
- A module with a forward of its own is traced by torch.fx, its children whole, in training and in evaluation. Where
  both give one graph, the module gets a subclass of its class with the shorter forward: every hook still runs.

Left alone, with the reason in the report: a batch norm or activation with hooks, a batch norm whose output something
else reads too, one whose calls are followed by different things, and modules that do not trace.
"""

from __future__ import annotations

import linecache
import logging
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import FusedBatchNorm1d

logger = logging.getLogger("bn_ext")


@dataclass(frozen=True)
class Fusion:
    """One batch norm of a model: its name, what it now computes, and why that is no more than it was ("" if it is)."""

    name: str
    computes: str
    reason: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Activation:
    """FusedBatchNorm1d's activation and negative_slope."""

    name: str | None = None
    negative_slope: float = 0.01


# ---- what is recognised ----

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")


def activation_of_module(module: nn.Module) -> Activation | None:
    """Return the activation that an exact torch module computes, or None for anything else."""
    kind = type(module)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(module.negative_slope))  # type: ignore[arg-type]
    if kind is nn.GELU:
        return Activation("gelu") if module.approximate == "none" else None
    return {nn.ReLU: Activation("relu"), nn.SiLU: Activation("silu")}.get(kind)


def activation_of_node(node: fx.Node, module: nn.Module) -> Activation | None:
    """Return the activation that a node of module's graph computes of its first argument, or None."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return None if has_hooks(child) or node.kwargs else activation_of_module(child)
    name = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if name == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else options.pop("negative_slope", 0.01)
        return Activation(name, float(slope)) if isinstance(slope, (int, float)) and not options else None
    if name == "gelu" and options.pop("approximate", "none") != "none":
        return None
    return None if name is None or options else Activation(name)


def residual_of(node: fx.Node, output: fx.Node) -> fx.Node | None:
    """Return the other operand where node adds a tensor to output, and changes at most output in place."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS or len(node.args) != 2:
        return None
    left, right = node.args
    if node.kwargs or (node.target in _IN_PLACE_ADDITIONS and left is not output):
        return None
    other = right if left is output else left
    return other if isinstance(other, fx.Node) and other is not output else None


def has_hooks(module: nn.Module) -> bool:
    """Return whether something listens to calls of module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


# ---- calls of batch norms, and what follows each ----


@dataclass
class Call:
    """A place where a batch norm is called: how to have it compute `activation` (and the residual), or why not."""

    activation: Activation
    adds: bool = False
    reason: str = ""
    owner: nn.Module | None = None  # whose forward is rewritten
    rewrite: Callable[[], None] | None = None


class _Tracer(fx.Tracer):
    """Looks into one module's own forward only."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module) -> fx.Graph:
    """Return the graph of module's own forward, its children whole.

    Raises:
        ValueError: it does not trace, differs between training and evaluation, or changes the module.
    """
    training, before, graphs = module.training, dict(vars(module)), []
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_Tracer().trace(module))
    except Exception as error:
        raise ValueError(f"its module does not trace: {type(error).__name__}") from error
    finally:
        module.training = training
        changed = {k for k in before.keys() | vars(module).keys() if before.get(k) is not vars(module).get(k)}
        for k in changed - {"training"}:
            vars(module).pop(k, None)
            if k in before:
                vars(module)[k] = before[k]
    if changed - {"training"}:
        raise ValueError("its module's forward sets attributes")
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        raise ValueError("its module's forward differs between training and evaluation")
    return graphs[0]


def _quiet(nodes: list[fx.Node]) -> bool:
    """Return whether none of nodes can write into a tensor."""
    functions = [str(getattr(n.target, "__name__", n.target)) for n in nodes if n.op != "call_module"]
    in_place = any(name.endswith("_") or name in ("iadd", "imul", "isub", "itruediv", "setitem") for name in functions)
    return not in_place and not any(n.op == "call_module" or n.kwargs.get("inplace") for n in nodes)


def chain_of(node: fx.Node, module: nn.Module, nodes: list[fx.Node]) -> tuple[list[fx.Node], Activation | None, str]:
    """Return (batch norm's node, addition if any, activation if any), the activation, and why there is not more."""
    if len(node.users) != 1:
        return [node], None, "its output is read by more than one"
    chain, reason = [node], "no activation or addition follows"
    follower = next(iter(node.users))
    residual = residual_of(follower, node)
    if residual is not None:
        first, last = nodes.index(node), nodes.index(follower)
        source = node.args[0]
        alone = isinstance(source, fx.Node) and len(source.users) == 1
        # The call moves to the addition, where the residual is known: nobody else may write its input until then.
        if alone or _quiet(nodes[first + 1 : last]):
            chain.append(follower)
        else:
            reason = "its input may change before the residual is added"
    if len(chain[-1].users) != 1:
        return chain, None, reason
    follower = next(iter(chain[-1].users))
    activation = activation_of_node(follower, module) if follower.args[:1] == (chain[-1],) else None
    return (chain if activation is None else [*chain, follower]), activation, reason


def calls_in_graph(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, Call]]:
    """Yield (batch norm, call) for the calls in the graph of module's forward."""
    nodes = list(graph.nodes)
    taken: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_module":
            continue
        norm = module.get_submodule(str(node.target))
        if not isinstance(norm, FusedBatchNorm1d):
            continue
        if len(node.args) != 1 or node.kwargs:
            yield norm, Call(Activation(), reason="called with more than its input")
            continue
        chain, activation, reason = chain_of(node, module, nodes)
        if taken.intersection(chain):  # the sum of two batch norms: the first has it
            chain, reason = chain[:1], "the addition is part of another batch norm's"
        taken.update(chain[1:])
        if len(chain) == 1:
            yield norm, Call(Activation(), reason=reason)
        else:
            adds = len(chain) > 1 + (activation is not None)
            yield norm, Call(activation or Activation(), adds, owner=module, rewrite=_rewriter(graph, chain, adds))


def _rewriter(graph: fx.Graph, chain: list[fx.Node], adds: bool) -> Callable[[], None]:
    def rewrite() -> None:
        norm = chain[0]
        arguments = norm.args  # as they are now: what they name may have been rewritten
        if adds:
            left, right = chain[1].args
            arguments = (norm.args[0], right if left is norm else left)
        with graph.inserting_before(chain[1] if adds else norm):
            call = graph.call_module(str(norm.target), arguments)
        chain[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)

    return rewrite


class FusedActivation(nn.Identity):
    """Stands where the activation of a Sequential was that the batch norm before it computes now."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self)["original"] = original  # not a child: it takes no part in the model any more

    def extra_repr(self) -> str:
        return "in the batch norm before it"


def calls_in_sequential(module: nn.Sequential) -> Iterator[tuple[nn.Module, Call]]:
    """Yield (batch norm, call) for the batch norms among the children of an nn.Sequential."""
    children = list(module._modules.items())
    for i, (_, norm) in enumerate(children):
        if not isinstance(norm, FusedBatchNorm1d):
            continue
        key, follower = children[i + 1] if i + 1 < len(children) else ("", None)
        activation = None if follower is None else activation_of_module(follower)
        if follower is None or activation is None:
            yield norm, Call(Activation(), reason="no activation follows")
        elif has_hooks(follower):
            yield norm, Call(Activation(), reason="the activation has hooks")
        else:

            def rewrite(key: str = key, follower: nn.Module = follower) -> None:
                module._modules[key] = FusedActivation(follower)

            yield norm, Call(activation, rewrite=rewrite)


# ---- a module with another forward ----


def _encode(value: Any) -> Any:
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("value", value)


def _decode(value: tuple[str, Any]) -> Any:
    return __import__("importlib").import_module(value[1]) if value[0] == "module" else value[1]


def _rebuild(original: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    kind = _subclass(original, source, names)
    return kind.__new__(kind)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    kind: Any = type(self)
    return (
        _rebuild,
        (kind.fused_from, kind.fused_source, kind.fused_names),
        getattr(self, "__getstate__", lambda: vars(self))(),
    )


def _subclass(original: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """Return a subclass of original whose forward is source, for debuggers and torch.jit.script readable as a file."""
    file = f"<bn_ext fused forward of {original.__name__} {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {name: _decode(value) for name, value in names.items()}
    exec(compile(source, file, "exec"), scope)  # torch.fx's own code, as in its GraphModule
    members = {
        "forward": scope["forward"], "__reduce_ex__": _reduce, "__module__": original.__module__,
        "fused_from": original, "fused_source": source, "fused_names": names,
    }  # fmt: skip
    return type(f"Fused{original.__name__}", (original,), members)


def _give_forward(module: nn.Module, graph: fx.Graph) -> None:
    code = graph.python_code("self")
    names = {name: _encode(value) for name, value in code.globals.items()}
    module.__class__ = _subclass(type(module), code.src, names)


# ---- a whole model ----


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the batch norms that module's own forward calls: its children, and theirs where these are mere lists."""
    for child in module.children():
        if isinstance(child, FusedBatchNorm1d):
            yield child
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own(child)


def _objection(norm: FusedBatchNorm1d, calls: list[Call]) -> str:
    if not calls:
        return "no call of it was found"
    for call in calls:
        if call.reason:
            return call.reason
    if has_hooks(norm):
        return "it has hooks"
    if norm.activation is not None:
        return "it has an activation"
    if any(call.activation != calls[0].activation for call in calls):
        return "its calls are followed by different activations"
    return ""


def _collect(model: nn.Module) -> tuple[dict[FusedBatchNorm1d, list[Call]], dict[nn.Module, fx.Graph]]:
    """Return the calls of every batch norm of model, and the graphs of the modules that make them."""
    calls: dict[Any, list[Call]] = {m: [] for m in model.modules() if isinstance(m, FusedBatchNorm1d)}
    graphs: dict[nn.Module, fx.Graph] = {}
    for module in model.modules():
        if module in calls or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if not any(m in calls for m in module.modules()):
            continue
        if type(module) is nn.Sequential:
            found = calls_in_sequential(module)
        else:
            try:
                graphs[module] = trace(module)
            except ValueError as error:
                for norm in _own(module):
                    calls[norm].append(Call(Activation(), reason=str(error)))
                continue
            found = calls_in_graph(module, graphs[module])
        for norm, call in found:
            calls[norm].append(call)
    return calls, graphs


def fuse(model: nn.Module) -> list[Fusion]:
    """Fuse what follows the FusedBatchNorm1d modules of model, in place; return what was done and what was not."""
    names = {module: name for name, module in model.named_modules()}
    calls, graphs = _collect(model)
    report, owners = [], set()
    for norm, places in calls.items():
        reason = _objection(norm, places)
        adds = any(call.adds for call in places)
        if not reason:
            for call in places:
                assert call.rewrite is not None
                call.rewrite()
                owners.add(call.owner)
            norm._set_activation(places[0].activation.name, places[0].activation.negative_slope)
            vars(norm)["_fused_by_convert"] = True
        computes = "batch norm" + (" + residual" if adds and not reason else "")
        computes = computes if norm.activation is None else f"{norm.activation}({computes})"
        report.append(Fusion(names[norm], computes, reason))
        logger.info("%s: %s%s", names[norm], computes, f", not fused: {reason}" if reason else "")
    for module, graph in graphs.items():
        if module in owners:
            _give_forward(module, graph)
    vars(model)["_bn_ext_fusion_report"] = report
    return report


def unfuse(model: nn.Module) -> None:
    """Undo fuse, in place."""
    for module in model.modules():
        kind = type(module)
        if "fused_from" in vars(kind):
            module.__class__ = kind.fused_from  # type: ignore[attr-defined]
        for key, child in module._modules.items():
            if isinstance(child, FusedActivation):
                module._modules[key] = vars(child)["original"]
        if isinstance(module, FusedBatchNorm1d) and vars(module).pop("_fused_by_convert", False):
            module._set_activation(None)
    vars(model).pop("_bn_ext_fusion_report", None)


def fusion_report(model: nn.Module) -> list[Fusion]:
    """Return what bn_ext.convert(model, fuse=True) did, one Fusion for each batch norm; empty where it did not run."""
    return list(vars(model).get("_bn_ext_fusion_report", ()))


__all__ = ["Fusion", "fuse", "fusion_report", "unfuse"]
