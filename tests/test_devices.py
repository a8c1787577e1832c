"""Which GPUs run our kernels, and what is said where they do not. No GPU is needed."""

from __future__ import annotations

import warnings

import pytest
import torch

import bn_ext
from bn_ext import _C, devices

RULES = [
    ("sm_90", 90, True), ("sm_90", 80, False), ("sm_90", 100, False), ("sm_90", 91, True),
    ("sm_80", 86, True), ("sm_86", 80, False), ("sm_80", 90, False),
    ("sm_80,compute_80", 90, True), ("sm_80,compute_80", 120, True), ("compute_80", 75, False),
    ("sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120", 70, False),
    ("sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120", 89, True),
    ("sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120", 110, False),
    ("sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120", 121, True),
    ("sm_90a", 90, True), ("sm_100a", 103, False), ("compute_90a", 100, False),
    ("sm_100f", 103, True), ("compute_100f", 103, True), ("compute_100f", 120, False),
    ("", 90, False),
]  # fmt: skip


@pytest.mark.parametrize(("codes", "capability", "runs"), RULES)
def test_what_code_runs_where(codes: str, capability: int, runs: bool) -> None:
    assert _C.runs_on(codes, capability) is runs


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A machine whose GPUs have the capabilities in the list, with a library for sm_90 and sm_80 with PTX of none."""
    there = [(9, 0), (8, 0), (8, 6), (7, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there[torch.device(device).index])
    monkeypatch.setattr(devices, "_answers", {})
    monkeypatch.setattr(devices, "_warned", False)
    monkeypatch.setattr(devices, "_RECORD", {**devices._RECORD, "cuda": True, "cuda_codes": "sm_86,sm_90"})
    return there


def test_each_gpu_is_asked_for_itself_and_warned_of_once(gpus: list[tuple[int, int]]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [devices.kernels_on(torch.device("cuda", index)) for index in range(len(gpus)) for _ in range(2)]
    assert answers[::2] == answers[1::2] == [True, False, True, False, False]
    (warning,) = said
    assert "it was built for sm_86,sm_90, which a GPU of compute capability 8.0 does not run" in str(warning.message)
    assert "type: TORCH_CUDA_ARCH_LIST=8.0 pip install" in str(warning.message)


def test_a_gpu_that_no_build_runs_on(gpus: list[tuple[int, int]]) -> None:
    with pytest.warns(UserWarning, match=r"need compute capability 7\.5 or later, and this GPU has 7\.0"):
        assert not devices.kernels_on(torch.device("cuda", 3))


def test_a_build_without_cuda_says_why_and_what_to_type(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {**devices._RECORD, "cuda": False, "cuda_reason": "no whole CUDA toolkit was found"}
    monkeypatch.setattr(devices, "_RECORD", record)
    with pytest.warns(UserWarning, match=r"without CUDA kernels \(no whole CUDA toolkit was found\).*pip install"):
        assert not devices.kernels_on(torch.device("cuda", 0))


def test_no_gpu_here_but_a_build_for_some(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export shows tensors of a GPU that is elsewhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.kernels_on(torch.device("cuda", 3))


def test_other_devices() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.kernels_on(torch.device("cpu"))
        assert devices.kernels_on(torch.device("meta"))
        assert not devices.kernels_on(torch.device("mps"))


def test_an_operator_that_refuses_its_gpu_leaves_the_call_to_torch(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eagerly nobody asks before the call: the operator raises before it changes anything, and torch's own runs."""
    monkeypatch.setattr(bn_ext.dispatch, "kernels_on", lambda device: False)

    def refuse(*args: object) -> None:  # as csrc/torch/cuda_ops.cpp does it
        raise NotImplementedError("bn_ext was built for sm_90, which does not run on a GPU of compute capability 8.0")

    monkeypatch.setattr(bn_ext.dispatch, "_eager", refuse)
    ours, native = bn_ext.FusedBatchNorm1d(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    assert torch.equal(ours(x), native(x))
    assert torch.equal(ours.running_var, native.running_var)
    assert int(ours.num_batches_tracked) == 1
