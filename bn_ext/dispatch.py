"""What computes a call where it stands: our operators, our autograd Functions, or torch's own batch norm.

Module, functional form and fused pairs meet here: choose says which, once a call, and what it returns computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._C import _disabled_torch_function_impl as _no_override
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import TorchFunctionMetadataMode
from torch.utils._device import DeviceContext

from . import autograd, ops
from ._C import batch_norm as _eager
from .activation import finish
from .batches import has_single_value, piece_by_piece
from .devices import kernels_on
from .padding import check_padded

# The arguments of by_operator. Its result is None where there is no kernel, and then nothing has changed.
Implementation = Callable[..., Tensor | None]
# Batch renormalisation's max_r, max_d, warmup_steps and smooth, as the operators take them.
Renorm = tuple[float, float, float, float]


def has_kernel(input: Tensor) -> bool:
    """Return whether input is a plain strided tensor on a device that this library has kernels for."""
    plain = type(input) in (Tensor, torch.nn.Parameter) and input.layout == torch.strided
    return plain and kernels_on(input.device)


_PLAIN = Tensor.__torch_dispatch__


def is_foreign(input: Tensor) -> bool:
    """Return whether input is of a type whose __torch_dispatch__ knows torch's operators alone, as most do."""
    kind = type(input)
    if kind is Tensor or kind is torch.nn.Parameter or issubclass(kind, (FakeTensor, FunctionalTensor)):
        return False
    return getattr(kind, "__torch_dispatch__", _PLAIN) is not _PLAIN


_function_modes = torch._C._len_torch_function_stack

# Modes that do not care which batch norm runs: torch.set_default_device's, make_fx's, and recompute.py's.
QUIET: set[type] = {DeviceContext, TorchFunctionMetadataMode}


def modes_listen() -> bool:
    """Return whether a TorchFunctionMode is on that may care for the calls of torch's functions."""
    return any(type(torch._C._get_function_stack_at(i)) not in QUIET for i in range(_function_modes()))


# torch.nn.functional.batch_norm as it was at import, and functional.py's: who puts another there wants to be called.
_FUNCTIONAL = vars(F)
KNOWN = {F.batch_norm}


def is_watched(more: bool = False) -> bool:
    """Return whether somebody is to see the call of torch.nn.functional.batch_norm that torch's own forward makes.

    Of more than that, a mode only where no checkpoint will run it again, or does: torch's operations save another
    number of tensors than our operator, and the mode may be there in one of the two runs alone.
    """
    if _FUNCTIONAL["batch_norm"] not in KNOWN:
        return True
    return _function_modes() > 0 and modes_listen() and not (more and _in_checkpoint())


def _in_checkpoint() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def transforms_supported() -> bool:
    """Return whether every torch.func transform in force can differentiate our operators (vmap and jvp cannot)."""
    if torch.compiler.is_dynamo_compiling():
        return False  # torch.compile traces what an autograd.Function computes there, and loses its backward
    stack = get_interpreter_stack()
    return stack is None or all(level.key() == TransformType.Grad for level in stack)


def overrides_functions(input: Tensor) -> bool:
    """Return whether input is of a type with a __torch_function__ of its own, torch.fx's stand-ins among them.

    torch.overrides.has_torch_function also says yes to a plain tensor under a mode, torch.set_default_device's for one.
    """
    kind = type(input)
    return kind is not Tensor and getattr(kind, "__torch_function__", _no_override) is not _no_override


def choose(input: Tensor, more: bool = False) -> Implementation | None:
    """Return what computes batch norm where the call stands, or None where torch's own has to; more: and more than it.

    by_operator is for eager calls, torch.compile, torch.export and torch.jit.trace; by_functions is for torch.func.grad
    and vjp. Torch's own is for forward-mode AD, vmap, ONNX, tensor types that override functions or
    operators, and where a TorchFunctionMode or who has replaced torch's batch_norm is to see it.
    """
    if overrides_functions(input) or forward_ad._current_level >= 0:
        return None
    if _are_functorch_transforms_active():
        return by_functions if transforms_supported() else None
    if torch.compiler.is_compiling():
        # A graph is made once and run later: whether there is a kernel is settled now. Export shows fake tensors here.
        plain = has_kernel(input) if torch.compiler.is_dynamo_compiling() else kernels_on(input.device)
        if not plain or torch.onnx.is_in_onnx_export() or (torch.compiler.is_dynamo_compiling() and is_watched()):
            return None
    else:  # what is asked here costs half of what a call of its own would
        watched = (_FUNCTIONAL["batch_norm"] not in KNOWN or _function_modes()) and is_watched(more)
        foreign = type(input) is not Tensor and is_foreign(input)
        if watched or foreign or (_get_tracing_state() and torch.onnx.is_in_onnx_export()):
            return None
    return by_operator


def leave_to_torch(error: Exception, input: Tensor) -> None:
    """Return where torch's own batch norm is to take over from an operator that raised error, else raise it.

    It computes what there is no kernel for, and words the errors of what is no number or is printed as it was given.
    """
    text = str(error)
    if text.startswith("float division by zero"):
        raise ZeroDivisionError("float division by zero") from None
    of_arguments = "() Expected a value of type" in text or text.startswith("batch_norm eps must be")
    of_torch = text.startswith("virtual batches are cut by torch")
    if not (of_arguments or of_torch) and (not isinstance(error, NotImplementedError) or has_kernel(input)):
        raise error


@contextmanager
def restored_on_error(*tensors: Tensor | None) -> Iterator[None]:
    """Give tensors the values back that they had, if what is done inside raises."""
    if torch.compiler.is_compiling() or _get_tracing_state():
        yield  # what is recorded here would run in every call
        return
    kept = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            with unheard(tensor):
                kept.append((tensor, tensor.detach().clone()))
    try:
        yield
    except BaseException:
        for tensor, before in kept:
            with unheard(tensor), torch.no_grad():
                tensor.copy_(before)
        raise


@contextmanager
def unheard(tensor: Tensor) -> Iterator[None]:
    """Let no mode hear what is done to tensor, and no torch.func transform that tensor is not of."""
    with torch._C.DisableTorchFunction():  # who listens hears what torch's own forward does, and no more
        if _are_functorch_transforms_active() and not is_functorch_wrapped_tensor(tensor):
            with torch._C._DisableFuncTorch():
                yield
        else:
            yield


_ALLOWS_MUTATION = getattr(torch.autograd.graph, "_CloneArgBeforeMutateMode", ())


def _mutation_is_allowed() -> bool:
    """Return whether torch.autograd.graph.allow_mutation_on_saved_tensors is on.

    It looks for the memory of every argument that an operator may write, also of one that is None.
    """
    stack = range(torch._C._len_torch_dispatch_stack())
    return any(isinstance(torch._C._get_dispatch_stack_at(i), _ALLOWS_MUTATION) for i in stack)


def _are_plain(mean: object, var: object, training: bool, momentum: object, eps: object) -> bool:
    """Return whether the numbers are what native takes without asking them to become that, and whether there are
    statistics to go by; else native words the error.
    """
    kinds = (float, int)
    numbers = (
        isinstance(training, bool) and isinstance(eps, kinds) and (momentum is None or isinstance(momentum, kinds))
    )
    return numbers and (training or (mean is not None and var is not None))


def fits(input: Tensor, residual: Tensor) -> bool:
    """Return whether the kernels add residual to the batch norm of input as it is."""
    return (
        residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == torch.strided
        and not overrides_functions(residual)
    )


def by_operator(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    inplace: bool = False,
    virtual_batch_size: int | None = None,
    valid: Tensor | None = None,
    allow_single_value: bool = False,
    renorm: Renorm | None = None,
) -> Tensor | None:
    """Return act(batch_norm(input) + residual) by our kernels.

    Args:
        input: (N, C) or (N, C, L).
        running_mean, running_var, weight, bias, num_batches_tracked: as in nn.BatchNorm1d, each may be None.
        training: normalise by the batch's own statistics.
        momentum: None is the cumulative average, 1 / num_batches_tracked.
        eps: added to the variance.
        residual: of input's shape and dtype for one pass, else whatever can be added to the batch norm of input.
        activation, negative_slope: as the operators take them.
        inplace: write into input, in evaluation without autograd only.
        virtual_batch_size: in training, normalise every piece of so many samples by its own statistics.
        valid: what counts of a padded batch, as padding.py has it; all else is zero in the output.
        allow_single_value: take one value a channel in training as in evaluation.
        renorm: in training, renormalise.
    """
    if residual is not None and not fits(input, residual):
        return _step_by_step(
            by_operator, input, running_mean, running_var, weight, bias, num_batches_tracked, training, momentum, eps,
            residual, activation, negative_slope, inplace, virtual_batch_size=virtual_batch_size, valid=valid,
            allow_single_value=allow_single_value, renorm=renorm,
        )  # fmt: skip
    if allow_single_value and training and valid is not None and torch.compiler.is_compiling():
        if valid.device.type == "cpu" and running_mean is not None and running_var is not None:
            return _single_or_more(
                input, running_mean, running_var, weight, bias, num_batches_tracked, momentum, eps, residual,
                activation, negative_slope, virtual_batch_size, valid,
            )  # fmt: skip
        allow_single_value = False
    piece = min(virtual_batch_size, 1 << 62) if virtual_batch_size is not None and training else 0
    try:
        if not (inplace or torch.compiler.is_compiling()):
            output = _eager(
                input, running_mean, running_var, weight, bias, num_batches_tracked, training, momentum, eps, residual,
                activation, negative_slope, piece, valid, allow_single_value, renorm,
            )  # fmt: skip
            if output is not None:
                return output
            if _mutation_is_allowed():
                return None
        if not _are_plain(running_mean, running_var, training, momentum, eps):
            return None
        if inplace:
            ops.batch_norm_inference_(
                input, weight, bias, running_mean, running_var, eps, residual, activation, negative_slope, valid
            )
            return input
        return ops.batch_norm(  # type: ignore[no-any-return]
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, residual,
            activation, negative_slope, piece, valid, allow_single_value, renorm,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        leave_to_torch(error, input)
        return None


def _single_or_more(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    virtual_batch_size: int | None,
    valid: Tensor,
) -> Tensor | None:
    """Return what by_operator does in training with allow_single_value, in a graph: it is one for all values of valid.

    Both are computed, one of them of a batch of which nothing counts: that moves the count of batches alone.
    """
    arguments, after = (input, running_mean, running_var, weight, bias), (residual, activation, negative_slope)
    single, nothing = valid.sum() == 1, torch.zeros_like(valid)
    evaluated = by_operator(
        *arguments, None, False, 0.0, eps, *after, valid=torch.where(single, valid, nothing),
    )  # fmt: skip
    count = None if num_batches_tracked is None else num_batches_tracked.clone()
    trained = by_operator(
        *arguments, count, True, momentum, eps, *after, virtual_batch_size=virtual_batch_size,
        valid=torch.where(single, nothing, valid),
    )  # fmt: skip
    if evaluated is None or trained is None:
        return None
    if num_batches_tracked is not None and count is not None:
        num_batches_tracked.copy_(torch.where(single, num_batches_tracked, count))
    return torch.where(single, evaluated, trained)


def by_functions(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *others: Any,
    virtual_batch_size: int | None = None,
    valid: Tensor | None = None,
    allow_single_value: bool = False,
) -> Tensor | None:
    """Return what by_operator does by our autograd.Functions, and what follows batch norm by torch's operations."""
    weight, bias, num_batches_tracked, training, momentum, eps, *after = others
    if after:
        return _step_by_step(
            by_functions, input, running_mean, running_var, *others, virtual_batch_size=virtual_batch_size, valid=valid,
            allow_single_value=allow_single_value,
        )  # fmt: skip
    if valid is not None:
        check_padded(input, valid)
    if allow_single_value and training and has_single_value(input, valid):
        training = False
    if not _are_plain(running_mean, running_var, training, momentum, eps):
        return None

    def whole(piece: Tensor, valid: Tensor | None = None) -> Tensor:
        return autograd.batch_norm(
            piece, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, valid
        )

    size = virtual_batch_size if training else None
    try:
        if size is None:
            return whole(input, valid)
        with restored_on_error(running_mean, running_var, num_batches_tracked):  # a piece may raise after another
            return piece_by_piece(whole, input, size, valid)
    except (RuntimeError, ValueError) as error:
        leave_to_torch(error, input)
        return None


def _step_by_step(
    implementation: Implementation,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *others: Any,
    valid: Tensor | None,
    **options: Any,
) -> Tensor | None:
    """Return what by_operator does, batch norm by implementation and what follows by torch's operations."""
    weight, bias, num_batches_tracked, training, momentum, eps, *after = others
    with restored_on_error(*((running_mean, running_var, num_batches_tracked) if training else ())):  # addition raises
        output = implementation(
            input, running_mean, running_var, weight, bias, num_batches_tracked, training, momentum, eps,
            valid=valid, **options,
        )  # fmt: skip
        if output is None:
            return None
        residual, activation, negative_slope, inplace = after
        return finish(output, input, residual, activation, negative_slope, inplace, valid)
