"""bn_ext._C.batch_norm, for eager calls: it does what torch.ops.bn_ext.batch_norm does, or leaves it alone."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bn_ext import _C, FusedBatchNorm1d, ops

C = 6
NAMES = ("input", "running_mean", "running_var", "weight", "bias", "num_batches_tracked", "training", "momentum", "eps",
         "residual", "activation", "negative_slope")  # fmt: skip


def arguments(**other: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    given = dict(zip(NAMES, (torch.randn(8, C), torch.randn(C), torch.rand(C) + 0.5, torch.randn(C), torch.randn(C),
                             torch.tensor(3), True, 0.2, 1e-5, None, "identity", 0.01), strict=True))  # fmt: skip
    return {**given, **other}


def by_operator(given: dict[str, Any]) -> Tensor:
    x, mean, var, weight, bias, *rest = given.values()
    return ops.batch_norm(x, weight, bias, mean, var, *rest)  # type: ignore[no-any-return]


CALLS: dict[str, dict[str, Any]] = {
    "training": {},
    "evaluation": {"training": False},
    "cumulative": {"momentum": None},
    "whole numbers": {"momentum": 1, "eps": 1},
    "without statistics": {"running_mean": None, "running_var": None, "num_batches_tracked": None},
    "without parameters": {"weight": None, "bias": None},
    "parameters": {"weight": nn.Parameter(torch.arange(1.0, C + 1)), "bias": nn.Parameter(torch.zeros(C))},
    "activated": {"activation": "leaky_relu", "negative_slope": 0.3},
    "residual": {"activation": "silu", "residual": torch.arange(8.0 * C).view(8, C) - 20},
    "evaluation of planes": {"training": False, "input": torch.arange(2.0 * C * 5).view(2, C, 5)},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_operators_bits(call: str) -> None:
    ours, theirs = arguments(**CALLS[call]), arguments(**CALLS[call])
    with torch.no_grad():
        output, expected = _C.batch_norm(*ours.values()), by_operator(theirs)
    assert torch.equal(output, expected)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert ours[name] is None or torch.equal(ours[name], theirs[name])


def test_what_has_a_default_may_be_left_out() -> None:
    given = list(arguments().values())[:9]
    assert torch.equal(_C.batch_norm(*given), by_operator(arguments()))


def test_autograd_sees_it() -> None:
    given = [arguments(weight=nn.Parameter(torch.ones(C))) for _ in range(2)]
    gradients = []
    for output, one in zip((_C.batch_norm(*given[0].values()), by_operator(given[1])), given, strict=True):
        assert output.grad_fn.name() == "BatchNormBackward"
        output.square().sum().backward()
        gradients.append(one["weight"].grad)
    assert torch.equal(*gradients)


class Sub(Tensor):
    pass


class Text(str):
    pass


with FakeTensorMode():
    FAKE = torch.empty(8, C)

UNUSUAL: dict[str, dict[str, Any]] = {
    **{f"{name} of a subclass": {name: torch.ones(C).as_subclass(Sub)} for name in NAMES[1:5]},
    "input of a subclass": {"input": torch.randn(8, C).as_subclass(Sub)},
    "residual of a subclass": {"residual": torch.randn(8, C).as_subclass(Sub)},
    "count of a subclass": {"num_batches_tracked": torch.tensor(1).as_subclass(Sub)},
    "a fake input": {"input": FAKE},
    "no input": {"input": None},
    "a list": {"input": [[1.0, 2.0]]},
    "training is a number": {"training": 1},
    "training is nothing": {"training": None},
    "momentum is a bool": {"momentum": True},
    "momentum of numpy": {"momentum": np.float32(0.5)},
    "momentum is a tensor": {"momentum": torch.tensor(0.5)},
    "eps is text": {"eps": "1e-5"},
    "eps is nothing": {"eps": None},
    "eps beyond double": {"eps": 10**400},
    "no mean in evaluation": {"running_mean": None, "training": False},
    "no variance in evaluation": {"running_var": None, "training": False},
    "activation is nothing": {"activation": None},
    "activation of a subclass": {"activation": Text("relu")},
    "activation that is no text": {"activation": "\ud800"},
    "slope is text": {"negative_slope": "0.1"},
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_the_unusual_is_left_alone(case: str) -> None:
    given = arguments(**UNUSUAL[case])
    kept = [None if given[name] is None else given[name].clone() for name in NAMES[1:3]]
    assert _C.batch_norm(*given.values()) is None
    for name, before in zip(NAMES[1:3], kept, strict=True):
        assert before is None or torch.equal(given[name], before)
    assert given["num_batches_tracked"].item() in (1, 3)


@pytest.mark.parametrize("count", [0, 1, 8, 14])
def test_too_few_and_too_many(count: int) -> None:
    assert _C.batch_norm(*[*arguments().values(), 2, 1][:count]) is None


@pytest.mark.parametrize("size", [None, True, 2.0, "2", 10**30])
def test_a_virtual_batch_size_that_is_no_number_is_left_to_the_operator(size: Any) -> None:
    given = arguments()
    assert _C.batch_norm(*given.values(), 2) is not None
    before = given["num_batches_tracked"].item()
    assert _C.batch_norm(*given.values(), size) is None
    assert given["num_batches_tracked"].item() == before


def test_a_trace_records_the_operator() -> None:
    norm = FusedBatchNorm1d(C).eval()
    traced = torch.jit.trace(norm, torch.randn(4, C))
    assert "bn_ext::batch_norm" in str(traced.graph)


ERRORS: dict[str, dict[str, Any]] = {
    "one value": {"input": torch.randn(1, C)},
    "rank": {"input": torch.randn(2, C, 3, 4)},
    "eps": {"eps": -1},
    "channels": {"weight": torch.ones(C + 1)},
    "integers": {"input": torch.ones(8, C, dtype=torch.long)},
    "activation": {"activation": "tanh"},
    "residual": {"residual": torch.ones(8, C + 1)},
    "one statistic": {"running_var": None},
    "a gradient at the mean": {"running_mean": nn.Parameter(torch.zeros(C))},
}


@pytest.mark.parametrize("case", ERRORS)
def test_the_operators_errors(case: str) -> None:
    given = arguments(**ERRORS[case])
    before = given["running_mean"].clone()
    with pytest.raises(Exception, match=r".") as theirs:
        by_operator(given)
    with pytest.raises(type(theirs.value)) as ours:
        _C.batch_norm(*given.values())
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
    assert torch.equal(given["running_mean"], before)


def test_modes_for_operators_see_the_operator() -> None:
    """A call under a mode is left to the operator, which modes see."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    norm, x, given = FusedBatchNorm1d(C).eval(), torch.randn(4, C), arguments()
    with Recorder() as recorder, torch.no_grad():
        assert _C.batch_norm(*given.values()) is None
        assert recorder.seen == []
        norm(x)
    assert "bn_ext.batch_norm_inference.default" in recorder.seen


def test_other_threads_run_meanwhile() -> None:
    """A call gives the interpreter's lock away: nothing else lets another thread run in between."""
    ran, over = [0], threading.Event()

    def count() -> None:
        while not over.is_set():
            ran[0] += 1
            time.sleep(0)  # gives the lock away, whatever the interval

    given = list(arguments(input=torch.randn(200_000, C)).values())
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(1000)
    try:
        for _ in range(200):
            before = ran[0]
            _C.batch_norm(*given)
            if ran[0] > before:
                break
        else:
            pytest.fail("no other thread ran in 200 calls")
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()


def test_nothing_is_left_of_a_call() -> None:
    """Arguments and results are given back: their reference counts are what they were."""
    given = list(arguments(momentum=0.25, eps=0.5, activation="relu").values())
    wrong = [torch.ones(3, C + 1), *given[1:]]

    def counts() -> list[int]:
        return [sys.getrefcount(value) for value in given if isinstance(value, (Tensor, float))]

    def call() -> None:
        _C.batch_norm(*given)
        try:
            _C.batch_norm(*wrong)
        except RuntimeError:
            pass
        else:
            raise AssertionError

    call()
    before = counts()
    for _ in range(100):
        call()
    assert counts() == before
