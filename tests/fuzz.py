"""Random calls, sane and hostile, until the time is over: nothing crashes, nothing moves on an error, values are right.

    python tests/fuzz.py [--seconds 60] [--seed N]

Two things are drawn in turn: a call of a raw operator (hostile.py), and a FusedBatchNorm1d beside an nn.BatchNorm1d.
The seed that is printed, with the number of the case that failed, repeats it: --seed N --case K. `make sanitize` runs
it in a library that was built with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bn_ext
import hostile
from hostile import (
    OTHER_VECTORS,
    PLANES,
    SCHEMAS,
    TENSORS,
    VECTORS,
    Arguments,
    Setting,
    bits,
    outcome,
    quietly,
    same_bits,
    sane,
)
from support import FLOATS, LAYOUTS, module_for, normal

CASES: list[Callable[[random.Random], str]] = []
SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 64, 65)
BY_SIGN = ("relu", "leaky_relu")


def shape_of(rng: random.Random) -> tuple[int, ...]:
    while True:
        length = () if rng.random() < 0.5 else (rng.choice((*SIZES, 100, 1030)),)
        shape = (rng.choice((*SIZES, 100, 300)), rng.choice((*SIZES, 100, 257)), *length)
        if math.prod(shape) <= 80_000:  # the kernels' own threads begin to share at 32768
            return shape


def laid(x: Tensor, rng: random.Random) -> Tensor:
    """x with strides of any kind; what cannot be had of a shape, or is not x any more, is not asked for."""
    if not x.numel() or not 2 <= x.dim() <= 3 or rng.random() < 0.3:
        return x
    result = LAYOUTS[rng.choice([k for k in LAYOUTS if k != "overlapping" or x.numel() > 4 * sum(x.shape)])](x)
    return misaligned(result) if rng.random() < 0.2 else result


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy of x whose memory begins at an odd byte."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    view = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return view.copy_(x)


def in_double(given: Arguments, name: str, s: Setting) -> Arguments:
    """The same call on contiguous float64 tensors of the same values."""
    wide = {
        k: v.detach().double().contiguous() if k in (*PLANES, *VECTORS) and v is not None else v
        for k, v in given.items()
    }
    if "saved" in given:
        saved, mask = saved_anew(name, s, wide)
        wide["saved"] = saved
        if "mask" in given:
            wide["mask"] = mask
    return wide


def saved_anew(name: str, s: Setting, given: Arguments) -> tuple[Tensor, Tensor]:
    """What forward keeps of the values that a backward is given; of what that does not take, of sane ones."""
    forward = {k: v for k, v in sane("batch_norm", s).items() if k in (*PLANES, *VECTORS)}
    if given["input"].dtype == torch.float64:
        forward = {k: v.double() if isinstance(v, Tensor) else v for k, v in forward.items()}
    return hostile.saved_of(s, forward | {k: v for k, v in given.items() if k in forward}, given)


def close(name: str, found: Any, right: Any, s: Setting, spread: float) -> bool:
    """Whether results are those of float64 to some hundred roundings, of the sums and of what they are rounded to."""
    power = 3 if "double" in name else 1  # second derivatives hold 1/std that often
    arithmetic = torch.finfo(torch.float64 if s.dtype == torch.float64 else torch.float32).eps
    # A virtual batch is renormalised by the running statistics as the one before it left them: rounded to their type.
    kept = torch.finfo(s.vector_dtype).eps * math.ceil(s.shape[0] / s.virtual) if s.renorm and s.virtual else 0.0
    for mine, truth in zip(found, right, strict=True):
        if mine is None or mine.dtype == torch.uint8 or mine.shape != truth.shape or not mine.numel():
            continue
        scale = max(1.0, float(truth.abs().max())) if truth.isfinite().all() else math.inf
        count = mine.numel() + math.prod(s.shape)
        rounding = 8 * torch.finfo(mine.dtype).eps + (512 * arithmetic * math.sqrt(count) + kept) * spread**power
        bound = rounding * scale
        if not math.isfinite(bound) or scale > torch.finfo(mine.dtype).max / 4:
            continue
        if not bool(((mine.double() - truth.double()).abs() <= bound).all()):
            return False
    return True


def differences(found: Any, right: Any) -> list[str]:
    """How far off each result is: shape, largest difference, largest value. Whole tensors would fill a log."""
    return [
        f"{tuple(mine.shape)}: {float((mine.double() - truth.double()).abs().max())} of {float(truth.abs().max())}"
        for mine, truth in zip(found, right, strict=True)
        if isinstance(mine, Tensor) and mine.numel() and mine.shape == truth.shape
    ]


def raw_operator(rng: random.Random) -> str:
    """One operator on one thread and on several, with up to two arguments spoilt."""
    name = rng.choice(sorted(SCHEMAS))
    dtype = rng.choice(FLOATS)
    activation = rng.choice(("identity", "relu", "leaky_relu", "silu", "gelu"))
    training, residual = rng.random() < 0.5, rng.random() < 0.5
    vectors = rng.choice(FLOATS)
    s = Setting(
        shape_of(rng), dtype, vectors, "contiguous", activation, training, residual, rng.randrange(1000),
        part=rng.random() < 0.3,
    )  # fmt: skip
    if not s.part and rng.random() < 0.3:
        s = replace(s, virtual=rng.randint(1, 100))
    if not s.part and rng.random() < 0.3:
        s = replace(s, padded=True)
    if not s.part and rng.random() < 0.3:
        s = replace(s, renorm=True)
    given = outcome(lambda: sane(name, s))
    if isinstance(given, Exception):  # one value a channel, say
        assert "INTERNAL ASSERT" not in str(given), given
        return f"{name}: no such call"
    for key in PLANES:
        if isinstance(given.get(key), Tensor):
            given[key] = laid(given[key], rng)
    if "saved" in given:  # that of the values which a layout has left
        given["saved"], mask = saved_anew(name, s, given)
        if "mask" in given:
            given["mask"] = mask
    wrong: list[str] = []
    spoilt: set[str] = set()
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        ways = [w for w in hostile.spoilt(name, given) if w[0] not in spoilt]
        if not ways:
            break
        which, how, make = rng.choice(ways)
        spoilt.add(which)
        made = outcome(lambda m=make: quietly(m))
        if not isinstance(made, Exception):
            given[which] = made
            wrong.append(f"{which} {how}")
    if type(given.get("bias_dtype")) is int and any(isinstance(v, Tensor) and v.is_meta for v in given.values()):
        return f"{name}: no such call"  # on its way to a kernel in Python torch reads past its own table of types
    copies = [
        given,
        {
            k: v.clone() if isinstance(v, Tensor) and hostile.readable(v) and k in WRITTEN else v
            for k, v in given.items()
        },
    ]
    results = []
    for threads, call in zip((1, 3), copies, strict=True):
        torch.set_num_threads(threads)
        before = bits(list(call.values()))
        result = outcome(lambda c=call: quietly(lambda: hostile.operator(name)(**c)))
        if isinstance(result, Exception):
            assert "INTERNAL ASSERT" not in str(result), (name, s, wrong, result)
            assert same_bits(before, bits(list(call.values()))), (name, s, wrong, result)
        results.append(result)
    torch.set_num_threads(2)
    where = (name, s, wrong)
    assert isinstance(results[0], Exception) == isinstance(results[1], Exception), (where, results)
    if isinstance(results[0], Exception):
        return f"{name}: refused" if wrong else f"{name}: no such call"
    listed = [list(r) if isinstance(r, (tuple, list)) else [given["input"] if r is None else r] for r in results]
    if name.endswith("inference_"):
        listed[1] = [copies[1]["input"]]
    if "composite" not in name:  # torch's own operations promise no such thing
        assert same_bits(bits(listed[0]), bits(listed[1])), (where, "other bits with three threads")
    flips = s.activation in BY_SIGN and "activation" in given and "grad_output" in given and dtype != torch.float64
    if not wrong and not flips and not name.endswith("inference_") and math.prod(s.shape):
        wide = in_double(given | {k: v for k, v in sane(name, s).items() if k in WRITTEN}, name, s)
        right = quietly(lambda: hostile.operator(name)(**wide))
        x = wide["input"]
        var = x.transpose(0, 1).flatten(1).var(1, unbiased=False)
        spread = max(1.0, float((var + hostile.EPS).rsqrt().max()))
        right = list(right) if isinstance(right, (tuple, list)) else [right]
        outputs = slice(0, 1) if name.endswith("forward") else slice(None)  # saved belongs to the dtype
        assert close(name, listed[0][outputs], right[outputs], s, spread), (where, differences(listed[0], right))
        return f"{name}: right"
    return f"{name}: computed"


WRITTEN = ("running_mean", "running_var", "num_batches_tracked")


def beside_native(rng: random.Random) -> str:
    """A module of ours and one of torch's through the same steps: both raise, in the same words, or both compute."""
    shape, dtype, seed = shape_of(rng), rng.choice(FLOATS[:2]), rng.randrange(1000)
    if rng.random() < 0.1:
        shape = (*shape, 2, 1)[: rng.choice((1, 4, 5))]
    options = {
        "affine": rng.random() < 0.8, "track_running_stats": rng.random() < 0.8, "bias": rng.random() < 0.8,
        "momentum": rng.choice((0.1, 0.1, None, 0.0, 1.0)), "eps": rng.choice((1e-5, 1e-5, 0.0, -1.0, 1e-3)),
    }  # fmt: skip
    if len(shape) > 1 and shape[1] == 0:  # torch's own trips over its own way of making an empty result
        shape = (shape[0], 1, *shape[2:])
    channels = shape[1] if len(shape) > 1 else 5
    change = rng.choice(
        ("", "", "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "input", "grad")
    )
    how = rng.choice(
        hostile.OTHER_COUNTS if change == "num_batches_tracked" else [k for k in TENSORS if k not in UNLIKE]
    )
    if change:  # of two errors either may come first
        options["eps"], shape = 1e-5, (max(shape[0], 2), *(max(n, 1) for n in shape[1:]))
    order, training = rng.random(), rng.random() < 0.6
    seen: list[Any] = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        choice = random.Random(order)
        module = module_for(cls, channels, dtype=dtype, **options).train(training)
        x, g = (laid(normal(shape, dtype, seed=seed + k), choice) for k in (0, 1))
        if change in ("input", "grad"):
            value = outcome(lambda v=x if change == "input" else g: quietly(lambda: TENSORS[how](v)))
            if isinstance(value, Exception):
                return "module: no such tensor"
            x, g = (value, g) if change == "input" else (x, value)
            if change == "input" and isinstance(x, Tensor) and not x.is_nested and x.shape != g.shape:
                g = normal(tuple(x.shape), dtype)
        elif change and getattr(module, change) is not None:
            value = outcome(lambda m=module: quietly(lambda: TENSORS[how](getattr(m, change).detach())))
            if isinstance(value, Exception):
                return "module: no such tensor"
            (module._parameters if change in module._parameters else module._buffers)[change] = value
        state = [*module._parameters.values(), *module._buffers.values()]
        before = bits(state)

        def run(module: Any = module, x: Any = x, g: Any = g) -> list[Any]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf:
                x = x.detach().requires_grad_()
            y = module(x)
            wanted = [t for t in (x, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
            return [y, *(torch.autograd.grad(y, wanted, g) if wanted and y.requires_grad else ())]

        result = outcome(lambda: quietly(run))
        if isinstance(result, Exception) and cls is bn_ext.FusedBatchNorm1d and change != "grad":
            assert same_bits(before, bits(state)), (shape, dtype, options, change, how, training, result)
        seen.append((result, bits([t for t in state if isinstance(t, Tensor)])))
    (mine, after), (theirs, after_theirs) = seen
    where = (shape, dtype, options, change, how if change else "", training)
    if isinstance(theirs, Exception) or isinstance(mine, Exception):
        assert isinstance(mine, type(theirs)) or isinstance(theirs, type(mine)), (where, mine, theirs)
        return "module: both refuse"
    x = normal(shape, torch.float64)
    for a, b in zip([*mine, *after], [*theirs, *after_theirs], strict=True):
        assert type(a) is type(b), (where, a, b)
        if not isinstance(a, Tensor) or not a.is_floating_point() or not b.isfinite().all():
            continue
        bound = 1e-3 if dtype == torch.float32 else 1e-7
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert a.dtype == b.dtype and a.shape == b.shape, (where, a, b)
        assert bool(((a - b).abs() <= bound * scale * 400).all()), (where, a, b)
    return "module: both compute"


# Where README.md says that ours differs: other types beside the input are welcome; the memory behind a storage's end,
# which torch reads.
UNLIKE = (*OTHER_VECTORS, "scalar", "freed", "shrunk", "none", "number", "text", "list", "float8", "int64", "bool")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--case", type=int, default=None, help="this one alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"fuzz: seed {seed}", flush=True)
    end, counts, case = time.monotonic() + options.seconds, Counter[str](), options.case or 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed} {case}")
        try:
            counts[rng.choice((raw_operator, raw_operator, beside_native))(rng)] += 1
        except Exception as error:
            print(f"fuzz: case {case} of seed {seed} failed: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        if options.case is not None:
            break
        case += 1
    for what, count in sorted(counts.items()):
        print(f"  {count:7d}  {what}")
    print(f"fuzz: {sum(counts.values())} cases of seed {seed}, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
