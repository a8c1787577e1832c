"""FusedBatchNorm1d: torch.nn.BatchNorm1d with our kernels in its forward, everything else inherited."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .batches import checked_virtual_batch_size, has_single_value, piece_by_piece
from .dispatch import choose, restored_on_error
from .functional import kernels_beneath_modes
from .padding import check_padded, checked_valid, masked, trained
from .ragged import is_ragged, of_values

_OF_TORCH = nn.BatchNorm1d.__module__  # as it is at import: who puts a class of ours into torch.nn still gets this


def mark_as_leaf(module: nn.Module) -> None:
    """Have torch.fx keep module whole, as it keeps torch's own: it goes by an instance's __module__."""
    vars(module)["__module__"] = _OF_TORCH


def _with_options(of_torch: Any) -> Any:
    """Return what makes a constructor show torch's own signature, and behind it the options that ours takes by name."""

    def decorate(init: Any) -> Any:
        wrapped: Any = functools.wraps(of_torch)(init)
        own = [p for p in inspect.signature(init, follow_wrapped=False).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters = [*inspect.signature(of_torch).parameters.values(), *own]
        parameters.sort(key=lambda p: p.kind)  # a **kwargs of torch's stays last
        wrapped.__signature__ = inspect.Signature(parameters)
        return wrapped

    return decorate


# What a call of a batch norm goes by beside its input: running_mean, running_var, weight, bias, num_batches_tracked,
# training, momentum, eps, as dispatch.by_operator takes them. A bare tuple: a named one takes 0.2 us to make.
State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float | None, float]


def padded_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return forward's with the names of lengths and mask alone: exporters fill in what has a default, by its place."""
    parameters = inspect.signature(forward).parameters.values()
    named = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return inspect.Signature(named)


def check_absent(norm: nn.Module, absent: tuple[None, ...]) -> None:
    """Raise nn.BatchNorm1d's TypeError for arguments by place that are more than an exporter's None."""
    if len(absent) > 2 or any(one is not None for one in absent):
        given = len(absent) + 2
        raise TypeError(f"{type(norm).__name__}.forward() takes 2 positional arguments but {given} were given")


def state_of(norm: nn.BatchNorm1d) -> State:
    """Return what a call of norm would go by now, by nn.BatchNorm1d's own rules."""
    # nn.Module.__getattr__ costs a third of a microsecond a name; parametrized names are not in these dicts.
    parameters, buffers = norm._parameters, norm._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
        batches = buffers["num_batches_tracked"]
    except KeyError:
        mean = var = batches = None
        if not norm.training or norm.track_running_stats:  # else they may be missing
            mean, var = norm.running_mean, norm.running_var
            batches = norm.num_batches_tracked if norm.training else None
        weight, bias = norm.weight, norm.bias
    training = bool(norm.training)
    if training and not norm.track_running_stats:
        mean = var = batches = None
    momentum = norm.momentum
    if not training:
        batches = None
        training = mean is None and var is None
        if momentum is None:
            momentum = 0.0
    return mean, var, weight, bias, batches, training, momentum, norm.eps


def options_of(norm: FusedBatchNorm1d) -> dict[str, Any]:
    """Return what dispatch.by_operator takes of norm beside its state."""
    return {"virtual_batch_size": norm._virtual_batch_size, "allow_single_value": takes_single_value(norm)}


def takes_single_value(norm: FusedBatchNorm1d) -> bool:
    """Return whether norm goes by running statistics that one value can be normalised by."""
    return norm._allow_single_value and norm.track_running_stats


class FusedBatchNorm1d(nn.BatchNorm1d):
    """Drop-in for torch.nn.BatchNorm1d: same constructor, parameters, buffers, state_dict, errors.

    Every channel is normalised, scaled and shifted on its own (Ioffe and Szegedy, "Batch Normalization", 2015,
    algorithm 1, https://arxiv.org/abs/1502.03167)::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, mean and var are those of the batch, var the biased one: the sum of squared deviations over the number
    of values n = N * L. The running statistics move towards them, with the unbiased variance, n / (n - 1) of that::

        running = (1 - momentum) * running + momentum * of_the_batch

    In evaluation, mean and var are the running statistics.

    Differences from torch's module, all in the user's favour: the statistics are accurate for any mean and batch size,
    results are bitwise the same for every number of threads, and a call that raises leaves running_mean, running_var
    and num_batches_tracked as they were. Where no kernel exists (device, layout, forward-mode AD, vmap),
    torch.nn.BatchNorm1d's own forward runs.

    It computes batch norm and nothing else. What follows it runs in the same passes over memory where the model that
    calls it was converted with bn_ext.convert(model, fuse=True), and in bn_ext.BatchNormAct1d.

    A padded batch is called with what counts of it, `norm(x, lengths=lengths)` or `norm(x, mask=mask)`: statistics are
    those of the valid values, and the output and every gradient are zero elsewhere, whatever lies there, NaN included.
    lengths, integers of size (N,) on x's device, are for x of size (N, C, L), of which x[n, :, :lengths[n]] counts.
    mask, booleans of size (N, L), or (N,) for x of size (N, C), may be of any pattern. On the CPU lengths out of range,
    and one valid value a channel in training, raise as everywhere. On a GPU they cannot be seen without waiting for it:
    there lengths are clamped to 0 and L, and a lone value becomes the bias and leaves running_mean and running_var as
    they are. Where nothing counts, only num_batches_tracked moves. A batch or virtual batch whose shape has one value a
    channel raises whatever counts of it.

    A torch.nn.utils.rnn.PackedSequence, or a jagged nested tensor of size (B, C, j), is normalised through its values
    and comes back as one. Values between the sequences of a jagged tensor do not count, and are zero in the output.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, in units of the input squared; above 0 in training.
        momentum: share of the batch in the running statistics, from 0 to 1. None: 1 / num_batches_tracked, which makes
            them the plain mean over all batches.
        affine: have a weight, ones at first, and a bias, zeros at first.
        track_running_stats: have running_mean, running_var and num_batches_tracked. Without them evaluation goes by
            the batch's own statistics too.
        virtual_batch_size: in training cut the batch along N as torch.chunk cuts it into ceil(N / virtual_batch_size)
            pieces and normalise each by its own statistics, as if the module were called for one after the other:
            ghost batch normalisation (Hoffer et al., "Train longer, generalize better", 2017,
            https://arxiv.org/abs/1705.08741). Running statistics and num_batches_tracked move piece by piece. A last
            piece of one value a channel joins the one before it. A ragged batch is cut by its values, in the order in
            which they lie, not by its sequences. By name only.
        allow_single_value: take a batch of one value a channel, which has no variance, in training as in evaluation:
            it is normalised by the running statistics, and neither these nor num_batches_tracked move. So is a padded
            batch of which one value counts, on the CPU; on a GPU that cannot be seen. A virtual batch of one value
            among others still raises. By name only.
        device: where parameters and buffers are made.
        dtype: of parameters and running statistics.
        bias: False leaves the bias out; only with torch releases whose BatchNorm1d takes it.

    Shape:
        - input: (N, C) or (N, C, L), of any strides
        - output: the input's shape and memory format
        - weight, bias, running_mean, running_var: (C,)

    Dtypes:
        - input: float64, float32, bfloat16 or float16; the output has the same
        - parameters and running statistics: any of these, whatever the input's

    Raises:
        ValueError: input is not 2-D or 3-D; one value per channel in training, where that is not allowed; eps out of
            range; allow_single_value without running statistics.
        RuntimeError: input does not have num_features channels.
        NotImplementedError: input is not of a floating type.

    Example:
        >>> import torch
        >>> from bn_ext import FusedBatchNorm1d
        >>> norm = FusedBatchNorm1d(2, affine=False)
        >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
        >>> norm.running_mean  # a tenth of the way from 0 to the means, 2 and 20
        tensor([0.2000, 2.0000])
        >>> norm.eval()(torch.randn(4, 2, 100)).shape
        torch.Size([4, 2, 100])
    """

    _virtual_batch_size = None  # of modules that were torch's or pickled before it was, too
    _allow_single_value = False
    __jit_unused_properties__: ClassVar = ["virtual_batch_size", "allow_single_value"]

    if not TYPE_CHECKING:  # torch's own signature, whichever its release has

        @_with_options(nn.BatchNorm1d.__init__)
        def __init__(self, *args, virtual_batch_size=None, allow_single_value=False, **kwargs):
            size = checked_virtual_batch_size(virtual_batch_size)
            super().__init__(*args, **kwargs)
            if size is not None:
                self._virtual_batch_size = size
            if allow_single_value is not False:
                self.allow_single_value = allow_single_value
            mark_as_leaf(self)

    @property
    def virtual_batch_size(self) -> int | None:
        """Samples of a virtual batch, or None for whole batches; it may be set."""
        return self._virtual_batch_size

    @virtual_batch_size.setter
    def virtual_batch_size(self, size: int | None) -> None:
        self._virtual_batch_size = checked_virtual_batch_size(size)

    @property
    def allow_single_value(self) -> bool:
        """Whether one value a channel is taken as in evaluation; it may be set."""
        return self._allow_single_value

    @allow_single_value.setter
    def allow_single_value(self, allow: bool) -> None:
        if not isinstance(allow, bool):
            raise TypeError(f"allow_single_value should be a bool, but is {type(allow).__name__}")
        if allow and not self.track_running_stats:
            raise ValueError("allow_single_value goes by the running statistics, which track_running_stats=False lacks")
        self._allow_single_value = allow

    def forward(self, input: Tensor, *none: None, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if none:
            check_absent(self, none)
        if type(input) is not Tensor and is_ragged(input):
            return of_values(self.forward, input, lengths, mask, cut=self._virtual_batch_size is not None)  # type: ignore[no-any-return]
        if lengths is not None or mask is not None:
            return self._padded(input, checked_valid(lengths, mask))
        implementation = choose(input, self._virtual_batch_size is not None)
        if implementation is None:
            return self._native(input)
        self._check_input_dim(input)
        if self._virtual_batch_size is None and not self._allow_single_value:
            output = implementation(input, *state_of(self))
        else:
            output = implementation(input, *state_of(self), **options_of(self))
        return self._native(input) if output is None else output

    # torch.jit.script cannot compile this forward; it reads the source of what it wraps, so it compiles torch's own.
    forward.__signature__ = padded_signature(forward)  # type: ignore[attr-defined]
    forward.__wrapped__ = nn.BatchNorm1d.forward  # type: ignore[attr-defined]

    def _padded(self, input: Tensor, valid: Tensor | None) -> Tensor:
        implementation = choose(input, more=True)
        if implementation is not None:
            self._check_input_dim(input)
            output = implementation(input, *state_of(self), valid=valid, **options_of(self))
            if output is not None:
                return output
        return self._native(input, valid)

    def _native(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """Run torch's own forward where no kernel ran; it counts the batch even when it then raises."""
        if valid is not None:
            self._check_input_dim(input)
            check_padded(input, valid)
        if torch.compiler.is_compiling():
            return self._native_pieces(input, valid)
        mean, var, _, _, batches, training, *_ = state_of(self)
        changed = (mean, var, batches) if training else ()
        with restored_on_error(*changed), kernels_beneath_modes():
            return self._native_pieces(input, valid)

    def _native_pieces(self, input: Tensor, valid: Tensor | None) -> Tensor:
        native, training = super().forward, state_of(self)[5]
        if training and takes_single_value(self) and has_single_value(input, valid):
            native, training = self._evaluated, False
        whole = native if valid is None else functools.partial(trained if training else masked, native)
        return piece_by_piece(whole, input, self._virtual_batch_size if training else None, valid)

    def _evaluated(self, input: Tensor) -> Tensor:
        """Run torch's own batch norm as in evaluation, without a change of self.training that others might see."""
        self._check_input_dim(input)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        size = self._virtual_batch_size
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if size is not None:
            text += f", virtual_batch_size={size}"
        return text + ", allow_single_value=True" if self._allow_single_value else text


class LazyFusedBatchNorm1d(nn.LazyBatchNorm1d, FusedBatchNorm1d):
    """Drop-in for torch.nn.LazyBatchNorm1d: takes num_features from its first input and becomes FusedBatchNorm1d.

    Args:
        eps, momentum, affine, track_running_stats, virtual_batch_size, allow_single_value, device, dtype, bias: as in
            FusedBatchNorm1d.

    Shape:
        - input: (N, C) or (N, C, L); C of the first one is num_features from then on
        - output: as input

    Raises:
        ValueError: the first input is not 2-D or 3-D; and what FusedBatchNorm1d raises.

    Example:
        >>> import torch
        >>> from bn_ext import LazyFusedBatchNorm1d
        >>> norm = LazyFusedBatchNorm1d()
        >>> norm(torch.randn(8, 3)).shape
        torch.Size([8, 3])
        >>> type(norm).__name__, norm.num_features
        ('FusedBatchNorm1d', 3)
    """

    cls_to_become = FusedBatchNorm1d

    if not TYPE_CHECKING:

        @_with_options(nn.LazyBatchNorm1d.__init__)
        def __init__(self, *args, virtual_batch_size=None, allow_single_value=False, **kwargs):
            size = checked_virtual_batch_size(virtual_batch_size)
            super().__init__(*args, **kwargs)
            if size is not None:
                self._virtual_batch_size = size
            if allow_single_value is not False:
                self.allow_single_value = allow_single_value

        def initialize_parameters(self, input, *args, **kwargs):
            super().initialize_parameters(input.data if isinstance(input, PackedSequence) else input)


__all__ = [
    "FusedBatchNorm1d",
    "LazyFusedBatchNorm1d",
    "State",
    "mark_as_leaf",
    "options_of",
    "state_of",
    "takes_single_value",
]
