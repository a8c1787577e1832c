"""Which tensors the benchmark times, and how many bytes each mode has to move for them at the least."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DEFAULT_MODES = ("forward", "backward", "forward_backward", "eval")
SECOND_ORDER_MODES = ("double_backward", "gradient_penalty")  # when asked for
MODES = DEFAULT_MODES + SECOND_ORDER_MODES
# What is timed besides native where it works, and what messages call it.
RIVALS = {"compile": "torch.compile", "compiled": "torch.compile of bn_ext", "onednn": "oneDNN"}
CONTENDERS = ("bn_ext", "nn", "compile", "compiled", "onednn", "copy")

# Least traffic, in units of the input's bytes. Training forward reads x and writes y when x stays in cache between the
# statistics and the normalisation; backward reads x and the gradient and writes one gradient, likewise; eval reads and
# writes once. A double backward reads x, the gradient and what arrives at backward's result, and writes two; a penalty
# moves at the least as much, with what torch does around the batch norm left out. What does not stay is read twice.
# Parameters and statistics are too small to count.
PASSES: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "forward_backward": ("forward", "backward"),
    "double_backward": ("forward", "backward", "double"),
    "gradient_penalty": ("forward", "backward", "double"),
}
TENSORS_READ = {"forward": 1, "backward": 2, "double": 3}
TENSORS_WRITTEN = {"forward": 1, "backward": 1, "double": 2}


@dataclass(frozen=True)
class Point:
    """One tensor of the grid. ``shape`` is (N, C) or (N, C, L); layout "nlc" means a transposed (N, L, C) tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return " ".join([self.name, self.dtype] + ([self.layout] if self.layout != "contiguous" else []))

    def randn(self, device: torch.device) -> Tensor:
        """A random tensor of this point's shape, dtype and layout."""
        if self.layout == "nlc":
            n, c, length = self.shape
            return torch.randn(n, length, c, device=device).to(self.torch_dtype).transpose(1, 2)
        return torch.randn(self.shape, device=device).to(self.torch_dtype)

    def meta(self) -> Tensor:
        """A tensor of this shape, dtype and layout without data."""
        return self.randn(torch.device("meta"))


def least_bytes(point: Point, mode: str, contender: str, cache: int) -> int:
    """The bytes that ``contender`` must move at ``point`` in ``mode``; the copy reads and writes once in every mode.

    ``cache`` is the size of the last-level cache. What has to be seen whole before it can be normalised, a channel if
    the channels are planes and else the tensor, stays there or is read twice.
    """
    if contender == "copy" or mode == "eval":
        return point.bytes * 2
    planes = len(point.shape) == 3 and point.layout == "contiguous"
    whole = point.bytes // point.shape[1] if planes else point.bytes
    moved = 0
    for one in PASSES[mode]:
        read = TENSORS_READ[one]
        moved += TENSORS_WRITTEN[one] + (read if read * whole <= cache else 2 * read)
    return point.bytes * moved


FLOAT32 = tuple(
    Point(shape)
    for shape in (
        (32, 64),
        (128, 256),
        (1024, 1024),
        (8192, 512),
        (65536, 64),
        (65536, 256),
        (32, 64, 128),
        (64, 128, 1024),
        (16, 512, 1024),
        (4, 4, 1000000),
        (1024, 1, 4096),
    )
)
PERMUTED = (
    Point((32, 64, 128), layout="nlc"),
    Point((64, 128, 1024), layout="nlc"),
    Point((16, 512, 1024), layout="nlc"),
)
OTHER_DTYPES = (
    Point((128, 256), "bfloat16"),
    Point((1024, 1024), "bfloat16"),
    Point((65536, 256), "bfloat16"),
    Point((32, 64, 128), "bfloat16"),
    Point((64, 128, 1024), "bfloat16"),
    Point((64, 128, 1024), "bfloat16", "nlc"),
    Point((1024, 1024), "float16"),
    Point((1024, 1024), "float64"),
)
FULL = FLOAT32 + PERMUTED + OTHER_DTYPES
# Only a GPU has the memory for these: few channels and many rows, short L, 1 GB, few rows and many channels.
CUDA_FLOAT32 = tuple(
    Point(shape) for shape in ((2000000, 1, 3), (1000000, 16, 16), (136000, 16, 16), (262144, 1024), (8, 65536))
)
CUDA = (
    *(replace(p, dtype="float32") for p in (*FLOAT32, *CUDA_FLOAT32, *PERMUTED)),
    *(replace(p, dtype="bfloat16") for p in (*FLOAT32, *CUDA_FLOAT32, *PERMUTED)),
    *(replace(p, dtype="float16") for p in (*FLOAT32, *CUDA_FLOAT32, *PERMUTED)),
    Point((1024, 1024), "float64"),
)
QUICK = (*FLOAT32, PERMUTED[0], OTHER_DTYPES[1])


def select(points: Iterable[Point], patterns: Sequence[str]) -> list[Point]:
    """The points that match every pattern.

    A pattern is a comma-separated list of shell-style alternatives; it matches a point when one of them matches its
    shape ("65536x*"), its dtype or its layout.
    """

    def matches(point: Point, pattern: str) -> bool:
        fields = (point.name, point.dtype, point.layout)
        return any(fnmatch.fnmatchcase(f, alternative) for alternative in pattern.split(",") for f in fields)

    return [point for point in points if all(matches(point, pattern) for pattern in patterns)]
