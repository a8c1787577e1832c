"""FusedBatchNorm1d: torch.nn.BatchNorm1d with our kernels in its forward, everything else inherited."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Optional

import torch.nn.functional as F  # noqa: F401 (a name of the forward that torch.jit.script reads, see below)
from torch import Tensor, nn

from .activation import activate, check_activation, check_call, finish, fused_batch_norm_act
from .dispatch import choose, fused_batch_norm


def mark_as_leaf(module: nn.Module) -> None:
    """Have torch.fx keep module whole, as it keeps torch's own: it goes by an instance's __module__."""
    vars(module)["__module__"] = nn.BatchNorm1d.__module__


class FusedBatchNorm1d(nn.BatchNorm1d):
    """Drop-in for torch.nn.BatchNorm1d: same constructor, parameters, buffers, state_dict, errors.

    Input (N, C) or (N, C, L) of any strides, float64, float32, bfloat16 or float16; parameters and buffers of any of
    these types. The output has the input's shape, dtype and memory format. Differences, all in the user's favour: the
    statistics are accurate for any mean and batch size, results are bitwise the same for every number of threads, and
    a call that raises leaves running_mean, running_var and num_batches_tracked as they were. Where no kernel exists
    (device, layout, forward-mode AD, vmap), torch.nn.BatchNorm1d's own forward runs.

    With activation, or called as module(x, residual), it computes act(bn(x) + residual) in the same passes over memory.
    Beside x backward then keeps, with a residual, one bit an element (relu and leaky_relu; on CUDA a byte for 16 bytes)
    or the residual itself (silu and gelu; by reference, so it must not change); nothing else of x's size.

    Args:
        activation: None, "relu", "leaky_relu", "silu" or "gelu" (the exact one, by erf).
        negative_slope: leaky_relu's.
        inplace: in evaluation, write the result into the input; for calls that autograd does not record.

    Raises:
        ValueError: input is not 2-D or 3-D; one value per channel in training; eps out of range; no such activation.
        RuntimeError: input does not have num_features channels; residual cannot be added; inplace in training or where
            autograd needs the input.
        NotImplementedError: input is not of a floating type.
    """

    # On the class, so that a converted nn.BatchNorm1d and an old pickle have them too.
    activation: str | None = None
    negative_slope: float = 0.01
    inplace: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            device: Any = None,
            dtype: Any = None,
            *,
            bias: bool = True,
            activation: str | None = None,
            negative_slope: float = 0.01,
            inplace: bool = False,
        ) -> None: ...

    else:  # torch's own signature, whichever its release has

        @functools.wraps(nn.BatchNorm1d.__init__)
        def __init__(self, *args, activation=None, negative_slope=0.01, inplace=False, **kwargs):
            super().__init__(*args, **kwargs)
            mark_as_leaf(self)
            self._set_activation(activation, negative_slope, inplace)

    def _set_activation(self, activation: str | None, negative_slope: float = 0.01, inplace: bool = False) -> None:
        """Take over what differs from the class, so that a plain module has the attributes that torch's has."""
        check_activation(activation)
        for name, value in (("activation", activation), ("negative_slope", negative_slope), ("inplace", inplace)):
            vars(self).pop(name, None)
            if value != getattr(type(self), name):
                setattr(self, name, value)

    def extra_repr(self) -> str:
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        return text + ", inplace=True" if self.inplace else text

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        implementation = choose(input)
        plain = residual is None and self.activation is None and not self.inplace
        if implementation is None:
            return super().forward(input) if plain else self._native(input, None, residual)
        self._check_input_dim(input)
        # nn.Module.__getattr__ costs a third of a microsecond a name; parametrized names are not in these dicts.
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
            batches = buffers["num_batches_tracked"]
        except KeyError:
            weight, bias = self.weight, self.bias
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        training = self.training
        if training and not self.track_running_stats:
            mean = var = batches = None
        momentum = self.momentum
        if not training:
            batches = None
            training = mean is None and var is None
            if momentum is None:
                momentum = 0.0
        if plain:
            output = fused_batch_norm(
                implementation, input, mean, var, weight, bias, batches, training, momentum, self.eps
            )
        else:
            output = fused_batch_norm_act(
                implementation, input, residual, mean, var, weight, bias, batches, training, momentum, self.eps,
                self.activation, self.negative_slope, self.inplace,
            )  # fmt: skip
        return self._native(input, batches, residual) if output is None else output

    def __prepare_scriptable__(self) -> nn.Module:
        return self if self.activation is None else _Scriptable(self)

    # torch.jit.script cannot compile this forward; it reads the source of what it wraps, so it compiles torch's own.
    forward.__wrapped__ = nn.BatchNorm1d.forward  # type: ignore[attr-defined]

    def _native(self, input: Tensor, batches: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """Run torch's own forward where no kernel ran; it counts the batch even when it then raises."""
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        check_call(input, residual, batch_statistics, self.inplace, self.weight, self.bias)
        before = None if batches is None else batches.clone()
        try:
            output = super().forward(input)
            return finish(output, input, residual, self.activation, self.negative_slope, self.inplace)
        except Exception:
            if before is not None and batches is not None:
                batches.copy_(before)
            raise


class LazyFusedBatchNorm1d(nn.LazyBatchNorm1d, FusedBatchNorm1d):
    """Drop-in for torch.nn.LazyBatchNorm1d: takes num_features from its first input and becomes FusedBatchNorm1d."""

    cls_to_become = FusedBatchNorm1d

    if not TYPE_CHECKING:

        @functools.wraps(nn.LazyBatchNorm1d.__init__)
        def __init__(self, *args, activation=None, negative_slope=0.01, inplace=False, **kwargs):
            super().__init__(*args, **kwargs)
            self._set_activation(activation, negative_slope, inplace)


class _Scriptable(nn.Module):
    """What torch.jit.script compiles in the place of a FusedBatchNorm1d with an activation: torch's own operations."""

    def __init__(self, source: FusedBatchNorm1d) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(source.num_features)
        vars(self.norm).update({k: v for k, v in vars(source).items() if k in vars(self.norm)})
        self.activation, self.negative_slope = source.activation or "identity", source.negative_slope
        self.train(source.training)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 (TorchScript's words)
        return activate(self.norm(input), residual, self.activation, self.negative_slope)


__all__ = ["FusedBatchNorm1d", "LazyFusedBatchNorm1d"]
