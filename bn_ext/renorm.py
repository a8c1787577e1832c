"""Batch renormalisation: the function, and torch's operations where there is no kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from ._C import recomputes
from .activation import check_activation, check_call, finish
from .batches import checked_virtual_batch_size, piece_by_piece
from .dispatch import Renorm, by_operator, choose, restored_on_error
from .ops import check_dtype, check_eps, check_renorm_numbers, statistics_dtype
from .padding import check_padded, checked_valid, masked, trained
from .ragged import is_ragged, of_values
from .recompute import as_in_forward, in_checkpoint

if TYPE_CHECKING:
    from .modules import State


def _bare(t: Tensor) -> Tensor:
    """Return t without what torch.func.grad has put around it."""
    while is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            raise RuntimeError(
                "batch renormalisation of a batched tensor cannot move running statistics that are not batched: under "
                "vmap batch them too, or evaluate the module"
            )
        t = get_unwrapped(t)
    return t


def _move(tensor: Tensor, value: Tensor) -> None:
    if _are_functorch_transforms_active() and not is_functorch_wrapped_tensor(tensor):
        bare = _bare(value)
        with torch._C._DisableFuncTorch():
            tensor.copy_(bare)
    else:
        tensor.copy_(value)


def _warmed_up(batches: Tensor | None, steps: float, smooth: float) -> Tensor | float:
    """Return how much of r - 1 and d applies, as csrc/core/renorm.h has it."""
    if not steps:
        return 1.0
    if batches is None:
        raise ValueError("warmup_steps are counted by num_batches_tracked, which is None")
    share = (batches.double() / steps).clamp(0, 1)
    return share if smooth else share.floor()


def _of_torch(input: Tensor, state: State, renorm: Renorm) -> Tensor:
    """Return what the kernels compute of a whole batch, by torch's operations."""
    mean, var, weight, bias, batches, training, momentum, eps = state
    if mean is None or var is None:
        raise ValueError("batch renormalisation goes by running_mean and running_var: it needs both")
    for name, vector in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if vector is not None and vector.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {vector.numel()}")
    kind, dims = statistics_dtype(input), [0, *range(2, input.dim())]

    def column(t: Tensor) -> Tensor:
        return t.to(kind).reshape(1, -1, *(1,) * (input.dim() - 2))

    by_mean, by_invstd = column(mean).detach(), (column(var).detach() + eps).rsqrt()
    if training:
        count = input.shape[0] * math.prod(input.shape[2:])
        if count == 1:
            size = list(input.shape)
            raise ValueError(f"Expected more than 1 value per channel when training, got input size torch.Size({size})")
        share, keeps = _warmed_up(batches, *renorm[2:]), recomputes()  # a checkpoint whose statistics stay
        if batches is not None and not keeps:
            _move(batches, batches + 1)
        x = input.to(kind)
        if count == 0:
            return _affine(x, weight, bias, column).to(input.dtype)
        of_batch = x.mean(dims, keepdim=True)
        centred = x - of_batch
        variance = centred.square().mean(dims, keepdim=True)
        invstd = (variance + eps).rsqrt()
        of_batch, variance, max_r, max_d = of_batch.detach(), variance.detach(), *renorm[:2]
        share = share.to(x.device, kind) if isinstance(share, Tensor) else share
        r = 1 + ((by_invstd / invstd.detach()).clamp(1 / max_r, max_r) - 1) * share
        d = ((of_batch - by_mean) * by_invstd).clamp(-max_d, max_d) * share
        y = centred * invstd * r + d
        if not keeps:
            _move_statistics(mean, var, of_batch, variance * (count / (count - 1)), batches, momentum)
    else:
        y = (input.to(kind) - by_mean) * by_invstd
    return _affine(y, weight, bias, column).to(input.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, column: Callable[[Tensor], Tensor]) -> Tensor:
    y = y if weight is None else y * column(weight)
    return y if bias is None else y + column(bias)


def _move_statistics(
    mean: Tensor, var: Tensor, of_batch: Tensor, unbiased: Tensor, batches: Tensor | None, momentum: float | None
) -> None:
    part: Any = momentum
    if momentum is None:
        part = 0.0 if batches is None else (1 / batches.double()).to(of_batch.device, of_batch.dtype)
    with torch.no_grad():
        for running, new in ((mean, of_batch), (var, unbiased)):
            _move(running, (running.to(new.dtype) * (1 - part) + new.reshape(running.shape) * part).to(running.dtype))


def computed(input: Tensor, state: State, *others: Any) -> Tensor:
    """Return act(renormalised(input) + residual). others: _computed's."""
    if input.dim() not in (2, 3):
        raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")
    if not (state[5] and in_checkpoint()):
        return _computed(input, state, *others)
    with as_in_forward(state[0], state[1], state[4]) as (mean, var, batches):
        return _computed(input, (mean, var, state[2], state[3], batches, *state[5:]), *others)


def _computed(
    input: Tensor,
    state: State,
    renorm: Renorm,
    after: tuple[Tensor | None, str, float] | None,
    size: int | None,
    valid: Tensor | None,
) -> Tensor:
    """after: residual, activation, negative_slope; size: of virtual batches."""
    mean, var, _, _, batches, training, _, eps = state
    implementation = choose(input, more=True)
    if implementation is by_operator or (implementation is not None and not training):
        options: dict[str, Any] = {"renorm": renorm} if training else {}
        output = implementation(input, *state, *(after or ()), virtual_batch_size=size, valid=valid, **options)
        if output is not None:
            return output
    if training:
        check_renorm_numbers(renorm)
    check_eps(eps, training)
    check_dtype(input)
    whole = norm = partial(_of_torch, state=state, renorm=renorm)
    if valid is not None:
        check_padded(input, valid)
        whole = partial(trained if training else masked, norm)
    with restored_on_error(*((mean, var, batches) if training else ())):
        output = piece_by_piece(whole, input, size if training else None, valid)
        if after is not None:
            residual, activation, slope = after
            output = finish(output, input, residual, activation, slope, False, valid)
        return output


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    max_r: float = 3.0,
    max_d: float = 5.0,
    num_batches_tracked: Tensor | None = None,
    warmup_steps: int = 0,
    smooth: bool = False,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    virtual_batch_size: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply batch renormalisation to every channel, by the formulas of FusedBatchRenorm1d.

    With residual or activation the result is act(batch_renorm(input) + residual), in the same passes over memory.

    Args:
        input: (N, C) or (N, C, L), of any strides.
        running_mean, running_var: (C,), which input is renormalised by when training, and which then move; else what
            input is normalised by.
        weight, bias: (C,) or None, which are ones and zeros.
        training: use the statistics of input.
        momentum: share of the batch in the running statistics, from 0 to 1. None: 1 / num_batches_tracked.
        eps: added to the variances, in units of input squared.
        max_r, max_d: how far r and d may go, r from 1 / max_r to max_r and d from -max_d to max_d.
        num_batches_tracked: one int64, the batches of training so far; it is counted up when training. None: no count.
        warmup_steps: batches of plain batch normalisation before, by num_batches_tracked; 0: none.
        smooth: let r and d set in over these batches, a little more with each.
        residual, activation, negative_slope, virtual_batch_size, lengths, mask: as in bn_ext.functional.batch_norm.

    Shape:
        - input: (N, C) or (N, C, L)
        - running_mean, running_var, weight, bias: (C,)
        - residual: input's, or one that can be added to it

    Dtypes:
        - input: float64, float32, bfloat16 or float16
        - running_mean, running_var, weight, bias: any of these, whatever input's

    Returns:
        Tensor of input's shape and dtype.

    Raises:
        ValueError: input is not 2-D or 3-D; one value per channel in training; max_r below 1, max_d or warmup_steps
            below 0; warmup_steps without num_batches_tracked; no such activation.
        RuntimeError: a per-channel tensor that is not of size C; a residual that cannot be added.

    Example:
        >>> import torch
        >>> from bn_ext.functional import batch_renorm
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> mean, var = torch.zeros(2), torch.ones(2)
        >>> batch_renorm(x, mean, var, training=True)  # r is 1 and 3, d is 2 and 5
        tensor([[1.0000, 2.0000],
                [3.0000, 8.0000]])
        >>> mean
        tensor([0.0200, 0.2000])
    """
    if type(input) is not Tensor and is_ragged(input):
        norm = partial(
            batch_renorm, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias,
            training=training, momentum=momentum, eps=eps, max_r=max_r, max_d=max_d,
            num_batches_tracked=num_batches_tracked, warmup_steps=warmup_steps, smooth=smooth, activation=activation,
            negative_slope=negative_slope, virtual_batch_size=virtual_batch_size,
        )  # fmt: skip
        return of_values(norm, input, lengths, mask, residual, virtual_batch_size is not None)  # type: ignore[no-any-return]
    size = checked_virtual_batch_size(virtual_batch_size)
    valid = checked_valid(lengths, mask)
    after = None
    if residual is not None or activation is not None:
        check_activation(activation)
        check_call(input, residual, training, False, weight, bias)
        after = (residual, activation or "identity", negative_slope)
    batches = num_batches_tracked if training else None
    state = (running_mean, running_var, weight, bias, batches, training, momentum, eps)
    return computed(input, state, numbers(max_r, max_d, warmup_steps, smooth), after, size, valid)


def numbers(max_r: float, max_d: float, warmup_steps: int, smooth: bool) -> Renorm:
    return max_r, max_d, warmup_steps, 1.0 if smooth else 0.0


__all__ = ["batch_renorm", "computed", "numbers"]
