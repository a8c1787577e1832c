"""The operators of csrc/cuda on the CPU, through driver.cpp: their plans, and calls on guarded memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tally
from .backend import Backend, backend
from .bridge import CACHE, HERE, ROOT, Library, Session, build, cache
from .calls import ACTIVATIONS, DTYPES, VECTORS, Call, Inputs, Pass, Result

CUDA = ROOT / "csrc" / "cuda"
HOST = (CUDA / "plan.cpp", CUDA / "cut.cpp", CUDA / "launch.cpp", CUDA / "padded.cpp", HERE / "driver.cpp")


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


def library(*, eager: bool = False, pooled: bool = False, free: bool = False, most_rows: int = 0) -> Library:
    """The kernels, the planner and the driver; built once a run, and only what changed. The kernels are the backend's.

    eager: the planner takes meeting of blocks to cost nothing, so that small tensors are split too. pooled: a grid's
    partial results are always merged once for all blocks. free: eager, and of launches too.
    most_rows: virtual batches side by side in a launch.
    """
    return _library(backend(), eager, pooled, free, most_rows)


@functools.cache
def _library(on: Backend, eager: bool, pooled: bool, free: bool, most_rows: int) -> Library:
    host, sources = host_files(eager, pooled, free, most_rows), sorted(CUDA.glob("*.cu"))
    if on.architecture == 0:
        return build("bn_ext", [*sources, *host])
    import ptx  # it needs this package

    return ptx.build("bn_ext", sources, host, on)


def host_files(eager: bool, pooled: bool, free: bool, most_rows: int) -> tuple[Path, ...]:
    """The planner, perhaps with other costs, and what stands beside the kernels."""
    host = HOST
    if free or most_rows:
        pattern, value = r"\bkLaunch = [\d.e]+", "kLaunch = 0"
        if not free:
            pattern, value = r"\bkMostRows\b", f"int64_t{{{most_rows}}}"
        text, found = re.subn(pattern, value, HOST[1].read_text())
        assert found == 1, f"cut.cpp has {pattern} {found} times"
        changed = CACHE / f"cut_{'free' if free else most_rows}.cpp"
        with cache():
            changed.write_text(text)
        host = (HOST[0], changed, *HOST[2:])
    if eager or pooled or free:
        text = HOST[0].read_text()
        for name in ("kClusterBarrier", "kGridBarrier", "kSecondBarrier", "kLowestGridRows", "kPooledPartials"):
            if name != "kPooledPartials" or pooled:
                value = "1" if name == "kLowestGridRows" else "0"
                text, found = re.subn(rf"\b{name} = [\d.e]+", f"{name} = {value}", text)
                assert found == 1, f"plan.cpp sets {name} {found} times"
        plan = CACHE / f"plan_{'pooled' if pooled else 'eager'}.cpp"
        with cache():
            plan.write_text(text)
        host = (plan, *host[1:])
    return host


# ---- plans ----


def _ask(lib: Library, pass_: Pass, call: Call) -> dict[str, int]:
    lib.functions.drive_plan_fields.restype = ctypes.c_char_p
    names = lib.functions.drive_plan_fields().decode().split()
    fields = (ctypes.c_int64 * len(names))()
    code = lib.functions.drive_plan(ctypes.c_int64(pass_), ctypes.byref(call), fields)
    assert code == 0, f"drive_plan returned cudaError_t {code}"
    return {name.removesuffix("()"): value for name, value in zip(names, fields, strict=True)}


def _ask_cut(lib: Library, pass_: Pass, call: Call) -> tuple[dict[str, int], dict[str, int], int]:
    """The plans of the earlier virtual batches, with "together", and of the last one, and the workspace of both."""
    names = list(_ask(lib, pass_, call))
    earlier, last = ((ctypes.c_int64 * len(names))() for _ in range(2))
    together, size = ctypes.c_int64(), ctypes.c_int64()
    code = lib.functions.drive_cut_plan(
        ctypes.c_int64(pass_.backward), ctypes.byref(call), earlier, last, ctypes.byref(together), ctypes.byref(size)
    )
    assert code == 0, f"drive_cut_plan returned cudaError_t {code}"
    plans = [dict(zip(names, fields, strict=True)) for fields in (earlier, last)]
    return {**plans[0], "together": together.value}, plans[1], size.value


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
    lib = library() if of is None else of
    with lib.session(device, **model):
        return _ask(lib, pass_, _imagined(pass_, t, wants, scalar * dtype.itemsize))


def cut_plan_of(
    pass_: Pass,
    shape: tuple[int, ...],
    virtual_batch_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "H200",
    of: Library | None = None,
    **model: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """As plan_of, of virtual batches: the plan of the earlier ones, with "together", and of the last one."""
    inputs = Inputs(torch.empty(shape, dtype=dtype, device="meta"), virtual_batch_size=virtual_batch_size)
    call = _imagined(pass_, inputs.x)
    call.batches, call.batch_size = inputs.batches
    lib = library() if of is None else of
    with lib.session(device, **model):
        return _ask_cut(lib, pass_, call)[:2]


def _imagined(pass_: Pass, t: Tensor, wants: tuple[bool, bool, bool] = (True, True, True), shift: int = 0) -> Call:
    """A call of tensors none of which exist, each like t."""
    vector = torch.empty(t.shape[1], dtype=torch.float32, device="meta")
    call = _new_call(t)
    for k, name in enumerate((*pass_.inputs, *pass_.outputs(wants))):
        call.set_tensor(name, t, ((1 + k) << 44) + shift)
    for k, name in enumerate((*VECTORS[:4], *pass_.vectors(wants))):
        call.set_vector(name, vector, (8 + k) << 44)
    call.saved = None if pass_ == Pass.INFERENCE else 1 << 50
    call.training = pass_.training
    return call


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
        self.session.filled(name, constant=constant)
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
        for name in VECTORS[:4]:
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
            rows = (6 if inputs.renorm is None else 8) * inputs.batches[0]
            held["saved"] = s.empty("saved", (rows, inputs.x.shape[1]), inputs.statistics_dtype)
        if "saved" in held:
            call.saved = held["saved"].data_ptr()
        if pass_ == Pass.FORWARD and inputs.num_batches_tracked is not None:
            held["count"] = s.tensor("num_batches_tracked", torch.tensor([inputs.num_batches_tracked]))
            call.num_batches_tracked = held["count"].data_ptr()

        if inputs.renorm is not None:
            call.renorms = 1
            call.max_r, call.max_d, call.warmup_steps, call.smooth = inputs.renorm
            for name in ("mean", "var") if pass_ == Pass.FORWARD else ():
                value = getattr(inputs, f"running_{name}")
                copied = placed.put(f"renorm_{name}", value, constant=True)
                vector(f"renorm_{name}", copied)
            if pass_ == Pass.FORWARD and inputs.num_batches_tracked is not None:
                count = placed.put("renorm_batches", torch.tensor([inputs.num_batches_tracked]), constant=True)
                call.renorm_batches = count.data_ptr()
        if inputs.ends:
            held["stage"] = s.empty("stage", (3 if pass_.backward else 4, inputs.x.shape[1]), torch.float64)
            call.result = held["stage"].data_ptr()
        if inputs.given is not None:
            call.given = placed.put("given", inputs.given, constant=True).data_ptr()
            call.parts = inputs.given.shape[0]

        if inputs.valid is not None:
            name = "valid" if inputs.valid.dtype == torch.bool else "lengths"
            setattr(call, name, placed.put(name, inputs.valid, constant=True).data_ptr())

        kind, last = "", None
        if inputs.batches[0] > 1:
            call.batches, call.batch_size = inputs.batches
            call.mask_step = inputs.mask_step
            plan, last, size = _ask_cut(lib, pass_, call)
            kind = "cut_"
        else:
            plan = _ask(lib, pass_, call)
            size = plan["workspace_bytes"]
        workspace = None
        if inputs.valid is not None:
            kind = "padded_"
            size = lib.functions.drive_padded_bytes(ctypes.c_int64(pass_.backward), ctypes.byref(call))
        if size > 0:
            workspace = s.empty("workspace", (size,), torch.uint8)
            if workspace_byte is not None:
                workspace.fill_(workspace_byte)
                s.filled("workspace")
        launchers = (*("drive_forward",) * 2, *("drive_backward",) * 2, "drive_double_backward")
        launcher = launchers[pass_].replace("drive_", f"drive_{kind}")
        result = Result(plan, s.run(launcher, ctypes.byref(call), workspace), last=last)
        placed.check_constant()
        tally.note(pass_, inputs, plan)
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
