"""Batch renormalisation: batch norm with the weight w * r and the bias b + w * d, r and d by the running statistics."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bn_ext
from bn_ext.functional import batch_renorm
from reference import (
    acc_eps,
    assert_within,
    grad_input_tolerance,
    grad_param_tolerance,
    output_tolerance,
    reference,
    running_tolerance,
    ulp,
)
from renorm import (
    ACTIVATIONS,
    EPS,
    SHAPES,
    C,
    Composed,
    buffers,
    factors,
    norm_of,
    spread,
    step,
    unmoved,
)
from support import FLOATS, LAYOUTS, name_of, normal


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_training_against_float64(device: str, name: str, dtype: torch.dtype, layout: str) -> None:
    shape = SHAPES[name]
    x = LAYOUTS[layout](normal(shape, dtype, device, mean=0.5, seed=1))
    g = normal(shape, dtype, device, mean=0.25, seed=2)
    norm = norm_of(device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    r, d = factors(x, mean, var)
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    y, dx, dw, db = step(norm, norm, x, g)
    ref = reference(x, weight * r, bias + weight * d, g, running_mean=mean, running_var=var, momentum=0.01)
    assert ref.grad_weight is not None and ref.grad_bias is not None and ref.grad_input is not None
    assert y.stride() == torch.empty_like(x).stride() and y.dtype == dtype
    # Two roundings of the effective bias more, and r and d rounded to the type of the statistics for backward.
    eps = acc_eps(dtype)
    more = 4 * eps * ((weight * d).abs() + bias.abs()).reshape(1, C, *(1,) * (x.dim() - 2))
    assert_within(y, ref.output, output_tolerance(ref, dtype) + more, "output")
    assert_within(dx, ref.grad_input, grad_input_tolerance(ref, dtype) + eps * ref.grad_input.abs(), "grad_input")
    of_weight = ref.grad_weight * r + ref.grad_bias * d
    allowed = [grad_param_tolerance(ref, which, dtype, norm.weight.dtype) for which in ("weight", "bias")]
    rounded = ulp(of_weight, norm.weight.dtype) + eps * ((ref.grad_weight * r).abs() + (ref.grad_bias * d).abs())
    assert_within(dw, of_weight, allowed[0] * r + allowed[1] * d.abs() + rounded, "grad_weight")
    assert_within(db, ref.grad_bias, allowed[1], "grad_bias")
    for which, found in (("mean", norm.running_mean), ("var", norm.running_var)):
        right = ref.running_mean if which == "mean" else ref.running_var
        assert right is not None
        assert_within(found, right, running_tolerance(ref, which, dtype, found.dtype), which)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_the_warm_up(device: str, warmup_steps: int, smooth: bool) -> None:
    """Through the warm-up and beyond, where torchrl's own factor would go on to 2."""
    norm = norm_of(device, warmup_steps=warmup_steps, smooth=smooth, momentum=0.1)
    composed = Composed(norm)
    for seed in range(10):
        x, g = normal((9, C, 4), device=device, seed=seed), normal((9, C, 4), device=device, seed=100)
        found, expected = step(norm, norm, x, g), step(composed, composed, x, g.double())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(norm.running_mean.double(), composed.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), composed.var, rtol=1e-5, atol=1e-5)
    assert norm.num_batches_tracked == 10, "it counts on behind the warm-up"


def test_in_the_warm_up_it_is_batch_norm_to_the_bit(device: str) -> None:
    norm = norm_of(device, warmup_steps=2)
    plain = bn_ext.FusedBatchNorm1d(C, momentum=0.01, device=device)
    spread(plain)
    for seed in range(3):
        x, g = normal((23, C), device=device, seed=seed), normal((23, C), device=device, seed=9)
        same = all(torch.equal(a, b) for a, b in zip(step(norm, norm, x, g), step(plain, plain, x, g), strict=True))
        assert same == (seed < 2)
        assert all(torch.equal(a, b) for a, b in zip(buffers(norm)[:2], buffers(plain)[:2], strict=True))


def test_within_the_bounds_it_is_evaluation(device: str) -> None:
    x = normal((64, C), device=device)
    norm = norm_of(device, max_r=math.inf, max_d=math.inf)
    expected = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_evaluation_is_batch_norm(device: str) -> None:
    x, g = normal((23, C), device=device), normal((23, C), device=device, seed=1)
    norm, plain = norm_of(device).eval(), bn_ext.FusedBatchNorm1d(C, device=device).eval()
    spread(plain)
    before = buffers(norm)
    for a, b in zip(step(norm, norm, x, g), step(plain, plain, x, g), strict=True):
        assert torch.equal(a, b)
    assert norm(x[:1]).isfinite().all() and unmoved(norm, before)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_momentum(device: str, momentum: float | None) -> None:
    norm = norm_of(device, momentum=momentum)
    plain = bn_ext.FusedBatchNorm1d(C, momentum=momentum, device=device)
    spread(plain)
    for seed in range(3):
        norm(normal((9, C), device=device, seed=seed)), plain(normal((9, C), device=device, seed=seed))
    assert unmoved(norm, buffers(plain))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_residual_and_activation_follow_in_the_same_pass(
    device: str, dtype: torch.dtype, added: bool, activation: str | None
) -> None:
    """Against batch norm with the weight and bias that it amounts to."""
    shape = (23, C, 5)
    x, residual, g = (normal(shape, dtype, device, seed=k) for k in (1, 2, 3))
    norm = norm_of(device, dtype=torch.float64)
    mean, var = norm.running_mean, norm.running_var
    r, d = factors(x, mean, var)
    found = []
    for renormalises in (True, False):
        inputs = [t.detach().clone().requires_grad_() for t in (x, residual, norm.weight, norm.bias)]
        weight, bias = inputs[2:]
        after: dict[str, Any] = {"residual": inputs[1] if added else None, "activation": activation}
        if renormalises:
            y = batch_renorm(inputs[0], mean.clone(), var.clone(), weight, bias, True, **after)
        else:
            effective = (weight * r, bias + weight * d)
            y = bn_ext.functional.batch_norm(inputs[0], None, None, *effective, True, **after)
        wanted = [t for k, t in enumerate(inputs) if added or k != 1]
        found.append([y.detach(), *torch.autograd.grad(y, wanted, g)])
    eps = acc_eps(dtype)
    for mine, right in zip(*found, strict=True):
        near = torch.finfo(mine.dtype).eps if mine.dtype == dtype else eps
        torch.testing.assert_close(mine, right, rtol=8 * max(near, eps), atol=400 * eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["plain", "residual", "lengths", "cut", "no weight"])
def test_second_derivatives(kind: str, activation: str | None) -> None:
    shape = (7, 2, 3)
    x, residual = (normal(shape, torch.float64, seed=k).requires_grad_() for k in (1, 2))
    weight, bias = (normal((2,), torch.float64, seed=k).requires_grad_() for k in (3, 4))
    options: dict[str, Any] = {"activation": activation, "max_r": 1.5, "max_d": 0.5}
    if kind == "cut":
        options["virtual_batch_size"] = 3
    if kind == "lengths":
        options["lengths"] = torch.tensor([3, 0, 2, 3, 1, 3, 2])

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics that follow x: a difference quotient then sees r and d as the constants that they are."""
        return torch.tensor([0.1, -2.0]).double(), torch.tensor([0.2, 6.0]).double()

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        added = residual if kind == "residual" else None
        vectors = (None, None) if kind == "no weight" else (weight, bias)
        return batch_renorm(x, *at(x), *vectors, True, momentum=0.0, residual=added, **options)

    # r and d are on their bounds here, so that they are constants of x too.
    if kind not in ("lengths", "cut"):
        r, d = factors(x, *at(x), (1.5, 0.5, 0.0, 0.0))
        assert ((r == 1.5) | (r == 1 / 1.5)).all() and (d.abs() == 0.5).sum() >= 1
    options |= {"max_r": 1.0, "max_d": 0.0} if kind in ("lengths", "cut") else {}
    wanted = (x, residual, weight, bias)
    if kind in ("lengths", "cut"):
        assert torch.autograd.gradcheck(call, wanted)
        assert torch.autograd.gradgradcheck(call, wanted)
        return
    _check_second(call, x, residual, weight, bias, at, kind, activation)


def _check_second(call: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, at: Any, kind: str,
                  activation: str | None) -> None:  # fmt: skip
    """First and second derivatives beside those of a composition with constant r and d."""
    r, d = (t.reshape(1, -1, 1) for t in factors(x, *at(x), (1.5, 0.5, 0.0, 0.0)))

    def composed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), unbiased=False, keepdim=True)
        y = (x - mean) / (var + EPS).sqrt() * r + d
        if kind != "no weight":
            y = y * weight.reshape(1, -1, 1) + bias.reshape(1, -1, 1)
        y = y + residual if kind == "residual" else y
        act: Any = {None: lambda t: t, "relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
                    "leaky_relu": nn.functional.leaky_relu}[activation]  # fmt: skip
        return act(y)  # type: ignore[no-any-return]

    g = normal(x.shape, torch.float64, seed=8).requires_grad_()
    arriving = [normal(t.shape, torch.float64, seed=20 + k) for k, t in enumerate((x, residual, weight, bias))]
    found = []
    for one in (call, composed):
        leaves = (x, residual, weight, bias)
        first = torch.autograd.grad(
            one(*leaves), leaves, g, create_graph=True, allow_unused=True, materialize_grads=True
        )
        total = sum((f * a).sum() for f, a in zip(first, arriving, strict=True))
        second = torch.autograd.grad(total, (g, *leaves), create_graph=True, allow_unused=True, materialize_grads=True)
        third = torch.autograd.grad(
            sum(t.square().sum() for t in second), (g, *leaves), allow_unused=True, materialize_grads=True
        )
        found.append([*first, *second, *third])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gradients_of_a_graph_are_those_without_one(device: str, dtype: torch.dtype) -> None:
    x = normal((23, C), dtype, device, seed=1).requires_grad_()
    residual, g = (normal((23, C), dtype, device, seed=k) for k in (2, 3))
    norm = norm_of(device)
    found = []
    for create_graph in (False, True):
        y = batch_renorm(x, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, True,
                         residual=residual, activation="relu")  # fmt: skip
        found.append(torch.autograd.grad(y, (x, norm.weight, norm.bias), g, create_graph=create_graph))
    near = torch.finfo(dtype).eps if dtype.itemsize == 2 else 4 * acc_eps(dtype)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=max(near, 4 * acc_eps(dtype)), atol=40 * acc_eps(dtype))


@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_padded_batches(device: str, layout: str, kind: str) -> None:
    lengths = torch.tensor([9, 0, 4, 7, 1], device=device)
    where = torch.arange(9, device=device) < lengths[:, None]
    valid = {"lengths": lengths} if kind == "lengths" else {"mask": where}
    x = LAYOUTS[layout](torch.where(where[:, None], normal((5, C, 9), device=device), math.nan))
    g = normal((5, C, 9), device=device, seed=2)
    norm, alone = norm_of(device), norm_of(device)
    y, dx, dw, db = step(norm, norm, x, g, **valid)
    rows = [t.transpose(1, 2)[where] for t in (x, g, y, dx)]
    expected = step(alone, alone, rows[0], rows[1])
    for mine, right in zip((rows[2], rows[3], dw, db), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert not y.transpose(1, 2)[~where].any() and not dx.transpose(1, 2)[~where].any()
    for mine, right in zip(norm.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, right)
    packed = nn.utils.rnn.pack_sequence([normal((3, C), seed=1), normal((2, C), seed=2)])
    if device == "cpu":
        assert torch.equal(norm(packed).data, alone(packed.data))


def test_a_mask_of_scattered_values(device: str) -> None:
    """Which the operators may take out before the kernels."""
    where = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.where(where[:, None], normal((5, C, 40)), math.nan).to(device)
    g, where = normal((5, C, 40), device=device, seed=2), where.to(device)
    norm, alone = norm_of(device), norm_of(device)
    y, dx, dw, db = step(norm, norm, x, g, mask=where)
    rows = [t.transpose(1, 2)[where] for t in (x, g, y, dx)]
    for mine, right in zip((rows[2], rows[3], dw, db), step(alone, alone, rows[0], rows[1]), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    for mine, right in zip(norm.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("warmup_steps", [0, 2])
@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("shape", [(23, C), (9, C, 4)], ids=str)
def test_virtual_batches_are_the_loop_to_the_bit(
    device: str, shape: tuple[int, ...], momentum: float | None, warmup_steps: int
) -> None:
    """Each goes by the running statistics that the one before it has left."""
    x, g = normal(shape, device=device, seed=1), normal(shape, device=device, seed=2)
    options: dict[str, Any] = {"momentum": momentum, "warmup_steps": warmup_steps}
    ours, loop = norm_of(device, virtual_batch_size=4, **options), norm_of(device, **options)
    pieces = math.ceil(shape[0] / 4)
    found = step(ours, ours, x, g)
    expected = step(lambda t: torch.cat([loop(piece) for piece in t.chunk(pieces)]), loop, x, g)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for mine, right in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(mine, right)
    assert unmoved(ours, buffers(loop)) and ours.num_batches_tracked == pieces


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("shape", [(23, C), (6000, C), (64, C, 300)], ids=str)
def test_bits_do_not_depend_on_threads(shape: tuple[int, ...], size: int | None) -> None:
    x, g = normal(shape, seed=1), normal(shape, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            norm = norm_of(virtual_batch_size=size)
            found.append([*step(norm, norm, x, g), *norm.buffers()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(deadline=None, max_examples=100)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 40), st.just(C)), st.tuples(st.integers(1, 9), st.just(C), st.integers(2, 70)),
    ),
    max_r=st.sampled_from([1.0, 1.5, 3.0, math.inf]), max_d=st.sampled_from([0.0, 0.5, 5.0, math.inf]),
    steps=st.integers(0, 4), smooth=st.booleans(), count=st.integers(0, 6),
)  # fmt: skip
def test_any_bounds_and_warm_up(
    shape: tuple[int, ...], max_r: float, max_d: float, steps: int, smooth: bool, count: int
) -> None:
    norm = norm_of(max_r=max_r, max_d=max_d, warmup_steps=steps, smooth=smooth, dtype=torch.float64)
    norm.num_batches_tracked.fill_(count)
    composed, x, g = Composed(norm), normal(shape, torch.float64, seed=count), normal(shape, torch.float64, seed=7)
    for mine, right in zip(step(norm, norm, x, g), step(composed, composed, x, g), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


# ---- the module ----


def test_names_arguments_and_state() -> None:
    norm = bn_ext.FusedBatchRenorm1d(C)
    assert {k: getattr(norm, k) for k in ("num_features", "momentum", "eps", "max_r", "max_d", "warmup_steps", "smooth")
            } == {"num_features": C, "momentum": 0.01, "eps": 1e-5, "max_r": 3.0, "max_d": 5.0, "warmup_steps": 10000,
                  "smooth": False}  # fmt: skip
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert repr(norm) == (
        "FusedBatchRenorm1d(6, eps=1e-05, momentum=0.01, max_r=3.0, max_d=5.0, warmup_steps=10000, smooth=False)"
    )
    assert "virtual_batch_size=4" in repr(norm_of(virtual_batch_size=4))
    with pytest.raises(TypeError):
        bn_ext.FusedBatchRenorm1d(C, 0.1)  # type: ignore[misc]
    half = bn_ext.FusedBatchRenorm1d(C, dtype=torch.bfloat16)
    assert half.weight.dtype == half.running_var.dtype == torch.bfloat16
    x = normal((9, C))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), copy.deepcopy(norm)(x))
    norm.warmup_steps = 0  # attributes may be set
    assert not torch.equal(norm(x), bn_ext.FusedBatchRenorm1d(C)(x))
