"""Shapes and strides: every layout of input and grad_output, outputs in the input's memory format, extreme sizes."""

from __future__ import annotations

import os

import pytest
import torch

import bn_ext
from support import FLOATS, LAYOUTS, assert_same, check_module, module_for, name_of, normal, pair, step

SHAPES = ((6, 5), (37, 19), (4, 5, 3), (3, 17, 21))


def strides_like(x: torch.Tensor) -> tuple[int, ...]:
    return torch.empty_like(x).stride()


def check_layout(x: torch.Tensor, g: torch.Tensor, training: bool, dtype: torch.dtype) -> None:
    channels = x.shape[1]
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    module = module_for(bn_ext.FusedBatchNorm1d, channels, str(x.device), dtype=stats).train(training)
    kept = x.clone(), g.clone()
    result = check_module(module, x, g)
    assert torch.equal(x, kept[0]) and torch.equal(g, kept[1]), "an input was written to"
    assert result.output is not None and result.grad_input is not None
    assert result.output.stride() == strides_like(x)
    assert result.grad_input.stride() == strides_like(x)


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(device: str, layout: str, shape: tuple[int, ...], training: bool) -> None:
    x = LAYOUTS[layout](normal(shape, device=device, mean=0.7))
    check_layout(x, normal(shape, device=device, seed=1), training, torch.float32)


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_output_layouts(device: str, layout: str, shape: tuple[int, ...], training: bool) -> None:
    g = LAYOUTS[layout](normal(shape, device=device, mean=0.2, seed=1))
    check_layout(normal(shape, device=device), g, training, torch.float32)


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d != torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", [(37, 19), (3, 17, 21)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_in_other_dtypes(device: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = LAYOUTS[layout]
    for training in (True, False):
        check_layout(make(normal(shape, dtype, device)), make(normal(shape, dtype, device, seed=1)), training, dtype)


@pytest.mark.parametrize("x_layout", ["contiguous", "permuted", "reversed", "expanded_batch", "strided_last"])
@pytest.mark.parametrize("g_layout", ["contiguous", "permuted", "channels_first", "expanded_all", "misaligned"])
def test_input_and_grad_output_differ_in_layout(device: str, x_layout: str, g_layout: str) -> None:
    x = LAYOUTS[x_layout](normal((5, 33, 18), device=device))
    g = LAYOUTS[g_layout](normal((5, 33, 18), device=device, seed=1))
    check_layout(x, g, True, torch.float32)
    check_layout(x, g, False, torch.float32)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded_all"])
def test_every_layout_beside_native(device: str, layout: str) -> None:
    """One constant over everything is left out: there native's rounding of the mean is divided by sqrt(eps)."""
    x = LAYOUTS[layout](normal((6, 7, 9), torch.float64, device))
    g = normal((6, 7, 9), torch.float64, device, seed=1)
    ours, native = pair(7, device, dtype=torch.float64)
    assert_same(step(ours, x, g), step(native, x, g))


def test_gradient_of_a_plain_sum(device: str) -> None:
    """sum().backward() hands a 0-stride grad_output to the backward."""
    results = []
    for module in pair(5, device, dtype=torch.float64):
        x = normal((4, 5, 3), torch.float64, device).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        (module(x).sum() * 3).backward()
        module.eval()(x).sum().backward()
        results.append((x.grad, module.weight.grad, module.bias.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- nothing in it ----

EMPTY_OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", EMPTY_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (3, 4, 0), (0, 4, 0)], ids=str)
def test_empty_input_as_native(device: str, shape: tuple[int, ...], options: dict, training: bool) -> None:
    ours, native = pair(4, device, dtype=torch.float64, **options)
    ours.train(training), native.train(training)
    x, g = (torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2))
    result = step(ours, x, g)
    assert_same(result, step(native, x, g))
    if result.grad_weight is not None:
        assert torch.equal(result.grad_weight, torch.zeros_like(result.grad_weight))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (3, 0, 2)], ids=str)
def test_no_channels(device: str, shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    """Native raises an IndexError from its inside here; an empty result is the sound answer."""
    module = bn_ext.FusedBatchNorm1d(0, device=device, dtype=dtype).train(training)
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    out = module(x)
    assert out.shape == shape and out.dtype == dtype
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert module.weight.grad is not None and module.weight.grad.shape == (0,)


# ---- sizes ----

ODD = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129)


@pytest.mark.isa
@pytest.mark.parametrize("channels", ODD)
def test_odd_channel_counts(device: str, channels: int) -> None:
    for shape in ((2, channels), (5, channels), (67, channels), (3, channels, 5), (1, channels, 2)):
        for training in (True, False):
            check_layout(normal(shape, device=device), normal(shape, device=device, seed=1), training, torch.float32)


@pytest.mark.isa
@pytest.mark.parametrize("length", ODD)
def test_odd_lengths(device: str, length: int) -> None:
    for shape in ((2, 3, length), (7, 1, length), (2, 40, length)):
        for layout in ("contiguous", "permuted", "misaligned"):
            x = LAYOUTS[layout](normal(shape, device=device))
            check_layout(x, normal(shape, device=device, seed=1), True, torch.float32)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 70_001),
        (2, 66_000, 3),
        (70_001, 3),
        (70_001, 2, 3),
        (65_536, 1),
        (900_001, 1),
        (900_001, 1, 2),
        (1, 2, 900_001),
        (2, 1, 300_001),
        (257, 1025),
        (4, 130, 514),
    ],
    ids=str,
)
def test_large_dimensions(device: str, shape: tuple[int, ...]) -> None:
    """Past native's own limits: 65535 channels or rows, cuDNN's 880801 rows, and odd counts beyond each."""
    x, g = normal(shape, device=device, mean=0.5), normal(shape, device=device, seed=1)
    check_layout(x, g, True, torch.float32)
    check_layout(x, g, False, torch.float32)


@pytest.mark.parametrize("shape", [(2, 70_001), (70_001, 3), (2, 1, 300_001), (4, 130, 514)], ids=str)
def test_large_dimensions_in_bfloat16(device: str, shape: tuple[int, ...]) -> None:
    x, g = normal(shape, torch.bfloat16, device, mean=0.5), normal(shape, torch.bfloat16, device, seed=1)
    check_layout(x, g, True, torch.bfloat16)


@pytest.mark.parametrize("layout", ["permuted", "sliced_batch", "sliced_channels", "channels_first", "strided_last"])
@pytest.mark.parametrize("shape", [(9001, 37), (9, 70, 501), (3, 2, 60_003)], ids=str)
def test_large_strided(device: str, layout: str, shape: tuple[int, ...]) -> None:
    """Large enough for several threads, in layouts that split differently."""
    make = LAYOUTS[layout]
    x, g = make(normal(shape, device=device, mean=2.0)), make(normal(shape, device=device, seed=1))
    check_layout(x, g, True, torch.float32)
    check_layout(x, g, False, torch.float32)


@pytest.mark.skipif("BN_EXT_LARGE" not in os.environ, reason="needs 14 GB and half a minute: set BN_EXT_LARGE=1")
@pytest.mark.parametrize("shape", [(2, 1, 2**30 + 5), (2**30 + 5, 2)], ids=str)
def test_more_than_two_to_the_31_elements(device: str, shape: tuple[int, ...]) -> None:
    """+1 and -1 in turn, and one outlier in the last place, beyond 32-bit offsets. The counts are far past 2^24."""
    x = torch.ones(shape, dtype=torch.bfloat16, device=device)
    x[1::2] = -1
    x.view(-1)[-1] = 2.0**14
    module = bn_ext.FusedBatchNorm1d(shape[1], momentum=1.0, eps=0.25, device=device)
    leaf = x.requires_grad_()
    out = module(leaf)
    count = x.numel() // shape[1]
    far = out.detach().flatten()[-1]
    spread = 1 + 2.0**28 / count  # the outlier's share in the variance; its share in the mean is 2^14 / count
    bf16 = torch.finfo(torch.bfloat16).eps
    assert far.item() == pytest.approx(2.0**14 / (spread + 0.25) ** 0.5, rel=bf16)
    assert out[0, -1].detach().flatten()[0].item() == pytest.approx(1 / (spread + 0.25) ** 0.5, rel=bf16, abs=2**-14)
    assert module.running_var[-1].item() == pytest.approx(spread, rel=1e-6)
    out.backward(torch.ones((), dtype=x.dtype, device=device).expand(shape))
    # A constant gradient is what the normalisation removes: up to a rounding of the terms that cancel.
    assert x.grad is not None and bool(x.grad.flatten()[-5:].abs().max() <= 4 * bf16)
    assert module.bias.grad[-1].item() == torch.tensor(count, dtype=torch.float32).item()
