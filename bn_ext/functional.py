"""Functional form, with the signature and the errors of torch.nn.functional.batch_norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _pop_mode,
    _push_mode,
    handle_torch_function,
    has_torch_function_variadic,
)

from .activation import activate, check_activation, check_call, finish
from .batches import checked_virtual_batch_size, piece_by_piece
from .dispatch import KNOWN, choose, modes_listen, restored_on_error
from .padding import check_padded, checked_valid, masked, trained
from .ragged import is_ragged, of_values
from .renorm import batch_renorm

_native_batch_norm = F.batch_norm  # as it is at import: somebody may put ours there


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
    virtual_batch_size: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply batch normalisation to every channel, as torch.nn.functional.batch_norm does.

    The formulas are those of FusedBatchNorm1d. With residual or activation the result is
    act(batch_norm(input) + residual), in the same passes over memory.

    Args:
        input: (N, C) or (N, C, L), float64, float32, bfloat16 or float16, of any strides. Tensors of another rank,
            device or layout go to torch.nn.functional.batch_norm.
        running_mean, running_var: (C,), updated in place when training, else what input is normalised by.
        weight, bias: (C,) or None, which are ones and zeros.
        training: use the statistics of input.
        momentum: share of the batch in the running statistics, from 0 to 1.
        eps: added to the variance, in units of input squared.
        residual: what is added before the activation; of input's shape and dtype for one pass. Backward of silu and
            gelu reads it again, so it is kept, by reference, and must not change; of the others it does not.
        activation: None, "relu", "leaky_relu", "silu" or "gelu" (the exact one, by erf).
        negative_slope: leaky_relu's.
        inplace: write the result into input; in evaluation only, and where autograd does not need input.
        virtual_batch_size: when training, cut the batch as FusedBatchNorm1d does and normalise every piece by its own
            statistics.
        lengths, mask: what counts of a padded batch, as FusedBatchNorm1d takes them; only one of them. A PackedSequence
            or a jagged nested tensor has lengths of its own, and a residual of it is one with the same.

    Shape:
        - input: (N, C) or (N, C, L)
        - running_mean, running_var, weight, bias: (C,), or any shape of C values
        - residual: input's, or one that can be added to it

    Dtypes:
        - input: float64, float32, bfloat16 or float16
        - running_mean, running_var, weight, bias: any of these, whatever input's

    Returns:
        Tensor of input's shape and dtype, in input's memory format. A residual of another shape or dtype is added as
        torch adds it, which may make both larger.

    Raises:
        ValueError: one value per channel in training, of a virtual batch too; virtual_batch_size below 1; eps not
            positive in training, or negative; no such activation.
        RuntimeError: a per-channel tensor that is not of size C; running statistics missing when not training; a
            residual that cannot be added; inplace in training or where autograd needs input.
        NotImplementedError: input is not of a floating type.

    Example:
        >>> import torch
        >>> from bn_ext.functional import batch_norm
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> mean, var = torch.zeros(2), torch.ones(2)
        >>> batch_norm(x, mean, var, training=True)
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
        >>> mean
        tensor([0.2000, 2.0000])
        >>> batch_norm(x, None, None, training=True, residual=torch.full((2, 2), 0.5), activation="relu")
        tensor([[0.0000, 0.0000],
                [1.5000, 1.5000]])
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        if training and virtual_batch_size is not None:
            raise RuntimeError("TorchScript has no virtual batches")
        if lengths is not None or mask is not None:
            raise RuntimeError("TorchScript has no padded batches")
        norm = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        result = activate(norm, residual, "identity" if activation is None else activation, negative_slope)
        return input.copy_(result) if inplace else result
    if type(input) is not Tensor and is_ragged(input):
        call = partial(
            batch_norm, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, training=training,
            momentum=momentum, eps=eps, activation=activation, negative_slope=negative_slope, inplace=inplace,
            virtual_batch_size=virtual_batch_size,
        )  # fmt: skip
        return of_values(call, input, lengths, mask, residual, virtual_batch_size is not None)  # type: ignore[no-any-return]
    virtual_batch_size = checked_virtual_batch_size(virtual_batch_size)
    plain = residual is None and activation is None and not inplace
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return _overridden(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
            negative_slope, inplace, virtual_batch_size, lengths, mask,
        )  # fmt: skip
    valid = None if lengths is None and mask is None else checked_valid(lengths, mask)
    if not plain:
        check_activation(activation)
        check_call(input, residual, training, inplace, weight, bias)
    implementation = choose(input) if input.dim() in (2, 3) and momentum is not None else None
    arguments = (input, running_mean, running_var, weight, bias)
    if implementation is not None:
        after = () if plain else (residual, activation or "identity", negative_slope, inplace)
        output = implementation(
            *arguments, None, training, momentum, eps, *after, virtual_batch_size=virtual_batch_size, valid=valid
        )
        if output is not None:
            return output

    size = virtual_batch_size if training else None
    native = partial(_of_torch, *arguments[1:], training, momentum, eps)
    if plain and size is None and valid is None:
        return native(input)
    whole = native
    if valid is not None:
        check_padded(input, valid)
        whole = partial(trained if training else masked, native)
    with restored_on_error(*((running_mean, running_var) if training else ())):
        output = piece_by_piece(whole, input, size, valid)
        return finish(output, input, residual, activation, negative_slope, inplace, valid)


def _of_torch(*arguments: Any) -> Tensor:
    """Return torch's own batch norm of the last of its arguments, which are else in their order."""
    return _native_batch_norm(arguments[-1], *arguments[:-1])


def _overridden(*arguments: Any) -> Tensor:
    """Let a tensor type with a __torch_function__ of its own decide; a plain call looks like one of torch's."""
    residual, activation, negative_slope, inplace, virtual_batch_size, lengths, mask = arguments[8:]
    after: dict[str, Any] = {}
    if residual is not None or activation is not None or inplace:
        after = {"residual": residual, "activation": activation, "negative_slope": negative_slope, "inplace": inplace}
    if virtual_batch_size is not None:
        after["virtual_batch_size"] = virtual_batch_size
    if lengths is not None or mask is not None:
        after.update(lengths=lengths, mask=mask)
    names = ("weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, arguments[3:8], strict=True))  # by name, as torch's own passes them on
    return handle_torch_function(batch_norm, arguments[:5], *arguments[:3], **(given | after))


KNOWN.add(batch_norm)


class _Kernels(TorchFunctionMode):
    """Computes what is left of a call of torch.nn.functional.batch_norm with our kernels."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = function is _native_batch_norm and all(kind in (Tensor, torch.nn.Parameter) for kind in types)
        return (batch_norm if ours else function)(*args, **(kwargs or {}))


@contextmanager
def kernels_beneath_modes() -> Iterator[None]:
    """Let every TorchFunctionMode see torch.nn.functional.batch_norm called, and our kernels do what they pass on."""
    if not modes_listen():
        yield
        return
    above = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with _Kernels():
            for mode in reversed(above):
                _push_mode(mode)
            try:
                yield
            finally:
                for _ in above:
                    _pop_mode()
    finally:
        for mode in reversed(above):
            _push_mode(mode)


__all__ = ["batch_norm", "batch_renorm"]  # what is for users; the rest of bn_ext takes more from here
