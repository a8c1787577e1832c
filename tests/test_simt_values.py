"""The CUDA kernels, run on the CPU (tests/simt), on values that are hard: far from zero, drifting, constant, huge,
tiny, infinite, NaN; on drawn calls; and under schedules and leftovers in memory that may not change a bit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import GRAD_PARAM_BOUND, MEAN_BOUND, OUTPUT_BOUND, moments, per_channel
from simt.calls import DTYPES, Inputs, Pass, Result
from simt_support import (
    BACKWARD,
    FORWARD,
    H200,
    MODELS,
    assert_right,
    check,
    ids,
    make,
    reference_of,
    run,
    saved_by_exact_forward,
)
from support import LAYOUTS, Step, module_for, normal, step
from test_nonfinite import INF, NAN, assert_same_kinds
from test_numerics import CONSTANTS, output_error, relative

# One shape for each walk, of some hundred values a channel; odd sizes leave tails.
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "columns": ((600, 68), "contiguous"),
    "folded": ((4001, 3), "contiguous"),
    "by_span": ((301, 8, 7), "contiguous"),
    "planes": ((5, 3, 401), "contiguous"),
    "permuted": ((9, 12, 130), "permuted"),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
walks = pytest.mark.parametrize("walk", SHAPES)


def plain(x: Tensor, **options: Any) -> Inputs:
    """x with a gradient and no parameters."""
    return Inputs(x, normal(tuple(x.shape), x.dtype, mean=0.25, seed=7), **options)


def check_training(inputs: Inputs, **options: Any) -> Result:
    """Forward, then backward from what it saved; the forward's result."""
    result = check(FORWARD, inputs, **options)
    check(BACKWARD, inputs, saved=result.saved, **options)
    return result


@walks
@models
@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e5, 1e6])
def test_mean_to_std_ladder(ratio: float, model: dict[str, Any], walk: str) -> None:
    shape, layout = SHAPES[walk]
    inputs = plain(make(shape, layout=layout, mean=ratio).x)
    result = check_training(inputs, **model)
    assert result.output is not None
    assert output_error(result.output, inputs.x) <= OUTPUT_BOUND


@pytest.mark.parametrize(
    ("shape", "seed"), [((33, 4097), 0), ((33, 4097), 1), ((33, 4097), 2), ((300, 1025), 0)], ids=str
)
def test_mean_of_many_odd_channels(shape: tuple[int, ...], seed: int) -> None:
    """Single elements an access, few rows: with one thread a channel no rounding is averaged, and among thousands of
    channels some would be off by twice the promise."""
    inputs = plain(make(shape, seed=seed).x)
    result = check(FORWARD, inputs, **H200)
    assert result.plan["vector"] == 1 and result.saved is not None
    high, low = result.saved[:2].double()
    _, mean, mean_lo, var = moments(inputs.x)
    assert float((((high - mean) + (low - mean_lo)).abs() / var.sqrt()).max()) <= MEAN_BOUND


@walks
@models
@pytest.mark.parametrize("distance", [1e2, -1e4, 1e6])
def test_outlier_first(distance: float, model: dict[str, Any], walk: str) -> None:
    """A shift taken from the first value is far from the mean here."""
    shape, layout = SHAPES[walk]
    x = normal(shape, mean=3.0)
    x[0].select(-1, 0).fill_(distance) if x.dim() == 3 else x[0].fill_(distance)
    check_training(plain(LAYOUTS[layout](x)), **model)


@models
@pytest.mark.parametrize("mean", [2e-3, 1.0])
@pytest.mark.parametrize("std", [1e-4, 1e-6, 1e-8])
def test_gradients_of_next_to_constant_channels(std: float, mean: float, model: dict[str, Any]) -> None:
    """The variance is far below eps, so invstd is no measure of the spread, and sums must be centred all the same."""
    inputs = plain(make((601, 72), mean=mean, std=std, dtype=torch.float64).x.float())
    ref, result = reference_of(BACKWARD, inputs), run(BACKWARD, inputs, **model)
    assert result.grad_weight is not None and ref.grad_weight is not None
    assert relative(result.grad_weight, ref.grad_weight) <= GRAD_PARAM_BOUND
    assert_right(BACKWARD, inputs, result)


@walks
@models
def test_drifting_mean(model: dict[str, Any], walk: str) -> None:
    """Blocks and threads whose means differ by many standard deviations: the merge carries the variance."""
    shape, layout = SHAPES[walk]
    x = normal(shape).transpose(0, 1).contiguous()
    x += torch.linspace(0, 1e4, x[0].numel()).view_as(x[0])
    check_training(plain(LAYOUTS[layout](x.transpose(0, 1).contiguous())), **model)


@walks
@models
@pytest.mark.parametrize("value", CONSTANTS)
def test_constant_channel_is_exactly_bias(value: float, model: dict[str, Any], walk: str) -> None:
    shape, layout = SHAPES[walk]
    inputs = make(shape, momentum=1.0)
    inputs.x = LAYOUTS[layout](torch.full(shape, value))
    result = run(FORWARD, inputs, **model)
    assert result.output is not None and result.running_mean is not None and result.running_var is not None
    assert inputs.bias is not None
    for actual, right in (
        (result.output, per_channel(inputs.bias, inputs.x).expand_as(inputs.x)),
        (result.running_var, torch.zeros(shape[1])),
        (result.running_mean, torch.full((shape[1],), value)),
    ):
        torch.testing.assert_close(actual, right, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [2, 3, 5, 7, 9, 31, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_constant_channel_of_any_length(dtype: torch.dtype, rows: int) -> None:
    """Sums of few equal values round in other ways than sums of many."""
    for value in (0.1, 1e4 / 3):
        inputs = make((rows, 5), dtype)
        inputs.x[:, 1:3] = value
        result = check(FORWARD, inputs, **H200)
        assert result.output is not None and inputs.bias is not None
        assert torch.equal(result.output[:, 1:3], inputs.bias[1:3].to(dtype).expand(rows, 2))


@walks
@models
@pytest.mark.parametrize("scale", [1e30, 1e19, 1e15, 1e-15])
def test_huge_and_tiny_values_stay_finite(scale: float, model: dict[str, Any], walk: str) -> None:
    """The variance 1e60 is beyond float32, the normalised value and the inverse standard deviation are not."""
    shape, layout = SHAPES[walk]
    inputs = plain(LAYOUTS[layout](normal(shape, mean=0.5) * scale))
    result = check(FORWARD, inputs, **model)
    # Beyond 1e19 the square of invstd, a factor in the gradient, is below the smallest float32.
    gradient = (check if scale <= 1e19 else run)(BACKWARD, inputs, saved=result.saved, **model)
    for value in (*result.tensors().values(), *gradient.tensors().values()):
        assert value.isfinite().all()


@models
def test_one_huge_channel_among_others(model: dict[str, Any]) -> None:
    """Statistics that overflow are taken again in a wider type, of that channel only."""
    x = normal((999, 66), mean=0.5)
    x[:, 17] *= 1e30
    result = check(FORWARD, plain(x), **model)
    assert result.output is not None and result.output.isfinite().all()


def both_passes(inputs: Inputs, **options: Any) -> Step:
    """Training forward and backward as one step."""
    forward = run(FORWARD, inputs, **options)
    backward = run(BACKWARD, inputs, saved=forward.saved, **options)
    count = forward.num_batches_tracked
    return Step(
        output=forward.output, grad_input=backward.grad_input, grad_weight=backward.grad_weight,
        grad_bias=backward.grad_bias, running_mean=forward.running_mean, running_var=forward.running_var,
        num_batches_tracked=None if count is None else torch.tensor(count),
    )  # fmt: skip


@models
@walks
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_non_finite_input_as_native(where: str, value: float, walk: str, model: dict[str, Any]) -> None:
    shape, layout = SHAPES[walk]
    x, g = normal(shape), normal(shape, seed=1)
    channel = x.transpose(0, 1)[1]
    spots = {"first": [0], "last": [channel.numel() - 1], "all": range(channel.numel())}[where]
    for spot in spots:
        channel[tuple(int(i) for i in torch.unravel_index(torch.tensor(spot), channel.shape))] = value
    module = module_for(nn.BatchNorm1d, shape[1])
    given = {key: getattr(module, key).detach().clone() for key in ("weight", "bias", "running_mean", "running_var")}
    ours = both_passes(Inputs(LAYOUTS[layout](x), g, **given, num_batches_tracked=0), **model)
    assert_same_kinds(ours, step(module, x, g))


@models
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_channels_do_not_mix(pass_: Pass, model: dict[str, Any]) -> None:
    """One channel changed: all others keep every bit, whatever vector or block they share."""
    for walk, (shape, layout) in SHAPES.items():
        inputs = make(shape, layout=layout)
        changed = dataclasses.replace(inputs, x=LAYOUTS[layout](inputs.x.clone(memory_format=torch.contiguous_format)))
        changed.x[:, 1] = NAN
        results = [run(pass_, i, saved=saved_by_exact_forward(inputs), **model).tensors()
                   for i in (inputs, changed)]  # fmt: skip
        others = [c for c in range(shape[1]) if c != 1]
        for name, value in results[0].items():
            dim = 0 if value.dim() == 1 else 1
            same = torch.equal(*(r[name].index_select(dim, torch.tensor(others)) for r in results))
            assert same, f"{walk}: {name}"


# ---- what must not change a bit ----


@walks
@models
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_schedule_and_leftovers_change_no_bit(pass_: Pass, model: dict[str, Any], walk: str) -> None:
    """Threads and blocks in any order; workspace of NaNs, zeros, ones; tensors against the one page or the other."""
    shape, layout = SHAPES[walk]
    inputs = make(shape, layout=layout, momentum=None, num_batches_tracked=3)
    outcomes = [
        run(pass_, inputs, seed=seed, workspace_byte=byte, **model)
        for seed, byte in ((0, None), (1, 0), (2, 1), (3, 0x7F))
    ]
    for other in outcomes[1:]:
        assert other.num_batches_tracked == outcomes[0].num_batches_tracked
        for name, value in outcomes[0].tensors().items():
            assert torch.equal(value, other.tensors()[name]), name


# ---- drawn calls ----

sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 32, 33, 64, 65, 100]))
dtypes = st.sampled_from(DTYPES)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A pass, its tensors and options, and the device that it runs on."""
    shape = (draw(sizes), draw(sizes), *([draw(sizes)] if draw(st.booleans()) else []))
    if shape[0] * (shape[2] if len(shape) == 3 else 1) < 2:
        shape = (2, *shape[1:])
    room = torch.Size(shape).numel() > sum(shape) + shape[-1] - len(shape) - 1  # for windows over a line of values
    layouts = st.sampled_from(sorted(name for name in LAYOUTS if room or name != "overlapping"))
    dtype = draw(dtypes)
    low = dtype in (torch.float16, torch.bfloat16)
    vectors = draw(st.fixed_dictionaries({k: st.none() | dtypes for k in ("weight", "bias", "statistics")}))
    return {
        "pass_": draw(st.sampled_from(Pass)),
        "shape": shape,
        "dtype": dtype,
        "layout": draw(layouts),
        "grad_layout": draw(layouts),
        "vectors": vectors,
        "mean": draw(st.sampled_from([0.0, 1.0, -30.0] if low else [0.0, 1.0, -30.0, 1e3, -3e4])),
        "momentum": draw(st.sampled_from([0.1, 0.0, 1.0, None])),
        "wants": draw(st.sampled_from([w for w in itertools.product((True, False), repeat=3) if any(w)])),
        "seed": draw(st.integers(0, 2**16)),
        "model": {
            "device": draw(st.sampled_from(["T4", "A100", "RTX 4090", "H200", "B200"])),
            "sms": draw(st.integers(1, 6)),
            "cooperative": draw(st.integers(0, 1)),
        },
    }  # fmt: skip


@settings(max_examples=80)
@given(call=calls())
def test_any_call_matches_the_reference(call: dict[str, Any]) -> None:
    note(str(call))
    pass_, kinds = call["pass_"], call["vectors"]
    inputs = make(call["shape"], call["dtype"], call["layout"], call["grad_layout"], vectors=torch.float64,
                  mean=call["mean"], seed=call["seed"], momentum=call["momentum"], num_batches_tracked=2,
                  wants=call["wants"])  # fmt: skip
    if not pass_.training and kinds["statistics"] is None:
        kinds["statistics"] = torch.float32
    for name in ("weight", "bias", "running_mean", "running_var"):
        kind = kinds.get(name, kinds["statistics"])
        setattr(inputs, name, None if kind is None else getattr(inputs, name).to(kind))
    check(pass_, inputs, seed=call["seed"], **call["model"])
