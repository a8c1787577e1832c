"""BatchNormAct1d: a batch norm and what follows it, written down as one module of two ordinary children."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..activation import check_activation
from ..dispatch import restored_on_error
from ..modules import FusedBatchNorm1d, state_of
from .pairing import Activation, activation_of, addable, compute, is_norm, undisturbed


def _module_of(activation: str | nn.Module | None, negative_slope: float) -> nn.Module:
    if isinstance(activation, nn.Module):
        return activation
    if activation is None:
        return nn.Identity()
    if activation == "leaky_relu":
        return nn.LeakyReLU(negative_slope)
    check_activation(activation)
    kinds: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
    return kinds[activation]()


class BatchNormAct1d(nn.Module):
    """act(norm(x)), or act(norm(x) + residual) where it is called with a residual, in one pass over memory.

    Its children are ordinary modules: norm, a FusedBatchNorm1d, and act. Where they are what they were made as,
    nobody listens to them and the residual has the input's shape and dtype, one operator computes it all, in eager
    mode, under torch.compile and in torch.export; else they are called one after the other, so that a child may be
    replaced, hooked, frozen, quantised, folded or scripted.

    Beside x backward then keeps, with a residual, one bit an element (relu and leaky_relu; on CUDA a byte for 16 bytes)
    or the residual itself (silu and gelu; by reference, so it must not change); nothing else of x's size.

    Args:
        num_features: C of an input (N, C) or (N, C, L).
        activation: "relu", "leaky_relu", "silu", "gelu" (the exact one, by erf), any nn.Module, or None. A module that
            is not nn.ReLU, nn.LeakyReLU, nn.SiLU or exact nn.GELU is called behind the batch norm.
        negative_slope: leaky_relu's.
        eps, momentum, affine, track_running_stats, device, dtype, options: as in FusedBatchNorm1d.

    Shape:
        - input: (N, C) or (N, C, L)
        - residual: the input's, for one pass; or one that can be added to it
        - output: as input

    Dtypes:
        - input, parameters, running statistics: as FusedBatchNorm1d's
        - residual: the input's, for one pass; or any that can be added to it

    Raises:
        ValueError: no such activation; and what FusedBatchNorm1d raises.
        RuntimeError: the residual cannot be added; nothing has been counted then.

    Example:
        >>> import torch
        >>> from bn_ext import BatchNormAct1d
        >>> block = BatchNormAct1d(4, activation="silu")
        >>> x = torch.randn(8, 4, 100)
        >>> block(x).shape, block(x, residual=x).shape
        (torch.Size([8, 4, 100]), torch.Size([8, 4, 100]))
        >>> block.norm.num_batches_tracked
        tensor(2)
    """

    def __init__(
        self,
        num_features: int,
        activation: str | nn.Module | None = "relu",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        act = _module_of(activation, negative_slope)
        self.norm = FusedBatchNorm1d(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.act = act

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 (TorchScript's words)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return _computed(self, input, residual)  # type: ignore[no-any-return]
        result = self.norm(input)
        if residual is not None:
            result = result + residual
        return self.act(result)  # type: ignore[no-any-return]


def _computed(module: BatchNormAct1d, input: Any, residual: Any) -> Any:
    """Return what module computes, in one pass where one operator does."""
    output = _in_one_pass(module, input, residual)
    if output is not None:
        return output
    if residual is None:
        return module.act(module.norm(input))
    norm = module.norm
    mean, var, _, _, batches, training, *_ = state_of(norm) if is_norm(norm) else (None,) * 8
    with restored_on_error(*((mean, var, batches) if training else ())):  # the addition may raise
        return module.act(norm(input) + residual)


def _in_one_pass(module: BatchNormAct1d, input: Any, residual: Any) -> Any:
    """Return what module computes where one operator does, else None."""
    # nn.Module.__getattr__ costs a third of a microsecond a name; children that a tool made attributes are not here.
    children = module._modules
    norm, act = children.get("norm"), children.get("act")
    if not is_norm(norm) or not undisturbed(input):
        return None
    activation: Activation | None = activation_of(act)
    if activation is None and type(act) is nn.Identity and residual is not None:
        activation = ("identity", 0.0)
    if activation is None or not (residual is None or addable(input, residual)):
        return None
    return compute(norm, input, residual, activation)  # type: ignore[arg-type]


__all__ = ["BatchNormAct1d"]
