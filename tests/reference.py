"""Batch normalisation in float64 with plain PyTorch, and how far an implementation may be from it.

Everything here works on the very values of the tensors under test: a float32 or bfloat16 input is widened, never made
anew. The mean is kept as a pair (hi, lo), so the reference itself is good to a few float64 roundings at any mean/std.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds that the project promises for float32, whatever the batch size (up to 4M) and mean/std (up to 1e6).
OUTPUT_BOUND = 1e-6  # in units of the channel's standard deviation, weight 1
MEAN_BOUND = 1e-7  # in units of the channel's standard deviation
VAR_BOUND = 5e-7  # relative
GRAD_INPUT_BOUND = 1e-6  # relative, norm over the tensor
GRAD_PARAM_BOUND = 5e-6  # relative, norm over the channels


@dataclass(frozen=True)
class Reference:
    """Float64 results; `centered`, `output`, `grad_*` have the input's shape, the statistics have shape (C,)."""

    centered: Tensor
    mean: Tensor
    mean_lo: Tensor
    var: Tensor
    invstd: Tensor
    weight: Tensor
    normalized: Tensor
    output: Tensor
    grad_output: Tensor | None
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    training: bool
    weight_dtype: torch.dtype | None


def per_channel(value: Tensor, like: Tensor) -> Tensor:
    """View a (C,) tensor so that it broadcasts over `like` of shape (N, C) or (N, C, L)."""
    return value.reshape((1, -1) + (1,) * (like.dim() - 2))


def reduce_dims(x: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != 1)


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(centered, mean, mean_lo, biased variance) in float64 by a corrected two-pass."""
    x = x.detach().double()
    dims = reduce_dims(x)
    mean = x.mean(dims)
    first = x - per_channel(mean, x)
    mean_lo = first.mean(dims)
    centered = first - per_channel(mean_lo, x)
    return centered, mean, mean_lo, centered.square().mean(dims)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Reference:
    """Forward, backward and new running statistics of one call; x is (N, C) or (N, C, L) and not empty."""
    count = x.numel() // x.shape[1]
    dims = reduce_dims(x)
    w = torch.ones(x.shape[1], dtype=torch.float64, device=x.device) if weight is None else weight.detach().double()
    b = torch.zeros_like(w) if bias is None else bias.detach().double()
    old_mean = None if running_mean is None else running_mean.detach().double()
    old_var = None if running_var is None else running_var.detach().double()

    if training:
        centered, mean, mean_lo, var = moments(x)
    else:
        assert old_mean is not None and old_var is not None
        mean, mean_lo, var = old_mean, torch.zeros_like(old_mean), old_var
        centered = x.detach().double() - per_channel(mean, x)
    invstd = (var + eps).rsqrt()
    normalized = centered * per_channel(invstd, x)
    output = normalized * per_channel(w, x) + per_channel(b, x)

    grad_input = grad_weight = grad_bias = None
    if grad_output is not None:
        grad_output = grad_output.detach().double()
        grad_bias = grad_output.sum(dims)
        grad_weight = (grad_output * normalized).sum(dims)
        inner = grad_output
        if training:
            inner = inner - per_channel(grad_bias / count, x) - normalized * per_channel(grad_weight / count, x)
        grad_input = inner * per_channel(invstd * w, x)

    if training and old_mean is not None and old_var is not None:
        # The running variance takes the unbiased estimate, the normalisation the biased one.
        unbiased = var * (count / (count - 1))
        old_mean = old_mean * (1 - momentum) + (mean + mean_lo) * momentum
        old_var = old_var * (1 - momentum) + unbiased * momentum
    return Reference(
        centered=centered, mean=mean, mean_lo=mean_lo, var=var, invstd=invstd, weight=w, normalized=normalized,
        output=output, grad_output=grad_output, grad_input=grad_input, grad_weight=grad_weight, grad_bias=grad_bias,
        running_mean=old_mean, running_var=old_var, momentum=momentum, training=training,
        weight_dtype=None if weight is None else weight.dtype,
    )  # fmt: skip


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` around `value` (float64), subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double()).exponent - 1
    spacing = torch.ldexp(torch.full_like(value, info.eps, dtype=torch.float64), exponent)
    return spacing.clamp(min=info.tiny * info.eps)


def acc_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of the arithmetic type: float64 for float64 tensors, float32 for all others."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def stat_eps(dtype: torch.dtype) -> float:
    """What the mean may be off by, in standard deviations, and half of what the variance may be, relatively.

    Float32 statistics are merged in float64: MEAN_BOUND is 1 eps. Float64 has nothing wider to be summed in: the
    rounding of a sum over a chunk of some thousand values walks to about the root of that, 64 eps."""
    return acc_eps(dtype) * (64 if dtype == torch.float64 else 1)


def output_tolerance(ref: Reference, dtype: torch.dtype) -> Tensor:
    """Per element. y = ((x - hi) - lo) * (invstd * w) + b makes five roundings (half an eps each) of w * xhat and
    one of y; the standard deviation may be off by half of VAR_BOUND (2 eps). The mean may be off by stat_eps, and by
    4 roundings of the float64 in which the moments are merged. Low-precision tensors add the rounding to storage."""
    eps, like = acc_eps(dtype), ref.output
    w = per_channel(ref.weight.abs(), like)
    scaled_std = per_channel((ref.var.sqrt() * ref.invstd).clamp(max=1), like)
    merge = 4 * torch.finfo(torch.float64).eps * per_channel(ref.mean.abs() * ref.invstd, like)
    statistics = stat_eps(dtype) * (2 * (ref.normalized * w).abs() + scaled_std * w)
    bound = eps * (3 * (ref.normalized * w).abs() + ref.output.abs()) + statistics + merge * w
    # Where b nearly cancels w * xhat the terms above already dominate: |b| <= |y| + |w * xhat|.
    return bound + ulp(ref.output, dtype)


def grad_input_tolerance(ref: Reference, dtype: torch.dtype) -> Tensor:
    """Per element. Each of the three terms of w * invstd * (g - mean(g) - xhat * mean(g * xhat)) is right to 8 times
    stat_eps of the magnitudes summed in it (GRAD_INPUT_BOUND is 8 float32 eps), plus the rounding to storage."""
    assert ref.grad_output is not None and ref.grad_input is not None
    g, dims = ref.grad_output, reduce_dims(ref.output)
    size = g.abs()
    if ref.training:
        size = size + per_channel(g.abs().mean(dims), g)
        size = size + ref.normalized.abs() * per_channel((g * ref.normalized).abs().mean(dims), g)
    scale = per_channel((ref.invstd * ref.weight).abs(), g)
    return (8 * stat_eps(dtype) + merge_error(ref)) * size * scale + ulp(ref.grad_input, dtype)


def merge_error(ref: Reference) -> Tensor:
    """What 4 float64 roundings of the mean are in standard deviations, shaped to broadcast over the input."""
    return 4 * torch.finfo(torch.float64).eps * per_channel(ref.mean.abs() * ref.invstd, ref.output)


def grad_param_tolerance(ref: Reference, which: str, dtype: torch.dtype, param_dtype: torch.dtype) -> Tensor:
    """Per channel. 8 times stat_eps of the summed magnitudes (partial sums of a fixed chunk, merged in float64), for
    the weight also the mean's error times the summed gradient, plus the rounding to the parameter's type. The operator
    returns both in weight's type, so a bias of a wider type sees that rounding too."""
    assert ref.grad_output is not None and ref.grad_weight is not None and ref.grad_bias is not None
    g, dims = ref.grad_output, reduce_dims(ref.output)
    if which == "bias":
        bound = 8 * stat_eps(dtype) * g.abs().sum(dims) + ulp(ref.grad_bias, param_dtype)
        return bound if ref.weight_dtype is None else bound + ulp(ref.grad_bias, ref.weight_dtype)
    product = (g * ref.normalized).abs().sum(dims) + g.abs().sum(dims) * (ref.var.sqrt() * ref.invstd).clamp(max=1)
    slack = (merge_error(ref) * g.abs()).sum(dims)
    return 8 * stat_eps(dtype) * product + slack + ulp(ref.grad_weight, param_dtype)


@dataclass(frozen=True)
class SecondReference:
    """Float64 derivatives of <arriving, gradients> by grad_output, input and weight, and how far each may be off."""

    grad_grad_output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    tolerances: tuple[Tensor, Tensor, Tensor]


def second_reference(
    x: Tensor,
    weight: Tensor | None,
    grad_output: Tensor,
    arriving: Sequence[Tensor | None],
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
) -> SecondReference:
    """Second derivatives by torch's own batch norm in float64, for what arrives at the three gradients (None: zero).

    With running statistics they normalise the input, else its own do.
    """
    training = running_mean is None
    ref = reference(x, weight, None, grad_output, running_mean=running_mean, running_var=running_var,
                    training=training, eps=eps)  # fmt: skip
    leaves = [t.detach().double().clone().requires_grad_() for t in (grad_output, x, ref.weight)]
    g, wide, w = leaves
    bias = torch.zeros_like(w).requires_grad_()
    stats = [None if t is None else t.detach().double() for t in (running_mean, running_var)]
    # Centring is exact here and changes no derivative; torch's own centres by a mean of one word.
    shift = per_channel(ref.mean.detach(), x)
    if training:
        out = F.batch_norm(wide - shift, None, None, w, bias, True, eps=eps)
    else:
        out = F.batch_norm(wide, *stats, w, bias, False, eps=eps)
    first = torch.autograd.grad(out, (wide, w, bias), g, create_graph=True)
    total = sum((f * a.detach().double()).sum() for f, a in zip(first, arriving, strict=True) if a is not None)
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return SecondReference(*found, _second_tolerances(ref, arriving, found, x.dtype))


def _second_tolerances(
    ref: Reference, arriving: Sequence[Tensor | None], found: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Per element, per channel for the weight.

    double_formulas.h's terms, each with the magnitudes that are summed in it in the place of its sums, right to 8
    times stat_eps (as in grad_input_tolerance) for each factor that is a sum: one in grad_grad_output, two in the
    others. xhat counts as one more than it is: that is what an error of the mean makes of it. Then the rounding to
    storage.
    """
    assert ref.grad_output is not None
    like, dims = ref.output, reduce_dims(ref.output)
    zero = torch.zeros_like(like)
    gg = zero if arriving[0] is None else arriving[0].detach().double().abs()
    a, b = (torch.zeros_like(ref.weight) if t is None else t.detach().double().abs() for t in arriving[1:])
    dy, xhat = ref.grad_output.abs(), ref.normalized.abs() + (ref.var.sqrt() * ref.invstd).clamp(max=1).max()
    count, scale, s = like.numel() // like.shape[1], (ref.weight * ref.invstd).abs(), ref.invstd

    def over(*factors: Tensor) -> Tensor:
        """Mean of a product of magnitudes, which training alone takes."""
        product = factors[0] * factors[1] if len(factors) > 1 else factors[0]
        return product.mean(dims) if ref.training else torch.zeros_like(ref.weight)

    def wide(t: Tensor) -> Tensor:
        return per_channel(t, like)

    p, q = over(dy, xhat), over(gg, xhat)
    covariance = (gg * dy).mean(dims) + over(gg) * over(dy)
    alpha, beta = a + scale * q, scale * p
    delta = scale * (covariance + 3 * p * q) + a * p if ref.training else torch.zeros_like(a)
    error = 8 * stat_eps(dtype) + merge_error(ref)
    by_dy = (gg + wide(over(gg))) * wide(scale) + xhat * wide(alpha) + wide(b)
    by_x = ((dy + wide(over(dy))) * wide(alpha) + (gg + wide(over(gg))) * wide(beta) + xhat * wide(delta)) * wide(s)
    by_weight = s * count * (covariance + p * q)
    parameter = torch.float32 if ref.weight_dtype is None else ref.weight_dtype
    return (
        error * by_dy + ulp(found[0], dtype),
        2 * error * by_x + ulp(found[1], dtype),
        2 * error.flatten() * by_weight + ulp(found[2], parameter),
    )


def running_tolerance(ref: Reference, which: str, dtype: torch.dtype, stat_dtype: torch.dtype) -> Tensor:
    """Per channel. Two roundings in the update, stat_eps of the standard deviation or VAR_BOUND (5 of it) of the
    variance, plus the rounding to the buffer's type. The terms may cancel, so their magnitudes count."""
    assert ref.running_mean is not None and ref.running_var is not None
    eps, m = acc_eps(dtype), abs(ref.momentum)
    if which == "mean":
        size = ref.running_mean.abs() + 2 * m * ref.mean.abs()
        return 2 * eps * size + stat_eps(dtype) * m * ref.var.sqrt() + ulp(ref.running_mean, stat_dtype)
    size = ref.running_var.abs() + m * ref.var
    return 2 * eps * size + 5 * stat_eps(dtype) * m * ref.var + ulp(ref.running_var, stat_dtype)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """Fail with the worst element unless |actual - expected| <= tolerance everywhere (equal infinities pass)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    # A float64 value above the storage type's range is rightly stored as infinity.
    stored = expected.to(actual.dtype).double()
    actual = actual.detach().double()
    error = (actual - expected).abs()
    excess = torch.where(actual == stored, torch.zeros_like(error), error / tolerance)
    excess = torch.where(excess.isnan(), torch.full_like(excess, torch.inf), excess)
    if excess.numel() == 0 or excess.max() <= 1:
        return
    at = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape))
    raise AssertionError(
        f"{what}: {int((excess > 1).sum())} of {excess.numel()} outside the tolerance; worst at {index}: "
        f"{actual.flatten()[at].item():.9g} where {expected.flatten()[at].item():.9g} is right, "
        f"{excess.flatten()[at].item():.3g} times the tolerance"
    )
