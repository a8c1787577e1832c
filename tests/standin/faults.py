"""Plant faults in the glue, each in a library of its own, and say whether the tests on the stand-in find them.

Run by `make test-cuda-standin FAULTS=1`; the library is linked from the objects that the build left.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from standin import build

SOURCE = "csrc/torch/cuda_ops.cpp"
TESTS = ("test_cuda_standin.py", "test_cuda.py", "test_renorm.py")


class Fault(NamedTuple):
    """text is replaced by other in the glue; pytest's -k chooses the tests that must not all pass then."""

    text: str
    other: str
    tests: str


FAULTS = {
    "the guard is of the first device": Fault(
        "CUDAGuard(input.device())", "CUDAGuard(c10::Device(c10::kCUDA, 0))", "second_device"
    ),
    "launches go to the default stream": Fault(
        "launch(args, plan, memory, c10::cuda::getCurrentCUDAStream(input.get_device()))",
        "launch(args, plan, memory, c10::cuda::getDefaultCUDAStream(input.get_device()))",
        "current_stream or stream_of_the_forward",
    ),
    "padded batches go to the default stream": Fault(
        "const auto stream = c10::cuda::getCurrentCUDAStream(", "const auto stream = c10::cuda::getDefaultCUDAStream(",
        "current_stream",
    ),
    "the workspace is too small": Fault(
        "at::empty({plan.workspace_bytes}", "at::empty({plan.workspace_bytes - 256}", "grid_that_no_longer"
    ),
    "a launch waits": Fault(
        "  C10_CUDA_CHECK(error);\n}",
        "  C10_CUDA_CHECK(error);\n  c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream());\n}",
        "no_call_waits and 32-64 or no_call_waits and 64",
    ),
    "no second plan where the grid does not fit": Fault(
        "error == cudaErrorCooperativeLaunchTooLarge && device.cooperative", "false", "grid_that_no_longer"
    ),
    "a GPU without code is not refused": Fault(
        "runs_on(built_codes(), device.capability)", "true", "no_code_for"
    ),
}  # fmt: skip


def command_of(ninja: str, kept: Path, source: Path, target: Path) -> list[str]:
    """The build's own command for the glue, with another source."""
    variables = dict(re.findall(r"^(\w+) = (.*)$", ninja, re.M))
    flags = variables["cflags"].split() + variables["post_cflags"].split()
    return [variables["cxx"], *flags, f"-I{kept.parent}", "-c", str(source), "-o", str(target)]


def planted(copy: Path, fault: Fault, folder: Path) -> Path:
    """A folder with a package whose library has the fault."""
    import bn_ext

    kept = copy / SOURCE
    text = kept.read_text()
    assert text.count(fault.text) == 1, f"{fault.text} is not once in {SOURCE}"
    (ninja,) = copy.glob("build/temp.*/build.ninja")
    source, target = folder / "cuda_ops.cpp", folder / "cuda_ops.o"
    source.write_text(text.replace(fault.text, fault.other))
    subprocess.run(command_of(ninja.read_text(), kept, source, target), check=True, capture_output=True)
    objects = [p for p in ninja.parent.rglob("*.o") if p.name != "cuda_ops.o"]
    installed = Path(bn_ext.__file__).parent
    shutil.copytree(installed, folder / "bn_ext", ignore=shutil.ignore_patterns("__pycache__"))
    library = folder / "bn_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    lib = Path(torch.__file__).parent / "lib"
    wanted = ("c10", "torch", "torch_cpu", "torch_python", "c10_cuda", "torch_cuda")
    link = [
        "c++",
        "-shared",
        *map(str, objects),
        str(target),
        "-o",
        str(library),
        f"-L{lib}",
        *(f"-l{n}" for n in wanted),
    ]
    link += [str(build.build()[0])]
    subprocess.run(link, check=True, capture_output=True)
    return folder


def found(package: Path, fault: Fault) -> bool:
    """Whether a test fails with it, and all of them passed before it."""
    variables = {**build.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "standin.plugin",
        "-p",
        "no:cacheprovider",
        "-k",
        fault.tests,
    ]

    def status(path: str) -> int:
        environment = {**variables, "PYTHONPATH": path + variables["PYTHONPATH"]}
        return subprocess.run(
            [*command, *TESTS], cwd=build.HERE.parent, env=environment, capture_output=True, check=False
        ).returncode

    return (status(""), status(f"{package}{os.pathsep}")) == (0, 1)


def main() -> int:
    copy = build.nvcc.ROOT / "build" / f"torch-{torch.__version__.split('+')[0]}"
    missed = 0
    for name, fault in FAULTS.items():
        folder = build.CACHE / "standin_fault"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        seen = found(planted(copy, fault, folder), fault)
        print(f"{'found' if seen else 'MISSED'}: {name}", flush=True)
        missed += not seen
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} planted faults found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
