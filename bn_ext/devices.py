"""Which devices this library has kernels for, and the one warning where it could have them and has not."""

from __future__ import annotations

import warnings

import torch

from . import _C
from ._guard import install_command, read_record

_RECORD = read_record()
# What kernels_on has answered for the GPUs, by index; asked of the driver once each.
_answers: dict[int, bool] = {}
_warned = False


def why_not_cuda(capability: tuple[int, int] | None) -> str | None:
    """Return why a GPU of this compute capability goes to torch's own batch norm and what to type, or None.

    None as capability asks whether there are kernels at all.
    """
    if not _RECORD["cuda"]:
        what = f"it was built without CUDA kernels ({_RECORD['cuda_reason']})"
        return f"{what}. To have them, type: {install_command()}"
    if capability is None or _C.runs_on(_RECORD["cuda_codes"], 10 * capability[0] + capability[1]):
        return None
    name = f"{capability[0]}.{capability[1]}"
    if capability < (7, 5):
        return f"its kernels need compute capability 7.5 or later, and this GPU has {name}"
    what = f"it was built for {_RECORD['cuda_codes']}, which a GPU of compute capability {name} does not run"
    return f"{what}. To build for it, type: TORCH_CUDA_ARCH_LIST={name} {install_command()}"


def kernels_on(device: torch.device) -> bool:
    """Return whether this library has kernels for a device; where it could have them and has not, warn once."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    index = -1 if device.index is None else device.index
    if index not in _answers:
        there = torch.cuda.is_available()  # export and compile show tensors of a GPU that is elsewhere
        why = why_not_cuda(torch.cuda.get_device_capability(device) if there else None)
        if why is not None:
            _warn(why)
        _answers[index] = why is None
    return _answers[index]


# torch.compile: what it answers is for good, so it is asked while tracing and not traced itself.
kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn(why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"bn_ext leaves CUDA tensors to torch's own batch norm: {why}", stacklevel=3)
