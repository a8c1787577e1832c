"""Handles of the compiled operators, bound once, and their fake kernels (shapes, dtypes and strides, no data).

input is (N, C) or (N, C, L); statistics are float64 for float64 input and float32 for every other type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import guard_or_false

_family = torch.ops.bn_ext
batch_norm = _family.batch_norm.default
batch_norm_forward = _family.batch_norm_forward.default
batch_norm_moments = _family.batch_norm_moments.default
batch_norm_inference = _family.batch_norm_inference.default
batch_norm_inference_ = _family.batch_norm_inference_.default
batch_norm_backward = _family.batch_norm_backward.default
batch_norm_gradient_sums = _family.batch_norm_gradient_sums.default
batch_norm_double_backward = _family.batch_norm_double_backward.default
batch_norm_composite_backward = _family.batch_norm_composite_backward.default
batch_norm_composite_double_backward = _family.batch_norm_composite_double_backward.default

# csrc/core/kernels.h's SavedRow, MomentRow, SumRow; a renormalised batch has r and d saved too.
SAVED_ROWS, RENORM_ROWS, MOMENT_ROWS, SUM_ROWS = 6, 8, 4, 3


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of input are computed and saved."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Raise what csrc/torch/checks.cpp's check_device would."""
    for name, other in others.items():
        if other is None or other.device == input.device:
            continue
        if "cuda" in (other.device.type, input.device.type):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {name} is on {other.device}, different from "
                f"other tensors on {input.device} (when checking argument in method bn_ext::batch_norm)"
            )
        raise RuntimeError(f"Tensor on device {other.device} is not on the expected device {input.device}!")


def _check(
    input: Tensor, training: bool, eps: float | None = None, part: bool = False, **vectors: Tensor | None
) -> None:
    """Raise what the kernels' entry (csrc/torch/calls.cpp) would, as far as shapes, types and devices tell.

    A graph that is being made is left to that entry, where it runs: the error then is the one that eager calls raise.
    """
    if TracingContext.try_get() is not None:
        _check_devices(input, **vectors)
        return
    if input.dim() not in (2, 3):
        raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")
    if training and not part and guard_or_false(input.numel() == input.shape[1]):
        size = tuple(input.shape)
        raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({[*size]})")
    if eps is not None:
        check_eps(eps, training)
    check_dtype(input)
    _check_devices(input, **vectors)
    if guard_or_false(input.numel() == 0):
        return
    if training and (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = vectors.get(name)
        if vector is not None and vector.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {vector.numel()}")


def check_eps(eps: float, training: bool) -> None:
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_dtype(input: Tensor) -> None:
    if input.dtype not in KERNEL_DTYPES:  # native's own error, in its words
        kind = torch.empty(0, dtype=input.dtype).type().rpartition(".")[2].removesuffix("Tensor")
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{kind}'")


def _check_count(input: Tensor, count: Tensor | None) -> None:
    """Raise for a count without data beside an input with data, which has brought the call here."""
    if count is not None and count.device.type == "meta":
        _check_devices(input, num_batches_tracked=count)


def _check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    _check_devices(input, residual=residual)
    if residual.dtype != input.dtype:
        raise RuntimeError(f"residual should have the type of input, {input.dtype}, but has {residual.dtype}")
    if residual.shape != input.shape:
        size, other = list(input.shape), list(residual.shape)
        raise RuntimeError(f"residual should have the size of input, {size}, but has {other}")


def check_valid(input: Tensor, valid: Tensor | None) -> None:
    """Raise what csrc/torch/checks.cpp's check_valid would."""
    if valid is None:
        return
    _check_devices(input, **{"mask" if valid.dtype == torch.bool else "lengths": valid})
    size = list(input.shape)
    if valid.dtype == torch.bool:
        if valid.shape != (input.shape[:1] if input.dim() == 2 else (input.shape[0], input.shape[2])):
            given = list(valid.shape)
            raise ValueError(f"mask should have the size of input, {size}, without its channels, but has {given}")
    elif valid.is_floating_point() or valid.is_complex():
        raise TypeError(f"lengths should be integers and a mask booleans, but are {valid.dtype}")
    elif input.dim() != 3:
        raise ValueError(f"lengths are for input of size (N, C, L), but that has {size}")
    elif valid.shape != input.shape[:1]:
        raise ValueError(f"lengths should be of size [{size[0]}], but are of {list(valid.shape)}")


def check_renorm_numbers(renorm: Sequence[float]) -> None:
    """Raise what csrc/torch/checks.cpp's renorm_of would."""
    if len(renorm) != 4:
        raise ValueError(f"renorm should be (max_r, max_d, warmup_steps, smooth), but has {len(renorm)} numbers")
    max_r, max_d, steps, smooth = renorm
    if not max_r >= 1:
        raise ValueError(f"max_r should be at least 1, but is {max_r}")
    if not max_d >= 0:
        raise ValueError(f"max_d should be at least 0, but is {max_d}")
    if not (0 <= steps <= 2**53 and steps == int(steps)):
        raise ValueError(f"warmup_steps should be a whole number from 0 to 2^53, but is {steps}")
    if smooth not in (0, 1):
        raise ValueError(f"smooth should be 0 or 1, but is {smooth}")


def _check_renorm(renorm: Sequence[float], training: bool, part: bool, *state: Tensor | None) -> None:
    """Raise what csrc/torch/calls.cpp would."""
    check_renorm_numbers(renorm)
    if not training:
        raise RuntimeError("with mean and var given nothing is renormalised")
    if part:
        raise ValueError("a renormalised batch is a whole one, not a part with moments")
    mean, var, count = state
    if mean is None or var is None:
        raise ValueError("batch renormalisation goes by running_mean and running_var: it needs both")
    if renorm[2] and count is None:
        raise ValueError("warmup_steps are counted by num_batches_tracked, which is None")


def _check_stage(input: Tensor, given: Tensor | None, rows: int, name: str) -> None:
    if given is None:
        return
    _check_devices(input, **{name: given})
    if given.dim() != 3 or given.shape[1:] != (rows, input.shape[1]) or given.dtype != torch.float64:
        size = f"(parts, {rows}, {input.shape[1]})"
        raise RuntimeError(f"{name} should be a float64 tensor of size {size}, but is of size {list(given.shape)}")


def most_virtual_batches(samples: int, size: int) -> int:
    """Return how many virtual batches saved has room for: csrc/core/virtual_batch.h's bound, which needs no guard."""
    if size < 0:
        raise ValueError(f"virtual_batch_size should be at least 1, but is {size}")
    if size == 0:
        return 1
    return torch.sym_max(1, (samples + size - 1) // size)  # type: ignore[no-any-return]


def mask_size(input: Tensor, residual: Tensor | None, activation: str, virtual_batch_size: int = 0) -> int:
    """Return the bytes that forward leaves for backward where there is a residual and the derivative goes by the sign
    of its argument: one for 8 elements (on CUDA: for 16 bytes of the output), and 16 to read beyond; of virtual batches
    32 each, to read beyond and to begin aligned."""
    if residual is None or activation not in ("relu", "leaky_relu") or guard_or_false(input.numel() == 0):
        return 0
    elements = 16 // input.element_size() if input.device.type == "cuda" else 8
    batches = most_virtual_batches(input.shape[0], virtual_batch_size)
    return (input.numel() + elements - 1) // elements + (32 * batches if virtual_batch_size else 16)


@torch.library.register_fake("bn_ext::batch_norm_forward")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    moments: Tensor | None = None,
    virtual_batch_size: int = 0,
    valid: Tensor | None = None,
    renorm: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    training = mean is None and var is None
    if training:
        mean, var = running_mean, running_var
    part = moments is not None
    _check(input, training, eps, part, running_mean=mean, running_var=var, weight=weight, bias=bias)
    _check_stage(input, moments, MOMENT_ROWS, "moments")
    _check_residual(input, residual)
    check_valid(input, valid)
    _check_count(input, num_batches_tracked)
    if renorm is not None:
        _check_renorm(renorm, training, part, running_mean, running_var, num_batches_tracked)
    single = virtual_batch_size == 1 and guard_or_false(input.numel() == input.shape[0] * input.shape[1])
    if single and guard_or_false(input.shape[0] > 2) and TracingContext.try_get() is None:
        size = [1, *input.shape[1:]]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({size})")
    rows = (SAVED_ROWS if renorm is None else RENORM_ROWS) * most_virtual_batches(input.shape[0], virtual_batch_size)
    saved = input.new_empty((rows, input.shape[1]), dtype=statistics_dtype(input))
    bits = mask_size(input, residual, activation, virtual_batch_size)
    mask = input.new_empty((bits,), dtype=torch.uint8)
    return torch.empty_like(input), saved, mask


@torch.library.register_fake("bn_ext::batch_norm_moments")
def _(input: Tensor) -> Tensor:
    _check(input, False)
    return input.new_empty((MOMENT_ROWS, input.shape[1]), dtype=torch.float64)


@torch.library.register_fake("bn_ext::batch_norm_inference")
def _fake_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    valid: Tensor | None = None,
) -> Tensor:
    _check(input, False, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_residual(input, residual)
    check_valid(input, valid)
    return torch.empty_like(input)


@torch.library.register_fake("bn_ext::batch_norm_inference_")
def _(*arguments: Any) -> None:
    _fake_inference(*arguments)


def _like_parameter(input: Tensor, weight: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of a parameter; nothing where it is not wanted."""
    if not wanted:
        return input.new_empty((0,), dtype=statistics_dtype(input))
    shape = input.shape[1:2] if weight is None else weight.shape
    return input.new_empty(shape, dtype=dtype or (statistics_dtype(input) if weight is None else weight.dtype))


def _like_input(input: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(input) if wanted else input.new_empty((0,), dtype=statistics_dtype(input))


@torch.library.register_fake("bn_ext::batch_norm_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    output_mask: Sequence[bool],
    bias_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    sums: Tensor | None = None,
    virtual_batch_size: int = 0,
    valid: Tensor | None = None,
    renorm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output=grad_output, weight=weight, saved=saved, residual=residual, mask=mask)
    _check_stage(input, sums, SUM_ROWS, "sums")
    check_valid(input, valid)
    of_input, of_weight, of_bias, of_residual = output_mask
    return (
        _like_input(input, of_input),
        _like_parameter(input, weight, of_weight),
        _like_parameter(input, weight, of_bias, bias_dtype),
        _like_input(input, of_residual),
    )


@torch.library.register_fake("bn_ext::batch_norm_gradient_sums")
def _(
    grad_output: Tensor,
    input: Tensor,
    saved: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
) -> Tensor:
    _check_devices(input, grad_output=grad_output, saved=saved, residual=residual, mask=mask)
    return input.new_empty((SUM_ROWS, input.shape[1]), dtype=torch.float64)


@torch.library.register_fake("bn_ext::batch_norm_double_backward")
def _(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    training: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, grad_output=grad_output, weight=weight, saved=saved, grad_grad_input=grad_grad_input)
    _check_devices(input, grad_grad_weight=grad_grad_weight, grad_grad_bias=grad_grad_bias)
    of_grad_output, of_input, of_weight = output_mask
    return (
        _like_input(input, of_grad_output),
        _like_input(input, of_input),
        _like_parameter(input, weight, of_weight),
    )
