"""Attributes set, deleted and converted, counts of any type, state loaded and averaged: as with nn.BatchNorm1d."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bn_ext
from drop_in import (
    CLASSES,
    F64,
    FUSED,
    NAMES,
    NATIVE,
    Norm,
    Raised,
    both,
    compare,
    held,
    life,
    outcome,
    ran,
    several,
)
from support import BIAS_OPTION, make, module_for, name_of, normal

try:
    from test_moduleinfo import COUNT
except pytest.skip.Exception:  # its inputs are torch's own, which need a package that may be missing
    COUNT = 0


# ---- attributes that are set or deleted ----

SETTABLE = (*NAMES, "eps", "momentum", "affine", "track_running_stats", "num_features", "training")
VALUES: dict[str, Callable[[str], Any]] = {
    "none": lambda d: None,
    "true": lambda d: True,
    "false": lambda d: False,
    "zero": lambda d: 0,
    "one": lambda d: 1,
    "number": lambda d: 0.25,
    "text": lambda d: "text",
    "list": lambda d: [0.5],
    "scalar": lambda d: torch.tensor(0.25, dtype=F64, device=d),
    "scalar_parameter": lambda d: nn.Parameter(torch.tensor(0.25, dtype=F64, device=d)),
    "vector": lambda d: torch.full((5,), 0.5, dtype=F64, device=d),
    "row": lambda d: torch.full((1, 5), 0.5, dtype=F64, device=d),
    "float32": lambda d: torch.full((5,), 0.5, device=d),
    "parameter": lambda d: nn.Parameter(torch.full((5,), 0.5, dtype=F64, device=d)),
    "buffer": lambda d: nn.Buffer(torch.full((5,), 0.5, dtype=F64, device=d)),
    "module": lambda d: nn.Identity(),
}


def put(name: str, value: Any) -> Callable[[Any], object]:
    def change(module: Any) -> None:
        if value == "deleted":
            delattr(module, name)
        else:
            setattr(module, name, VALUES[value](str(next(module.parameters()).device)))

    return change


def deeds(module: Any) -> list[object]:
    """What else goes by attributes, each on a module of its own where it changes something."""

    def done(call: Callable[[Any], Any]) -> object:
        other = copy.deepcopy(module)
        call(other)
        return held(other), repr(other), list(other.state_dict())

    calls = (Norm.reset_running_stats, Norm.reset_parameters, Norm.half, Norm.eval, Norm.zero_grad, pickle.dumps)
    return [outcome(lambda c=c: done(c)) for c in calls]


# Statistics of another type than the input's, or of another shape with as many values, are welcome to ours: README.md
# says so. Of two things wrong with a value either may be named.
ELSEWHERE = ("float32", "row", "scalar_parameter")
SETTINGS = [(n, v) for n in SETTABLE for v in (*VALUES, "deleted") if not (n.startswith("running") and v in ELSEWHERE)]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_attribute_set(device: str, name: str, value: str, training: bool) -> None:
    compare(put(name, value), training, device)
    compare(several(put(name, value), deeds), training, device)


@pytest.mark.parametrize("value", ["none", "deleted"])
@pytest.mark.parametrize("other", ["none", "deleted", "false"])
@pytest.mark.parametrize("name", NAMES)
def test_attribute_gone_that_may_not_be_looked_at(
    device: str, name: str, value: str, other: str, training: bool
) -> None:
    for second in ("track_running_stats", "momentum", "running_mean", "running_var"):
        if (value, other) != ("deleted", "deleted"):  # where two are missing, either may be named
            compare(several(put(name, value), put(second, other)), training, device)


def test_what_instances_and_classes_have(device: str) -> None:
    """Nothing is left out, and nothing is there that a subclass or a saved module could stumble over."""
    ours, native = (module_for(cls, 5, device) for cls in CLASSES)
    assert vars(ours).keys() - vars(native).keys() == {"__module__"} and vars(native).keys() <= vars(ours).keys()
    assert not set(dir(native)) - set(dir(ours))
    features = {"virtual_batch_size", "allow_single_value"}
    assert {name for name in set(dir(ours)) - set(dir(native)) if not name.startswith("_")} == features
    for name in ("__constants__", "_version", "__setstate__", "_get_name", "_load_from_state_dict", "_check_input_dim"):
        mine, theirs = getattr(ours, name), getattr(native, name)
        assert getattr(mine, "__func__", mine) == getattr(theirs, "__func__", theirs) or name == "_get_name"
    assert issubclass(FUSED, NATIVE) and isinstance(ours, nn.modules.batchnorm._BatchNorm)


# ---- num_batches_tracked that is not one int64 ----

COUNT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.int8,
                torch.uint8, torch.complex64, torch.bool, torch.int64)  # fmt: skip
COUNT_SHAPES = {"scalar": (), "one": (1,), "two": (2,), "none": (0,), "square": (1, 1)}
COUNTS: dict[str, Callable[[str], Any]] = {
    f"{name_of(dtype)}-{name}": lambda d, t=dtype, s=shape: torch.full(s, 1, dtype=t, device=d)
    for dtype in COUNT_DTYPES
    for name, shape in COUNT_SHAPES.items()
} | {
    "expanded": lambda d: torch.full((1,), 2.0, device=d).expand(3),
    "expanded_int64": lambda d: torch.full((1,), 2, device=d).expand(3),
    "strided": lambda d: torch.zeros(4, device=d)[::2],
    "minus_one": lambda d: torch.tensor(-1, device=d),
    "minus_one_float": lambda d: torch.tensor(-1.0, device=d),
    "uint8_full": lambda d: torch.tensor(255, dtype=torch.uint8, device=d),
    "int8_full": lambda d: torch.tensor(127, dtype=torch.int8, device=d),
    "int64_full": lambda d: torch.tensor(2**63 - 1, device=d),
    "int64_large": lambda d: torch.tensor(2**53 + 1, device=d),
    "float16_stuck": lambda d: torch.tensor(2048.0, dtype=torch.float16, device=d),
    "infinite": lambda d: torch.tensor(float("inf"), device=d),
    "nan": lambda d: torch.tensor(float("nan"), device=d),
    "imaginary": lambda d: torch.tensor(1 + 2j, device=d),
    "requires_grad": lambda d: torch.tensor(1.0, requires_grad=True, device=d),
    "with_history": lambda d: torch.tensor(1.0, requires_grad=True, device=d) * 1,
    "meta": lambda d: torch.tensor(1.0, device="meta"),
    "number": lambda d: 3,
}


def counted(cls: type[Norm], device: str, count: Callable[[str], Any], momentum: float | None, way: str) -> object:
    """Three batches with a count of this kind, or until one of them is refused."""
    norm = module_for(cls, 5, device, dtype=F64, momentum=momentum)
    model = nn.Sequential(norm, nn.ReLU())
    norm.num_batches_tracked = None
    norm._buffers["num_batches_tracked"] = count(device)
    if way == "fused":
        bn_ext.convert(model, fuse=True)
    seen: list[Any] = []
    for shape in ((6, 5), (4, 5, 3), (0, 5)):
        step = life(norm, lambda m: None, normal(shape, F64, device).requires_grad_(), lambda m, x: ran(model, x))
        seen.append(step)
        if any(isinstance(part, Raised) for part in step):
            break
    return seen


@pytest.mark.parametrize("way", ["alone", "fused"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_count_of_any_kind(device: str, count: Callable[[str], Any], momentum: float | None, way: str) -> None:
    if momentum is None and count is COUNTS["with_history"]:
        pytest.skip("torch warns of the detour that native takes to a number")
    beyond = (COUNTS[name] for name in ("minus_one", "int64_full", "int64_large"))
    if momentum is None and count in beyond and device.startswith("cuda") and way == "alone":
        pytest.skip("CUDA's kernels average by counts that a training gets to (docs/drop-in.md)")
    both(
        lambda cls: counted(cls if way == "alone" else FUSED if cls is FUSED else NATIVE, device, count, momentum, way)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", ["float32-scalar", "bfloat16-one", "int32-scalar", "uint8-scalar", "float64-two"])
def test_count_of_any_kind_compiled(device: str, count: str, momentum: float | None) -> None:
    """What raises in a graph is worded by the compiler, for native in other words: only that it raises counts."""

    def scenario(cls: type[Norm]) -> object:
        torch._dynamo.reset()
        norm = module_for(cls, 5, device, dtype=F64, momentum=momentum)
        norm.num_batches_tracked = COUNTS[count](device)
        before = norm.num_batches_tracked.clone()
        model = torch.compile(norm, backend="aot_eager")
        results = [
            outcome(lambda s=s: ran(model, normal((6, 5), F64, device, seed=s).requires_grad_())) for s in (0, 1)
        ]
        if any(isinstance(result, Raised) for result in results):
            assert cls is NATIVE or torch.equal(norm.num_batches_tracked, before)
            return [isinstance(result, Raised) for result in results]
        return results, held(norm)

    both(scenario)


# ---- state dictionaries of other types, and averages ----


def network(cls: type[Norm], device: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), module_for(cls, 5, **options), nn.ReLU(), module_for(cls, 5, **options), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(device, F64)


def trained(model: nn.Module, device: str, steps: int = 3) -> list[object]:
    """Outputs and state of some steps in training, then in evaluation."""
    seen: list[object] = []
    for seed in range(steps):
        seen.append(outcome(lambda s=seed: ran(model.train(), normal((8, 6), F64, device, seed=s).requires_grad_())))
    seen.append(outcome(lambda: ran(model.eval(), normal((8, 6), F64, device, seed=9).requires_grad_())))
    return [seen, list(model.state_dict().items())]


STATES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "same": lambda s: s,
    "double": lambda s: {k: v.double() for k, v in s.items()},
    "half": lambda s: {k: v.half() for k, v in s.items()},
    "counts_float": lambda s: {k: v.float() if "num" in k else v for k, v in s.items()},
    "counts_int32": lambda s: {k: v.int() if "num" in k else v for k, v in s.items()},
    "counts_of_one_element": lambda s: {k: v.reshape(1) if "num" in k else v for k, v in s.items()},
    "counts_missing": lambda s: {k: v for k, v in s.items() if "num" not in k},
    "statistics_missing": lambda s: {k: v for k, v in s.items() if "running" not in k},
    "too_long": lambda s: {k: torch.cat([v, v]) if "1.running" in k else v for k, v in s.items()},
    "no_tensor": lambda s: {k: 3 if k == "1.bias" else v for k, v in s.items()},
    "parameters": lambda s: {k: nn.Parameter(v) if "bias" in k else v for k, v in s.items()},
    "more": lambda s: {**s, "1.more": s["1.bias"]},
    "meta": lambda s: {k: v.to("meta") for k, v in s.items()},
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("state", STATES)
def test_state_of_any_type(device: str, state: str, assign: bool, momentum: float | None) -> None:
    for strict in (True, False):
        for version in (None, 1, 2):

            def scenario(cls: type[Norm], strict: bool = strict, version: int | None = version) -> object:
                source = network(NATIVE, device)
                source(normal((8, 6), F64, device, seed=5))
                given: Any = STATES[state]({k: v.detach().clone() for k, v in source.state_dict().items()})
                if version is not None:
                    given = type(source.state_dict())(given)
                    given._metadata = {"1": {"version": version}, "3": {"version": version}}
                model = network(cls, device, momentum=momentum)
                result = outcome(lambda: model.load_state_dict(given, strict=strict, assign=assign))
                refused = isinstance(result, Raised) or state == "meta"
                return str(result), None if refused else trained(model, device)

            both(scenario)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_state_between_modules_of_other_options(device: str, options: dict[str, Any]) -> None:
    if "bias" in options and not BIAS_OPTION:
        pytest.skip("batch norms of this torch have no option bias")

    def scenario(cls: type[Norm]) -> object:
        plain, other = module_for(cls, 5, device), module_for(cls, 5, device, **options)
        bare = make(cls, 5, device="meta", **options)
        seen = []
        for target, source in ((plain, other), (other, plain), (bare, other), (bare, plain)):
            for given in ({}, {"strict": False}, {"assign": True}):
                seen.append(outcome(lambda t=target, s=source, g=given: str(t.load_state_dict(s.state_dict(), **g))))
            seen.append(held(target))
        return seen

    both(scenario)


AVERAGES: dict[str, dict[str, Any]] = {
    "equal": {},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "own": {"avg_fn": lambda old, new, n: (old + new) / 2},
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_with_buffers(device: str, average: str, momentum: float | None) -> None:
    """The average trains on, has its statistics made anew, and is saved: with whatever type its counts have by then."""

    def scenario(cls: type[Norm]) -> object:
        model = network(cls, device, momentum=momentum)
        averaged = AveragedModel(model, use_buffers=True, **AVERAGES[average])
        for seed in range(3):
            trained(model, device, 1 + seed)
            averaged.update_parameters(model)
        seen = [list(averaged.state_dict().items()), outcome(lambda: trained(averaged, device))]
        batches = [(normal((8, 6), F64, device, seed=k), k) for k in range(3)]
        seen.append(outcome(lambda: update_bn(batches, averaged, device=torch.device(device))))
        seen.append([m.momentum for m in averaged.modules() if isinstance(m, NATIVE)])
        other = network(cls, device, momentum=momentum)
        seen.append(str(outcome(lambda: other.load_state_dict(averaged.module.state_dict(), assign=True))))
        return seen, trained(averaged, device), trained(other, device)

    both(scenario)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", COUNT_DTYPES, ids=name_of)
def test_statistics_made_anew_from_a_module_of_one_type(
    device: str, dtype: torch.dtype, momentum: float | None
) -> None:
    """module.type() converts the count as well; update_bn then resets and fills what it finds."""

    def scenario(cls: type[Norm]) -> object:
        model = network(cls, device, momentum=momentum)
        outcome(lambda: model[1].type(dtype))
        model[1].to(F64)
        batches = [normal((8, 6), F64, device, seed=k) for k in range(3)]
        seen = outcome(lambda: update_bn(batches, model))
        return seen if isinstance(seen, Raised) else (seen, trained(model, device))

    both(scenario)
