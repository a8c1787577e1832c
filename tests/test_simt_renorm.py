"""The CUDA kernels of batch renormalisation, run on the CPU: r and d where a channel's statistics are merged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import (
    acc_eps,
    assert_within,
    grad_input_tolerance,
    grad_param_tolerance,
    moments,
    output_tolerance,
    per_channel,
    reference,
    running_tolerance,
    stat_eps,
)
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Result
from simt_support import A100, BACKWARD, FORWARD, H200, MODELS, REGIMES, make, momentum_of, run, smallest
from support import LAYOUTS, name_of, normal

Renorm = tuple[float, float, int, bool]
SHAPES = ((5, 6, 40), (3, 70, 9), (4, 2, 3000), (40, 24), (300, 3), (2, 1, 33))


def renormalised(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, renorm: Renorm = (3.0, 5.0, 0, False),
                 layout: str = "contiguous", **options: Any) -> Inputs:  # fmt: skip
    """Statistics that leave some channels within the bounds and others on either side."""
    inputs = make(shape, dtype, layout, renorm=renorm, **options)
    line = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    kind = torch.float32 if options.get("vectors") is None else options["vectors"]
    return replace(inputs, running_mean=(4 * line).to(kind), running_var=(4 * line).exp().to(kind))


def factors(inputs: Inputs, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    assert inputs.renorm is not None and inputs.running_mean is not None and inputs.running_var is not None
    max_r, max_d, steps, smooth = inputs.renorm
    _, high, low, var = moments(inputs.x if x is None else x)
    running = (inputs.running_var.double() + inputs.eps).sqrt()
    r = ((var + inputs.eps).sqrt() / running).clamp(1 / max_r, max_r)
    d = ((high - inputs.running_mean.double() + low) / running).clamp(-max_d, max_d)
    share, batches = 1.0, inputs.num_batches_tracked
    if steps:
        assert batches is not None
        share = min(1.0, batches / steps if smooth else float(batches // steps))
    return 1 + (r - 1) * share, d * share


def check(inputs: Inputs, rows: Any = lambda t: t, **options: Any) -> tuple[Result, Result]:
    """Forward, and backward from what it saved, against float64. rows: what counts of a plane."""
    assert inputs.weight is not None and inputs.bias is not None and inputs.grad_output is not None
    x, dtype = rows(inputs.x), inputs.x.dtype
    r, d = factors(inputs, x)
    weight, bias = inputs.weight.double(), inputs.bias.double()
    ref = reference(
        x, weight * r, bias + weight * d, rows(inputs.grad_output), running_mean=inputs.running_mean,
        running_var=inputs.running_var, momentum=momentum_of(inputs), eps=inputs.eps,
    )  # fmt: skip
    assert ref.grad_input is not None and ref.grad_weight is not None and ref.grad_bias is not None
    forward = run(FORWARD, inputs, **options)
    assert forward.output is not None and forward.saved is not None
    eps = acc_eps(dtype)
    # CUDA's 1 / sqrt of float32 is rounded in float, in both standard deviations; r and d have their errors.
    slack = per_channel((8 * eps + 4 * stat_eps(dtype)) * ((weight * d).abs() + bias.abs() + (weight * r).abs()), x)
    assert_within(
        rows(forward.output), ref.output, output_tolerance(ref, dtype) + slack * (1 + ref.normalized.abs()), "y"
    )
    for name, mine, right in (("r", forward.saved[6], r), ("d", forward.saved[7], d)):
        torch.testing.assert_close(mine.double(), right, rtol=16 * stat_eps(dtype), atol=16 * stat_eps(dtype), msg=name)
    for which in ("mean", "var"):
        mine, right = getattr(forward, f"running_{which}"), getattr(ref, f"running_{which}")
        assert_within(mine, right, running_tolerance(ref, which, dtype, mine.dtype), which)
    if inputs.num_batches_tracked is not None:
        assert forward.num_batches_tracked == inputs.num_batches_tracked + 1
    backward = run(BACKWARD, inputs, saved=forward.saved, **options)
    assert backward.grad_input is not None and backward.grad_weight is not None and backward.grad_bias is not None
    more = 16 * stat_eps(dtype)
    assert_within(
        rows(backward.grad_input), ref.grad_input, grad_input_tolerance(ref, dtype) + more * ref.grad_input.abs(), "dx"
    )
    of_weight, of_bias = (grad_param_tolerance(ref, w, dtype, inputs.weight.dtype) for w in ("weight", "bias"))
    parts = (ref.grad_weight * r).abs() + (ref.grad_bias * d).abs()
    allowed = of_weight * r + of_bias * d.abs() + (more + torch.finfo(inputs.weight.dtype).eps) * parts
    assert_within(backward.grad_weight, ref.grad_weight * r + ref.grad_bias * d, allowed, "grad_weight")
    assert_within(backward.grad_bias, ref.grad_bias, of_bias, "grad_bias")
    return forward, backward


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(renormalised(shape, dtype), **H200)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    check(renormalised((5, 6, 40), layout=layout), **A100)


@pytest.mark.parametrize(("walk", "exchange"), REGIMES, ids="-".join)
def test_every_regime(walk: str, exchange: str) -> None:
    """Blocks that share a channel go by the same statistics, however they meet, and whichever moves them first."""
    shape, options = smallest(FORWARD, walk, exchange)
    inputs = renormalised(shape, renorm=(3.0, 5.0, 4, True), num_batches_tracked=3)
    for seed in (0, 1):
        check(inputs, seed=seed, **options)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 9])
def test_the_warm_up(batches: int, smooth: bool, momentum: float | None) -> None:
    inputs = renormalised((40, 24), renorm=(3.0, 5.0, 4, smooth), num_batches_tracked=batches, momentum=momentum)
    forward, _ = check(inputs, **H200)
    assert forward.saved is not None
    assert (forward.saved[6] == 1).all() == (batches == 0 or (batches < 4 and not smooth))
    if batches == 0:
        plain = run(FORWARD, replace(inputs, renorm=None), **H200)
        assert torch.equal(forward.output, plain.output) and torch.equal(forward.saved[:6], plain.saved)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (math.inf, math.inf), (1.5, math.inf)], ids=str)
def test_bounds(bounds: tuple[float, float]) -> None:
    check(renormalised((40, 24), renorm=(*bounds, 0, False)), **H200)


@pytest.mark.parametrize("vectors", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_vectors_of_other_types(vectors: torch.dtype) -> None:
    check(renormalised((40, 24), vectors=vectors), **H200)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_residual_and_activation(model: dict[str, Any], dtype: torch.dtype, activation: str) -> None:
    """Against batch norm with the weight and bias that it amounts to."""
    shape = (4, 10, 25)
    residual = normal(shape, dtype, seed=9)
    inputs = renormalised(
        shape, dtype, vectors=torch.float64, activation=activation, residual=residual, negative_slope=0.1
    )
    assert inputs.weight is not None and inputs.bias is not None
    r, d = factors(inputs)
    plain = replace(inputs, renorm=None, weight=inputs.weight * r, bias=inputs.bias + inputs.weight * d)
    found = []
    for one in (inputs, plain):
        forward = run(FORWARD, one, **model)
        wants = activation != "identity"
        backward = run(BACKWARD, replace(one, wants_residual=wants), saved=forward.saved, **model)
        found.append((forward, backward))
    (mine, of_mine), (right, of_right) = found
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mine.output, right.output, rtol=8 * eps, atol=100 * acc_eps(dtype))
    torch.testing.assert_close(of_mine.grad_input, of_right.grad_input, rtol=8 * eps, atol=100 * acc_eps(dtype))
    assert of_right.grad_weight is not None and of_right.grad_bias is not None
    torch.testing.assert_close(
        of_mine.grad_weight, of_right.grad_weight * r + of_right.grad_bias * d, rtol=1e-3, atol=400 * acc_eps(dtype)
    )
    torch.testing.assert_close(of_mine.grad_bias, of_right.grad_bias, rtol=1e-3, atol=400 * acc_eps(dtype))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_padded_batches(dtype: torch.dtype, model: dict[str, Any]) -> None:
    shape = (5, 6, 40)
    where = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    inputs = renormalised(shape, dtype, num_batches_tracked=3)
    assert inputs.grad_output is not None
    planes = [torch.where(where[:, None], t, math.nan) for t in (inputs.x, inputs.grad_output)]
    inputs = replace(inputs, x=planes[0], grad_output=planes[1], valid=where)
    forward, backward = check(inputs, lambda t: t.transpose(1, 2)[where], **model)
    for t in (forward.output, backward.grad_input):
        assert t is not None and not t.transpose(1, 2)[~where].any()


def test_nothing_that_counts_and_a_lone_value() -> None:
    """The host does not know: running statistics stay; a lone value is normalised by them, within the bounds."""
    shape = (3, 6, 20)
    for lengths in (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 0])):
        inputs = renormalised(shape, renorm=(math.inf, math.inf, 0, False), num_batches_tracked=2)
        inputs = replace(inputs, valid=lengths)
        result = run(FORWARD, inputs, **H200)
        assert torch.equal(result.running_mean, inputs.running_mean) and result.num_batches_tracked == 3  # type: ignore[arg-type]
        assert torch.equal(result.running_var, inputs.running_var)  # type: ignore[arg-type]
        assert result.output is not None and result.output.isfinite().all()
        if lengths.any():
            assert inputs.weight is not None and inputs.running_mean is not None and inputs.running_var is not None
            x = inputs.x[1, :, 0]
            right = (x - inputs.running_mean) / (inputs.running_var + inputs.eps).sqrt() * inputs.weight + inputs.bias
            torch.testing.assert_close(result.output[1, :, 0], right)
        found = run(BACKWARD, inputs, saved=result.saved, **H200)
        assert found.grad_input is not None and found.grad_input.isfinite().all()
        assert found.grad_weight is not None and found.grad_weight.isfinite().all()


@pytest.mark.parametrize("exchange", ["cluster", "grid", "two_launches"])
def test_bits_do_not_depend_on_the_schedule(exchange: str) -> None:
    shape, options = smallest(FORWARD, "columns", exchange)
    inputs = renormalised(shape)
    found = [run(FORWARD, inputs, seed=seed, **options) for seed in range(3)]
    for other in found[1:]:
        for name, t in found[0].tensors().items():
            assert torch.equal(t, other.tensors()[name]), name
