"""BatchNormAct1d: a batch norm and what follows it, written down as one module of two ordinary children."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import UninitializedBuffer

from ..activation import check_activation
from ..dispatch import restored_on_error
from ..modules import FusedBatchNorm1d
from ..padding import checked_valid, where_valid, zero_beyond
from ..ragged import is_ragged, of_values
from ..renorm_module import FusedBatchRenorm1d
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

    A padded batch is called with lengths or mask, as FusedBatchNorm1d is; what does not count is zero in the output,
    whatever lies there in input and residual. A ragged batch, and a residual with the same lengths, go through their
    values, also through an activation of another kind.

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

    def forward(
        self,
        input: Tensor,
        residual: Optional[Tensor] = None,  # noqa: UP045 (TorchScript's words)
        lengths: Optional[Tensor] = None,  # noqa: UP045
        mask: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if type(input) is not Tensor and is_ragged(input):
                cut = self.norm.virtual_batch_size is not None
                return of_values(self.forward, input, lengths, mask, residual, cut)  # type: ignore[no-any-return]
            if lengths is None and mask is None:
                return _computed(self, input, residual)  # type: ignore[no-any-return]
            return _padded(self, input, residual, lengths, mask)  # type: ignore[no-any-return]
        if lengths is not None or mask is not None:
            raise RuntimeError("TorchScript has no padded batches")
        result = self.norm(input)
        if residual is not None:
            result = result + residual
        return self.act(result)  # type: ignore[no-any-return]


def _computed(module: BatchNormAct1d, input: Any, residual: Any) -> Any:
    """Return what module computes, in one pass where one operator does."""
    output = _in_one_pass(module, input, residual)
    if output is not None:
        return output
    norm, act = module.norm, module.act
    if residual is None and type(act) is nn.Identity:
        return act(norm(input))
    with restored_on_error(*_statistics(norm)):  # the addition may raise, and the activation
        return act(norm(input) if residual is None else norm(input) + residual)


def _statistics(norm: Any) -> list[Tensor]:
    """Return what a call of norm may move: whichever module it is, its buffers."""
    if isinstance(norm, nn.Module) and norm.training:
        return [b for b in norm.buffers() if not isinstance(b, UninitializedBuffer)]
    return []


def _padded(module: BatchNormAct1d, input: Any, residual: Any, lengths: Any, mask: Any) -> Any:
    """The same of a padded batch, with zeros where it does not count, whatever the activation makes of zero."""
    if isinstance(input, Proxy):
        return _traced(module, input, residual, lengths, mask)
    valid = checked_valid(lengths, mask)
    output = _in_one_pass(module, input, residual, valid)
    if output is not None:
        return output
    norm = module.norm
    with restored_on_error(*_statistics(norm)):  # the addition may raise, and the activation
        output = norm(input, lengths=lengths, mask=mask)
        if residual is not None:  # whose padding may hold anything, and the activation's derivative of that
            output = where_valid(output + residual, input, valid)  # type: ignore[arg-type]
        return where_valid(module.act(output), input, valid)  # type: ignore[arg-type]


def _traced(module: BatchNormAct1d, input: Proxy, residual: Any, lengths: Any, mask: Any) -> Any:
    """Record what _padded does by torch.fx: lengths and mask are there when the graph runs, or are None then."""
    alone = getattr(input.tracer, "root", None) is module and not isinstance(
        module.norm, (FusedBatchNorm1d, FusedBatchRenorm1d)
    )
    if alone and all(_by_default(valid) for valid in (lengths, mask)):
        lengths = mask = None  # a block with a batch norm of torch's, which takes none
    output = module.norm(input) if lengths is None and mask is None else module.norm(input, lengths=lengths, mask=mask)
    output = output if residual is None else output + residual

    def zeroed(t: Proxy) -> Proxy:
        return input.tracer.create_proxy("call_function", zero_beyond, (t, input, lengths, mask), {})

    return zeroed(module.act(output if residual is None else zeroed(output)))


def _by_default(valid: Any) -> bool:
    """Return whether valid is None, or an argument of the graph that is None where it is not given."""
    return valid is None or (isinstance(valid, Proxy) and valid.node.op == "placeholder" and valid.node.args == (None,))


def _in_one_pass(module: BatchNormAct1d, input: Any, residual: Any, valid: Tensor | None = None) -> Any:
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
    return compute(norm, input, residual, activation, valid)  # type: ignore[arg-type]


__all__ = ["BatchNormAct1d"]
