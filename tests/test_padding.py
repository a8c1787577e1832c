"""Padded batches: what counts is normalised as if it had come alone, all else is zero, whatever lies there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bn_ext
from bn_ext.functional import batch_norm
from reference import assert_within, grad_input_tolerance, grad_param_tolerance, output_tolerance, reference
from support import FLOATS, LAYOUTS, name_of, normal

C, EPS = 6, 1e-5
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
# Lengths and masks of a batch, by the name of what they are like; L, and how many samples.
SHAPES = {"short": (8, 9), "middle": (7, 50), "runs": (5, 100), "long": (3, 3000), "many": (300, 5), "flat": (40, None)}


def positions_of(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments that say what counts, and where that is: booleans (N, L), or (N,)."""
    generator = torch.Generator().manual_seed(seed)
    n, length = shape[0], shape[2] if len(shape) == 3 else None
    if length is None:
        mask = torch.rand(n, generator=generator) < 0.6
        return {"mask": mask}, mask
    lengths = torch.randint(0, length + 1, (n,), generator=generator)
    lengths[0], lengths[-1] = length, 0
    steps = torch.arange(length)
    if kind == "lengths":
        return {"lengths": lengths}, steps < lengths[:, None]
    if kind == "left padded":
        mask = steps >= lengths[:, None]
    elif kind == "right padded":
        mask = steps < lengths[:, None]
    else:
        mask = torch.rand(n, length, generator=generator) < 0.6
    return {"mask": mask}, mask


KINDS = ("lengths", "right padded", "left padded", "any")


def on(device: str, valid: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in valid.items()}


def rows_of(t: Tensor, where: Tensor) -> Tensor:
    """What counts of t, (M, C)."""
    where = where.to(t.device)
    return t[where] if t.dim() == 2 else t.transpose(1, 2)[where]


def spoilt(t: Tensor, where: Tensor) -> Tensor:
    """t with NaN where it does not count, in its own layout; as it is where its elements share memory."""
    if len(set(_offsets(t))) < t.numel():
        return t
    there = where.to(t.device).unsqueeze(1)
    with torch.no_grad():
        return t.copy_(torch.where(there, t, math.nan))


def _offsets(t: Tensor) -> list[int]:
    at = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        at = (at[:, None] + torch.arange(size) * stride).flatten()
    return at.tolist()  # type: ignore[no-any-return]


def assert_zero_beyond(t: Tensor, where: Tensor) -> None:
    beyond = rows_of(t, ~where)
    assert torch.equal(beyond, torch.zeros_like(beyond))


def shape_named(name: str, channels: int = C) -> tuple[int, ...]:
    n, length = SHAPES[name]
    return (n, channels) if length is None else (n, channels, length)


def norm_of(device: str = "cpu", channels: int = C, **options: Any) -> bn_ext.FusedBatchNorm1d:
    norm = bn_ext.FusedBatchNorm1d(channels, device=device, **options)
    with torch.no_grad():
        for k, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if t is not None:
                t.copy_(normal((channels,), torch.float64, device, seed=40 + k).abs() + 0.5)
    return norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "left padded", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_rows_that_are_joined_and_those_left_over(device: str, dtype: torch.dtype, kind: str, training: bool) -> None:
    """(N, L, C) of few channels: rows that follow each other are taken together, the thousands left one by one."""
    shape = (4000, 3, 31)
    valid, where = positions_of(shape, kind)
    x = spoilt(LAYOUTS["permuted"](normal(shape, dtype, device, mean=300.0, seed=1)), where).requires_grad_()
    g = spoilt(LAYOUTS["permuted"](normal(shape, dtype, device, seed=2)), where)
    norm = norm_of(device, 3, dtype=dtype).train(training)
    fixed = {} if training else {"running_mean": norm.running_mean, "running_var": norm.running_var, "training": False}
    rows, of_g = rows_of(x.detach(), where), rows_of(g, where)
    ref = reference(rows, norm.weight.detach(), norm.bias.detach(), of_g, eps=EPS, **fixed)
    y = norm(x, **on(device, valid))
    dx, dw, db = torch.autograd.grad(y, (x, norm.weight, norm.bias), g)
    assert_within(rows_of(y.detach(), where), ref.output, output_tolerance(ref, dtype), "output")
    assert_within(rows_of(dx, where), ref.grad_input, grad_input_tolerance(ref, dtype), "grad_input")
    assert_within(dw, ref.grad_weight, grad_param_tolerance(ref, "weight", dtype, dtype), "weight")
    assert_within(db, ref.grad_bias, grad_param_tolerance(ref, "bias", dtype, dtype), "bias")
    assert_zero_beyond(y, where)
    assert_zero_beyond(dx, where)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "dtype"), [
    (layout, dtype) for layout in LAYOUTS for dtype in FLOATS
    if dtype == torch.float32 or layout in ("contiguous", "permuted")
])  # fmt: skip
@pytest.mark.parametrize("name", SHAPES)
def test_what_counts_is_normalised_as_if_alone(
    device: str, name: str, dtype: torch.dtype, layout: str, kind: str, training: bool
) -> None:
    """NaN everywhere else, in input and grad_output."""
    shape = shape_named(name)
    valid, where = positions_of(shape, kind)
    x = spoilt(LAYOUTS[layout](normal(shape, dtype, device, mean=3.0, seed=1)), where).requires_grad_()
    g = spoilt(normal(shape, dtype, device, seed=2), where)
    norm = norm_of(device, dtype=torch.float64 if dtype == torch.float64 else torch.float32).train(training)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y = norm(x, **on(device, valid))
    assert y.shape == x.shape and y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    dx, dw, db = torch.autograd.grad(y, (x, norm.weight, norm.bias), g)
    rows, of_g = rows_of(x.detach(), where), rows_of(g, where)
    fixed = {} if training else {"running_mean": mean, "running_var": var, "training": False}
    ref = reference(rows, norm.weight.detach(), norm.bias.detach(), of_g, eps=EPS, **fixed)
    assert_within(rows_of(y.detach(), where), ref.output, output_tolerance(ref, dtype), "output")
    assert_within(rows_of(dx, where), ref.grad_input, grad_input_tolerance(ref, dtype), "grad_input")
    for which, found, expected in (("weight", dw, ref.grad_weight), ("bias", db, ref.grad_bias)):
        tolerance = grad_param_tolerance(ref, which, dtype, norm.weight.dtype)
        assert_within(found, expected, tolerance, f"grad_{which}")
    assert_zero_beyond(y, where)
    assert_zero_beyond(dx, where)
    if not training:
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "left padded", "any"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("name", ["short", "middle", "runs"])
def test_no_bit_depends_on_what_lies_there(device: str, name: str, layout: str, kind: str, training: bool) -> None:
    """Infinities, what overflows when it is squared, and subnormal numbers; short rows are read whole."""
    shape = shape_named(name, 12)
    valid, where = positions_of(shape, kind)

    def results(there: float) -> list[Tensor]:
        norm = norm_of(device, 12).train(training)
        x, g = (
            normal(shape, device=device, seed=seed).masked_fill(~where[:, None].to(device), there) for seed in (1, 2)
        )
        x = LAYOUTS[layout](x).requires_grad_()
        y = norm(x, **on(device, valid))
        return [
            y.detach(),
            *torch.autograd.grad(y, (x, norm.weight, norm.bias), g),
            norm.running_mean,
            norm.running_var,
        ]

    right = results(0.0)
    for there in (math.inf, -math.inf, 3e38, 1e-41):
        for found, expected in zip(results(there), right, strict=True):
            assert torch.equal(found, expected), there


@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_running_statistics_are_those_of_what_counts(device: str, name: str, kind: str, momentum: float | None) -> None:
    shape = shape_named(name)
    padded, alone = norm_of(device, momentum=momentum), norm_of(device, momentum=momentum)
    for seed in range(3):
        valid, where = positions_of(shape, kind, seed)
        x = spoilt(normal(shape, device=device, seed=seed), where)
        padded(x, **on(device, valid))
        alone(rows_of(x, where))
    torch.testing.assert_close(padded.running_mean, alone.running_mean)
    torch.testing.assert_close(padded.running_var, alone.running_var)
    assert padded.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_residual_and_activation_follow_in_the_same_pass(
    device: str, layout: str, kind: str, dtype: torch.dtype, activation: str | None, training: bool
) -> None:
    shape = (5, C, 33)
    valid, where = positions_of(shape, kind)
    weight, bias, mean, var = (normal((C,), device=device, seed=k).abs() + 0.1 for k in range(4))

    def run(padded: bool) -> list[Tensor]:
        x, r = (LAYOUTS[layout](normal(shape, dtype, device, seed=k)) for k in (5, 6))
        g = normal(shape, dtype, device, seed=7)
        made = [spoilt(t, where) if padded else rows_of(t, where) for t in (x, r, g)]
        inputs = [t.detach().requires_grad_() for t in (*made[:2], weight.clone(), bias.clone())]
        more = on(device, valid) if padded else {}
        y = batch_norm(
            inputs[0], mean.clone(), var.clone(), *inputs[2:], training, residual=inputs[1], activation=activation,
            **more,
        )  # fmt: skip
        found = [y.detach(), *torch.autograd.grad(y, inputs, made[2])]
        if padded:
            for t in found[:3]:
                assert_zero_beyond(t, where)
            found[:3] = [rows_of(t, where) for t in found[:3]]
        return found

    # Sums in another order; of 16-bit gradients, one rounding of the result.
    eps = torch.finfo(dtype).eps
    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=4 * eps, atol=40 * eps)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_batches_of_padded_ones(device: str, kind: str) -> None:
    shape, size = (11, C, 20), 4
    valid, where = positions_of(shape, kind)
    x = spoilt(normal(shape, device=device, seed=1), where).requires_grad_()
    g = normal(shape, device=device, seed=2)
    cut, loop = norm_of(device, virtual_batch_size=size), norm_of(device)
    y = cut(x, **on(device, valid))
    pieces = torch.arange(11).chunk(3)
    expected = torch.cat([loop(x[i.to(device)], **{k: t[i].to(device) for k, t in valid.items()}) for i in pieces])
    exact = {} if kind == "any" else {"rtol": 0.0, "atol": 0.0}  # whose values are taken out first where it is whole
    torch.testing.assert_close(y, expected, **exact)
    (dx,), (of_loop,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(dx, of_loop, **exact)
    for a, b in zip(cut.buffers(), loop.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("virtual_batch_size", [None, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "any", "flat"])
def test_second_derivatives(kind: str, training: bool, virtual_batch_size: int | None, activation: str | None) -> None:
    shape = (6, 2) if kind == "flat" else (6, 2, 4)
    valid, where = positions_of(shape, kind, seed=3)
    where[:2] = where[3:5] = True
    valid = {"lengths": where.sum(1)} if kind == "lengths" else {"mask": where}
    x, r = (normal(shape, torch.float64, seed=k).requires_grad_() for k in (1, 2))
    weight, bias = (normal((2,), torch.float64, seed=k).requires_grad_() for k in (3, 4))

    def call(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(
            x, torch.zeros(2).double(), torch.ones(2).double(), weight, bias, training, residual=r,
            activation=activation, virtual_batch_size=virtual_batch_size, **valid,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (x, r, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, r, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_threads(name: str, kind: str) -> None:
    n, length = SHAPES[name]
    shape = (4 * n, 24) if length is None else (4 * n, 24, length)
    valid, where = positions_of(shape, kind)
    x, g = spoilt(normal(shape, seed=1), where).requires_grad_(), normal(shape, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            norm = norm_of(channels=24)
            y = norm(x, **valid)
            found.append([y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), g), *norm.buffers()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(deadline=None, max_examples=200)
@given(data=st.data(), n=st.integers(1, 9), channels=st.integers(1, 20), length=st.integers(1, 80))
def test_any_lengths_masks_and_cuts(data: st.DataObject, n: int, channels: int, length: int) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    size = data.draw(st.one_of(st.none(), st.integers(2, 10)))
    if data.draw(st.booleans()):
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=n, max_size=n)))
        lengths = lengths.to(data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8])))
        valid, where = {"lengths": lengths}, torch.arange(length) < lengths[:, None]
    else:
        where = torch.rand(n, length, generator=torch.Generator().manual_seed(n)) < data.draw(st.floats(0, 1))
        valid = {"mask": where}
    x = spoilt(LAYOUTS[layout](normal((n, channels, length), seed=n)), where).requires_grad_()
    norm, alone = norm_of(channels=channels, virtual_batch_size=size), norm_of(channels=channels)
    pieces = torch.arange(n).chunk(1 if size is None else math.ceil(n / size))
    if len(pieces) > 1 and len(pieces[-1]) * length == 1:
        pieces = (*pieces[:-2], torch.cat(pieces[-2:]))
    expected = None
    if all(len(i) * length > 1 for i in pieces):  # else it raises whatever counts
        with contextlib.suppress(ValueError):
            expected = [alone(rows_of(x[i], where[i])) for i in pieces]
    if expected is None:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            norm(x, **valid)
        return
    y = norm(x, **valid)
    assert_zero_beyond(y, where)
    torch.testing.assert_close(rows_of(y, where), torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(norm.buffers()), list(alone.buffers()), rtol=1e-4, atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum() + (y * y).sum(), x)
    (of_alone,) = torch.autograd.grad(torch.cat(expected).sum() + (torch.cat(expected) ** 2).sum(), x)
    assert_zero_beyond(dx, where)
    torch.testing.assert_close(rows_of(dx, where), rows_of(of_alone, where), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.06)], ids=name_of)
def test_large_batches_of_short_rows(dtype: torch.dtype, tolerance: float, activation: str, kind: str) -> None:
    """Written past the caches, and read in blocks of whole channels, of which the last is a shorter one."""
    shape = (1500, 101, 31)
    valid, where = positions_of(shape, kind)
    x, r = (spoilt(normal(shape, dtype, mean=2.0, seed=k), where).requires_grad_() for k in (1, 2))
    norm, alone = bn_ext.BatchNormAct1d(101, activation), bn_ext.BatchNormAct1d(101, activation)
    y = norm(x, r, **valid)
    rows = [rows_of(t.detach(), where).requires_grad_() for t in (x, r)]
    expected = alone(*rows)
    g = spoilt(normal(shape, dtype, seed=3), where)
    found = torch.autograd.grad(y, (x, r, *norm.parameters()), g)
    right = torch.autograd.grad(expected, (*rows, *alone.parameters()), rows_of(g, where))
    for t, of_rows in zip((y.detach(), *found[:2]), (expected.detach(), *right[:2]), strict=True):
        assert_zero_beyond(t, where)
        torch.testing.assert_close(rows_of(t, where), of_rows, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2:], right[2:], rtol=1e-3, atol=0.5 if dtype == torch.bfloat16 else 1e-2)


def test_a_length_of_zero_and_no_value_at_all(device: str) -> None:
    x = torch.full((3, C, 5), math.nan, device=device, requires_grad=True)
    norm = norm_of(device)
    before = [b.clone() for b in norm.buffers()]
    y = norm(x, lengths=torch.zeros(3, dtype=torch.int64, device=device))
    found = torch.autograd.grad(y.sum(), (x, norm.weight, norm.bias))
    assert not y.any() and not any(t.any() for t in found)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    assert norm.num_batches_tracked == before[2] + 1  # as of a batch without elements
    assert not norm.eval()(x, lengths=torch.zeros(3, dtype=torch.int64, device=device)).any()


Call = Callable[..., Tensor]


def errors_of(call: Call, **valid: Any) -> tuple[type[BaseException], str]:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call(**valid)
    return caught.type, str(caught.value)


def test_errors_come_before_anything_changes(device: str) -> None:
    x, norm = normal((4, C, 5), device=device), norm_of(device)
    before = [b.clone() for b in norm.buffers()]

    def module(**valid: Any) -> Tensor:
        return norm(x, **valid)

    def function(**valid: Any) -> Tensor:
        return batch_norm(x, norm.running_mean, norm.running_var, training=True, **valid)

    ones = torch.ones(4, dtype=torch.int64, device=device)
    full = torch.ones(4, 5, dtype=torch.bool, device=device)
    for call in (module, function):
        for kind, text, valid in [
            (ValueError, "only one of them", {"lengths": ones, "mask": full}),
            (TypeError, "lengths should be a tensor, but is list", {"lengths": [1, 2, 3, 4]}),
            (TypeError, "lengths should be a tensor of integers", {"lengths": ones.float()}),
            (TypeError, "lengths should be a tensor of integers", {"lengths": ones.bool()}),
            (TypeError, "mask should be a tensor of booleans", {"mask": full.int()}),
            (ValueError, "lengths should be of size", {"lengths": ones[:3]}),
            (ValueError, "lengths should be of size", {"lengths": ones[:, None]}),
            (ValueError, "mask should have the size of input", {"mask": full[:, :4]}),
            (ValueError, "mask should have the size of input", {"mask": full[:, None].expand(4, C, 5)}),
        ]:
            found = errors_of(call, **valid)
            assert found[0] is kind and text in found[1], found
        if device == "cpu":
            for wrong in (torch.tensor([1, 2, 6, 3]), torch.tensor([1, -1, 2, 3])):
                assert "lengths should be from 0 to 5" in errors_of(call, lengths=wrong)[1]
            single = torch.tensor([0, 1, 0, 0])
            for lone in ({"lengths": single}, {"mask": torch.arange(5) < single[:, None]}):
                text = "Expected more than 1 value per channel when training, got input size torch.Size([4, 6, 5])"
                assert errors_of(call, **lone) == (ValueError, text)
    assert errors_of(lambda **v: norm(x[..., 0], **v), lengths=ones)[0] is ValueError
    assert all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))


def test_lengths_of_evaluation_are_checked_too() -> None:
    norm = norm_of().eval()
    x = normal((4, C, 5))
    with pytest.raises(ValueError, match="from 0 to 5"):
        norm(x, lengths=torch.tensor([1, 2, 6, 3]))
    assert norm(x, lengths=torch.tensor([1, 0, 0, 0]))[0, :, 0].all()  # one value is enough here


def test_the_residual_stays_a_whole_batch_without_statistics(device: str) -> None:
    shape = (4, C, 5)
    valid, where = positions_of(shape, "lengths")
    x = spoilt(normal(shape, device=device), where)
    norm = norm_of(device, track_running_stats=False).eval()
    torch.testing.assert_close(rows_of(norm(x, **on(device, valid)), where), norm(rows_of(x, where)))


def test_what_is_saved_is_watched(device: str) -> None:
    """Whoever writes lengths before backward is told so."""
    x = normal((4, C, 5), device=device).requires_grad_()
    lengths = torch.tensor([1, 5, 3, 2], device=device)
    y = norm_of(device)(x, lengths=lengths)
    lengths.fill_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_batch_norm_act(device: str) -> None:
    shape = (4, C, 7)
    valid, where = positions_of(shape, "any")
    x, r = (spoilt(normal(shape, device=device, seed=k), where) for k in (1, 2))
    for activation in (*ACTIVATIONS, nn.Sigmoid()):
        block = bn_ext.BatchNormAct1d(C, activation=activation, device=device)
        for residual in (None, r, r[:1].nan_to_num()):
            y = block(x, residual=residual, **on(device, valid))
            norm = bn_ext.FusedBatchNorm1d(C, device=device)
            rows = norm(rows_of(x, where))
            if residual is not None:
                rows = rows + rows_of(residual.expand(shape), where)
            torch.testing.assert_close(rows_of(y, where), block.act(rows), rtol=1e-5, atol=1e-5)
            assert_zero_beyond(y, where)
