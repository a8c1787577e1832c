"""Random shapes, strides, types and options, each held to the float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, note
from hypothesis import strategies as st

import bn_ext
from reference import reference
from support import DEVICES, FLOATS, LAYOUTS, Step, assert_step, no_cuda_reason, normal

RUNNABLE = DEVICES[:1] if no_cuda_reason() else DEVICES

sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65, 100, 257]))
dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(sorted(LAYOUTS))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(N, C) or (N, C, L) with at least two values per channel and a bounded total."""
    n, c = draw(sizes), draw(sizes)
    shape = (n, c, draw(sizes)) if draw(st.booleans()) else (n, c)
    if n * (shape[2] if len(shape) == 3 else 1) < 2:
        shape = (2, *shape[1:])
    return shape


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Everything that one call of batch_norm depends on."""
    dtype = draw(dtypes)
    training = draw(st.booleans())
    low = dtype in (torch.float16, torch.bfloat16)
    return {
        "shape": draw(shapes()),
        "dtype": dtype,
        "layout": draw(layouts),
        "grad_layout": draw(layouts),
        "training": training,
        "weight": draw(st.none() | dtypes),
        "bias": draw(st.none() | dtypes),
        "stats": draw(st.none() | dtypes) if training else draw(dtypes),
        "mean": draw(st.sampled_from([0.0, 1.0, -30.0] if low else [0.0, 1.0, -30.0, 1e3, -1e5])),
        "std": draw(st.sampled_from([1.0, 0.1, 8.0])),
        "momentum": draw(st.sampled_from([0.1, 0.0, 1.0, 0.625])),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        "seed": draw(st.integers(0, 2**16)),
        "needs": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
    }


def run(call: dict[str, Any], device: str) -> None:
    shape, dtype, seed = call["shape"], call["dtype"], call["seed"]
    channels = shape[1]
    x = LAYOUTS[call["layout"]](normal(shape, dtype, device, mean=call["mean"], std=call["std"], seed=seed))
    g = LAYOUTS[call["grad_layout"]](normal(shape, dtype, device, seed=seed + 1))

    def vector(kind: torch.dtype | None, offset: int) -> torch.Tensor | None:
        return None if kind is None else normal((channels,), kind, device, seed=seed + offset)

    weight, bias = vector(call["weight"], 2), vector(call["bias"], 3)
    running_mean, running_var = vector(call["stats"], 4), vector(call["stats"], 5)
    if running_var is not None:
        running_var = running_var.abs() + 0.25
    ref = reference(
        x, weight, bias, g,
        running_mean=running_mean, running_var=running_var,
        training=call["training"], momentum=call["momentum"], eps=call["eps"],
    )  # fmt: skip

    leaves = {"grad_input": x.detach(), "grad_weight": weight, "grad_bias": bias}
    wanted = {}
    for (key, tensor), needed in zip(leaves.items(), call["needs"], strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
            if needed:
                wanted[key] = tensor
    out = bn_ext.functional.batch_norm(
        leaves["grad_input"], running_mean, running_var, weight, bias,
        call["training"], call["momentum"], call["eps"],
    )  # fmt: skip
    assert out.requires_grad == bool(wanted)
    assert out.stride() == torch.empty_like(x).stride()
    grads = dict(zip(wanted, torch.autograd.grad(out, tuple(wanted.values()), g), strict=True)) if wanted else {}
    for key, grad in grads.items():
        assert grad.dtype == leaves[key].dtype and grad.shape == leaves[key].shape
    result = Step(output=out.detach(), running_mean=running_mean, running_var=running_var, **grads)
    assert_step(result, ref, dtype)


@given(call=calls())
def test_any_call_matches_the_reference(call: dict[str, Any]) -> None:
    note(str(call))
    for device in RUNNABLE:
        run(call, device)


@given(shape=shapes(), dtype=dtypes, layout=layouts, seed=st.integers(0, 2**16))
def test_shift_and_scale_of_the_input_do_not_matter(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int
) -> None:
    """Powers of two are exact: scaling the input (and eps by its square) must not change one bit of the output.

    Both inputs are laid out alike: the order of summation follows the strides.
    """
    x = normal(shape, dtype, seed=seed)
    y = bn_ext.functional.batch_norm(LAYOUTS[layout](x), None, None, training=True, eps=2.0**-10)
    scaled = bn_ext.functional.batch_norm(LAYOUTS[layout](x * 4), None, None, training=True, eps=2.0**-6)
    assert torch.equal(y, scaled)


@given(shape=shapes(), dtype=dtypes, seed=st.integers(0, 2**16))
def test_negated_input_gives_the_negated_output(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = normal(shape, dtype, seed=seed)
    y = bn_ext.functional.batch_norm(x, None, None, training=True)
    assert torch.equal(bn_ext.functional.batch_norm(-x, None, None, training=True), -y)


@given(shape=shapes(), dtype=dtypes, seed=st.integers(0, 2**16))
def test_channels_do_not_mix(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """One channel changed: all others keep every bit, whatever vector lane they share."""
    x = normal(shape, dtype, seed=seed)
    changed = x.clone()
    changed[:, seed % shape[1]] = torch.nan
    y, z = (bn_ext.functional.batch_norm(t, None, None, training=True) for t in (x, changed))
    others = [c for c in range(shape[1]) if c != seed % shape[1]]
    assert torch.equal(y[:, others], z[:, others])
    assert bool(z[:, seed % shape[1]].isnan().all())
