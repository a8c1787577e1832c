"""The CUDA kernels with a residual and an activation, and of its gradient, run on the CPU, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from reference import assert_within
from reference_activated import SLOPE, Activated, activated
from simt.operators import ACTIVATIONS, DTYPES, Inputs, Pass, Result, plan_of
from simt_support import BACKWARD, FORWARD, INFERENCE, MODELS, REGIMES, WALKS, make, run, smallest
from support import LAYOUTS, name_of, normal


def reference_of(pass_: Pass, inputs: Inputs, given: torch.Tensor) -> Activated:
    training = pass_ != INFERENCE
    assert inputs.grad_output is not None
    return activated(
        inputs.x, inputs.residual, inputs.weight, inputs.bias, inputs.grad_output,
        None if inputs.activation == "identity" else inputs.activation, given=given, training=training, eps=inputs.eps,
        running_mean=None if training else inputs.running_mean, running_var=None if training else inputs.running_var,
    )  # fmt: skip


def check(inputs: Inputs, pass_: Pass = INFERENCE, **options: Any) -> Result:
    """Run one call and hold its output to the reference."""
    result = run(pass_, inputs, **options)
    assert result.output is not None
    right = reference_of(pass_, inputs, result.output)
    assert_within(result.output, right.output, right.output_tolerance, "output")
    return result


def check_both(inputs: Inputs, pass_: Pass, **options: Any) -> tuple[Result, Result]:
    """Forward, and the activation's gradient from what it saved."""
    forward = check(inputs, pass_, **options)
    assert forward.saved is not None and forward.output is not None and forward.saved.shape[0] == 6
    # As the glue gives it to these kernels: laid out as the output.
    residual = inputs.residual
    if residual is not None:
        inputs = replace(inputs, residual=torch.empty_like(inputs.x).copy_(residual))
    gradient = run(BACKWARD, replace(inputs, wants=(True, False, False)), saved=forward.saved, **options)
    right = reference_of(pass_, inputs, forward.output)
    assert gradient.grad_input is not None
    assert_within(gradient.grad_input, right.passed, right.passed_tolerance, "the activation's gradient")
    return forward, gradient


def with_residual(inputs: Inputs, layout: str | None) -> Inputs:
    if layout is not None:
        inputs.residual = LAYOUTS[layout](normal(tuple(inputs.x.shape), inputs.x.dtype, seed=5))
    return inputs


@pytest.mark.parametrize("residual", [None, "contiguous"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values(dtype: torch.dtype, activation: str, residual: str | None) -> None:
    for walk in WALKS:
        inputs = make(WALKS[walk](65), dtype, activation=activation, negative_slope=SLOPE)
        for pass_ in (INFERENCE, FORWARD):
            check_both(with_residual(inputs, residual), pass_, **MODELS["H200"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, model: dict[str, Any]) -> None:
    for shape in ((18, 8), (5, 6, 12)):
        for of_x, of_residual in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            check(with_residual(make(shape, layout=of_x, activation="gelu"), of_residual), **model)
        inputs = make(shape, layout=layout, activation="silu")
        inputs.residual = torch.empty_like(inputs.x).copy_(normal(shape, seed=5))
        check_both(inputs, FORWARD, **model)


@pytest.mark.parametrize("residual", [None, "contiguous"])
@pytest.mark.parametrize(
    ("regime", "scalar"),
    [
        pytest.param(regime, scalar, id=f"{'-'.join(regime)}-{'scalar' if scalar else 'vector'}")
        for regime, scalar in itertools.product(REGIMES, (False, True))
        if not (scalar and regime[0] == "folded")  # rows are joined for vectors only
    ],
)
def test_regimes_of_training(regime: tuple[str, str], scalar: bool, residual: str | None) -> None:
    """Every way for blocks to share a channel, with the residual read by the sweep that writes."""
    shape, model = smallest(FORWARD, *regime, scalar=scalar)
    inputs = make(shape, layout="misaligned" if scalar else "contiguous", activation="relu")
    if residual is not None:
        inputs.residual = LAYOUTS["misaligned" if scalar else "contiguous"](normal(shape, seed=5))
    assert check(inputs, FORWARD, **model).regime == regime


def test_every_operand_is_moved_once() -> None:
    inputs = with_residual(make((64, 128), activation="relu"), "contiguous")
    result = check(inputs, **MODELS["H200"])
    size = inputs.x.numel() * inputs.x.itemsize
    assert (result.plan["read_bytes"], result.plan["write_bytes"]) == (2 * size, size)
    assert result.plan["vector"] == 4 and result.plan["launches"] == 1
    assert plan_of(INFERENCE, (64, 128), **MODELS["H200"])["read_bytes"] == size


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(activation: str) -> None:
    """Element by element what the same formula gives in float64, infinities and NaN in their places."""
    inputs = make((8, 8), activation=activation, negative_slope=SLOPE)
    inputs.x[2, 1], inputs.x[3, 2], inputs.x[4, 3] = torch.nan, torch.inf, -torch.inf
    result = run(INFERENCE, inputs, **MODELS["H200"])
    assert result.output is not None
    found = result.output[[2, 3, 4], [1, 2, 3]].tolist()
    expected = {"relu": 0.0, "silu": torch.nan, "gelu": torch.nan}.get(activation, -torch.inf)
    torch.testing.assert_close(found, [torch.nan, torch.inf, expected], equal_nan=True)
    assert int(result.output.isfinite().sum()) >= 61
