"""Packed sequences and jagged tensors: with holes, with a residual, through the functions, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bn_ext
from support import normal
from test_padding import C, norm_of

ROWS = (7, 1, 4)


def packed(seed: int = 0, device: str = "cpu", enforce_sorted: bool = False) -> PackedSequence:
    x = normal((3, 7, C), device=device, seed=seed)
    lengths = torch.tensor(sorted(ROWS, reverse=True) if enforce_sorted else ROWS)
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)


def jagged(seed: int = 0, device: str = "cpu") -> Tensor:
    rows = [normal((n, C), device=device, seed=seed + n) for n in ROWS]
    return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


def with_holes(seed: int = 0, device: str = "cpu") -> Tensor:
    """Values that count in three places, NaN between them."""
    values = torch.full((C, 16), torch.nan, device=device)
    for k, (begin, n) in enumerate(((1, 3), (5, 4), (12, 1))):
        values[:, begin : begin + n] = normal((C, n), device=device, seed=seed + k)
    offsets, lengths = torch.tensor([1, 5, 12, 16], device=device), torch.tensor([3, 4, 1], device=device)
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths, jagged_dim=2)


def narrowed(seed: int = 0, device: str = "cpu") -> Tensor:
    padded = normal((3, 7, C), device=device, seed=seed)
    starts, lengths = (torch.tensor(t, device=device) for t in ([0, 2, 1], [4, 5, 1]))
    return torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged).transpose(1, 2)


def values_of(batch: Any) -> Tensor:
    """The (M, C) values of the sequences, one after the other."""
    if isinstance(batch, PackedSequence):
        return batch.data
    begins = batch.offsets().tolist()
    lengths = batch.lengths()
    counts = batch.offsets().diff().tolist() if lengths is None else lengths.tolist()
    pieces = [batch.values()[:, begin : begin + n] for begin, n in zip(begins, counts, strict=False)]
    return torch.cat(pieces, 1).transpose(0, 1)


MAKES: dict[str, Callable[..., Any]] = {
    "packed": packed, "jagged": jagged, "holes": with_holes, "narrowed": narrowed
}  # fmt: skip
MODULES: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: norm_of(),
    "renorm": lambda: bn_ext.FusedBatchRenorm1d(C, warmup_steps=0),
    "relu": lambda: bn_ext.BatchNormAct1d(C),
    "silu": lambda: bn_ext.BatchNormAct1d(C, "silu"),
    "none": lambda: bn_ext.BatchNormAct1d(C, None),
    "sigmoid": lambda: bn_ext.BatchNormAct1d(C, nn.Sigmoid()),
    "prelu": lambda: bn_ext.BatchNormAct1d(C, nn.PReLU()),
}


def assert_like(found: Any, given: Any) -> None:
    """A batch of the same kind and the same sequences, that can be computed with beside the given one."""
    assert type(found) is type(given)
    if isinstance(given, PackedSequence):
        for a, b in zip(found[1:], given[1:], strict=True):
            assert a is b
        return
    assert found.shape == given.shape and found.offsets() is given.offsets() and found.lengths() is given.lengths()
    assert (found + given).shape == given.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", MAKES)
def test_modules_go_through_the_values(device: str, kind: str, module: str, training: bool) -> None:
    batch = MAKES[kind](device=device)
    ours, alone = (MODULES[module]().to(device).train(training) for _ in range(2))
    y = ours(batch)
    assert_like(y, batch)
    torch.testing.assert_close(values_of(y), alone(values_of(batch)))
    torch.testing.assert_close(list(ours.buffers()), list(alone.buffers()))
    if kind == "holes":
        holes = y.values()[:, [0, 4, 9, 10, 11, 13, 14, 15]]
        assert not holes.any()


@pytest.mark.parametrize("kind", MAKES)
def test_gradients(kind: str) -> None:
    leaf = values_of(MAKES[kind]()).detach().requires_grad_()
    ours, alone = norm_of(), norm_of()
    batch = MAKES[kind]()
    if isinstance(batch, PackedSequence):
        x = batch.data.detach().requires_grad_()
        y = ours(PackedSequence(x, *batch[1:]))
    else:
        x = batch.values().detach().requires_grad_()
        y = ours(torch.nested.nested_tensor_from_jagged(x, batch.offsets(), batch.lengths(), jagged_dim=2))
    found = torch.autograd.grad(values_of(y).pow(3).sum(), (x, ours.weight))
    expected = torch.autograd.grad(alone(leaf).pow(3).sum(), (leaf, alone.weight))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    if isinstance(batch, PackedSequence):
        of_x = found[0]
    else:
        of_x = values_of(
            torch.nested.nested_tensor_from_jagged(found[0], batch.offsets(), batch.lengths(), jagged_dim=2)
        )
        assert found[0].isfinite().all()
    torch.testing.assert_close(of_x, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["relu", "gelu", None, nn.Tanh()])
@pytest.mark.parametrize("kind", MAKES)
def test_a_residual_that_is_ragged_too(kind: str, act: Any) -> None:
    batch = MAKES[kind]()
    if isinstance(batch, PackedSequence):
        residual = PackedSequence(normal(tuple(batch.data.shape), seed=5), *batch[1:])
    else:
        other = normal(tuple(batch.values().shape), seed=5)
        residual = torch.nested.nested_tensor_from_jagged(other, batch.offsets(), batch.lengths(), jagged_dim=2)
    ours, alone = (bn_ext.BatchNormAct1d(C, act) for _ in range(2))
    y = ours(batch, residual)
    assert_like(y, batch)
    torch.testing.assert_close(values_of(y), alone(values_of(batch), values_of(residual)))
    before = [b.clone() for b in ours.buffers()]
    for wrong in (values_of(batch), packed(enforce_sorted=True), jagged(), torch.ones(1)):
        with pytest.raises(ValueError, match="should be one with the same lengths"):
            ours(batch, wrong)
    with pytest.raises(ValueError, match="has lengths of its own"):
        ours(batch, lengths=torch.ones(3))
    assert all(torch.equal(b, old) for b, old in zip(ours.buffers(), before, strict=True))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("function", [bn_ext.functional.batch_norm, bn_ext.functional.batch_renorm])
@pytest.mark.parametrize("kind", MAKES)
def test_functions(kind: str, function: Any, activation: str | None) -> None:
    batch = MAKES[kind]()
    mean, var = torch.zeros(C), torch.ones(C)
    y = function(batch, mean, var, training=True, activation=activation)
    assert_like(y, batch)
    statistics = torch.zeros(C), torch.ones(C)
    alone = function(values_of(batch), *statistics, training=True, activation=activation)
    torch.testing.assert_close(values_of(y), alone)
    torch.testing.assert_close((mean, var), statistics)
    with pytest.raises(ValueError, match="has lengths of its own"):
        function(batch, mean, var, mask=torch.ones(3, 3).bool())


@pytest.mark.parametrize("module", ["norm", "relu"])
def test_the_longest_and_shortest_are_handed_on(module: str) -> None:
    values, offsets = normal((C, 12)), torch.tensor([0, 7, 8, 12])
    norm = MODULES[module]()
    for options in ({}, {"min_seqlen": 1, "max_seqlen": 9}):
        batch = torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2, **options)
        found, native = norm(batch).transpose(1, 2), torch.tanh(batch).transpose(1, 2)
        assert found.to_padded_tensor(0.0).shape == native.to_padded_tensor(0.0).shape
        assert found._maybe_max_seqlen == native._maybe_max_seqlen


@pytest.mark.parametrize("module", ["norm", "relu", "sigmoid", "renorm"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_compile(enforce_sorted: bool, module: str) -> None:
    ours, eager, linear = MODULES[module](), MODULES[module](), nn.Linear(C, C)

    def model(norm: nn.Module, batch: PackedSequence) -> Tensor:
        return linear(norm(batch).data).relu()

    torch._dynamo.reset()
    compiled = torch.compile(lambda batch: model(ours, batch), backend="aot_eager", fullgraph=True)
    for seed in range(2):
        batch = packed(seed, enforce_sorted=enforce_sorted)
        torch.testing.assert_close(compiled(batch), model(eager, batch))
    whole = torch.compile(ours.eval(), backend="aot_eager", fullgraph=True)(batch)
    assert_close_packed(whole, eager.eval()(batch))


def assert_close_packed(found: PackedSequence, expected: PackedSequence) -> None:
    assert type(found) is PackedSequence
    for a, b in zip(pad_packed_sequence(found), pad_packed_sequence(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["jagged", "holes"])
def test_jagged_tensors_compile(kind: str) -> None:
    ours, eager = norm_of(), norm_of()
    if kind == "holes":
        ours.requires_grad_(False)  # torch compiles nothing of these with gradients
    compiled = torch.compile(lambda batch: ours(batch) * 2, backend="aot_eager", fullgraph=True)
    batch = MAKES[kind]()
    torch.testing.assert_close(values_of(compiled(batch)), values_of(eager(batch) * 2))


def test_lazy_ones() -> None:
    for kind in MAKES:
        lazy = bn_ext.LazyFusedBatchNorm1d()
        batch = MAKES[kind]()
        torch.testing.assert_close(values_of(lazy(batch)), bn_ext.FusedBatchNorm1d(C)(values_of(batch)))


# ---- what raises behind a batch norm ----


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such activation here")


BATCHES = (*MAKES, "whole", "lengths", "residual")


@pytest.mark.parametrize(("norm", "batch"), [
    *((norm, batch) for norm in (bn_ext.FusedBatchNorm1d, bn_ext.FusedBatchRenorm1d) for batch in BATCHES),
    (nn.BatchNorm1d, "whole"), (nn.BatchNorm1d, "residual"),
])  # fmt: skip
def test_statistics_stay_where_what_follows_raises(norm: Any, batch: str) -> None:
    x = normal((4, C, 5))
    block = bn_ext.BatchNormAct1d(C, Raises())
    block.norm = norm(C)
    before = [b.clone() for b in block.buffers()]
    arguments: dict[str, Any] = {
        "lengths": {"lengths": torch.tensor([1, 2, 0, 5])}, "residual": {"residual": torch.ones(3)}
    }.get(batch, {})  # fmt: skip
    with pytest.raises(RuntimeError, match=r"no such activation here|size of tensor"):
        block(MAKES[batch]() if batch in MAKES else x, **arguments)
    assert all(torch.equal(b, old) for b, old in zip(block.buffers(), before, strict=True))
