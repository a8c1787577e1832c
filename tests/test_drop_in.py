"""Every public attribute and method of nn.BatchNorm1d asked of both classes: same result, error, warning and effect."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from drop_in import F64, NAMES, batch_for, compare, outcome, ran, several, words

# ---- attributes and methods by name ----


def returned_itself(name: str, *arguments: Any, **options: Any) -> Callable[[Any], object]:
    """Whether a method returns the module, and whether the module's tensors stayed the objects that they were."""

    def ask(module: Any) -> object:
        before = {k: getattr(module, k) for k in NAMES}
        result = getattr(module, name)(*arguments, **options)
        return result is module, {k: before[k] is getattr(module, k) for k in NAMES}

    return ask


def listed(name: str, **options: Any) -> Callable[[Any], object]:
    def ask(module: Any) -> object:
        module.add_module("tail", nn.Linear(2, 2))
        module.again = module.weight  # one parameter under two names
        return list(getattr(module, name)(**options))

    return ask


def through_a_hook(name: str, **options: Any) -> Callable[[Any], object]:
    """What a hook of this kind is told during a call and a backward, and what it changes in them."""

    def ask(module: Any) -> object:
        seen: list[Any] = []

        def hook(*arguments: Any) -> Any:
            seen.append(arguments)
            if "backward" in name:
                grads = arguments[1]
                return tuple(None if g is None else g * 2 for g in grads)
            if "forward_pre" in name:
                return ((arguments[1][0] + 1,), {}) if "with_kwargs" in options else (arguments[1][0] + 1,)
            return arguments[-1] * 2

        handle = getattr(module, name)(hook, **options)
        results = [ran(module, batch_for(module))]
        handle.remove()
        results.append(ran(module, batch_for(module)))
        # The oldest kind of hook sees what goes into the last node of the graph, which are all of an operator's inputs.
        return type(handle), results, len(seen) if name == "register_backward_hook" else seen

    return ask


def state_hooks(name: str) -> Callable[[Any], object]:
    def ask(module: Any) -> object:
        seen: list[Any] = []
        handle = getattr(module, name)(lambda *a: seen.append([words(str(type(x))) for x in a]))
        keys = module.load_state_dict(module.state_dict(prefix="")), list(module.state_dict(prefix="a."))
        handle.remove()
        module.state_dict()
        return seen, [*map(str, keys)]

    return ask


def compiled(module: Any) -> object:
    torch._dynamo.reset()
    module.compile(backend="eager")
    result = ran(module, batch_for(module))
    return list(module.state_dict()), result, pickle.loads(pickle.dumps(module))


def loaded(module: Any) -> object:
    good = {k: v + 1 for k, v in module.state_dict().items()}
    cases = [
        (good, {}), (good, {"assign": True}), ({**good, "more": good["bias"]}, {}), ({}, {}), ({}, {"strict": False}),
        ({**good, "bias": torch.zeros(4)}, {"strict": False}), ({**good, "bias": 3}, {}), (3, {}),
        ({**good, "num_batches_tracked": torch.tensor([3])}, {}),
    ]  # fmt: skip
    return [outcome(lambda c=c, o=o: str(module.load_state_dict(c, **o))) for c, o in cases]


def emptied(module: Any) -> object:
    result = module.to_empty(device=module.weight.device)
    module.reset_parameters()  # what was there is not to be compared
    return result is module, outcome(module.to_empty)


def gradients_zeroed(module: Any) -> object:
    ran(module, batch_for(module))
    module.zero_grad(set_to_none=False)
    zeros = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return zeros, [p.grad for p in module.parameters()]


ASK: dict[str, Callable[[Any], object]] = {
    "add_module": several(
        lambda m: m.add_module("extra", nn.Linear(2, 2)), lambda m: m.add_module("a.b", None),
        lambda m: m.add_module("", None), lambda m: m.add_module("weight", None), lambda m: m.add_module("x", 3),
        lambda m: [name for name, _ in m.named_modules()],
    ),
    "apply": lambda m: (m.apply(lambda k: k.register_buffer("seen", torch.ones(1))) is m, list(m.state_dict())),
    "compile": compiled,
    "eval": lambda m: (m.eval() is m, m.training),
    "extra_repr": several(lambda m: m.extra_repr(), repr, str),
    "forward": several(
        lambda m: m.forward(batch_for(m)), lambda m: m(input=batch_for(m)), lambda m: m.forward(),
        lambda m: m(batch_for(m), 1), lambda m: m(x=1),
    ),
    "get_buffer": several(*(lambda m, n=n: m.get_buffer(n) for n in (*NAMES, "none", "a.b", ""))),
    "get_extra_state": lambda m: m.get_extra_state(),
    "get_parameter": several(*(lambda m, n=n: m.get_parameter(n) for n in (*NAMES, "none", "a.b", ""))),
    "get_submodule": several(*(lambda m, n=n: m.get_submodule(n) for n in ("", "weight", "none", "a.b"))),
    "load_state_dict": loaded,
    "register_buffer": several(
        lambda m: m.register_buffer("extra", torch.ones(2), persistent=False), lambda m: m.register_buffer("a.b", None),
        lambda m: m.register_buffer("", None), lambda m: m.register_buffer("weight", None),
        lambda m: m.register_buffer("x", 3), lambda m: m.register_buffer(3, None),
        lambda m: m.register_buffer("running_mean", torch.full((5,), 0.5, dtype=F64), persistent=False),
        lambda m: list(m.state_dict()),
    ),
    "register_parameter": several(
        lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))), lambda m: m.register_parameter("x", 3),
        lambda m: m.register_parameter("a.b", None), lambda m: m.register_parameter("running_mean", None),
        lambda m: m.register_parameter("x", torch.ones(2)), lambda m: m.register_parameter("bias", None),
        lambda m: list(m.state_dict()),
    ),
    "reset_parameters": several(lambda m: ran(m, batch_for(m)), lambda m: m.reset_parameters()),
    "reset_running_stats": several(lambda m: ran(m, batch_for(m)), lambda m: m.reset_running_stats()),
    "set_extra_state": lambda m: m.set_extra_state({}),
    "set_submodule": several(
        *(lambda m, n=n: m.set_submodule(n, nn.ReLU()) for n in ("extra", "", "weight", "no.where")),
        lambda m: m.set_submodule("extra", nn.Tanh(), strict=True), lambda m: m.set_submodule("other", 3),
        lambda m: list(m.named_children()),
    ),
    "share_memory": lambda m: (m.share_memory() is m, [t.is_shared() for t in m.state_dict().values()]),
    "state_dict": several(
        lambda m: m.state_dict(), lambda m: m.state_dict(prefix="a."), lambda m: m.state_dict(keep_vars=True),
        lambda m: m.state_dict({}, "b.", True), lambda m: m.state_dict(destination={"c": 1}),
        lambda m: dict(m.state_dict()._metadata), lambda m: m.state_dict(1, 2, 3, 4),
    ),
    "to": several(
        *(returned_itself("to", *a) for a in ((), ("cpu",), (torch.float32,), (torch.zeros(1),), (F64, True), (1.5,))),
        returned_itself("to", torch.int64), returned_itself("to", "nowhere"), returned_itself("to", torch.complex64),
        lambda m: m.double() is m, returned_itself("to", memory_format=torch.channels_last),
        returned_itself("to", device="meta", dtype=torch.float16), lambda m: m.to("cpu"),
        lambda m: (m.to_empty(device="cpu").double(), m.reset_parameters())[1],
    ),
    "to_empty": emptied,
    "train": several(lambda m: m.train() is m, lambda m: m.train(False).training, lambda m: m.train(1)),
    "type": returned_itself("type", torch.float32),
    "zero_grad": gradients_zeroed,
}  # fmt: skip
for _name in ("buffers", "children", "modules", "named_children", "parameters"):
    ASK[_name] = listed(_name)
for _name in ("named_buffers", "named_modules", "named_parameters"):
    ASK[_name] = listed(_name, prefix="a", remove_duplicate=False)
for _name in ("bfloat16", "cpu", "cuda", "double", "float", "half", "ipu", "mtia", "xpu", "requires_grad_"):
    ASK[_name] = returned_itself(_name)
PLAIN = ("T_destination", "affine", "bias", "call_super_init", "dump_patches", "eps", "momentum", "num_features")
STATE = ("num_batches_tracked", "running_mean", "running_var", "track_running_stats", "training", "weight")
for _name in (*PLAIN, *STATE):
    ASK[_name] = lambda m, n=_name: getattr(m, n)
for _name in ("backward", "forward", "forward_pre", "full_backward", "full_backward_pre"):
    ASK[f"register_{_name}_hook"] = through_a_hook(f"register_{_name}_hook")
for _name in ("load_state_dict_post", "load_state_dict_pre", "state_dict_post", "state_dict_pre"):
    ASK[f"register_{_name}_hook"] = state_hooks(f"register_{_name}_hook")
ASK["register_module"] = ASK["add_module"]
PUBLIC = [name for name in dir(nn.BatchNorm1d(3)) if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(device: str, name: str, training: bool) -> None:
    assert name in ASK, f"nn.BatchNorm1d has {name}, and nobody asks whether ours does the same"
    compare(ASK[name], training, device)


# ---- hooks with options, several hooks, hooks that raise, hooks for all modules ----

HOOKS = {
    "forward": ({"prepend": True}, {"with_kwargs": True}, {"always_call": True}),
    "forward_pre": ({"prepend": True}, {"with_kwargs": True}),
    "full_backward": ({"prepend": True},),
    "full_backward_pre": ({"prepend": True},),
}
HOOK_CASES = [(kind, options) for kind, cases in HOOKS.items() for options in cases]


@pytest.mark.parametrize(("kind", "options"), HOOK_CASES, ids=[f"{k}-{next(iter(o))}" for k, o in HOOK_CASES])
def test_hook_options(device: str, kind: str, options: dict[str, bool], training: bool) -> None:
    register = f"register_{kind}_hook"

    def two(module: Any) -> object:
        seen: list[str] = []
        getattr(module, register)(lambda *a: seen.append("first"))
        getattr(module, register)(lambda *a: seen.append(f"second of {len(a)}"), **options)
        x = batch_for(module)
        output = module(input=x) if "with_kwargs" in options else module(x)
        output.sum().backward()
        return seen, outcome(lambda: module(x[0])), seen

    def raises(module: Any) -> object:
        def hook(*arguments: Any) -> None:
            raise KeyError("a hook's own error")

        before = module.num_batches_tracked.clone()
        handle = getattr(module, register)(hook, **options)
        result = outcome(lambda: ran(module, batch_for(module)))
        handle.remove()
        return result, module.num_batches_tracked - before

    def removes_itself(module: Any) -> object:
        seen: list[int] = []
        handle = getattr(module, register)(lambda *a: (seen.append(1), handle.remove())[1], **options)
        return [ran(module, batch_for(module)) for _ in range(2)], seen

    for change in (through_a_hook(register, **options), two, raises, removes_itself):
        compare(change, training, device)


GLOBAL_HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre", "backward",
                "buffer_registration", "parameter_registration", "module_registration")  # fmt: skip


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_of_all_modules(device: str, kind: str, training: bool) -> None:
    def change(module: Any) -> object:
        seen: list[Any] = []
        register = getattr(nn.modules.module, f"register_module_{kind}_hook")
        handle = register(lambda *a: seen.append([x if isinstance(x, str) else words(str(type(x))) for x in a]))
        try:
            type(module)(3)
            result = ran(nn.Sequential(nn.Identity(), module), batch_for(module))
        finally:
            handle.remove()
        return seen, result

    compare(change, training, device)
