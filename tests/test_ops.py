"""The registered operators: schema and fake kernels (opcheck), shapes and strides, masks, torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from reference import assert_within, grad_input_tolerance, output_tolerance, reference
from support import FLOATS, LAYOUTS, check_module, error_of, module_for, name_of, normal

ops = torch.ops.bn_ext
SHAPES = ((6, 4), (3, 4, 5))
STATS = {"both": True, "none": False}
F32 = torch.float32


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def samples(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "contiguous") -> dict[str, tuple]:
    """operator name -> argument tuples that cover its options."""
    params = acc(dtype)
    x, g = (LAYOUTS[layout](normal(shape, dtype, device, seed=k)) for k in (0, 1))
    channels = shape[1]

    def vector(seed: int) -> Tensor:
        return normal((channels,), params, device, seed=seed).abs() + 0.5

    counter = torch.tensor(3, device=device)
    saved = torch.stack([vector(5), vector(6) * 0, vector(7), vector(5), vector(8), vector(9)])
    every, r = [True, True, True, True], LAYOUTS[layout](normal(shape, dtype, device, seed=2))
    mask = ops.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5, None, None, r, "relu")[2]
    of_parts = {"device": device, "dtype": torch.float64}
    moments, sums = torch.ones(2, 4, channels, **of_parts), torch.ones(2, 3, channels, **of_parts)
    return {
        "batch_norm_forward": (
            (x, vector(1), vector(2), vector(3), vector(4), counter, 0.1, 1e-5),
            (x, vector(1), vector(2), vector(3), vector(4), counter.clone(), None, 1e-5),
            (x, vector(1), None, vector(3), vector(4), None, 0.3, 1e-3),
            (x, None, None, None, None, None, 0.1, 1e-5),
            (x, vector(1), vector(2), None, None, None, None, 1e-5, vector(3), vector(4)),
            (x, vector(1), vector(2), vector(3), vector(4), counter.clone(), 0.1, 1e-5, None, None, r, "relu"),
            (x, None, None, None, None, None, None, 1e-5, vector(3), vector(4), r, "gelu"),
            (x, None, None, None, None, None, 0.1, 1e-5, None, None, None, "leaky_relu", 0.2),
            (
                x,
                vector(1),
                vector(2),
                vector(3),
                vector(4),
                counter.clone(),
                None,
                1e-5,
                None,
                None,
                r,
                "relu",
                0.0,
                moments,
            ),
        ),
        "batch_norm_moments": ((x,),),
        "batch_norm_inference": (
            (x, vector(1), vector(2), vector(3), vector(4), 1e-5),
            (x, None, None, vector(3), vector(4), 0.0),
            (x, None, None, vector(3), vector(4), 0.0, r, "silu"),
        ),
        "batch_norm_backward": (
            (g, x, vector(1), saved, True, [True, True, True, False]),
            (g, x, None, saved, True, [True, False, False, False]),
            (g, x, vector(1), saved, True, [False, True, False, False]),
            (g, x, vector(1), saved, True, [False, False, True, False]),
            (g, x, vector(1), saved, False, [True, True, True, False]),
            (g, x, None, saved, False, [True, False, False, False]),
            (g, x, vector(1), saved, False, [False, False, True, False]),
            (g, x, vector(1), saved, True, every, None, r, mask, "relu"),
            (g, x, None, saved, False, every, None, r, None, "gelu"),
            (g, x, vector(1), saved, True, every, None, None, None, "identity"),
            (g, x, vector(1), saved, True, [False, False, False, True], None, r, None, "silu"),
            (g, x, vector(1), saved, True, [True, False, False, True], None, r, mask, "relu", 0.0, sums),
        ),
        "batch_norm_gradient_sums": ((g, x, saved), (g, x, saved, r, mask, "relu"), (g, x, saved, None, None, "gelu")),
        "batch_norm_double_backward": (
            (x, vector(2), vector(3), g, x, vector(1), saved, True, [True, True, True]),
            (g, None, None, g, x, None, saved, True, [True, True, False]),
            (None, vector(2), None, g, x, vector(1), saved, True, [False, True, True]),
            (g, None, vector(3), g, x, vector(1), saved, True, [True, False, False]),
            (x, vector(2), vector(3), g, x, vector(1), saved, False, [True, True, True]),
            (g, None, None, g, x, None, saved, False, [True, True, False]),
            (None, vector(2), None, g, x, vector(1), saved, False, [False, True, True]),
        ),
    }


OPERATORS = (
    "batch_norm_forward", "batch_norm_moments", "batch_norm_inference", "batch_norm_backward",
    "batch_norm_gradient_sums", "batch_norm_double_backward",
)  # fmt: skip


def clone_arguments(arguments: tuple) -> tuple:
    """Fresh storage, same strides, so that a mutating operator can be called twice."""
    return tuple(torch.empty_like(a).copy_(a) if isinstance(a, Tensor) and a.dim() <= 1 else a for a in arguments)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(device: str, dtype: torch.dtype, operator: str) -> None:
    handle = getattr(ops, operator).default
    cases = [("contiguous", (6, 4)), ("permuted", (3, 4, 5))] if dtype == F32 else [("contiguous", (3, 4, 5))]
    for layout, shape in cases:
        for arguments in samples(shape, dtype, device, layout)[operator]:
            torch.library.opcheck(handle, arguments)


def describe(result: Any) -> list[tuple]:
    """Shape, type, device and, where there are elements to stride over, strides."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.dtype, t.device.type, t.stride() if t.numel() else ()) for t in tensors]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced_last", "expanded_batch", "channels_first"])
def test_fake_kernels_tell_the_truth(device: str, layout: str, dtype: torch.dtype, operator: str) -> None:
    for shape in (*SHAPES, (0, 4), (2, 4, 0), (2, 1, 3)):
        if 0 in shape and layout == "expanded_batch":
            continue
        for arguments in samples(shape, dtype, device, layout)[operator]:
            handle = getattr(ops, operator).default
            real = describe(handle(*clone_arguments(arguments)))
            with FakeTensorMode() as mode:
                fake = describe(handle(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)))
            meta = describe(handle(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)))
            assert fake == real
            if layout in ("contiguous", "permuted", "channels_first"):  # .to("meta") keeps dense strides only
                # How many bits of a mask a byte holds depends on the device, which a tensor without one cannot know.
                seen = [d for d in zip(meta, real, strict=True) if device == "cpu" or d[0][1] != torch.uint8]
                assert [d[:2] + d[3:] for d, _ in seen] == [d[:2] + d[3:] for _, d in seen]


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (("cuda:0", "cpu"), "got weight is on cpu, different from other tensors on cuda:0"),
        (("cpu", "cuda:0"), "got weight is on cuda:0, different from other tensors on cpu"),
        (("cpu", "meta"), "Tensor on device meta is not on the expected device cpu!"),
    ],
)
def test_fake_kernels_refuse_tensors_of_two_devices(devices: tuple[str, str], said: str) -> None:
    with FakeTensorMode():
        x, weight = torch.empty(3, 4, device=devices[0]), torch.empty(4, device=devices[1])
        with pytest.raises(RuntimeError, match=said):
            ops.batch_norm_forward(x, weight, None, None, None, None, 0.1, 1e-5)


def test_schemas_declare_what_is_written() -> None:
    written = {
        a.name for a in ops.batch_norm_forward.default._schema.arguments if a.alias_info and a.alias_info.is_write
    }
    assert written == {"running_mean", "running_var", "num_batches_tracked"}
    for operator in OPERATORS[1:]:
        schema = getattr(ops, operator).default._schema
        assert not any(a.alias_info for a in schema.arguments), operator
        assert not any(r.alias_info for r in schema.returns), operator


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_operator(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(shape, dtype, device, mean=2.0)
    out, saved, mask = ops.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5)
    ref = reference(x)
    assert saved.shape == (6, 4) and saved.dtype == acc(dtype) and not saved.requires_grad
    assert mask.dtype == torch.uint8 and not mask.numel(), "nothing follows"
    assert_within(out, ref.output, output_tolerance(ref, dtype), "output")
    high, low, invstd = saved[:3].double()
    eps = torch.finfo(acc(dtype)).eps
    assert_within(high + low, ref.mean + ref.mean_lo, eps * ref.var.sqrt() + 1e-15 * ref.mean.abs(), "mean")
    assert bool((low.abs() <= eps * high.abs()).all()), "mean_lo is what mean_hi could not hold"
    assert_within(invstd, ref.invstd, 4 * eps * ref.invstd, "invstd")


@pytest.mark.parametrize("momentum", [0.25, None])
def test_forward_operator_updates_in_place(device: str, momentum: float | None) -> None:
    x = normal((6, 4), device=device, mean=2.0)
    mean, var, counter = torch.zeros(4, device=device), torch.ones(4, device=device), torch.tensor(3, device=device)
    ops.batch_norm_forward(x, None, None, mean, var, counter, momentum, 1e-5)
    factor = 0.25 if momentum is not None else 1 / 4
    assert counter.item() == 4
    torch.testing.assert_close(mean, x.mean(0) * factor)
    torch.testing.assert_close(var, (1 - factor) + x.var(0) * factor)


def test_forward_operator_without_counter_and_momentum_keeps_statistics(device: str) -> None:
    mean, var = normal((4,), device=device), normal((4,), device=device).abs()
    kept = mean.clone(), var.clone()
    ops.batch_norm_forward(normal((6, 4), device=device), None, None, mean, var, None, None, 1e-5)
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


@pytest.mark.parametrize("mask", [list(mask) for mask in itertools.product((True, False), repeat=4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_backward_masks(device: str, dtype: torch.dtype, mask: list[bool]) -> None:
    """What is asked for is the same bits whatever else is asked for; what is not comes back empty."""
    for shape in SHAPES:
        cases = samples(shape, dtype, device)
        for given in cases["batch_norm_backward"]:
            if len(given) == 12:
                continue  # by given sums there are no gradients of parameters
            every = ops.batch_norm_backward(*given[:5], [True] * 4, *given[6:])
            some = ops.batch_norm_backward(*given[:5], mask, *given[6:])
            for part, full, wanted in zip(some, every, mask, strict=True):
                assert torch.equal(part, full) and part.dtype == full.dtype if wanted else part.shape == (0,)


def test_backward_operator(device: str) -> None:
    x, g = normal((3, 4, 5), device=device, mean=1.0), normal((3, 4, 5), device=device, seed=1)
    weight = normal((4,), device=device, seed=2)
    _, saved, _ = ops.batch_norm_forward(x, weight, None, None, None, None, 0.1, 1e-5)
    ref = reference(x, weight, None, g)
    grad_input, grad_weight, grad_bias, grad_residual = ops.batch_norm_backward(g, x, weight, saved, True, [True] * 4)
    assert torch.equal(grad_residual, g), "of a residual behind which nothing follows"
    assert ref.grad_input is not None
    assert_within(grad_input, ref.grad_input, grad_input_tolerance(ref, torch.float32), "grad input")
    assert grad_weight.dtype == grad_bias.dtype == torch.float32


def test_operators_refuse_shapes_that_do_not_fit(device: str) -> None:
    """The kernels trust their arguments, so the operators must not let a wrong size reach them."""
    x, v, w = normal((6, 4), device=device), torch.ones(4, device=device), torch.ones(5, device=device)
    saved, every = torch.ones(6, 4, device=device), [True] * 4
    calls = {
        "weight": lambda: ops.batch_norm_forward(x, w, None, None, None, None, 0.1, 1e-5),
        "bias": lambda: ops.batch_norm_forward(x, None, w, None, None, None, 0.1, 1e-5),
        "running_mean": lambda: ops.batch_norm_forward(x, None, None, w, v, None, 0.1, 1e-5),
        "running_var": lambda: ops.batch_norm_forward(x, None, None, v, w, None, 0.1, 1e-5),
        "one statistic": lambda: ops.batch_norm_forward(x, None, None, v, None, None, 0.1, 1e-5),
        "rank": lambda: ops.batch_norm_forward(x[0], None, None, None, None, None, 0.1, 1e-5),
        "inference mean": lambda: ops.batch_norm_inference(x, None, None, w, v, 1e-5),
        "inference var": lambda: ops.batch_norm_inference(x, None, None, v, w, 1e-5),
        "grad shape": lambda: ops.batch_norm_backward(x[:5], x, v, saved, True, every),
        "saved": lambda: ops.batch_norm_backward(x, x, v, torch.ones(6, 5, device=device), True, every),
        "saved rows": lambda: ops.batch_norm_backward(x, x, v, torch.ones(3, 4, device=device), True, every),
        "backward weight": lambda: ops.batch_norm_backward(x, x, w, saved, True, every),
        "evaluation's grad": lambda: ops.batch_norm_backward(x[:5], x, v, saved, False, every),
        "two kinds of statistics": lambda: ops.batch_norm_forward(x, None, None, v, v, None, 0.1, 1e-5, v, v),
        "one fixed statistic": lambda: ops.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5, v),
        "fixed mean": lambda: ops.batch_norm_forward(x, None, None, None, None, None, 0.1, 1e-5, w, v),
    }
    kept = v.clone()
    for name, call in calls.items():
        assert error_of(call) is not None, name
    assert torch.equal(v, kept)


# ---- torch.compile ----


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False, "track_running_stats": False}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compile_fullgraph(device: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Compiled and eager take the same kernels: the results are the same bits, buffers included."""
    eager = module_for(bn_ext.FusedBatchNorm1d, 4, device, **options)
    traced = module_for(bn_ext.FusedBatchNorm1d, 4, device, **options)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        eager.train(training), traced.train(training)
        results = []
        for call in (eager, compiled):
            x = normal(shape, device=device).requires_grad_()
            out = call(x)
            out.pow(3).sum().backward()
            results.append((out.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for (name, mine), theirs in zip(traced.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(mine, theirs), name
        for mine, theirs in zip(traced.parameters(), eager.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_compile_keeps_up_with_changing_batch_sizes(device: str) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 4, device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 6, 17):
        x = normal((batch, 4), device=device)
        with torch.no_grad():
            assert torch.equal(compiled.train(False)(x), module.train(False)(x))
        check_module(module.train(), x, normal((batch, 4), device=device, seed=1))
