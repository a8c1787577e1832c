"""Virtual batches where something is out of the ordinary: what is kept for backward, odd counts, sizes and modules."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from bn_ext.functional import batch_norm
from support import FLOATS, LAYOUTS, name_of, normal

OPS = torch.ops.bn_ext
C = 6
SHAPES = {"rows": ((23, C), 6), "planes": ((9, C, 4), 4), "joined": ((9, C), 4), "wide": ((300, C), 64)}


def loop(x: Tensor, r: Tensor | None, size: int, activation: str | None = None, **options: Any) -> Tensor:
    """Of every virtual batch; where the last would have one value a channel, the caller knows better."""
    count = math.ceil(x.shape[0] / size)
    parts = zip(x.chunk(count), (None,) * count if r is None else r.chunk(count), strict=False)
    return torch.cat([
        batch_norm(one, None, None, training=True, residual=other, activation=activation, **options)
        for one, other in parts
    ])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", ["rows", "planes", "wide"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_residual_may_be_overwritten_behind_a_function_that_goes_by_the_sign(
    device: str, create_graph: bool, activation: str, name: str, dtype: torch.dtype, layout: str
) -> None:
    """As of whole batches: backward goes by a mask, so the residual is free when forward has returned."""
    shape, size = SHAPES[name]
    x = LAYOUTS[layout](normal(shape, dtype, device, seed=1)).requires_grad_()
    r, g = normal(shape, dtype, device, seed=2), normal(shape, dtype, device, seed=3)
    expected = torch.autograd.grad(loop(x, r, size, activation), x, g)[0]
    y = batch_norm(x, None, None, training=True, residual=r, activation=activation, virtual_batch_size=size)
    r.fill_(math.nan)
    (found,) = torch.autograd.grad(y, x, g, create_graph=create_graph)
    tolerance = {"rtol": 0.0, "atol": 0.0} if layout == "contiguous" and not create_graph else {}
    torch.testing.assert_close(found, expected, **tolerance)


def test_forwards_mask_has_room_for_every_cut(device: str) -> None:
    """And its operator says so of fake tensors."""
    for n, size, length in [(23, 6, 1), (9, 4, 1), (9, 4, 5), (700, 1, 3), (700, 699, 1), (2, 1, 2)]:
        x, r = (normal((n, C, length), device=device, seed=k) for k in (1, 2))
        arguments = (x, None, None, None, None, None, 0.1, 1e-5, None, None, r, "relu")
        y, saved, mask = OPS.batch_norm_forward(*arguments, virtual_batch_size=size)
        backward = (torch.ones_like(y), x, None, saved, True, [True, False, False, True])
        found = OPS.batch_norm_backward(*backward, None, r, mask, "relu", virtual_batch_size=size)
        assert torch.equal(found[3], (y > 0).to(y.dtype))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments]
            assert OPS.batch_norm_forward(*fakes, virtual_batch_size=size)[2].shape == mask.shape
        with pytest.raises(RuntimeError, match="mask should be"):
            OPS.batch_norm_backward(*backward, None, r, mask[:-1], "relu", virtual_batch_size=size)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [-1, -2, -4])
def test_a_share_of_one_by_zero_is_refused_before_anything_moves(dtype: torch.dtype, count: int) -> None:
    """momentum=None divides by the count, which one of the four pieces makes zero."""
    norm = bn_ext.FusedBatchNorm1d(C, momentum=None, virtual_batch_size=6)
    norm.num_batches_tracked = torch.tensor(count, dtype=dtype)
    before = [b.clone() for b in norm.buffers()]
    with pytest.raises(ZeroDivisionError, match="float division by zero"):
        norm(normal((23, C)))
    assert all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))
    norm.num_batches_tracked = torch.tensor(-5, dtype=dtype)
    norm(normal((23, C)))
    assert norm.num_batches_tracked == -1 and norm.running_mean.isfinite().all()


@pytest.mark.parametrize("count", [
    torch.tensor(0.5), torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(250, dtype=torch.uint8),
    torch.tensor(2.0**25), torch.tensor([3.0]), torch.tensor(3, dtype=torch.int32),
])  # fmt: skip
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_count_that_only_torch_counts_on(count: Tensor, momentum: float | None) -> None:
    x = normal((23, C))
    ours = bn_ext.FusedBatchNorm1d(C, momentum=momentum, virtual_batch_size=6)
    native = nn.BatchNorm1d(C, momentum=momentum)
    ours.num_batches_tracked, native.num_batches_tracked = count.clone(), count.clone()
    expected = torch.cat([native(piece) for piece in x.chunk(4)])
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(native.named_buffers()))


def test_an_error_in_a_later_piece_takes_the_earlier_ones_back() -> None:
    norm = bn_ext.FusedBatchNorm1d(C, virtual_batch_size=6)
    before, calls = [b.clone() for b in norm.buffers()], []
    real = bn_ext.autograd.batch_norm

    def fails(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bn_ext.autograd, "batch_norm", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.func.grad(lambda t: norm(t).sum())(normal((23, C)))
    assert len(calls) == 3
    assert all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))


def test_the_size_may_be_any_integer_and_is_checked_where_it_is_set() -> None:
    norm = bn_ext.FusedBatchNorm1d(C, virtual_batch_size=numpy.int64(6))
    assert norm.virtual_batch_size == 6 and type(norm.virtual_batch_size) is int
    x = normal((23, C))
    expected = loop(x, None, 6)
    assert torch.equal(norm(x), expected)
    assert torch.equal(batch_norm(x, None, None, training=True, virtual_batch_size=numpy.int32(6)), expected)
    for size, kind in [(0, ValueError), (True, TypeError), (2.0, TypeError), (Fraction(4), TypeError)]:
        with pytest.raises(kind, match="virtual_batch_size should be"):
            norm.virtual_batch_size = size  # type: ignore[assignment]
        assert norm.virtual_batch_size == 6
    norm.virtual_batch_size = 2**70  # more than any batch
    assert torch.equal(norm(x), loop(x, None, 23))
    norm.virtual_batch_size = None
    assert "virtual" not in repr(norm)


def test_somebodys_attribute_of_that_name_does_not_cut() -> None:
    x, model = normal((23, C)), nn.BatchNorm1d(C)
    model.virtual_batch_size = 6
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(bn_ext.convert(model)(x), expected)


@pytest.mark.parametrize("shape", [(), (5,), (2, C, 3, 3)])
def test_an_input_of_odd_dimensions_gets_the_error_that_it_gets_without(shape: tuple[int, ...]) -> None:
    raised = []
    for options in ({}, {"virtual_batch_size": 2}):
        for call in (
            bn_ext.FusedBatchNorm1d(C, **options),  # type: ignore[arg-type]
            lambda x, options=options: batch_norm(x, None, None, training=True, **options),
        ):
            try:
                raised.append(str(call(normal(shape)).shape))
            except (ValueError, IndexError, RuntimeError) as error:
                raised.append(f"{type(error).__name__}: {error}")
    assert raised[:2] == raised[2:]


def test_no_channels_are_no_values_of_one_a_channel() -> None:
    x = torch.empty(9, 0)
    norm = bn_ext.FusedBatchNorm1d(0, affine=False, track_running_stats=False, virtual_batch_size=4)
    assert norm(x).shape == x.shape
    assert torch.vmap(norm)(x[None]).shape == (1, 9, 0)


def test_fake_tensors_of_one_value_a_piece_are_refused() -> None:
    norm = bn_ext.FusedBatchNorm1d(C, virtual_batch_size=1, device="meta", track_running_stats=False)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel.*\[1, 6\]"):
        norm(torch.empty(3, C, device="meta"))
    assert norm(torch.empty(3, C, 2, device="meta")).shape == (3, C, 2)


@pytest.mark.parametrize("cls", [bn_ext.FusedBatchNorm1d, bn_ext.FusedBatchRenorm1d])
@pytest.mark.parametrize("kernel", [True, False])
def test_pieces_of_one_value_raise_whatever_counts(cls: Any, kernel: bool) -> None:
    norm, x = cls(C, virtual_batch_size=1), normal((4, C))
    before = [b.clone() for b in norm.buffers()]
    x = x if kernel else x.as_subclass(type("Sub", (Tensor,), {}))
    for mask in (torch.zeros(4).bool(), torch.ones(4).bool()):
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
            norm(x, mask=mask)
    assert all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))
