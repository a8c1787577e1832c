"""The CUDA kernels of a padded batch in virtual ones, run on the CPU: side by side, in two launches or three."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simt.backend import backend
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Pass, Result
from simt_support import A100, BACKWARD, FORWARD, H200, MODELS, make, run
from support import LAYOUTS, name_of, normal
from test_simt_padded import lengths_of, padded, spoilt, where_of
from test_simt_virtual import mask_of, one_of

SHAPES = ((40, 24), (29, 3), (12, 6, 40), (13, 8, 7), (9, 2, 300), (7, 1, 33), (5, 70, 3))
SIZES = (4, 5, 12)  # of a virtual batch: the last one of their size, or smaller


def cut(shape: tuple[int, ...], size: int, kind: str = "mask", **options: Any) -> Inputs:
    valid, where = lengths_of(shape, 3) if kind == "lengths" else (where_of(shape, 3),) * 2
    inputs = padded(make(shape, virtual_batch_size=size, **options), valid, where)
    return inputs if inputs.residual is None else replace(inputs, residual=spoilt(inputs.residual, where))


def one_by_one(pass_: Pass, inputs: Inputs, whole: Result | None, rows: int, **options: Any) -> list[Result]:
    """A call for each virtual batch; gradients of the parameters in float64. whole: of forward, for backward."""
    results: list[Result] = []
    valid, mask = inputs.valid, inputs.mask
    assert valid is not None
    if pass_ == BACKWARD:
        weight = torch.ones(inputs.x.shape[1]) if inputs.weight is None else inputs.weight
        inputs = replace(inputs, weight=weight.double())
    for i, piece in enumerate(inputs.pieces):
        one = replace(one_of(inputs, piece, mask=mask_of(inputs, mask, i)), valid=valid[piece].clone())
        for name in ("running_mean", "running_var", "num_batches_tracked") if pass_ == FORWARD and results else ():
            setattr(one, name, getattr(results[-1], name))
        saved = None if whole is None else whole.saved[rows * i : rows * (i + 1)]  # type: ignore[index]
        results.append(run(pass_, one, saved=saved, **options))
    return results


def check(pass_: Pass, inputs: Inputs, forward: Result | None = None, **options: Any) -> Result:
    """Against a call for each virtual batch: other parts of a sum, the same formulas."""
    rows = 6 if inputs.renorm is None else 8
    result = run(pass_, inputs, saved=None if forward is None else forward.saved, **options)
    each = one_by_one(pass_, inputs, forward, rows, **options)
    eps = torch.finfo(inputs.x.dtype).eps
    wide = torch.finfo(inputs.statistics_dtype).eps
    for i, (piece, right) in enumerate(zip(inputs.pieces, each, strict=True)):
        for name in ("output", "grad_input", "grad_residual"):
            if (mine := getattr(result, name)) is not None:
                torch.testing.assert_close(mine[piece], getattr(right, name), rtol=4 * eps, atol=40 * eps)
        if pass_ == FORWARD:
            assert result.saved is not None and right.saved is not None
            saved = result.saved[rows * i : rows * (i + 1)]
            torch.testing.assert_close(saved[2:], right.saved[2:], rtol=1e-5, atol=1e-5)
        if result.mask is not None and right.mask is not None:
            assert torch.equal(mask_of(inputs, result.mask, i), right.mask)
    for name in ("running_mean", "running_var"):
        if (mine := getattr(result, name)) is not None:
            torch.testing.assert_close(mine, getattr(each[-1], name), rtol=8 * wide, atol=8 * wide)
    assert result.num_batches_tracked == each[-1].num_batches_tracked
    for name in ("grad_weight", "grad_bias"):
        if (mine := getattr(result, name)) is not None:
            right = functools.reduce(torch.add, [getattr(one, name).double() for one in each])
            kind = torch.finfo(mine.dtype).eps
            torch.testing.assert_close(mine.double(), right, rtol=max(400 * wide, 2 * kind), atol=400 * wide)
    return result


def check_both(inputs: Inputs, **options: Any) -> tuple[Result, Result]:
    forward = check(FORWARD, inputs, **options)
    activates = inputs.activation not in (None, "identity")
    given = replace(inputs, leaves_mask=False, mask=forward.mask, wants_residual=activates)
    return forward, check(BACKWARD, given, forward, **options)


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    if kind == "lengths" and len(shape) == 2:
        pytest.skip("lengths are of a last dimension")
    for size in SIZES:
        inputs = cut(shape, size, kind, dtype=dtype, num_batches_tracked=2)
        alike = len({len(inputs.x[piece]) for piece in inputs.pieces}) == 1
        for result in check_both(inputs, **H200):
            assert len(result.launches) == (2 if alike else 3), "one sums all, one writes those of a size, one the last"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    for shape in ((40, 24), (12, 6, 40)):
        inputs = cut(shape, 5, layout=layout)
        output = torch.empty_like(inputs.x)
        if all(output.stride(0) >= s for s in output.stride()):  # as the operators see to it
            check_both(inputs, **A100)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("momentum", "batches"), [(0.1, None), (None, 0), (None, 6), (1.0, 3)], ids=str)
def test_running_statistics_move_in_order(momentum: float | None, batches: int | None, model: dict[str, Any]) -> None:
    for shape, vectors in itertools.product(((60, 700), (300, 12), (9, 3, 500)), (torch.float32, torch.float16)):
        inputs = cut(shape, 7, momentum=momentum, num_batches_tracked=batches, vectors=vectors)
        check(FORWARD, inputs, **model)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu by mask", "leaky_relu by mask"])
def test_residual_and_activation(activation: str, dtype: torch.dtype) -> None:
    activation, _, by_mask = activation.partition(" by ")
    for shape, layout in itertools.product(((12, 6, 25), (23, 3, 5), (9, 4, 48)), ("contiguous", "misaligned")):
        residual = LAYOUTS[layout](normal(shape, dtype, seed=9))
        inputs = cut(shape, 4, "lengths", dtype=dtype, layout=layout, activation=activation, residual=residual)
        inputs.negative_slope, inputs.leaves_mask = 0.1, bool(by_mask)
        check_both(inputs, **H200)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("values", [0, 1])
def test_nothing_or_a_lone_value_in_one_of_them(values: int, which: int) -> None:
    """Which moves no running statistic; the others do, and the counter counts all."""
    shape = (6, 5, 20)
    lengths = torch.tensor([20, 7, 20, 3, 9, 20])
    lengths[2 * which : 2 * which + 2] = torch.tensor([0, values])
    where = torch.arange(20) < lengths[:, None]
    inputs = padded(make(shape, virtual_batch_size=2, momentum=None, num_batches_tracked=1), lengths, where)
    result = check(FORWARD, inputs, **H200)
    assert result.num_batches_tracked == 4
    assert result.output is not None and result.output.isfinite().all()
    check(BACKWARD, inputs, result, **H200)


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_some_gradients(wants: tuple[bool, bool, bool]) -> None:
    inputs = cut((12, 6, 40), 5, "lengths", wants=wants)
    result = check(BACKWARD, inputs, run(FORWARD, inputs, **H200), **H200)
    assert tuple(t is not None for t in (result.grad_input, result.grad_weight, result.grad_bias)) == wants


def test_one_without_a_value_adds_no_gradient_whatever_its_invstd() -> None:
    """Its variance is 0, and an eps that no float holds makes its invstd infinite."""
    x, g = normal((4, 3, 5)), normal((4, 3, 5), seed=1)
    inputs = Inputs(x, g, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), eps=1e-46)
    found = []
    for lengths, size in (([0, 0, 5, 5], 2), ([5, 5, 0, 0], 2), ([5, 5], 0)):
        some = slice(2, 4) if not lengths[0] else slice(0, 2)
        cut_into = (
            {"virtual_batch_size": size, "x": x, "grad_output": g} if size else {"x": x[some], "grad_output": g[some]}
        )
        one = replace(inputs, **cut_into, valid=torch.tensor(lengths))
        found.append(run(BACKWARD, one, saved=run(FORWARD, one, **H200).saved, **H200))
    assert all(result.grad_weight is not None and result.grad_weight.isfinite().all() for result in found)
    assert torch.equal(found[1].grad_weight, found[2].grad_weight)  # type: ignore[arg-type]


def test_more_of_them_than_a_grid_has_rows() -> None:
    if backend().architecture:
        pytest.skip("too many blocks to interpret")
    shape = (65537 * 2, 2, 1)
    where = torch.ones(shape[0], 1, dtype=torch.bool)
    where[::5] = False
    inputs = padded(make(shape, virtual_batch_size=2, momentum=0.25), where, where)
    result = run(FORWARD, inputs, **H200)
    assert len(result.launches) == 4 and result.saved is not None
    pairs, counts = inputs.x.view(-1, 2, 2).double(), where.view(-1, 2, 1)
    mean = torch.where(counts, pairs, 0.0).sum(1) / counts.sum(1)
    torch.testing.assert_close(result.saved.view(-1, 6, 2)[:, 0].double(), mean, rtol=1e-6, atol=1e-6)


def test_renormalised_ones_in_backward() -> None:
    """Of a forward in launches of its own for each."""
    inputs = replace(cut((12, 6, 40), 5, "lengths"), renorm=(1.5, 0.7, 0, False))
    pieces = [replace(one_of(inputs, p), valid=inputs.valid[p].clone()) for p in inputs.pieces]  # type: ignore[index]
    saved = [run(FORWARD, piece, **H200).saved for piece in pieces]
    forward = Result({"launches": 0}, [], saved=torch.cat([s for s in saved if isinstance(s, Tensor)]))
    check(BACKWARD, inputs, forward, **H200)
