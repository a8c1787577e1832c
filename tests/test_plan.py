"""What a build decides: CUDA or not, for which GPUs, what the wheel says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from processes import ROOT, made_toolkit

sys.path.insert(0, str(ROOT / "buildtools"))
import locate_torch
import plan
import toolkit


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.10.0+cu128", True), ("1.13.1", True), ("2.11.0", False), ("2.13.0+cpu", False), ("3.0.0a0+git1", False)],
)
def test_oldest_torch(version: str, old: bool) -> None:
    assert locate_torch.too_old(version) is old


@pytest.mark.parametrize(
    ("environ", "torch_cuda", "nvcc", "wanted", "reason"),
    [
        ({}, "13.0", (13, 0), True, "nvcc 13.0"),
        ({}, "12.8", (12, 6), True, "nvcc 12.6"),
        ({"FORCE_CUDA": "1"}, "13.0", (13, 0), True, "nvcc 13.0"),
        ({"FORCE_CPU": "1"}, "13.0", (13, 0), False, "FORCE_CPU"),
        ({"FORCE_CPU": "0"}, "13.0", (13, 0), True, "nvcc"),
        ({}, None, (13, 0), False, "build without CUDA"),
        ({}, "13.0", None, False, "no toolkit"),
        ({}, "12.8", (13, 0), False, "nvcc in /toolkit is of CUDA 13.0"),
    ],
)
def test_cuda_or_cpu(
    environ: dict[str, str], torch_cuda: str | None, nvcc: tuple[int, int] | None, wanted: bool, reason: str
) -> None:
    found = toolkit.Toolkit(Path("/toolkit"), nvcc, Path("/toolkit/include")) if nvcc else toolkit.Missing("no toolkit")
    decision = plan.decide_cuda(environ, "2.13.0", torch_cuda, found)
    assert decision.wanted is wanted
    assert reason in decision.reason
    if not wanted and "FORCE_CPU" not in environ:
        with pytest.raises(plan.Cannot, match=r"^bn_ext cannot be built: FORCE_CUDA is set, but .*\.$"):
            plan.decide_cuda({"FORCE_CUDA": "1"}, "2.13.0", torch_cuda, found)


@pytest.mark.parametrize(
    ("version", "cuda", "stamped"),
    [
        ("2.14.1+cu130", "13.0", ("torch2.14cu130", "torch==2.14.*")),
        ("2.11.0", "13.0", ("torch2.11cu130", "torch==2.11.*")),
        ("2.13.0+cpu", None, ("torch2.13cpu", "torch==2.13.*")),
        ("2.14.1+cu126", "12.6", ("torch2.14cpu", "torch==2.14.*")),  # this toolkit is of 13.0
        ("2.15.0.dev20261101+cpu", None, ("torch2.15.0.dev20261101cpu", "torch==2.15.0.dev20261101")),
        ("2.15.0a0+git12ab", None, ("torch2.15.0a0cpu", "torch==2.15.0a0")),
    ],
)
def test_stamp_of_a_wheel(version: str, cuda: str | None, stamped: tuple[str, str], tmp_path: Path) -> None:
    environ = {"CUDA_HOME": str(made_toolkit(tmp_path)), "PATH": ""}
    assert plan.stamp(environ, locate_torch.TorchLocation(version, cuda, [])) == stamped


@pytest.mark.parametrize(
    ("wish", "arch_list", "codes"),
    [
        ("9.0", "9.0", "sm_90"),
        ("8.0;9.0a+PTX", "8.0;9.0a+PTX", "sm_80,sm_90a,compute_90a"),
        ("7.0 7.5 10.0+PTX", "7.5;10.0+PTX", "sm_75,sm_100,compute_100"),
        ("Hopper;7.5", "7.5;9.0+PTX", "sm_75,sm_90,compute_90"),
        ("6.0 7.0", None, "the kernels need 7.5"),
        ("10.3", None, "nvcc 13.0 does not know"),
    ],
)
def test_architectures(
    wish: str, arch_list: str | None, codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    if "9.0a+PTX" in wish:
        flags = [f"-gencode=arch=compute_{a},code={b}" for a, b in (("80", "sm_80"), ("90a", "sm_90a"))]
        flags.append("-gencode=arch=compute_90a,code=compute_90a")
    else:
        flags = cpp_extension._get_cuda_arch_flags([])
    found = toolkit.examine(made_toolkit(tmp_path))
    assert isinstance(found, toolkit.Toolkit)
    if arch_list is None:
        with pytest.raises(plan.Cannot, match=codes):
            plan.architectures({"TORCH_CUDA_ARCH_LIST": wish}, flags, found)
    else:
        listed, built = plan.architectures({}, flags, found)
        assert (listed, built) == (arch_list, codes)


@pytest.mark.parametrize(("nvcc", "newest"), [((12, 6), "90"), ((12, 8), "120"), ((13, 0), "120")])
def test_default_archs_are_understood_by_torch(
    nvcc: tuple[int, int], newest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", plan.default_arch_list(nvcc))
    flags = cpp_extension._get_cuda_arch_flags([])
    assert f"-gencode=arch=compute_{newest},code=sm_{newest}" in flags
    assert f"-gencode=arch=compute_{newest},code=compute_{newest}" in flags
    assert "-gencode=arch=compute_75,code=sm_75" in flags


def test_flags_keep_the_library_portable() -> None:
    setup = (ROOT / "setup.py").read_text()
    for flag in ("-march", "-mtune", "fast-math", "-std=", "gomp", "-Ofast"):
        assert f'"{flag}' not in setup
