"""Padded batches at the edges: masks of other bytes, virtual batches of which nothing counts, and ragged ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bn_ext
from support import normal
from test_padding import C, norm_of, on
from test_ragged import values_of

# Layouts of a batch, by the memory that they lie in.
LAYOUTS: dict[str, Any] = {
    "planes": lambda x: x,
    "rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "flat": lambda x: x[:, :, 0],
}


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_but_zero_is_true(device: str, byte: int, layout: str, size: int | None) -> None:
    """As torch has it: masks that were bytes, of an image or of NumPy, are looked at as booleans."""
    x = LAYOUTS[layout](normal((6, C, 50), device=device))
    mask = torch.rand(x.shape[::2], generator=torch.Generator().manual_seed(3)).lt(0.5).to(device)
    found = []
    for given in (mask, (mask.to(torch.uint8) * byte).view(torch.bool)):
        norm, leaf = norm_of(device, virtual_batch_size=size), x.detach().requires_grad_()
        y = norm(leaf, mask=given)
        y.pow(3).sum().backward()
        found.append([y, leaf.grad, norm.running_var, norm.weight.grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("byte", [1, 255])
def test_one_value_counts_once(byte: int) -> None:
    norm, mask = norm_of(), torch.tensor([[byte, 0], [0, 0]], dtype=torch.uint8).view(torch.bool)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(normal((2, C, 2)), mask=mask)
    assert norm.num_batches_tracked == 0


def penalty(module: Any, x: Tensor, valid: dict[str, Tensor], order: int) -> list[Tensor]:
    """The gradients of a penalty on the derivative of that order."""
    leaf = x.detach().requires_grad_()
    value = module(leaf, **valid).double().pow(3).sum()
    for _ in range(order):
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = first.double().pow(2).sum()
    return list(torch.autograd.grad(value, [leaf, *module.parameters()], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize(("dtype", "order"), [(torch.float64, 2), (torch.bfloat16, 1), (torch.float16, 1)], ids=str)
def test_nothing_counts_in_a_virtual_batch(
    device: str, dtype: torch.dtype, order: int, activation: str | None, kind: str
) -> None:
    """Derivatives of every order go by the others, as if it were not there."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lengths = torch.tensor([5, 7, 0, 0, 3, 6], device=device)
    of = {"lengths": lengths} if kind == "lengths" else {"mask": torch.arange(7, device=device) < lengths[:, None]}
    x = normal((6, C, 7), dtype, device)
    made = {"virtual_batch_size": 2, "device": device, "dtype": wide}
    found = penalty(bn_ext.BatchNormAct1d(C, activation, **made), x, of, order)
    keep = [0, 1, 4, 5]
    less = {name: t[keep] for name, t in of.items()}
    expected = penalty(bn_ext.BatchNormAct1d(C, activation, **made), x[keep], less, order)
    expected[0] = torch.zeros_like(x).index_copy(0, torch.tensor(keep, device=device), expected[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [1, 2])
def test_nothing_counts_at_all(device: str, order: int) -> None:
    of = on(device, {"lengths": torch.zeros(5, dtype=torch.int64)})
    for gradient in penalty(
        bn_ext.BatchNormAct1d(C, "silu", device=device), normal((5, C, 7), device=device), of, order
    ):
        assert not gradient.any()


# ---- ragged ones ----


def jagged_twice(holes: bool) -> Tensor:
    """Four sequences, the same ones each time: one after the other, or with NaN between them."""
    lengths = torch.tensor([3, 5, 4, 2])
    apart = torch.arange(4) * 10 if holes else lengths.cumsum(0) - lengths
    values = torch.full((C, 40 if holes else 14), torch.nan)
    for k, (begin, n) in enumerate(zip(apart.tolist(), lengths.tolist(), strict=True)):
        values[:, begin : begin + n] = normal((C, n), seed=k)
    offsets = torch.tensor([*apart.tolist(), values.shape[1]])
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths if holes else None, jagged_dim=2)


def residual_of(batch: Tensor) -> Tensor:
    values = batch.values().sin()
    return torch.nested.nested_tensor_from_jagged(values, batch.offsets(), batch.lengths(), jagged_dim=2)


def by_function(batch: Tensor, size: int, training: bool) -> tuple[Tensor, list[Tensor]]:
    state = [torch.zeros(C), torch.ones(C)]
    options: dict[str, Any] = {"virtual_batch_size": size, "residual": residual_of(batch)}
    return bn_ext.functional.batch_norm(batch, *state, training=training, **options), state


def by_module(made: Any, batch: Tensor, size: int, training: bool) -> tuple[Tensor, list[Tensor]]:
    module = made(C, virtual_batch_size=size).train(training)
    more = (residual_of(batch),) if made is bn_ext.BatchNormAct1d else ()
    return module(batch, *more), list(module.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [2, 7, 100])
@pytest.mark.parametrize("made", [bn_ext.FusedBatchNorm1d, bn_ext.BatchNormAct1d, bn_ext.FusedBatchRenorm1d, None])
def test_virtual_batches_do_not_see_holes(made: Any, size: int, training: bool) -> None:
    found = []
    for holes in (False, True):
        batch = jagged_twice(holes)
        output, state = by_function(batch, size, training) if made is None else by_module(made, batch, size, training)
        found.append([values_of(output), *state])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_one_value_in_evaluation() -> None:
    offsets, lengths = torch.tensor([0, 1]), torch.tensor([1])
    batch = torch.nested.nested_tensor_from_jagged(normal((C, 1)), offsets, lengths, jagged_dim=2)
    norm = norm_of(virtual_batch_size=2).eval()
    torch.testing.assert_close(norm(batch).values(), norm(batch.values().transpose(0, 1)).transpose(0, 1))
