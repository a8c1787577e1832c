"""The CUDA kernels of padded batches, run on the CPU: what counts, and zeros elsewhere, whatever lies there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import assert_within, grad_input_tolerance, grad_param_tolerance, output_tolerance, reference
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Pass, Result, walk_of
from simt_support import (
    A100,
    BACKWARD,
    FORWARD,
    H200,
    INFERENCE,
    INFERENCE_BACKWARD,
    MODELS,
    WALKS,
    ids,
    make,
    momentum_of,
    run,
)
from support import LAYOUTS, name_of, normal

SHAPES = ((5, 6, 40), (3, 70, 9), (4, 2, 3000), (40, 24), (300, 3), (2, 1, 33), (1, 5, 17))
PASSES = (FORWARD, INFERENCE, BACKWARD, INFERENCE_BACKWARD)


def where_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(shape[0], *shape[2:], generator=generator) < 0.6
    where[0, ...] = True
    return where


def lengths_of(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(0, shape[2] + 1, (shape[0],), generator=torch.Generator().manual_seed(seed))
    lengths[0] = shape[2]
    return lengths, torch.arange(shape[2]) < lengths[:, None]


def rows_of(t: Tensor, where: Tensor) -> Tensor:
    return t[where] if t.dim() == 2 else t.transpose(1, 2)[where]


def spoilt(t: Tensor, where: Tensor) -> Tensor:
    """NaN where it does not count, in t's own strides; as it is where elements share memory."""
    spread = torch.empty(t.untyped_storage().nbytes() // t.itemsize, dtype=torch.int64).zero_()
    at = torch.arange(spread.numel()).as_strided(t.shape, t.stride(), t.storage_offset())
    if at.unique().numel() < t.numel():
        return t
    flat = torch.empty(spread.numel(), dtype=t.dtype).set_(t.untyped_storage()).clone()
    found = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    return found.copy_(torch.where(where.unsqueeze(1), found, math.nan))


def padded(inputs: Inputs, valid: Tensor, where: Tensor) -> Inputs:
    assert inputs.grad_output is not None
    x, g = spoilt(inputs.x, where), spoilt(inputs.grad_output, where)
    return replace(inputs, x=x, grad_output=g, valid=valid)


def saved_of(pass_: Pass, inputs: Inputs, where: Tensor) -> Tensor | None:
    """What forward leaves of what counts."""
    if not pass_.backward:
        return None
    rows = replace(inputs, x=rows_of(inputs.x, where).contiguous(), valid=None, grad_output=None)
    return run(FORWARD if pass_ == BACKWARD else INFERENCE, replace(rows, activation="identity"), **H200).saved


def check(pass_: Pass, inputs: Inputs, where: Tensor, **options: Any) -> Result:
    assert inputs.grad_output is not None
    result = run(pass_, inputs, saved=saved_of(pass_, inputs, where), **options)
    dtype = inputs.x.dtype
    fixed = pass_ in (INFERENCE, INFERENCE_BACKWARD)
    ref = reference(
        rows_of(inputs.x, where), inputs.weight, inputs.bias, rows_of(inputs.grad_output, where),
        running_mean=inputs.running_mean, running_var=inputs.running_var, training=not fixed, eps=inputs.eps,
        momentum=momentum_of(inputs),
    )  # fmt: skip
    for found, right, tolerance in (
        (result.output, ref.output, output_tolerance(ref, dtype)),
        (result.grad_input, ref.grad_input, grad_input_tolerance(ref, dtype)),
    ):
        if found is not None:
            assert_within(rows_of(found, where), right, tolerance, pass_.name)
            beyond = rows_of(found, ~where)
            assert torch.equal(beyond, torch.zeros_like(beyond))
    for which, mine, right in (
        ("weight", result.grad_weight, ref.grad_weight),
        ("bias", result.grad_bias, ref.grad_bias),
    ):
        if mine is not None:
            assert_within(mine, right, grad_param_tolerance(ref, which, dtype, mine.dtype), f"grad_{which}")
    if pass_ == FORWARD and inputs.running_mean is not None:
        torch.testing.assert_close(result.running_mean, ref.running_mean, check_dtype=False, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.running_var, ref.running_var, check_dtype=False, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_every_pass(pass_: Pass, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    if kind == "lengths" and len(shape) == 2:
        pytest.skip("lengths are of a last dimension")
    valid, where = lengths_of(shape) if kind == "lengths" else (where_of(shape),) * 2
    check(pass_, padded(make(shape, dtype), valid, where), where, **H200)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_every_layout(pass_: Pass, dtype: torch.dtype, layout: str) -> None:
    for shape in ((5, 6, 40), (40, 24), (4, 8, 7), (24, 3, 5)):
        where = where_of(shape)
        check(pass_, padded(make(shape, dtype, layout), where, where), where, **A100)
        if len(shape) == 3:
            lengths, where = lengths_of(shape)
            check(pass_, padded(make(shape, dtype, layout), lengths, where), where, **A100)


def test_every_walk() -> None:
    """Vectors whose elements have one position, neighbouring ones, those of several samples; and single elements."""
    found = set()
    for shape, layout in itertools.product(((5, 6, 40), (64, 24), (24, 8, 7), (50, 3), (24, 3, 6)), LAYOUTS):
        where = where_of(shape)
        result = check(FORWARD, padded(make(shape, layout=layout), where, where), where, **H200)
        found.add((walk_of(result.plan), result.plan["vector"], result.plan["tail"] > 0))
    for walk in WALKS:
        assert {(walk, 4, False), ("columns" if walk == "folded" else walk, 1, False)} <= found, walk
    assert ("folded", 4, True) in found


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_many_parts(pass_: Pass, model: dict[str, Any]) -> None:
    for shape in ((64, 2, 700), (5000, 5)):
        where = where_of(shape)
        check(pass_, padded(make(shape, num_batches_tracked=4, momentum=None), where, where), where, **model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu by mask", "leaky_relu by mask"])
def test_residual_and_activation(activation: str, dtype: torch.dtype, training: bool) -> None:
    """Against the kernels of a whole batch, of what counts alone."""
    activation, _, by_mask = activation.partition(" by ")
    for shape, layout in itertools.product(((4, 10, 25), (5, 4, 48), (23, 3, 5)), ("contiguous", "permuted")):
        check_activated(shape, dtype, layout, activation, training=training, leaves_mask=bool(by_mask))


def check_activated(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str, *, training: bool, leaves_mask: bool
) -> None:
    lengths, where = lengths_of(shape)
    residual = LAYOUTS[layout](normal(shape, dtype, seed=9))
    plain = make(shape, dtype, layout, activation=activation, negative_slope=0.1, residual=residual)
    plain.leaves_mask = leaves_mask
    assert plain.residual is not None and plain.grad_output is not None
    forward, backward = (FORWARD, BACKWARD) if training else (INFERENCE, INFERENCE_BACKWARD)
    of_rows = {"residual": rows_of(plain.residual, where), "grad_output": rows_of(plain.grad_output, where)}
    alone = replace(plain, x=rows_of(plain.x, where), **of_rows)
    whole = replace(padded(plain, lengths, where), residual=spoilt(plain.residual, where))
    right, found = run(forward, alone, **H200), run(forward, whole, **H200)
    eps = torch.finfo(dtype).eps
    assert found.output is not None and right.output is not None and right.saved is not None
    torch.testing.assert_close(rows_of(found.output, where), right.output, rtol=4 * eps, atol=8 * eps)
    assert not rows_of(found.output, ~where).any()
    if leaves_mask:
        bits = bits_of(found, dtype)
        assert torch.equal(rows_of(bits, where), bits_of(right, dtype))
        assert not rows_of(bits, ~where).any()
    options = {"training": training, "wants_residual": activation != "identity", "leaves_mask": False}
    right = run(backward, replace(alone, **options, mask=right.mask), saved=right.saved, **H200)
    found = run(backward, replace(whole, **options, mask=found.mask), saved=found.saved, **H200)
    for name in ("grad_input", "grad_residual"):
        mine, theirs = getattr(found, name), getattr(right, name)
        if mine is not None:
            torch.testing.assert_close(rows_of(mine, where), theirs, rtol=4 * eps, atol=40 * eps)
            assert not rows_of(mine, ~where).any()
    for name in ("grad_weight", "grad_bias"):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=1e-3, atol=40 * eps)


# A gradient that is one and the same, so that what is left of it once it is centred is small beside it; one that an
# activation takes beyond float16's numbers, and one that it takes below them.
@pytest.mark.parametrize("size", [1.0, 60000.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("activation", [*ACTIVATIONS[1:], "silu by sum", "relu by mask"])
def test_nothing_between_the_activation_and_the_sums_is_rounded(
    activation: str, dtype: torch.dtype, size: float
) -> None:
    activation, _, by = activation.partition(" by ")
    shape, lengths = (6, 5, 70), torch.tensor([70, 0, 9, 70, 64, 1])
    where = torch.arange(70) < lengths[:, None]
    inputs = make(shape, dtype, activation=activation, negative_slope=0.01, leaves_mask=by == "mask")
    inputs.grad_output = torch.full(shape, size).to(dtype)
    inputs.weight = torch.full((5,), 0.1)
    inputs.residual = normal(shape, dtype, seed=9) if by else None
    alone = {name: rows_of(getattr(inputs, name), where) for name in ("x", "grad_output", "residual")
             if getattr(inputs, name) is not None}  # fmt: skip
    found = []
    for one in (replace(inputs, **alone), replace(inputs, valid=lengths)):
        forward = run(FORWARD, one, **H200)
        found.append(run(BACKWARD, replace(one, leaves_mask=False, mask=forward.mask), saved=forward.saved, **H200))
    right, mine = found
    assert right.grad_input is not None and mine.grad_input is not None
    dx = rows_of(mine.grad_input, where)
    eps, largest = torch.finfo(dtype).eps, right.grad_input.abs().max().item()
    torch.testing.assert_close(dx, right.grad_input, rtol=2 * eps, atol=2 * eps * largest)
    for name in ("grad_weight", "grad_bias"):
        one, other = getattr(mine, name), getattr(right, name)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def bits_of(result: Result, dtype: torch.dtype) -> Tensor:
    """The mask's bits, each at its element's place."""
    assert result.mask is not None and result.output is not None
    elements = 16 // dtype.itemsize
    bits = (result.mask[:, None] >> torch.arange(elements, dtype=torch.uint8)) & 1
    return bits.flatten()[: result.output.numel()].as_strided(result.output.shape, result.output.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lengths_out_of_range_are_clamped(dtype: torch.dtype) -> None:
    shape = (4, 6, 20)
    lengths = torch.tensor([25, -3, 20, 7])
    where = torch.arange(20) < lengths[:, None]
    for pass_ in PASSES:
        check(pass_, padded(make(shape, dtype), lengths, where), where, **H200)


def test_nothing_and_a_lone_value() -> None:
    """The host does not know: running statistics stay, the counter moves, nothing is NaN."""
    shape = (3, 6, 20)
    for lengths in (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 0])):
        where = torch.arange(20) < lengths[:, None]
        inputs = padded(make(shape, num_batches_tracked=2), lengths, where)
        result = run(FORWARD, inputs, **H200)
        assert result.output is not None and result.saved is not None and inputs.bias is not None
        expected = torch.zeros(shape)
        expected[where[:, None].expand(shape)] = inputs.bias.repeat(int(lengths.sum()))
        torch.testing.assert_close(result.output, expected)
        assert torch.equal(result.running_mean, inputs.running_mean)  # type: ignore[arg-type]
        assert torch.equal(result.running_var, inputs.running_var) and result.num_batches_tracked == 3  # type: ignore[arg-type]
        found = run(BACKWARD, inputs, saved=result.saved, **H200)
        assert found.grad_input is not None and found.grad_weight is not None
        assert found.grad_input.isfinite().all() and found.grad_weight.isfinite().all()


def test_extreme_values() -> None:
    """Large means, values whose squares overflow float, an outlier first."""
    shape = (5, 6, 40)
    lengths, where = lengths_of(shape)
    for options in ({"mean": 1e4}, {"mean": 1e6, "std": 10.0}, {"std": 1e25}):
        check(FORWARD, padded(make(shape, vectors=None, **options), lengths, where), where, **H200)
    inputs = make(shape)
    inputs.x[0, :, 0] = 1e4
    check(FORWARD, padded(inputs, lengths, where), where, **H200)


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("pass_", [BACKWARD, INFERENCE_BACKWARD], ids=ids)
def test_some_gradients(pass_: Pass, wants: tuple[bool, bool, bool]) -> None:
    shape = (5, 6, 40)
    lengths, where = lengths_of(shape)
    result = check(pass_, padded(make(shape, wants=wants), lengths, where), where, **H200)
    found = (result.grad_input, result.grad_weight, result.grad_bias)
    assert tuple(t is not None for t in found) == wants


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_in_place(dtype: torch.dtype) -> None:
    for shape, layout in itertools.product(((5, 6, 40), (24, 3, 5)), ("contiguous", "permuted")):
        lengths, where = lengths_of(shape)
        inputs = padded(make(shape, dtype, layout, activation="relu"), lengths, where)
        right, found = run(INFERENCE, inputs, **H200), run(INFERENCE, replace(inputs, in_place=True), **H200)
        assert torch.equal(found.output, right.output) and not rows_of(found.output, ~where).any()  # type: ignore[arg-type]


# ---- what is moved ----


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_padding_is_not_read_and_all_is_written_once(pass_: Pass, layout: str, dtype: torch.dtype, kind: str) -> None:
    """Sums read what counts. The pass that writes reads the vectors with something that counts."""
    shape, vector = (8, 16, 400), 16 // dtype.itemsize
    lengths = torch.tensor([0, 400, 1, 40, 77, 200, 399, 16])
    where = torch.arange(400) < lengths[:, None]
    inputs = padded(make(shape, dtype, layout), lengths if kind == "lengths" else where, where)
    result = run(pass_, inputs, saved=saved_of(pass_, inputs, where), **H200)
    summed = 16 * int(lengths.sum()) * dtype.itemsize
    whole = summed if layout == "permuted" else 16 * int((-(-lengths // vector)).sum()) * 16
    of_x, of_dy = {
        FORWARD: ([summed, whole], [0, 0]),
        INFERENCE: ([whole], [0]),
        BACKWARD: ([summed, whole], [summed, whole]),
        INFERENCE_BACKWARD: ([summed, 0, 0], [summed, whole, 0]),  # the last one ends with the parameters' gradients
    }[pass_]
    for name, right in (("x", of_x), ("dy", of_dy)):
        assert [launch["buffers"].get(name, {}).get("read_bytes", 0) for launch in result.launches] == right
    for name in pass_.outputs():
        times = [launch["buffers"].get(name, {}).get("writes_of_a_byte") for launch in result.launches]
        assert [t for t in times if t is not None] == [[1, 1]]


def test_all_that_follows_batch_norm_is_written_once_too() -> None:
    shape = (4, 8, 256)
    lengths = torch.tensor([0, 256, 128, 64])
    where = torch.arange(256) < lengths[:, None]
    inputs = padded(make(shape, activation="relu", residual=normal(shape, seed=9), leaves_mask=True), lengths, where)
    forward = run(FORWARD, inputs, **H200)
    counted = forward.launches[-1]["buffers"]
    assert counted["residual"]["read_bytes"] == counted["x"]["read_bytes"] == 8 * int(lengths.sum()) * 4
    assert counted["mask"]["write_bytes"] == inputs.x.nbytes // 16
    given = replace(inputs, leaves_mask=False, mask=forward.mask, wants_residual=True)
    backward = run(BACKWARD, given, saved=forward.saved, **H200)
    assert len(backward.launches) == 2
    for name in ("dx", "grad_residual"):
        times = [launch["buffers"].get(name, {}).get("writes_of_a_byte") for launch in backward.launches]
        assert [t for t in times if t is not None] == [[1, 1]], name


@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_half_full_moves_less_than_a_whole_batch(pass_: Pass) -> None:
    """Of a tensor that no shared memory holds, in the bytes of all that is read and written."""
    shape, few = (16, 16, 512), {"device": "A100", "sms": 2, "shared_per_block": 34 << 10, "shared_per_sm": 68 << 10}
    lengths = torch.full((16,), 256)
    inputs = make(shape, wants=(True, pass_.training, pass_.training))
    whole, half = run(pass_, inputs, **few), run(pass_, replace(inputs, valid=lengths), **few)
    moved = [sum(r.counted(name, f"{verb}_bytes") for name in ("x", "dy", "y", "dx") for verb in ("read", "write"))
             for r in (whole, half)]  # fmt: skip
    assert moved[1] < moved[0]
    sweeps = 2 if pass_.training else 1
    inputs_read = {FORWARD: 1, INFERENCE: 1, BACKWARD: 2, INFERENCE_BACKWARD: 1}[pass_]
    assert moved[1] == inputs.x.nbytes * (inputs_read * sweeps + 2) // 2
