from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, bool | int | str | list[str] | None]: ...
def isa_level() -> str: ...
def batch_norm(
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
    activation: str = ...,
    negative_slope: float = ...,
    /,
) -> Tensor | None: ...
def runs_on(codes: str, capability: int) -> bool: ...
def launch_plan(
    pass_: str,
    dtype: str,
    shape: Sequence[int],
    operands: Sequence[Sequence[int]],
    *,
    gradients: Sequence[bool] = ...,
    capability: int,
    sms: int,
    shared_per_block: int,
    shared_per_sm: int,
    reserved_per_block: int,
    cooperative: bool,
) -> dict[str, Any]: ...
def query_device(index: int) -> dict[str, Any]: ...  # only in builds with CUDA
