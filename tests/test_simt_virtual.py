"""The CUDA kernels of virtual batches, run on the CPU: one batch after the other, in two launches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simt.backend import Backend, backend
from simt.calls import ACTIVATIONS, DTYPES, Inputs, Pass, Result, exchange_of, walk_of
from simt.operators import cut_plan_of, library
from simt_support import A100, BACKWARD, FORWARD, H200, MODELS, T4, assert_right, ids, make, run, skip_without
from support import LAYOUTS, name_of, normal

SHAPES = ((40, 24), (30, 70), (29, 3), (12, 6, 40), (13, 8, 7), (9, 2, 300), (7, 1, 33))
PASSES = (FORWARD, BACKWARD)
# What of two plans decides the bits of a result.
BITS = ("exchange", "planes", "pooled", "vector", "tx", "ty", "span", "modulo", "lanes", "kept", "splits", "split_rows")
NEXT = {"running_mean": "running_mean", "running_var": "running_var", "num_batches_tracked": "num_batches_tracked"}


def cut(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous", **options: Any
) -> Inputs:
    """In pieces of a quarter and the rest, some with a count of batches."""
    options.setdefault("virtual_batch_size", max(2, shape[0] // 4))
    return make(shape, dtype, layout, **options)


def one_of(inputs: Inputs, piece: slice, **changes: Any) -> Inputs:
    taken = {name: getattr(inputs, name) for name in ("x", "grad_output", "residual")}
    taken = {name: None if t is None else t[piece] for name, t in taken.items()}
    return replace(inputs, virtual_batch_size=0, **taken, **changes)


def rows_of(saved: Tensor, i: int) -> Tensor:
    return saved[6 * i : 6 * i + 6]


def mask_of(inputs: Inputs, mask: Tensor | None, i: int) -> Tensor | None:
    if mask is None:
        return None
    piece = one_of(inputs, inputs.pieces[i])
    return mask[i * inputs.mask_step :][: piece.mask_bytes].clone()


def one_by_one(pass_: Pass, inputs: Inputs, saved: Tensor | None = None, **options: Any) -> list[Result]:
    """A call for each piece; gradients of the parameters in float64."""
    results: list[Result] = []
    mask, inputs = inputs.mask, replace(inputs, mask=None)
    if pass_ == BACKWARD:
        inputs.weight = torch.ones(inputs.x.shape[1]) if inputs.weight is None else inputs.weight
        inputs.weight = inputs.weight.double()
    for i, piece in enumerate(inputs.pieces):
        one = one_of(inputs, piece, mask=mask_of(inputs, mask, i))
        for name in NEXT if pass_ == FORWARD and results else ():
            setattr(one, name, getattr(results[-1], name))
        results.append(run(pass_, one, saved=None if saved is None else rows_of(saved, i), **options))
    return results


def same_plan(result: Result, each: list[Result]) -> bool:
    assert result.last is not None
    plans = [result.plan] * (len(each) - 1) + [result.last]
    return all(mine[k] == one.plan[k] for mine, one in zip(plans, each, strict=True) for k in BITS)


def check(pass_: Pass, inputs: Inputs, saved: Tensor | None = None, **options: Any) -> Result:
    """Each piece against float64, all of it against a call for each piece: bit by bit where the plans are the same."""
    result = run(pass_, inputs, saved=saved, **options)
    each = one_by_one(pass_, inputs, saved, **options)
    exact = same_plan(result, each)
    if result.plan["together"]:
        assert len(result.launches) == 2
    else:
        assert result.last is not None
        assert len(result.launches) == result.plan["launches"] * (len(each) - 1) + result.last["launches"]
    eps = torch.finfo(inputs.x.dtype).eps

    def compare(mine: Tensor, right: Tensor, rtol: float, atol: float) -> None:
        if exact:
            assert torch.equal(mine, right.to(mine.dtype))
        else:
            torch.testing.assert_close(mine, right.to(mine.dtype), rtol=rtol, atol=atol)

    for i, (piece, right) in enumerate(zip(inputs.pieces, each, strict=True)):
        found = Result({"launches": 0}, [])
        for name in ("output", "grad_input", "grad_residual"):
            if (mine := getattr(result, name)) is not None:
                setattr(found, name, mine[piece])
                compare(mine[piece], getattr(right, name), 4 * eps, 40 * eps)
        if pass_ == FORWARD:
            assert result.saved is not None and right.saved is not None
            found.saved = rows_of(result.saved, i)
            compare(found.saved[2:], right.saved[2:], 1e-5, 1e-5)
        if result.mask is not None and exact:
            mine, theirs = mask_of(inputs, result.mask, i), right.mask
            assert mine is not None and theirs is not None
            assert torch.equal(mine[: -(-right.output.nbytes // 16)], theirs[: -(-right.output.nbytes // 16)])  # type: ignore[union-attr]
        if inputs.activation is None:
            plain = one_of(inputs, piece, running_mean=None, running_var=None, num_batches_tracked=None, momentum=0.1)
            assert_right(pass_, plain, found)
    for name in ("running_mean", "running_var"):
        if (mine := getattr(result, name)) is not None:
            compare(mine, getattr(each[-1], name), 1e-5, 1e-6)
    assert result.num_batches_tracked == each[-1].num_batches_tracked
    for name in ("grad_weight", "grad_bias"):
        if (mine := getattr(result, name)) is not None:
            right = functools.reduce(torch.add, [getattr(one, name).double() for one in each])
            compare(mine, right, 1e-3 if eps < 1e-3 else 1e-2, 400 * torch.finfo(inputs.statistics_dtype).eps)
    return result


def check_both(inputs: Inputs, **options: Any) -> tuple[Result, Result]:
    forward = check(FORWARD, inputs, **options)
    activates = inputs.activation not in (None, "identity")
    given = replace(inputs, leaves_mask=False, mask=forward.mask, wants_residual=activates)
    return forward, check(BACKWARD, given, forward.saved, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for result in check_both(cut(shape, dtype, num_batches_tracked=2), **H200):
        assert len(result.launches) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    for shape in ((40, 24), (12, 6, 40)):
        inputs = cut(shape, layout=layout)
        # As the operators see to it: samples lie one after the other in the output.
        output = torch.empty_like(inputs.x)
        if all(output.stride(0) >= s for s in output.stride()):
            check_both(inputs, **A100)


# A batch of so many pieces, of a growing number of samples or of values a sample, by walk.
BATCHES: dict[str, Callable[[int, int], tuple[tuple[int, ...], int]]] = {
    "columns": lambda n, pieces: ((n * pieces - 1, 40), n),
    "folded": lambda n, pieces: ((n * pieces - 1, 3), n),
    "by_span": lambda n, pieces: ((n * pieces - 1, 8, 7), n),
    "planes": lambda n, pieces: ((2 * pieces - 1, 2, n), 2),
}


@functools.cache
def smallest(
    on: Backend, pass_: Pass, walk: str, together: bool, earlier: str, last: str
) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """(shape, virtual batch size, options) of the smallest batch that the planner cuts so, launches being free."""
    for device, cooperative in itertools.product(("H200", "A100"), (1, 0)):
        options = {"device": device, "sms": 16, "cooperative": cooperative, "of": library(free=True)}
        for half_powers, pieces in itertools.product(range(8, 28), (2, 3, 9)):
            shape, size = BATCHES[walk](int(2 ** (half_powers / 2)) & ~3, pieces)
            plan, of_last = cut_plan_of(pass_, shape, size, **options)
            found = walk_of(plan), bool(plan["together"]), exchange_of(plan), exchange_of(of_last)
            if found == (walk, together, earlier, last):
                return shape, size, options
    raise AssertionError("there is none")


REGIMES = [
    *itertools.product(
        [(True, "none", "none"), (True, "cluster", "cluster"), (True, "none", "grid"), (True, "grid", "grid"),
         (False, "grid", "grid"), (False, "two_launches", "two_launches")],
        BATCHES,
    ),
    ((True, "cluster", "grid_pooled"), "columns"),
    ((True, "cluster", "none"), "planes"),
    ((False, "cluster", "cluster"), "columns"),
]  # fmt: skip


@pytest.mark.parametrize(("regime", "walk"), REGIMES, ids=str)
@pytest.mark.parametrize("pass_", PASSES, ids=ids)
def test_every_regime(pass_: Pass, regime: tuple[bool, str, str], walk: str) -> None:
    """All exchanges of the earlier ones and of the last; each piece in launches of its own."""
    skip_without(*regime[1:])
    shape, size, options = smallest(backend(), pass_, walk, *regime)
    inputs = cut(shape, virtual_batch_size=size, num_batches_tracked=3, momentum=None)
    saved = run(FORWARD, inputs, **options).saved if pass_ == BACKWARD else None
    found = [check(pass_, inputs, saved, seed=seed, **options) if seed == 0 else
             run(pass_, inputs, saved=saved, seed=seed, **options) for seed in range(3)]  # fmt: skip
    assert found[0].last is not None
    assert (exchange_of(found[0].plan), exchange_of(found[0].last)) == regime[1:]
    for other in found[1:]:
        assert other.num_batches_tracked == found[0].num_batches_tracked
        for name, t in found[0].tensors().items():
            assert torch.equal(t, other.tensors()[name]), name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "relu by mask", "leaky_relu by mask"])
def test_residual_and_activation(activation: str, dtype: torch.dtype, model: dict[str, Any]) -> None:
    activation, _, by_mask = activation.partition(" by ")
    for shape, with_residual in itertools.product(((13, 10, 25), (40, 24), (29, 3)), (False, True)):
        if by_mask and not with_residual:
            continue
        inputs = cut(shape, dtype, activation=activation, negative_slope=0.1, leaves_mask=bool(by_mask))
        inputs.residual = normal(shape, dtype, seed=9) if with_residual else None
        check_both(inputs, **model)


@pytest.mark.parametrize("vectors", [None, *DTYPES], ids=lambda v: name_of(v) if v else "none")
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_statistics_and_parameters_of_any_type(momentum: float | None, vectors: torch.dtype | None) -> None:
    """Running statistics are rounded to their type between the pieces, as by a launch for each."""
    for batches in (0, 7):
        inputs = cut((40, 24), vectors=vectors, momentum=momentum, num_batches_tracked=batches)
        forward, _ = check_both(inputs, **H200)
        assert forward.num_batches_tracked == batches + 4


def test_what_is_not_wanted() -> None:
    for wants in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        inputs = cut((40, 24), wants=wants)
        _, backward = check_both(inputs, **H200)
        found = (backward.grad_input, backward.grad_weight, backward.grad_bias)
        assert tuple(t is not None for t in found) == wants


@pytest.mark.parametrize(
    ("n", "size", "pieces"),
    [(40, 10, [10] * 4), (38, 10, [10] * 3 + [8]), (41, 10, [9] * 4 + [5]), (31, 15, [11, 11, 9]), (13, 4, [4, 4, 5]),
     (8, 4, [4, 4])],
)  # fmt: skip
def test_last_pieces(n: int, size: int, pieces: list[int]) -> None:
    """As long as the others, shorter, or with a lone value joined."""
    inputs = cut((n, 24), virtual_batch_size=size, num_batches_tracked=0)
    assert [inputs.x[piece].shape[0] for piece in inputs.pieces] == pieces
    for result in check_both(inputs, **H200):
        assert len(result.launches) == 2 and result.plan["pieces"] == len(pieces) - 1


def test_each_byte_is_moved_once() -> None:
    inputs = cut((64, 32), virtual_batch_size=16)
    for pass_, output in ((FORWARD, "y"), (BACKWARD, "dx")):
        saved = run(FORWARD, inputs, **H200).saved if pass_ == BACKWARD else None
        result = run(pass_, inputs, saved=saved, **H200)
        assert result.counted("x", "read_bytes") == inputs.x.nbytes
        assert result.counted(output, "write_bytes") == inputs.x.nbytes
        assert result.last is not None
        assert result.plan["write_bytes"] + result.last["write_bytes"] == inputs.x.nbytes


def test_more_pieces_than_a_grid_has_rows() -> None:
    """65535 on a device, three here."""
    inputs = cut((44, 24), virtual_batch_size=4, num_batches_tracked=2, momentum=None)
    options = {**H200, "of": library(most_rows=3)}
    right = run(FORWARD, inputs, **H200)
    found = run(FORWARD, inputs, **options)
    assert [launch["grid"][1] for launch in right.launches] == [10, 1]
    assert [launch["grid"][1] for launch in found.launches] == [3, 3, 3, 1, 1]
    back = [run(BACKWARD, inputs, saved=right.saved, **o) for o in (H200, options)]
    for one, other in ((right, found), back):
        assert one.num_batches_tracked == other.num_batches_tracked
        for name, t in one.tensors().items():
            assert torch.equal(t, other.tensors()[name]), name


def test_backward_of_renormalised_pieces() -> None:
    """The rows of r and d lie between those of the pieces."""
    inputs = cut((40, 24), vectors=torch.float64, renorm=(1.5, 0.5, 0, False))
    forwards = [run(FORWARD, one_of(inputs, piece), **H200) for piece in inputs.pieces]
    saved = [forward.saved for forward in forwards if forward.saved is not None]
    result = run(BACKWARD, inputs, saved=torch.cat(saved), **H200)
    each = [run(BACKWARD, one_of(inputs, p), saved=s, **H200) for p, s in zip(inputs.pieces, saved, strict=True)]
    assert len(result.launches) == 2 and all(s.shape[0] == 8 for s in saved)
    for i, piece in enumerate(inputs.pieces):
        assert torch.equal(result.grad_input[piece], each[i].grad_input)  # type: ignore[index, arg-type]
    for name in ("grad_weight", "grad_bias"):
        right = functools.reduce(torch.add, [getattr(one, name) for one in each])
        assert torch.equal(getattr(result, name), right)


# ---- plans at full size ----


@pytest.mark.parametrize("device", ["T4", "A100", "H100", "H200", "B200"])
def test_two_launches_where_they_keep_the_device_at_work(device: str) -> None:
    for shape, size in (((4096, 256), 128), ((16384, 64), 128), ((65536, 256), 256), ((64, 256, 1024), 16)):
        for pass_ in PASSES:
            plan, last = cut_plan_of(pass_, shape, size, device=device)
            assert plan["together"] and plan["launches"] == last["launches"] == 1, (shape, pass_.name)
            assert plan["pieces"] == -(-shape[0] // size) - 1
            assert exchange_of(plan) in ("none", "cluster")


@pytest.mark.parametrize("device", ["T4", "A100", "H200"])
def test_large_pieces_go_one_by_one(device: str) -> None:
    """One block, or a cluster, for each tile of a few large pieces would leave most of the device idle."""
    for pass_ in PASSES:
        plan, _ = cut_plan_of(pass_, (1 << 20, 64), 1 << 18, device=device)
        assert not plan["together"] and plan["blocks"] > 64


def test_without_cooperative_launches_there_are_two_all_the_same() -> None:
    plan, last = cut_plan_of(FORWARD, (4096, 64), 1000, **T4)
    if plan["together"]:
        assert exchange_of(last) == "none"
