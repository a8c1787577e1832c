"""What setup.py decides: CPU or CUDA, GPUs, compiler, flags, jobs. Plain functions, so that tests reach them."""

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

from locate_torch import TorchLocation
from toolkit import Missing, Toolkit, find_toolkit

OLDEST_CAPABILITY = (7, 5)
BUILD_REQUIREMENTS = '"setuptools>=77.0.3" "ninja>=1.11"'


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


def decide_cuda(
    environ: Mapping[str, str], torch_version: str, torch_cuda: str | None, toolkit: Toolkit | Missing
) -> Cuda:
    """Decide whether to build the CUDA kernels.

    torch_cuda is torch.version.cuda. What the machine's driver or GPU says plays no part: wheels are built on machines
    without one. Raises Cannot where FORCE_CUDA asks for what is not to be had.
    """
    force = _switch(environ, "FORCE_CUDA")
    if _switch(environ, "FORCE_CPU"):
        if force:
            raise Cannot("FORCE_CUDA and FORCE_CPU are both set, unset one of them.")
        return Cuda(False, "FORCE_CPU was set at build")
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    elif isinstance(toolkit, Missing):
        reason = f"torch {torch_version} is of CUDA {torch_cuda}, but {toolkit.reason}"
    elif toolkit.version[0] != int(torch_cuda.split(".")[0]):
        reason = f"nvcc in {toolkit.home} is of CUDA {number(toolkit.version)}, torch {torch_version} of {torch_cuda}"
    else:
        return Cuda(True, f"built with nvcc {number(toolkit.version)} for torch's CUDA {torch_cuda}")
    if force:
        raise Cannot(f"FORCE_CUDA is set, but {reason}.")
    return Cuda(False, reason)


def number(version: tuple[int, int]) -> str:
    """Return (major, minor) as text."""
    return f"{version[0]}.{version[1]}"


class Settled(NamedTuple):
    """What a build starts from: the C++ compiler's command, the CUDA toolkit or why there is none, CUDA or not."""

    compiler: list[str]
    toolkit: Toolkit | Missing
    cuda: Cuda


def toolkit_for(environ: Mapping[str, str], torch_cuda: str | None) -> Toolkit | Missing:
    """Return the CUDA toolkit that fits this torch, or why there is none."""
    if torch_cuda is None:
        return Missing("none is needed")
    return find_toolkit(environ, int(torch_cuda.split(".")[0]))


def settle(environ: Mapping[str, str]) -> Settled:
    """Look for all that a build needs; raise Cannot, in one sentence, for the first thing that is missing."""
    try:
        import torch
    except ImportError as error:
        raise Cannot(
            f'torch cannot be imported ({error}), type pip install "torch>=2.11" and then try again.'
        ) from error
    compiler = find_compiler(environ)
    check_python_headers()
    toolkit = toolkit_for(environ, torch.version.cuda)
    return Settled(compiler, toolkit, decide_cuda(environ, torch.__version__, torch.version.cuda, toolkit))


class Stamp(NamedTuple):
    """What a wheel says of the torch it was built for: the local part of its version, and what it requires."""

    local: str
    requirement: str


def stamp(environ: Mapping[str, str], torch: TorchLocation) -> Stamp:
    """Return the stamp of a wheel built here, now. A library fits the release of torch that it was compiled against."""
    cuda = decide_cuda(environ, torch.version, torch.cuda, toolkit_for(environ, torch.cuda))
    public = torch.version.split("+")[0]
    release = re.fullmatch(r"(\d+\.\d+)(?:\.\d+)*(?:\.post\d+)?", public)
    device = "cu" + str(torch.cuda).replace(".", "") if cuda.wanted else "cpu"
    if release is None:  # a pre-release fits itself alone
        return Stamp(f"torch{public}{device}", f"torch=={public}")
    return Stamp(f"torch{release[1]}{device}", f"torch=={release[1]}.*")


def architectures(environ: Mapping[str, str], flags: list[str], toolkit: Toolkit) -> tuple[str, str]:
    """Return what to build for, as TORCH_CUDA_ARCH_LIST and as nvcc's codes ("sm_90,compute_90").

    flags are torch's, from the environment's list or the GPUs that it sees. What the kernels or this nvcc cannot be
    built for is left out, with a line; raises Cannot where nothing is left.
    """
    command = [str(toolkit.home / "bin" / "nvcc"), "--list-gpu-arch"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    known = {int(n) for n in re.findall(r"compute_(\d+)", said)}
    kept: dict[str, str] = {}
    dropped = []
    for digits, letter, kind in re.findall(r"arch=compute_(\d+)([a-z]?),code=(sm|compute)_", " ".join(flags)):
        name = f"{digits[:-1]}.{digits[-1]}{letter}"
        if int(digits) < 10 * OLDEST_CAPABILITY[0] + OLDEST_CAPABILITY[1]:
            dropped.append(f"{name}, the kernels need {number(OLDEST_CAPABILITY)}")
        elif known and int(digits) not in known:
            dropped.append(f"{name}, which nvcc {number(toolkit.version)} does not know")
        else:
            kept[f"{kind}_{digits}{letter}"] = name
    for clause in dict.fromkeys(dropped):
        print(f"bn_ext: left out of the GPU architectures: {clause}", flush=True)
    if not kept:
        wish = environ.get("TORCH_CUDA_ARCH_LIST", "")
        raise Cannot(f"of TORCH_CUDA_ARCH_LIST={wish} no architecture is left ({'; '.join(dict.fromkeys(dropped))}).")
    codes = sorted(kept, key=lambda code: (code[0] == "c", len(code), code))  # binaries by age, PTX behind them
    names = [kept[code] + "+PTX" * (f"compute_{code[3:]}" in kept) for code in codes if code.startswith("sm_")]
    return ";".join(names), ",".join(codes)


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


def openmp_flags(torch: ModuleType, compiler: str) -> tuple[list[str], str]:
    """Return the compile flags that make at::parallel_for use the threads of torch's own OpenMP runtime.

    Where there can be none, the second value says why.

    Nothing is added to the link: the calls that the compiler makes are bound, when the library is loaded, to the
    runtime that libtorch_cpu needs, so that there can be no second one. That holds only if that runtime knows them.
    """
    if not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info():
        return [], "torch's threads here are not OpenMP's"
    entry = "__kmpc_fork_call" if "clang" in compiler.lower() else "GOMP_parallel"
    library = Path(str(torch.__file__)).parent / "lib" / "libtorch_cpu.so"
    try:
        known = hasattr(ctypes.CDLL(str(library)), entry)
    except OSError:
        known = False
    if not known:
        return [], f"torch's OpenMP runtime does not fit {compiler}; build with CXX=g++"
    return ["-fopenmp"], ""


def say_what_is_missing(record: Mapping[str, object]) -> None:
    """Print, behind a build, what its library lacks and why: what stands before the compilers' lines is lost."""
    if record["torch_cuda"] is not None and not record["cuda"]:
        print(f"bn_ext: BUILT WITHOUT CUDA KERNELS: {record['cuda_reason']}", flush=True)
    if not record["openmp"]:
        print(f"bn_ext: BUILT FOR ONE THREAD: {record['one_thread_reason']}", flush=True)


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
