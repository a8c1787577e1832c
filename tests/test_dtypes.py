"""Element types: the four floats, every mix of input, parameter and statistics types, and autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bn_ext
from reference import assert_within, output_tolerance, reference, running_tolerance, ulp
from support import FLOATS, LAYOUTS, Step, assert_step, check_module, error_of, module_for, name_of, normal, step

SHAPES = ((33, 7), (5, 7, 11))


@pytest.mark.isa
@pytest.mark.parametrize("params", [torch.float32, None], ids=["float32_params", "same_params"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_usual_types(
    device: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, params: torch.dtype | None
) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 7, device, dtype=params or dtype)
    for training in (True, False):
        x = LAYOUTS[layout](normal(shape, dtype, device, mean=1.5))
        result = check_module(module.train(training), x, normal(shape, dtype, device, seed=1))
        assert result.grad_weight is not None and result.grad_weight.dtype == module.weight.dtype
        assert result.running_mean is not None and result.running_mean.dtype == module.weight.dtype


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_every_mix_of_types(device: str, dtype: torch.dtype, training: bool) -> None:
    """All 64 triples of weight, bias and statistics types for each input type; native allows only a few of them."""
    x, g = normal((9, 5), dtype, device, mean=0.5), normal((9, 5), dtype, device, seed=1)
    allowed = 0
    for w, b, s in itertools.product(FLOATS, repeat=3):
        given = {
            "running_mean": normal((5,), s, device, seed=2),
            "running_var": normal((5,), s, device, seed=3).abs() + 0.5,
            "weight": normal((5,), w, device, seed=4).requires_grad_(),
            "bias": normal((5,), b, device, seed=5).requires_grad_(),
        }
        theirs = {k: v.detach().clone() for k, v in given.items()}
        native_error = error_of(lambda t=theirs: F.batch_norm(x, training=training, **t))
        allowed += native_error is None
        ref = reference(x, given["weight"], given["bias"], g, running_mean=given["running_mean"],
                        running_var=given["running_var"], training=training)  # fmt: skip
        leaf = x.clone().requires_grad_()
        out = bn_ext.functional.batch_norm(leaf, training=training, **given)
        grads = torch.autograd.grad(out, (leaf, given["weight"], given["bias"]), g)
        assert grads[1].dtype == w and grads[2].dtype == b
        assert_step(Step(out, *grads, given["running_mean"], given["running_var"]), ref, dtype)
    if device == "cpu":
        assert allowed >= (1 if dtype in (torch.float64, torch.float32) else 2), "native's own mixes were not reached"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_module_in_one_type_and_input_in_another(device: str, dtype: torch.dtype, training: bool) -> None:
    for stored in FLOATS:
        module = module_for(bn_ext.FusedBatchNorm1d, 5, device, dtype=stored).train(training)
        check_module(module, normal((4, 5, 3), dtype, device), normal((4, 5, 3), dtype, device, seed=1))


@pytest.mark.isa
@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_low_precision_within_one_ulp_of_the_rounded_result(device: str, dtype: torch.dtype, mean: float) -> None:
    """Storage is the only thing that may be low: output within 1 ulp of the float64 result rounded to the type. Where
    the affine map cancels to near zero the float32 arithmetic in front of it shows: 8 float32 eps of its two terms."""
    for shape in ((2048, 6), (16, 6, 128)):
        x, g = normal(shape, dtype, device, mean=mean), normal(shape, dtype, device, seed=1)
        for params in (torch.float32, dtype):
            module = module_for(bn_ext.FusedBatchNorm1d, 6, device, dtype=params)
            ref = reference(x, module.weight, module.bias, g, running_mean=module.running_mean,
                            running_var=module.running_var)  # fmt: skip
            result = step(module, x, g)
            assert result.output is not None and result.grad_input is not None
            rounded = ref.output.to(dtype).double()
            scaled = ref.normalized * ref.weight.reshape((1, -1) + (1,) * (x.dim() - 2))
            slack = 8 * torch.finfo(torch.float32).eps * (scaled.abs() + (ref.output - scaled).abs())
            assert_within(result.output, rounded, ulp(rounded, dtype) + slack, "output")
            assert_step(result, ref, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_pure_low_precision_module_keeps_float32_statistics_inside(device: str, dtype: torch.dtype) -> None:
    """N * var is above 65504, the mean far from a bfloat16 neighbour: low-precision saved statistics would show."""
    x = normal((40_000, 3), dtype, device, mean=30.0, std=10.0)
    module = module_for(bn_ext.FusedBatchNorm1d, 3, device, dtype=dtype)
    ref = reference(x, module.weight, module.bias, running_mean=module.running_mean, running_var=module.running_var)
    result = step(module, x)
    assert result.output is not None and result.running_var is not None
    assert_within(result.output, ref.output, output_tolerance(ref, dtype), "output")
    assert ref.running_var is not None
    assert_within(result.running_var, ref.running_var, running_tolerance(ref, "var", dtype, dtype), "running var")


def test_float16_output_overflows_to_infinity_as_native(device: str) -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0]], device=device, dtype=torch.float16)
    outs = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        module = cls(1, device=device)
        with torch.no_grad():
            module.weight.fill_(60_000.0)
        outs.append(module(x))
    assert torch.equal(outs[0].isinf(), outs[1].isinf()) and outs[1].isinf().any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(device: str, low: torch.dtype, training: bool) -> None:
    """Under autocast the linear layer hands over a low-precision tensor; batch norm runs in that type."""
    x = normal((16, 6), device=device)
    results = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        torch.manual_seed(0)
        linear = nn.Linear(6, 5).to(device)
        module = module_for(cls, 5, device).train(training)
        with torch.autocast(torch.device(device).type, dtype=low):
            hidden = linear(x)
            out = module(hidden)
            plain = module(x[:, :5])
        assert hidden.dtype == low
        assert plain.dtype == torch.float32
        out.float().square().sum().backward()
        results.append((out, linear.weight.grad, module.weight.grad, module.running_mean))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
    ours, native = results[0][0].double(), results[1][0].double()
    # Both round a result that is right to float32 once: at most one ulp apart, plus one for native's own error.
    assert_within(ours, native, 2 * ulp(native.abs().clamp(min=2**-6), low), "output under autocast")
