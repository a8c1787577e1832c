"""Batch normalisation for (N, C) and (N, C, L) tensors, a drop-in for torch.nn.BatchNorm1d.

>>> from torch import nn
>>> from bn_ext import FusedBatchNorm1d            # instead of torch.nn.BatchNorm1d
>>> model = nn.Sequential(nn.Linear(8, 4), FusedBatchNorm1d(4))
>>> model = bn_ext.convert(model)                  # or: swap every BatchNorm1d that a model has
"""

from __future__ import annotations

from . import _guard

if (_installed := _guard.shadowed()) is not None:
    _guard.hand_over(__name__, _installed)  # a source folder stands before the package that is installed
else:
    _C = _guard.load_library()
    __version__ = _guard.read_record()["version"]

    from . import functional
    from .convert import convert, fusion_report, revert
    from .fusion.container import BatchNormAct1d
    from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d

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
