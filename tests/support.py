"""What several test files share: devices, layouts, inputs, one training step, and comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext
from reference import (
    Reference,
    assert_within,
    grad_input_tolerance,
    grad_param_tolerance,
    output_tolerance,
    reference,
    running_tolerance,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((6, 5), (4, 5, 3))


def no_cuda_reason() -> str:
    """Why the CUDA cases cannot run here, or an empty string when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bn_ext::batch_norm_forward", "CUDA"):
        return "bn_ext was built without CUDA"
    return ""


DEVICES = ("cpu", "cuda:0")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Normal values that depend on the arguments only; drawn on the CPU so that every device sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn_in = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = torch.randn(shape, generator=generator, dtype=drawn_in, device="cpu")
    return drawn.mul_(std).add_(mean).to(device=device, dtype=dtype)


# ---- layouts: each takes a contiguous tensor and returns one of the same shape and other strides ----


def _widened(x: Tensor, dim: int, step: int, before: int, after: int) -> Tensor:
    """Same values, stored as every `step`-th entry of a larger tensor along `dim`, with margins of NaN."""
    shape = list(x.shape)
    shape[dim] = before + shape[dim] * step + after
    wide = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    view = wide.narrow(dim, before, x.shape[dim] * step)
    view = view[tuple(slice(None, None, step) if d == dim else slice(None) for d in range(x.dim()))]
    view.copy_(x)
    return view


def _shifted(x: Tensor, elements: int) -> Tensor:
    """Contiguous, but starting `elements` entries into its storage: not aligned to 16 bytes."""
    store = torch.full((x.numel() + elements,), torch.nan, dtype=x.dtype, device=x.device)
    view = store[elements:].view(x.shape)
    view.copy_(x)
    return view


def _permuted(x: Tensor) -> Tensor:
    """(N, C, L) stored as (N, L, C); (N, C) stored column by column."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _reversed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _channels_first(x: Tensor) -> Tensor:
    """(N, C, ...) stored as (C, N, ...)."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _overlapping(x: Tensor) -> Tensor:
    """Windows over a line of values: neighbouring rows share storage."""
    line = x.flatten().repeat(2)  # of few rows the windows reach farther than the values do
    strides = (1,) * (x.dim() - 1) + (2,)
    return line.as_strided(x.shape, strides)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": _permuted,
    "reversed": _reversed,
    "channels_first": _channels_first,
    "sliced_batch": lambda x: _widened(x, 0, 2, 1, 1),
    "sliced_channels": lambda x: _widened(x, 1, 1, 1, 2),
    "strided_channels": lambda x: _widened(x, 1, 3, 0, 0),
    "sliced_last": lambda x: _widened(x, x.dim() - 1, 1, 3, 1),
    "strided_last": lambda x: _widened(x, x.dim() - 1, 2, 0, 0),
    "sliced_permuted": lambda x: _widened(x.transpose(-1, -2).contiguous(), x.dim() - 1, 1, 1, 2).transpose(-1, -2),
    "misaligned": lambda x: _shifted(x, 1),
    "misaligned_3": lambda x: _shifted(x, 3),
    "misaligned_permuted": lambda x: _shifted(x.transpose(-1, -2).contiguous(), 1).transpose(-1, -2),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_last": lambda x: x[..., :1].expand_as(x),
    "expanded_all": lambda x: x.flatten()[0].expand_as(x),
    "overlapping": _overlapping,
}


# ---- modules and one step through them ----


# torch 2.11's constructor does not know bias yet.
BIAS_OPTION = "bias" in inspect.signature(nn.BatchNorm1d).parameters


def make(cls: type[nn.BatchNorm1d], *arguments: Any, bias: bool = True, **options: Any) -> nn.BatchNorm1d:
    """cls(...), with bias=False also where the constructor is too old to know it."""
    if bias or BIAS_OPTION:
        return cls(*arguments, **options, **({} if bias else {"bias": False}))
    module = cls(*arguments, **options)
    module.bias = None
    return module


def module_for(cls: type[nn.BatchNorm1d], channels: int, device: str = "cpu", **options: Any) -> nn.BatchNorm1d:
    """A module whose parameters and buffers are not the trivial 1 and 0, the same for every class."""
    module = make(cls, channels, device=device, **options)
    with torch.no_grad():
        line = torch.linspace(-1, 1, channels, device=device, dtype=torch.float64)
        if module.weight is not None:
            module.weight.copy_(1.25 + 0.5 * line)
        if module.bias is not None:
            module.bias.copy_(0.3 - line)
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(0.2 * line)
            module.running_var.copy_(1.5 + 0.4 * line)
    return module


def act_module_for(
    channels: int, device: str = "cpu", activation: str | None = "relu", negative_slope: float = 0.01, **options: Any
) -> bn_ext.BatchNormAct1d:
    """A batch norm in module_for's state with an activation behind it."""
    module = bn_ext.BatchNormAct1d(1, activation, negative_slope)
    module.norm = module_for(bn_ext.FusedBatchNorm1d, channels, device, **options)
    return module


def pair(channels: int, device: str = "cpu", **options: Any) -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    """(ours, native) in the same state."""
    return (
        module_for(bn_ext.FusedBatchNorm1d, channels, device, **options),
        module_for(nn.BatchNorm1d, channels, device, **options),
    )


@dataclass
class Step:
    """What one forward and backward leave behind; None where the module has no such tensor."""

    output: Tensor | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


def step(module: nn.Module, x: Tensor, grad_output: Tensor | None = None) -> Step:
    """Forward, and backward when grad_output is given. The input keeps its strides and gets the raw gradient."""
    x = x.detach().requires_grad_(grad_output is not None)
    output = module(x)
    result = Step(output=output.detach())
    if grad_output is not None:
        wanted = {"input": x, "weight": module.weight, "bias": module.bias}
        wanted = {k: v for k, v in wanted.items() if v is not None and v.requires_grad}
        grads = torch.autograd.grad(output, tuple(wanted.values()), grad_output)
        for key, grad in zip(wanted, grads, strict=True):
            setattr(result, f"grad_{key}", grad)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        value = getattr(module, key)
        setattr(result, key, None if value is None else value.clone())
    return result


def assert_same(ours: Step, native: Step, dtype: torch.dtype = torch.float64) -> None:
    """Same tensors, types and shapes as native. Both are right to some tens of roundings on small friendly data, so a
    thousand eps of the arithmetic type, relative to the largest entry, separates a wrong formula from rounding."""
    for field in fields(Step):
        mine, theirs = getattr(ours, field.name), getattr(native, field.name)
        assert (mine is None) == (theirs is None), field.name
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, field.name
        size = theirs.double().abs()
        scale = float(size[size.isfinite()].max()) if size.isfinite().any() else 1.0
        bound = 1000 * torch.finfo(dtype).eps * max(scale, 1.0)
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=bound, equal_nan=True, msg=lambda m, f=field.name: f"{f}: {m}"
        )


def expected_step(module: nn.BatchNorm1d, x: Tensor, grad_output: Tensor | None, momentum: float) -> Reference:
    """The reference for the module's present state; `momentum` is the factor this step will use."""
    use_batch = module.training or module.running_mean is None
    update = module.training and module.track_running_stats
    return reference(
        x, module.weight, module.bias, grad_output,
        running_mean=module.running_mean if update or not use_batch else None,
        running_var=module.running_var if update or not use_batch else None,
        training=use_batch, momentum=momentum, eps=module.eps,
    )  # fmt: skip


class Gradients(Protocol):
    """What holds the gradients of one backward; None where one was not wanted."""

    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def assert_gradients(result: Gradients, ref: Reference, dtype: torch.dtype) -> None:
    """Every gradient that is there within the error model of reference.py, grad_input in the type of the input."""
    if result.grad_input is not None:
        assert ref.grad_input is not None and result.grad_input.dtype == dtype
        assert_within(result.grad_input, ref.grad_input, grad_input_tolerance(ref, dtype), "grad input")
    for which, mine, right in (
        ("weight", result.grad_weight, ref.grad_weight),
        ("bias", result.grad_bias, ref.grad_bias),
    ):
        if mine is not None:
            assert right is not None
            assert_within(mine, right, grad_param_tolerance(ref, which, dtype, mine.dtype), f"grad {which}")


def assert_step(result: Step, ref: Reference, dtype: torch.dtype) -> None:
    """Every tensor of the step within the error model of reference.py, in the right type."""
    assert result.output is not None and result.output.dtype == dtype
    assert_within(result.output, ref.output, output_tolerance(ref, dtype), "output")
    assert_gradients(result, ref, dtype)
    if ref.training and ref.running_mean is not None and ref.running_var is not None:
        for which, mine, right in (
            ("mean", result.running_mean, ref.running_mean),
            ("var", result.running_var, ref.running_var),
        ):
            assert mine is not None
            assert_within(mine, right, running_tolerance(ref, which, dtype, mine.dtype), f"running {which}")


def check_module(module: nn.BatchNorm1d, x: Tensor, grad_output: Tensor | None, momentum: float = 0.1) -> Step:
    """Run one step of the module and hold it to the reference."""
    ref = expected_step(module, x, grad_output, momentum)
    result = step(module, x, grad_output)
    assert_step(result, ref, x.dtype)
    return result


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps": {"eps": 0.25},
    "momentum_0": {"momentum": 0.0},
    "momentum_1": {"momentum": 1.0},
    "momentum_0.5": {"momentum": 0.5},
    "momentum_above_1": {"momentum": 1.5},
    "momentum_int": {"momentum": 1},
    "momentum_none": {"momentum": None},
    "no_affine": {"affine": False},
    "no_bias": {"bias": False},
    "no_tracking": {"track_running_stats": False},
    "no_affine_no_tracking": {"affine": False, "track_running_stats": False},
    "no_tracking_momentum_none": {"track_running_stats": False, "momentum": None},
}


def train_and_eval(ours: nn.BatchNorm1d, native: nn.BatchNorm1d, shape: tuple[int, ...], device: str) -> None:
    """Three training steps and one eval step on different batches; everything must agree after each."""
    dtype = torch.float64
    for seed, training in enumerate((True, True, False, True)):
        x = normal(shape, dtype, device, mean=0.5, seed=seed)
        g = normal(shape, dtype, device, seed=100 + seed)
        ours.train(training), native.train(training)
        assert_same(step(ours, x, g), step(native, x, g))


# ---- errors and calls ----


def error_of(call: Callable[[], object]) -> tuple[type[BaseException], str] | None:
    """(type, text) of what the call raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


# The place of residual among an operator's arguments; torch passes what is at its default at the end not on.
RESIDUAL = {"bn_ext::batch_norm_forward": 10, "bn_ext::batch_norm_inference": 6, "bn_ext::batch_norm_inference_": 6}


class OpLog(TorchDispatchMode):
    """Records the batch-norm operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fused = 0  # passes with an activation or a residual

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        if "batch_norm" in name:
            self.calls.append((name, args))
            residual, activation = [*args[RESIDUAL.get(name, len(args)) :][:2], None, "identity"][:2]
            self.fused += residual is not None or activation not in (None, "identity")
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]
