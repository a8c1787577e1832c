"""Tensors past the limits of 32-bit counters on a GPU: elements, reach of the strides, rows, channels, blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bn_ext
from reference import acc_eps, assert_within, grad_input_tolerance, output_tolerance, per_channel, reference, ulp
from support import check_module, module_for, no_cuda_reason, normal

pytestmark = pytest.mark.skipif(bool(no_cuda_reason()), reason=no_cuda_reason() or "there is a GPU")
OPS = torch.ops.bn_ext
GPU = torch.device("cuda:0")
MASK = [True, True, True, False]
PART = 1 << 25  # elements that are looked at at a time, in float64


def need(gigabytes: float) -> None:
    """Skip where the GPU has less free memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(GPU)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory, there are {free:.0f}")


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape, in float64 and in parts along their longer reduced dimension."""
    shape = tensors[0].shape
    dim = 0 if len(shape) == 2 or shape[0] >= shape[2] else 2
    step = max(1, PART * shape[dim] // tensors[0].numel())
    for start in range(0, shape[dim], step):
        yield tuple(t.narrow(dim, start, min(step, shape[dim] - start)).double() for t in tensors)


def channel_sum(value: Tensor) -> Tensor:
    return value.sum(tuple(d for d in range(value.dim()) if d != 1))


def check_in_parts(x: Tensor, g: Tensor, eps: float = 1e-5) -> None:
    """Forward and backward without parameters, held to float64: what reference.py does, for what does not fit twice.

    Output: one unit of storage and the 1e-6 of std that float32 arithmetic is held to. Gradients: 8 float32 roundings
    of the magnitudes that are summed, and one unit of storage.
    """
    count = x.numel() // x.shape[1]
    y, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, eps)
    dx, dweight, dbias, _ = OPS.batch_norm_backward(g, x, None, saved, True, MASK)
    mean = sum(channel_sum(part) for (part,) in parts(x)) / count
    var = sum(channel_sum((part - per_channel(mean, x)).square()) for (part,) in parts(x)) / count
    invstd = (var + eps).rsqrt()
    rounding = 8 * acc_eps(x.dtype)

    def normalised(part: Tensor) -> Tensor:
        return (part - per_channel(mean, x)) * per_channel(invstd, x)

    bias = weight = abs_bias = abs_weight = torch.zeros_like(mean)
    for part_x, part_y, part_g in parts(x, y, g):
        right = normalised(part_x)
        assert_within(part_y, right, 1e-6 * (1 + right.abs()) + ulp(right, x.dtype), "output")
        bias, weight = bias + channel_sum(part_g), weight + channel_sum(part_g * right)
        abs_bias, abs_weight = abs_bias + channel_sum(part_g.abs()), abs_weight + channel_sum((part_g * right).abs())
    assert_within(dbias, bias, rounding * abs_bias + ulp(bias, dbias.dtype), "grad bias")
    assert_within(dweight, weight, rounding * (abs_weight + abs_bias) + ulp(weight, dweight.dtype), "grad weight")
    for part_x, part_g, part_dx in parts(x, g, dx):
        xhat = normalised(part_x)
        right = part_g - per_channel(bias / count, x) - xhat * per_channel(weight / count, x)
        size = part_g.abs() + per_channel(abs_bias / count, x) + xhat.abs() * per_channel(abs_weight / count, x)
        scale = per_channel(invstd, x)
        assert_within(part_dx, right * scale, rounding * size * scale + ulp(right * scale, x.dtype), "grad input")


def large(shape: tuple[int, ...], dtype: torch.dtype, seed: int, mean: float) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=GPU).normal_(mean, 1.0, generator=generator)


MORE_THAN_2_31 = {
    "rows": (8388611, 256),
    "one_channel": ((1 << 31) + 64, 1),
    "three_channels": (715827891, 3),
    "planes": (3, 4, 178956984),
    "odd_planes": (3, 4, 178956983),
    "short_planes": (178956975, 3, 4),
    "channels": (257, 8388611),
}


@pytest.mark.parametrize("shape", MORE_THAN_2_31.values(), ids=MORE_THAN_2_31)
def test_more_elements_than_32_bits_count(shape: tuple[int, ...]) -> None:
    assert torch.Size(shape).numel() > 1 << 31
    need(26)
    check_in_parts(large(shape, torch.bfloat16, 0, 2.0), large(shape, torch.bfloat16, 1, 0.5))


def test_more_elements_than_32_bits_count_with_channels_last() -> None:
    need(26)
    x, g = (large((2, 134217733, 8), torch.bfloat16, seed, 1.0 - seed).transpose(1, 2) for seed in range(2))
    check_in_parts(x, g)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 24), ((1 << 29) + 8, 1)),
        ((40, 3), (1, 1 << 30)),
        ((5, 24), ((1 << 29) + 3, 1)),
        ((4, 3, 50), (56, (1 << 30) + 8, 1)),
        ((3, 16, 3), ((1 << 29) + 64, 1, 1 << 29)),
    ],
    ids=str,
)
def test_strides_that_reach_further_than_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Few elements, far apart: the size of the tensor says nothing of how far its offsets go."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert reach > 1 << 31
    need(10)
    store = torch.empty(reach, dtype=torch.bfloat16, device=GPU)
    x = store.as_strided(shape, strides)
    x.copy_(normal(shape, torch.bfloat16, "cuda:0", mean=2.0))
    g = normal(shape, torch.bfloat16, "cuda:0", seed=1)
    right = reference(x, None, None, g, training=True, momentum=0.1, eps=1e-5)
    y, saved, _ = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    assert_within(y, right.output, output_tolerance(right, x.dtype), "output")
    # As the gradient of the output too.
    dx, *_ = OPS.batch_norm_backward(g, x, None, saved, True, MASK)
    assert right.grad_input is not None
    assert_within(dx, right.grad_input, grad_input_tolerance(right, x.dtype), "grad input")
    backwards = reference(g, None, None, x, training=True, momentum=0.1, eps=1e-5)
    _, saved, _ = OPS.batch_norm_forward(g, None, None, None, None, None, 0.1, 1e-5)
    dx, *_ = OPS.batch_norm_backward(x, g, None, saved, True, MASK)
    assert backwards.grad_input is not None
    assert_within(dx, backwards.grad_input, grad_input_tolerance(backwards, x.dtype), "grad input")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 8388611), torch.float32),
        ((3, 2097160), torch.bfloat16),
        ((2, 3000001, 2), torch.float32),
        ((33554433, 1), torch.float32),
        ((16777217, 2), torch.bfloat16),
        ((5000001, 3, 2), torch.float32),
        ((1, 3, 8388617), torch.float32),
        ((2000000, 1, 3), torch.float16),
        ((136000, 16, 16), torch.float32),
    ],
    ids=str,
)
def test_many_rows_or_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """More tiles than 65535, one channel over the whole GPU, and what native splits badly."""
    need(12)
    module = module_for(bn_ext.FusedBatchNorm1d, shape[1], "cuda:0")
    x, g = large(shape, dtype, 0, 2.0), large(shape, dtype, 1, 0.5)
    for training in (True, False):
        module.train(training)
        check_module(module, x, g)
