"""act(batch norm + residual) in float64, and how far an implementation may be from it: reference.py's terms, and what
the activation makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference import (
    Reference,
    acc_eps,
    grad_input_tolerance,
    grad_param_tolerance,
    output_tolerance,
    per_channel,
    reduce_dims,
    reference,
    ulp,
)

SLOPE = 0.125  # of leaky_relu in tests: a product with it is exact
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
STEEPEST = 1.13  # the largest derivative of all: gelu's, 1.129 at sqrt(2)
CURVIEST = 0.8  # the largest second derivative away from a kink: gelu's, 2 / sqrt(2 pi) at 0
FORMULA_ULP = 8  # what csrc/core/activation_math.h promises, of the CPU two less


def value_and_derivative(v: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """act(v) and act'(v) of float64 v, in both tails to a few roundings, with torch's answers for 0 and NaN."""
    one = torch.ones_like(v)
    if activation == "relu":
        return torch.where(v <= 0, 0.0, v), torch.where(v <= 0, 0.0, one)
    if activation == "leaky_relu":
        return torch.where(v > 0, v, v * SLOPE), torch.where(v > 0, one, SLOPE)
    if activation == "silu":
        s, rest = torch.sigmoid(v), torch.sigmoid(-v)
        return v * s, s * (1 + v * rest)
    if activation == "gelu":
        p = 0.5 * torch.special.erfc(-v / math.sqrt(2))
        return v * p, p + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    return v, one


@dataclass(frozen=True)
class Activated:
    """Float64 results: `argument` of the activation, `output`, the gradient `passed` on to batch norm (and to the
    residual), and batch norm's own in `norm`; tolerances of all, in the units of what they bound."""

    norm: Reference
    argument: Tensor
    output: Tensor
    passed: Tensor
    output_tolerance: Tensor
    passed_tolerance: Tensor
    dtype: torch.dtype

    def grad_input_tolerance(self) -> Tensor:
        """Batch norm's own, plus its formula applied to the error of the gradient that it was given."""
        norm, error = self.norm, self.passed_error()
        size = error
        if norm.training:
            dims = reduce_dims(error)
            size = size + per_channel(error.mean(dims), error)
            size = size + norm.normalized.abs() * per_channel((error * norm.normalized.abs()).mean(dims), error)
        scale = per_channel((norm.invstd * norm.weight).abs(), error)
        return grad_input_tolerance(norm, self.dtype) + size * scale

    def grad_param_tolerance(self, which: str, param_dtype: torch.dtype) -> Tensor:
        """Likewise."""
        error, dims = self.passed_error(), reduce_dims(self.output)
        weighted = error * self.norm.normalized.abs() if which == "weight" else error
        return grad_param_tolerance(self.norm, which, self.dtype, param_dtype) + weighted.sum(dims)

    def passed_error(self) -> Tensor:
        """Of `passed` as the kernels hold it, before it is rounded to storage."""
        return self.passed_tolerance - ulp(self.passed, self.dtype)


def activated(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_output: Tensor,
    activation: str | None,
    *,
    given: Tensor,
    training: bool,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Activated:
    """The reference of one call. `given` is the output under test: it decides at a kink which side an argument is on
    that is within its tolerance of it.

    The argument may be off by what batch norm's float output may, and a rounding of the sum with the residual; act may
    be off by that times its steepest slope, and FORMULA_ULP. act' may be off by CURVIEST times the error of the
    argument, and FORMULA_ULP of its largest term, which max(1, |v|) bounds."""
    dtype = x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"running_mean": running_mean, "running_var": running_var, "training": training, "eps": eps}
    norm = reference(x, weight, bias, None, **options)
    argument = norm.output if residual is None else norm.output + residual.detach().double()
    argument_error = output_tolerance(norm, wide) + ulp(argument, wide)
    output, derivative = value_and_derivative(argument, activation)
    kinked = activation in ("relu", "leaky_relu")
    if kinked:
        positive = torch.where(argument.abs() <= argument_error, given.detach().double() > 0, argument > 0)
        derivative = torch.where(positive, 1.0, 0.0 if activation == "relu" else SLOPE).double()
    formula = FORMULA_ULP * acc_eps(dtype)
    output_error = STEEPEST * argument_error + formula * output.abs() + ulp(output, dtype)
    dy = grad_output.detach().double()
    passed = dy * derivative
    curved = activation in ("silu", "gelu")
    error = dy.abs() * (CURVIEST * argument_error + formula * argument.abs().clamp(min=1)) if curved else 0 * dy
    error = error + acc_eps(dtype) * passed.abs()
    return Activated(
        norm=reference(x, weight, bias, passed, **options), argument=argument, output=output, passed=passed,
        output_tolerance=output_error, passed_tolerance=error + ulp(passed, dtype), dtype=dtype,
    )  # fmt: skip
