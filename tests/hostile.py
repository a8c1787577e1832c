"""Calls of every operator made from its schema, sane ones and ones with something wrong in them.

test_hostile.py goes through all of them once; fuzz.py draws them at random until its time is over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bn_ext
from support import LAYOUTS, normal

assert bn_ext.__version__  # importing it defines the operators
EPS, SLOPE = 1e-5, 0.1
RENORM = [1.5, 0.5, 5.0, 1.0]
SCHEMAS = {s.name.removeprefix("bn_ext::"): s for s in torch._C._jit_get_all_schemas() if s.name.startswith("bn_ext::")}
PLANES = ("input", "residual", "grad_output", "grad_grad_input")
FIXED = ("mean", "var")  # statistics that do not move
VECTORS = ("weight", "bias", "running_mean", "running_var", "grad_grad_weight", "grad_grad_bias", *FIXED)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a sane call is made for."""

    shape: tuple[int, ...] = (6, 5)
    dtype: torch.dtype = torch.float64
    vector_dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    activation: str = "relu"
    training: bool = True
    residual: bool = True
    seed: int = 0
    part: bool = False  # of a batch in training, by the results of a stage
    virtual: int = 0  # samples of a virtual batch in training; not with part
    padded: bool = False  # by a mask, or lengths where there is a last dimension; not with part
    renorm: bool = False  # in training; not with part


def operator(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(torch.ops.bn_ext, name).default
    return found


def saved_of(s: Setting, given: Arguments, wanted: Arguments) -> tuple[Tensor, Tensor]:
    """What forward keeps for a backward that takes the ``wanted`` arguments: (saved, mask)."""
    mean, var = (None, None) if s.training else (given["running_mean"], given["running_var"])
    after = (given["residual"], s.activation, SLOPE) if "activation" in wanted else ()
    renorms = s.renorm and s.training and "renorm" in wanted
    moving = (*(given[k].clone() for k in ("running_mean", "running_var")), torch.tensor(3)) if renorms else (None,) * 3
    vectors = (given["weight"], given["bias"], *moving, 0.1, EPS, mean, var)
    size = s.virtual if s.training and "virtual_batch_size" in wanted else 0
    valid = valid_of(s) if "valid" in wanted else None
    return torch.ops.bn_ext.batch_norm_forward(  # type: ignore[no-any-return]
        given["input"], *vectors, *after, virtual_batch_size=size, valid=valid, renorm=RENORM if renorms else None
    )[1:]


def valid_of(s: Setting) -> Tensor | None:
    """What counts of a padded batch, the most of it."""
    if not s.padded:
        return None
    counts = (normal((s.shape[0], *s.shape[2:]), seed=s.seed) > -1.5).contiguous()
    return counts if len(s.shape) == 2 or s.seed % 2 else counts.sum(1)


def sane(name: str, s: Setting) -> Arguments:
    """Arguments that name computes with."""
    lay = LAYOUTS[s.layout] if torch.Size(s.shape).numel() else LAYOUTS["contiguous"]
    given: Arguments = {}
    for k, plane in enumerate(PLANES):
        given[plane] = lay(normal(s.shape, s.dtype, seed=s.seed + k))
    for k, vector in enumerate(VECTORS):
        given[vector] = normal(s.shape[1:2], s.vector_dtype, seed=s.seed + 10 + k).abs() + 0.5
    if not s.residual:
        given["residual"] = None
    given |= {"num_batches_tracked": torch.tensor(3), "training": s.training, "momentum": 0.1, "eps": EPS}
    given |= {"activation": s.activation, "negative_slope": SLOPE, "bias_dtype": None}
    wanted = {a.name: a for a in SCHEMAS[name].arguments}
    if "saved" in wanted:
        given["saved"], given["mask"] = saved_of(s, given, wanted)
    if "output_mask" in wanted:
        given["output_mask"] = [True] * (wanted["output_mask"].N or 0)
    given |= {"moments": None, "sums": None, "virtual_batch_size": s.virtual if s.training else 0}
    given |= {"valid": valid_of(s), "allow_single_value": s.seed % 2 == 1}
    renorms = s.renorm and s.training
    given["renorm"] = renorms if "saved" in wanted else RENORM if renorms else None
    if s.part and s.training and "moments" in wanted:
        given["moments"] = torch.ops.bn_ext.batch_norm_moments(given["input"])[None]
    if s.part and s.training and "sums" in wanted:
        of_sums = {a.name for a in SCHEMAS["batch_norm_gradient_sums"].arguments}
        stage = {key: given[key] for key in given if key in of_sums}
        given["sums"] = torch.ops.bn_ext.batch_norm_gradient_sums(**stage)[None]
        given["output_mask"] = [True, False, False, True]
    if "mean" in wanted:
        absent = FIXED if s.training else ("running_mean", "running_var", "num_batches_tracked")
        given |= dict.fromkeys(absent)
    return {key: given[key] for key in wanted}


# ---- what can be wrong with one argument ----


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def jagged(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor([t, t], layout=torch.jagged)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "number": lambda t: 3.0,
    "text": lambda t: "text",
    "list": lambda t: [t],
    "no_elements": lambda t: t.new_empty(0),
    "no_rows": lambda t: t[:0],
    "scalar": lambda t: t.new_zeros(()),
    "one_more": lambda t: torch.cat((t, t[:1])) if t.numel() > 1 else t.new_zeros(t.numel() + 1),
    "one_less": lambda t: t[1:] if t.numel() else t.new_zeros(3),
    "one_dimension": lambda t: t.flatten(),
    "two_more_dimensions": lambda t: t[..., None, None] if t.numel() else 0,
    "int64": lambda t: t.long() if t.is_floating_point() else t.double(),
    "bool": lambda t: t > 0,
    "complex": lambda t: torch.complex(t.double(), t.double()),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]) if t.numel() else 0,
    "jagged": lambda t: jagged(t) if t.numel() else 0,
    "meta": lambda t: t.to("meta"),
    "freed": lambda t: freed(t) if t.numel() else 0,
    "shrunk": lambda t: shrunk(t) if t.numel() else 0,
}
NUMBERS: dict[str, list[Any]] = {
    "float": [None, "text", [0.1], 1j, 10**400, object()],
    "int": [None, "text", [3], -1, 10**30, 2.5],
    "Optional[float]": ["text", [0.1], 1j, 10**400],
    "bool": ["text", [True]],
    "str": [None, 3, "tanh", "", "relu\0"],
    "Optional[List[float]]": [
        3.0,
        "text",
        [],
        [1.5, 0.5, 5.0],
        [0.5, 0.5, 5.0, 1.0],
        [1.5, -0.5, 5.0, 1.0],
        [1.5, 0.5, -5.0, 1.0],
        [1.5, 0.5, 5.0, 2.0],
        [float("nan")] * 4,
    ],
    "List[bool]": [None, 3, [True], [True] * 9, ["text"] * 3, []],
    "Optional[int]": ["text", torch.int64, torch.complex64, torch.bool, torch.float8_e5m2, torch.quint8, 99, -1],
}


def quietly(call: Callable[[], Any]) -> Any:
    """What call returns, without the warnings of torch's own prototypes (nested, sparse, quantised tensors)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def spoilt(name: str, given: Arguments) -> list[tuple[str, str, Callable[[], Any]]]:
    """(argument, what is wrong with it, what to pass instead) for every way that there is."""
    ways: list[tuple[str, str, Callable[[], Any]]] = []
    for argument in SCHEMAS[name].arguments:
        value = given[argument.name]
        if "Tensor" in str(argument.type):
            unread = argument.name == "num_batches_tracked" and given.get("training") is False
            if value is not None and not unread:
                ways += [(argument.name, how, lambda v=value, s=s: quietly(lambda: s(v))) for how, s in TENSORS.items()]
        else:
            ways += [(argument.name, repr(bad)[:20], lambda b=bad: b) for bad in NUMBERS[str(argument.type)]]
    return ways


# ---- what a call may have changed ----


def bits(value: Any) -> Any:
    """What a tensor holds, to be compared later; of one whose memory is gone or hidden, that it is so."""
    if isinstance(value, (list, tuple)):
        return [bits(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    if not value.numel() or not readable(value):
        return str(value.layout), str(value.device)
    return torch._neg_view(value.detach()).clone() if value.is_neg() else value.detach().clone()


def readable(t: Tensor) -> bool:
    """Whether t has its elements in memory; torch itself crashes where it looks for those of a freed storage."""
    if t.layout != torch.strided or t.is_meta or t.is_nested or t.is_quantized:
        return False
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return a is b or bool(a == b)


# ---- whether a call may take it ----

OTHER_VECTORS = ("one_dimension", "two_more_dimensions")  # the right number of values, whatever the shape
# torch counts in any type and shape; without data it cannot tell that there is none.
OTHER_COUNTS = ("no_elements", "scalar", "one_more", "one_less", "int64", "complex", *OTHER_VECTORS)


def welcome(name: str, s: Setting, argument: str, how: str) -> bool:
    """Whether name computes with what spoilt makes of argument; all the rest it has to refuse."""
    if (
        argument == "num_batches_tracked"
        and s.renorm
        and s.training
        and how in ("none", "no_elements", "one_more", "meta")
    ):
        return False  # the warm-up goes by it
    if how == "none" and "Optional" in str({a.name: a for a in SCHEMAS[name].arguments}[argument].type):
        if argument == "saved":
            return s.training  # the composites ask for it where they cannot compute it
        return argument not in ("running_mean", "running_var", *FIXED)
    if argument == "num_batches_tracked":
        return how in OTHER_COUNTS or (how == "meta" and not name.endswith("forward"))
    if argument == "mask":  # none; and it has one dimension
        return how in ("no_elements", "no_rows", "one_dimension")
    others = {a.name for a in SCHEMAS[name].arguments}
    if argument == "input" and others == {"input"} and how == "meta":
        return True  # nothing beside it is elsewhere
    if argument == "valid":
        valid = valid_of(s)
        assert valid is not None
        return (how == "one_dimension" and valid.dim() == 1) or (how == "bool" and valid.dtype == torch.bool)
    if argument == "input" and s.padded and "valid" in others:
        return False
    if argument == "input" and "grad_output" not in others and not (s.residual and "residual" in others):
        return how in ("no_rows", "one_more", "one_less")  # another batch
    if argument in ("moments", "sums"):
        return how == "one_more"  # another part
    return argument in VECTORS and how in OTHER_VECTORS


def outcome(call: Callable[[], Any]) -> Any:
    """What call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error
