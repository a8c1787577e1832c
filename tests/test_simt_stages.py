"""The CUDA kernels of a batch in parts, run on the CPU: moments and sums alone, and what follows from all parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import acc_eps, assert_within, moments, per_channel, reduce_dims
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Pass, Result
from simt_support import (
    BACKWARD,
    FORWARD,
    MODELS,
    REGIMES,
    assert_right,
    ids,
    make,
    reference_of,
    run,
    smallest,
)
from support import LAYOUTS, name_of, normal

BY_SIGN = ("relu", "leaky_relu")


def ended(pass_: Pass, inputs: Inputs, **options: Any) -> Tensor:
    """The first stage's result; nothing else is written, in no more launches than the whole pass takes."""
    result = run(pass_, replace(inputs, ends=True, num_batches_tracked=None, wants_residual=False), **options)
    assert result.stage is not None and result.stage.isfinite().all()
    assert result.output is None and result.grad_input is None
    assert len(result.launches) == result.plan["launches"]
    assert result.plan["write_bytes"] == 0
    if pass_ == FORWARD:
        assert inputs.running_mean is None or torch.equal(result.running_mean, inputs.running_mean)  # type: ignore[arg-type]
    return result.stage


def begun(pass_: Pass, inputs: Inputs, given: Tensor, **options: Any) -> Result:
    """The second stage: one launch that reads every input once, with no workspace."""
    result = run(pass_, replace(inputs, given=given), **options)
    assert len(result.launches) == result.plan["launches"] == 1
    assert result.plan["workspace_bytes"] == 0
    return result


def assert_moments(x: Tensor, found: Tensor) -> None:
    _, mean, rest, variance = moments(x)
    count, high, low, m2 = found
    values = x.numel() // x.shape[1]
    eps = acc_eps(x.dtype)
    assert (count == values).all()
    assert_within((high - mean) + low, rest, 8 * eps * (variance.sqrt() + eps * mean.abs()), "mean")
    assert_within(m2 / values, variance, 64 * eps * variance, "variance")


def assert_sums(inputs: Inputs, found: Tensor) -> None:
    """Of grad_output itself: each sum to the roundings of its addends."""
    centred, *_ = moments(inputs.x)
    assert inputs.grad_output is not None
    g, dims = inputs.grad_output.double(), reduce_dims(inputs.x)
    count, dy, dot = found
    values = inputs.x.numel() // inputs.x.shape[1]
    eps = acc_eps(inputs.x.dtype) * (8 + values**0.5)
    assert (count == values).all()
    assert_within(dy, g.sum(dims), eps * g.square().sum(dims).sqrt() + eps * g.abs().mean(dims), "sum")
    products = g * centred
    scale = products.square().sum(dims).sqrt() + moments(inputs.x)[3].sqrt() * g.abs().sum(dims).sqrt()
    assert_within(dot, products.sum(dims), eps * (scale + g.abs().mean(dims)), "dot")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("regime", REGIMES, ids=ids)
def test_every_regime_forward(regime: tuple[str, str], dtype: torch.dtype) -> None:
    shape, options = smallest(FORWARD, *regime, dtype)
    inputs = make(shape, dtype, num_batches_tracked=3)
    given = ended(FORWARD, inputs, **options)
    assert_moments(inputs.x, given)
    assert_right(FORWARD, inputs, begun(FORWARD, inputs, given[None], **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("regime", REGIMES, ids=ids)
def test_every_regime_backward(regime: tuple[str, str], dtype: torch.dtype) -> None:
    shape, options = smallest(BACKWARD, *regime, dtype)
    inputs = make(shape, dtype)
    given = ended(BACKWARD, inputs, **options)
    assert_sums(inputs, given)
    assert_right(BACKWARD, inputs, begun(BACKWARD, inputs, given[None], **options))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, model: dict[str, Any]) -> None:
    for shape in ((33, 24), (9, 8, 15)):
        inputs = make(shape, torch.float32, layout)
        given = ended(FORWARD, inputs, **model)
        assert_right(FORWARD, inputs, begun(FORWARD, inputs, given[None], **model))
        given = ended(BACKWARD, inputs, **model)
        assert_right(BACKWARD, inputs, begun(BACKWARD, inputs, given[None], **model))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_count_moves_once(momentum: float | None) -> None:
    """By the second stage, however many blocks a tile has."""
    inputs = make((600, 40), momentum=momentum, num_batches_tracked=6)
    given = ended(FORWARD, inputs, **MODELS["A100"])
    result = begun(FORWARD, inputs, given[None], **MODELS["A100"])
    assert result.plan["blocks"] > result.plan["tiles"]
    assert result.num_batches_tracked == 7
    assert_right(FORWARD, inputs, result)


def rows(inputs: Inputs, begin: int, end: int) -> Inputs:
    planes = {n: getattr(inputs, n) for n in ("x", "grad_output", "residual")}
    return replace(inputs, **{n: None if t is None else t[begin:end] for n, t in planes.items()})


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_parts_are_the_batch(dtype: torch.dtype, activation: str, residual: bool) -> None:
    """Uneven parts, on a device each, against one call of the whole batch; every part has the same statistics."""
    model = MODELS["H200"]
    for shape in ((60, 24), (60, 6, 11)):
        whole = make(shape, dtype, activation=activation, negative_slope=0.2)
        if residual:
            whole.residual = normal(shape, dtype, seed=5)
        whole.leaves_mask = residual and activation in BY_SIGN
        whole.wants_residual = residual and activation != "identity"
        parts = [rows(whole, begin, end) for begin, end in ((0, 7), (7, 8), (8, 60))]
        given = torch.stack([ended(FORWARD, replace(p, leaves_mask=False), **model) for p in parts])
        expected = run(FORWARD, whole, **model)
        found = [begun(FORWARD, p, given, **model) for p in parts]
        for result in found:
            for name in ("saved", "running_mean", "running_var"):
                assert torch.equal(getattr(result, name), getattr(found[0], name)), name
        # Another order of sums moves the statistics by some roundings, and the output by those and its own.
        eps, last = acc_eps(dtype), max(torch.finfo(dtype).eps, acc_eps(dtype))
        assert expected.output is not None and expected.saved is not None
        output = torch.cat([r.output for r in found])  # type: ignore[misc]
        bound = (4 * last + 64 * eps) * (1 + expected.output.abs().double())
        assert_within(output, expected.output, bound, "output")

        def backward_of(inputs: Inputs, forward: Result) -> Inputs:
            return replace(inputs, leaves_mask=False, mask=forward.mask)

        passed = [backward_of(p, r) for p, r in zip(parts, found, strict=True)]
        saved = [r.saved for r in found]
        sums = torch.stack([ended(BACKWARD, p, saved=s, **model) for p, s in zip(passed, saved, strict=True)])
        gradients = [begun(BACKWARD, p, sums, saved=s, **model) for p, s in zip(passed, saved, strict=True)]
        right = run(BACKWARD, backward_of(whole, expected), saved=expected.saved, **model)
        assert right.grad_input is not None
        dx = torch.cat([g.grad_input for g in gradients])  # type: ignore[misc]
        steady = expected.output.abs() > 256 * last if activation in BY_SIGN else torch.ones_like(dx).bool()
        bound = (4 * last + 256 * eps) * (1 + right.grad_input.abs().double().amax()) * torch.ones_like(dx).double()
        assert_within(dx[steady], right.grad_input[steady], bound[steady], "grad_input")
        if right.grad_residual is not None:
            passed_on = torch.cat([g.grad_residual for g in gradients])  # type: ignore[misc]
            assert_within(passed_on[steady], right.grad_residual[steady], bound[steady], "grad_residual")


def test_huge_values_keep_their_variance() -> None:
    """Squares beyond float32: the first stage sums them in double."""
    inputs = make((40, 8), mean=0.0, std=1e25)
    given = ended(FORWARD, inputs, **MODELS["A100"])
    assert_moments(inputs.x, given)
    assert_right(FORWARD, inputs, begun(FORWARD, inputs, given[None], **MODELS["A100"]))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_the_second_stage_reads(model: dict[str, Any]) -> None:
    """The input once; of a part without values nothing at all, and the statistics move as those of the other parts."""
    inputs = make((700, 16), num_batches_tracked=1)
    given = ended(FORWARD, inputs, **model)
    result = begun(FORWARD, inputs, given[None], **model)
    assert result.counted("x", "read_bytes") == inputs.x.nbytes
    nothing = begun(FORWARD, replace(make((1, 16), num_batches_tracked=1), empty=True), given[None], **model)
    assert nothing.counted("x", "read_bytes") == 0
    for name in ("saved", "running_mean", "running_var"):
        assert torch.equal(getattr(nothing, name), getattr(result, name)), name
    assert nothing.num_batches_tracked == 2


def test_reference_of_moments_is_that_of_the_batch() -> None:
    inputs = make((30, 8))
    ref = reference_of(FORWARD, inputs)
    found = ended(FORWARD, inputs, **MODELS["H200"])
    centred = inputs.x.double() - per_channel(found[1] + found[2], inputs.x)
    torch.testing.assert_close(centred, ref.centered, rtol=0, atol=1e-6)
