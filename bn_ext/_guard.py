"""Import guard: compare what the library was built against with what is running, before it is loaded.

C++ libraries are tied to the torch they were compiled against. Loading one under another torch ends in an undefined
symbol at best; the guard says what happened and what to type instead.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import sysconfig
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypedDict, cast
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
RECORD_NAME = "_build.json"


class BuildRecord(TypedDict):
    """What setup.py wrote down beside the library that it built.

    version: bn_ext's own; torch, torch_cuda, cxx11_abi: torch.__version__, torch.version.cuda and
    torch.compiled_with_cxx11_abi() at build; python: the interpreter's SOABI; compiler: its first line of --version;
    openmp, one_thread_reason: whether kernels use torch's threads, and why not; cuda, cuda_reason, cuda_codes: whether
    there are CUDA kernels, why (not), and nvcc's codes that they were built for ("sm_90,compute_90").
    """

    version: str
    torch: str
    torch_cuda: str | None
    cxx11_abi: bool
    python: str
    compiler: str
    openmp: bool
    one_thread_reason: str
    cuda: bool
    cuda_reason: str
    cuda_codes: str


def installed_from(folder: Path) -> str | None:
    """Return what the package in folder was installed from, as pip takes it, or None where nobody wrote that down.

    Installers leave it beside the package (PEP 610). A wheel is left out: it fits the torch that it was built for.
    """
    for path in folder.parent.glob("bn_ext-*.dist-info/direct_url.json"):
        try:
            said = json.loads(path.read_text())
            url = str(said["url"])
            if "vcs_info" in said:
                version = said["vcs_info"].get("requested_revision")
                return f"{said['vcs_info']['vcs']}+{url}" + (f"@{version}" if version else "")
            if "dir_info" in said:
                return unquote(urlsplit(url).path)
            return None if url.endswith(".whl") else url
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return None


def install_command(folder: Path = HERE) -> str:
    """Return what to type to build the package in folder anew: from the checkout or from where it came."""
    checkout = folder.parent
    if (checkout / "setup.py").is_file() and (checkout / "buildtools").is_dir():
        return f"pip install -e {shlex.quote(str(checkout))}"
    # Without its cache pip builds anew instead of taking the wheel that it keeps of this very source.
    command = "pip install --force-reinstall --no-deps --no-cache-dir "
    source = installed_from(folder)
    return command + (shlex.quote(source) if source else ".   (in a checkout of bn_ext)")


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


def has_library(folder: Path) -> bool:
    """Return whether folder holds a compiled library for this Python."""
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def shadowed(folder: Path = HERE) -> Path | None:
    """Return the package with a library that a source folder without one hides, or None.

    After `pip install .` in a checkout, Python started there finds the checkout's folder first.
    """
    if has_library(folder):
        return None
    packages = (Path(entry or ".").resolve() / "bn_ext" for entry in sys.path)
    return next((p for p in packages if p != folder.resolve() and has_library(p)), None)


def hand_over(name: str, installed: Path) -> None:
    """Put the package in the folder installed in the place of the module of this name, and say so."""
    warnings.warn(
        f"bn_ext in {HERE} is a source folder without the compiled library; the installed bn_ext in {installed} is "
        "used (run from another folder, or pip install -e .)",
        stacklevel=2,
    )
    for part in [part for part in sys.modules if part.startswith(f"{name}.")]:
        del sys.modules[part]
    spec = spec_from_file_location(name, installed / "__init__.py", submodule_search_locations=[str(installed)])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def read_record(folder: Path = HERE) -> BuildRecord:
    """Return the record beside the library in folder. Raises ImportError where there is no library for this Python."""
    if not has_library(folder):
        others = sorted(p.name for p in folder.glob("_C.*.so"))
        if others:
            soabi = sysconfig.get_config_var("SOABI")
            what = f"was built for another Python ({', '.join(others)}, this one is {soabi})"
        else:
            what = "is a source folder without the compiled library (if bn_ext is installed, run from another folder)"
        raise ImportError(f"bn_ext in {folder} {what}. To build it, type: {install_command(folder)}")
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        if missing := BuildRecord.__required_keys__ - set(record):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return cast(BuildRecord, record)
    except (OSError, ValueError, TypeError) as error:
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
