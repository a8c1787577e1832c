"""FusedBatchRenorm1d: batch renormalisation with the arguments of torchrl's module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .batches import checked_virtual_batch_size
from .modules import check_absent, mark_as_leaf, padded_signature
from .ops import check_renorm_numbers
from .padding import checked_valid
from .ragged import is_ragged, of_values
from .renorm import computed, numbers


class FusedBatchRenorm1d(nn.Module):
    """Batch renormalisation, for batches too small or too much alike for their own statistics.

    In training every channel is normalised by the batch, and then corrected towards what the running statistics say of
    it, within bounds (Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275)::

        r = clamp(std / running_std, 1 / max_r, max_r)
        d = clamp((mean - running_mean) / running_std, -max_d, max_d)
        y = ((x - mean) / std * r + d) * weight + bias

    with std = sqrt(var + eps), var the biased variance. r and d are constants: no gradient flows through them. Within
    the bounds y is what evaluation makes of x. Then the running statistics move as FusedBatchNorm1d's do, with the
    unbiased variance. In evaluation it is batch normalisation by the running statistics.

    For the first warmup_steps batches, by num_batches_tracked, r is 1 and d is 0, which is batch normalisation. With
    smooth they set in little by little instead: r - 1 and d are multiplied by num_batches_tracked / warmup_steps.

    The kernels compute r and d where they merge a batch's statistics: no pass over memory more than batch
    normalisation makes. Where no kernel exists (device, layout, forward-mode AD, vmap, torch.func.grad), torch's
    operations compute the same. A call that raises leaves running_mean, running_var and num_batches_tracked as they
    were.

    Arguments, attributes and state_dict are those of torchrl's BatchRenorm1d, and so are its values, but for three
    things. It takes images and more dimensions; here input is 2-D or 3-D. Its unbiased variance takes the number of
    samples for the number of values, N / (N - 1), also for input of size (N, C, L); here it is N * L / (N * L - 1).
    Its factor of the warm-up grows beyond 1, to 2 after twice the warmup_steps; here it stays 1, and
    num_batches_tracked counts on.

    lengths and mask of a padded batch, and ragged batches, are taken as FusedBatchNorm1d takes them. Where a checkpoint
    runs forward again, r and d go by the running statistics as they are by then, which gives gradients of another
    function; with context_fn=bn_ext.keep_statistics they go by those of forward.

    Args:
        num_features: C, the number of channels.
        momentum: share of the batch in the running statistics, from 0 to 1. None: 1 / num_batches_tracked.
        eps: added to the variances, in units of the input squared; above 0 in training.
        max_r: the most that r may be, at least 1, and the inverse of the least.
        max_d: the most that d may be away from 0, at least 0.
        warmup_steps: batches of batch normalisation before; 0: none.
        smooth: go over to renormalisation little by little through the warm-up.
        virtual_batch_size: in training, cut the batch as FusedBatchNorm1d does; each piece goes by the running
            statistics that the one before it has left.
        device: where parameters and buffers are made.
        dtype: of parameters and running statistics.

    Shape:
        - input: (N, C) or (N, C, L), of any strides
        - output: the input's shape and memory format
        - weight, bias, running_mean, running_var: (C,)

    Dtypes:
        - input: float64, float32, bfloat16 or float16; the output has the same
        - parameters and running statistics: any of these, whatever the input's

    Raises:
        ValueError: input is not 2-D or 3-D; one value per channel in training; max_r below 1, max_d or warmup_steps
            below 0; eps out of range.
        RuntimeError: input does not have num_features channels.
        NotImplementedError: input is not of a floating type.

    Example:
        >>> import torch
        >>> from bn_ext import FusedBatchRenorm1d
        >>> norm = FusedBatchRenorm1d(2, warmup_steps=0)
        >>> norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()  # r is 1 and 3, d is 2 and 5
        tensor([[1.0000, 2.0000],
                [3.0000, 8.0000]])
        >>> norm.running_mean  # a hundredth of the way from 0 to the means, 2 and 20
        tensor([0.0200, 0.2000])
        >>> norm.eval()(torch.randn(4, 2, 100)).shape
        torch.Size([4, 2, 100])
    """

    _version = 2  # nn.BatchNorm1d's
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.01,
        eps: float = 1e-5,
        max_r: float = 3.0,
        max_d: float = 5.0,
        warmup_steps: int = 10000,
        smooth: bool = False,
        virtual_batch_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        size = checked_virtual_batch_size(virtual_batch_size)
        check_renorm_numbers(numbers(max_r, max_d, warmup_steps, smooth))
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.max_r = max_r
        self.max_d = max_d
        self.warmup_steps = warmup_steps
        self.smooth = smooth
        self.virtual_batch_size = size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.zeros(num_features, **made))
        self.register_buffer("running_var", torch.ones(num_features, **made))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64, device=device))
        self.weight = nn.Parameter(torch.ones(num_features, **made))
        self.bias = nn.Parameter(torch.zeros(num_features, **made))
        mark_as_leaf(self)

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """Load a state without a count of batches as nn.BatchNorm1d does: the count stays."""
        version, key = local_metadata.get("version"), prefix + "num_batches_tracked"
        if (version is None or version < 2) and key not in state_dict:
            count = self.num_batches_tracked
            state_dict[key] = torch.tensor(0, dtype=torch.int64) if count.is_meta else count
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def forward(self, input: Tensor, *none: None, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if none:
            check_absent(self, none)
        if type(input) is not Tensor and is_ragged(input):
            return of_values(self.forward, input, lengths, mask, cut=self.virtual_batch_size is not None)  # type: ignore[no-any-return]
        training = bool(self.training)
        state = (
            self.running_mean, self.running_var, self.weight, self.bias, self.num_batches_tracked if training else None,
            training, self.momentum if training else 0.0, self.eps,
        )  # fmt: skip
        renorm = numbers(self.max_r, self.max_d, self.warmup_steps, self.smooth)
        size = checked_virtual_batch_size(self.virtual_batch_size)
        valid = None if lengths is None and mask is None else checked_valid(lengths, mask)
        return computed(input, state, renorm, None, size, valid)

    forward.__signature__ = padded_signature(forward)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "max_r", "max_d", "warmup_steps", "smooth")
        size = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        return f"{self.num_features}, " + ", ".join(f"{name}={getattr(self, name)}" for name in names) + size


__all__ = ["FusedBatchRenorm1d"]
