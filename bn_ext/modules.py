"""FusedBatchNorm1d: torch.nn.BatchNorm1d with our kernels in its forward, everything else inherited."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: F401 (a name of the forward that torch.jit.script reads, see below)
from torch import Tensor, nn

from .dispatch import check_virtual_batch_size, choose, piece_by_piece, restored_on_error
from .functional import kernels_beneath_modes

_OF_TORCH = nn.BatchNorm1d.__module__  # as it is at import: who puts a class of ours into torch.nn still gets this


def mark_as_leaf(module: nn.Module) -> None:
    """Have torch.fx keep module whole, as it keeps torch's own: it goes by an instance's __module__."""
    vars(module)["__module__"] = _OF_TORCH


# What a call of a batch norm goes by beside its input: running_mean, running_var, weight, bias, num_batches_tracked,
# training, momentum, eps, as dispatch.by_operator takes them. A bare tuple: a named one takes 0.2 us to make.
State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float | None, float]


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
            piece of one value a channel joins the one before it. By name only.
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
        ValueError: input is not 2-D or 3-D; one value per channel in training; eps out of range.
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

    if TYPE_CHECKING:
        virtual_batch_size: int | None  # TorchScript reads the annotations of a class, and not this one
    else:
        virtual_batch_size = None  # of modules that were pickled before it was, too

        # torch's own signature, whichever its release has

        @functools.wraps(nn.BatchNorm1d.__init__)
        def __init__(self, *args, virtual_batch_size=None, **kwargs):
            check_virtual_batch_size(virtual_batch_size)
            super().__init__(*args, **kwargs)
            if virtual_batch_size is not None:
                self.virtual_batch_size = virtual_batch_size
            mark_as_leaf(self)

    def forward(self, input: Tensor) -> Tensor:
        implementation = choose(input)
        if implementation is None:
            return self._native(input)
        self._check_input_dim(input)
        if self.virtual_batch_size is None:
            output = implementation(input, *state_of(self))
        else:
            output = implementation(input, *state_of(self), virtual_batch_size=self.virtual_batch_size)
        return self._native(input) if output is None else output

    # torch.jit.script cannot compile this forward; it reads the source of what it wraps, so it compiles torch's own.
    forward.__wrapped__ = nn.BatchNorm1d.forward  # type: ignore[attr-defined]

    def _native(self, input: Tensor) -> Tensor:
        """Run torch's own forward where no kernel ran; it counts the batch even when it then raises."""
        if torch.compiler.is_compiling():
            return self._native_pieces(input)
        mean, var, _, _, batches, training, *_ = state_of(self)
        changed = (mean, var, batches) if training else ()
        with restored_on_error(*changed), kernels_beneath_modes():
            return self._native_pieces(input)

    def _native_pieces(self, input: Tensor) -> Tensor:
        return piece_by_piece(super().forward, input, self.virtual_batch_size if state_of(self)[5] else None)

    def extra_repr(self) -> str:
        size = self.virtual_batch_size
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return inherited if size is None else f"{inherited}, virtual_batch_size={size}"


class LazyFusedBatchNorm1d(nn.LazyBatchNorm1d, FusedBatchNorm1d):
    """Drop-in for torch.nn.LazyBatchNorm1d: takes num_features from its first input and becomes FusedBatchNorm1d.

    Args:
        eps, momentum, affine, track_running_stats, virtual_batch_size, device, dtype, bias: as in FusedBatchNorm1d.

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

        @functools.wraps(nn.LazyBatchNorm1d.__init__)
        def __init__(self, *args, virtual_batch_size=None, **kwargs):
            check_virtual_batch_size(virtual_batch_size)
            super().__init__(*args, **kwargs)
            if virtual_batch_size is not None:
                self.virtual_batch_size = virtual_batch_size


__all__ = ["FusedBatchNorm1d", "LazyFusedBatchNorm1d", "State", "mark_as_leaf", "state_of"]
