"""Batch normalisation for (N, C) and (N, C, L) tensors, a drop-in for torch.nn.BatchNorm1d.

>>> from bn_ext import FusedBatchNorm1d            # instead of torch.nn.BatchNorm1d
>>> model = bn_ext.convert(model)                  # or: swap every BatchNorm1d that a model has
"""

from __future__ import annotations

from ._guard import load_library
from ._version import __version__

_C = load_library()

from . import functional  # noqa: E402  (the library registers the operators that these modules bind)
from .convert import convert, fusion_report, revert  # noqa: E402
from .fusion.container import BatchNormAct1d  # noqa: E402
from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d  # noqa: E402


def build_info() -> dict[str, object]:
    """Return what the library was built with and the instruction-set level that it uses in this process."""
    return dict(_C.build_info())


__all__ = [
    "BatchNormAct1d",
    "FusedBatchNorm1d",
    "LazyFusedBatchNorm1d",
    "__version__",
    "build_info",
    "convert",
    "functional",
    "fusion_report",
    "revert",
]
