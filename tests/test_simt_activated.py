"""The CUDA kernels of evaluation with a residual and an activation, run on the CPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reference import assert_within
from reference_activated import SLOPE, activated
from simt.operators import ACTIVATIONS, DTYPES, Inputs, Result, plan_of
from simt_support import INFERENCE, MODELS, WALKS, make, run
from support import LAYOUTS, name_of, normal


def check(inputs: Inputs, **options: Any) -> Result:
    """Run one call and hold its output to the reference."""
    result = run(INFERENCE, inputs, **options)
    assert result.output is not None
    right = activated(
        inputs.x, inputs.residual, inputs.weight, inputs.bias, torch.zeros_like(inputs.x),
        None if inputs.activation == "identity" else inputs.activation, given=result.output, training=False,
        eps=inputs.eps, running_mean=inputs.running_mean, running_var=inputs.running_var,
    )  # fmt: skip
    assert_within(result.output, right.output, right.output_tolerance, "output")
    return result


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
        check(with_residual(inputs, residual), **MODELS["H200"])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, model: dict[str, Any]) -> None:
    for shape in ((18, 8), (5, 6, 12)):
        for of_x, of_residual in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            check(with_residual(make(shape, layout=of_x, activation="gelu"), of_residual), **model)


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
