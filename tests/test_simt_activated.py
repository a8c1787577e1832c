"""The CUDA kernels with a residual and an activation, and of its gradient, run on the CPU, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from reference import assert_within, ulp
from reference_activated import FORMULA_ULP, SLOPE, Activated, activated, value_and_derivative
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Pass, Result
from simt.operators import plan_of
from simt_support import BACKWARD, FORWARD, INFERENCE, MODELS, REGIMES, WALKS, make, run, smallest
from support import LAYOUTS, name_of, normal

BY_SIGN = ("relu", "leaky_relu")


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


def check_backward(inputs: Inputs, pass_: Pass, forward: Result, **options: Any) -> Result:
    """Backward of `pass_` from what its forward left: all that is wanted, against the reference."""
    assert forward.saved is not None and forward.output is not None and forward.saved.shape[0] == 6
    given = replace(inputs, training=pass_ == FORWARD, leaves_mask=False, mask=forward.mask)
    result = run(BACKWARD, given, saved=forward.saved, **options)
    right = reference_of(pass_, inputs, forward.output)
    for name, expected, tolerance in (
        ("grad_residual", right.passed, right.passed_tolerance),
        ("grad_input", right.norm.grad_input, right.grad_input_tolerance()),
    ):
        if (mine := getattr(result, name)) is not None:
            assert_within(mine, expected, tolerance, name)
    for which in ("weight", "bias"):
        if (mine := getattr(result, f"grad_{which}")) is not None:
            expected = getattr(right.norm, f"grad_{which}")
            assert_within(mine, expected, right.grad_param_tolerance(which, mine.dtype), which)
    assert len(result.launches) == result.plan["launches"]
    return result


def check_both(inputs: Inputs, pass_: Pass, **options: Any) -> tuple[Result, Result]:
    """Forward, and backward to everything: with a residual by forward's mask, where the activation has one."""
    inputs.leaves_mask = inputs.residual is not None and inputs.activation in BY_SIGN
    # Behind an identity that is grad_output itself, which no kernel writes.
    inputs.wants_residual = inputs.residual is not None and inputs.activation != "identity"
    of_forward = inputs
    if pass_ == FORWARD and inputs.residual is not None:  # as the glue gives it to training: laid out as the output
        of_forward = replace(inputs, residual=torch.empty_like(inputs.x).copy_(inputs.residual))
    forward = check(of_forward, pass_, **options)
    return forward, check_backward(inputs, pass_, forward, **options)


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


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_formulas_in_both_tails(activation: str, part: int) -> None:
    """Batch norm as the identity: what is left is the activation, to FORMULA_ULP wherever it is a normal number."""
    ends = {"silu": 80.0, "gelu": 12.0}[activation]
    tiny = torch.logspace(-30, 1, 400)
    x = torch.cat([torch.linspace(-ends, ends, 4001), tiny, -tiny, torch.tensor([1e30, -85.0, 3e38])])[part::4, None]
    one, zero = torch.ones(1), torch.zeros(1)
    inputs = Inputs(x, torch.ones_like(x), running_mean=zero, running_var=one, eps=0.0, activation=activation)
    forward = run(INFERENCE, inputs, **MODELS["H200"])
    wants = (True, False, False)
    backward = run(BACKWARD, replace(inputs, training=False, wants=wants), saved=forward.saved, **MODELS["H200"])
    assert forward.output is not None and backward.grad_input is not None
    value, derivative = value_and_derivative(x.double(), activation)
    assert_within(forward.output, value, FORMULA_ULP * ulp(value, x.dtype), activation)
    largest = x.double().abs().clamp(min=1) * torch.maximum(
        (value / x.double()).abs(), (derivative - value / x.double()).abs()
    )
    assert_within(backward.grad_input, derivative, FORMULA_ULP * ulp(largest, x.dtype), f"{activation}'")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, model: dict[str, Any]) -> None:
    for shape in ((18, 8), (5, 6, 12)):
        for of_x, of_residual in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            check(with_residual(make(shape, layout=of_x, activation="gelu"), of_residual), **model)
            for activation in ("silu", "relu"):  # from the residual, and from the mask
                inputs = with_residual(make(shape, layout=of_x, activation=activation), of_residual)
                check_both(inputs, FORWARD, **model)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
def test_the_mask_is_the_sign_of_every_element(layout: str, dtype: torch.dtype) -> None:
    """A byte for 16 bytes of the output's memory, whoever writes them: vectors, incomplete rows, single elements."""
    for shape, pass_ in itertools.product(
        ((33, 64), (65, 3), (301, 8, 7), (1, 1, 67), (3, 2, 40)), (FORWARD, INFERENCE)
    ):
        inputs = make(shape, dtype, layout, activation="relu", leaves_mask=True)
        inputs.residual = LAYOUTS[layout](normal(shape, dtype, seed=5))
        result = check(inputs, pass_, **MODELS["H200"])
        assert result.output is not None and result.mask is not None
        assert (result.plan["vector"] == 1) == (layout == "misaligned")
        elements = 16 // dtype.itemsize
        bits = (result.mask[:, None] >> torch.arange(elements, dtype=torch.uint8)) & 1
        memory = result.output.as_strided((result.output.numel(),), (1,))
        assert torch.equal(bits.flatten()[: memory.numel()].bool(), memory > 0)


@pytest.mark.parametrize("pass_", [FORWARD, INFERENCE], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [None, "contiguous"])
def test_only_the_gradients_that_are_wanted(residual: str | None, activation: str, pass_: Pass) -> None:
    """And no tensor is read or written for the others."""
    for shape, wants in itertools.product(((70, 72), (67, 3)), itertools.product((True, False), repeat=3)):
        inputs = with_residual(make(shape, activation=activation, wants=wants), residual)
        inputs.leaves_mask = residual is not None and activation in BY_SIGN
        forward = check(inputs, pass_, **MODELS["H200"])
        for inputs.wants_residual in (False, True) if activation != "identity" else (False,):
            if not (any(wants) or inputs.wants_residual):
                continue
            result = check_backward(inputs, pass_, forward, **MODELS["H200"])
            moved = {name: result.counted(name, "read_bytes") for name in ("dy", "x", "residual", "mask")}
            sums = wants[1] or wants[2] or (wants[0] and pass_ == FORWARD)
            assert moved["dy"] > 0
            assert (moved["x"] > 0) == (sums or not (inputs.leaves_mask or activation == "identity"))
            assert (moved["residual"] > 0) == (residual is not None and activation == "silu")
            assert (moved["mask"] > 0) == inputs.leaves_mask
            for name, wanted in (("dx", wants[0]), ("grad_residual", inputs.wants_residual)):
                assert result.counted(name, "write_bytes") == wanted * inputs.x.nbytes


REGIME = pytest.mark.parametrize(
    ("regime", "scalar"),
    [
        pytest.param(regime, scalar, id=f"{'-'.join(regime)}-{'scalar' if scalar else 'vector'}")
        for regime, scalar in itertools.product(REGIMES, (False, True))
        if not (scalar and regime[0] == "folded")  # rows are joined for vectors only
    ],
)


@pytest.mark.parametrize("residual", [None, "contiguous"])
@REGIME
def test_regimes_of_training(regime: tuple[str, str], scalar: bool, residual: str | None) -> None:
    """Every way for blocks to share a channel, with the residual read by the sweep that writes."""
    shape, model = smallest(FORWARD, *regime, scalar=scalar)
    inputs = make(shape, layout="misaligned" if scalar else "contiguous", activation="relu")
    if residual is not None:
        inputs.residual = LAYOUTS["misaligned" if scalar else "contiguous"](normal(shape, seed=5))
    assert check(inputs, FORWARD, **model).regime == regime


@pytest.mark.parametrize("source", ["sign", "argument", "sum", "mask"])
@REGIME
def test_regimes_of_backward(regime: tuple[str, str], scalar: bool, source: str) -> None:
    """Likewise of backward, by each of the things that may tell the derivative."""
    shape, model = smallest(BACKWARD, *regime, scalar=scalar)
    layout = "misaligned" if scalar else "contiguous"
    inputs = make(shape, layout=layout, activation="relu" if source in ("mask", "sign") else "gelu")
    _, backward = check_both(with_residual(inputs, layout if source in ("mask", "sum") else None), FORWARD, **model)
    assert backward.regime == regime


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_backward_moves(activation: str) -> None:
    """Each input once where the tensors fit on chip, the mask twice; and again what does not stay there."""
    few = {"device": "H200", "sms": 4, "shared_per_block": 34 << 10, "shared_per_sm": 68 << 10}
    for shape, model, fits in (((320, 128), MODELS["H200"], True), ((2000, 128), few, False)):
        inputs = with_residual(make(shape, activation=activation), "contiguous")
        forward, backward = check_both(inputs, FORWARD, **model)
        size, mask = inputs.x.nbytes, inputs.leaves_mask * inputs.x.nbytes // 16
        operands = 2 if inputs.leaves_mask else 3
        tensors = sum(backward.counted(name, "read_bytes") for name in ("dy", "x", "residual"))
        assert (tensors == operands * size) == fits
        assert backward.counted("mask", "read_bytes") == 2 * mask
        assert backward.plan["read_bytes"] == tensors + 2 * mask
        assert backward.plan["write_bytes"] == 2 * size and backward.plan["launches"] == 1
        assert (
            forward.plan["write_bytes"]
            == size + mask
            == sum(forward.counted(name, "write_bytes") for name in ("y", "mask"))
        )
        assert forward.plan["read_bytes"] == sum(forward.counted(name, "read_bytes") for name in ("x", "residual"))


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "misaligned"])
def test_in_place(layout: str) -> None:
    for shape, residual in itertools.product(((65, 72), (33, 3), (5, 6, 13)), (None, layout)):
        inputs = with_residual(make(shape, layout=layout, activation="silu"), residual)
        fresh = run(INFERENCE, inputs, **MODELS["H200"])
        in_place = run(INFERENCE, replace(inputs, in_place=True), **MODELS["H200"])
        assert torch.equal(fresh.output, in_place.output)
        assert in_place.counted("x", "write_bytes") == inputs.x.nbytes


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
