"""Batch normalisation for (N, C) and (N, C, L) tensors, a drop-in for torch.nn.BatchNorm1d.

A new model takes another class, one that exists is converted in place:

>>> import torch
>>> from torch import nn
>>> import bn_ext
>>> model = nn.Sequential(nn.Linear(784, 256), bn_ext.FusedBatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))
>>> model(torch.randn(32, 784)).shape
torch.Size([32, 10])
>>> model = bn_ext.convert(nn.Sequential(nn.Linear(784, 256), nn.BatchNorm1d(256), nn.ReLU()))
>>> type(model[1]).__name__
'FusedBatchNorm1d'
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
    from .freezing import freeze, unfreeze
    from .fusion.container import BatchNormAct1d
    from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d
    from .recompute import keep_statistics
    from .renorm_module import FusedBatchRenorm1d

    def build_info() -> dict[str, object]:
        """Return what the library was built with, and the instruction-set level that it uses in this process.

        `python -m bn_ext` prints it, with what runs here beside it.

        Returns:
            A new dict. "torch": the release of the headers, text. "compiler": its name and release, text.
            "cplusplus" and "openmp": the values of __cplusplus and _OPENMP, a year and a month as one number; "openmp"
            is None where kernels run on one thread. "cuda": CUDART_VERSION, 12080 for 12.8, or None in a build without
            CUDA kernels. "isa_level": "default", "avx2" or "avx512".

        Example:
            >>> import bn_ext
            >>> bn_ext.build_info()["isa_level"] in ("default", "avx2", "avx512")
            True
        """
        return dict(_C.build_info())


__all__ = [
    "BatchNormAct1d",
    "FusedBatchNorm1d",
    "FusedBatchRenorm1d",
    "LazyFusedBatchNorm1d",
    "__version__",
    "build_info",
    "convert",
    "freeze",
    "functional",
    "fusion_report",
    "keep_statistics",
    "revert",
    "unfreeze",
]
