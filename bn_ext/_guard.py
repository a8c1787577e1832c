"""Import guard: compare what the library was built against with what is running, before it is loaded.

C++ libraries are tied to the torch they were compiled against. Loading one under another torch ends in an undefined
symbol at best; the guard says what happened and what to type instead.
"""

from __future__ import annotations

import importlib
import json
import re
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TypedDict, cast

HERE = Path(__file__).parent
RECORD_NAME = "_build.json"


class BuildRecord(TypedDict):
    """What setup.py wrote down beside the library that it built.

    version: bn_ext's own; torch, torch_cuda, cxx11_abi: torch.__version__, torch.version.cuda and
    torch.compiled_with_cxx11_abi() at build; python: the interpreter's SOABI; compiler: its first line of --version;
    openmp: whether kernels use torch's threads; cuda, cuda_reason, cuda_archs: whether there are CUDA kernels, why
    (not), and for which GPUs.
    """

    version: str
    torch: str
    torch_cuda: str | None
    cxx11_abi: bool
    python: str
    compiler: str
    openmp: bool
    cuda: bool
    cuda_reason: str
    cuda_archs: str


def install_command(folder: Path = HERE) -> str:
    """Return what to type to build the package in folder anew: for a checkout with its path, else as seen from one."""
    checkout = folder.parent
    if (checkout / "setup.py").is_file() and (checkout / "buildtools").is_dir():
        return f"pip install -e {checkout}"
    return "pip install --force-reinstall --no-deps .   (in a checkout of bn_ext)"


def _release(version: str) -> str:
    """Return the part of a torch version that the C++ interface hangs on: "2.13", or all of a pre-release."""
    match = re.fullmatch(r"(\d+\.\d+)(?:\.\d+)*(?:\.post\d+)?(?:\+.*)?", version)
    return match[1] if match else version


def complaint(
    record: BuildRecord, torch_version: str, torch_cuda: str | None, cxx11_abi: bool, folder: Path = HERE
) -> str | None:
    """Return why a library with this record cannot run under the given torch and what to type, or None if it can.

    torch_version, torch_cuda and cxx11_abi are the running torch's __version__, version.cuda and
    compiled_with_cxx11_abi().
    """
    built_cuda = record["torch_cuda"]
    if _release(record["torch"]) != _release(torch_version):
        what = f"was built against torch {record['torch']}, but torch {torch_version} is running"
    elif record["cxx11_abi"] != cxx11_abi:
        what = (
            f"was built with _GLIBCXX_USE_CXX11_ABI={int(record['cxx11_abi'])}, but the running torch {torch_version} "
            f"uses {int(cxx11_abi)}"
        )
    elif record["cuda"] and (torch_cuda or "none").split(".")[0] != (built_cuda or "none").split(".")[0]:
        running = f"CUDA {torch_cuda}" if torch_cuda else "no CUDA"
        what = f"was built for CUDA {built_cuda}, but the running torch {torch_version} has {running}"
    else:
        return None
    return f"bn_ext {what}. Build it for this torch, type: {install_command(folder)}"


def read_record(folder: Path = HERE) -> BuildRecord:
    """Return the record beside the library in folder. Raises ImportError where there is no library for this Python."""
    if not any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        others = sorted(p.name for p in folder.glob("_C.*.so"))
        if others:
            soabi = sysconfig.get_config_var("SOABI")
            what = f"was built for another Python ({', '.join(others)}, this one is {soabi})"
        else:
            what = "is a source folder without the compiled library (if bn_ext is installed, run from another folder)"
        raise ImportError(f"bn_ext in {folder} {what}. To build it, type: {install_command(folder)}")
    try:
        return cast(BuildRecord, json.loads((folder / RECORD_NAME).read_text()))
    except (OSError, ValueError) as error:
        raise ImportError(
            f"bn_ext in {folder} has a library without a readable record of its build ({error}). "
            f"Type: {install_command(folder)}"
        ) from error


def load_library() -> ModuleType:
    """Check the library against the running torch, load it, and return bn_ext._C. Raises ImportError with a remedy."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError('bn_ext needs torch. Type: pip install "torch>=2.11"', name="torch") from error
    record = read_record()
    wrong = complaint(record, str(torch.__version__), torch.version.cuda, torch.compiled_with_cxx11_abi())
    if wrong is not None:
        raise ImportError(wrong)
    try:
        return importlib.import_module("bn_ext._C")
    except ImportError as error:
        raise ImportError(
            f"bn_ext's library could not be loaded, though it was built for this torch ({torch.__version__}): {error}. "
            f"Build it anew, type: {install_command()}"
        ) from error
