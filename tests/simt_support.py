"""Inputs for the CUDA operators run on the CPU (tests/simt), the regimes to run them in, and how right results are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import (
    Reference,
    acc_eps,
    assert_within,
    output_tolerance,
    reference,
    running_tolerance,
    second_reference,
    stat_eps,
)
from simt import operators
from simt.backend import Backend, backend
from simt.calls import EXCHANGES, Inputs, Pass, Result, exchange_of, walk_of
from simt.operators import library, plan_of, saved_rows
from support import LAYOUTS, assert_gradients, name_of, normal

# Few SMs, and one way each for blocks to meet: clusters, grids, two launches.
H200: dict[str, Any] = {"device": "H200", "sms": 4}
A100: dict[str, Any] = {"device": "A100", "sms": 4}
T4: dict[str, Any] = {"device": "T4", "sms": 4, "cooperative": 0}
MODELS = {"H200": H200, "A100": A100, "T4": T4}
FORWARD, INFERENCE, BACKWARD, INFERENCE_BACKWARD, DOUBLE_BACKWARD = Pass


def ids(value: object) -> str | None:
    """Names of passes, types and regimes in the ids of tests."""
    if isinstance(value, Pass):
        return value.name.lower()
    if isinstance(value, torch.dtype):
        return name_of(value)
    return "-".join(value) if isinstance(value, tuple) and isinstance(value[0], str) else None


def momentum_of(inputs: Inputs) -> float:
    """What the batch weighs in the running statistics."""
    if inputs.momentum is not None:
        return inputs.momentum
    assert inputs.num_batches_tracked is not None
    return 1 / (inputs.num_batches_tracked + 1)


def reference_of(pass_: Pass, inputs: Inputs) -> Reference:
    updates = pass_ not in (Pass.BACKWARD, Pass.DOUBLE_BACKWARD)
    return reference(
        inputs.x, inputs.weight, inputs.bias, inputs.grad_output if pass_.backward else None,
        running_mean=inputs.running_mean if updates else None, running_var=inputs.running_var if updates else None,
        training=pass_.training, momentum=momentum_of(inputs) if pass_ == Pass.FORWARD else 0.0, eps=inputs.eps,
    )  # fmt: skip


def saved_by_exact_forward(inputs: Inputs) -> Tensor:
    """What forward leaves for a backward without an activation."""
    ref, dtype = reference_of(Pass.BACKWARD, inputs), inputs.statistics_dtype
    hi = ref.mean.to(dtype)
    lo = ((ref.mean - hi.double()) + ref.mean_lo).to(dtype)
    return saved_rows(hi, lo, ref.invstd.to(dtype))


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    grad_layout: str | None = None,
    *,
    vectors: torch.dtype | None = torch.float32,
    mean: float = 0.5,
    std: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """Inputs in one of support.LAYOUTS with weight, bias and running statistics of dtype `vectors` (None: none).

    The gradient has a mean and follows the sign of the input a little, so that no sum vanishes.
    """
    plain = normal(shape, dtype, mean=mean, std=std, seed=seed)
    x = LAYOUTS[layout](plain)
    sign = 1 - 2 * (plain < mean).to(dtype)
    g = LAYOUTS[layout if grad_layout is None else grad_layout](
        (normal(shape, torch.float32, mean=0.25, seed=seed + 1) + 0.25 * sign).to(dtype)
    )
    gg = LAYOUTS[layout if grad_layout is None else grad_layout](
        (normal(shape, torch.float32, mean=-0.5, seed=seed + 2) - 0.25 * sign).to(dtype)
    )
    line = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    values = {"weight": 1.25 + 0.5 * line, "bias": 0.3 - line, "running_mean": 0.2 * line + mean,
              "running_var": 1.5 + 0.4 * line, "gg_weight": line + 0.4, "gg_bias": 0.6 - line}  # fmt: skip
    if vectors is not None:
        options = {name: value.to(vectors) for name, value in values.items()} | options
    return Inputs(x, g, gg_input=gg, **options)


# Shapes of growing size by walk.
WALKS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "columns": lambda n: (n | 1, 72),
    "folded": lambda n: (n | 1, 3),
    "by_span": lambda n: (n | 1, 8, 7),
    "planes": lambda n: (5, 2, n + 64 & ~7),
}
REGIMES = list(itertools.product(WALKS, (*EXCHANGES, "grid_pooled")))


def skip_without(*exchanges: str) -> None:
    """Skip the test where blocks are to meet in a way that the backend's kernels do not know."""
    if "cluster" in exchanges and 0 < backend().architecture < 90:
        pytest.skip(f"PTX of sm_{backend().architecture} knows no clusters")


def smallest(
    pass_: Pass, walk: str, exchange: str, dtype: torch.dtype = torch.float32, *, scalar: bool = False
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(shape, options of `run`) of the smallest tensor that an eager planner gives to this regime.

    Searching keeps the tests on their regimes when the planner changes. scalar: tensors that no vector fits.
    """
    skip_without(exchange)
    return _smallest(backend(), pass_, walk, exchange, dtype, scalar)


@functools.cache
def _smallest(
    on: Backend, pass_: Pass, walk: str, exchange: str, dtype: torch.dtype, scalar: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    device = {"cluster": "H200", "two_launches": "T4"}.get(exchange, "A100")
    options = {"device": device, "sms": 16, "cooperative": int(exchange != "two_launches")}
    if exchange != "none":
        options["of"] = library(eager=True, pooled=exchange == "grid_pooled")
    for half_powers in range(10, 34):
        shape = WALKS[walk](int(2 ** (half_powers / 2)))
        plan = plan_of(pass_, shape, dtype, scalar=scalar, **options)
        if (walk_of(plan), exchange_of(plan)) == (walk, exchange):
            return shape, options
    raise AssertionError(f"no tensor of {walk} meets by {exchange} in {pass_.name.lower()}")


def run(pass_: Pass, inputs: Inputs, **options: Any) -> Result:
    """One call, options as of operators.run; without `saved`, backward gets what an exact forward saves."""
    torch.set_num_threads(1)  # the tensors are too small for more to pay; conftest puts the number back
    if pass_ in (Pass.BACKWARD, Pass.DOUBLE_BACKWARD) and options.get("saved") is None:
        options["saved"] = saved_by_exact_forward(inputs)
    return operators.run(pass_, inputs, **options)


def assert_right(pass_: Pass, inputs: Inputs, result: Result) -> None:
    """Every tensor that the call left, within the error model of reference.py."""
    if pass_ == Pass.DOUBLE_BACKWARD:
        assert_second_right(inputs, result)
        return
    ref, dtype = reference_of(pass_, inputs), inputs.x.dtype
    if result.output is not None:
        assert_within(result.output, ref.output, output_tolerance(ref, dtype), "output")
    if result.saved is not None:
        high, low, invstd = result.saved[:3].double()
        std, eps = ref.var.sqrt(), acc_eps(dtype)
        # The pair holds the mean to the square of eps, or to the roundings of a float64 merge.
        merge = (eps * eps + 4 * torch.finfo(torch.float64).eps) * ref.mean.abs()
        assert_within((high - ref.mean) + low, ref.mean_lo, stat_eps(dtype) * std + merge, "saved mean")
        # Half of what the variance may be off by (running_tolerance), and the roundings of a root and a quotient.
        assert_within(invstd, ref.invstd, (2.5 * stat_eps(dtype) + 2 * eps) * ref.invstd, "saved invstd")
    for which, mine in (("mean", result.running_mean), ("var", result.running_var)):
        if mine is not None:
            right = ref.running_mean if which == "mean" else ref.running_var
            assert right is not None
            assert_within(mine, right, running_tolerance(ref, which, dtype, mine.dtype), f"running {which}")
    if pass_ == Pass.FORWARD and inputs.num_batches_tracked is not None:
        assert result.num_batches_tracked == inputs.num_batches_tracked + 1
    assert_gradients(result, ref, dtype)
    assert len(result.launches) == result.plan["launches"]


def assert_second_right(inputs: Inputs, result: Result) -> None:
    assert inputs.grad_output is not None
    arriving = inputs.gg_input, inputs.gg_weight, inputs.gg_bias
    right = second_reference(inputs.x, inputs.weight, inputs.grad_output, arriving, eps=inputs.eps)
    names = ("grad_grad_output", "grad_input", "grad_weight")
    for name, tolerance in zip(names, right.tolerances, strict=True):
        if (mine := getattr(result, name)) is not None:
            assert_within(mine, getattr(right, name), tolerance, name)
    assert len(result.launches) == result.plan["launches"]


def check(pass_: Pass, inputs: Inputs, **options: Any) -> Result:
    """Run one call (options as of `run`), hold it to the reference, return it."""
    result = run(pass_, inputs, **options)
    assert_right(pass_, inputs, result)
    return result
