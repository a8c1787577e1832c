"""The operators of csrc/cuda on the CPU, through driver.cpp: their plans, and calls on guarded memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .bridge import CACHE, HERE, ROOT, Library, Session, build, cache

CUDA = ROOT / "csrc" / "cuda"
HOST = (CUDA / "plan.cpp", CUDA / "launch.cpp", HERE / "driver.cpp")
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
_VECTORS = ("weight", "bias", "running_mean", "running_var", "grad_weight", "grad_bias", "gg_weight", "gg_bias")


class Call(ctypes.Structure):
    """The struct of the same name in tests/simt/driver.cpp."""

    _fields_ = [
        ("shape", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int64),
        *((name, _Tensor) for name in _TENSORS),
        *((name, _Vector) for name in _VECTORS),
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
    ]

    def set_tensor(self, name: str, t: Tensor, pointer: int) -> None:
        strides = (*t.stride(), 0)[:3]
        setattr(self, name, _Tensor(pointer, (ctypes.c_int64 * 3)(*strides)))

    def set_vector(self, name: str, t: Tensor, pointer: int) -> None:
        setattr(self, name, _Vector(pointer, DTYPES.index(t.dtype), t.stride(0)))


def broken(line: str) -> Library:
    """The kernels without a line of kernel.cuh, which must be there once; float32 alone has the changed code."""
    text = (CUDA / "kernel.cuh").read_text()
    assert text.count(line) == 1, f"{line!r} is there {text.count(line)} times"
    changed = text.replace(line, "")
    folder = CACHE / f"broken_{hashlib.sha256(changed.encode()).hexdigest()[:16]}"
    shutil.copytree(CUDA, folder, dirs_exist_ok=True)
    (folder / "kernel.cuh").write_text(changed)
    kernels = [folder / "float32.cu", *(p for p in sorted(CUDA.glob("*.cu")) if p.name != "float32.cu")]
    return build("broken", [*kernels, *HOST])


@functools.cache
def library(*, eager: bool = False, pooled: bool = False) -> Library:
    """The kernels, the planner and the driver; built once a run, and only what changed.

    eager: the planner takes meeting of blocks to cost nothing, so that small tensors are split too. pooled: a grid's
    partial results are always merged once for all blocks.
    """
    if eager or pooled:
        text = HOST[0].read_text()
        for name in ("kClusterBarrier", "kGridBarrier", "kSecondBarrier", "kLowestGridRows", "kPooledPartials"):
            if name != "kPooledPartials" or pooled:
                value = "1" if name == "kLowestGridRows" else "0"
                text, found = re.subn(rf"\b{name} = [\d.e]+", f"{name} = {value}", text)
                assert found == 1, f"plan.cpp sets {name} {found} times"
        plan = CACHE / f"plan_{'pooled' if pooled else 'eager'}.cpp"
        with cache():
            plan.write_text(text)
        return build("bn_ext", [*sorted(CUDA.glob("*.cu")), plan, *HOST[1:]])
    return build("bn_ext", [*sorted(CUDA.glob("*.cu")), *HOST])


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

    @property
    def mask_bytes(self) -> int:
        """One for 16 bytes of the output, and 16 beyond (csrc/core/activation.h)."""
        return -(-self.x.nbytes // 16) + 16

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


# ---- plans ----


def _ask(lib: Library, pass_: Pass, call: Call) -> dict[str, int]:
    lib.functions.drive_plan_fields.restype = ctypes.c_char_p
    names = lib.functions.drive_plan_fields().decode().split()
    fields = (ctypes.c_int64 * len(names))()
    code = lib.functions.drive_plan(ctypes.c_int64(pass_), ctypes.byref(call), fields)
    assert code == 0, f"drive_plan returned cudaError_t {code}"
    return {name.removesuffix("()"): value for name, value in zip(names, fields, strict=True)}


def plan_of(
    pass_: Pass,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    nlc: bool = False,
    scalar: bool = False,
    device: str = "H200",
    wants: tuple[bool, bool, bool] = (True, True, True),
    of: Library | None = None,
    **model: int,
) -> dict[str, int]:
    """The plan for dense tensors of any size, none of which exist, on a modelled device (as of `run`).

    nlc: (N, C, L) stored as (N, L, C). scalar: one element off the alignment of vectors.
    """
    t = torch.empty(shape, dtype=dtype, device="meta")
    if nlc:
        t = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    vector = torch.empty(shape[1], dtype=torch.float32, device="meta")
    call = _new_call(t)
    for k, name in enumerate((*pass_.inputs, *pass_.outputs(wants))):
        call.set_tensor(name, t, ((1 + k) << 44) + scalar * dtype.itemsize)
    for k, name in enumerate((*_VECTORS[:4], *pass_.vectors(wants))):
        call.set_vector(name, vector, (8 + k) << 44)
    call.saved = None if pass_ == Pass.INFERENCE else 1 << 50
    call.training = pass_.training
    lib = library() if of is None else of
    with lib.session(device, **model):
        return _ask(lib, pass_, call)


def _new_call(x: Tensor) -> Call:
    call = Call()
    call.shape[:] = (*x.shape, 1)[:3]
    call.dtype = DTYPES.index(x.dtype)
    return call


def saved_rows(high: Tensor, low: Tensor, invstd: Tensor) -> Tensor:
    """(6, C) for a backward without an activation, which reads the mean and invstd alone (csrc/core/kernels.h)."""
    return torch.stack([high, low, invstd, *[torch.full_like(high, torch.nan)] * 3])


def saved_by_evaluation(inputs: Inputs) -> Tensor:
    assert inputs.running_mean is not None and inputs.running_var is not None
    mean, variance, dtype = inputs.running_mean.double(), inputs.running_var.double(), inputs.statistics_dtype
    high = mean.to(dtype)
    return saved_rows(high, (mean - high.double()).to(dtype), (variance + inputs.eps).rsqrt().to(dtype))


# ---- runs ----


class _Placed:
    """Guarded copies of a call's tensors, which know whether they were written to."""

    def __init__(self, session: Session, *, align: int, left: bool) -> None:
        self.session, self.align, self.left = session, align, left
        self.inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def put(self, name: str, value: Tensor, *, constant: bool) -> Tensor:
        """A copy with the same strides and the same distance from a 64-byte boundary; gaps are copied as they are."""
        offset = value.storage_offset() * value.itemsize % 64 // value.itemsize
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        if reach * value.itemsize > 1 << 30:  # only the values themselves take memory
            far = self.session.empty(name, value.shape, value.dtype, value.stride(), align=self.align, sparse=True)
            return far.copy_(value)
        flat = self.session.empty(name, (reach + offset,), value.dtype, align=self.align, left=self.left)
        flat[offset:].copy_(value.as_strided((reach,), (1,)))
        if constant:
            self.inputs[name] = flat, flat.clone()
        return flat.as_strided(value.shape, value.stride(), offset)

    def like(self, name: str, value: Tensor, **options: Any) -> Tensor:
        """Fresh memory as torch.empty_like would lay it out."""
        laid = torch.empty_like(value, **options)
        return self.session.empty(name, laid.shape, laid.dtype, laid.stride(), align=self.align, left=self.left)

    def check_constant(self) -> None:
        for name, (now, before) in self.inputs.items():
            same = torch.equal(now.view(torch.uint8), before.view(torch.uint8))
            assert same, f"{name}, an input, was written to"


def run(
    pass_: Pass,
    inputs: Inputs,
    *,
    device: str = "H200",
    seed: int = 0,
    saved: Tensor | None = None,
    workspace_byte: int | None = None,
    align: int = 16,
    of: Library | None = None,
    **model: int,
) -> Result:
    """One call on a modelled device (a preset's name, and figures such as sms=4).

    saved: (6, C) for backward of training. workspace_byte: what the workspace is filled with instead of NaN. align: of
    the tensors. of: another build than `library()`.
    Raises LaunchError with the stand-in runtime's report, AssertionError where an input was written to.
    """
    lib = library() if of is None else of
    with lib.session(device, seed=seed, **model) as s:
        placed = _Placed(s, align=align, left=seed % 2 == 1)
        call, fused, staged = _new_call(inputs.x), inputs.activation, inputs.ends or inputs.given is not None
        call.cumulative = inputs.momentum is None
        call.momentum = 0.0 if inputs.momentum is None else inputs.momentum
        call.eps = inputs.eps
        held: dict[str, Tensor] = {}

        def tensor(name: str, t: Tensor) -> None:
            held[name] = t
            call.set_tensor(name, t, t.data_ptr())

        def vector(name: str, t: Tensor | None) -> None:
            if t is not None:
                held[name] = t
                call.set_vector(name, t, t.data_ptr())

        tensor("x", placed.put("x", inputs.x, constant=not inputs.in_place))
        call.training = pass_.training
        if fused is not None:
            call.activation, call.negative_slope = ACTIVATIONS.index(fused), inputs.negative_slope
            if pass_.backward:
                call.training = inputs.training
            if inputs.mask is not None:
                call.mask = placed.put("mask", inputs.mask, constant=True).data_ptr()
            if inputs.leaves_mask:
                held["mask"] = s.empty("mask", (inputs.mask_bytes,), torch.uint8)
                call.mask = held["mask"].data_ptr()
            if pass_.backward:  # the glue gives the strides of an absent dx too
                call.set_tensor("dx", torch.empty_like(inputs.x, device="meta"), 0)
            if inputs.wants_residual:
                tensor("grad_residual", placed.like("grad_residual", inputs.x))
        if inputs.residual is not None:
            tensor("residual", placed.put("residual", inputs.residual, constant=True))
        for name in _VECTORS[:4]:
            value, constant = getattr(inputs, name), pass_ != Pass.FORWARD or name in ("weight", "bias")
            if value is not None and not (pass_.backward and name != "weight"):
                vector(name, placed.put(name, value, constant=constant))
        if pass_.backward:
            assert inputs.grad_output is not None
            tensor("dy", placed.put("dy", inputs.grad_output, constant=True))
            if pass_ == Pass.DOUBLE_BACKWARD:
                assert inputs.gg_input is not None
                tensor("gg_x", placed.put("gg_x", inputs.gg_input, constant=True))
            for name in pass_.outputs(inputs.wants) if not inputs.ends else ():
                tensor(name, placed.like(name, inputs.x))
            options = {"dtype": inputs.statistics_dtype if inputs.weight is None else inputs.weight.dtype}
            for name in pass_.vectors(inputs.wants) if not staged else ():
                if name.startswith("gg"):
                    value = getattr(inputs, name)
                    vector(name, None if value is None else placed.put(name, value, constant=True))
                else:
                    vector(name, s.empty(name, (inputs.x.shape[1],), **options))
        elif not (inputs.ends or inputs.empty):
            tensor("y", held["x"] if inputs.in_place else placed.like("y", inputs.x))
        if pass_.backward:
            if saved is None:
                saved = saved_by_evaluation(inputs)
            held["saved"] = placed.put("saved", saved, constant=True)
        elif (not inputs.ends and (pass_ == Pass.FORWARD)) or (pass_ == Pass.INFERENCE and fused is not None):
            held["saved"] = s.empty("saved", (6, inputs.x.shape[1]), inputs.statistics_dtype)
        if "saved" in held:
            call.saved = held["saved"].data_ptr()
        if pass_ == Pass.FORWARD and inputs.num_batches_tracked is not None:
            held["count"] = s.tensor("num_batches_tracked", torch.tensor([inputs.num_batches_tracked]))
            call.num_batches_tracked = held["count"].data_ptr()

        if inputs.ends:
            held["stage"] = s.empty("stage", (3 if pass_.backward else 4, inputs.x.shape[1]), torch.float64)
            call.result = held["stage"].data_ptr()
        if inputs.given is not None:
            call.given = placed.put("given", inputs.given, constant=True).data_ptr()
            call.parts = inputs.given.shape[0]

        plan = _ask(lib, pass_, call)
        workspace = None
        if plan["workspace_bytes"] > 0:
            workspace = s.empty("workspace", (plan["workspace_bytes"],), torch.uint8)
            if workspace_byte is not None:
                workspace.fill_(workspace_byte)
        launchers = (*("drive_forward",) * 2, *("drive_backward",) * 2, "drive_double_backward")
        launcher = launchers[pass_]
        result = Result(plan, s.run(launcher, ctypes.byref(call), workspace))
        placed.check_constant()
        names = {"y": "output", "dx": "grad_input", "grad_weight": "grad_weight", "grad_bias": "grad_bias"}
        names |= {"grad_dy": "grad_grad_output", "grad_residual": "grad_residual", "stage": "stage"}
        if inputs.leaves_mask:
            names["mask"] = "mask"
        if pass_ == Pass.FORWARD:
            names |= {"running_mean": "running_mean", "running_var": "running_var"}
        if not pass_.backward:
            names["saved"] = "saved"
        for name, attribute in names.items():
            if name in held:
                setattr(result, attribute, held[name].clone())
        if "count" in held:
            result.num_batches_tracked = int(held["count"])
        return result
