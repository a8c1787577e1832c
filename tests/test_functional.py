"""bn_ext.functional.batch_norm beside F.batch_norm: signature, results, buffers, inputs that fall back."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bn_ext
from reference import reference
from support import FLOATS, OpLog, Step, assert_step, name_of, normal

batch_norm = bn_ext.functional.batch_norm
F64 = torch.float64


def test_signature_is_natives() -> None:
    mine, theirs = inspect.signature(batch_norm), inspect.signature(F.batch_norm)
    parameters = list(mine.parameters.values())
    assert [(p.name, p.default, p.kind) for p in parameters[: len(theirs.parameters)]] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
    # Not keyword-only: torch.jit.script takes no such arguments with defaults.
    assert all(p.default is not p.empty for p in parameters[len(theirs.parameters) :])


def given(device: str, dtype: torch.dtype, stats: bool, weight: bool, bias: bool) -> dict[str, Tensor | None]:
    return {
        "running_mean": normal((4,), dtype, device, seed=1) if stats else None,
        "running_var": normal((4,), dtype, device, seed=2).square() + 0.5 if stats else None,
        "weight": normal((4,), dtype, device, seed=3) if weight else None,
        "bias": normal((4,), dtype, device, seed=4) if bias else None,
    }


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5)], ids=str)
def test_results_and_buffers(device: str, shape: tuple[int, ...], training: bool, weight: bool, bias: bool) -> None:
    for stats in (True, False) if training else (True,):
        for options in ({}, {"momentum": 0.7, "eps": 0.1}, {"momentum": 0.0}, {"momentum": 1.0}):
            mine, theirs = (given(device, F64, stats, weight, bias) for _ in range(2))
            x = normal(shape, F64, device)
            out = batch_norm(x, training=training, **mine, **options)
            torch.testing.assert_close(out, F.batch_norm(x, training=training, **theirs, **options))
            for key in ("running_mean", "running_var"):
                torch.testing.assert_close(mine[key], theirs[key])


def test_positional_arguments(device: str) -> None:
    x = normal((7, 4), F64, device)
    mine, theirs = (tuple(given(device, F64, True, True, True).values()) for _ in range(2))
    torch.testing.assert_close(batch_norm(x, *mine, True, 0.3, 1e-2), F.batch_norm(x, *theirs, True, 0.3, 1e-2))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_against_the_reference(device: str, dtype: torch.dtype) -> None:
    tensors = given(device, dtype, True, True, True)
    x = normal((129, 4), dtype, device, mean=3.0)
    ref = reference(x, tensors["weight"], tensors["bias"], running_mean=tensors["running_mean"],
                    running_var=tensors["running_var"], momentum=0.3)  # fmt: skip
    out = batch_norm(x, training=True, momentum=0.3, **tensors)
    assert_step(Step(out, running_mean=tensors["running_mean"], running_var=tensors["running_var"]), ref, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (2, 4, 2, 3, 2)], ids=str)
def test_images_and_volumes_fall_back(device: str, shape: tuple[int, ...], training: bool) -> None:
    mine, theirs = (given(device, F64, True, True, True) for _ in range(2))
    x = normal(shape, F64, device)
    torch.testing.assert_close(batch_norm(x, training=training, **mine), F.batch_norm(x, training=training, **theirs))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_parameters_of_another_shape_count_by_elements(device: str, shape: tuple[int, ...], which: str) -> None:
    x = normal((7, 4), F64, device)
    results = []
    for function in (batch_norm, F.batch_norm):
        tensors: dict[str, Any] = given(device, F64, True, True, True)
        tensors[which] = tensors[which].reshape(shape)
        results.append(function(x, training=True, **tensors))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_strided_parameters_and_buffers(device: str, training: bool) -> None:
    x = normal((7, 4), F64, device)
    mine, theirs = (
        {k: v.repeat_interleave(3)[::3] for k, v in given(device, F64, True, True, True).items() if v is not None}
        for _ in range(2)
    )
    torch.testing.assert_close(batch_norm(x, training=training, **mine), F.batch_norm(x, training=training, **theirs))
    torch.testing.assert_close(mine, theirs)


def test_neighbours_of_a_strided_buffer_stay(device: str) -> None:
    store = torch.zeros(8, device=device)
    var = torch.ones(4, device=device)
    batch_norm(normal((7, 4), device=device, mean=1.0), store[::2], var, training=True)
    assert bool((store[::2] != 0).all()) and bool((store[1::2] == 0).all())


def test_torch_function_overrides_are_honoured(device: str) -> None:
    class Wrapped(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            cls.seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = normal((7, 4), F64, device).as_subclass(Wrapped)
    out = batch_norm(x, None, None, training=True)
    assert isinstance(out, Wrapped)
    assert "batch_norm" in Wrapped.seen
    torch.testing.assert_close(out.as_subclass(Tensor), F.batch_norm(x.as_subclass(Tensor), None, None, training=True))


def test_does_not_call_the_native_operator(device: str) -> None:
    with OpLog() as log:
        batch_norm(normal((7, 4), device=device), None, None, training=True)
        batch_norm(normal((7, 4), device=device), **given(device, torch.float32, True, True, True))
    names = [name.split(".")[0] for name in log.names]
    assert names == ["bn_ext::batch_norm_forward", "bn_ext::batch_norm_inference"]
