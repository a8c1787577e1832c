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

from ._guard import load_library
from ._version import __version__

_C = load_library()

from . import functional  # noqa: E402  (the library registers the operators that these modules bind)
from .convert import convert, fusion_report, revert  # noqa: E402
from .fusion.container import BatchNormAct1d  # noqa: E402
from .modules import FusedBatchNorm1d, LazyFusedBatchNorm1d  # noqa: E402


def build_info() -> dict[str, object]:
    """Return what the library was built with, and the instruction-set level that it uses in this process.

    `python -m bn_ext` prints it, with what runs here beside it.

    Returns:
        A new dict. "torch": the release of the headers, text. "compiler": its name and release, text. "cplusplus" and
        "openmp": the values of __cplusplus and _OPENMP, a year and a month as one number; "openmp" is None where
        kernels run on one thread. "cuda": CUDART_VERSION, 12080 for 12.8, or None in a build without CUDA kernels.
        "isa_level": "default", "avx2" or "avx512".

    Example:
        >>> import bn_ext
        >>> bn_ext.build_info()["isa_level"] in ("default", "avx2", "avx512")
        True
    """
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
