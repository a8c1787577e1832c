"""Every error of nn.BatchNorm1d and F.batch_norm: same type, same text, and in ours no buffer has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from support import FLOATS, error_of, name_of, normal, pair


def assert_same_error(ours: Callable[[], object], native: Callable[[], object], state: dict[str, Tensor]) -> None:
    """Both raise, alike, and none of the tensors in `state` changes in our call."""
    before = {k: v.clone() for k, v in state.items()}
    mine = error_of(ours)
    for key, value in state.items():
        assert value.is_meta or torch.equal(value, before[key]), f"{key} moved although the call failed"
    theirs = error_of(native)
    assert theirs is not None, "native accepts this: the case belongs elsewhere"
    assert mine == theirs


# name -> (constructor options, training, input)
MODULE_CASES: dict[str, tuple[dict[str, Any], bool | None, Callable[[str], Any]]] = {
    "0d": ({}, None, lambda d: torch.zeros((), device=d)),
    "1d": ({}, None, lambda d: torch.zeros(4, device=d)),
    "4d": ({}, None, lambda d: torch.zeros(2, 4, 3, 3, device=d)),
    "5d": ({}, None, lambda d: torch.zeros(2, 4, 3, 3, 3, device=d)),
    "too_many_features": ({}, None, lambda d: torch.zeros(3, 5, device=d)),
    "too_few_features": ({}, None, lambda d: torch.zeros(3, 3, device=d)),
    "features_3d": ({}, None, lambda d: torch.zeros(3, 5, 2, device=d)),
    "features_no_tracking": ({"track_running_stats": False}, None, lambda d: torch.zeros(3, 5, device=d)),
    "features_no_tracking_no_bias": (
        {"track_running_stats": False, "bias": False},
        None,
        lambda d: torch.zeros(3, 5, device=d),
    ),
    "features_no_affine": ({"affine": False}, None, lambda d: torch.zeros(3, 5, device=d)),
    "one_value": ({}, True, lambda d: torch.zeros(1, 4, device=d)),
    "one_value_3d": ({}, True, lambda d: torch.zeros(1, 4, 1, device=d)),
    "one_value_wrong_features": ({}, True, lambda d: torch.zeros(1, 5, device=d)),
    "one_value_momentum_none": ({"momentum": None}, True, lambda d: torch.zeros(1, 4, device=d)),
    "one_value_eval_no_tracking": ({"track_running_stats": False}, False, lambda d: torch.zeros(1, 4, device=d)),
    "one_value_bf16": ({}, True, lambda d: torch.zeros(1, 4, 1, device=d, dtype=torch.bfloat16)),
    "one_value_no_channels": ({}, True, lambda d: torch.zeros(1, 0, device=d)),
    "eps_zero": ({"eps": 0.0}, True, lambda d: torch.zeros(3, 4, device=d)),
    "eps_negative": ({"eps": -1.0}, None, lambda d: torch.zeros(3, 4, device=d)),
    "eps_zero_eval_no_tracking": (
        {"eps": 0.0, "track_running_stats": False},
        False,
        lambda d: torch.zeros(3, 4, device=d),
    ),
    "eps_zero_empty": ({"eps": 0.0}, True, lambda d: torch.zeros(0, 4, device=d)),
    "eps_and_one_value": ({"eps": 0.0}, True, lambda d: torch.zeros(1, 4, device=d)),
    "eps_and_features": ({"eps": -1.0}, None, lambda d: torch.zeros(3, 5, device=d)),
    "sparse": ({}, None, lambda d: torch.ones(3, 4, device=d).to_sparse()),
    "none": ({}, None, lambda d: None),
    "meta_input": ({}, None, lambda d: torch.zeros(3, 4, device="meta")),
    "meta_module": ({"device": "meta"}, None, lambda d: torch.zeros(3, 4, device=d)),
}
for _dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64,
               torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2):  # fmt: skip
    for _shape in ((3, 4), (3, 4, 2)):
        MODULE_CASES[f"{name_of(_dtype)}_{len(_shape)}d"] = (
            {},
            None,
            lambda d, t=_dtype, s=_shape: torch.zeros(s, device=d).to(t),
        )

MODULE_CASES_BY_MODE = [
    pytest.param(options, mode, make, id=f"{name}-{'train' if mode else 'eval'}")
    for name, (options, training, make) in MODULE_CASES.items()
    for mode in ((True, False) if training is None else (training,))
]


@pytest.mark.parametrize(("options", "training", "make"), MODULE_CASES_BY_MODE)
def test_module_errors(device: str, options: dict[str, Any], training: bool, make: Callable[[str], Any]) -> None:
    ours, native = pair(4, **{"device": device, **options})
    ours.train(training), native.train(training)
    x = make(device)
    assert_same_error(lambda: ours(x), lambda: native(x), dict(ours.state_dict()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_missing_buffer(device: str, missing: str, training: bool) -> None:
    modules = pair(4, device)
    for module in modules:
        module.train(training)
        setattr(module, missing, None)
    x = normal((3, 4), device=device)
    assert_same_error(lambda: modules[0](x), lambda: modules[1](x), dict(modules[0].state_dict()))


@pytest.mark.parametrize("training", [True, False])
def test_buffer_that_requires_grad(device: str, training: bool) -> None:
    modules = pair(4, device)
    for module in modules:
        module.train(training)
        module.running_mean.requires_grad_()
    x = normal((3, 4), device=device)
    assert_same_error(lambda: modules[0](x), lambda: modules[1](x), dict(modules[0].state_dict()))


TENSORS = ("weight", "bias", "running_mean", "running_var")
BAD_TENSORS: dict[str, Callable[[str], Tensor]] = {
    "too_long": lambda d: torch.ones(5, device=d),
    "too_short": lambda d: torch.ones(3, device=d),
    "single": lambda d: torch.ones(1, device=d),
    "scalar": lambda d: torch.ones((), device=d),
    "empty": lambda d: torch.ones(0, device=d),
    "int64": lambda d: torch.ones(4, device=d, dtype=torch.int64),
    "complex64": lambda d: torch.ones(4, device=d, dtype=torch.complex64),
    "meta": lambda d: torch.ones(4, device="meta"),
}


def arguments(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "running_mean": torch.zeros(4, device=device, dtype=dtype),
        "running_var": torch.ones(4, device=device, dtype=dtype),
        "weight": torch.ones(4, device=device, dtype=dtype),
        "bias": torch.zeros(4, device=device, dtype=dtype),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_functional_bad_tensors(
    device: str, bad: Callable[[str], Tensor], which: str, shape: tuple[int, ...], training: bool
) -> None:
    x = normal(shape, device=device)
    given = arguments(device) | {which: bad(device)}
    state = {k: v for k, v in given.items() if k.startswith("running")}
    assert_same_error(
        lambda: bn_ext.functional.batch_norm(x, training=training, **given),
        lambda: F.batch_norm(x, training=training, **given),
        state,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("kind", ["int64", "complex64"])
def test_functional_bad_dtype_beside_other_inputs(
    device: str, kind: str, dtype: torch.dtype, which: str, training: bool
) -> None:
    x = normal((3, 4), dtype, device)
    given = arguments(device, dtype) | {which: BAD_TENSORS[kind](device)}
    state = {k: v for k, v in given.items() if k.startswith("running")}
    assert_same_error(
        lambda: bn_ext.functional.batch_norm(x, training=training, **given),
        lambda: F.batch_norm(x, training=training, **given),
        state,
    )


FUNCTIONAL_CASES: dict[str, tuple[Callable[[str], Any], dict[str, Any]]] = {
    "0d": (lambda d: torch.zeros((), device=d), {}),
    "1d": (lambda d: torch.zeros(4, device=d), {}),
    "features": (lambda d: torch.zeros(3, 5, device=d), {}),
    "features_4d": (lambda d: torch.zeros(2, 5, 2, 2, device=d), {}),
    "only_mean": (lambda d: torch.zeros(3, 4, device=d), {"running_var": None}),
    "only_var": (lambda d: torch.zeros(3, 4, device=d), {"running_mean": None}),
    "eps_negative": (lambda d: torch.zeros(3, 4, device=d), {"eps": -1e-5}),
    "momentum_none": (lambda d: torch.zeros(3, 4, device=d), {"momentum": None}),
    "int": (lambda d: torch.zeros(3, 4, device=d, dtype=torch.int64), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FUNCTIONAL_CASES)
def test_functional_errors(device: str, case: str, training: bool) -> None:
    make, changes = FUNCTIONAL_CASES[case]
    x, given = make(device), arguments(device) | changes
    state = {k: v for k, v in given.items() if k.startswith("running") and v is not None}
    assert_same_error(
        lambda: bn_ext.functional.batch_norm(x, training=training, **given),
        lambda: F.batch_norm(x, training=training, **given),
        state,
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 4), {}), ((1, 4, 1), {}), ((3, 4), {"eps": 0.0}), ((1, 4, 1, 1), {}), ((1,), {})],
    ids=str,
)
def test_functional_errors_of_training(device: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x, given = torch.zeros(shape, device=device), arguments(device)
    assert_same_error(
        lambda: bn_ext.functional.batch_norm(x, training=True, **given, **options),
        lambda: F.batch_norm(x, training=True, **given, **options),
        {k: v for k, v in given.items() if k.startswith("running")},
    )


@pytest.mark.parametrize("training", [True, False])
def test_neither_statistics_nor_training(device: str, training: bool) -> None:
    """Without buffers and without training native has nothing to normalise with."""
    x = normal((3, 4), device=device)
    mine = error_of(lambda: bn_ext.functional.batch_norm(x, None, None, training=training))
    theirs = error_of(lambda: F.batch_norm(x, None, None, training=training))
    assert mine == theirs and (theirs is None) == training


# ---- what native lets pass, ours must let pass too ----

ACCEPTED: dict[str, tuple[dict[str, Any], tuple[int, ...], bool]] = {
    "one_value_in_eval": ({}, (1, 4), False),
    "one_value_in_eval_3d": ({}, (1, 4, 1), False),
    "two_values": ({}, (2, 4), True),
    "two_values_along_l": ({}, (1, 4, 2), True),
    "eps_zero_in_eval": ({"eps": 0.0}, (3, 4), False),
    "eps_nan": ({"eps": float("nan")}, (3, 4), True),
    "wrong_features_of_an_empty_batch": ({}, (0, 5), True),
    "wrong_features_of_an_empty_batch_eval": ({}, (0, 5), False),
    "no_features_at_all": ({}, (3, 0), True),
    "no_features_at_all_3d": ({}, (3, 0, 2), True),
    "momentum_negative": ({"momentum": -0.5}, (3, 4), True),
    "momentum_nan": ({"momentum": float("nan")}, (3, 4), True),
    "momentum_infinite": ({"momentum": float("inf")}, (3, 4), True),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_native(device: str, case: str) -> None:
    options, shape, training = ACCEPTED[case]
    ours, native = pair(4, device, dtype=torch.float64, **options)
    ours.train(training), native.train(training)
    x = normal(shape, torch.float64, device)
    if refused := error_of(lambda: copy.deepcopy(native)(x)):  # torch 2.11 wants a positive eps in evaluation too
        assert case == "eps_zero_in_eval" and error_of(lambda: ours(x)) == refused
        return
    mine, theirs = ours(x), native(x)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    for key, value in native.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_backward_twice_fails_as_native(device: str, dtype: torch.dtype) -> None:
    errors = []
    for module in pair(4, device, dtype=dtype):
        loss = module(normal((3, 4), dtype, device)).sum()
        loss.backward()
        errors.append(error_of(loss.backward))
    assert errors[0] is not None and errors[0] == errors[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_change_in_place_before_backward_is_noticed(device: str, changed: str, training: bool) -> None:
    def run(module: nn.BatchNorm1d) -> None:
        x = normal((3, 4), device=device).requires_grad_() * 1.0
        loss = module.train(training)(x).square().sum()
        with torch.no_grad():
            (x if changed == "input" else module.weight).add_(1)
        loss.backward()

    mine, theirs = (error_of(lambda m=m: run(m)) for m in pair(4, device))
    assert mine is not None and theirs is not None and mine[0] is theirs[0]
    words = "modified by an inplace operation"
    assert words in mine[1] and words in theirs[1]
