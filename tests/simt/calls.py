"""What a call of the CUDA operators on the CPU is given and what it leaves: the driver's structs, inputs, results."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # numbered as bn_ext::DType
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")  # numbered as bn_ext::Activation
EXCHANGES = ("none", "cluster", "grid", "two_launches")  # numbered as bn_ext::Exchange


class Pass(IntEnum):
    """Numbered as bn_ext::Pass."""

    FORWARD = 0
    INFERENCE = 1
    BACKWARD = 2
    INFERENCE_BACKWARD = 3
    DOUBLE_BACKWARD = 4

    @property
    def backward(self) -> bool:
        return self >= Pass.BACKWARD

    @property
    def training(self) -> bool:
        return self in (Pass.FORWARD, Pass.BACKWARD, Pass.DOUBLE_BACKWARD)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that the pass may read, by their names in Call."""
        return ("x", *("dy",) * self.backward, *("gg_x",) * (self == Pass.DOUBLE_BACKWARD))

    def outputs(self, wants: tuple[bool, bool, bool] = (True, True, True)) -> tuple[str, ...]:
        """The tensors that it writes, likewise; wants as in Inputs."""
        if not self.backward:
            return ("y",)
        return (*("dx",) * wants[0], *("grad_dy",) * (wants[2] and self == Pass.DOUBLE_BACKWARD))

    def vectors(self, wants: tuple[bool, bool, bool] = (True, True, True)) -> tuple[str, ...]:
        """The parameters' gradients that it writes and those that arrive at them."""
        if not self.backward:
            return ()
        if self == Pass.DOUBLE_BACKWARD:
            return (*("grad_weight",) * wants[1], "gg_weight", "gg_bias")
        return (*("grad_weight",) * wants[1], *("grad_bias",) * wants[2])


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class _Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("stride", ctypes.c_int64)]


_TENSORS = ("x", "y", "dy", "dx", "gg_x", "grad_dy")
VECTORS = ("weight", "bias", "running_mean", "running_var", "grad_weight", "grad_bias", "gg_weight", "gg_bias")


class Call(ctypes.Structure):
    """The struct of the same name in tests/simt/driver.cpp."""

    _fields_ = [
        ("shape", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int64),
        *((name, _Tensor) for name in _TENSORS),
        *((name, _Vector) for name in VECTORS),
        ("num_batches_tracked", ctypes.c_void_p),
        ("cumulative", ctypes.c_int64),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("saved", ctypes.c_void_p),
        ("residual", _Tensor),
        ("grad_residual", _Tensor),
        ("activation", ctypes.c_int64),
        ("negative_slope", ctypes.c_double),
        ("mask", ctypes.c_void_p),
        ("training", ctypes.c_int64),
        ("result", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("renorms", ctypes.c_int64),
        ("renorm_mean", _Vector),
        ("renorm_var", _Vector),
        ("renorm_batches", ctypes.c_void_p),
        ("max_r", ctypes.c_double),
        ("max_d", ctypes.c_double),
        ("warmup_steps", ctypes.c_int64),
        ("smooth", ctypes.c_int64),
        ("batches", ctypes.c_int64),
        ("batch_size", ctypes.c_int64),
        ("mask_step", ctypes.c_int64),
    ]

    def set_tensor(self, name: str, t: Tensor, pointer: int) -> None:
        strides = (*t.stride(), 0)[:3]
        setattr(self, name, _Tensor(pointer, (ctypes.c_int64 * 3)(*strides)))

    def set_vector(self, name: str, t: Tensor, pointer: int) -> None:
        setattr(self, name, _Vector(pointer, DTYPES.index(t.dtype), t.stride(0)))


@dataclass
class Inputs:
    """One call's tensors and options. x and grad_output are (N, C) or (N, C, L) of any strides, vectors are (C,)."""

    x: Tensor
    grad_output: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: int | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    # grad_input, grad_weight and, the last, grad_bias or, of double backward, grad_grad_output
    wants: tuple[bool, bool, bool] = (True, True, True)
    # What arrives at backward's results, for double backward.
    gg_input: Tensor | None = None
    gg_weight: Tensor | None = None
    gg_bias: Tensor | None = None
    activation: str | None = None  # of ACTIVATIONS; None: the identity, and evaluation leaves nothing for a backward
    residual: Tensor | None = None
    negative_slope: float = 0.0
    # Of the passes with an activation. Forward: leave a mask. Evaluation: write into x. Backward: of training or of
    # evaluation, from which mask, and whether to a grad_residual.
    leaves_mask: bool = False
    in_place: bool = False
    training: bool = True
    mask: Tensor | None = None
    wants_residual: bool = False
    # Of a pass in stages: end with the reduction and give its result; begin behind it, with those of all parts.
    ends: bool = False
    empty: bool = False  # a part without values: no output, and x is not looked at
    given: Tensor | None = None
    valid: Tensor | None = None  # of a padded batch: int64 lengths, or booleans (N, L)
    # max_r, max_d, warmup_steps, smooth; forward goes by copies of the statistics, as the glue makes them
    renorm: tuple[float, float, int, bool] | None = None
    virtual_batch_size: int = 0

    @property
    def batches(self) -> tuple[int, int]:
        """How many virtual batches there are, and samples of all but the last (csrc/core/virtual_batch.h)."""
        n = self.x.shape[0]
        if self.virtual_batch_size == 0:
            return 1, n
        size = -(-n // -(-n // self.virtual_batch_size))
        count = -(-n // size)
        lone = count > 1 and (n - (count - 1) * size) * self.x[0, 0].numel() == 1
        return count - lone, size

    @property
    def pieces(self) -> list[slice]:
        count, size = self.batches
        return [slice(i * size, (i + 1) * size if i + 1 < count else None) for i in range(count)]

    @property
    def mask_step(self) -> int:
        """From the mask of a virtual batch to the next (csrc/core/activation.h)."""
        size = self.batches[1] * self.x[0].numel() * self.x.itemsize
        return -(-(-(-size // 16) + 16) // 16) * 16

    @property
    def mask_bytes(self) -> int:
        """One for 16 bytes of the output, and 16 beyond."""
        return -(-self.x.nbytes // 16) + (16 if self.virtual_batch_size == 0 else 32 * self.batches[0])

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


@dataclass
class Result:
    """What one call left behind (None: not asked for), its plan by field, and its launches as counted."""

    plan: dict[str, int]
    launches: list[dict[str, Any]]
    output: Tensor | None = None
    saved: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: int | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    grad_grad_output: Tensor | None = None
    mask: Tensor | None = None
    grad_residual: Tensor | None = None
    stage: Tensor | None = None  # what the first of two stages gives to the second
    last: dict[str, int] | None = None  # of virtual batches: the last one's plan, where `plan` is of the earlier ones

    @property
    def regime(self) -> tuple[str, str]:
        return walk_of(self.plan), exchange_of(self.plan)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def counted(self, buffer: str, what: str) -> int:
        """A counter of one tensor, summed over the launches."""
        return sum(launch["buffers"].get(buffer, {}).get(what, 0) for launch in self.launches)


def exchange_of(plan: dict[str, int]) -> str:
    """How blocks that share a channel meet: a name of EXCHANGES, or grid_pooled."""
    return "grid_pooled" if plan["pooled"] else EXCHANGES[plan["exchange"]]


def walk_of(plan: dict[str, int]) -> str:
    """How the plan sees the tensor: planes, by_span, folded or columns."""
    if plan["planes"]:
        return "planes"
    if plan["span"] > 1:
        return "by_span"
    return "folded" if plan["vectors"] * plan["column_step"] > plan["channels"] else "columns"
