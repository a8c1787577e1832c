from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, bool | int | str | list[str] | None]: ...
def isa_level() -> str: ...
def batch_norm(*arguments: object) -> Tensor | None: ...
def enter_recomputation() -> None: ...
def leave_recomputation() -> None: ...
def recomputes() -> bool: ...
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
