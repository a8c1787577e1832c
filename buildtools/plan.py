"""What setup.py decides: CPU or CUDA, compiler, flags, number of jobs. Plain functions, so that tests reach them."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Cannot(SystemExit):
    """The build cannot go on; its one sentence is all that the user sees."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"bn_ext cannot be built: {sentence}")


class Cuda(NamedTuple):
    """Whether CUDA kernels are built, and why (not)."""

    wanted: bool
    reason: str


def _switch(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() not in ("", "0", "no", "off", "false")


def nvcc_version(cuda_home: str | None) -> tuple[int, int] | None:
    """Return (major, minor) of the nvcc in cuda_home, or None where there is no working one."""
    if not cuda_home:
        return None
    nvcc = Path(cuda_home) / "bin" / "nvcc"
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def decide_cuda(
    environ: Mapping[str, str],
    torch_version: str,
    torch_cuda: str | None,
    nvcc: tuple[int, int] | None,
    have_sources: bool,
) -> Cuda:
    """Decide whether to build the CUDA kernels.

    torch_cuda is torch.version.cuda and nvcc the compiler's (major, minor). What the machine's driver or GPU says plays
    no part: wheels are built on machines without one. Raises Cannot where FORCE_CUDA asks for what is not to be had.
    """
    force = _switch(environ, "FORCE_CUDA")
    if _switch(environ, "FORCE_CPU"):
        if force:
            raise Cannot("FORCE_CUDA and FORCE_CPU are both set, unset one of them.")
        return Cuda(False, "FORCE_CPU was set at build")
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    elif not have_sources:
        reason = "this version of bn_ext has no CUDA kernels"
    elif nvcc is None:
        reason = f"no nvcc was found for torch's CUDA {torch_cuda}, neither in CUDA_HOME nor on PATH"
    elif nvcc[0] != int(torch_cuda.split(".")[0]):
        reason = f"nvcc is of CUDA {nvcc[0]}.{nvcc[1]}, torch {torch_version} of CUDA {torch_cuda}"
    else:
        return Cuda(True, f"built with nvcc {nvcc[0]}.{nvcc[1]} for torch's CUDA {torch_cuda}")
    if force:
        raise Cannot(f"FORCE_CUDA is set, but {reason}.")
    return Cuda(False, reason)


class Settled(NamedTuple):
    """What a build starts from: the C++ compiler's command, nvcc's (major, minor) or None, CUDA or not."""

    compiler: list[str]
    nvcc: tuple[int, int] | None
    cuda: Cuda


def settle(environ: Mapping[str, str], have_cuda_sources: bool) -> Settled:
    """Look for all that a build needs; raise Cannot, in one sentence, for the first thing that is missing."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise Cannot(
            f'torch cannot be imported ({error}), type pip install "torch>=2.11" and then try again.'
        ) from error
    compiler = find_compiler(environ)
    check_python_headers()
    nvcc = nvcc_version(cpp_extension.CUDA_HOME)
    return Settled(compiler, nvcc, decide_cuda(environ, torch.__version__, torch.version.cuda, nvcc, have_cuda_sources))


def default_arch_list(nvcc: tuple[int, int]) -> str:
    """Return a TORCH_CUDA_ARCH_LIST for a machine that shows no GPU: one binary per generation, PTX for later ones."""
    archs = ["7.5", "8.0", "8.6", "9.0"]  # 8.6 runs on 8.9 as it is
    if nvcc >= (12, 8):
        archs += ["10.0", "12.0"]
    return ";".join(archs) + "+PTX"


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """Return the C++ compiler's command: CXX, else the first of c++, g++, clang++ on PATH. Raises Cannot."""
    path = environ.get("PATH")
    if environ.get("CXX"):
        command = shlex.split(environ["CXX"])
        if shutil.which(command[0], path=path):
            return command
        raise Cannot(f"CXX names the C++ compiler {command[0]}, which is not there.")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path):
            return [name]
    raise Cannot("there is no C++ compiler on PATH, install g++ (Debian, Ubuntu: apt install g++) or set CXX.")


def check_python_headers() -> None:
    """Raise Cannot where Python.h is missing, as it is until the distribution's development package is installed."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        major, minor = sys.version_info[:2]
        raise Cannot(f"{header} is missing, install Python's headers (apt install python{major}.{minor}-dev).")


def compiler_name(command: list[str]) -> str:
    """Return the first line that the compiler says of itself."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0].strip() if said else " ".join(command)


def openmp_flags(torch: ModuleType, compiler: str) -> list[str]:
    """Return the compile flags that make at::parallel_for use the threads of torch's own OpenMP runtime, or none.

    Nothing is added to the link: the calls that the compiler makes are bound, when the library is loaded, to the
    runtime that libtorch_cpu needs, so that there can be no second one. That holds only if that runtime knows them.
    """
    if not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info():
        return []
    entry = "__kmpc_fork_call" if "clang" in compiler.lower() else "GOMP_parallel"
    library = Path(str(torch.__file__)).parent / "lib" / "libtorch_cpu.so"
    try:
        known = hasattr(ctypes.CDLL(str(library)), entry)
    except OSError:
        known = False
    if not known:
        print(f"bn_ext: torch's OpenMP runtime does not fit {compiler}: the kernels will run on one thread", flush=True)
    return ["-fopenmp"] if known else []


def default_jobs(with_cuda: bool) -> int:
    """Return how many compilers fit this machine at once: one a core, and 2 GiB (nvcc: 4 GiB) of free memory each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 if available else free
    except (OSError, ValueError, AttributeError):
        return cores
    return max(1, min(cores, free // ((4 if with_cuda else 2) << 30)))
