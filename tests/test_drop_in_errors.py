"""What ours cannot use, what it knows without data, and what an empty batch lets pass: as nn.BatchNorm1d."""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from drop_in import F64, NATIVE, Norm, Raised, assert_alike, both, held, outcome, ran, told
from support import module_for, normal

OURS, THEIRS = bn_ext.functional.batch_norm, F.batch_norm

NUMBERS: dict[str, Any] = {
    "text": "0.1",
    "none": None,
    "complex": 1j,
    "list": [0.1],
    "huge": 10**400,
    "zero": 0,
    "minus_one": -1,
    "nan": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "false": False,
    "numpy": np.float32(0.25),
    "numpy_int": np.int64(1),
    "numpy_array": np.array(0.25),
    "numpy_vector": np.array([0.25]),
    "fraction": Fraction(1, 4),
    "decimal": Decimal("0.25"),
    "scalar": torch.tensor(0.25),
    "vector": torch.tensor([0.25]),
    "integer": torch.tensor(1),
    "boolean": torch.tensor(True),
    "leaf": torch.tensor(0.25, requires_grad=True),
    "bytes": b"1",
    "object": object,
    "minus_zero": -0.0,
    "tiny": 5e-324,
}


@pytest.mark.parametrize("shape", [(6, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_none(device: str, number: str, name: str, shape: tuple[int, ...], training: bool) -> None:
    x, value = normal(shape, F64, device), NUMBERS[number]

    def module(cls: type[Norm]) -> object:
        norm = module_for(cls, 5, device, dtype=F64, **{name: value}).train(training)
        before = held(norm)
        result = outcome(lambda: ran(norm, x.detach().requires_grad_()))
        if isinstance(result, Raised):
            assert cls is NATIVE or outcome(lambda: assert_alike(held(norm), before)) is None
            return result
        return result, held(norm)

    both(module)
    seen = []
    for function in (OURS, THEIRS):
        mean, var = torch.zeros(5, dtype=F64, device=device), torch.ones(5, dtype=F64, device=device)
        result = told(lambda f=function, m=mean, v=var: f(x, m, v, training=training, **{name: value}))
        seen.append([result, mean, var])
    assert_alike(*seen)


WITHOUT_DATA = {
    "right": ({}, (6, 5)),
    "planes": ({}, (4, 5, 3)),
    "too_many": ({}, (6, 7)),
    "too_few": ({}, (6, 3)),
    "one_value": ({}, (1, 5)),
    "one_value_3d": ({}, (1, 5, 1)),
    "empty": ({}, (0, 5)),
    "empty_wrong": ({}, (0, 4)),
    "rank_1": ({}, (5,)),
    "rank_4": ({}, (2, 5, 2, 2)),
    "eps": ({"eps": 0.0}, (6, 5)),
    "eps_negative": ({"eps": -1.0}, (6, 5)),
    "no_affine": ({"affine": False}, (6, 3)),
    "no_tracking": ({"track_running_stats": False}, (6, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["meta", "fake"])
@pytest.mark.parametrize("case", WITHOUT_DATA)
def test_tensors_without_data(case: str, how: str, dtype: torch.dtype, training: bool) -> None:
    options, shape = WITHOUT_DATA[case]

    def scenario(cls: type[Norm]) -> object:
        device = "meta" if how == "meta" else "cpu"
        x = torch.empty(shape, device=device, dtype=dtype)
        result = outcome(lambda: module_for(cls, 5, device, **options).train(training)(x))
        return result if isinstance(result, Raised) else (result.shape, result.dtype, result.device, result.stride())

    if how == "meta":
        both(scenario)
        return
    with FakeTensorMode():
        both(scenario)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (6, 5)], ids=str)
@pytest.mark.parametrize("missing", ["running_mean", "running_var", "both", "weight", "bias"])
def test_something_missing_beside_an_empty_batch(
    device: str, missing: str, shape: tuple[int, ...], training: bool
) -> None:
    x = normal(shape, F64, device)
    names = ("running_mean", "running_var") if missing == "both" else (missing,)

    def module(cls: type[Norm]) -> object:
        norm = module_for(cls, 5, device, dtype=F64).train(training)
        for name in names:
            setattr(norm, name, None)
        result = outcome(lambda: ran(norm, x.detach().requires_grad_()))
        return result if isinstance(result, Raised) else (result, held(norm))

    both(module)
    given = {k: torch.ones(5, dtype=F64, device=device) for k in ("running_mean", "running_var", "weight", "bias")}
    given.update(dict.fromkeys(names))
    assert_alike(*(told(lambda f=f: f(x, training=training, **copy.deepcopy(given))) for f in (OURS, THEIRS)))
