"""At a call: batch norm, addition and activation in one pass where that is the same, else one after the other.

Nothing here is decided before the call. A module that is of another type, has hooks, was compiled or has a forward of
its own by now is called as torch would call it; so is everything under torch.fx, a TorchFunctionMode, vmap and jvp.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import by_operator, choose, fits, modes_listen
from ..modules import FusedBatchNorm1d, options_of, state_of

Activation = tuple[str, float]  # the operators' activation and negative_slope

# ---- what is known, as it was at import: who replaces any of it gets his own ----

_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_FORWARD = FusedBatchNorm1d.forward
_FUNCTIONAL = vars(F)
_LIST_ITERATION = nn.ModuleList.__iter__
# By the module's type: name, forward, and the function that this calls, by its name in torch.nn.functional.
_ACTIVATION_MODULES: dict[type[nn.Module], tuple[str, Any, Any]] = {
    nn.ReLU: ("relu", nn.ReLU.forward, F.relu),
    nn.LeakyReLU: ("leaky_relu", nn.LeakyReLU.forward, F.leaky_relu),
    nn.SiLU: ("silu", nn.SiLU.forward, F.silu),
    nn.GELU: ("gelu", nn.GELU.forward, F.gelu),
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
ACTIVATION_METHODS: dict[str, tuple[str, Any]] = {"relu": ("relu", Tensor.relu), "relu_": ("relu", Tensor.relu_)}
ADDITION_METHODS: dict[str, tuple[Any, Any]] = {"add": (torch.add, Tensor.add), "add_": (operator.iadd, Tensor.add_)}
# What an activation's function takes behind its input, by position.
_OPTIONS: dict[Any, tuple[str, ...]] = {
    F.relu: ("inplace",), F.silu: ("inplace",), F.leaky_relu: ("negative_slope", "inplace"),
    F.leaky_relu_: ("negative_slope",), F.gelu: (),
}  # fmt: skip
KEEPS_RESIDUAL = ("silu", "gelu")  # their derivative needs the sum; torch's own operations keep that, not the residual
ADDITIONS = (operator.add, operator.iadd, torch.add)


def listens(module: nn.Module) -> object:
    """Return what is true if somebody listens to calls of module, or has given it, or its class, others than torch's.

    torch.export puts its own around nn.Module's, to record scopes.
    """
    state, kind = module.__dict__, type(module)
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_call_impl" in state
        or "_compiled_call_impl" in state
        or ((kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL) and not is_compiling())
    )


def is_norm(module: Any) -> bool:
    """Return whether a call of module is that of FusedBatchNorm1d and nothing else, here and now."""
    kind = type(module)
    return kind is FusedBatchNorm1d and kind.forward is _FORWARD and not listens(module)


def activation_of(
    function: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None
) -> Activation | None:
    """Return what function(x, *args, **options) computes, a module or a function of torch's, or None for the rest."""
    kind = type(function)
    known = _ACTIVATION_MODULES.get(kind)
    if known is not None:
        name, forward, called = known
        if args or options or kind.forward is not forward or _FUNCTIONAL[name] is not called or listens(function):
            return None
        if name == "leaky_relu":
            return _leaky(function.negative_slope, function.inplace)
        return None if name == "gelu" and function.approximate != "none" else (name, 0.0)
    if kind is not FunctionType and kind is not BuiltinFunctionType:
        return None
    named = _ACTIVATION_FUNCTIONS.get(function)
    if named is None:
        return None
    if not args and not options:
        return (named, 0.01 if named == "leaky_relu" else 0.0)
    return _activation_with(function, named, args, options or {})


def _activation_with(function: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Activation | None:
    """The same of a function of torch's that is called with more than its input."""
    names = _OPTIONS.get(function, ())
    given = {**dict(zip(names, args)), **options}  # noqa: B905 (too many: not accepted below)
    if len(args) > len(names) or len(given) < len(args) + len(options):
        return None
    if name == "gelu":
        return (name, 0.0) if given == {"approximate": "none"} else None
    inplace = given.pop("inplace", False)
    if name == "leaky_relu" and given.keys() <= {"negative_slope"}:
        return _leaky(given.get("negative_slope", 0.01), inplace)
    return (name, 0.0) if not given and type(inplace) is bool else None


def _leaky(slope: Any, inplace: Any) -> Activation | None:
    """leaky_relu of a slope that is a number; a negative one in place has no gradient in torch, so it is torch's."""
    if type(slope) not in (int, float) or not 0 <= slope < math.inf or type(inplace) is not bool:
        return None
    return ("leaky_relu", float(slope))


def undisturbed(input: Any) -> bool:
    """Return whether the operators compute batch norm of input here, and nothing watches torch's functions."""
    if not isinstance(input, Tensor) or choose(input, True) is not by_operator or not 2 <= input.dim() <= 3:
        return False
    if not _has_any_global_hook() and not (is_compiling() and modes_listen()):
        return True
    return is_exporting()  # which has modes of its own on


def addable(input: Tensor, residual: Any) -> bool:
    """Return whether residual is a tensor that the kernels add to the batch norm of input as it is.

    Not in what torch.jit.trace records, where the next residual may have another shape.
    """
    if not is_compiling() and _get_tracing_state():
        return False
    kind = type(residual)
    return (kind is Tensor or kind is type(input) or kind is nn.Parameter) and fits(input, residual)


def compute(
    norm: FusedBatchNorm1d,
    input: Tensor,
    residual: Tensor | None,
    activation: Activation,
    valid: Tensor | None = None,
) -> Tensor | None:
    """Return act(norm(input) + residual) in one pass, or None where there is no kernel and nothing has changed.

    norm is_norm, input is undisturbed, residual addable.
    """
    if residual is not None and torch.is_grad_enabled() and not is_compiling() and residual.is_inference():
        return None  # autograd cannot keep it
    return by_operator(input, *state_of(norm), residual, *activation, valid=valid, **options_of(norm))


def _records(*tensors: Tensor | None) -> bool:
    """Return whether autograd records what is computed of tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- norm, then activation: f(norm(x)), the helper of a rewritten expression ----


def pair(function: Any, norm: Any, input: Any, *args: Any, **options: Any) -> Any:
    """Return function(norm(input), *args, **options), in one pass where that is the same."""
    if is_norm(norm):
        activation = activation_of(function, args, options) if undisturbed(input) else None
        output = None if activation is None else compute(norm, input, None, activation)
        return function(norm(input), *args, **options) if output is None else output
    return act(function, begin(norm, input), *args, **options)


# ---- the same in steps, for what lies in several statements or has an addition between ----


class Pending:
    """norm(input), or add(norm(input), residual), whose computation waits for what follows it."""

    def __init__(self, norm: FusedBatchNorm1d, input: Tensor) -> None:
        self.norm, self.input = norm, input
        self.add: Callable[[Any, Any], Any] | None = None
        self.residual: Tensor | None = None
        self.first = True  # whether the batch norm is the addition's first operand

    def value(self) -> Any:
        """Compute it, as the model's own code would have."""
        output = self.norm(self.input)
        if self.add is None:
            return output
        return self.add(output, self.residual) if self.first else self.add(self.residual, output)

    def then(self, activation: Activation) -> Tensor | None:
        return compute(self.norm, self.input, self.residual, activation)

    def keeps_residual(self, activation: Activation) -> bool:
        """Return whether backward of the whole would read the residual, which the model may write until then."""
        if self.residual is None or activation[0] not in KEEPS_RESIDUAL:
            return False
        return _records(self.input, self.residual, self.norm.weight, self.norm.bias)


def begin(norm: Any, input: Any) -> Any:
    """Return norm(input), or what waits for the rest: nothing may run in between that could tell the difference.

    norm may also be a Sequential that ends with a batch norm: all but that is computed here.
    """
    if not is_norm(norm):
        if is_compiling() or not is_plain_sequential(norm):
            return norm(input)
        input, norm = run_sequential(norm._modules.values(), input, None)
        if norm is None:
            return input
    return Pending(norm, input) if undisturbed(input) else norm(input)


def step(layer: Any, value: Any, layers: Any) -> Any:
    """Return layer(value) in `for layer in layers: value = layer(value)`; value may wait, and the result then."""
    if type(value) is Pending:
        activation = activation_of(layer)
        output = None if activation is None else value.then(activation)
        if output is not None:
            return output
        value = value.value()
    # Between two elements of a ModuleList no code of the user's runs.
    listed = type(layers) is nn.ModuleList and nn.ModuleList.__iter__ is _LIST_ITERATION
    return begin(layer, value) if listed else layer(value)


def act(function: Any, value: Any, *args: Any, **options: Any) -> Any:
    """Return function(value, *args, **options); value may wait."""
    if type(value) is not Pending:
        return function(value, *args, **options)
    activation = activation_of(function, args, options)
    if activation is not None:
        if value.keeps_residual(activation):
            return function(finish(value), *args, **options)
        output = value.then(activation)
        if output is not None:
            return output
    return function(value.value(), *args, **options)


def act_method(name: str, value: Any) -> Any:
    """Return value.name(); value may wait."""
    if type(value) is not Pending:
        return getattr(value, name)()
    activation, method = ACTIVATION_METHODS[name]
    output = value.then((activation, 0.0)) if getattr(Tensor, name) is method else None
    return getattr(value.value(), name)() if output is None else output


def add(function: Any, left: Any, right: Any) -> Any:
    """Return function(left, right), one of which may wait; the sum may wait then."""
    if type(left) is Pending:
        value, other, first = left, right, True
    elif type(right) is Pending:
        value, other, first = right, left, False
    else:
        return function(left, right)
    if function in ADDITIONS and addable(value.input, other):
        value.add, value.residual, value.first = function, other, first
        return value
    value = value.value()
    return function(value, other) if first else function(other, value)


def add_method(name: str, left: Any, right: Any) -> Any:
    """Return left.name(right), name being add or add_; left may wait, and the sum then."""
    if type(left) is not Pending:
        return getattr(left, name)(right)
    addition, method = ADDITION_METHODS[name]
    if getattr(Tensor, name) is method and addable(left.input, right):
        left.add, left.residual = addition, right
        return left
    return getattr(left.value(), name)(right)


def finish(value: Any) -> Any:
    """Return value, which may wait for an activation that does not come."""
    if type(value) is not Pending:
        return value
    output = None if value.residual is None else value.then(("identity", 0.0))
    return value.value() if output is None else output


# ---- a Sequential ----

_SEQUENTIAL = (nn.Sequential.forward, nn.Sequential.__iter__)


def is_sequential(kind: Any) -> bool:
    """Return whether kind's forward is that of nn.Sequential, over its children."""
    return issubclass(kind, nn.Sequential) and (kind.forward, kind.__iter__) == _SEQUENTIAL


def is_plain_sequential(module: Any) -> bool:
    """Return whether a call of module calls its children one after the other and nothing else, here and now."""
    kind: Any = type(module)
    if not issubclass(kind, nn.Sequential):
        return False
    stale = getattr(kind.forward, "__bn_ext_stale__", None)  # of a class that parents.py has made
    if stale() if stale is not None else not (kind is nn.Sequential and is_sequential(kind)):
        return False
    return not listens(module) and not _has_any_global_hook()


def run_sequential(modules: Iterable[Any], input: Any, norm: Any) -> tuple[Any, Any]:
    """Call modules one after the other, a norm together with the activation behind it.

    Returns the value and, where the last module is a batch norm, that, not called yet; so is the argument norm.
    """
    for module in modules:
        if norm is not None:
            activation = activation_of(module)
            if activation is not None:
                output = compute(norm, input, None, activation) if undisturbed(input) else None
                input, norm = module(norm(input)) if output is None else output, None
                continue
        # In a graph the record of modules stays that of the model.
        if isinstance(module, nn.Sequential) and not is_compiling() and _opens_or_ends(module, norm):
            input, norm = run_sequential(module._modules.values(), input, norm)
            continue
        if norm is not None:
            input, norm = norm(input), None
        if is_norm(module):
            norm = module
        else:
            input = module(input)
    return input, norm


def _opens_or_ends(module: Any, norm: Any) -> bool:
    """Return whether module is a Sequential that begins with what may follow norm, or ends with a norm itself."""
    if not is_plain_sequential(module) or not module._modules:
        return False
    children = list(module._modules.values())
    first, last = children[0], children[-1]
    if norm is not None and (activation_of(first) is not None or _opens_or_ends(first, norm)):
        return True
    return is_norm(last) or _opens_or_ends(last, None)
