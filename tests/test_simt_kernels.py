"""The CUDA kernels, run on the CPU (tests/simt), against the float64 reference: every regime of every pass by name,
every layout, every type, every option.

A regime is how the plan walks the tensor and how blocks that share a channel meet. Few SMs and little shared memory
make the regimes of large tensors appear with small ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from simt.backend import backend
from simt.calls import DTYPES, Pass
from simt.operators import broken
from simt_support import (
    A100,
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    H200,
    INFERENCE,
    INFERENCE_BACKWARD,
    MODELS,
    REGIMES,
    T4,
    WALKS,
    check,
    ids,
    make,
    smallest,
)
from support import LAYOUTS, name_of

REDUCING = (FORWARD, BACKWARD, INFERENCE_BACKWARD, DOUBLE_BACKWARD)
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


# ---- regimes ----


@pytest.mark.parametrize(
    ("regime", "scalar"),
    [
        pytest.param(regime, scalar, id=f"{'-'.join(regime)}-{'scalar' if scalar else 'vector'}")
        for regime, scalar in itertools.product(REGIMES, (False, True))
        if not (scalar and regime[0] == "folded")  # rows are joined for vectors only
    ],
)
@pytest.mark.parametrize("pass_", REDUCING, ids=ids)
def test_regime(pass_: Pass, regime: tuple[str, str], scalar: bool) -> None:
    shape, model = smallest(pass_, *regime, scalar=scalar)
    result = check(pass_, make(shape, layout="misaligned" if scalar else "contiguous"), **model)
    assert result.regime == regime
    assert (result.plan["vector"] == 1) == scalar


@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("wants", [None, (True, False, False)], ids=["inference", "inference_backward_input"])
def test_regime_without_reduction(wants: tuple[bool, bool, bool] | None, walk: str, scalar: bool) -> None:
    """Outputs that no sum is needed for; x is not read where only its gradient is wanted."""
    walk = "columns" if scalar and walk == "folded" else walk
    pass_ = INFERENCE if wants is None else INFERENCE_BACKWARD
    for n in (30, 1000):
        inputs = make(WALKS[walk](n), layout="misaligned" if scalar else "contiguous", wants=wants or (True,) * 3)
        result = check(pass_, inputs, **H200)
        assert result.regime == (walk, "none")
        assert (result.plan["vector"] == 1) == scalar
        assert result.counted("x", "read_bytes") == (0 if wants else inputs.x.nbytes)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=ids)
@pytest.mark.parametrize("regime", REGIMES, ids=ids)
@pytest.mark.parametrize("pass_", REDUCING, ids=ids)
def test_regime_of_other_types(pass_: Pass, regime: tuple[str, str], dtype: torch.dtype) -> None:
    shape, model = smallest(pass_, *regime, dtype)
    assert check(pass_, make(shape, dtype), **model).regime == regime


@pytest.mark.parametrize("room", ["nothing_kept", "some_kept", "all_kept"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, DOUBLE_BACKWARD], ids=ids)
def test_rows_kept_on_chip(pass_: Pass, walk: str, room: str) -> None:
    """Shared memory for none of the rows, for some, for all."""
    inputs = make(WALKS[walk](900 if pass_ == DOUBLE_BACKWARD else 1400))  # all that all can keep
    kilobytes = {"nothing_kept": 20, "some_kept": 34, "all_kept": 227}[room]
    shared = {"shared_per_block": kilobytes << 10, "shared_per_sm": kilobytes << 11}
    plan = check(pass_, inputs, device="A100", sms=2, **shared).plan
    fits = plan["kept"] * plan["ty"] >= plan["split_rows"]
    assert room == ("nothing_kept" if plan["kept"] == 0 else "all_kept" if fits else "some_kept"), plan


# ---- layouts ----


@pytest.mark.parametrize("shape", [(6, 5), (37, 19), (4, 5, 3), (3, 17, 70), (9, 8, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_layout(pass_: Pass, layout: str, shape: tuple[int, ...]) -> None:
    """Of the input, of grad_output, and of both: sliced, permuted, expanded, overlapping, misaligned."""
    for own, other in ((layout, layout), (layout, "contiguous"), ("contiguous", layout))[: 3 if pass_.backward else 1]:
        check(pass_, make(shape, layout=own, grad_layout=other), **H200)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=ids)
@pytest.mark.parametrize("layout", ["permuted", "sliced_last", "misaligned", "misaligned_3", "expanded_batch"])
def test_layout_of_other_types(layout: str, dtype: torch.dtype) -> None:
    for pass_, shape in itertools.product(Pass, ((37, 24), (3, 17, 72))):
        check(pass_, make(shape, dtype, layout), **A100)


@pytest.mark.parametrize(
    "shape",
    [
        *((2, 1), (3, 1), (4001, 1), (2, 1, 1), (1, 1, 2), (4, 1, 333)),
        *((1, 3, 4001), (1, 300, 2), (2, 700), (2, 1025), (5, 2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_extreme_shape(pass_: Pass, shape: tuple[int, ...]) -> None:
    for model in (H200, A100, T4):
        check(pass_, make(shape), **model)


@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_sizes_around_every_multiple(pass_: Pass) -> None:
    """One more and one less row than threads, vectors, tiles or splits hold: tails of every length."""
    for c, n in itertools.product((3, 4, 7, 8, 64), (*range(2, 20), 31, 33, 63, 65, 127, 255, 257)):
        check(pass_, make((n, c)), device="H200", sms=2)


# ---- types and options ----


@pytest.mark.parametrize("vectors", [None, *DTYPES], ids=lambda d: "none" if d is None else name_of(d))
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_types_of_parameters_and_statistics(pass_: Pass, vectors: torch.dtype | None) -> None:
    for dtype in DTYPES:
        inputs = make((70, 12), dtype, vectors=vectors)
        if vectors is None and not pass_.training:
            inputs.running_mean, inputs.running_var = torch.zeros(12), torch.ones(12)
        check(pass_, inputs, **H200)


@pytest.mark.parametrize(
    ("pass_", "missing"),
    [
        *itertools.product(Pass, (("weight",), ("bias",), ("weight", "bias"))),
        (FORWARD, ("running_mean", "running_var")),
    ],
    ids=ids,
)
def test_missing_vectors(pass_: Pass, missing: tuple[str, ...]) -> None:
    check(pass_, make((70, 12), **dict.fromkeys(missing)), **H200)


@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_strided_vectors_of_mixed_types(pass_: Pass) -> None:
    """Every third entry of a longer vector, none of the others read or written."""
    inputs = make((70, 12))
    names = ("weight", "bias", "running_mean", "running_var")
    for name, kind in zip(names, (torch.bfloat16, torch.float64, torch.float16, torch.float64), strict=True):
        wide = torch.full((12, 3), torch.nan, dtype=kind)
        wide[:, 0] = getattr(inputs, name)
        setattr(inputs, name, wide[:, 0])
    check(pass_, inputs, **H200)


@models
@pytest.mark.parametrize(
    ("momentum", "batches"),
    [(0.1, None), (0.1, 0), (0.0, 6), (1.0, None), (1.5, 6), (None, 0), (None, 6), (None, -5), (None, 2**38)],
    ids=lambda v: f"{v}",
)
def test_momentum_and_counter(momentum: float | None, batches: int | None, model: dict[str, Any]) -> None:
    """Many channels make many blocks, of which each needs the factor and one sets the counter."""
    for shape in ((9, 700), (2001, 12)):
        result = check(FORWARD, make(shape, momentum=momentum, num_batches_tracked=batches), **model)
        assert result.num_batches_tracked == (None if batches is None else batches + 1)


@models
@pytest.mark.parametrize("wants", [w for w in itertools.product((True, False), repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("pass_", [BACKWARD, INFERENCE_BACKWARD, DOUBLE_BACKWARD], ids=ids)
def test_only_some_gradients(pass_: Pass, wants: tuple[bool, bool, bool], model: dict[str, Any]) -> None:
    for shape in ((600, 68), (5, 3, 701)):
        result = check(pass_, make(shape, wants=wants), **model)
        last = result.grad_grad_output if pass_ == DOUBLE_BACKWARD else result.grad_bias
        found = [g is not None for g in (result.grad_input, result.grad_weight, last)]
        assert found == list(wants)


def test_backward_takes_what_forward_saved() -> None:
    for dtype, mean in itertools.product(DTYPES, (0.0, 40.0)):
        inputs = make((501, 20), dtype, mean=mean)
        check(BACKWARD, inputs, saved=check(FORWARD, inputs, **H200).saved, **H200)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 2.0])
@pytest.mark.parametrize("pass_", Pass, ids=ids)
def test_eps(pass_: Pass, eps: float) -> None:
    check(pass_, make((64, 8), eps=eps), **H200)


@pytest.mark.parametrize("variance", [3e38, 1e-42])
def test_variances_beyond_normal_floats(variance: float) -> None:
    inputs = make((64, 8), eps=1e-44)
    assert inputs.running_var is not None
    inputs.running_var.fill_(variance)
    inputs.x *= variance**0.5
    check(INFERENCE, inputs, **H200)


def test_strides_that_reach_beyond_32_bits() -> None:
    """Offsets of more than 2^31 elements, in memory that is mapped but not there."""
    inputs = make((3, 24))
    for name in ("x", "grad_output"):
        far = torch.empty(2**31 + 24).as_strided((3, 24), (2**30, 1))
        setattr(inputs, name, far.copy_(getattr(inputs, name)))
    for pass_ in Pass:
        check(pass_, inputs, **H200)


# ---- the tests bite ----


def test_a_removed_barrier_shows() -> None:
    """Without one of its barriers the kernel gives wrong results under some schedule."""
    if backend().architecture:
        pytest.skip("g++ builds this one; test_ptx_faults.py plants PTX's")
    library = broken("    __syncthreads();  // the threads' partial results are written\n")
    inputs = make((256, 72))
    wrong = 0
    for seed in range(4):
        try:
            check(FORWARD, inputs, seed=seed, of=library, **H200)
        except AssertionError:
            wrong += 1
    assert wrong > 0
